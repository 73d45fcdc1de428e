import itertools
import math

import pytest
import torch

import kd_losses.kdsvd
from kd_losses.kdsvd import KDSVD
from reference import agree, agree_grads, cases


def maps(case):
    """The student's maps, which require grad, and the teacher's."""
    n = sum(f"in/fs{i}" in case for i in range(9))
    return [case.leaf(f"in/fs{i}") for i in range(n)], [case[f"in/ft{i}"] for i in range(n)]


@pytest.mark.parametrize("case", cases("kdsvd"))
def test_reference(case):
    fms_s, fms_t = maps(case)
    loss = KDSVD(case.hyper["k"])(fms_s, fms_t)
    agree(loss, case["f64_canonical/loss"])
    leaves = {f"fs{i}": fm for i, fm in enumerate(fms_s)}
    agree_grads(loss, leaves, case.group("f64_canonical/grad/"))


def orbit(case, monkeypatch, **kwargs):
    """The student's maps, and each sample's loss under every choice of the teacher's signs.

    Those of the first stage stay: turning a vector in all stages changes nothing.
    """
    fms_s, fms_t = maps(case)
    k, canonical = case.hyper["k"], kd_losses.kdsvd._fix_sign
    rows = []
    for signs in itertools.product((1.0, -1.0), repeat=k * (len(fms_t) - 1)):
        rows.append([])
        for b in range(len(fms_t[0])):
            left = list(torch.tensor((1.0,) * k + signs).double().split(k))
            monkeypatch.setattr(kd_losses.kdsvd, "_fix_sign", lambda v: canonical(v) * left.pop(0))
            loss = KDSVD(k, **kwargs)([x[b : b + 1] for x in fms_s], [x[b : b + 1] for x in fms_t])
            rows[-1].append(loss)
    monkeypatch.undo()
    return fms_s, torch.stack([torch.stack(row) for row in rows])


@pytest.mark.parametrize("case", cases("kdsvd"))
def test_reference_of_all_signs(case, monkeypatch):
    """Whichever signs a decomposition returns, the value is one of these."""
    _, losses = orbit(case, monkeypatch)
    values = losses.detach().repeat(2 ** case.hyper["k"], 1).sort(0).values
    expected = case["extra/loss_sign_orbit_per_sample"].sort(0).values
    torch.testing.assert_close(values, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("case", cases("kdsvd"))
def test_reference_of_repdistiller(case, monkeypatch):
    """Its value, and at that value its gradients, appear under some signs."""
    fms_s, losses = orbit(case, monkeypatch, unfold="space")
    b = losses.shape[1]
    every = torch.cartesian_prod(*[torch.arange(len(losses))] * b)
    sums = sum(losses.detach()[every[:, i], i] for i in range(b)) / b
    picked = every[(sums - case["alt_repdistiller/loss"]).abs().argmin()]
    loss = losses.gather(0, picked[None]).mean()
    agree(loss, case["alt_repdistiller/loss"])
    leaves = {f"fs{i}": fm for i, fm in enumerate(fms_s)}
    agree_grads(loss, leaves, case.group("alt_repdistiller/grad/"))


def naive(fms_s, fms_t, k, unfold):
    """Sample by sample from a full decomposition, and entry by entry."""
    total = 0.0
    for b in range(len(fms_s[0])):
        stages = []
        for fm_s, fm_t in zip(fms_s, fms_t):
            rows = []
            for fm in (fm_s[b], fm_t[b]):
                c, h, w = fm.shape
                x = fm.reshape(c * h, w) if unfold == "channels" else fm.reshape(c, h * w).T
                rows.append(torch.linalg.svd(x)[1:])
            (_, vh_s), (sigma, vh_t) = rows
            norm = math.sqrt(sum(v * v for v in sigma[:k].tolist()))
            stage = []
            for j in range(k):
                v_t = vh_t[j].tolist()
                if max(v_t, key=abs) < 0:
                    v_t = [-v for v in v_t]
                best, picked = 0.0, None
                for v_s in vh_s[: k + 3].tolist():
                    cosine = sum(p * q for p, q in zip(v_s, v_t))
                    if abs(cosine) > abs(best):
                        best, picked = cosine, v_s
                scale = sigma[j].item() / norm
                stage.append(
                    ([math.copysign(v * scale, v * best) for v in picked], [v * scale for v in v_t])
                )
            stages.append(stage)
        for before, now in zip(stages, stages[1:]):
            for (s_0, t_0), (s_1, t_1) in zip(before, now):
                for p in range(len(t_1)):
                    for q in range(len(t_0)):
                        r_s = math.exp(-((s_1[p] - s_0[q]) ** 2) / 8)
                        r_t = math.exp(-((t_1[p] - t_0[q]) ** 2) / 8)
                        total += (r_s - r_t) ** 2
    return total / len(fms_s[0])


def draw(shapes, b=2):
    return [torch.randn(b, *shape).double() for shape in shapes]


TALL = [(3, 3, 4), (4, 2, 5), (5, 2, 2)]
WIDE = [(2, 1, 5), (7, 2, 1), (6, 2, 2)]  # fewer rows than columns once unfolded


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("shapes", [TALL, TALL[:2]])
def test_naive(k, shapes):
    fms_s, fms_t = draw([(c + 1, h + 1, w) for c, h, w in shapes]), draw(shapes)
    expected = naive(fms_s, fms_t, k, "channels")
    assert KDSVD(k)(fms_s, fms_t).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("shapes", [[(3, 4, 4), (5, 3, 3)], [(6, 2, 2), (7, 4, 2), (4, 2, 3)]])
def test_naive_space(k, shapes):
    fms_s, fms_t = draw([(c, h + 1, w + 1) for c, h, w in shapes]), draw(shapes)
    expected = naive(fms_s, fms_t, k, "space")
    assert KDSVD(k, "space")(fms_s, fms_t).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("unfold", ["channels", "space"])
@pytest.mark.parametrize("shapes", [TALL, WIDE])
def test_gradcheck(unfold, shapes):
    fms_t, fms_s = draw(shapes, 1), [x.requires_grad_() for x in draw(shapes, 1)]
    assert torch.autograd.gradcheck(lambda *x: KDSVD(2, unfold)(x, fms_t), fms_s)


@pytest.mark.parametrize("shape", [(3, 6, 4), (3, 4, 6)])
def test_vectors_are_those_of_the_full_decomposition(shape):
    """Also where eigenvalues beyond the first are 0, and the vectors of those are."""
    x = torch.randn(shape).double()
    x[1] = torch.randn(shape[1], 2).double() @ torch.randn(2, shape[2]).double()
    sigma, v = kd_losses.kdsvd._right_vectors(x, 4)
    expected, vh = torch.linalg.svd(x, full_matrices=False)[1:]
    torch.testing.assert_close(sigma / sigma[:, :1], expected / expected[:, :1], atol=1e-7, rtol=0)
    seen = (expected > 1e-6).double()
    assert seen.sum() == 10
    cosine = (v.mT @ vh.mT).abs()
    torch.testing.assert_close(cosine, torch.diag_embed(seen), atol=1e-7, rtol=0)


def spoil(fms, how):
    fms = [x.clone() for x in fms]
    for x in fms:
        if how == "zero":
            x[0] = 0
        elif how == "rank 1":
            x[0] = x[0, :1, :1, :1]
        elif how == "dead":
            x[0, 1:, :, 1:] = 0
        elif how == "orthogonal":  # all singular values tie
            x[0] = 0
            x[0, 0, 0, 0] = x[0, 1, 1, 1] = 1
        elif how == "tiny":
            x *= 1e-25
        elif how == "huge":
            x *= 1e25
    return fms


@pytest.mark.parametrize("unfold", ["channels", "space"])
@pytest.mark.parametrize("how", ["zero", "rank 1", "dead", "orthogonal", "tiny", "huge", "same"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_degenerate_input(unfold, how, dtype):
    good = [x.to(dtype) for x in draw([(4, 3, 3), (5, 3, 3), (5, 2, 2)])]
    other = [x.to(dtype) for x in draw([(4, 3, 3), (5, 3, 3), (5, 2, 2)])]
    bad = spoil(good, how)
    for fms_s, fms_t in ((bad, other), (other, bad), (bad, bad)):
        leaves = [x.clone().requires_grad_() for x in fms_s]
        loss = KDSVD(2, unfold)(leaves, fms_t)
        assert loss.isfinite() and loss.dtype == dtype
        assert fms_s is not fms_t or loss < 1e-10
        assert all(g.isfinite().all() for g in torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize("unfold", ["channels", "space"])
def test_maps_smaller_than_k(unfold):
    fms_s, fms_t = ([x.requires_grad_() for x in draw([(2, 1, 1), (1, 2, 1)], 1)] for _ in "st")
    loss = KDSVD(5, unfold)(fms_s, fms_t)
    assert loss.isfinite()
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, fms_s))


def test_tied_singular_values_leave_the_other_gradients_right():
    """Turning the tied vectors among themselves changes nothing, so it gets no gradient."""
    base = torch.linalg.qr(torch.randn(6, 4).double())[0] * torch.tensor([3.0, 1.0, 1.0, 1.0])
    turn = torch.linalg.qr(torch.randn(4, 4).double())[0]
    fms_s = [(base @ turn).reshape(1, 2, 3, 4), torch.randn(1, 2, 3, 4).double()]
    first = torch.stack([turn[0], torch.randn(4).double() * 1e-2])  # aligned with the largest
    fms_t = [first.reshape(1, 1, 2, 4), torch.randn(1, 1, 2, 4).double()]
    leaves = [x.requires_grad_() for x in fms_s]
    assert torch.autograd.gradcheck(lambda *x: KDSVD(1)(x, fms_t), leaves)


@pytest.mark.parametrize("case", cases("kdsvd"))
def test_float32_and_autocast(case):
    fms_s, fms_t = maps(case)
    loss = KDSVD(case.hyper["k"])([x.float() for x in fms_s], [x.float() for x in fms_t])
    assert loss.item() == pytest.approx(case["f64_canonical/loss"].item(), rel=1e-4)
    low_s, low_t = (
        [x.detach().bfloat16().contiguous(memory_format=torch.channels_last) for x in fms]
        for fms in (fms_s, fms_t)
    )
    expected = KDSVD(case.hyper["k"])([x.double() for x in low_s], [x.double() for x in low_t])
    low_s = [x.requires_grad_() for x in low_s]
    with torch.autocast("cpu", torch.bfloat16):
        loss = KDSVD(case.hyper["k"])(low_s, low_t)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


def test_bad_input():
    with pytest.raises(ValueError, match=r"\bk\b"):
        KDSVD(0)
    with pytest.raises(ValueError, match="unfold"):
        KDSVD(unfold="rows")
    fms = draw(TALL)
    with pytest.raises(ValueError, match="pairs"):
        KDSVD()(fms[:1], fms[:1])
    with pytest.raises(ValueError, match="pairs"):
        KDSVD()(fms, fms[:2])
    with pytest.raises(ValueError, match="width"):
        KDSVD()(fms, [fms[0][..., :1], *fms[1:]])
    with pytest.raises(ValueError, match="channels"):
        KDSVD(unfold="space")(fms, [fms[0][:, :1], *fms[1:]])
    for one in ([x[:1] for x in fms], [fms[0], fms[1][:1], fms[2]]):
        with pytest.raises(ValueError, match="batch"):
            KDSVD()(fms, one)
