"""ICKD: Exploring Inter-Channel Correlation for Diversity-preserved Knowledge Distillation
(Liu, Huang, Lin, Xie, Wang, Chang, Liang, ICCV 2021, section 3), https://arxiv.org/abs/2202.03680
"""

import torch
from torch import Tensor, nn


class ICKD(nn.Module):
    """Squared difference of the correlations between the channels of a map, per sample.

        f    = fm as (C, H * W): of the teacher, and of the student's BN(W fm_s)
        G    = f f^T, each row divided by its L2 norm       (t_dim, t_dim) for each sample
        loss = 1 / (B * t_dim) * sum over B and the pairs of channels of (G_s - G_t)^2

    s_dim, t_dim: channels of the student's and the teacher's map; W: a 1x1 convolution without
    bias. W and BN are trained with the student. Needs a few times t_dim^2 numbers per sample.
    Differs from the paper: no known difference for classification (ICKD-C). For segmentation the
    paper splits the maps into a grid.
    """

    def __init__(self, s_dim: int, t_dim: int):
        super().__init__()
        self.embed = nn.Sequential(nn.Conv2d(s_dim, t_dim, 1, bias=False), nn.BatchNorm2d(t_dim))

    def forward(self, fm_s: Tensor, fm_t: Tensor) -> Tensor:
        """fm_s (B, s_dim, H_s, W_s), fm_t (B, t_dim, H_t, W_t): the sizes may differ. Returns a
        scalar.

        Raises ValueError if batch or channels are not the expected ones, and in training mode
        where a channel holds a single value.
        """
        s_dim, t_dim = self.embed[0].in_channels, self.embed[0].out_channels
        want = (len(fm_s), s_dim), (len(fm_s), t_dim)
        if (fm_s.shape[:2], fm_t.shape[:2]) != want or fm_s.dim() != 4 or fm_t.dim() != 4:
            raise ValueError(
                f"ICKD: expected maps (B, {s_dim}, H, W) and (B, {t_dim}, H, W), got "
                f"{(*fm_s.shape,)} and {(*fm_t.shape,)}"
            )
        if self.training and fm_s.numel() == s_dim:
            raise ValueError("ICKD: expected at least two samples or pixels for its batch norm")
        fm_s = self.embed(_float32(fm_s))
        with torch.autocast(fm_s.device.type, enabled=False):
            diff = self.correlation(fm_s) - self.correlation(fm_t.detach())
            return diff.square().sum(2).mean()

    def correlation(self, fm: Tensor) -> Tensor:
        """The (B, C, C) matrices of correlations between channels, their rows of norm 1."""
        f = _float32(fm).flatten(2)
        return _unit(f @ f.mT)


def _unit(x: Tensor) -> Tensor:
    """x with rows, along the last dimension, of L2 norm 1; one of norm up to 1e-12 stays."""
    norm = x.norm(dim=-1, keepdim=True)  # whose gradient at 0 torch takes as 0
    return x / torch.where(norm > 1e-12, norm, 1)


def _float32(x: Tensor) -> Tensor:
    """x in float32, unless it is in float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
