"""ITRD: Information Theoretic Representation Distillation (Miles, Lopez Rodriguez, Mikolajczyk,
BMVC 2022, section 3), https://arxiv.org/abs/2112.00459
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ITRD(nn.Module):
    """Correlation of student and teacher unit by unit, and similarity of their sample relations.

        e = W feat_s + b;   x = feat_s if s_dim = t_dim, else e
        z = each column minus its mean over the batch, divided by its standard deviation (B - 1)
        c_j    = mean over B of z(e)_j z(feat_t)_j
        corr   = log2 of the sum over j of |c_j - 1|^(2 alpha)
        G      = (B, B) matrix of the cosines between samples,   H(G) = sum of (G / tr G)^2
        mutual = H(G_s) - H(G_s * G_t)                      G_s of x, G_t of feat_t; * by entries
        loss   = lambda_corr * corr + lambda_mutual * mutual

    s_dim, t_dim: widths of student and teacher; lambda_corr: 2; lambda_mutual: 0.05 in the authors'
    code, 1 in their example; alpha: 1.5 (1.01 in their example, two networks of one family). W, b
    learn with the student. The loss can be negative: the mean is over B and the standard deviation
    over B - 1, so c is at most (B - 1) / B.
    Differs from the authors' code: a standard deviation is at least 1e-5, so a unit that is
    constant over the batch is uncorrelated (NaN in the authors' code).
    """

    def __init__(
        self,
        s_dim: int,
        t_dim: int,
        lambda_corr: float = 2.0,
        lambda_mutual: float = 0.05,
        alpha: float = 1.5,
    ):
        super().__init__()
        if alpha <= 0:
            raise ValueError(f"expected alpha (the power) > 0, got {alpha}")
        self.lambda_corr, self.lambda_mutual, self.alpha = lambda_corr, lambda_mutual, alpha
        self.embed = nn.Linear(s_dim, t_dim)

    def forward(self, feat_s: Tensor, feat_t: Tensor) -> Tensor:
        """feat_s (B, s_dim), feat_t (B, t_dim). Returns a scalar.

        Raises ValueError if the shapes do not fit or the batch holds one sample.
        """
        s_dim, t_dim = self.embed.in_features, self.embed.out_features
        if feat_s.shape != (len(feat_t), s_dim) or feat_t.shape[1:] != (t_dim,):
            raise ValueError(
                f"ITRD: expected vectors (B, {s_dim}) and (B, {t_dim}), got "
                f"{(*feat_s.shape,)} and {(*feat_t.shape,)}"
            )
        if len(feat_s) < 2:
            raise ValueError("ITRD: expected at least two samples: it correlates them")
        feat_s = _float32(feat_s)
        e = self.embed(feat_s)
        with torch.autocast(feat_s.device.type, enabled=False):
            e, feat_t = _float32(e), _float32(feat_t.detach())
            return self.lambda_corr * self.corr(e, feat_t) + self.lambda_mutual * self.mutual(
                feat_s if s_dim == t_dim else e, feat_t
            )

    def corr(self, e: Tensor, feat_t: Tensor) -> Tensor:
        c = (_standardised(e) * _standardised(feat_t)).mean(0)
        # c is at most (B - 1) / B, so that the logarithm is finite
        return (2 * self.alpha * (1 - c).log()).logsumexp(0) / math.log(2)

    def mutual(self, x: Tensor, feat_t: Tensor) -> Tensor:
        g_s, g_t = _cosines(x), _cosines(feat_t)
        return _square(g_s) - _square(g_s * g_t)


def _standardised(x: Tensor) -> Tensor:
    # the least variance is far above what rounding makes of a constant column
    return (x - x.mean(0)) / x.var(0).clamp(min=1e-10).sqrt()


def _cosines(x: Tensor) -> Tensor:
    # of eps at least, so that zeros stay and the gradient in tiny vectors is in range
    x = F.normalize(x, dim=1, eps=1e-6)
    return x @ x.T


def _square(g: Tensor) -> Tensor:
    # the trace counts the rows that are not zero: only if all are is it below 1
    # (diagonal().sum(): the backward of trace() waits for the device)
    return g.square().sum() / g.diagonal().sum().clamp(min=1).square()


def _float32(x: Tensor) -> Tensor:
    """x in float32, unless it is in float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
