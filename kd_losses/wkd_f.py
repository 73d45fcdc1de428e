"""WKD-F: Wasserstein Distance Rivals Kullback-Leibler Divergence for Knowledge Distillation
(Lv, Yang, Li, NeurIPS 2024, the distance between features), https://arxiv.org/abs/2412.08139
"""

import torch
from torch import Tensor, nn


class WKDF(nn.Module):
    """Wasserstein distance between Gaussians that describe each channel of the two maps.

        x     = relu(BN(conv(fm_s)))                to the teacher's shape, see `regressor`
        mu_c  = mean,  sigma_c = sqrt(unbiased variance + 1e-5)     over a channel's H * W
        loss  = 1 / (B * grid^2) * sum over B, cells, C of
                ratio * (mu_s - mu_t)^2 + (sigma_s - sigma_t)^2

    s_shape, t_shape: (C, H, W) of the student's and the teacher's map; ratio: weight of the means
    relative to the deviations (authors: 4 or 3 on CIFAR-100, 2 on ImageNet); grid: the map is cut
    into grid x grid cells, each with its own Gaussian (1, 4 for pairs of different architecture).
    Convolution and batch norm are trained with the student. The authors' weight falls along a
    cosine from epoch 150 of 240 on (not in this file).
    Differs from the authors' code: the variance of a cell with one entry is 0 (NaN in the authors'
    code). Their bottleneck convolutions for ImageNet are not here.
    """

    def __init__(
        self,
        s_shape: tuple[int, int, int],
        t_shape: tuple[int, int, int],
        ratio: float = 4.0,
        grid: int = 1,
    ):
        super().__init__()
        self.s_shape, self.t_shape = tuple(s_shape), tuple(t_shape)
        if not 1 <= grid <= min(t_shape[1:]):
            raise ValueError(f"expected grid from 1 to the map's {(*t_shape[1:],)}, got {grid}")
        self.ratio, self.grid = ratio, grid
        self.conv = regressor(self.s_shape, self.t_shape)
        self.bn = nn.BatchNorm2d(t_shape[0])

    def forward(self, fm_s: Tensor, fm_t: Tensor) -> Tensor:
        """fm_s, fm_t: (B, *s_shape), (B, *t_shape), the last maps. Returns a scalar.

        Raises ValueError if the shapes are not those of the constructor, and in training mode
        for a batch of one whose projected map is 1x1.
        """
        if fm_s.shape[1:] != self.s_shape or fm_t.shape != (len(fm_s), *self.t_shape):
            raise ValueError(
                f"WKDF: expected one batch of maps {self.s_shape} and {self.t_shape}, got "
                f"{(*fm_s.shape,)} and {(*fm_t.shape,)}"
            )
        if self.training and fm_t[:, 0].numel() == 1:
            raise ValueError(
                "WKDF: expected at least two samples in training mode for a map of 1x1"
            )
        x = self.project(fm_s)
        with torch.autocast(x.device.type, enabled=False):
            x, fm_t = _float32(x), _float32(fm_t.detach())
            loss = 0.0
            for cell in self._cells(*fm_t.shape[2:]):
                (mu_s, sigma_s), (mu_t, sigma_t) = (_gaussian(y[cell]) for y in (x, fm_t))
                per_channel = self.ratio * (mu_s - mu_t).square() + (sigma_s - sigma_t).square()
                loss = loss + per_channel.sum()
            return loss / (len(fm_t) * self.grid**2)

    def project(self, fm_s: Tensor) -> Tensor:
        """The student's map as it is compared (B, *t_shape)."""
        return self.bn(self.conv(_float32(fm_s))).relu()

    def _cells(self, h: int, w: int) -> list[tuple]:
        # as adaptive pooling cuts: neighbours share a row where grid does not divide the height
        rows, columns = (
            [slice(i * n // self.grid, -(-(i + 1) * n // self.grid)) for i in range(self.grid)]
            for n in (h, w)
        )
        return [(..., row, column) for row in rows for column in columns]


def regressor(s_shape: tuple[int, int, int], t_shape: tuple[int, int, int]) -> nn.Module:
    """A convolution from maps (C, H, W) of s_shape to t_shape, as the CRD benchmark chooses it: 3x3
    with stride 2 from twice the size, transposed 4x4 with stride 2 from half the size, and else
    without padding, as large as the difference asks: 1x1 from the same size.

    Raises ValueError if the student's map is smaller in another ratio.
    """
    (c_s, *size_s), (c_t, *size_t) = s_shape, t_shape
    if size_s == [2 * n for n in size_t]:
        return nn.Conv2d(c_s, c_t, 3, stride=2, padding=1)
    if size_t == [2 * n for n in size_s]:
        return nn.ConvTranspose2d(c_s, c_t, 4, stride=2, padding=1)
    kernel = [1 + n_s - n_t for n_s, n_t in zip(size_s, size_t)]
    if min(kernel) < 1:
        raise ValueError(
            f"WKDF: expected a teacher map of at most twice {(*size_s,)}, got {(*size_t,)}"
        )
    return nn.Conv2d(c_s, c_t, kernel)


def _gaussian(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation (B, C) of each channel; one entry alone has variance 0."""
    var, mean = torch.var_mean(x, (2, 3), correction=min(1, x.shape[2:].numel() - 1))
    return mean, (var + 1e-5).sqrt()


def _float32(x: Tensor) -> Tensor:
    """x in float32, unless it is in float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
