"""AFD: attentive feature distillation. Pay Attention to Features, Transfer Learn Faster CNNs
(Wang, Gao, Zhao, Li, Dou, Xu, ICLR 2020, section 3), https://openreview.net/forum?id=ryxyCeHtPB
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class AFD(nn.Module):
    """Squared distance of normalised channels, weighted by an attention that reads the teacher.

        n(fm)_c = fm_c / (||fm_c||_2 + eps)                 norm over each channel's H * W
        z       = W_2 relu(W_1 p + b_1) + b_2               p (C,) the means of fm_t's channels
        rho     = sigmoid(z) / sum_c sigmoid(z_c)           (B, C)
        loss    = 1 / B * sum_b sum_c rho_c * mean over H, W of (n(fm_s) - n(fm_t))^2

    in_channels: C of both maps; att_f: the width between W_1 and W_2 is int(C * att_f), at least 1
    (KD-Zoo: 1.0); size: None (KD-Zoo), or (H, W) of the maps for the attention of the paper, z_c =
    w_2 . relu(W_1 vec(fm_t_c) + b_1) + b_2c with W_1 (H, H * W) and w_2 (H,) shared by all channels
    (att_f is not used); eps: 1e-6. The attention learns with the student, to lower the loss.
    Differs from the paper: as in KD-Zoo, there is no feature selection. Without `size` the
    attention is a different one, because the paper's is unstable.
    """

    def __init__(
        self,
        in_channels: int,
        att_f: float = 1.0,
        size: tuple[int, int] | None = None,
        eps: float = 1e-6,
    ):
        super().__init__()
        self.in_channels, self.eps = in_channels, eps
        self.size = None if size is None else tuple(size)
        if size is None:
            mid_channels = int(in_channels * att_f)
            if mid_channels < 1:
                raise ValueError(f"int({in_channels} * att_f) must be at least 1, att_f is {att_f}")
            self.attention = nn.Sequential(
                nn.Conv2d(in_channels, mid_channels, 1),
                nn.ReLU(),
                nn.Conv2d(mid_channels, in_channels, 1),
            )
        else:
            height, width = size
            self.attention = nn.Sequential(
                nn.Linear(height * width, height), nn.ReLU(), nn.Linear(height, 1, bias=False)
            )
            self.bias = nn.Parameter(torch.zeros(in_channels))
        # by fan_out the one output of w_2 would start on scores that saturate the sigmoid
        mode = "fan_out" if size is None else "fan_in"
        for layer in self.attention[::2]:
            nn.init.kaiming_normal_(layer.weight, mode=mode, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(self, fm_s: Tensor, fm_t: Tensor) -> Tensor:
        """fm_s, fm_t: (B, in_channels, H, W). Returns a scalar.

        Raises ValueError if the shapes differ, or are not those of the constructor.
        """
        if fm_s.shape != fm_t.shape or fm_t.shape[1] != self.in_channels:
            raise ValueError(
                f"AFD: expected two maps of one shape with {self.in_channels} channels, got "
                f"{(*fm_s.shape,)} and {(*fm_t.shape,)}"
            )
        if self.size is not None and fm_t.shape[2:] != self.size:
            raise ValueError(f"AFD: expected maps of {self.size}, got {(*fm_t.shape[2:],)}")
        fm_s, fm_t = _float32(fm_s), _float32(fm_t.detach())
        rho = self.rho(fm_t)
        with torch.autocast(fm_s.device.type, enabled=False):
            return (rho * self._fast_distance(fm_s, fm_t)).sum(1).mean()

    def rho(self, fm_t: Tensor) -> Tensor:
        """The attention (B, C) that a teacher's map draws; it sums to 1 over the channels."""
        if self.size is None:
            z = self.attention(fm_t.mean((2, 3), keepdim=True)).flatten(1)
        else:
            z = self.attention(fm_t.flatten(2)).flatten(1) + self.bias
        with torch.autocast(z.device.type, enabled=False):
            # in logarithms the sum is not 0 even where all the sigmoids are
            z = _float32(z)
            return F.logsigmoid(z).softmax(1)

    def distance(self, fm_s: Tensor, fm_t: Tensor) -> Tensor:
        """The mean (B, C) over H, W of (n(fm_s) - n(fm_t))^2."""
        n_s, n_t = (x / (x.norm(dim=(2, 3), keepdim=True) + self.eps) for x in (fm_s, fm_t))
        return (n_s - n_t).square().mean((2, 3))

    def _fast_distance(self, fm_s: Tensor, fm_t: Tensor) -> Tensor:
        """`distance` with the square expanded: no normalised map is made or kept. A channel of
        zeros has a gradient of order 1, where that of `distance` is of order 1 / eps."""
        # resnet20 -> resnet20, batch 128, one CPU thread: with `distance` a step takes 12 % longer
        ss, tt, st = ((a * b).sum((2, 3)) for a, b in ((fm_s, fm_s), (fm_t, fm_t), (fm_s, fm_t)))
        n_s, n_t = (torch.where(x > 0, x, 1).sqrt() + self.eps for x in (ss, tt))
        return (ss / n_s**2 + tt / n_t**2 - 2 * st / (n_s * n_t)) / fm_t.shape[2:].numel()


def _float32(x: Tensor) -> Tensor:
    """x in float32, unless it is in float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
