"""SemCKD: Cross-Layer Distillation with Semantic Calibration (Chen, Mei, Zhang, Wang, Wang, Feng,
Chen, AAAI 2021), https://arxiv.org/abs/2012.03236
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SemCKD(nn.Module):
    """Distance of each student map to all teacher maps, weighted by an attention.

        G    = vec(fm) vec(fm)^T                        (B, B), a row for each sample of the batch
        q_i  = unit(embed_i(G of fms_s[i]))             queries; keys k_j the same for fms_t[j] a_ij
        = softmax over j of q_i . k_j / soft       (B, n_s, n_t) d_ij = mean over C, H, W of
        (project_ij(fms_s[i]) - fms_t[j])^2    the larger map pooled loss = 1 / (B * n_s) * sum over
        B, i, j of a_ij * d_ij

    embed: Linear(B, 2 (B // 4)), ReLU, Linear to B // 4, so the batch size is part of the
    parameters' shapes; project: 1x1, 3x3 and 1x1 convolutions of width 2 C_t, batch norm and ReLU
    between; unit: division by the length, at least 1e-6. s_dims, t_dims: channels of the student's
    and the teacher's maps; batch: B, at least 4 (64); soft: temperature of the attention, above 0
    (1). Everything is trained with the student.
    Differs from the authors' code: a length has a minimum (an embedding of 0 gives NaN in the
    authors' code); a batch of another size is an error (the authors' code reshapes it, which mixes
    samples); layers that are never used are left out.
    """

    def __init__(self, s_dims: list[int], t_dims: list[int], batch: int, soft: float = 1.0):
        super().__init__()
        if not s_dims or not t_dims:
            raise ValueError("SemCKD: expected at least one map of each network")
        if batch < 4 or soft <= 0:
            raise ValueError(
                f"SemCKD: expected batches of at least 4 and soft above 0, got {batch} and {soft}"
            )
        self.s_dims, self.t_dims, self.batch, self.soft = list(s_dims), list(t_dims), batch, soft
        self.queries = nn.ModuleList(_embed(batch) for _ in s_dims)
        self.keys = nn.ModuleList(_embed(batch) for _ in t_dims)
        self.projections = nn.ModuleList(
            nn.ModuleList(_project(c_s, c_t) for c_t in t_dims) for c_s in s_dims
        )

    def forward(self, fms_s: list[Tensor], fms_t: list[Tensor]) -> Tensor:
        """fms_s, fms_t: maps (B, C, H, W) from shallow to deep. Returns a scalar.

        Raises ValueError if numbers, channels or the batch are not those of the constructor.
        """
        for name, fms, dims in (("student", fms_s, self.s_dims), ("teacher", fms_t, self.t_dims)):
            if [fm.shape[1] for fm in fms] != dims:
                raise ValueError(
                    f"SemCKD: expected {name} channels {dims}, got {[x.shape[1] for x in fms]}"
                )
            if any(len(fm) != self.batch for fm in fms):
                raise ValueError(
                    f"SemCKD: expected batches of exactly {self.batch} samples, the width of "
                    f"its linear layers, got {[len(fm) for fm in fms]}"
                )
        fms_s = [_float32(fm) for fm in fms_s]
        fms_t = [_float32(fm.detach()) for fm in fms_t]
        attention = self.attention(fms_s, fms_t)
        distances = []
        for fm_s, projections in zip(fms_s, self.projections):
            for fm_t, project in zip(fms_t, projections):
                size = [min(n) for n in zip(fm_s.shape[2:], fm_t.shape[2:])]
                x = project(_pooled(fm_s, size))
                with torch.autocast(x.device.type, enabled=False):
                    diff = _float32(x) - _pooled(fm_t, size)
                    distances.append(diff.square().mean((1, 2, 3)))
        distance = torch.stack(distances, dim=1)
        return (attention.flatten(1) * distance).sum() / (self.batch * len(fms_s))

    def attention(self, fms_s: list[Tensor], fms_t: list[Tensor]) -> Tensor:
        """a (B, n_s, n_t), which sums to 1 over the teacher's maps."""
        with torch.autocast(fms_s[0].device.type, enabled=False):  # small, and softmax sharpens it
            query, key = (
                torch.stack([embed(_gram(fm)) for embed, fm in zip(embeds, fms)], dim=1)
                for embeds, fms in ((self.queries, fms_s), (self.keys, fms_t))
            )
            # of eps at least, so that zeros stay and the gradient in tiny vectors is in range
            query, key = F.normalize(query, dim=2, eps=1e-6), F.normalize(key, dim=2, eps=1e-6)
            return (query @ key.mT / self.soft).softmax(2)


def _embed(batch: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(batch, 2 * (batch // 4)), nn.ReLU(), nn.Linear(2 * (batch // 4), batch // 4)
    )


def _project(c_s: int, c_t: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(c_s, 2 * c_t, 1, bias=False),
        nn.BatchNorm2d(2 * c_t),
        nn.ReLU(),
        nn.Conv2d(2 * c_t, 2 * c_t, 3, padding=1, bias=False),
        nn.BatchNorm2d(2 * c_t),
        nn.ReLU(),
        nn.Conv2d(2 * c_t, c_t, 1, bias=False),
    )


def _gram(fm: Tensor) -> Tensor:
    # in the order of memory, which a product over all entries does not see: no copy
    x = (fm if fm.is_contiguous() else fm.movedim(1, -1)).flatten(1)
    return x @ x.T


def _pooled(fm: Tensor, size: list[int]) -> Tensor:
    return fm if list(fm.shape[2:]) == size else F.adaptive_avg_pool2d(fm, size)


def _float32(x: Tensor) -> Tensor:
    """x in float32, unless it is in float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
