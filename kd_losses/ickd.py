"""ICKD: Exploring Inter-Channel Correlation for Diversity-preserved Knowledge Distillation
(Liu, Huang, Lin, Xie, Wang, Chang, Liang, ICCV 2021, section 3), https://arxiv.org/abs/2202.03680
"""

import torch
from torch import Tensor, nn


class ICKD(nn.Module):
    """Squared difference of how the channels of a map correlate, sample by sample.

        f    = fm as (C, H * W): of the teacher, and of the student's BN(W fm_s)
        G    = f f^T, each row divided by its L2 norm       (t_dim, t_dim) for each sample
        loss = 1 / (B * t_dim) * sum over B and the pairs of channels of (G_s - G_t)^2

    s_dim, t_dim: channels of the student's and the teacher's map; W: a 1x1 convolution without
    bias. W and BN learn with the student. Takes t_dim^2 numbers a sample, a few times.
    Differs from the paper: nothing is known for classification (ICKD-C); for segmentation the paper
    splits the maps into a grid.
    """

    def __init__(self, s_dim: int, t_dim: int):
        super().__init__()
        self.embed = nn.Sequential(nn.Conv2d(s_dim, t_dim, 1, bias=False), nn.BatchNorm2d(t_dim))

    def forward(self, fm_s: Tensor, fm_t: Tensor) -> Tensor:
        """fm_s (B, s_dim, H_s, W_s), fm_t (B, t_dim, H_t, W_t): the sizes may differ. Returns a
        scalar.

        Raises ValueError where batch or channels are not the expected ones, and in training mode
        where a channel holds a single value.
        """
        s_dim, t_dim = self.embed[0].in_channels, self.embed[0].out_channels
        want = (len(fm_s), s_dim), (len(fm_s), t_dim)
        if (fm_s.shape[:2], fm_t.shape[:2]) != want or fm_s.dim() != 4 or fm_t.dim() != 4:
            raise ValueError(
                f"ICKD wants maps (B, {s_dim}, H, W) and (B, {t_dim}, H, W), not "
                f"{(*fm_s.shape,)} and {(*fm_t.shape,)}"
            )
        if self.training and fm_s.numel() == s_dim:
            raise ValueError("ICKD needs at least two samples or pixels for its batch norm")
        fm_s = self.embed(fm_s.to(torch.promote_types(fm_s.dtype, torch.float32)))
        with torch.autocast(fm_s.device.type, enabled=False):
            diff = self.correlation(fm_s) - self.correlation(fm_t.detach())
            return diff.square().sum(2).mean()

    def correlation(self, fm: Tensor) -> Tensor:
        """The (B, C, C) matrices of correlations between channels, their rows of norm 1."""
        f = fm.to(torch.promote_types(fm.dtype, torch.float32)).flatten(2)
        g = f @ f.mT
        # the gradient of a square root at 0 is infinite; a zero row stays as it is,
        # and the clamp keeps that of a tiny one in range
        square = g.square().sum(2, keepdim=True)
        return g / torch.where(square > 0, square, 1).clamp(min=1e-12).sqrt()
