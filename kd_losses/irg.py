"""IRG: Knowledge Distillation via Instance Relationship Graph (Liu, Cao, Li, Yuan, Hu, Li, Duan,
CVPR 2019, section 3),
https://openaccess.thecvf.com/content_CVPR_2019/html/Liu_Knowledge_Distillation_via_Instance_Relationship_Graph_CVPR_2019_paper.html
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class IRG(nn.Module):
    """Distance between the graphs that two networks draw over a batch, and between how they change.

        E(x)_ij = max(|x_i - x_j|^2, 1e-12) / largest of the batch, E(x)_ii = 0         (B, B)
        r_b = max(|pool(fm2)_b - pool(fm3)_b|^2, 1e-12) / largest of the batch          (B,)
        vert = mean over B, K of (out_s - out_t)^2
        edge = mean over fm2, fm3, feat of mean over B, B of (E_s - E_t)^2
        tran = mean over B of (r_s - r_t)^2
        loss = w_irg_vert * vert + w_irg_edge * edge + w_irg_tran * tran

    pool averages the larger map to the smaller one's size, and the channels of the wider one to the
    other's number, neighbours together.
    w_irg_vert, w_irg_edge, w_irg_tran: weights of the parts (KD-Zoo: 0.1, 5.0, 5.0).
    Differs from the paper, as in KD-Zoo: vertices are compared by their logits alone, the change
    between layers by one number a sample.
    """

    def __init__(self, w_irg_vert: float = 0.1, w_irg_edge: float = 5.0, w_irg_tran: float = 5.0):
        super().__init__()
        self.w_irg_vert, self.w_irg_edge, self.w_irg_tran = w_irg_vert, w_irg_edge, w_irg_tran

    def forward(self, layers_s: Sequence[Tensor], layers_t: Sequence[Tensor]) -> Tensor:
        """layers_s, layers_t: (fm2, fm3, feat, out) of each network, two maps (B, C, H, W), the
        pooled feature (B, D) and logits (B, K); only B and K have to agree. Returns a scalar.

        Raises ValueError at a batch of one, and where batch or number of logits differ.
        """
        fm2_s, fm3_s, feat_s, out_s = layers_s
        fm2_t, fm3_t, feat_t, out_t = (x.detach() for x in layers_t)
        if out_s.shape != out_t.shape:
            raise ValueError(f"IRG wants equal logits, not {(*out_s.shape,)}, {(*out_t.shape,)}")
        batches = {len(x) for x in (*layers_s, *layers_t)}
        if len(batches) > 1 or batches == {1}:
            raise ValueError(f"IRG wants one batch of at least two samples, not {batches}")
        with torch.autocast(out_s.device.type, enabled=False):
            vert = (_promote(out_s) - _promote(out_t)).square().mean()
            edge = sum(
                (self.edges(x_s) - self.edges(x_t)).square().mean()
                for x_s, x_t in ((fm2_s, fm2_t), (fm3_s, fm3_t), (feat_s, feat_t))
            )
            tran = self.transformation(fm2_s, fm3_s) - self.transformation(fm2_t, fm3_t)
            return (
                self.w_irg_vert * vert
                + self.w_irg_edge * edge / 3
                + self.w_irg_tran * tran.square().mean()
            )

    def edges(self, x: Tensor) -> Tensor:
        """The matrix (B, B) of squared distances between the samples, the largest being 1."""
        x = _promote(x)
        # in the order of memory, which distances do not see: no copy
        x = (x if x.is_contiguous() else x.movedim(1, -1)).flatten(1)
        # distances do not change, and lose fewer digits, without what the samples have in common
        x = x - x.detach().mean(0)
        square = x.square().sum(1)
        # x @ x.T, which is symmetric, with one product backward instead of two
        half = x @ x.detach().T
        product = half + half.T - half.detach()
        distance = (square[:, None] + square - 2 * product).clamp_min(1e-12)
        distance = distance.masked_fill(torch.eye(len(x), dtype=torch.bool, device=x.device), 0)
        return distance / distance.amax()  # amax: tied entries share the gradient

    def transformation(self, fm1: Tensor, fm2: Tensor) -> Tensor:
        """The squared distance (B,) between a sample's two maps, the largest being 1."""
        fm1, fm2 = _promote(fm1), _promote(fm2)
        size = tuple(min(a, b) for a, b in zip(fm1.shape[2:], fm2.shape[2:]))
        channels = min(fm1.shape[1], fm2.shape[1])
        fm1, fm2 = (_pool(x, channels, size) for x in (fm1, fm2))
        distance = (fm1 - fm2).square().flatten(1).sum(1).clamp_min(1e-12)
        return distance / distance.amax()


def _pool(fm: Tensor, channels: int, size: tuple[int, ...]) -> Tensor:
    """Averages a map (B, C, H, W) to (B, channels, prod(size)), untouched where nothing changes."""
    if fm.shape[2:] != size:
        fm = F.adaptive_avg_pool2d(fm, size)
    fm = fm.flatten(2)
    return fm if fm.shape[1] == channels else F.adaptive_avg_pool2d(fm, (channels, fm.shape[2]))


def _promote(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
