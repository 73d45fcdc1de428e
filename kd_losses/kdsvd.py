"""KDSVD: Self-supervised Knowledge Distillation Using Singular Value Decomposition
(Lee, Kim, Song, ECCV 2018, section 3), https://arxiv.org/abs/1807.06819
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class KDSVD(nn.Module):
    """Difference between the changes of the maps' principal directions from stage to stage.

        X = U diag(sigma) V^T for each sample and stage i, X the unfolded map (B, M, N)
        V_t: the teacher's first k right vectors, the largest entry of each made positive
        V_s: for each of them the one of largest |cosine| among the student's first k + 3, its sign
             turned to the teacher's
        v = V * sigma_t / ||sigma_t||_2, for both networks                         (B, N_i, k)
        R^i_abj = exp(-(v^i_aj - v^{i-1}_bj)^2 / 8)                          (B, N_i, N_{i-1}, k)
        loss = 1 / B * sum over i > 1 and all entries of (R_s - R_t)^2

    k: number of vectors (MDistiller and RepDistiller use 1), at most the rank of the maps. unfold:
    'channels': X is (B, C * H, W), as in MDistiller; 'space': X is (B, H * W, C), as in
    RepDistiller and the authors' code. Vectors of equal singular values get no gradient from each
    other, and those of singular value 0 are set to zero. On a GPU the decomposition synchronises
    with the host.
    Differs from the public code, whose value depends on the arbitrary sign of the teacher's
    singular vectors.
    """

    def __init__(self, k: int = 1, unfold: str = "channels"):
        super().__init__()
        if k < 1:
            raise ValueError(f"expected k >= 1, got {k}")
        if unfold not in ("channels", "space"):
            raise ValueError(f"expected unfold channels or space, got {unfold!r}")
        self.k, self.unfold = k, unfold

    def forward(self, fms_s: Sequence[Tensor], fms_t: Sequence[Tensor]) -> Tensor:
        """fms_s, fms_t: maps (B, C, H, W), from shallow to deep, at least two. Of a stage's two
        maps only W has to agree, for 'space' only C. Returns a scalar.

        Raises ValueError if number, batch or that size differ.
        """
        if len(fms_s) != len(fms_t) or len(fms_s) < 2:
            raise ValueError(
                f"KDSVD: expected two or more pairs, got {len(fms_s)} and {len(fms_t)}"
            )
        axis = 3 if self.unfold == "channels" else 1
        for fm_s, fm_t in zip(fms_s, fms_t):
            one_batch = len(fm_s) == len(fm_t) == len(fms_s[0])
            if not one_batch or fm_s.shape[axis] != fm_t.shape[axis]:
                raise ValueError(
                    "KDSVD: expected equal batch sizes and equal "
                    f"{'width' if axis == 3 else 'channels'}, got "
                    f"{(*fm_s.shape,)} and {(*fm_t.shape,)}"
                )
        with torch.autocast(fms_s[0].device.type, enabled=False):
            pairs = [(self._unfold(s), self._unfold(t.detach())) for s, t in zip(fms_s, fms_t)]
            k = min(self.k, *(size for _, x_t in pairs for size in x_t.shape[1:]))
            stages = [self._vectors(x_s, x_t, k) for x_s, x_t in pairs]
            loss = sum(
                (_relation(s, before_s) - _relation(t, before_t)).square().sum()
                for (before_s, before_t), (s, t) in zip(stages, stages[1:])
            )
            return loss / len(fms_s[0])

    def _unfold(self, fm: Tensor) -> Tensor:
        fm = _float32(fm)
        return fm.flatten(1, 2) if self.unfold == "channels" else fm.flatten(2).mT

    def _vectors(self, x_s: Tensor, x_t: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The weighted vectors v (B, N, k) of the student and of the teacher."""
        sigma, v_t = _right_vectors(x_t, k)
        v_t = _fix_sign(v_t)
        _, candidates = _right_vectors(x_s, self.k + 3)
        weight = _unit(sigma)[:, None]
        return _aligned(candidates, v_t) * weight, v_t * weight


def _aligned(candidates: Tensor, v_t: Tensor) -> Tensor:
    """For each column of v_t that of the candidates, or its opposite, of the largest cosine."""
    cosine = v_t.mT @ candidates.detach()
    best = cosine.abs().argmax(2, keepdim=True)
    v_s = candidates.gather(2, best.mT.expand(-1, v_t.shape[1], -1))
    return v_s * cosine.gather(2, best).mT.sign()


def _relation(v: Tensor, before: Tensor) -> Tensor:
    return (-(v[:, :, None] - before[:, None]).square() / 8).exp()


def _fix_sign(v: Tensor) -> Tensor:
    """Each column of v (B, N, k), or its opposite, so that its largest entry is positive."""
    entry = v.gather(1, v.abs().argmax(1, keepdim=True))
    return torch.where(entry < 0, -v, v)


def _right_vectors(x: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The first n singular values, all up to one factor a sample, and right singular vectors,
    (B, n) and (B, N, n), of x (B, M, N); n is at most min(M, N)."""
    # from the smaller Gram matrix: its eigenvectors' gradient can leave ties out, which is NaN by
    # torch.linalg.svd, and on CUDA one call decomposes a whole batch
    peak = x.detach().abs().amax((1, 2), keepdim=True)
    x = x / torch.where(peak > 0, peak, 1)  # the square of a small entry underflows
    n = min(n, *x.shape[1:])
    tall = x.shape[1] >= x.shape[2]
    value, v = _Eigh.apply(x.mT @ x if tall else x @ x.mT)
    seen = value[:, :n] > _tolerance(value)
    v = v[:, :, :n]
    if not tall:  # v are left vectors still
        v = _unit(v.mT @ x).mT
    return torch.where(seen, value[:, :n], 0).sqrt(), torch.where(seen[:, None], v, 0)


def _tolerance(value: Tensor) -> Tensor:
    """Below it an eigenvalue or a gap between two is rounding error."""
    return (1e-12 if value.dtype == torch.float64 else 1e-6) * value[:, :1]


class _Eigh(torch.autograd.Function):
    """Eigenvalues, constants here, and eigenvectors of symmetric matrices (B, n, n), largest first.

    Within tied eigenvalues any rotation is as good: it gets no gradient, where torch's is NaN.
    """

    @staticmethod
    def forward(ctx, matrix: Tensor) -> tuple[Tensor, Tensor]:
        value, vector = (x.flip(-1) for x in torch.linalg.eigh(matrix))
        ctx.save_for_backward(value, vector)
        ctx.mark_non_differentiable(value)
        return value, vector

    @staticmethod
    @once_differentiable
    def backward(ctx, _, grad: Tensor) -> Tensor:
        value, vector = ctx.saved_tensors
        gap = value[:, None] - value[:, :, None]
        apart = gap.abs() > _tolerance(value)[:, None]
        with torch.autocast(grad.device.type, enabled=False):
            inner = apart * (vector.mT @ grad) / torch.where(apart, gap, 1)
            return vector @ inner @ vector.mT


def _unit(x: Tensor) -> Tensor:
    """x with rows, along the last dimension, of L2 norm 1; one of norm up to 1e-12 stays."""
    norm = x.norm(dim=-1, keepdim=True)  # whose gradient at 0 torch takes as 0
    return x / torch.where(norm > 1e-12, norm, 1)


def _float32(x: Tensor) -> Tensor:
    """x in float32, unless it is in float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
