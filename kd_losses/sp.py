"""SP: Similarity-Preserving Knowledge Distillation (Tung, Mori, ICCV 2019, section 3.1),
https://arxiv.org/abs/1907.09682
"""

import torch
from torch import Tensor, nn


class SP(nn.Module):
    """Mean squared difference of the similarities of the samples of a batch.

        X = fm as (B, C * H * W),   G = X X^T, each row divided by its L2 norm
        loss = 1 / B^2 * sum over the B^2 pairs of (G_s - G_t)^2

    Differs from the paper: nothing; KD-Zoo averages over three stages, the CRD benchmark takes the
    last one.
    """

    def forward(self, fm_s: Tensor, fm_t: Tensor) -> Tensor:
        """fm_s (B, ...), fm_t (B, ...): feature maps or vectors of any sizes. Returns a scalar.

        Raises ValueError where the batches differ.
        """
        if fm_s.shape[0] != fm_t.shape[0]:
            raise ValueError(f"SP wants one batch, not {fm_s.shape[0]} and {fm_t.shape[0]}")
        with torch.autocast(fm_s.device.type, enabled=False):
            return (self.similarity(fm_s) - self.similarity(fm_t.detach())).square().mean()

    def similarity(self, fm: Tensor) -> Tensor:
        """The (B, B) matrix of similarities, its rows of norm 1."""
        x = fm.to(torch.promote_types(fm.dtype, torch.float32))
        # in the order of memory, which a product over all entries does not see: no copy
        x = (x if x.is_contiguous() else x.movedim(1, -1)).flatten(1)
        # the product is symmetric: (dG + dG^T) X is one product backward, where X X^T takes two
        half = x @ x.detach().T
        similarity = half + half.T - half.detach()
        # the gradient of a square root at 0 is infinite; a zero row stays as it is,
        # and the clamp keeps that of a tiny one in range
        square = similarity.square().sum(1, keepdim=True)
        return similarity / torch.where(square > 0, square, 1).clamp(min=1e-24).sqrt()
