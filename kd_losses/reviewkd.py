"""ReviewKD: Distilling Knowledge via Knowledge Review (Chen, Liu, Zhao, Jia, CVPR 2021, section 3),
https://arxiv.org/abs/2104.09044
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ReviewKD(nn.Module):
    """Distance of the teacher's maps to the student's, fused level by level from the deepest up.

        f_i  = ABF_i(fm_s_i, f_{i+1})                       attention-based fusion, see `ABF`
        loss = hcl([conv_i(f_i)], fms_t)                    hierarchical context loss, see `hcl`

    in_channels, out_channels: lists, of the student's and the teacher's maps from shallow to deep,
    the pooled feature last; mid_channel: channels of every fused map (None: min(512,
    in_channels[-1]), as in the authors' code). The fusion is trained with the student. `abfs`
    starts at the deepest level.
    Differs from the paper: no known difference. On CIFAR the authors' code multiplies the loss by
    min(epoch / 20, 1) (not in this file).
    """

    def __init__(
        self, in_channels: list[int], out_channels: list[int], mid_channel: int | None = None
    ):
        super().__init__()
        if len(in_channels) != len(out_channels) or not in_channels:
            raise ValueError(
                f"ReviewKD: expected as many widths of the student as of the teacher, got "
                f"{len(in_channels)} and {len(out_channels)}"
            )
        self.in_channels, self.out_channels = list(in_channels), list(out_channels)
        if mid_channel is None:
            mid_channel = min(512, in_channels[-1])
        if mid_channel < 1:
            raise ValueError(f"expected mid_channel >= 1, got {mid_channel}")
        deepest = len(in_channels) - 1
        self.abfs = nn.ModuleList(
            ABF(in_channels[i], mid_channel, out_channels[i], fuse=i < deepest)
            for i in range(deepest, -1, -1)
        )

    def forward(self, fms_s: list[Tensor], fms_t: list[Tensor]) -> Tensor:
        """fms_s, fms_t: maps (B, C, H, W) from shallow to deep, then the pooled feature, (B, C) or
        (B, C, 1, 1); the teacher's maps are those before the activation. The networks' sizes may
        differ. Returns a scalar.

        Raises ValueError if number, batch or channels are not the expected ones, and in training
        mode for a batch of one with a 1x1 map, as the pooled feature is.
        """
        fms_s, fms_t = [_as_map(x) for x in fms_s], [_as_map(x) for x in fms_t]
        self._check(fms_s, fms_t)
        outs, fused = [], None
        for abf, fm_s, fm_t in zip(self.abfs, fms_s[::-1], fms_t[::-1]):
            # autocast takes maps as they are
            if not torch.is_autocast_enabled(fm_s.device.type):
                fm_s = _float32(fm_s)
            out, fused = abf(fm_s, fused, fm_t.shape[2:])
            outs.append(out)
        return hcl(outs[::-1], fms_t)

    def _check(self, fms_s: list[Tensor], fms_t: list[Tensor]) -> None:
        # before anything runs: a batch norm that has moved cannot be taken back
        for name, fms, channels in (
            ("student", fms_s, self.in_channels),
            ("teacher", fms_t, self.out_channels),
        ):
            if [x.shape[1] for x in fms] != channels:
                raise ValueError(
                    f"ReviewKD: expected {name} channels {channels}, got "
                    f"{[x.shape[1] for x in fms]}"
                )
        batches = {x.shape[0] for x in fms_s + fms_t}
        if len(batches) > 1:
            raise ValueError(f"ReviewKD: expected equal batch sizes, got {sorted(batches)}")
        single = any(x.shape[0] * x.shape[2:].numel() == 1 for x in fms_s + fms_t)
        if self.training and single:
            raise ValueError(
                "ReviewKD: expected at least two samples in training mode: with one, the batch "
                "norm of a 1x1 map has nothing to average over"
            )


class ABF(nn.Module):
    """Attention-based fusion of a student's map with the fused map of the deeper levels.

        x     = BN(W_1 fm_s)                                1x1 convolution to mid_channel
        a     = sigmoid(W_a [x; y] + b_a)                   two maps; y = fused_deeper at x's size
        fused = a_0 * x + a_1 * y                           or x alone at the deepest level
        out   = BN(W_2 fused)                               3x3 convolution, at the teacher's size

    fuse: False at the deepest level, which has no attention.
    """

    def __init__(self, in_channels: int, mid_channel: int, out_channels: int, fuse: bool):
        super().__init__()
        self.conv1 = nn.Sequential(
            nn.Conv2d(in_channels, mid_channel, 1, bias=False), nn.BatchNorm2d(mid_channel)
        )
        self.conv2 = nn.Sequential(
            nn.Conv2d(mid_channel, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
        )
        self.att_conv = None
        if fuse:
            self.att_conv = nn.Sequential(nn.Conv2d(2 * mid_channel, 2, 1), nn.Sigmoid())
        for conv in (self.conv1, self.conv2):
            nn.init.kaiming_uniform_(conv[0].weight, a=1)

    def forward(
        self, fm_s: Tensor, fused_deeper: Tensor | None, size: torch.Size
    ) -> tuple[Tensor, Tensor]:
        """fm_s (B, in_channels, H_s, W_s), fused_deeper (B, mid_channel, *, *) or None at the
        deepest; size: (H_t, W_t). Returns out (B, out_channels, H_t, W_t) and fused
        (B, mid_channel, H_t, W_t).
        """
        x = self.conv1(fm_s)
        if self.att_conv is not None:
            y = _resize(fused_deeper, x.shape[2:])
            a = self.att_conv(torch.cat([x, y], dim=1))
            x = a[:, :1] * x + a[:, 1:] * y
        fused = _resize(x, size)
        return self.conv2(fused), fused


def hcl(fms_s: list[Tensor], fms_t: list[Tensor]) -> Tensor:
    """Hierarchical context loss: mean squared differences at full size and after pooling.

        loss = sum over the levels of  sum_j 2^-j mean (pool_j(fm_s) - pool_j(fm_t))^2 / sum_j 2^-j

    pool_0 keeps the size; the next ones average to 4x4, 2x2 and 1x1, those below the height.

    fms_s, fms_t: maps (B, C, H, W) from shallow to deep, the pooled feature last, (B, C) or
    (B, C, 1, 1). Returns a scalar. Raises ValueError if number or shapes differ.
    """
    fms_s, fms_t = [_as_map(x) for x in fms_s], [_as_map(x.detach()) for x in fms_t]
    shapes_s, shapes_t = [(*x.shape,) for x in fms_s], [(*x.shape,) for x in fms_t]
    if shapes_s != shapes_t or not fms_s:
        raise ValueError(f"hcl: expected maps of equal shapes, got {shapes_s} and {shapes_t}")
    with torch.autocast(fms_s[0].device.type, enabled=False):
        losses = []
        for fm_s, fm_t in zip(fms_s, fms_t):
            fm_s, fm_t = _float32(fm_s), _float32(fm_t)
            # pooling is linear: one difference for all sizes, and where the windows are equal
            # each size the next
            diff, equal = fm_s - fm_t, fm_s.shape[2] % 4 == fm_s.shape[3] % 4 == 0
            loss, weight, total = F.mse_loss(fm_s, fm_t), 1.0, 1.0
            for size in (4, 2, 1):
                if size < fm_s.shape[2]:
                    weight /= 2
                    total += weight
                    pooled = F.adaptive_avg_pool2d(diff, size)
                    loss = loss + weight * pooled.square().mean()
                    diff = pooled if equal else diff
            losses.append(loss / total)
        return torch.stack(losses).sum()


def _as_map(x: Tensor) -> Tensor:
    return x[:, :, None, None] if x.dim() == 2 else x


def _resize(x: Tensor, size: torch.Size) -> Tensor:
    return x if x.shape[2:] == size else F.interpolate(x, size=size, mode="nearest")


def _float32(x: Tensor) -> Tensor:
    """x in float32, unless it is in float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
