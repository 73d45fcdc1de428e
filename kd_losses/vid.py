"""VID: Variational Information Distillation for Knowledge Transfer
(Ahn, Hu, Damianou, Lawrence, Dai, CVPR 2019, section 2.1, equations 4 and 6),
https://arxiv.org/abs/1904.05835
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class VID(nn.Module):
    """Negative log-likelihood of the teacher's map under a Gaussian that the student's predicts.

        mu = W_3 relu(W_2 relu(W_1 fm_s))                   1x1 convolutions without bias
        var_c = softplus(alpha_c) + eps                     one per teacher channel, learned
        loss = mean over B, C, H, W of (log var_c + (mu - fm_t)^2 / var_c) / 2

    in_channels, out_channels: of the student's and the teacher's map; mid_channels: between the
    convolutions (KD-Zoo and the CRD benchmark: those of the teacher); init_var: initial variance,
    above eps (5.0); eps: minimum variance (1e-6). Regressor and variance are trained with the
    student. The loss can be negative.
    Differs from the paper: no batch norm in the regressor, a mean instead of the sum, and without
    the constant log(2 pi) / 2.
    """

    def __init__(
        self,
        in_channels: int,
        mid_channels: int,
        out_channels: int,
        init_var: float = 5.0,
        eps: float = 1e-6,
    ):
        super().__init__()
        if not init_var > eps:
            raise ValueError(f"expected init_var > {eps}, got {init_var}")
        if mid_channels < 1:
            raise ValueError(f"expected mid_channels >= 1, got {mid_channels}")
        self.eps = eps
        self.regressor = nn.Sequential(
            nn.Conv2d(in_channels, mid_channels, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(mid_channels, mid_channels, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(mid_channels, out_channels, 1, bias=False),
        )
        for layer in self.regressor[::2]:
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        # the inverse of softplus; at large values expm1 overflows and the two are equal
        var = init_var - eps
        alpha = math.log(math.expm1(var)) if var < 30 else var
        self.alpha = nn.Parameter(torch.full((out_channels,), alpha))

    def forward(self, fm_s: Tensor, fm_t: Tensor) -> Tensor:
        """fm_s (B, in_channels, H, W), fm_t (B, out_channels, H, W). Returns a scalar.

        Raises ValueError if batch or spatial size differ.
        """
        if fm_s.shape[0] != fm_t.shape[0] or fm_s.shape[2:] != fm_t.shape[2:]:
            raise ValueError(
                f"VID: expected feature maps of equal batch and spatial size, got {(*fm_s.shape,)} "
                f"and {(*fm_t.shape,)}"
            )
        mu = self.regressor(_float32(fm_s))
        with torch.autocast(fm_s.device.type, enabled=False):
            mu, fm_t = _float32(mu), _float32(fm_t.detach())
            var = F.softplus(self.alpha) + self.eps
            # the mean square of each channel first: the variance then costs one number a channel
            square = (mu - fm_t).square().mean((0, 2, 3))
            return 0.5 * (var.log() + square / var).mean()


def _float32(x: Tensor) -> Tensor:
    """x in float32, unless it is in float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
