import math

import pytest
import torch

from kd_losses.wsld import WSLD
from reference import agree, agree_grads, cases


@pytest.mark.parametrize("case", cases("wsld"))
def test_reference(case):
    out_s, out_t, target = case.leaf("in/out_s"), case["in/out_t"], case["in/target"]
    alpha, T = case.hyper["alpha"], case.hyper["T"]
    wsld = WSLD(alpha, T)
    loss = wsld(out_s, out_t, target)
    agree(loss, case["loss"])
    agree(loss, case["alt_cls_kd/loss"])
    agree_grads(loss, {"out_s": out_s}, {"out_s": case["grad/out_s"]})
    soft = -((out_t / T).softmax(1) * (out_s / T).log_softmax(1)).sum(1)
    rows = [wsld(s[None], t[None], y[None]) for s, t, y in zip(out_s, out_t, target)]
    agree(torch.stack(rows) / (alpha * T**2 * soft), case["extra/weight"])


def naive(out_s, out_t, target, alpha, T):
    """Weights and cross-entropies sample by sample and class by class."""

    def softmax(z, T):
        return [math.exp(x / T) / sum(math.exp(y / T) for y in z) for x in z]

    total = 0.0
    for z_s, z_t, y in zip(out_s.tolist(), out_t.tolist(), target.tolist()):
        e_s, e_t = (-math.log(softmax(z, 1)[y]) for z in (z_s, z_t))
        weight = 1 - math.exp(-e_s / (e_t + 1e-7))
        soft = zip(softmax(z_s, T), softmax(z_t, T))
        total -= alpha * T**2 * weight * sum(t * math.log(s) for s, t in soft)
    return total / len(out_s)


@pytest.mark.parametrize("alpha, T", [(2.25, 4.0), (2.5, 2.0), (1.0, 0.5)])
@pytest.mark.parametrize("b, k", [(1, 2), (4, 5), (3, 10)])
def test_naive(b, k, alpha, T):
    out_s, out_t = torch.randn(b, k).double(), 3 * torch.randn(b, k).double()
    target = torch.randint(k, (b,))
    expected = naive(out_s, out_t, target, alpha, T)
    assert WSLD(alpha, T)(out_s, out_t, target).item() == pytest.approx(expected, rel=1e-11)


def test_gradient():
    """The weight is a constant, so that finite differences do not match."""
    out_s, out_t = torch.randn(3, 4).double().requires_grad_(), torch.randn(3, 4).double()
    target, alpha, T = torch.tensor([0, 3, 3]), 2.0, 3.0
    (grad,) = torch.autograd.grad(WSLD(alpha, T)(out_s, out_t, target), out_s)
    e_s, e_t = (-x.log_softmax(1)[range(3), target] for x in (out_s.detach(), out_t))
    weight = 1 - (-e_s / (e_t + 1e-7)).exp()
    diff = (out_s.detach() / T).softmax(1) - (out_t / T).softmax(1)
    agree(grad, alpha * T / 3 * weight[:, None] * diff)


def test_gradcheck():
    # where the teacher has no error all weights are 1
    target = torch.tensor([0, 3, 3])
    out_s, out_t = torch.randn(3, 4).double(), 800 * torch.eye(4).double()[target]
    wsld = WSLD(T=200.0)
    assert torch.autograd.gradcheck(lambda x: wsld(x, out_t, target), out_s.requires_grad_())


def test_teacher_is_constant():
    out_s, out_t = (torch.randn(3, 4).requires_grad_() for _ in range(2))
    WSLD()(out_s, out_t, torch.tensor([0, 3, 3])).backward()
    assert out_s.grad is not None and out_t.grad is None


@pytest.mark.parametrize("value", [0.0, 1e-20, 1e4])
def test_equal_logits(value):
    out = torch.full((5, 4), value).requires_grad_()
    loss = WSLD(2.0, 3.0)(out, out, torch.zeros(5, dtype=torch.int64))
    assert loss.item() == pytest.approx(18 * (1 - math.exp(-1)) * math.log(4), rel=1e-5)
    assert torch.autograd.grad(loss, out)[0].abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("gap", [200.0, 2000.0])
def test_saturated_logits(gap, dtype):
    peak = torch.eye(4)
    out_s = (gap * peak[[0, 1, 2, 3]]).to(dtype).requires_grad_()
    out_t = (gap * peak[[0, 0, 3, 3]]).to(dtype)
    loss = WSLD(alpha=1.0, T=1.0)(out_s, out_t, torch.tensor([0, 0, 0, 0]))
    # neither has an error; the teacher has none; both have the same, with other peaks; and with
    # the same one
    expected = [0, gap, (1 - math.exp(-1)) * gap, 0]
    assert loss.item() == pytest.approx(sum(expected) / 4, rel=1e-6)
    (grad,) = torch.autograd.grad(loss, out_s)
    assert grad.isfinite().all() and grad.abs().max() < 1


def test_bad_input():
    out, target = torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"\bT\b"):
        WSLD(T=0.0)
    with pytest.raises(ValueError, match="shape"):  # not a silent broadcast
        WSLD()(out, out[:1], target)
    with pytest.raises(ValueError, match="shape"):
        WSLD()(out, out, target[:, None])
