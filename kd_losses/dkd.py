"""DKD: Decoupled Knowledge Distillation (Zhao, Cui, Song, Qiu, Liang, CVPR 2022, section 3,
equation 7), https://arxiv.org/abs/2203.08679
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DKD(nn.Module):
    """The soft-target loss in two parts: the target class against the others, and the others only.

        p = softmax(out / T),   b = (p_y, 1 - p_y),   q = softmax of the K - 1 other logits / T
        TCKD = T^2 / B * sum_b KL(b_t || b_s),        NCKD = T^2 / B * sum_b KL(q_t || q_s)
        loss = alpha * TCKD + beta * NCKD

    alpha, beta: weights (paper: 1 and, on CIFAR-100, 2 to 8 by pair of networks; 0.5 on ImageNet);
    T: temperature, above 0 (4, on ImageNet 1). With two classes NCKD is 0.
    Differs from the paper: nothing. The authors' code increases the weight linearly over the first
    20 epochs (not in this file).
    """

    def __init__(self, alpha: float = 1.0, beta: float = 8.0, T: float = 4.0):
        super().__init__()
        if T <= 0:
            raise ValueError(f"expected T > 0, got {T}")
        self.alpha, self.beta, self.T = alpha, beta, T

    def forward(self, out_s: Tensor, out_t: Tensor, target: Tensor) -> Tensor:
        """out_s, out_t: logits (B, K); target: int64 (B,). Returns a scalar.

        Raises ValueError if the shapes do not fit or there are fewer than two classes.
        """
        if out_s.shape != out_t.shape or target.shape != out_s.shape[:1]:
            raise ValueError(
                "DKD: expected logits of equal shape (B, K) and targets (B,), got "
                f"{(*out_s.shape,)}, {(*out_t.shape,)} and {(*target.shape,)}"
            )
        if out_s.shape[1] < 2:
            raise ValueError("DKD: expected at least two classes")
        with torch.autocast(out_s.device.type, enabled=False):
            own = torch.zeros_like(out_s, dtype=torch.bool).scatter(1, target[:, None], True)
            margin_s, log_q_s, _ = self.groups(out_s, target, own)
            margin_t, log_q_t, q_t = self.groups(out_t.detach(), target, own)
            # log p_y = logsigmoid(margin), log(1 - p_y) = logsigmoid(-margin): neither underflows
            tckd = _term(margin_s, margin_t) + _term(-margin_s, -margin_t)
            nckd = (q_t * (log_q_t - log_q_s)).sum(1)
            return self.T**2 * (self.alpha * tckd + self.beta * nckd).mean()

    def groups(self, out: Tensor, target: Tensor, own: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """How far the target's logit is above the log-sum-exp of the others (B,), and log q and q
        (B, K); at the target's place log q means nothing and q is 0."""
        z = _float32(out) / self.T
        others = z.masked_fill(own, -torch.inf)
        total = others.logsumexp(1, keepdim=True)
        log_q = z - total
        return log_q.gather(1, target[:, None])[:, 0], log_q, others.softmax(1)


def _term(margin_s: Tensor, margin_t: Tensor) -> Tensor:
    """p_t * log(p_t / p_s) of p = sigmoid(margin), neither of which underflows."""
    return margin_t.sigmoid() * (F.logsigmoid(margin_t) - F.logsigmoid(margin_s))


def _float32(x: Tensor) -> Tensor:
    """x in float32, unless it is in float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
