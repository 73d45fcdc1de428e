"""AT: Paying More Attention to Attention: Improving the Performance of Convolutional Neural
Networks via Attention Transfer (Zagoruyko, Komodakis, ICLR 2017, section 3.1, equation 2),
https://arxiv.org/abs/1612.03928
"""

import torch
from torch import Tensor, nn


class AT(nn.Module):
    """Mean squared distance between the normalised spatial attention maps of two feature maps.

        A(fm) = sum_c |fm_c|^p                              (B, H, W)
        a(fm) = A / (||A||_2 + 1e-6)                        norm over each sample's H * W
        loss  = mean over B, H, W of (a(fm_s) - a(fm_t))^2

    p: exponent, at least 1 (paper and KD-Zoo use 2); absolute: if False, fm_c^p instead of
    |fm_c|^p, as in the CRD benchmark (different for an odd p); p must then be an integer.
    Differs from the paper: squared distance and a mean over positions, as in KD-Zoo; the paper
    takes the norm of the difference, not squared.
    """

    def __init__(self, p: float = 2.0, absolute: bool = True):
        super().__init__()
        if p < 1 or not (absolute or p == int(p)):
            raise ValueError(f"expected p >= 1, and an integer if absolute is False, got {p}")
        self.p, self.absolute = p, absolute

    def forward(self, fm_s: Tensor, fm_t: Tensor) -> Tensor:
        """fm_s (B, C_s, H, W), fm_t (B, C_t, H, W). Returns a scalar.

        Raises ValueError if batch or spatial size differ.
        """
        if fm_s.shape[0] != fm_t.shape[0] or fm_s.shape[2:] != fm_t.shape[2:]:
            raise ValueError(
                f"AT: expected feature maps of equal batch and spatial size, got {(*fm_s.shape,)} "
                f"and {(*fm_t.shape,)}"
            )
        with torch.autocast(fm_s.device.type, enabled=False):
            return (self.attention(fm_s) - self.attention(fm_t.detach())).square().mean()

    def attention(self, fm: Tensor) -> Tensor:
        """The normalised attention map (B, H * W) of a feature map."""
        fm = _float32(fm)
        fm = fm.abs() if self.absolute and self.p % 2 else fm  # an even power has no sign
        attention = fm.pow(self.p).sum(1).flatten(1)
        norm = attention.norm(dim=1, keepdim=True)  # whose gradient at 0 torch takes as 0
        return attention / (norm + 1e-6)


def _float32(x: Tensor) -> Tensor:
    """x in float32, unless it is in float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
