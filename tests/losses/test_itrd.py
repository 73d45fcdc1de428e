import itertools
import math

import pytest
import torch

from kd_losses.itrd import ITRD
from reference import agree, cases

SCALES = [0.0, 1e-20, 1e-12, 1.0, 1e4]


def build(case, **changes):
    hyper = {**case.hyper, **changes}
    widths = case["in/feat_s"].shape[1], case["in/feat_t"].shape[1]
    itrd = ITRD(*widths, hyper["lambda_corr"], hyper["lambda_mutual"], hyper["alpha_it"]).double()
    params = case.group("param/embed.linear.")
    itrd.load_state_dict({f"embed.{name}": value for name, value in params.items()})
    return itrd


@pytest.mark.parametrize("part", ["", "extra/corr/", "extra/mutual/"])
@pytest.mark.parametrize("case", cases("itrd"))
def test_reference(case, part):
    weights = dict(lambda_corr=float("corr" in part), lambda_mutual=float("mutual" in part))
    itrd, feat_s = build(case, **(weights if part else {})), case.leaf("in/feat_s")
    loss = itrd(feat_s, case["in/feat_t"])
    agree(loss, case[f"{part}loss"])
    leaves = {"feat_s": feat_s, **dict(itrd.embed.named_parameters())}
    expected = case.group(f"{part}grad_param/embed.linear.")
    expected["feat_s"] = case[f"{part}grad/feat_s"]
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    for (name, leaf), grad in zip(leaves.items(), grads):
        # not `agree`: standardised, the bias has a gradient of rounding errors alone
        grad = torch.zeros_like(leaf) if grad is None else grad
        torch.testing.assert_close(grad, expected[name], rtol=1e-9, atol=1e-13)


def naive(itrd, feat_s, feat_t):
    """The docstring's formulas sample by sample and unit by unit."""
    v_s, v_t, b = feat_s.tolist(), feat_t.tolist(), len(feat_s)
    w, bias = itrd.embed.weight.tolist(), itrd.embed.bias.tolist()
    e = [[sum(p * q for p, q in zip(row, x)) + c for row, c in zip(w, bias)] for x in v_s]

    def standardised(rows, j):
        column = [row[j] for row in rows]
        mean = sum(column) / b
        std = math.sqrt(sum((value - mean) ** 2 for value in column) / (b - 1))
        return [(value - mean) / std for value in column]

    total = 0.0
    for j in range(len(bias)):
        pairs = zip(standardised(e, j), standardised(v_t, j))
        total += abs(sum(p * q for p, q in pairs) / b - 1) ** (2 * itrd.alpha)

    def gram(rows):
        norms = [math.sqrt(sum(value**2 for value in row)) for row in rows]
        return [
            [sum(p * q for p, q in zip(rows[i], rows[k])) / norms[i] / norms[k] for k in range(b)]
            for i in range(b)
        ]

    def square(g):
        trace = sum(g[i][i] for i in range(b))
        return sum((value / trace) ** 2 for row in g for value in row)

    g_s, g_t = gram(v_s if len(w[0]) == len(w) else e), gram(v_t)
    joint = [[p * q for p, q in zip(*rows)] for rows in zip(g_s, g_t)]
    return itrd.lambda_corr * math.log2(total) + itrd.lambda_mutual * (square(g_s) - square(joint))


@pytest.mark.parametrize("weights", [(2.0, 0.05, 1.5), (0.0, 1.0, 1.01), (1.0, 3.0, 0.7)])
@pytest.mark.parametrize("b, s, t", [(2, 3, 5), (5, 4, 4), (7, 6, 2)])
def test_naive(b, s, t, weights):
    itrd = ITRD(s, t, *weights).double()
    feat_s, feat_t = torch.randn(b, s).double(), torch.randn(b, t).double()
    expected = naive(itrd, feat_s, feat_t)
    assert itrd(feat_s, feat_t).item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("s, t", [(3, 4), (4, 4)])
def test_gradcheck(s, t):
    itrd = ITRD(s, t, lambda_mutual=1.0).double()
    feat_s, feat_t = torch.randn(5, s).double(), torch.randn(5, t).double()
    params = dict(itrd.named_parameters())

    def call(x, *values):
        return torch.func.functional_call(itrd, dict(zip(params, values)), (x, feat_t))

    assert torch.autograd.gradcheck(call, (feat_s.requires_grad_(), *params.values()))


def test_teacher_is_constant():
    feat_s, feat_t = torch.randn(4, 3).requires_grad_(), torch.randn(4, 5).requires_grad_()
    ITRD(3, 5)(feat_s, feat_t).backward()
    assert feat_s.grad is not None and feat_t.grad is None


@pytest.mark.parametrize("b, alpha", [(8, 1.5), (64, 1.01), (64, 40.0)])
def test_perfect_match(b, alpha):
    """c = (B - 1) / B, also where its distance to 1 to that power is below the least number."""
    itrd = ITRD(8, 8, lambda_mutual=0.0, lambda_corr=1.0, alpha=alpha)
    torch.nn.init.eye_(itrd.embed.weight)
    torch.nn.init.zeros_(itrd.embed.bias)
    feat = torch.randn(b, 8)
    expected = 3 - 2 * alpha * math.log2(b)
    assert itrd(feat, feat).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("value", [0.0, 3.0, 1e4])
def test_a_dead_unit_is_uncorrelated(value):
    itrd = ITRD(3, 4, lambda_mutual=0.0, lambda_corr=1.0).double()
    feat_s, feat_t = torch.randn(5, 3).double().requires_grad_(), torch.randn(5, 4).double()
    alive = itrd(feat_s, feat_t)
    one = 2 ** alive.item()
    with torch.no_grad():
        e = itrd.embed(feat_s)[:, 1]
        c = (
            (e - e.mean()) / e.std() * (feat_t[:, 1] - feat_t[:, 1].mean()) / feat_t[:, 1].std()
        ).mean()
    feat_t[:, 1] = value
    dead = itrd(feat_s, feat_t)
    assert 2 ** dead.item() == pytest.approx(one - (1 - c.item()) ** 3 + 1, rel=1e-6)
    (grad,) = torch.autograd.grad(dead, feat_s)
    assert grad.isfinite().all() and grad.abs().max() < 10


@pytest.mark.parametrize("s, t", [(3, 4), (4, 4)])
@pytest.mark.parametrize("scale_s, scale_t", list(itertools.product(SCALES, repeat=2)))
def test_degenerate(scale_s, scale_t, s, t):
    itrd = ITRD(s, t, lambda_mutual=1.0)
    raw, feat_t = torch.randn(5, s).requires_grad_(), scale_t * torch.randn(5, t)
    for feat_s in (scale_s * raw, scale_s * raw[:1].expand(5, s), scale_s * raw[[0, 0, 1, 1, 2]]):
        loss = itrd(feat_s, feat_t)
        grads = torch.autograd.grad(loss, (raw, *itrd.parameters()))
        assert loss.isfinite() and all(grad.isfinite().all() for grad in grads)
        assert all(grad.abs().max() < 1e6 for grad in grads)
    if scale_s == scale_t == 0:
        zeros = ITRD(4, 4, 1.0, 1.0)(torch.zeros(5, 4), torch.zeros(5, 4))
        assert zeros.item() == pytest.approx(2.0)  # log2 of 4 units without correlation


def test_zero_rows():
    """Of one sample alone, and the entropies by hand: G_s is 1 at (0, 0), or full."""
    itrd = ITRD(2, 2, lambda_corr=0.0, lambda_mutual=1.0)
    one, both = torch.tensor([[1.0, 0], [0, 0]]), torch.tensor([[1.0, 0], [1, 0]])
    across = torch.tensor([[1.0, 0], [0, 1]])
    loss = itrd(one.requires_grad_(), both)
    assert loss.item() == pytest.approx(0)
    assert torch.autograd.grad(loss, one)[0].abs().max() < 10
    assert itrd(both, across).item() == pytest.approx(0.5)


def test_bad_input():
    feat_s, feat_t = torch.zeros(3, 2), torch.zeros(3, 4)
    with pytest.raises(ValueError, match="alpha"):
        ITRD(2, 4, alpha=0.0)
    for s, t in ((feat_s[:1], feat_t), (feat_s, feat_t[:, :1]), (feat_s[:, :1], feat_t)):
        with pytest.raises(ValueError, match="vectors"):
            ITRD(2, 4)(s, t)
    with pytest.raises(ValueError, match="samples"):
        ITRD(2, 4)(feat_s[:1], feat_t[:1])
