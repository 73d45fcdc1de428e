"""FT: factor transfer. Paraphrasing Complex Network: Network Compression via Factor Transfer
(Kim, Park, Kwak, NIPS 2018, section 3), https://arxiv.org/abs/1802.04977
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FT(nn.Module):
    """Mean absolute difference of the normalised factors of student and teacher.

        x    = factor                                       'channels': C * H * W entries a sample
             = 1 / C * sum_c factor_c^p1                    'spatial': H * W entries a sample
        u    = x / ||x||_2                                  norm over each sample's entries
        loss = mean over B and the entries of |u_s - u_t|^p2

    The teacher's factor comes from a `Paraphraser`, which is trained first and then frozen in eval
    mode. The student's factor comes from a `Translator`, which is trained with the student.

    factor: 'channels' as in the paper and KD-Zoo, or 'spatial' as in the CRD benchmark, where the
    larger factor is average-pooled to the smaller size first and channels may differ; p1: an int >=
    1, for 'spatial' (2; an odd power keeps the sign); p2: at least 1 (1).
    Differs from the paper: a mean instead of the sum, as in KD-Zoo; 'spatial' compares where the
    factors are strong, not their values. Differs from the CRD benchmark: maps need not be square,
    each side is pooled to the smaller of the two.
    """

    def __init__(self, factor: str = "channels", p1: int = 2, p2: float = 1):
        super().__init__()
        if factor not in ("channels", "spatial"):
            raise ValueError(f"expected factor channels or spatial, got {factor!r}")
        if p1 != int(p1) or p1 < 1:
            raise ValueError(f"expected int p1 >= 1, got {p1}")
        if p2 < 1:
            raise ValueError(f"expected p2 >= 1, got {p2}")
        self.factor, self.p1, self.p2 = factor, int(p1), p2

    def forward(self, factor_s: Tensor, factor_t: Tensor) -> Tensor:
        """factor_s, factor_t: (B, C, H, W). Returns a scalar.

        Raises ValueError if the shapes differ, for 'spatial' only if the batches do.
        """
        spatial = self.factor == "spatial"
        axes = slice(0, 1) if spatial else slice(None)
        if factor_s.shape[axes] != factor_t.shape[axes]:
            raise ValueError(
                f"FT: expected {'one batch' if spatial else 'equal shapes'}, got "
                f"{(*factor_s.shape,)} and {(*factor_t.shape,)}"
            )
        with torch.autocast(factor_s.device.type, enabled=False):
            factor_s, factor_t = _float32(factor_s), _float32(factor_t.detach())
            if factor_s.shape[2:] != factor_t.shape[2:]:
                size = tuple(min(a, b) for a, b in zip(factor_s.shape[2:], factor_t.shape[2:]))
                factor_s, factor_t = (F.adaptive_avg_pool2d(x, size) for x in (factor_s, factor_t))
            distance = (self.normalise(factor_s) - self.normalise(factor_t)).abs()
            return distance.pow(self.p2).mean() if self.p2 != 1 else distance.mean()

    def normalise(self, factor: Tensor) -> Tensor:
        """The unit row u of each sample, (B, C * H * W) or (B, H * W)."""
        x = factor.pow(self.p1).mean(1) if self.factor == "spatial" else factor
        return _unit(x.flatten(1))


class Paraphraser(nn.Module):
    """Autoencoder of the teacher's map, trained without labels to reproduce it.

        encoder: three 3x3 convolutions to C, kC, kC channels
        decoder: three 3x3 transposed convolutions to kC, C, C channels

    all of stride 1 and padding 1, each followed by LeakyReLU(0.1).

    in_channels: C of the teacher's map; k: share of the channels that a factor has, int(C * k) at
    least 1 (KD-Zoo and the CRD benchmark: 0.5); use_bn: batch norm instead of a bias after every
    convolution (KD-Zoo: on CIFAR-10 only).
    Differs from KD-Zoo: the transposed convolutions are initialised like the other convolutions.
    """

    def __init__(self, in_channels: int, k: float = 0.5, use_bn: bool = True):
        super().__init__()
        mid_channels = _factor_channels(in_channels, k)
        widths = (in_channels, in_channels, mid_channels, mid_channels)
        self.encoder = _layers(nn.Conv2d, widths, use_bn)
        self.decoder = _layers(nn.ConvTranspose2d, widths[::-1], use_bn)

    def forward(self, fm_t: Tensor) -> tuple[Tensor, Tensor]:
        """fm_t (B, in_channels, H, W). Returns the factor (B, int(C * k), H, W) and the map
        reconstructed from it, of fm_t's shape."""
        factor = self.factor(fm_t)
        return factor, self.decoder(factor)

    def factor(self, fm_t: Tensor) -> Tensor:
        """The factor alone: what the transfer needs."""
        return self.encoder(_float32(fm_t.detach()))

    def reconstruction_loss(self, fm_t: Tensor) -> Tensor:
        """What the paraphraser learns by: the mean squared error of its reconstruction."""
        _, reconstruction = self(fm_t)
        with torch.autocast(fm_t.device.type, enabled=False):
            reconstruction, fm_t = _float32(reconstruction), _float32(fm_t.detach())
            return (reconstruction - fm_t).square().mean()


class Translator(nn.Module):
    """The student's counterpart of the paraphraser's encoder, to C_s, kC_t, kC_t channels.

    in_channels_s, in_channels_t: of the student's and the teacher's map; k, use_bn: those of the
    paraphraser (the CRD benchmark has batch norm here, but not in the paraphraser).
    """

    def __init__(self, in_channels_s: int, in_channels_t: int, k: float = 0.5, use_bn: bool = True):
        super().__init__()
        mid_channels = _factor_channels(in_channels_t, k)
        widths = (in_channels_s, in_channels_s, mid_channels, mid_channels)
        self.encoder = _layers(nn.Conv2d, widths, use_bn)

    def forward(self, fm_s: Tensor) -> Tensor:
        """fm_s (B, in_channels_s, H, W). Returns the factor (B, int(C_t * k), H, W)."""
        return self.encoder(_float32(fm_s))


def _factor_channels(in_channels: int, k: float) -> int:
    channels = int(in_channels * k)
    if channels < 1:
        raise ValueError(f"int({in_channels} * k) must be at least 1, k is {k}")
    return channels


def _layers(kind: type[nn.Module], widths: tuple[int, ...], use_bn: bool) -> nn.Sequential:
    """Convolutions of one kind between the widths, each with batch norm or bias, and activation."""
    layers = []
    for width_in, width_out in zip(widths, widths[1:]):
        conv = kind(width_in, width_out, 3, padding=1, bias=not use_bn)
        # torch counts a transposed convolution's inputs and outputs the other way round
        mode = "fan_in" if kind is nn.ConvTranspose2d else "fan_out"
        nn.init.kaiming_normal_(conv.weight, mode=mode, nonlinearity="relu")
        if not use_bn:
            nn.init.zeros_(conv.bias)
        # the identity keeps the numbers of the convolutions, hence the names of their parameters
        norm = nn.BatchNorm2d(width_out) if use_bn else nn.Identity()
        layers += [conv, norm, nn.LeakyReLU(0.1)]
    return nn.Sequential(*layers)


def _unit(x: Tensor) -> Tensor:
    """x with rows, along the last dimension, of L2 norm 1; one of norm up to 1e-12 stays."""
    norm = x.norm(dim=-1, keepdim=True)  # whose gradient at 0 torch takes as 0
    return x / torch.where(norm > 1e-12, norm, 1)


def _float32(x: Tensor) -> Tensor:
    """x in float32, unless it is in float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
