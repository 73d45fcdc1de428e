"""RKD: Relational Knowledge Distillation (Park, Kim, Lu, Cho, CVPR 2019, sections 3.2.1 and 3.2.2),
https://arxiv.org/abs/1904.05068
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

BLOCK = 2**21  # numbers of the largest tensor


class RKD(nn.Module):
    """Huber loss between the distances of all pairs and the angles of all triples of a batch.

        D_ij  = ||x_i - x_j||_2 / mu,   mu its mean over i != j                 (B, B)
        A_iab = e_ia . e_ib,            e_ij = (x_j - x_i) / ||x_j - x_i||_2    (B, B, B)
        loss  = w_dist * mean huber(D_s - D_t) + w_angle * mean huber(A_s - A_t)
        huber(d) = d^2 / 2 up to |d| = 1, |d| - 1/2 beyond

    w_dist, w_angle: at least 0 (KD-Zoo and the CRD benchmark 25 and 50; the paper's image
    classification too); with an angle weight of 0 the B^3 angles are not computed. Rows closer than
    1e-6 are duplicates: their distance is the constant 1e-6, and their e is 0.
    Differs from the paper: as in KD-Zoo, the means are over all pairs and triples, including those
    that repeat an index.
    """

    def __init__(self, w_dist: float = 25.0, w_angle: float = 50.0):
        super().__init__()
        if w_dist < 0 or w_angle < 0:
            raise ValueError(f"expected weights >= 0, got {w_dist} and {w_angle}")
        self.w_dist, self.w_angle = w_dist, w_angle

    def forward(self, feat_s: Tensor, feat_t: Tensor) -> Tensor:
        """feat_s (B, D_s), feat_t (B, D_t): vectors; the widths may differ. Returns a scalar.

        Raises ValueError if the batches differ or hold fewer than two samples.
        """
        if feat_s.shape[0] != feat_t.shape[0]:
            raise ValueError(
                f"RKD: expected equal batch sizes, got {feat_s.shape[0]} and {feat_t.shape[0]}"
            )
        if feat_s.shape[0] < 2:
            raise ValueError("RKD: expected a batch of at least two samples: it compares them")
        with torch.autocast(feat_s.device.type, enabled=False):
            x_s, x_t = _float32(feat_s).flatten(1), _float32(feat_t.detach()).flatten(1)
            if len(x_s) ** 2 * max(len(x_s), x_s.shape[1], x_t.shape[1]) > BLOCK:
                return self._fast_loss(x_s, x_t)
            (norm_s, e_s), (norm_t, e_t) = _relations(x_s, x_s), _relations(x_t, x_t)
            dist = F.smooth_l1_loss(_over_mean(norm_s), _over_mean(norm_t))
            if self.w_angle == 0:
                return self.w_dist * dist
            angle = F.smooth_l1_loss(e_s @ e_s.mT, e_t @ e_t.mT)
            return self.w_dist * dist + self.w_angle * angle

    def _fast_loss(self, x_s: Tensor, x_t: Tensor) -> Tensor:
        """The same, a few anchors at a time; their tensors are made once more for the gradient."""
        # batch 512 of width 64: 29 MB in the place of 2.4 GB
        n, width = len(x_s), max(len(x_s), x_s.shape[1], x_t.shape[1])
        anchors = zip(*(x.split(max(1, BLOCK // (n * width))) for x in (x_s, x_t)))
        keep = dict(use_reentrant=False, preserve_rng_state=False)
        blocks = [checkpoint(self._block, x_s, x_t, *few, **keep) for few in anchors]
        norm_s, norm_t, angle = zip(*blocks)
        dist = F.smooth_l1_loss(_over_mean(torch.cat(norm_s)), _over_mean(torch.cat(norm_t)))
        return self.w_dist * dist + self.w_angle * sum(angle) / n**3

    def _block(self, x_s: Tensor, x_t: Tensor, few_s: Tensor, few_t: Tensor) -> tuple[Tensor, ...]:
        """Distances (n, B) of both networks from n anchors, and the summed loss of their angles."""
        (norm_s, e_s), (norm_t, e_t) = _relations(x_s, few_s), _relations(x_t, few_t)
        if self.w_angle == 0:
            return norm_s, norm_t, norm_s.new_zeros(())
        # torch's own sum would hold on to the memory of what it adds up
        return norm_s, norm_t, F.smooth_l1_loss(e_s @ e_s.mT, e_t @ e_t.mT, reduction="none").sum()


def _relations(x: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor]:
    """Distances (n, B) of the rows of x (B, D) from n of them, and the directions e (n, B, D)."""
    # true differences: |x_i|^2 + |x_j|^2 - 2 x_i . x_j cancels for near rows
    diff = x - anchors[:, None]
    square = diff.square().sum(2)
    # the gradients of square root and direction at 0 are infinite; near rows give none
    near = square <= 1e-12
    norm = torch.where(near, 1e-12, square).sqrt()
    return norm, diff / torch.where(near, torch.inf, norm)[:, :, None]


def _over_mean(norm: Tensor) -> Tensor:
    """D (B, B) of the distances of all pairs."""
    n, dist = len(norm), norm.clone().fill_diagonal_(0)
    return dist / (dist.sum() / (n * (n - 1)))


def _float32(x: Tensor) -> Tensor:
    """x in float32, unless it is in float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
