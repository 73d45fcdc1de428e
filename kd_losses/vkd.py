"""VkD: Improving Knowledge Distillation using Orthogonal Projections (Miles, Elezi, Deng,
CVPR 2024, section 3), https://arxiv.org/abs/2403.06213
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class VKD(nn.Module):
    """Smooth L1 distance between the student's feature, orthogonally projected, and the teacher's.

        W = base Q(X), transposed if t_dim < s_dim: orthonormal columns (then rows)
        loss = mean over B, t_dim of smooth_l1(W feat_s - LN(feat_t))

    LN gives each vector mean 0 and variance 1 (+ 1e-5), smooth_l1(x) is x^2 / 2 up to 1 and |x| - 1
    / 2 above. With n >= k the two widths, base is a fixed random orthogonal (n, n) matrix, X an (n,
    k) parameter that starts at 0 and is trained with the student, L its lower triangle, padded with
    zeros, and A the (n, n) matrix L - L^T. Q(X) is the first k columns of

        cayley        (I - A / 2)^-1 (I + A / 2)
        matrix_exp    exp(A)                                torch's choice if n = k
        householder   H_1 ... H_k diag(signs)               torch's choice if n > k

    H_j reflects along column j of L, with 1 in place of its diagonal; signs: of X's diagonal.
    s_dim, t_dim: widths of student and teacher; map: of these (authors: torch's choice).
    Differs from the authors' code: their Householder map truncates the diagonal to an integer, so
    one step of weight decay makes W zero. Here each map is orthonormal for any X.
    """

    def __init__(self, s_dim: int, t_dim: int, map: str = "cayley"):
        super().__init__()
        if map not in MAPS:
            raise ValueError(f"VKD: expected map to be one of {', '.join(MAPS)}, got {map!r}")
        self.s_dim, self.t_dim, self.map = s_dim, t_dim, map
        n, k = max(s_dim, t_dim), min(s_dim, t_dim)
        self.weight = nn.Parameter(torch.zeros(n, k))
        self.register_buffer("base", nn.init.orthogonal_(torch.empty(n, n)))

    def forward(self, feat_s: Tensor, feat_t: Tensor) -> Tensor:
        """feat_s (B, s_dim), feat_t (B, t_dim). Returns a scalar.

        Raises ValueError if the shapes do not fit.
        """
        if feat_s.shape != (len(feat_t), self.s_dim) or feat_t.shape[1:] != (self.t_dim,):
            raise ValueError(
                f"VKD: expected vectors (B, {self.s_dim}) and (B, {self.t_dim}), got "
                f"{(*feat_s.shape,)} and {(*feat_t.shape,)}"
            )
        # the projection too: in half precision its columns would not be orthonormal
        with torch.autocast(feat_s.device.type, enabled=False):
            feat_s, feat_t = _float32(feat_s), _float32(feat_t.detach())
            return F.smooth_l1_loss(self.project(feat_s), F.layer_norm(feat_t, [self.t_dim]))

    def project(self, feat_s: Tensor) -> Tensor:
        """W feat_s (B, t_dim), by two products that are cheaper than the one that makes W."""
        q = MAPS[self.map](self.weight)
        return feat_s @ self.base @ q if self.t_dim < self.s_dim else feat_s @ q.T @ self.base.T

    def projection(self) -> Tensor:
        """W (t_dim, s_dim)."""
        return self.project(torch.eye(self.s_dim).to(self.weight)).T


def _cayley(x: Tensor) -> Tensor:
    # A = [[S, -R^T], [R, 0]]: eliminating the lower block leaves the inverse of a (k, k) matrix,
    # whose symmetric part is at least 1. inv, unlike inv_ex, would wait for the device's verdict
    k = x.shape[1]
    upper, r = x[:k].tril(-1), x[k:]
    eye = torch.eye(k, dtype=x.dtype, device=x.device)
    inverse = torch.linalg.inv_ex(eye + (r.T @ r) / 4 - (upper - upper.T) / 2)[0]
    return torch.cat([2 * inverse - eye, r @ inverse])


def _matrix_exp(x: Tensor) -> Tensor:
    # torch.matrix_exp asks the device for a norm. Pade's quotient of degree 8, here of A / 16, is
    # orthogonal whatever its error, which is rounding alone up to a norm of about 16
    n, k = x.shape
    lower = F.pad(x.tril(-1), (0, n - k))
    a = (lower - lower.T) / 16
    top = bottom = power = torch.eye(n, dtype=x.dtype, device=x.device)
    factor, degree = 1.0, 8
    for i in range(1, degree + 1):
        factor *= (degree - i + 1) / (i * (2 * degree - i + 1))
        power = power @ a
        top, bottom = top + factor * power, bottom + (-1) ** i * factor * power
    q = torch.linalg.solve_ex(bottom, top)[0]
    for _ in range(4):
        q = q @ q
    return q[:, :k]


def _householder(x: Tensor) -> Tensor:
    below = x.tril(-1)
    tau = 2 / (1 + below.square().sum(0))
    # the sign of -0, too: a decaying diagonal never turns over
    signs = torch.ones_like(tau).copysign(x.detach().diagonal())
    return torch.linalg.householder_product(below, tau) * signs


MAPS = dict(cayley=_cayley, matrix_exp=_matrix_exp, householder=_householder)


def _float32(x: Tensor) -> Tensor:
    """x in float32, unless it is in float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
