"""OFD: A Comprehensive Overhaul of Feature Distillation (Heo, Kim, Yun, Park, Kwak, Choi,
ICCV 2019, section 3), https://arxiv.org/abs/1904.01866
"""

import math

import torch
from torch import Tensor, nn


class OFD(nn.Module):
    """Squared distance to the teacher's map before the ReLU, if the difference would pass the ReLU.

        m_c  = mean of the negative entries of channel c of fm_t, 0 if it has no negative entry
        t    = max(fm_t, m_c),   s = BN(W fm_s), W a 1x1 convolution without bias
        loss = mean over B, C, H, W of (s - t)^2, or 0 where s <= t and t <= 0

    in_channels, out_channels: of the student's and the teacher's map; margin: None to take m_c from
    each batch (KD-Zoo), or m itself, a tensor (out_channels,): `bn_margin` computes MDistiller's
    from the teacher's batch norm. W and BN are trained with the student.
    Differs from the paper: the margin depends on the batch if it is not given, and a mean instead
    of the sum (MDistiller sums over C, H, W and averages over B).
    """

    def __init__(self, in_channels: int, out_channels: int, margin: Tensor | None = None):
        super().__init__()
        if margin is not None and margin.shape != (out_channels,):
            raise ValueError(f"OFD: expected {out_channels} margins, got shape {(*margin.shape,)}")
        self.connector = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels)
        )
        nn.init.kaiming_normal_(self.connector[0].weight, mode="fan_out", nonlinearity="relu")
        self.register_buffer("margin", None if margin is None else margin.detach().clone())

    def forward(self, fm_s: Tensor, fm_t: Tensor) -> Tensor:
        """fm_s (B, in_channels, H, W), fm_t (B, out_channels, H, W), both before the activation.
        Returns a scalar.

        Raises ValueError if batch or spatial size differ or fm_t has not out_channels, and in
        training mode where a channel holds a single value: batch norm needs more.
        """
        expected = (fm_s.shape[0], self.connector[1].num_features, *fm_s.shape[2:])
        if fm_t.shape != expected:
            raise ValueError(
                f"OFD: expected a teacher's map of shape {expected}, got {(*fm_t.shape,)}"
            )
        s = self.connector(_float32(fm_s))
        with torch.autocast(s.device.type, enabled=False):
            s, fm_t = _float32(s), _float32(fm_t.detach())
            margin = _batch_margin(fm_t) if self.margin is None else self.margin.to(fm_t.dtype)
            t = torch.maximum(fm_t, margin[:, None, None])
            diff = s - t
            # a choice keeps one byte an entry for the backward pass, in addition to the square's
            # input
            return torch.where((diff > 0) | (t > 0), diff, 0).square().mean()


def _batch_margin(fm_t: Tensor) -> Tensor:
    """The mean (C,) of each channel's negative entries; 0 if it has no negative entry."""
    count = (fm_t < 0).sum((0, 2, 3))
    return fm_t.clamp(max=0).sum((0, 2, 3)) / count.clamp(min=1)


@torch.no_grad()
def bn_margin(bn: nn.BatchNorm2d) -> Tensor:
    """The margins (C,) that a batch norm's parameters imply: a channel of its output is taken as
    normal, with mean b (its bias) and standard deviation |w| (its weight).

        m_c = E[x | x < 0] = b - |w| phi(b / |w|) / Phi(-b / |w|)       phi, Phi: standard normal
        m_c = -3 |w|                                                    where Phi(-b / |w|) <= 0.001

    Raises ValueError if the batch norm has no weight and bias.
    """
    if bn.weight is None:
        raise ValueError("bn_margin needs a batch norm with weight and bias")
    mean, std = bn.bias.double(), bn.weight.double().abs()
    z = mean / std  # infinite or nan where w is 0: the choice below then ends in min(b, 0)
    share = torch.special.ndtr(-z)
    density = (-z.square() / 2).exp() / math.sqrt(2 * math.pi)
    margin = torch.where(share > 1e-3, mean - std * density / share, -3 * std)
    return margin.to(bn.weight.dtype)


def _float32(x: Tensor) -> Tensor:
    """x in float32, unless it is in float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
