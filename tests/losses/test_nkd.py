import math

import pytest
import torch

from kd_losses.nkd import NKD
from reference import agree, agree_grads, cases


@pytest.mark.parametrize("case", cases("nkd"))
def test_reference(case):
    out_s, out_t, target = case.leaf("in/out_s"), case["in/out_t"], case["in/target"]
    gamma, T = case.hyper["gamma"], case.hyper["temp"]
    loss = NKD(gamma, T)(out_s, out_t, target)
    agree(loss, case["loss"])
    agree_grads(loss, {"out_s": out_s}, {"out_s": case["grad/out_s"]})
    own = NKD(0.0, T)(out_s, out_t, target)
    agree(own, case["extra/target_part"])
    agree(loss - own, case["extra/nontarget_part"])


def naive(out_s, out_t, target, gamma, T):
    """The two cross-entropies sample by sample and class by class."""
    total = 0.0
    for z_s, z_t, y in zip(out_s.tolist(), out_t.tolist(), target.tolist()):
        others = [k for k in range(len(z_s)) if k != y]
        p_s, p_t = (math.exp(z[y]) / sum(math.exp(x) for x in z) for z in (z_s, z_t))
        total -= p_t * math.log(p_s)
        q_s, q_t = (
            [math.exp(z[k] / T) / sum(math.exp(z[j] / T) for j in others) for k in others]
            for z in (z_s, z_t)
        )
        total -= gamma * T**2 * sum(t * math.log(s) for s, t in zip(q_s, q_t))
    return total / len(out_s)


@pytest.mark.parametrize("gamma, T", [(1.5, 1.0), (3.5, 3.0), (0.0, 2.0)])
@pytest.mark.parametrize("b, k", [(1, 3), (4, 5), (3, 10)])
def test_naive(b, k, gamma, T):
    out_s, out_t = torch.randn(b, k).double(), torch.randn(b, k).double()
    target = torch.randint(k, (b,))
    expected = naive(out_s, out_t, target, gamma, T)
    assert NKD(gamma, T)(out_s, out_t, target).item() == pytest.approx(expected, rel=1e-11)


def test_gradcheck():
    out_s, out_t = torch.randn(3, 4).double(), torch.randn(3, 4).double()
    target = torch.tensor([0, 3, 3])
    assert torch.autograd.gradcheck(lambda x: NKD(T=2.0)(x, out_t, target), out_s.requires_grad_())


def test_teacher_is_constant():
    out_s, out_t = (torch.randn(3, 4).requires_grad_() for _ in range(2))
    NKD()(out_s, out_t, torch.tensor([0, 3, 3])).backward()
    assert out_s.grad is not None and out_t.grad is None


def test_two_classes_have_no_rest():
    out_s, out_t = torch.randn(5, 2).requires_grad_(), torch.randn(5, 2)
    target = torch.tensor([0, 1, 1, 0, 1])
    rest = NKD(2.0)(out_s, out_t, target) - NKD(0.0)(out_s, out_t, target)
    assert rest.item() == 0
    assert torch.autograd.grad(rest, out_s)[0].count_nonzero() == 0


@pytest.mark.parametrize("value", [0.0, 1e-20, 1e4])
def test_equal_logits(value):
    out = torch.full((5, 4), value).requires_grad_()
    loss = NKD(gamma=1.5, T=2.0)(out, out, torch.zeros(5, dtype=torch.int64))
    assert loss.item() == pytest.approx(math.log(4) / 4 + 1.5 * 4 * math.log(3), rel=1e-6)
    (grad,) = torch.autograd.grad(loss, out)
    # of the target part alone
    expected = (torch.full((4,), 0.25) - torch.eye(4)[0]) / 4 / 5
    torch.testing.assert_close(grad, expected.expand(5, 4), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("gap", [90.0, 200.0, 2000.0])
def test_saturated_logits(gap, dtype):
    peak = torch.eye(4)
    out_s = (gap * peak[[0, 1, 2, 3]]).to(dtype).requires_grad_()
    out_t = (gap * peak[[0, 0, 3, 1]]).to(dtype)
    loss = NKD(gamma=1.5, T=1.0)(out_s, out_t, torch.tensor([0, 0, 0, 1]))
    (grad,) = torch.autograd.grad(loss, out_s)
    # per sample, but for exp(-gap): both have their peak on the target; the teacher alone has, its
    # rest is uniform; neither has, their rests differ; as the second
    own = [0, gap, 0, gap]
    others = [math.log(3), gap * 2 / 3, gap, gap * 2 / 3]
    assert loss.item() == pytest.approx((sum(own) + 1.5 * sum(others)) / 4, rel=1e-6)
    assert grad.isfinite().all() and grad.abs().max() < 2


def test_bad_input():
    out, target = torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"\bT\b"):
        NKD(T=0.0)
    with pytest.raises(ValueError, match="shape"):  # not a silent broadcast
        NKD()(out, out[:1], target)
    with pytest.raises(ValueError, match="shape"):
        NKD()(out, out, target[:, None])
    with pytest.raises(ValueError, match="classes"):
        NKD()(out[:, :1], out[:, :1], target)
