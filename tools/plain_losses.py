"""Losses written like their formulas, with plain broadcasting. bench.py compares the losses of
kd_losses with them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def plain_at(loss: nn.Module, fm_s: Tensor, fm_t: Tensor) -> Tensor:
    """Mean squared difference of the attention maps, scaled to unit length."""
    one, two = (F.normalize(fm.abs().pow(loss.p).sum(1).flatten(1)) for fm in (fm_s, fm_t))
    return (one - two).square().mean()


def plain_nst(loss: nn.Module, fm_s: Tensor, fm_t: Tensor) -> Tensor:
    """Maximum mean discrepancy of the channels with a squared polynomial kernel."""
    x, y = (F.normalize(fm.flatten(2), dim=2) for fm in (fm_s, fm_t))

    def kernel(a, b):
        return (a[:, :, None] * b[:, None]).sum(3).square().mean()

    return kernel(y, y) + kernel(x, x) - 2 * kernel(x, y)


def plain_fsp(
    loss: nn.Module, fm_s1: Tensor, fm_s2: Tensor, fm_t1: Tensor, fm_t2: Tensor
) -> Tensor:
    """Mean squared difference of the flow matrices of two stages."""

    def flow(a, b):
        size = tuple(map(min, a.shape[2:], b.shape[2:]))
        a, b = (F.adaptive_avg_pool2d(x, size).flatten(2) for x in (a, b))
        return (a[:, :, None] * b[:, None]).mean(3)

    return (flow(fm_s1, fm_s2) - flow(fm_t1, fm_t2)).square().mean()


def plain_rkd(loss: nn.Module, feat_s: Tensor, feat_t: Tensor) -> Tensor:
    """Distances and angles between the samples."""

    def relations(x):
        n, diff = len(x), x[None] - x[:, None]
        dist, e = diff.norm(dim=2), F.normalize(diff, dim=2)
        return dist / (dist.sum() / (n * (n - 1))), (e[:, :, None] * e[:, None]).sum(3)

    (dist_s, angle_s), (dist_t, angle_t) = relations(feat_s), relations(feat_t)
    dist = F.smooth_l1_loss(dist_s, dist_t)
    return loss.w_dist * dist + loss.w_angle * F.smooth_l1_loss(angle_s, angle_t)


def plain_ab(loss: nn.Module, fm_s: Tensor, fm_t: Tensor) -> Tensor:
    """Mean square of the activations on the wrong side of the margin."""
    m = loss.margin
    rise = (fm_s - m).square() * ((fm_s <= m) & (fm_t > 0)).float()
    fall = (fm_s + m).square() * ((fm_s > -m) & (fm_t <= 0)).float()
    return (rise + fall).mean()


def plain_sp(loss: nn.Module, fm_s: Tensor, fm_t: Tensor) -> Tensor:
    """Mean squared difference of the similarity matrices of the samples."""

    def similarity(fm):
        x = fm.flatten(1)
        return F.normalize((x[:, None] * x[None]).sum(2))

    return (similarity(fm_s) - similarity(fm_t)).square().mean()


def plain_irg(loss: nn.Module, layers_s: list[Tensor], layers_t: list[Tensor]) -> Tensor:
    """Differences of vertices, edges, and transformations between stages."""

    def edges(x):
        x = x.flatten(1)
        distance = (x[:, None] - x[None]).square().sum(2).clamp(min=1e-12)
        distance = distance * (1 - torch.eye(len(x), device=x.device))
        return distance / distance.max()

    edge = [(edges(s) - edges(t)).square().mean() for s, t in zip(layers_s[:3], layers_t)]
    vert = (layers_s[3] - layers_t[3]).square().mean()
    tran = loss.transformation(*layers_s[:2]) - loss.transformation(*layers_t[:2])
    return (
        loss.w_irg_vert * vert
        + loss.w_irg_edge * sum(edge) / 3
        + loss.w_irg_tran * tran.square().mean()
    )


def plain_afd(loss: nn.Module, fm_s: Tensor, fm_t: Tensor) -> Tensor:
    """Squared difference of the channels, scaled to unit length and weighted by the teacher's
    attention."""
    one, two = (
        fm / (fm.flatten(2).norm(dim=2)[:, :, None, None] + loss.eps) for fm in (fm_s, fm_t)
    )
    return (loss.rho(fm_t) * (one - two).square().mean((2, 3))).sum(1).mean()


def plain_crd(loss: nn.Module, feat_s: Tensor, feat_t: Tensor, idx: Tensor) -> Tensor:
    """Gathers rows of the banks, as the public code does."""
    sample_idx = loss.draw(idx)
    e_s, e_t = F.normalize(loss.embed_s(feat_s)), F.normalize(loss.embed_t(feat_t))
    count, total = sample_idx.shape[1] - 1, 0.0
    c = count / loss.n_data
    for e, memory, log_z in (
        (e_s, loss.memory_t, loss.log_z_s),
        (e_t, loss.memory_s, loss.log_z_t),
    ):
        rows = memory.index_select(0, sample_idx.flatten()).view(len(e), -1, e.shape[1])
        score = torch.exp(torch.bmm(rows, e[:, :, None])[:, :, 0] / loss.nce_t)
        log_z.copy_(torch.where(log_z.isnan(), (score.detach().mean() * loss.n_data).log(), log_z))
        p = score / log_z.exp()
        total = total - (p[:, 0] / (p[:, 0] + c + 1e-7)).log().sum()
        total = total - (c / (p[:, 1:] + c + 1e-7)).log().sum()
    with torch.no_grad():
        for e, memory in ((e_s, loss.memory_s), (e_t, loss.memory_t)):
            memory[idx] = F.normalize(loss.nce_mom * memory[idx] + (1 - loss.nce_mom) * e)
    return total / len(e_s)


def plain_kdsvd(loss: nn.Module, fms_s: list[Tensor], fms_t: list[Tensor]) -> Tensor:
    """Kernels between the singular vectors of two stages; the student's are aligned with the
    teacher's."""
    stages, k = [], loss.k
    for fm_s, fm_t in zip(fms_s, fms_t):
        v_s = torch.linalg.svd(fm_s.flatten(1, 2), full_matrices=False)[2].mT[:, :, : k + 3]
        _, sigma, vh_t = torch.linalg.svd(fm_t.flatten(1, 2), full_matrices=False)
        sigma, v_t = F.normalize(sigma[:, :k])[:, None], vh_t.mT[:, :, :k]
        v_t = v_t * v_t.gather(1, v_t.abs().argmax(1, keepdim=True)).sign()
        cosine = v_t.mT @ v_s.detach()
        best = cosine.abs().argmax(2, keepdim=True)
        v_s = v_s.gather(2, best.mT.expand(-1, v_s.shape[1], -1)) * cosine.gather(2, best).mT.sign()
        stages.append((v_s * sigma, v_t * sigma))
    total = 0.0
    for before, now in zip(stages, stages[1:]):
        one, two = ((-(a[:, :, None] - b[:, None]).square() / 8).exp() for a, b in zip(now, before))
        total = total + (one - two).square().sum()
    return total / len(fms_s[0])


# --- number of elements of the largest tensor for n samples; bench: a Loss of bench_loss.py -------


def _flow(bench, n: int) -> int:
    fms = [bench.shapes[1].stem, *bench.shapes[1].stages]
    return max(
        n * a.shape[1] * b.shape[1] * min(a.shape[2:].numel(), b.shape[2:].numel())
        for a, b in zip(fms, fms[1:])
    )


def _channel_pairs(bench, n: int) -> int:
    return n * max(fm.shape[1] * fm[0].numel() for x in bench.shapes for fm in x.stages)


def _sample_pairs(bench, n: int) -> int:
    return n**2 * max(fm[0].numel() for x in bench.shapes for fm in x.stages)


def _triples(bench, n: int) -> int:
    return n**3 * max(x.feat.shape[1] for x in bench.shapes)


def _bank_rows(bench, n: int) -> int:
    return n * (1 + bench.criterion.loss.nce_n) * bench.criterion.loss.memory_s.shape[1]


BROADCAST = {  # (loss, number of elements of its largest tensor, or None if not above the inputs)
    "at": (plain_at, None),
    "nst": (plain_nst, _channel_pairs),
    "fsp": (plain_fsp, _flow),
    "rkd": (plain_rkd, _triples),
    "ab": (plain_ab, None),
    "sp": (plain_sp, _sample_pairs),
    "irg": (plain_irg, _sample_pairs),
    "afd": (plain_afd, None),
    "crd": (plain_crd, _bank_rows),
    "kdsvd": (plain_kdsvd, None),
}
