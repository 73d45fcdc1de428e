"""PEFD: Improved Feature Distillation via Projector Ensemble (Chen, Wang, Liu, Xu, de Hoog, Huang,
NeurIPS 2022, section 3), https://arxiv.org/abs/2210.15274
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PEFD(nn.Module):
    """Cosine distance between the teacher's feature and the mean of several projections.

        f    = mean over k = 1 .. n of relu(W_k feat_s + b_k)
        loss = mean over B of 1 - <f, feat_t> / (||f|| ||feat_t||)

    s_dim, t_dim: widths of student and teacher; n: number of projectors (3). They differ only in
    their random initialisation and are trained with the student. A zero vector has cosine 0 with
    any vector.
    Differs from the paper: no known difference; the authors' code gives NaN for a zero vector.
    """

    def __init__(self, s_dim: int, t_dim: int, n: int = 3):
        super().__init__()
        if n < 1:
            raise ValueError(f"PEFD: expected at least one projector, got {n}")
        self.n, self.t_dim = n, t_dim
        # the n projectors' rows one after the other: each starts as in a layer of its own
        self.projectors = nn.Linear(s_dim, n * t_dim)

    def forward(self, feat_s: Tensor, feat_t: Tensor) -> Tensor:
        """feat_s (B, s_dim), feat_t (B, t_dim). Returns a scalar.

        Raises ValueError if the shapes do not fit.
        """
        s_dim = self.projectors.in_features
        if feat_s.shape != (len(feat_t), s_dim) or feat_t.shape[1:] != (self.t_dim,):
            raise ValueError(
                f"PEFD: expected vectors (B, {s_dim}) and (B, {self.t_dim}), got "
                f"{(*feat_s.shape,)} and {(*feat_t.shape,)}"
            )
        f = self.projectors(_float32(feat_s))
        with torch.autocast(feat_s.device.type, enabled=False):
            f, feat_t = _float32(f), _float32(feat_t.detach())
            f = f.relu().unflatten(1, (self.n, self.t_dim)).mean(1)
            # of eps at least, so that zeros stay and the gradient in tiny vectors is in range
            f, feat_t = F.normalize(f, dim=1, eps=1e-6), F.normalize(feat_t, dim=1, eps=1e-6)
            return 1 - (f * feat_t).sum(1).mean()


def _float32(x: Tensor) -> Tensor:
    """x in float32, unless it is in float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
