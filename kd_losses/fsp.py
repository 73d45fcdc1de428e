"""FSP: A Gift from Knowledge Distillation: Fast Optimization, Network Minimization and Transfer
Learning (Yim, Joo, Bae, Kim, CVPR 2017, equations 1 and 2),
https://openaccess.thecvf.com/content_cvpr_2017/papers/Yim_A_Gift_From_CVPR_2017_paper.pdf
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FSP(nn.Module):
    """Mean squared difference of the flow matrices between two layers (flow of solution procedure).

        G(fm1, fm2)_ij = 1 / (H W) * sum_p fm1_i(p) fm2_j(p)      (B, C_1, C_2)
        loss = mean over B, C_1, C_2 of (G_s - G_t)^2

    If the two maps of a network differ in size, the larger one is average-pooled to the smaller
    size.
    Differs from the paper: as in KD-Zoo, a mean over the matrix instead of the squared Frobenius
    norm, average pooling instead of max pooling, and equal weights for all pairs.
    """

    def forward(self, fm_s1: Tensor, fm_s2: Tensor, fm_t1: Tensor, fm_t2: Tensor) -> Tensor:
        """fm_s1, fm_t1 (B, C_1, *, *) and fm_s2, fm_t2 (B, C_2, *, *): maps of an earlier and a
        later layer; sizes may differ, channels not. Returns a scalar.

        Raises ValueError if batch or channels of the networks differ.
        """
        shapes = [(x.shape[0], x.shape[1]) for x in (fm_s1, fm_s2, fm_t1, fm_t2)]
        if shapes[:2] != shapes[2:]:
            raise ValueError(
                f"FSP: expected equal batch sizes and channels, got {shapes[:2]}, {shapes[2:]}"
            )
        with torch.autocast(fm_s1.device.type, enabled=False):
            flow_t = self.flow(fm_t1.detach(), fm_t2.detach())
            return (self.flow(fm_s1, fm_s2) - flow_t).square().mean()

    def flow(self, fm1: Tensor, fm2: Tensor) -> Tensor:
        """The flow matrix (B, C_1, C_2) between two maps of a network."""
        fm1, fm2 = _float32(fm1), _float32(fm2)
        if fm1.shape[2:] != fm2.shape[2:]:
            size = tuple(min(a, b) for a, b in zip(fm1.shape[2:], fm2.shape[2:]))
            fm1, fm2 = (F.adaptive_avg_pool2d(x, size) for x in (fm1, fm2))
        x1, x2 = fm1.flatten(2), fm2.flatten(2)
        return x1 @ x2.mT / x1.shape[2]


def _float32(x: Tensor) -> Tensor:
    """x in float32, unless it is in float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
