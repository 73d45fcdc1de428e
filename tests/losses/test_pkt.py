import math

import pytest
import torch

from kd_losses.pkt import PKTCosSim
from reference import agree, agree_grads, cases


@pytest.mark.parametrize("case", cases("pkt"))
@pytest.mark.parametrize("prefix, eps, rtol", [("", 1e-6, 1e-9), ("alt_mdistiller/", 1e-7, 1e-6)])
def test_reference(case, prefix, eps, rtol):
    """The alternative normalises with another epsilon, its gradient agrees as far as that lets
    it."""
    feat_s = case.leaf("in/feat_s")
    loss = PKTCosSim(eps)(feat_s, case["in/feat_t"])
    agree(loss, case[f"{prefix}loss"], rtol)
    agree_grads(loss, {"feat_s": feat_s}, {"feat_s": case[f"{prefix}grad/feat_s"]}, rtol)


def naive(feat_s, feat_t, eps=1e-6):
    """Equations 3 to 6 of the paper with the cosine kernel, pair by pair."""
    tables = []
    for feat in (feat_s.tolist(), feat_t.tolist()):
        unit = [[v / (math.hypot(*row) + eps) for v in row] for row in feat]
        kernel = [[(sum(a * b for a, b in zip(x, y)) + 1) / 2 for y in unit] for x in unit]
        tables.append([[k / sum(row) for k in row] for row in kernel])
    n = len(feat_s)
    return (
        sum(
            tables[1][i][j] * math.log((tables[1][i][j] + eps) / (tables[0][i][j] + eps))
            for i in range(n)
            for j in range(n)
        )
        / n**2
    )


def test_naive():
    feat_s, feat_t = torch.randn(5, 3).double(), torch.randn(5, 7).double()
    assert PKTCosSim()(feat_s, feat_t).item() == pytest.approx(naive(feat_s, feat_t), rel=1e-10)


def test_gradcheck():
    feat_s, feat_t = torch.randn(4, 3).double(), torch.randn(4, 5).double()
    assert torch.autograd.gradcheck(lambda x: PKTCosSim()(x, feat_t), feat_s.requires_grad_())


def test_a_zero_row_has_a_finite_gradient():
    feat_s = torch.cat([torch.zeros(1, 3), torch.randn(3, 3)]).requires_grad_()
    loss = PKTCosSim()(feat_s, torch.randn(4, 3))
    assert torch.autograd.grad(loss, feat_s)[0].isfinite().all()


def test_bad_input():
    with pytest.raises(ValueError, match="batch"):
        PKTCosSim()(torch.zeros(2, 3), torch.zeros(1, 3))
