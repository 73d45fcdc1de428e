import math

import pytest
import torch

from kd_losses.crld import CRLD
from reference import agree, agree_grads, cases

VIEWS = ("out_s_weak", "out_s_strong", "out_t_weak", "out_t_strong")


@pytest.mark.parametrize("case", cases("crld"))
def test_reference(case):
    leaves = {name: case.leaf(f"in/{name}") for name in VIEWS[:2]}
    outs = *leaves.values(), *(case[f"in/{name}"] for name in VIEWS[2:])
    loss = CRLD(**case.hyper)(*outs)
    agree(loss, case["loss"])
    agree_grads(loss, leaves, case.group("grad/"))
    agree(CRLD(**case.hyper | dict(wv=1.0, cv=0.0))(*outs), case["extra/within"])
    agree(CRLD(**case.hyper | dict(wv=0.0, cv=1.0))(*outs), case["extra/cross"])


def softmax(z, T):
    return [math.exp(value / T) / sum(math.exp(v / T) for v in z) for value in z]


def naive(outs, wv, cv, T, tau_w, tau_s):
    """The four divergences sample by sample and class by class."""
    total, n = 0.0, len(outs[0])
    for s_w, s_s, t_w, t_s in zip(*(out.tolist() for out in outs)):

        def k(s, t):
            pairs = zip(softmax(s, T), softmax(t, T))
            return T**2 * sum(b * math.log(b / a) for a, b in pairs)

        if max(softmax(t_w, 1)) >= tau_w:
            total += wv * (k(s_w, t_w) + k(s_s, t_s))
        if max(softmax(t_s, 1)) >= tau_s:
            total += cv * (k(s_s, t_w) + k(s_w, t_s))
    return total / n


@pytest.mark.parametrize("hyper", [(2.0, 0.5, 4.0, 0.7, 0.5), (1.0, 3.0, 1.5, 0.4, 0.8)])
@pytest.mark.parametrize("b, k", [(1, 3), (9, 5), (8, 2)])
def test_naive(b, k, hyper):
    outs = [2 * torch.randn(b, k).double() for _ in range(4)]
    assert CRLD(*hyper)(*outs).item() == pytest.approx(naive(outs, *hyper), rel=1e-11, abs=1e-15)


def test_gradcheck():
    outs = [torch.randn(4, 3).double() for _ in range(4)]
    crld = CRLD(tau_w=0.5, tau_s=0.5)

    def call(s_w, s_s):
        return crld(s_w, s_s, *outs[2:])

    assert torch.autograd.gradcheck(call, [x.requires_grad_() for x in outs[:2]])


def test_teacher_is_constant():
    outs = [torch.randn(3, 4).requires_grad_() for _ in range(4)]
    CRLD(tau_w=0.0)(*outs).backward()
    assert [x.grad is not None for x in outs] == [True, True, False, False]


def test_masks():
    """Nothing counts where the teacher is less sure than the threshold; as sure is enough."""
    outs = [torch.randn(3, 4).double().requires_grad_() for _ in range(4)]
    unsure = [*outs[:2], 0 * outs[2], 0 * outs[3]]  # confidence 1 / 4
    loss = CRLD(tau_w=0.26, tau_s=0.26)(*unsure)
    assert loss.item() == 0
    assert all(g.count_nonzero() == 0 for g in torch.autograd.grad(loss, outs[:2]))
    assert CRLD(tau_w=0.25, tau_s=1.0)(*unsure) == CRLD(cv=0.0, tau_w=0.0)(*unsure) != 0
    assert CRLD(tau_w=1.0, tau_s=0.25)(*unsure) == CRLD(wv=0.0, tau_s=0.0)(*unsure) != 0


def test_equal_views_and_networks():
    out = torch.randn(5, 4).requires_grad_()
    for x in (out, 1e4 * out, 0 * out):
        loss = CRLD(tau_w=0.0, tau_s=0.0)(x, x, x, x)
        assert loss.item() == 0
        assert torch.autograd.grad(loss, out)[0].abs().max() < 1e-1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_saturated_logits(dtype):
    peak = 200 * torch.eye(4).to(dtype)
    s_w, s_s = peak[[0, 1]].requires_grad_(), peak[[1, 1]].requires_grad_()
    loss = CRLD(T=1.0)(s_w, s_s, peak[[0, 2]], peak[[0, 1]])
    grads = torch.autograd.grad(loss, (s_w, s_s))
    # per pair 0 or 200: within (0 + 200) + (200 + 0), cross (200 + 0) + (200 + 0)
    assert loss.item() == pytest.approx((2 * 400 + 0.5 * 400) / 2, rel=1e-6)
    assert all(grad.isfinite().all() and grad.abs().max() < 10 for grad in grads)


def test_bad_input():
    out = torch.zeros(3, 4)
    with pytest.raises(ValueError, match=r"\bT\b"):
        CRLD(T=0.0)
    for bad in (dict(tau_w=1.1), dict(tau_s=-0.1)):
        with pytest.raises(ValueError, match=rf"\b{[*bad][0]}\b"):
            CRLD(**bad)
    for i in range(4):  # not a silent broadcast
        outs = [out] * 4
        outs[i] = out[:1]
        with pytest.raises(ValueError, match="shape"):
            CRLD()(*outs)
