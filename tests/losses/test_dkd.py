import math

import pytest
import torch

from kd_losses.dkd import DKD
from reference import agree, agree_grads, cases


@pytest.mark.parametrize("case", cases("dkd"))
def test_reference(case):
    out_s, out_t, target = case.leaf("in/logits_s"), case["in/logits_t"], case["in/target"]
    loss = DKD(**case.hyper)(out_s, out_t, target)
    agree(loss, case["loss"])
    agree_grads(loss, {"logits_s": out_s}, {"logits_s": case["grad/logits_s"]})
    T = case.hyper["T"]
    agree(DKD(1.0, 0.0, T)(out_s, out_t, target), case["extra/tckd"])
    agree(DKD(0.0, 1.0, T)(out_s, out_t, target), case["extra/nckd"])


def naive(out_s, out_t, target, alpha, beta, T):
    """The two divergences sample by sample and class by class."""
    total = 0.0
    for z_s, z_t, y in zip(out_s.tolist(), out_t.tolist(), target.tolist()):
        others = [k for k in range(len(z_s)) if k != y]
        binary, rest = [], []
        for z in (z_s, z_t):
            power = [math.exp(value / T) for value in z]
            binary.append([power[y] / sum(power), sum(power[k] for k in others) / sum(power)])
            rest.append([power[k] / sum(power[j] for j in others) for k in others])
        tckd = sum(t * math.log(t / s) for s, t in zip(*binary))
        nckd = sum(t * math.log(t / s) for s, t in zip(*rest))
        total += T**2 * (alpha * tckd + beta * nckd)
    return total / len(out_s)


@pytest.mark.parametrize("alpha, beta, T", [(1.0, 8.0, 4.0), (0.0, 1.0, 1.0), (2.0, 0.0, 0.5)])
@pytest.mark.parametrize("b, k", [(1, 3), (4, 5), (3, 10)])
def test_naive(b, k, alpha, beta, T):
    out_s, out_t = torch.randn(b, k).double(), torch.randn(b, k).double()
    target = torch.randint(k, (b,))
    expected = naive(out_s, out_t, target, alpha, beta, T)
    value = DKD(alpha, beta, T)(out_s, out_t, target).item()
    assert value == pytest.approx(expected, rel=1e-11)


def test_gradcheck():
    out_s, out_t = torch.randn(3, 4).double(), torch.randn(3, 4).double()
    target = torch.tensor([0, 3, 3])
    assert torch.autograd.gradcheck(lambda x: DKD(T=2.0)(x, out_t, target), out_s.requires_grad_())


def test_teacher_is_constant():
    out_s, out_t = (torch.randn(3, 4).requires_grad_() for _ in range(2))
    DKD()(out_s, out_t, torch.tensor([0, 3, 3])).backward()
    assert out_s.grad is not None and out_t.grad is None


def test_two_classes_have_no_rest():
    out_s, out_t = torch.randn(5, 2).requires_grad_(), torch.randn(5, 2)
    loss = DKD(alpha=0.0)(out_s, out_t, torch.tensor([0, 1, 1, 0, 1]))
    assert loss.item() == 0
    assert torch.autograd.grad(loss, out_s)[0].count_nonzero() == 0


def test_equal_logits():
    out = torch.randn(5, 4).requires_grad_()
    loss = DKD()(out, out, torch.zeros(5, dtype=torch.int64))  # all targets equal
    assert loss.item() == 0
    assert torch.autograd.grad(loss, out)[0].abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("gap", [90.0, 200.0, 2000.0])
def test_saturated_logits(gap, dtype):
    peak = torch.eye(4)
    out_s = (gap * peak[[0, 1, 2, 3]]).to(dtype).requires_grad_()
    out_t = (gap * peak[[0, 0, 3, 1]]).to(dtype)
    loss = DKD(alpha=1.0, beta=8.0, T=1.0)(out_s, out_t, torch.tensor([0, 0, 0, 1]))
    (grad,) = torch.autograd.grad(loss, out_s)
    # per sample, but for exp(-gap): the networks agree; the teacher alone has its peak on the
    # target, its rest is uniform; neither has it there, their rests differ; as the second
    tckd = [0, gap, 0, gap]
    nckd = [0, gap * 2 / 3 - math.log(3), gap, gap * 2 / 3 - math.log(3)]
    assert loss.item() == pytest.approx((sum(tckd) + 8 * sum(nckd)) / 4, rel=1e-6)
    assert grad.isfinite().all() and grad.abs().max() < 10


def test_bad_input():
    out, target = torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"\bT\b"):
        DKD(T=0.0)
    with pytest.raises(ValueError, match="shape"):  # not a silent broadcast
        DKD()(out, out[:1], target)
    with pytest.raises(ValueError, match="shape"):
        DKD()(out, out, target[:, None])
    with pytest.raises(ValueError, match="classes"):
        DKD()(out[:, :1], out[:, :1], target)
