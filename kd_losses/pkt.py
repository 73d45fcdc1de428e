"""PKT: Learning Deep Representations with Probabilistic Knowledge Transfer
(Passalis, Tefas, ECCV 2018, section 3.2, equations 3 to 6), https://arxiv.org/abs/1803.10837
"""

import torch
from torch import Tensor, nn


class PKTCosSim(nn.Module):
    """Divergence between the neighbourhoods that teacher and student see in a batch.

        x = feat / (||feat||_2 + eps),   P = (x x^T + 1) / 2, each row divided by its sum
        loss = mean over the B^2 pairs of P_t * log((P_t + eps) / (P_s + eps))

    eps: 1e-6 as in KD-Zoo (the CRD benchmark uses 1e-7).
    Differs from the paper: as in KD-Zoo, the similarity of a sample with itself is kept, and a mean
    over pairs instead of the sum.
    """

    def __init__(self, eps: float = 1e-6):
        super().__init__()
        self.eps = eps

    def forward(self, feat_s: Tensor, feat_t: Tensor) -> Tensor:
        """feat_s (B, D_s), feat_t (B, D_t): vectors; the widths may differ. Returns a scalar.

        Raises ValueError if the batches differ.
        """
        if feat_s.shape[0] != feat_t.shape[0]:
            raise ValueError(
                f"PKT: expected equal batch sizes, got {feat_s.shape[0]} and {feat_t.shape[0]}"
            )
        with torch.autocast(feat_s.device.type, enabled=False):
            p_s, p_t = self.similarity(feat_s), self.similarity(feat_t.detach())
            return (p_t * ((p_t + self.eps) / (p_s + self.eps)).log()).mean()

    def similarity(self, feat: Tensor) -> Tensor:
        """The (B, B) matrix of conditional probabilities; its rows sum to 1."""
        feat = _float32(feat).flatten(1)
        norm = feat.norm(dim=1, keepdim=True)  # whose gradient at 0 torch takes as 0
        feat = feat / (norm + self.eps)
        p = (feat @ feat.T + 1) / 2
        return p / p.sum(1, keepdim=True)


def _float32(x: Tensor) -> Tensor:
    """x in float32, unless it is in float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
