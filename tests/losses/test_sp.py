import math

import pytest
import torch

from kd_losses.sp import SP
from reference import agree, agree_grads, cases


@pytest.mark.parametrize("case", cases("sp"))
@pytest.mark.parametrize("peer", ["", "alt_mdistiller/", "alt_repdistiller/"])
def test_reference(case, peer):
    fm_s = case.leaf("in/fm_s")
    loss = SP()(fm_s, case["in/fm_t"])
    agree(loss, case[peer + "loss"].reshape(()))
    agree_grads(loss, {"fm_s": fm_s}, {"fm_s": case[peer + "grad/fm_s"]})


def naive(fm_s, fm_t):
    """The squared difference of the two similarity matrices, entry by entry."""
    matrices = []
    for fm in (fm_s, fm_t):
        samples = [[fm[(b, *i)].item() for i in indices(fm)] for b in range(len(fm))]
        matrix = []
        for a in samples:
            row = [sum(p * q for p, q in zip(a, b)) for b in samples]
            norm = math.sqrt(sum(value**2 for value in row))
            matrix += [value / norm if norm else value for value in row]
        matrices.append(matrix)
    return sum((g_s - g_t) ** 2 for g_s, g_t in zip(*matrices)) / len(fm_s) ** 2


def indices(fm):
    """Of all the entries of a sample."""
    found = [()]
    for size in fm.shape[1:]:
        found = [(*i, j) for i in found for j in range(size)]
    return found


@pytest.mark.parametrize("shape_t", [(4, 3, 2, 2), (4, 2, 1, 5), (4, 6)])
def test_naive(shape_t):
    fm_s, fm_t = torch.randn(4, 3, 2, 2).double(), torch.randn(shape_t).double()
    fm_t[1] = 0
    assert SP()(fm_s, fm_t).item() == pytest.approx(naive(fm_s, fm_t), rel=1e-12)


def test_gradcheck():
    fm_s, fm_t = torch.randn(3, 2, 2, 2).double(), torch.randn(3, 3, 1, 2).double()
    assert torch.autograd.gradcheck(lambda x: SP()(x, fm_t), fm_s.requires_grad_())


def test_teacher_is_constant():
    fm_s, fm_t = (torch.randn(3, 3, 2, 2).requires_grad_() for _ in range(2))
    SP()(fm_s, fm_t).backward()
    assert fm_s.grad is not None and fm_t.grad is None


def maps(name):
    fm = torch.randn(3, 2, 4, 4)
    zero, row = torch.zeros_like(fm), torch.zeros_like(fm)
    row[1:] = fm[1:]
    return {
        "both zero": (zero, zero),
        "student zero": (zero, fm),
        "teacher zero": (fm, zero),
        "zero sample": (row, fm),
        "equal": (fm, fm.clone()),
        "tiny": (fm * 1e-12, fm),  # the square of a similarity underflows
        "duplicates": (fm[:1].expand(3, -1, -1, -1), fm),
        "one sample": (fm[:1], fm[1:2]),
        "one by one": (fm[..., :1, :1], fm),
    }[name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "name",
    ["both zero", "student zero", "teacher zero", "zero sample", "equal", "tiny", "duplicates"]
    + ["one sample", "one by one"],
)
def test_degenerate(name, dtype):
    fm_s, fm_t = (fm.to(dtype) for fm in maps(name))
    fm_s = fm_s.clone().requires_grad_()
    loss = SP()(fm_s, fm_t)
    (grad,) = torch.autograd.grad(loss, fm_s)
    assert loss.isfinite() and grad.isfinite().all() and grad.abs().max() < 100
    if name in ("both zero", "equal", "one sample"):
        assert loss.item() == pytest.approx(0, abs=1e-12)


def test_bad_input():
    with pytest.raises(ValueError, match="batch"):  # not a silent broadcast
        SP()(torch.zeros(3, 2, 4, 4), torch.zeros(1, 2, 4, 4))
