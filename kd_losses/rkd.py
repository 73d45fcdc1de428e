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
    classification too); an angle weight of 0 saves the B^3 work.
    Rows nearer than 1e-6 are duplicates: their distance is the constant 1e-6, their e is 0.
    Differs from the paper: means run over all pairs and triples, those that repeat an index
    included, as in KD-Zoo.
    """

    def __init__(self, w_dist: float = 25.0, w_angle: float = 50.0):
        super().__init__()
        if w_dist < 0 or w_angle < 0:
            raise ValueError(f"the weights must be at least 0, not {w_dist} and {w_angle}")
        self.w_dist, self.w_angle = w_dist, w_angle

    def forward(self, feat_s: Tensor, feat_t: Tensor) -> Tensor:
        """feat_s (B, D_s), feat_t (B, D_t): vectors; the widths may differ. Returns a scalar.

        Raises ValueError where the batches differ or hold fewer than two samples.
        """
        if feat_s.shape[0] != feat_t.shape[0]:
            raise ValueError(f"RKD wants one batch, not {feat_s.shape[0]} and {feat_t.shape[0]}")
        if feat_s.shape[0] < 2:
            raise ValueError("RKD compares samples: it wants a batch of at least two")
        with torch.autocast(feat_s.device.type, enabled=False):
            x_s, x_t = (
                x.to(torch.promote_types(x.dtype, torch.float32)).flatten(1)
                for x in (feat_s, feat_t.detach())
            )
            n = len(x_s)
            rows = max(1, BLOCK // (n * max(n, x_s.shape[1], x_t.shape[1])))
            anchors = torch.arange(n, device=x_s.device).split(rows)
            if len(anchors) == 1:
                blocks = [self.block(x_s, x_t, *anchors)]
            else:  # their tensors are made once more for the gradient, and never all at once
                keep = dict(use_reentrant=False, preserve_rng_state=False)
                blocks = [checkpoint(self.block, x_s, x_t, i, **keep) for i in anchors]
            norm_s, norm_t, angle = zip(*blocks)
            dist_s, dist_t = (
                x / (x.sum() / (n * (n - 1))) for x in map(torch.cat, (norm_s, norm_t))
            )
            return self.w_dist * F.smooth_l1_loss(dist_s, dist_t) + self.w_angle * sum(angle) / n**3

    def block(self, x_s: Tensor, x_t: Tensor, i: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Distances (len(i), B) of both networks, summed loss of the angles at the anchors i."""
        norm_s, angle_s = self.relations(x_s, i)
        norm_t, angle_t = self.relations(x_t, i)
        if angle_s is None:
            return norm_s, norm_t, norm_s.new_zeros(())
        # torch's own sum would hold on to the memory of what it adds up
        return norm_s, norm_t, F.smooth_l1_loss(angle_s, angle_t, reduction="none").sum()

    def relations(self, x: Tensor, i: Tensor) -> tuple[Tensor, Tensor | None]:
        """Distances (len(i), B), and angles (len(i), B, B), None where they have no weight."""
        # true differences: |x_i|^2 + |x_j|^2 - 2 x_i . x_j cancels for near rows
        diff = x - x[i, None]
        square = diff.square().sum(2)
        near = square <= 1e-12
        # the gradients of square root and direction at 0 are infinite; near rows give none
        norm = torch.where(near, 1e-12, square).sqrt()
        own = i[:, None] == torch.arange(len(x), device=x.device)
        dist = norm.masked_fill(own, 0)
        if self.w_angle == 0:
            return dist, None
        e = diff * torch.where(near, 0, 1 / norm)[:, :, None]
        return dist, e @ e.mT
