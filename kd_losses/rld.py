"""RLD: Knowledge Distillation with Refined Logits (Sun, Chen, Lyu, Chen, Chen, Wang, ICCV 2025),
https://arxiv.org/abs/2408.07703
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RLD(nn.Module):
    """The teacher's corrected confidence, and its probabilities of the classes ranked below the
    label.

        p = softmax(out / alpha_T),   y: the label
        SCD = alpha_T^2 / B * sum_b KL((max p_t, 1 - max p_t) || (p_s,y, 1 - p_s,y))
        q = softmax of out / T over the classes c with out_t,c < out_t,y
        MCD = T^2 / B * sum_b KL(q_t || q_s)                0 where no such class is
        loss = alpha * SCD + beta * MCD

    alpha, beta: weights (authors' code: 1 and 8, on ImageNet 1 and 0.5); T, alpha_T: temperatures,
    above 0 (4 and 1, on ImageNet 1 and 1). For standardised logits (not in this file) the authors
    use 9 and 72 and both temperatures 2. With two classes MCD is 0.
    Differs from the paper: no known difference. The authors' code increases the weight linearly
    over the first 20 epochs (not in this file).
    """

    def __init__(self, alpha: float = 1.0, beta: float = 8.0, T: float = 4.0, alpha_T: float = 1.0):
        super().__init__()
        if not (T > 0 and alpha_T > 0):
            raise ValueError(f"expected T > 0 and alpha_T > 0, got {T}, {alpha_T}")
        self.alpha, self.beta, self.T, self.alpha_T = alpha, beta, T, alpha_T

    def forward(self, out_s: Tensor, out_t: Tensor, target: Tensor) -> Tensor:
        """out_s, out_t: logits (B, K); target: int64 (B,). Returns a scalar.

        Raises ValueError if the shapes do not fit or there are fewer than two classes.
        """
        if out_s.shape != out_t.shape or out_s.dim() != 2 or target.shape != out_s.shape[:1]:
            raise ValueError(
                "RLD: expected logits of equal shape (B, K) and targets (B,), got "
                f"{(*out_s.shape,)}, {(*out_t.shape,)} and {(*target.shape,)}"
            )
        if out_s.shape[1] < 2:
            raise ValueError("RLD: expected at least two classes")
        with torch.autocast(out_s.device.type, enabled=False):
            out_s, out_t = _float32(out_s), _float32(out_t.detach())
            y = target[:, None]
            # log p = logsigmoid(margin), log(1 - p) = logsigmoid(-margin): neither underflows
            margin_s = _margin(out_s / self.alpha_T, y)
            margin_t = _margin(out_t / self.alpha_T, out_t.argmax(1, keepdim=True))
            scd = _term(margin_s, margin_t) + _term(-margin_s, -margin_t)
            masked = out_t >= out_t.gather(1, y)
            # not -inf: a row without any class left is then uniform, not NaN
            z_s, z_t = (
                (x / self.T).masked_fill(masked, torch.finfo(x.dtype).min) for x in (out_s, out_t)
            )
            log_q_s, log_q_t = F.log_softmax(z_s, dim=1), F.log_softmax(z_t, dim=1)
            mcd = (log_q_t.exp() * (log_q_t - log_q_s)).sum(1)
            loss = self.alpha * self.alpha_T**2 * scd + self.beta * self.T**2 * mcd
            return loss.mean()


def _margin(z: Tensor, index: Tensor) -> Tensor:
    """How far the logit at index (B, 1) is above the log-sum-exp of the others, (B,)."""
    z = z - z.detach().amax(1, keepdim=True)
    others = z.scatter(1, index, -torch.inf).logsumexp(1)
    return z.gather(1, index)[:, 0] - others


def _term(margin_s: Tensor, margin_t: Tensor) -> Tensor:
    """p_t * log(p_t / p_s) of p = sigmoid(margin), neither of which underflows."""
    return margin_t.sigmoid() * (F.logsigmoid(margin_t) - F.logsigmoid(margin_s))


def _float32(x: Tensor) -> Tensor:
    """x in float32, unless it is in float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
