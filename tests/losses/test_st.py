import math

import pytest
import torch

from kd_losses.st import SoftTarget
from reference import agree, agree_grads, cases


@pytest.mark.parametrize("case", cases("st"))
def test_reference(case):
    out_s = case.leaf("in/out_s")
    loss = SoftTarget(**case.hyper)(out_s, case["in/out_t"])
    agree(loss, case["loss"])
    agree_grads(loss, {"out_s": out_s}, {"out_s": case["grad/out_s"]})


def naive(out_s, out_t, T):
    """T^2 times the divergence of the softened predictions, class by class."""
    total = 0.0
    for s, t in zip(out_s.tolist(), out_t.tolist()):
        p_s, p_t = ([math.exp(z / T) for z in row] for row in (s, t))
        p_s, p_t = ([p / sum(row) for p in row] for row in (p_s, p_t))
        total += sum(b * math.log(b / a) for a, b in zip(p_s, p_t))
    return T**2 * total / len(out_s)


@pytest.mark.parametrize("T", [1.0, 4.0, 20.0])
def test_naive(T):
    out_s, out_t = 5 * torch.randn(3, 7).double(), 5 * torch.randn(3, 7).double()
    assert SoftTarget(T)(out_s, out_t).item() == pytest.approx(naive(out_s, out_t, T), rel=1e-10)


def test_gradcheck():
    out_s, out_t = torch.randn(3, 5).double(), torch.randn(3, 5).double()
    assert torch.autograd.gradcheck(lambda x: SoftTarget()(x, out_t), out_s.requires_grad_())


def test_logits_far_apart():
    out_s = torch.tensor([[400.0, 0.0], [0.0, 0.0]], requires_grad=True)
    loss = SoftTarget(T=1.0)(out_s, torch.tensor([[0.0, 400.0], [0.0, 0.0]]))
    assert loss.item() == pytest.approx(200.0)
    assert torch.autograd.grad(loss, out_s)[0].isfinite().all()


def test_bad_input():
    with pytest.raises(ValueError, match=r"\bT\b"):
        SoftTarget(T=0.0)
