"""ST: soft targets. Distilling the Knowledge in a Neural Network
(Hinton, Vinyals, Dean, NIPS 2014 workshop, section 2), https://arxiv.org/abs/1503.02531
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SoftTarget(nn.Module):
    """Kullback-Leibler divergence from the teacher's softened prediction to the student's.

        loss = T^2 / B * sum_b KL(softmax(out_t / T) || softmax(out_s / T))

    T: temperature, above 0 (KD-Zoo and the CRD benchmark use 4); T^2 keeps the gradient's scale.
    Differs from the paper: in KD-Zoo the cross-entropy has weight 1; the CRD benchmark uses 0.1 *
    cross-entropy + 0.9 * this loss.
    """

    def __init__(self, T: float = 4.0):
        super().__init__()
        if T <= 0:
            raise ValueError(f"expected T > 0, got {T}")
        self.T = T

    def forward(self, out_s: Tensor, out_t: Tensor) -> Tensor:
        """out_s, out_t: logits (B, K). Returns a scalar."""
        with torch.autocast(out_s.device.type, enabled=False):
            out_s, out_t = _float32(out_s), _float32(out_t.detach())
            log_p_s = F.log_softmax(out_s / self.T, dim=1)
            log_p_t = F.log_softmax(out_t / self.T, dim=1)
            loss = F.kl_div(log_p_s, log_p_t, reduction="batchmean", log_target=True)
            return loss * self.T**2


def _float32(x: Tensor) -> Tensor:
    """x in float32, unless it is in float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
