import math

import pytest
import torch

from kd_losses.lskd import LSKD, standardise
from kd_losses.rld import RLD
from reference import agree, agree_grads, cases


@pytest.mark.parametrize("case", cases("rld"))
def test_reference(case):
    out_s, out_t, target = case.leaf("in/out_s"), case["in/out_t"], case["in/target"]
    alpha, beta, T, alpha_T = (case.hyper[k] for k in ("alpha", "beta", "T", "alpha_T"))
    assert not case.hyper["logit_stand"]
    loss = RLD(alpha, beta, T, alpha_T)(out_s, out_t, target)
    agree(loss, case["loss"])
    agree_grads(loss, {"out_s": out_s}, {"out_s": case["grad/out_s"]})
    agree(RLD(1.0, 0.0, T, alpha_T)(out_s, out_t, target), case["extra/scd"])
    mcd = RLD(0.0, 1.0, T, alpha_T)(out_s, out_t, target)
    agree(mcd, case["extra/mcd"])
    # a class that is masked has no gradient, nor has one that is left alone
    left = ~case["extra/masked"]
    left &= left.sum(1, keepdim=True) > 1
    assert torch.equal(torch.autograd.grad(mcd, out_s)[0].abs() > 1e-12, left)


def naive(out_s, out_t, target, alpha, beta, T, alpha_T):
    """The two divergences sample by sample and class by class."""

    def softmax(z, T):
        return [math.exp(x / T) / sum(math.exp(y / T) for y in z) for x in z]

    total = 0.0
    for z_s, z_t, y in zip(out_s.tolist(), out_t.tolist(), target.tolist()):
        s, t = softmax(z_s, alpha_T)[y], max(softmax(z_t, alpha_T))
        scd = t * math.log(t / s) + (1 - t) * math.log((1 - t) / (1 - s))
        left = [k for k in range(len(z_t)) if z_t[k] < z_t[y]]
        q_s, q_t = (softmax([z[k] for k in left], T) for z in (z_s, z_t))
        mcd = sum(t * math.log(t / s) for s, t in zip(q_s, q_t))
        total += alpha * alpha_T**2 * scd + beta * T**2 * mcd
    return total / len(out_s)


@pytest.mark.parametrize(
    "alpha, beta, T, alpha_T", [(1.0, 8.0, 4.0, 1.0), (0.0, 1.0, 1.0, 1.0), (2.0, 0.5, 0.5, 2.0)]
)
@pytest.mark.parametrize("b, k", [(1, 3), (8, 5), (3, 10)])
def test_naive(b, k, alpha, beta, T, alpha_T):
    out_s, out_t = torch.randn(b, k).double(), torch.randn(b, k).double()
    out_t[0, 1] = out_t[0, 0]  # a tie
    target = torch.randint(k, (b,))
    target[0] = 0
    rld = RLD(alpha, beta, T, alpha_T)
    expected = naive(out_s, out_t, target, alpha, beta, T, alpha_T)
    assert rld(out_s, out_t, target).item() == pytest.approx(expected, rel=1e-11)
    z_s, z_t = standardise(out_s), standardise(out_t)
    expected = naive(z_s, z_t, target, alpha, beta, T, alpha_T)
    assert LSKD(inner=rld)(out_s, out_t, target).item() == pytest.approx(expected, rel=1e-11)


def test_gradcheck():
    out_s, out_t = torch.randn(4, 5).double(), torch.randn(4, 5).double()
    target = torch.stack([out_t.argmax(1), out_t.argmin(1)])[[0, 1, 0, 0], torch.arange(4)]
    rld = RLD(1.0, 2.0, 2.0, 3.0)
    assert torch.autograd.gradcheck(lambda x: rld(x, out_t, target), out_s.requires_grad_())


def test_teacher_is_constant():
    out_s, out_t = (torch.randn(3, 4).requires_grad_() for _ in range(2))
    RLD()(out_s, out_t, torch.tensor([0, 3, 3])).backward()
    assert out_s.grad is not None and out_t.grad is None


def test_two_classes_have_no_rest():
    out_s, out_t = torch.randn(5, 2).requires_grad_(), torch.randn(5, 2)
    loss = RLD(alpha=0.0)(out_s, out_t, torch.tensor([0, 1, 1, 0, 1]))
    assert loss.item() == 0
    assert torch.autograd.grad(loss, out_s)[0].count_nonzero() == 0


@pytest.mark.parametrize("value", [0.0, 1e-20, 1e4])
def test_equal_logits(value):
    out = torch.full((5, 4), value).requires_grad_()  # all classes tie, all are masked
    loss = RLD()(out, out, torch.zeros(5, dtype=torch.int64))
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert torch.autograd.grad(loss, out)[0].abs().max() < 1e-6


def test_last_choice_of_the_teacher():
    out_s = torch.randn(2, 4).requires_grad_()
    out_t = torch.tensor([[3.0, 1.0, 2.0, 0.0], [3.0, 0.0, 2.0, 0.0]])
    with torch.autograd.set_detect_anomaly(True):  # not even in between
        loss = RLD(alpha=0.0)(out_s, out_t, torch.tensor([3, 1]))
        (grad,) = torch.autograd.grad(loss, out_s)
    assert loss.item() == 0 and grad.count_nonzero() == 0


def test_common_offset():
    out_s, out_t = ((64 * torch.randn(8, 5)).round() / 64 for _ in range(2))  # exact in float32
    target = out_t.argsort()[:, 2]
    for rld in (RLD(alpha=0.0), RLD(beta=0.0)):
        loss = rld(out_s + 8192, out_t - 8192, target)
        assert loss.item() == pytest.approx(rld(out_s, out_t, target).item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("gap", [90.0, 200.0, 2000.0])
def test_saturated_logits(gap, dtype):
    peak = torch.eye(4)
    out_s = (gap * peak[[0, 1, 2, 3]]).to(dtype).requires_grad_()
    out_t = (gap * peak[[0, 0, 3, 1]]).to(dtype)
    loss = RLD(alpha=1.0, beta=8.0, T=1.0)(out_s, out_t, torch.tensor([0, 0, 0, 1]))
    (grad,) = torch.autograd.grad(loss, out_s)
    # per sample, but for exp(-gap): the networks agree; the teacher alone has its peak on the
    # target, its rest is uniform; neither has, and all is masked; as the second
    scd = [0, gap, gap, gap]
    mcd = [0, gap * 2 / 3 - math.log(3), 0, gap * 2 / 3 - math.log(3)]
    assert loss.item() == pytest.approx((sum(scd) + 8 * sum(mcd)) / 4, rel=1e-6)
    assert grad.isfinite().all() and grad.abs().max() < 10


def test_bad_input():
    out, target = torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64)
    for bad in (dict(T=0.0), dict(alpha_T=0.0)):
        with pytest.raises(ValueError, match=rf"\b{[*bad][0]}\b"):
            RLD(**bad)
    with pytest.raises(ValueError, match="shape"):  # not a silent broadcast
        RLD()(out, out[:1], target)
    with pytest.raises(ValueError, match="shape"):
        RLD()(out, out, target[:, None])
    with pytest.raises(ValueError, match="classes"):
        RLD()(out[:, :1], out[:, :1], target)
