import pytest
import torch

from kd_losses.logits import Logits
from reference import agree, agree_grads, cases


@pytest.mark.parametrize("case", cases("logits"))
def test_reference(case):
    out_s = case.leaf("in/out_s")
    loss = Logits()(out_s, case["in/out_t"])
    agree(loss, case["loss"])
    agree_grads(loss, {"out_s": out_s}, {"out_s": case["grad/out_s"]})


@pytest.mark.parametrize("shape", [(1, 2), (3, 5), (4, 10)])
def test_naive(shape):
    out_s, out_t = torch.randn(shape).double(), torch.randn(shape).double()
    total = 0.0
    for row_s, row_t in zip(out_s.tolist(), out_t.tolist()):
        for z_s, z_t in zip(row_s, row_t):
            total += (z_s - z_t) ** 2
    value = Logits()(out_s, out_t).item()
    assert value == pytest.approx(total / (shape[0] * shape[1]), rel=1e-12)


def test_gradcheck():
    out_s, out_t = torch.randn(3, 4).double(), torch.randn(3, 4).double()
    assert torch.autograd.gradcheck(lambda x: Logits()(x, out_t), out_s.requires_grad_())


def test_teacher_is_constant():
    out_s, out_t = (torch.randn(3, 4).requires_grad_() for _ in range(2))
    Logits()(out_s, out_t).backward()
    assert out_s.grad is not None and out_t.grad is None


def test_half_does_not_overflow():
    out_s, out_t = torch.full((1, 2), 300.0).half(), torch.full((1, 2), -300.0).half()
    loss = Logits()(out_s, out_t)
    assert loss.dtype == torch.float32 and loss.item() == 360000.0  # beyond the largest half


def test_equal_logits():
    out = torch.randn(1, 4).double().requires_grad_()
    loss = Logits()(out, out)
    assert loss.item() == 0
    assert torch.autograd.grad(loss, out)[0].count_nonzero() == 0


def test_bad_input():
    with pytest.raises(ValueError, match="shape"):  # not a silent broadcast
        Logits()(torch.zeros(3, 4), torch.zeros(1, 4))
