"""Logits: Do Deep Nets Really Need to be Deep? (Ba, Caruana, NIPS 2014, section 2.2),
https://arxiv.org/abs/1312.6184
"""

import torch
from torch import Tensor, nn


class Logits(nn.Module):
    """Mean squared difference of the logits.

        loss = mean over B, K of (out_s - out_t)^2

    Differs from the paper: a mean over the classes instead of half the sum. As in KD-Zoo, it is
    used together with the cross-entropy; the paper trains only on the logits.
    """

    def forward(self, out_s: Tensor, out_t: Tensor) -> Tensor:
        """out_s, out_t: logits (B, K). Returns a scalar.

        Raises ValueError if the shapes differ.
        """
        if out_s.shape != out_t.shape:
            raise ValueError(
                f"Logits: expected equal shapes, got {(*out_s.shape,)} and {(*out_t.shape,)}"
            )
        with torch.autocast(out_s.device.type, enabled=False):
            out_s, out_t = _float32(out_s), _float32(out_t.detach())
            return (out_s - out_t).square().mean()


def _float32(x: Tensor) -> Tensor:
    """x in float32, unless it is in float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
