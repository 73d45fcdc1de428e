import math

import pytest
import torch

from kd_losses.st import SoftTarget
from kd_losses.ttm import TTM
from reference import agree, agree_grads, cases


@pytest.mark.parametrize("case", cases("ttm"))
def test_reference(case):
    out_s, out_t = case.leaf("in/out_s"), case["in/out_t"]
    loss = TTM(case.hyper["l"])(out_s, out_t)
    agree(loss, case["loss"])
    agree_grads(loss, {"out_s": out_s}, {"out_s": case["grad/out_s"]})
    # the gradient is (softmax(out_s) - q) / B
    (grad,) = torch.autograd.grad(TTM(case.hyper["l"])(out_s, out_t), out_s)
    agree(out_s.softmax(1) - len(out_s) * grad, case["extra/q_t"])


def naive(out_s, out_t, gamma):
    """The divergence from powers of the teacher's probabilities, class by class."""
    total = 0.0
    for s, t in zip(out_s.tolist(), out_t.tolist()):
        p_s, p_t = ([math.exp(z) / sum(math.exp(x) for x in row) for z in row] for row in (s, t))
        q = [p**gamma / sum(x**gamma for x in p_t) for p in p_t]
        total += sum(b * math.log(b / a) for a, b in zip(p_s, q))
    return total / len(out_s)


@pytest.mark.parametrize("gamma", [0.1, 0.2, 1.0, 3.0])
@pytest.mark.parametrize("b, k", [(1, 2), (3, 7)])
def test_naive(b, k, gamma):
    out_s, out_t = 5 * torch.randn(b, k).double(), 5 * torch.randn(b, k).double()
    assert TTM(gamma)(out_s, out_t).item() == pytest.approx(naive(out_s, out_t, gamma), rel=1e-10)


def test_power_one_is_plain_divergence():
    out_s, out_t = torch.randn(4, 6).double(), torch.randn(4, 6).double()
    agree(TTM(1.0)(out_s, out_t), SoftTarget(1.0)(out_s, out_t))


def test_gradcheck():
    out_s, out_t = torch.randn(3, 5).double(), torch.randn(3, 5).double()
    assert torch.autograd.gradcheck(lambda x: TTM()(x, out_t), out_s.requires_grad_())


def test_teacher_is_constant():
    out_s, out_t = (torch.randn(3, 4).requires_grad_() for _ in range(2))
    TTM()(out_s, out_t).backward()
    assert out_s.grad is not None and out_t.grad is None


@pytest.mark.parametrize("value", [0.0, 1e-20, 1e4])
def test_uniform_teacher(value):
    out_s = torch.tensor([[3.0, 0.0, 0.0]], requires_grad=True)
    loss = TTM(0.1)(out_s, torch.full((1, 3), value))
    expected = math.log(math.exp(3) + 2) - 1 - math.log(3)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert TTM(0.1)(torch.full((1, 3), value), torch.zeros(1, 3)).item() == pytest.approx(
        0, abs=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_power_does_not_underflow(dtype):
    # the second probability, exp(-110), is 0 in float32; its power is not
    out_s = torch.tensor([[2000.0, 0.0]]).to(dtype).requires_grad_()
    loss = TTM(0.1)(out_s, torch.tensor([[110.0, 0.0]]).to(dtype))
    q = 1 / (1 + math.exp(11))
    expected = q * (math.log(q) + 2000) + (1 - q) * math.log1p(-q)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert torch.autograd.grad(loss, out_s)[0][0, 1].item() == pytest.approx(-q, rel=1e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("gap", [90.0, 200.0, 2000.0])
def test_saturated_logits(gap, dtype):
    out_s = (gap * torch.eye(3)).to(dtype).requires_grad_()
    loss = TTM(1.0)(out_s, (gap * torch.eye(3)[[0, 2, 1]]).to(dtype))
    assert loss.item() == pytest.approx(gap * 2 / 3, rel=1e-6)
    assert torch.autograd.grad(loss, out_s)[0].abs().max() < 1


def test_bad_input():
    out = torch.zeros(3, 4)
    with pytest.raises(ValueError, match="gamma"):
        TTM(gamma=0.0)
    with pytest.raises(ValueError, match="shape"):  # not a silent broadcast
        TTM()(out, out[:1])
    with pytest.raises(ValueError, match="shape"):
        TTM()(out[0], out[0])
