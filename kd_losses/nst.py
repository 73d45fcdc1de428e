"""NST: Like What You Like: Knowledge Distill via Neuron Selectivity Transfer
(Huang, Wang, 2017, sections 4.2 and 4.3), https://arxiv.org/abs/1707.01219
"""

import torch
from torch import Tensor, nn


class NST(nn.Module):
    """Squared maximum mean discrepancy between the channels of two feature maps.

        x_i = fm_s[i] / ||fm_s[i]||_2,   y_j the same for fm_t      a channel's H * W positions loss
        = mean over B of  mean_ij k(y_i, y_j) + mean_ij k(x_i, x_j) - 2 mean_ij k(x_i, y_j)

    kernel: 'poly'    k(x, y) = (x . y)^2                    KD-Zoo, the CRD benchmark
            'linear'  k(x, y) = x . y
            'gauss'   k(x, y) = exp(-||x - y||^2 / (2 sigma^2)), sigma^2 the mean squared distance
                      of a sample's C_s * C_t pairs (x_i, y_j), at least 1e-6, differentiated too
    The paper tries all three.
    Differs from the paper: no factor 1/2, as in KD-Zoo.
    """

    def __init__(self, kernel: str = "poly"):
        super().__init__()
        if kernel not in ("poly", "linear", "gauss"):
            raise ValueError(f"expected kernel poly, linear or gauss, got {kernel!r}")
        self.kernel = kernel

    def forward(self, fm_s: Tensor, fm_t: Tensor) -> Tensor:
        """fm_s (B, C_s, H, W), fm_t (B, C_t, H, W). Returns a scalar.

        Raises ValueError if batch or spatial size differ.
        """
        if fm_s.shape[0] != fm_t.shape[0] or fm_s.shape[2:] != fm_t.shape[2:]:
            raise ValueError(
                f"NST: expected feature maps of equal batch and spatial size, got {(*fm_s.shape,)} "
                f"and {(*fm_t.shape,)}"
            )
        with torch.autocast(fm_s.device.type, enabled=False):
            # by halves of the batch: forward and backward make several maps out of one
            halves = zip(fm_s.chunk(2), fm_t.detach().chunk(2))
            return torch.cat([self.discrepancy(*half) for half in halves]).mean()

    def discrepancy(self, fm_s: Tensor, fm_t: Tensor) -> Tensor:
        """The loss of each sample: (B,)."""
        x, y = self.channels(fm_s), self.channels(fm_t)
        c_s, c_t, positions = x.shape[1], y.shape[1], x.shape[2]
        if self.kernel == "linear":
            return (x.mean(1) - y.mean(1)).square().sum(1)
        if self.kernel == "poly" and positions**2 <= c_s**2 + c_s * c_t + c_t**2:
            # sum_ij (x_i . y_j)^2 = <x^T x, y^T y>: one small matrix for all three kernels
            return (x.mT @ x / c_s - y.mT @ y / c_t).square().sum((1, 2))
        pairs = ((x, x), (y, y), (x, y))
        if self.kernel == "poly":
            # a batched product: broadcasting would hold B * C_s * C_t * H * W numbers
            kernels = [(a @ b.mT).square() for a, b in pairs]
        else:
            squares = [_square_distances(a, b) for a, b in pairs]
            # the floor: where all channels agree the distances are rounding
            variance = squares[2].mean((1, 2), keepdim=True).clamp(min=1e-6)
            kernels = [(-square / (2 * variance)).exp() for square in squares]
        k_ss, k_tt, k_st = (k.mean((1, 2)) for k in kernels)
        return k_tt + k_ss - 2 * k_st

    def channels(self, fm: Tensor) -> Tensor:
        """The normalised channels (B, C, H * W) of a feature map."""
        return _unit(_float32(fm).flatten(2))


def _square_distances(a: Tensor, b: Tensor) -> Tensor:
    """||a_i - b_j||^2 of the rows of a (B, M, D) and b (B, N, D): (B, M, N)."""
    square_a, square_b = (x.square().sum(2) for x in (a, b))
    return square_a[:, :, None] + square_b[:, None, :] - 2 * a @ b.transpose(1, 2)


def _unit(x: Tensor) -> Tensor:
    """x with rows, along the last dimension, of L2 norm 1; one of norm up to 1e-12 stays."""
    norm = x.norm(dim=-1, keepdim=True)  # whose gradient at 0 torch takes as 0
    return x / torch.where(norm > 1e-12, norm, 1)


def _float32(x: Tensor) -> Tensor:
    """x in float32, unless it is in float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
