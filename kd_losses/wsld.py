"""WSLD: Rethinking Soft Labels for Knowledge Distillation: A Bias-Variance Tradeoff Perspective
(Zhou, Song, Chen, Zhou, Wang, Yuan, Zhang, ICLR 2021), https://arxiv.org/abs/2102.00650
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class WSLD(nn.Module):
    """Soft labels with less weight if the student fits the label better than the teacher.

        e = -log softmax(out)_y                             y: the label
        w = 1 - exp(-e_s / (e_t + 1e-7))                    a constant for the gradient
        loss = -alpha T^2 / B * sum_b w_b sum_c softmax(out_t / T)_c log softmax(out_s / T)_c

    alpha: weight (the authors': 2.5 on ImageNet, 2.25 on CIFAR-100); T: temperature, above 0 (2 and
    4). It is a cross-entropy, not a divergence: if the student equals the teacher, the gradient is
    0, but the loss is not. The weights are not normalised: they fall during the training.
    Differs from the paper: the 1e-7, which is from the authors' code.
    """

    def __init__(self, alpha: float = 2.25, T: float = 4.0):
        super().__init__()
        if not T > 0:
            raise ValueError(f"expected T > 0, got {T}")
        self.alpha, self.T = alpha, T

    def forward(self, out_s: Tensor, out_t: Tensor, target: Tensor) -> Tensor:
        """out_s, out_t: logits (B, K); target: int64 (B,). Returns a scalar.

        Raises ValueError if the shapes do not fit.
        """
        if out_s.shape != out_t.shape or out_s.dim() != 2 or target.shape != out_s.shape[:1]:
            raise ValueError(
                "WSLD: expected logits of equal shape (B, K) and targets (B,), got "
                f"{(*out_s.shape,)}, {(*out_t.shape,)} and {(*target.shape,)}"
            )
        with torch.autocast(out_s.device.type, enabled=False):
            out_s, out_t = _float32(out_s), _float32(out_t.detach())
            e_s, e_t = (
                F.cross_entropy(x, target, reduction="none") for x in (out_s.detach(), out_t)
            )
            weight = -torch.expm1(-e_s / (e_t + 1e-7))
            log_p_s = F.log_softmax(out_s / self.T, dim=1)
            soft = -((out_t / self.T).softmax(1) * log_p_s).sum(1)
            return self.alpha * self.T**2 * (weight * soft).mean()


def _float32(x: Tensor) -> Tensor:
    """x in float32, unless it is in float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
