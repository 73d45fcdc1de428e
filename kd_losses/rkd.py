"""RKD: Relational Knowledge Distillation (Park, Kim, Lu, Cho, CVPR 2019, sections 3.2.1 and 3.2.2),
https://arxiv.org/abs/1904.05068
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RKD(nn.Module):
    """Huber loss between the distances of all pairs and the angles of all triples of a batch.

        D_ij  = ||x_i - x_j||_2 / mu,   mu its mean over i != j                 (B, B)
        A_iab = e_ia . e_ib,            e_ij = (x_j - x_i) / ||x_j - x_i||_2    (B, B, B)
        loss  = w_dist * mean huber(D_s - D_t) + w_angle * mean huber(A_s - A_t)
        huber(d) = d^2 / 2 up to |d| = 1, |d| - 1/2 beyond

    w_dist, w_angle: at least 0 (KD-Zoo and the CRD benchmark 25 and 50; the paper's image
    classification too); an angle weight of 0 saves the B^3 numbers.
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
            dist_t, angle_t = self.relations(feat_t.detach())
            dist_s, angle_s = self.relations(feat_s)
            loss = self.w_dist * F.smooth_l1_loss(dist_s, dist_t)
            if angle_s is not None:
                loss = loss + self.w_angle * F.smooth_l1_loss(angle_s, angle_t)
            return loss

    def relations(self, feat: Tensor) -> tuple[Tensor, Tensor | None]:
        """Distances (B, B) of mean 1, and angles (B, B, B), None where they have no weight."""
        x = feat.to(torch.promote_types(feat.dtype, torch.float32)).flatten(1)
        # true differences: |x_i|^2 + |x_j|^2 - 2 x_i . x_j cancels for near rows
        diff = x[None] - x[:, None]
        square = diff.square().sum(2)
        near = square <= 1e-12
        # the gradients of square root and direction at 0 are infinite; near rows give none
        norm = torch.where(near, 1e-12, square).sqrt()
        own = torch.eye(len(x), dtype=torch.bool, device=x.device)
        dist = norm.masked_fill(own, 0)
        dist = dist / (dist.sum() / (len(x) * (len(x) - 1)))
        if self.w_angle == 0:
            return dist, None
        e = diff * torch.where(near, 0, 1 / norm)[:, :, None]
        return dist, e @ e.transpose(1, 2)
