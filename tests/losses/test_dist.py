import math

import pytest
import torch

from kd_losses.dist import DIST
from reference import agree, agree_grads, cases


@pytest.mark.parametrize("case", cases("dist"))
def test_reference(case):
    out_s, out_t, hyper = case.leaf("in/out_s"), case["in/out_t"], case.hyper
    beta, gamma, T = hyper["beta"], hyper["gamma"], hyper["tau"]
    loss = DIST(beta, gamma, T)(out_s, out_t)
    agree(loss, case["loss"])
    agree_grads(loss, {"out_s": out_s}, {"out_s": case["grad/out_s"]})
    agree(DIST(1.0, 0.0, T)(out_s, out_t), T**2 * case["extra/inter"])
    agree(DIST(0.0, 1.0, T)(out_s, out_t), T**2 * case["extra/intra"])
    agree(DIST(T=1.0)(out_s, out_t), case["alt_segmentation/loss"])  # knows no temperature
    rows = [DIST(1.0, 0.0, T)(s[None], t[None]) for s, t in zip(out_s, out_t)]
    agree(1 - torch.stack(rows) / T**2, case["extra/pearson_rows"])


def naive(out_s, out_t, beta, gamma, T):
    """Pearson's coefficients row by row and column by column."""

    def softmax(row):
        power = [math.exp(z / T) for z in row]
        return [x / sum(power) for x in power]

    def rho(a, b):
        a, b = ([x - sum(v) / len(v) for x in v] for v in (a, b))
        norm_a, norm_b = (math.sqrt(sum(x * x for x in v)) for v in (a, b))
        return sum(x * y for x, y in zip(a, b)) / (norm_a * norm_b + 1e-8)

    p_s, p_t = ([softmax(row) for row in out.tolist()] for out in (out_s, out_t))
    rows = [rho(a, b) for a, b in zip(p_s, p_t)]
    columns = [rho(a, b) for a, b in zip(zip(*p_s), zip(*p_t))]
    inter, intra = (1 - sum(x) / len(x) for x in (rows, columns))
    return T**2 * (beta * inter + gamma * intra)


@pytest.mark.parametrize("beta, gamma, T", [(1.0, 1.0, 4.0), (2.0, 0.5, 1.0), (0.0, 3.0, 0.7)])
@pytest.mark.parametrize("b, k", [(2, 3), (4, 5), (9, 4)])
def test_naive(b, k, beta, gamma, T):
    out_s, out_t = 5 * torch.randn(b, k).double(), torch.randn(b, k).double()
    for out_s in (out_s, 1e-3 * out_s):  # which is not constant yet
        expected = naive(out_s, out_t, beta, gamma, T)
        assert DIST(beta, gamma, T)(out_s, out_t).item() == pytest.approx(expected, rel=1e-10)


def test_gradcheck():
    out_s, out_t = torch.randn(5, 4).double(), torch.randn(5, 4).double()
    assert torch.autograd.gradcheck(lambda x: DIST(1.0, 2.0)(x, out_t), out_s.requires_grad_())


def test_teacher_is_constant():
    out_s, out_t = (torch.randn(3, 4).requires_grad_() for _ in range(2))
    DIST()(out_s, out_t).backward()
    assert out_s.grad is not None and out_t.grad is None


def test_equal_logits():
    out = torch.randn(5, 4).requires_grad_()
    loss = DIST(T=1.0)(out, out)
    assert loss.item() == pytest.approx(0, abs=1e-4)
    assert torch.autograd.grad(loss, out)[0].abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("gap", [200.0, 10000.0])
def test_saturated_logits(gap, dtype):
    peak = gap * torch.eye(4)
    out_s, out_t = peak.to(dtype).requires_grad_(), peak[[0, 1, 3, 2]].to(dtype)
    loss = DIST(1.0, 1.0, T=1.0)(out_s, out_t)
    # in rows and in columns: twice the same peak, rho 1, twice another, rho -1 / 3
    assert loss.item() == pytest.approx(2 * (1 - 1 / 3), rel=1e-6)
    assert torch.autograd.grad(loss, out_s)[0].abs().max() < 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.0, 3.3])
def test_constant_student(value, dtype):
    out_s = torch.full((6, 5), value).to(dtype).requires_grad_()
    for out_t in (torch.randn(6, 5).to(dtype), torch.zeros(6, 5).to(dtype)):
        loss = DIST(2.0, 3.0, T=1.0)(out_s, out_t)
        assert loss.item() == pytest.approx(5, abs=1e-2)  # nothing correlates
        (grad,) = torch.autograd.grad(loss, out_s)
        assert grad.isfinite().all() and grad.abs().max() < 1e4
        if out_t.any():
            assert grad.abs().max() > 1  # it learns from there
        loss = DIST(2.0, 3.0, T=1.0)(out_t.requires_grad_(), out_s)
        assert torch.autograd.grad(loss, out_t)[0].abs().max() < 1e-2


@pytest.mark.parametrize("scale", [1e4, 1e-3, 1e-12, 1e-20])
def test_extreme_scales(scale):
    out_s = (torch.randn(6, 5) * scale).requires_grad_()
    loss = DIST(T=1.0)(out_s, torch.randn(6, 5))
    (grad,) = torch.autograd.grad(loss, out_s)
    assert loss.isfinite() and grad.isfinite().all() and grad.abs().max() < 1e4


def test_two_classes_keep_only_their_order():
    out_s = torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 0.0]], requires_grad=True)
    out_t = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 1.0]])  # alike, alike, opposed
    loss = DIST(1.0, 0.0, T=1.0)(out_s, out_t)
    assert loss.item() == pytest.approx(2 / 3, rel=1e-5)
    assert torch.autograd.grad(loss, out_s)[0].abs().max() < 1e-5


def test_one_sample():
    out_s, out_t = torch.randn(1, 4).double(), torch.randn(1, 4).double()
    with pytest.raises(ValueError, match="samples"):
        DIST()(out_s, out_t)
    assert DIST(gamma=0.0)(out_s, out_t).isfinite()


def test_bad_input():
    out = torch.randn(3, 4)
    with pytest.raises(ValueError, match=r"\bT\b"):
        DIST(T=0.0)
    with pytest.raises(ValueError, match="shape"):
        DIST()(out, out[:1])
    with pytest.raises(ValueError, match="shape"):
        DIST()(out[None], out[None])
    with pytest.raises(ValueError, match="classes"):
        DIST()(out[:, :1], out[:, :1])
