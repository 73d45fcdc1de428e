import pytest
import torch

from kd_losses.ab import AB
from reference import agree, agree_grads, cases


@pytest.mark.parametrize("case", cases("ab"))
def test_reference(case):
    fm_s = case.leaf("in/fm_s")
    loss = AB(**case.hyper)(fm_s, case["in/fm_t"])
    agree(loss, case["loss"])
    agree_grads(loss, {"fm_s": fm_s}, {"fm_s": case["grad/fm_s"]})


@pytest.mark.parametrize("case", cases("ab"))
def test_crd_benchmark(case):
    fm_s = case.leaf("in/fm_s")
    # a sum over the entries, divided by the batch, times 3 / 1000
    loss = AB(**case.hyper)(fm_s, case["in/fm_t"]) * fm_s[0].numel() * 0.003
    agree(loss, case["alt_repdistiller/loss"])
    agree_grads(loss, {"fm_s": fm_s}, {"fm_s": case["alt_repdistiller/grad/fm_s"]})


def naive(fm_s, fm_t, m):
    """The four cases of teacher active or not and student beyond the margin or not."""
    total = 0.0
    for s, t in zip(fm_s.flatten().tolist(), fm_t.flatten().tolist()):
        if t <= 0 and s > -m:
            total += (s + m) ** 2
        elif t > 0 and s <= m:
            total += (s - m) ** 2
    return total / fm_s.numel()


@pytest.mark.parametrize("margin", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("shape", [(3, 4, 2, 5), (1, 1, 1, 1), (4, 6)])
def test_naive(margin, shape):
    fm_s, fm_t = 2 * torch.randn(shape).double(), torch.randn(shape).double()
    assert AB(margin)(fm_s, fm_t).item() == pytest.approx(naive(fm_s, fm_t, margin), rel=1e-12)


def test_boundaries():
    """A teacher at 0 is inactive, and a student at its margin is done."""
    fm_s = torch.tensor([2.0, -2.0, 2.0, -2.0, 0.0]).double().requires_grad_()
    fm_t = torch.tensor([1.0, 1.0, 0.0, 0.0, -0.0]).double()
    loss = AB(2.0)(fm_s, fm_t)
    assert loss.item() == (0 + 16 + 16 + 0 + 4) / 5
    (grad,) = torch.autograd.grad(loss, fm_s)
    assert (grad * 5).tolist() == [0, -8, 8, 0, 4]


def test_gradcheck():
    fm_s, fm_t = torch.randn(2, 3, 2, 2).double(), torch.randn(2, 3, 2, 2).double()
    assert torch.autograd.gradcheck(lambda x: AB()(x, fm_t), fm_s.requires_grad_())


def test_degenerate():
    for fm_s, fm_t in [
        (torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)),
        (torch.zeros(2, 3, 4, 4), torch.randn(2, 3, 4, 4)),
        (torch.full((2, 3, 4, 4), 200.0), torch.full((2, 3, 4, 4), -200.0)),
    ]:
        fm_s.requires_grad_(), fm_t.requires_grad_()
        loss = AB()(fm_s, fm_t)
        grad, none = torch.autograd.grad(loss, (fm_s, fm_t), allow_unused=True)
        assert loss.isfinite() and grad.isfinite().all() and none is None


def test_bad_input():
    with pytest.raises(ValueError, match="margin"):
        AB(-1.0)
    with pytest.raises(ValueError, match="shape"):  # not a silent broadcast
        AB()(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 1, 1))
