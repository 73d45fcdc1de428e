"""SP: Similarity-Preserving Knowledge Distillation (Tung, Mori, ICCV 2019, section 3.1),
https://arxiv.org/abs/1907.09682
"""

import torch
from torch import Tensor, nn


class SP(nn.Module):
    """Mean squared difference of the similarities of the samples of a batch.

        X = fm as (B, C * H * W),   G = X X^T, each row divided by its L2 norm
        loss = 1 / B^2 * sum over the B^2 pairs of (G_s - G_t)^2

    Differs from the paper: nothing; KD-Zoo averages over three stages, the CRD benchmark uses the
    last one.
    """

    def forward(self, fm_s: Tensor, fm_t: Tensor) -> Tensor:
        """fm_s (B, ...), fm_t (B, ...): feature maps or vectors of any sizes. Returns a scalar.

        Raises ValueError if the batches differ.
        """
        if fm_s.shape[0] != fm_t.shape[0]:
            raise ValueError(
                f"SP: expected equal batch sizes, got {fm_s.shape[0]} and {fm_t.shape[0]}"
            )
        with torch.autocast(fm_s.device.type, enabled=False):
            return (self.similarity(fm_s) - self.similarity(fm_t.detach())).square().mean()

    def similarity(self, fm: Tensor) -> Tensor:
        """The (B, B) matrix of similarities, its rows of norm 1."""
        x = _float32(fm)
        # in the order of memory, which a product over all entries does not see: no copy
        x = (x if x.is_contiguous() else x.movedim(1, -1)).flatten(1)
        return _unit(x @ x.T)


def _unit(x: Tensor) -> Tensor:
    """x with rows, along the last dimension, of L2 norm 1; one of norm up to 1e-12 stays."""
    norm = x.norm(dim=-1, keepdim=True)  # whose gradient at 0 torch takes as 0
    return x / torch.where(norm > 1e-12, norm, 1)


def _float32(x: Tensor) -> Tensor:
    """x in float32, unless it is in float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
