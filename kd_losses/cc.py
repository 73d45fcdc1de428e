"""CC: Correlation Congruence for Knowledge Distillation (Peng, Jin, Liu, Li, Wu, Liu, Zhou, Zhang,
ICCV 2019, sections 3.2 and 3.3), https://arxiv.org/abs/1904.01802
"""

import math

import torch
from torch import Tensor, nn


class CC(nn.Module):
    """Mean squared difference of the correlations of the samples of a batch.

        x = feat / ||feat||_2,   c = x x^T                                    (B, B)
        K = sum_{p = 0..P} exp(-2 gamma) (2 gamma)^p / p! * c^p
        loss = mean over the B^2 pairs of (K_s - K_t)^2

    K is the Taylor expansion of the Gaussian kernel exp(-gamma ||x_i - x_j||^2).

    gamma: of the kernel, above 0 (paper and KD-Zoo 0.4); P_order: P, at least 1 (paper and KD-Zoo
    2).
    Differs from the paper: only the correlation, as in KD-Zoo, without soft targets and without the
    paper's samplers. The CRD benchmark's loss of this name is `NeighbourCC`.
    """

    def __init__(self, gamma: float = 0.4, P_order: int = 2):
        super().__init__()
        if gamma <= 0:
            raise ValueError(f"expected gamma > 0, got {gamma}")
        if P_order != int(P_order) or not 1 <= P_order <= 100:  # 171! is no float any more
            raise ValueError(f"expected an int P_order from 1 to 100, got {P_order}")
        self.gamma, self.P_order = gamma, int(P_order)

    def forward(self, feat_s: Tensor, feat_t: Tensor) -> Tensor:
        """feat_s (B, D_s), feat_t (B, D_t): vectors; the widths may differ. Returns a scalar.

        Raises ValueError if the batches differ.
        """
        if feat_s.shape[0] != feat_t.shape[0]:
            raise ValueError(
                f"CC: expected equal batch sizes, got {feat_s.shape[0]} and {feat_t.shape[0]}"
            )
        with torch.autocast(feat_s.device.type, enabled=False):
            return (self.correlation(feat_s) - self.correlation(feat_t.detach())).square().mean()

    def correlation(self, feat: Tensor) -> Tensor:
        """The (B, B) matrix K."""
        x = _unit(_float32(feat).flatten(1))
        c, k = x @ x.T, 0
        for p in range(self.P_order, -1, -1):
            k = k * c + math.exp(-2 * self.gamma) * (2 * self.gamma) ** p / math.factorial(p)
        return k


class NeighbourCC(nn.Module):
    """Product of the distances between student and teacher of two neighbours in the batch.

        e     = linear(feat)                  one layer per network, both learned with the student
        delta = |e_s - e_t|                                                   (B, feat_dim)
        loss  = 1 / (B - 1) * sum_{b < B} sum_d delta_bd * delta_{b+1,d}

    The CRD benchmark uses it under the paper's name. A batch of one has no neighbours: the loss is
    0.

    in_dim_s, in_dim_t: widths of the features, flattened; feat_dim: of the embeddings (the CRD
    benchmark: 128).
    Differs from the paper: it compares no correlations between samples. The value depends on the
    order of the batch. It is 0 if one of any two neighbours agrees with the teacher. The teacher's
    embedding is trained to lower it, too.
    """

    def __init__(self, in_dim_s: int, in_dim_t: int, feat_dim: int = 128):
        super().__init__()
        if feat_dim < 1:
            raise ValueError(f"expected feat_dim >= 1, got {feat_dim}")
        self.embed_s = nn.Linear(in_dim_s, feat_dim)
        self.embed_t = nn.Linear(in_dim_t, feat_dim)

    def forward(self, feat_s: Tensor, feat_t: Tensor) -> Tensor:
        """feat_s (B, in_dim_s), feat_t (B, in_dim_t), or maps of as many entries a sample. Returns
        a scalar.

        Raises ValueError if the batches differ.
        """
        with torch.autocast(feat_s.device.type, enabled=False):
            return self.neighbours(
                *(
                    embed(_float32(feat).flatten(1))
                    for embed, feat in ((self.embed_s, feat_s), (self.embed_t, feat_t.detach()))
                )
            )

    @staticmethod
    def neighbours(e_s: Tensor, e_t: Tensor) -> Tensor:
        """The loss of given embeddings (B, feat_dim), a gradient to both.

        Raises ValueError if the shapes differ.
        """
        if e_s.shape != e_t.shape:
            raise ValueError(
                f"NeighbourCC: expected equal batch sizes, got {(*e_s.shape,)} and {(*e_t.shape,)}"
            )
        with torch.autocast(e_s.device.type, enabled=False):
            e_s, e_t = _float32(e_s), _float32(e_t)
            delta = (e_s - e_t).abs()
            # a sum, since the mean of no pair is nan
            return (delta[:-1] * delta[1:]).sum() / max(len(delta) - 1, 1)


def _unit(x: Tensor) -> Tensor:
    """x with rows, along the last dimension, of L2 norm 1; one of norm up to 1e-12 stays."""
    norm = x.norm(dim=-1, keepdim=True)  # whose gradient at 0 torch takes as 0
    return x / torch.where(norm > 1e-12, norm, 1)


def _float32(x: Tensor) -> Tensor:
    """x in float32, unless it is in float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
