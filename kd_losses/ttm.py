"""TTM: Knowledge Distillation Based on Transformed Teacher Matching (Zheng, Yang, ICLR 2024),
https://arxiv.org/abs/2402.11148
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TTM(nn.Module):
    """Divergence from a power of the teacher's prediction to the student's prediction.

        p = softmax(out)
        q = p_t^gamma / sum_c p_t,c^gamma = softmax(gamma * out_t)
        loss = 1 / B * sum_b KL(q || p_s)

    This is a temperature of 1 / gamma for the teacher only, without a factor T^2. gamma: the power,
    above 0 (authors' code: 0.1, for vgg13 -> vgg8 with a weight of 45).
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
                f"TTM: expected logits of equal shape (B, K), got {(*out_s.shape,)} and "
                f"{(*out_t.shape,)}"
            )
        with torch.autocast(out_s.device.type, enabled=False):
            out_s, out_t = _float32(out_s), _float32(out_t.detach())
            # not a power of the softmax, which underflows
            log_q = F.log_softmax(self.gamma * out_t, dim=1)
            log_p_s = F.log_softmax(out_s, dim=1)
            return F.kl_div(log_p_s, log_q, reduction="batchmean", log_target=True)


def _float32(x: Tensor) -> Tensor:
    """x in float32, unless it is in float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
