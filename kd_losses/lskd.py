"""LSKD: Logit Standardization in Knowledge Distillation (Sun, Ren, Li, Wang, Cao, CVPR 2024),
https://arxiv.org/abs/2403.01427
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def standardise(out: Tensor) -> Tensor:
    """Every row without its mean and in units of its standard deviation: only the order of the
    logits and their relative distances are left.

        z = (out - mean) / max(std + 1e-7, 0.001)           std with the divisor K - 1

    out: logits (B, K), half types in float32 afterwards. Its gradient in a row is orthogonal to the
    row and to shifts of it. With two classes every row becomes (a, -a), a = 1 / sqrt(2) or its
    negative: nothing but the order is left, and the gradient all but vanishes.
    Raises ValueError if out is no matrix or has fewer than two classes.
    """
    if out.dim() != 2 or out.shape[1] < 2:
        raise ValueError(
            f"standardise: expected logits (B, K) of at least two classes, got {(*out.shape,)}"
        )
    with torch.autocast(out.device.type, enabled=False):
        out = _float32(out)
        # constant rows become exactly 0 before the mean can round
        out = out - out.detach().amax(1, keepdim=True)
        # 1e-7: the authors'; the floor bounds the gradient where a row is all but constant
        scale = (out.std(1, keepdim=True) + 1e-7).clamp_min(1e-3)
        return (out - out.mean(1, keepdim=True)) / scale


class LSKD(nn.Module):
    """A loss of standardised logits: the soft-target loss, or another loss that is given.

        loss = T^2 / B * sum_b KL(softmax(z_t / T) || softmax(z_s / T)),   z = standardise(out)
        loss = inner(z_s, z_t, *rest)                       with another loss inside

    T: temperature, above 0 (authors' code: 2; 3 or 4 for some pairs); inner: a module that replaces
    the divergence, such as DKD, with its own temperature. Standardisation removes the mean and the
    scale of the student's logits, so only the cross-entropy trains them.
    Differs from the authors' code: `standardise` has a smallest standard deviation. Without it, a
    constant row has a gradient of nearly 1e6.
    """

    def __init__(self, T: float = 2.0, inner: nn.Module | None = None):
        super().__init__()
        if not T > 0:
            raise ValueError(f"expected T > 0, got {T}")
        self.T, self.inner = T, inner

    def forward(self, out_s: Tensor, out_t: Tensor, *rest) -> Tensor:
        """out_s, out_t: logits (B, K); rest: what `inner` takes after them. Returns a scalar.

        Raises ValueError if the shapes differ, for fewer than two classes, and where there is a
        rest without `inner`.
        """
        if out_s.shape != out_t.shape:
            raise ValueError(
                f"LSKD: expected logits of equal shape, got {(*out_s.shape,)} and {(*out_t.shape,)}"
            )
        z_s, z_t = standardise(out_s), standardise(out_t.detach())
        if self.inner is not None:
            return self.inner(z_s, z_t, *rest)
        if rest:
            raise ValueError("LSKD without an inner loss takes only logits")
        with torch.autocast(out_s.device.type, enabled=False):
            log_p_s, log_p_t = (F.log_softmax(z / self.T, dim=1) for z in (z_s, z_t))
            loss = F.kl_div(log_p_s, log_p_t, reduction="batchmean", log_target=True)
            return loss * self.T**2


def _float32(x: Tensor) -> Tensor:
    """x in float32, unless it is in float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
