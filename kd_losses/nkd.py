"""NKD: From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with
Normalized Loss and Customized Soft Labels (Yang, Zeng, Li, Zhang, Yuan, Li, ICCV 2023),
https://arxiv.org/abs/2303.13005
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class NKD(nn.Module):
    """Cross-entropy of the target, weighted by the teacher's probability, and of the other classes.

        p = softmax(out),   q = softmax of the K - 1 other logits / T
        target = -1 / B * sum_b p_t,y log p_s,y             y: the label; always without T
        others = -T^2 / B * sum_b sum_{c != y} q_t,c log q_s,c
        loss = target + gamma * others

    gamma: weight of the others; T: their temperature, above 0 (authors' code: 1.5 and 1 on
    ImageNet, 3.5 and 3 on CIFAR-100). These are cross-entropies, not divergences: if the student
    equals the teacher, the loss is not 0. With two classes `others` is 0.
    Differs from the paper: no known difference.
    """

    def __init__(self, gamma: float = 1.5, T: float = 1.0):
        super().__init__()
        if not T > 0:
            raise ValueError(f"expected T > 0, got {T}")
        self.gamma, self.T = gamma, T

    def forward(self, out_s: Tensor, out_t: Tensor, target: Tensor) -> Tensor:
        """out_s, out_t: logits (B, K); target: int64 (B,). Returns a scalar.

        Raises ValueError if the shapes do not fit or there are fewer than two classes.
        """
        if out_s.shape != out_t.shape or out_s.dim() != 2 or target.shape != out_s.shape[:1]:
            raise ValueError(
                "NKD: expected logits of equal shape (B, K) and targets (B,), got "
                f"{(*out_s.shape,)}, {(*out_t.shape,)} and {(*target.shape,)}"
            )
        if out_s.shape[1] < 2:
            raise ValueError("NKD: expected at least two classes")
        with torch.autocast(out_s.device.type, enabled=False):
            out_s, out_t = _float32(out_s), _float32(out_t.detach())
            y = target[:, None]
            own = torch.zeros_like(out_s, dtype=torch.bool).scatter(1, y, True)
            trust = out_t.softmax(1).gather(1, y)[:, 0]
            loss = -trust * F.log_softmax(out_s, dim=1).gather(1, y)[:, 0]
            z_s, z_t = ((x / self.T).masked_fill(own, -torch.inf) for x in (out_s, out_t))
            log_q_s = F.log_softmax(z_s, dim=1).masked_fill(own, 0)  # q_t is 0 there
            q_t = z_t.softmax(1)
            return (loss - self.gamma * self.T**2 * (q_t * log_q_s).sum(1)).mean()


def _float32(x: Tensor) -> Tensor:
    """x in float32, unless it is in float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
