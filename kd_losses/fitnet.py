"""FitNet: FitNets: Hints for Thin Deep Nets (Romero, Ballas, Kahou, Chassang, Gatta, Bengio,
ICLR 2015, section 2.2, equation 3), https://arxiv.org/abs/1412.6550
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Hint(nn.Module):
    """Mean squared difference of two feature maps of one shape.

        loss = mean over B, C, H, W of (fm_s - fm_t)^2

    Differs from the paper: as in KD-Zoo, the maps are compared during the whole training (the paper
    first trains the student up to the hint), and a mean instead of half the sum. The regressor of
    the paper is not in this file: apply it to the student's map first.
    """

    def forward(self, fm_s: Tensor, fm_t: Tensor) -> Tensor:
        """fm_s, fm_t: (B, C, H, W), or any one shape. Returns a scalar.

        Raises ValueError if the shapes differ.
        """
        if fm_s.shape != fm_t.shape:
            raise ValueError(
                f"Hint: expected equal shapes, got {(*fm_s.shape,)} and {(*fm_t.shape,)}"
            )
        with torch.autocast(fm_s.device.type, enabled=False):
            fm_s, fm_t = _float32(fm_s), _float32(fm_t.detach())
            # keeps the inputs alone, not their difference; torch's own mean would keep the squares
            return F.mse_loss(fm_s, fm_t, reduction="none").mean()


def _float32(x: Tensor) -> Tensor:
    """x in float32, unless it is in float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
