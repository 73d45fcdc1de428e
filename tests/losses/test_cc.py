import math

import pytest
import torch

from kd_losses.cc import CC
from reference import agree, agree_grads, cases


@pytest.mark.parametrize("case", cases("cc"))
def test_reference(case):
    cc, feat_s = CC(**case.hyper), case.leaf("in/feat_s")
    loss = cc(feat_s, case["in/feat_t"])
    agree(loss, case["loss"])
    agree_grads(loss, {"feat_s": feat_s}, {"feat_s": case["grad/feat_s"]})
    agree(cc.correlation(feat_s), case["extra/corr_s"])
    agree(cc.correlation(case["in/feat_t"]), case["extra/corr_t"])


def naive(feat_s, feat_t, gamma, order):
    """The squared difference of the two kernel matrices, entry by entry and term by term."""
    matrices = []
    for feat in (feat_s.tolist(), feat_t.tolist()):
        rows = []
        for row in feat:
            norm = math.sqrt(sum(value**2 for value in row))
            rows.append([value / norm if norm else value for value in row])
        matrix = []
        for a in rows:
            for b in rows:
                cosine, k = sum(p * q for p, q in zip(a, b)), 0.0
                for p in range(order + 1):
                    term = math.exp(-2 * gamma) * (2 * gamma) ** p / math.factorial(p)
                    k += term * cosine**p
                matrix.append(k)
        matrices.append(matrix)
    return sum((k_s - k_t) ** 2 for k_s, k_t in zip(*matrices)) / len(feat_s) ** 2


@pytest.mark.parametrize("gamma, order", [(0.4, 2), (0.4, 1), (1.5, 5)])
def test_naive(gamma, order):
    feat_s, feat_t = torch.randn(4, 3).double(), torch.randn(4, 6).double()
    feat_t[1] = 0
    expected = naive(feat_s, feat_t, gamma, order)
    assert CC(gamma, order)(feat_s, feat_t).item() == pytest.approx(expected, rel=1e-12)


def test_high_order_is_the_gaussian_kernel():
    feat = torch.randn(4, 3).double()
    x = feat / feat.norm(dim=1, keepdim=True)
    expected = (-0.4 * torch.cdist(x, x).square()).exp()
    torch.testing.assert_close(CC(0.4, 20).correlation(feat), expected)


def test_gradcheck():
    feat_s, feat_t = torch.randn(3, 4).double(), torch.randn(3, 2).double()
    assert torch.autograd.gradcheck(lambda x: CC(0.4, 3)(x, feat_t), feat_s.requires_grad_())


def test_teacher_is_constant():
    feat_s, feat_t = (torch.randn(3, 4).requires_grad_() for _ in range(2))
    CC()(feat_s, feat_t).backward()
    assert feat_s.grad is not None and feat_t.grad is None


def features(name):
    feat = torch.randn(4, 5)
    zero, row = torch.zeros_like(feat), torch.zeros_like(feat)
    row[1:] = feat[1:]
    return {
        "both zero": (zero, zero),
        "student zero": (zero, feat),
        "teacher zero": (feat, zero),
        "zero row": (row, feat),
        "equal": (feat, feat.clone()),
        "tiny": (feat * 1e-22, feat),  # the square underflows
        "duplicates": (feat[:1].expand(4, -1), feat),
        "one sample": (feat[:1], feat[1:2]),
    }[name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "name",
    ["both zero", "student zero", "teacher zero", "zero row", "equal", "tiny", "duplicates"]
    + ["one sample"],
)
def test_degenerate(name, dtype):
    feat_s, feat_t = (feat.to(dtype) for feat in features(name))
    feat_s = feat_s.clone().requires_grad_()
    loss = CC()(feat_s, feat_t)
    (grad,) = torch.autograd.grad(loss, feat_s)
    assert loss.isfinite() and grad.isfinite().all()
    if name != "tiny":  # where the true gradient is that large
        assert grad.abs().max() < 100
    if name in ("both zero", "equal", "one sample"):
        assert loss.item() == pytest.approx(0, abs=1e-12)


def test_bad_input():
    with pytest.raises(ValueError, match="gamma"):
        CC(gamma=0.0)
    with pytest.raises(ValueError, match="P_order"):  # a constant: nothing would learn
        CC(P_order=0)
    with pytest.raises(ValueError, match="P_order"):
        CC(P_order=1.5)
    with pytest.raises(ValueError, match="one batch"):  # not a silent broadcast
        CC()(torch.zeros(3, 4), torch.zeros(1, 4))
