"""IRG: Knowledge Distillation via Instance Relationship Graph (Liu, Cao, Li, Yuan, Hu, Li, Duan,
CVPR 2019, section 3),
https://openaccess.thecvf.com/content_CVPR_2019/html/
Liu_Knowledge_Distillation_via_Instance_Relationship_Graph_CVPR_2019_paper.html
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class IRG(nn.Module):
    """Distance between the relation graphs of two networks over a batch, and between their changes.

        E(x)_ij = max(|x_i - x_j|^2, 1e-12) / largest of the batch, E(x)_ii = 0         (B, B)
        r_b = max(|pool(fm2)_b - pool(fm3)_b|^2, 1e-12) / largest of the batch          (B,)
        vert = mean over B, K of (out_s - out_t)^2
        edge = mean over fm2, fm3, feat of mean over B, B of (E_s - E_t)^2
        tran = mean over B of (r_s - r_t)^2
        loss = w_irg_vert * vert + w_irg_edge * edge + w_irg_tran * tran

    pool averages the larger map to the size of the smaller one, and neighbouring channels of the
    wider map to the number of the other. w_irg_vert, w_irg_edge, w_irg_tran: weights of the parts
    (KD-Zoo: 0.1, 5.0, 5.0).
    Differs from the paper, as in KD-Zoo: vertices are compared only by their logits, and the change
    between layers by one number per sample.
    """

    def __init__(self, w_irg_vert: float = 0.1, w_irg_edge: float = 5.0, w_irg_tran: float = 5.0):
        super().__init__()
        self.w_irg_vert, self.w_irg_edge, self.w_irg_tran = w_irg_vert, w_irg_edge, w_irg_tran

    def forward(self, layers_s: Sequence[Tensor], layers_t: Sequence[Tensor]) -> Tensor:
        """layers_s, layers_t: (fm2, fm3, feat, out) of each network, two maps (B, C, H, W), the
        pooled feature (B, D) and logits (B, K); only B and K have to agree. Returns a scalar.

        Raises ValueError at a batch of one, and where batch or number of logits differ.
        """
        fm2_s, fm3_s, feat_s, out_s = (_float32(x) for x in layers_s)
        fm2_t, fm3_t, feat_t, out_t = (_float32(x.detach()) for x in layers_t)
        if out_s.shape != out_t.shape:
            raise ValueError(
                f"IRG: expected logits of equal shape, got {(*out_s.shape,)}, {(*out_t.shape,)}"
            )
        batches = {len(x) for x in (*layers_s, *layers_t)}
        if len(batches) > 1 or batches == {1}:
            raise ValueError(
                f"IRG: expected equal batch sizes of at least two samples, got {batches}"
            )
        with torch.autocast(out_s.device.type, enabled=False):
            vert = (out_s - out_t).square().mean()
            edge = self.edges(fm2_s, fm3_s, feat_s) - self.edges(fm2_t, fm3_t, feat_t)
            tran = self.transformation(fm2_s, fm3_s) - self.transformation(fm2_t, fm3_t)
            return (
                self.w_irg_vert * vert
                + self.w_irg_edge * edge.square().mean()
                + self.w_irg_tran * tran.square().mean()
            )

    def edges(self, *layers: Tensor) -> Tensor:
        """For each of n layers the matrix (n, B, B) of squared distances between the samples, the
        largest being 1."""
        gram = torch.stack([_gram(x) for x in layers])
        square = gram.diagonal(dim1=1, dim2=2)
        distance = (square[:, :, None] + square[:, None] - 2 * gram).clamp_min(1e-12)
        own = torch.eye(gram.shape[1], dtype=torch.bool, device=gram.device)
        distance = distance.masked_fill(own, 0)
        # amax: tied entries share the gradient
        return distance / distance.amax((1, 2), keepdim=True)

    def transformation(self, fm1: Tensor, fm2: Tensor) -> Tensor:
        """The squared distance (B,) between a sample's two maps, the largest being 1."""
        size = tuple(min(a, b) for a, b in zip(fm1.shape[2:], fm2.shape[2:]))
        channels = min(fm1.shape[1], fm2.shape[1])
        fm1, fm2 = (_pool(x, channels, size) for x in (fm1, fm2))
        distance = (fm1 - fm2).square().flatten(1).sum(1).clamp_min(1e-12)
        return distance / distance.amax()


def _gram(x: Tensor) -> Tensor:
    # in the order of memory, which a product over all entries does not see: no copy
    x = (x if x.is_contiguous() else x.movedim(1, -1)).flatten(1)
    # distances do not change, and lose fewer digits, without what the samples have in common
    x = x - x.detach().mean(0)
    return x @ x.T


def _pool(fm: Tensor, channels: int, size: tuple[int, ...]) -> Tensor:
    """Averages a map (B, C, H, W) to (B, channels, prod(size)), untouched where nothing changes."""
    if fm.shape[2:] != size:
        fm = F.adaptive_avg_pool2d(fm, size)
    fm = fm.flatten(2)
    return fm if fm.shape[1] == channels else F.adaptive_avg_pool2d(fm, (channels, fm.shape[2]))


def _float32(x: Tensor) -> Tensor:
    """x in float32, unless it is in float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
