"""WTTM: Knowledge Distillation Based on Transformed Teacher Matching (Zheng, Yang, ICLR 2024, the
weighted variant), https://arxiv.org/abs/2402.11148
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class WTTM(nn.Module):
    """TTM with a weight for each sample, larger if the teacher is less certain.

        p = softmax(out),   u = sum_c p_t,c^gamma,   q = p_t^gamma / u
        loss = 1 / B * sum_b u_b KL(q_b || p_s,b)

    gamma: the power, above 0 (authors' code: 0.1; 0.2 with a weight of 4 together with CRD). For
    gamma < 1, u is between 1 (the teacher is certain of one class) and K^(1 - gamma) (all classes
    are equal), and the loss is larger than TTM's by about this factor.
    Differs from the paper: no known difference.
    """

    def __init__(self, gamma: float = 0.1):
        super().__init__()
        if not gamma > 0:
            raise ValueError(f"expected gamma > 0, got {gamma}")
        self.gamma = gamma

    def forward(self, out_s: Tensor, out_t: Tensor) -> Tensor:
        """out_s, out_t: logits (B, K). Returns a scalar.

        Raises ValueError if the shapes do not fit.
        """
        if out_s.shape != out_t.shape or out_s.dim() != 2:
            raise ValueError(
                "WTTM: expected logits of equal shape (B, K), got "
                f"{(*out_s.shape,)} and {(*out_t.shape,)}"
            )
        with torch.autocast(out_s.device.type, enabled=False):
            out_s, out_t = _float32(out_s), _float32(out_t.detach())
            log_p_s = F.log_softmax(out_s, dim=1)
            # not a power of the softmax, which underflows
            power = self.gamma * F.log_softmax(out_t, dim=1)
            log_u = power.logsumexp(1, keepdim=True)
            # u * q is exp(power)
            return (power.exp() * (power - log_u - log_p_s)).sum(1).mean()


def _float32(x: Tensor) -> Tensor:
    """x in float32, unless it is in float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
