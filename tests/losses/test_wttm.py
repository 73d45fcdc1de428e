import math

import pytest
import torch

from kd_losses.ttm import TTM
from kd_losses.wttm import WTTM
from reference import agree, agree_grads, cases


@pytest.mark.parametrize("case", cases("wttm"))
def test_reference(case):
    out_s, out_t, gamma = case.leaf("in/out_s"), case["in/out_t"], case.hyper["l"]
    loss = WTTM(gamma)(out_s, out_t)
    agree(loss, case["loss"])
    agree_grads(loss, {"out_s": out_s}, {"out_s": case["grad/out_s"]})
    # a sample's weight is what it has more than in TTM
    rows = [(s[None], t[None]) for s, t in zip(out_s.detach(), out_t)]
    weights = torch.stack([WTTM(gamma)(s, t) / TTM(gamma)(s, t) for s, t in rows])
    agree(weights, case["extra/power_sum"])
    # the gradient is u (softmax(out_s) - q) / B
    (grad,) = torch.autograd.grad(WTTM(gamma)(out_s, out_t), out_s)
    q = out_s.softmax(1) - len(out_s) * grad / case["extra/power_sum"][:, None]
    agree(q, case["extra/q_t"])


def naive(out_s, out_t, gamma):
    """The weighted divergence from powers of the teacher's probabilities, class by class."""
    total = 0.0
    for s, t in zip(out_s.tolist(), out_t.tolist()):
        p_s, p_t = ([math.exp(z) / sum(math.exp(x) for x in row) for z in row] for row in (s, t))
        u = sum(p**gamma for p in p_t)
        total += u * sum(b**gamma / u * math.log(b**gamma / u / a) for a, b in zip(p_s, p_t))
    return total / len(out_s)


@pytest.mark.parametrize("gamma", [0.1, 0.2, 1.0, 3.0])
@pytest.mark.parametrize("b, k", [(1, 2), (3, 7)])
def test_naive(b, k, gamma):
    out_s, out_t = 5 * torch.randn(b, k).double(), 5 * torch.randn(b, k).double()
    assert WTTM(gamma)(out_s, out_t).item() == pytest.approx(naive(out_s, out_t, gamma), rel=1e-10)


def test_power_one_has_no_weights():
    out_s, out_t = torch.randn(4, 6).double(), torch.randn(4, 6).double()
    agree(WTTM(1.0)(out_s, out_t), TTM(1.0)(out_s, out_t))


def test_gradcheck():
    out_s, out_t = torch.randn(3, 5).double(), torch.randn(3, 5).double()
    assert torch.autograd.gradcheck(lambda x: WTTM()(x, out_t), out_s.requires_grad_())


def test_teacher_is_constant():
    out_s, out_t = (torch.randn(3, 4).requires_grad_() for _ in range(2))
    WTTM()(out_s, out_t).backward()
    assert out_s.grad is not None and out_t.grad is None


@pytest.mark.parametrize("value", [0.0, 1e-20, 1e4])
def test_uniform_teacher(value):
    out_s = torch.tensor([[3.0, 0.0, 0.0]], requires_grad=True)
    loss = WTTM(0.1)(out_s, torch.full((1, 3), value))
    expected = 3**0.9 * (math.log(math.exp(3) + 2) - 1 - math.log(3))  # the largest weight
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss = WTTM(0.1)(torch.full((1, 3), value), torch.zeros(1, 3))
    assert loss.item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_power_does_not_underflow(dtype):
    # the second probability, exp(-110), is 0 in float32; its power is not
    out_s = torch.tensor([[2000.0, 0.0]]).to(dtype).requires_grad_()
    loss = WTTM(0.1)(out_s, torch.tensor([[110.0, 0.0]]).to(dtype))
    power = math.exp(-11)
    expected = power * (-11 + 2000) - (1 + power) * math.log1p(power)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert torch.autograd.grad(loss, out_s)[0][0, 1].item() == pytest.approx(-power, rel=1e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("gap", [400.0, 2000.0])
def test_saturated_logits(gap, dtype):
    out_s = (gap * torch.eye(3)).to(dtype).requires_grad_()
    loss = WTTM(0.1)(out_s, (gap * torch.eye(3)[[0, 2, 1]]).to(dtype))
    assert loss.item() == pytest.approx(gap * 2 / 3, rel=1e-6)  # the least weight, 1
    assert torch.autograd.grad(loss, out_s)[0].abs().max() < 1


def test_bad_input():
    out = torch.zeros(3, 4)
    with pytest.raises(ValueError, match="gamma"):
        WTTM(gamma=0.0)
    with pytest.raises(ValueError, match="shape"):  # not a silent broadcast
        WTTM()(out, out[:1])
    with pytest.raises(ValueError, match="shape"):
        WTTM()(out[0], out[0])
