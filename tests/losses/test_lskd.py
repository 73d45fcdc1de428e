import math

import pytest
import torch
from torch import nn

from kd_losses.dkd import DKD
from kd_losses.lskd import LSKD, standardise
from reference import agree, agree_grads, cases


@pytest.mark.parametrize("case", cases("lskd"))
def test_reference(case):
    out_s, out_t = case.leaf("in/out_s"), case["in/out_t"]
    agree(standardise(out_s), case["extra/z_s"])
    agree(standardise(out_t), case["extra/z_t"])
    hyper = dict(case.hyper)
    if hyper.pop("base") == "kd":
        loss = LSKD(**hyper)(out_s, out_t)
        agree(loss, case["extra/ctkd_variant"])
    else:
        target, T = case["in/target"], hyper["T"]
        loss = LSKD(inner=DKD(**hyper))(out_s, out_t, target)
        agree(LSKD(inner=DKD(1.0, 0.0, T))(out_s, out_t, target), case["extra/tckd"])
        agree(LSKD(inner=DKD(0.0, 1.0, T))(out_s, out_t, target), case["extra/nckd"])
    agree(loss, case["loss"])
    agree_grads(loss, {"out_s": out_s}, {"out_s": case["grad/out_s"]})


def naive(out_s, out_t, T):
    """T^2 times the divergence of the standardised logits, class by class."""
    total = 0.0
    for rows in zip(out_s.tolist(), out_t.tolist()):
        p = []
        for row in rows:
            mean = sum(row) / len(row)
            std = math.sqrt(sum((x - mean) ** 2 for x in row) / (len(row) - 1))
            power = [math.exp((x - mean) / (std + 1e-7) / T) for x in row]
            p.append([x / sum(power) for x in power])
        total += T**2 * sum(t * math.log(t / s) for s, t in zip(*p))
    return total / len(out_s)


@pytest.mark.parametrize("T", [0.5, 2.0, 4.0])
@pytest.mark.parametrize("b, k", [(1, 3), (4, 5), (3, 10)])
def test_naive(b, k, T):
    out_s, out_t = 5 * torch.randn(b, k).double() + 3, torch.randn(b, k).double()
    assert LSKD(T)(out_s, out_t).item() == pytest.approx(naive(out_s, out_t, T), rel=1e-10)


def test_gradcheck():
    out_s, out_t = torch.randn(3, 4).double(), torch.randn(3, 4).double()
    assert torch.autograd.gradcheck(lambda x: LSKD()(x, out_t), out_s.requires_grad_())


def test_teacher_is_constant():
    class Inner(nn.Module):
        def forward(self, z_s, z_t):
            return (z_s * z_t).sum()

    for lskd in (LSKD(), LSKD(inner=Inner())):
        out_s, out_t = (torch.randn(3, 4).requires_grad_() for _ in range(2))
        lskd(out_s, out_t).backward()
        assert out_s.grad is not None and out_t.grad is None


def test_mean_and_scale_are_gone():
    out_s, out_t = torch.randn(4, 6).double(), torch.randn(4, 6).double()
    loss = LSKD()(out_s, out_t)
    again = LSKD()(100 * out_s + torch.arange(4)[:, None], 0.1 * out_t - 5)
    assert again.item() == pytest.approx(loss.item(), rel=1e-5)  # but for the 1e-7
    assert LSKD()(3 * out_t + 1, out_t).item() == pytest.approx(0, abs=1e-12)


def test_two_classes_keep_only_their_order():
    z = standardise(torch.tensor([[7.0, 1.0], [-0.5, 0.5]]).double())
    a = math.sqrt(0.5)
    torch.testing.assert_close(z, torch.tensor([[a, -a], [-a, a]]).double(), rtol=0, atol=1e-6)
    out_s = torch.tensor([[7.0, 1.0], [3.0, 2.0]], requires_grad=True)
    loss = LSKD(T=2.0)(out_s, torch.tensor([[2.0, 0.0], [0.0, 9.0]]))  # as the teacher; opposed
    p = 1 / (1 + math.exp(-a))
    assert loss.item() == pytest.approx(4 * (2 * p - 1) * a / 2, rel=1e-5)
    assert torch.autograd.grad(loss, out_s)[0].abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.0, 3.3, -1e4 / 3])
def test_constant_rows(value, dtype):
    constant = torch.full((3, 7), value).to(dtype)
    assert standardise(constant).count_nonzero() == 0  # nor does the mean round
    constant = constant[:, :4]
    out_s, out_t = constant.clone().requires_grad_(), torch.tensor([[3.0, 0, 0, 0]] * 3).to(dtype)
    loss = LSKD(T=2.0)(out_s, out_t)
    power = [math.exp(z / 2) for z in (1.5, -0.5, -0.5, -0.5)]  # the teacher's std is 1.5
    p = [x / sum(power) for x in power]
    assert loss.item() == pytest.approx(4 * sum(x * math.log(4 * x) for x in p), rel=1e-5)
    (grad,) = torch.autograd.grad(loss, out_s)
    assert grad.isfinite().all() and 0 < grad.abs().max() < 1000
    loss = LSKD()(out_t.requires_grad_(), constant)  # and a teacher that knows nothing
    assert torch.autograd.grad(loss, out_t)[0].abs().max() < 1


@pytest.mark.parametrize("scale", [1e4, 1e-3, 1e-12, 1e-20])
def test_extreme_scales(scale):
    out_s = (torch.randn(4, 6) * scale).requires_grad_()
    loss = LSKD()(out_s, torch.randn(4, 6))
    (grad,) = torch.autograd.grad(loss, out_s)
    assert loss.isfinite() and grad.isfinite().all() and grad.abs().max() < 1000


def test_bad_input():
    out = torch.randn(3, 4)
    with pytest.raises(ValueError, match=r"\bT\b"):
        LSKD(T=0.0)
    with pytest.raises(ValueError, match="shape"):
        LSKD()(out, out[:1])
    with pytest.raises(ValueError, match="classes"):  # the deviation of one number is NaN
        LSKD()(out[:, :1], out[:, :1])
    with pytest.raises(ValueError, match="classes"):
        standardise(out[0])
    with pytest.raises(ValueError, match="logits"):
        LSKD()(out, out, torch.zeros(3, dtype=torch.int64))
