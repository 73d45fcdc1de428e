import math

import pytest
import torch

from kd_losses.nst import NST
from reference import agree, agree_grads, cases

KERNELS = ["poly", "linear", "gauss"]


@pytest.mark.parametrize("case", cases("nst"))
@pytest.mark.parametrize("peer", ["", "alt_mdistiller/", "alt_repdistiller/"])
def test_reference(case, peer):
    fm_s = case.leaf("in/fm_s")
    loss = NST()(fm_s, case["in/fm_t"])
    agree(loss, case[peer + "loss"])
    agree_grads(loss, {"fm_s": fm_s}, {"fm_s": case[peer + "grad/fm_s"]})


def naive(fm_s, fm_t, kernel):
    """The discrepancy sample by sample and channel by channel."""

    def unit(channel):
        flat = [value for row in channel for value in row]
        norm = math.sqrt(sum(value**2 for value in flat))
        return [value / norm if norm else value for value in flat]

    def dot(a, b):
        return sum(p * q for p, q in zip(a, b))

    def distance(a, b):
        return sum((p - q) ** 2 for p, q in zip(a, b))

    total = 0.0
    for sample_s, sample_t in zip(fm_s.tolist(), fm_t.tolist()):
        xs, ys = [unit(c) for c in sample_s], [unit(c) for c in sample_t]
        variance = sum(distance(x, y) for x in xs for y in ys) / (len(xs) * len(ys))
        k = {
            "poly": lambda a, b: dot(a, b) ** 2,
            "linear": dot,
            "gauss": lambda a, b: math.exp(-distance(a, b) / (2 * variance)),
        }[kernel]
        for sign, left, right in ((1, ys, ys), (1, xs, xs), (-2, xs, ys)):
            mean = sum(k(a, b) for a in left for b in right) / (len(left) * len(right))
            total += sign * mean
    return total / len(fm_s)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("c_s, c_t", [(3, 3), (2, 5), (4, 1)])
def test_naive(kernel, c_s, c_t):
    fm_s, fm_t = torch.randn(3, c_s, 2, 3).double(), torch.randn(3, c_t, 2, 3).double()
    fm_s[0, 0] = 0  # a dead channel
    expected = naive(fm_s, fm_t, kernel)
    assert NST(kernel)(fm_s, fm_t).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kernel", KERNELS)
def test_gradcheck(kernel):
    fm_s, fm_t = torch.randn(2, 3, 2, 2).double(), torch.randn(2, 4, 2, 2).double()
    assert torch.autograd.gradcheck(lambda x: NST(kernel)(x, fm_t), fm_s.requires_grad_())


@pytest.mark.parametrize("kernel", KERNELS)
def test_teacher_is_constant(kernel):
    fm_s, fm_t = (torch.randn(2, 3, 2, 2).requires_grad_() for _ in range(2))
    NST(kernel)(fm_s, fm_t).backward()
    assert fm_s.grad is not None and fm_t.grad is None


def maps(name):
    fm = torch.randn(2, 3, 4, 4)
    zero, one = torch.zeros_like(fm), torch.rand(1, 3, 1, 1) + 0.1
    return {
        "both zero": (zero, zero),
        "student zero": (zero, fm),
        "teacher zero": (fm, zero),
        "equal": (fm, fm.clone()),
        "tiny": (fm * 1e-22, fm),  # the square underflows
        "duplicate channels": (fm[:, :1].expand(-1, 3, -1, -1), fm[:, :1]),
        "one by one, one sample": (one, one * 2),
        "one channel": (fm[:, :1], fm[:, 1:2]),
    }[name]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "name",
    ["both zero", "student zero", "teacher zero", "equal", "tiny", "duplicate channels"]
    + ["one by one, one sample", "one channel"],
)
def test_degenerate(name, kernel, dtype):
    fm_s, fm_t = (fm.to(dtype) for fm in maps(name))
    fm_s = fm_s.clone().requires_grad_()
    loss = NST(kernel)(fm_s, fm_t)
    (grad,) = torch.autograd.grad(loss, fm_s)
    assert loss.isfinite() and grad.isfinite().all()
    if name != "tiny":  # where the true gradient is that large
        assert grad.abs().max() < 100
    if name in ("both zero", "equal", "duplicate channels", "one by one, one sample"):
        assert loss.item() == pytest.approx(0, abs=1e-6)


def test_bad_input():
    with pytest.raises(ValueError, match="kernel"):
        NST("cubic")
    with pytest.raises(ValueError, match="batch"):
        NST()(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 1, 1))
    with pytest.raises(ValueError, match="batch"):  # not a silent broadcast
        NST()(torch.zeros(2, 3, 4, 4), torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match="batch"):  # as many positions, another shape
        NST()(torch.zeros(2, 3, 2, 8), torch.zeros(2, 3, 4, 4))
