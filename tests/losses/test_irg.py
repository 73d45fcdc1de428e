import pytest
import torch

from kd_losses.irg import IRG
from reference import agree, agree_grads, cases

NAMES = ("fm_s1", "fm_s2", "feat_s", "out_s")


@pytest.mark.parametrize("case", cases("irg"))
def test_reference(case):
    leaves = {name: case.leaf(f"in/{name}") for name in NAMES}
    layers_t = [case[f"in/{name.replace('_s', '_t')}"] for name in NAMES]
    loss = IRG(**case.hyper)(list(leaves.values()), layers_t)
    agree(loss, case["loss"])
    agree_grads(loss, leaves, {name: case[f"grad/{name}"] for name in NAMES})
    for part in ("vert", "edge", "tran"):
        weights = {f"w_irg_{x}": float(x == part) for x in ("vert", "edge", "tran")}
        agree(IRG(**weights)(list(leaves.values()), layers_t), case[f"extra/{part}"])


def naive(layers_s, layers_t, w_irg_vert, w_irg_edge, w_irg_tran):
    """KD-Zoo's definition, pair by pair and sample by sample."""
    b = len(layers_s[0])

    def edges(x):
        rows = x.flatten(1).tolist()
        table = [
            [
                0.0 if i == j else max(1e-12, sum((a - b) ** 2 for a, b in zip(p, q)))
                for j, q in enumerate(rows)
            ]
            for i, p in enumerate(rows)
        ]
        return [v / max(map(max, table)) for row in table for v in row]

    def bins(many, few):
        """Which of `many` neighbours each of `few` averages."""
        return [range(i * many // few, -(-(i + 1) * many // few)) for i in range(few)]

    def pooled(fm, shape):
        parts = [bins(a, b) for a, b in zip(fm.shape[1:], shape)]
        return [
            [
                sum(sample[c][y][x] for c in cs for y in ys for x in xs)
                / (len(cs) * len(ys) * len(xs))
                for cs in parts[0]
                for ys in parts[1]
                for xs in parts[2]
            ]
            for sample in fm.tolist()
        ]

    def change(fm1, fm2):
        shape = [min(a, b) for a, b in zip(fm1.shape[1:], fm2.shape[1:])]
        pairs = zip(pooled(fm1, shape), pooled(fm2, shape))
        r = [max(1e-12, sum((a - b) ** 2 for a, b in zip(p, q))) for p, q in pairs]
        return [v / max(r) for v in r]

    def mse(p, q):
        return sum((a - b) ** 2 for a, b in zip(p, q)) / len(p)

    vert = mse(*(x[3].flatten().tolist() for x in (layers_s, layers_t)))
    edge = sum(mse(edges(layers_s[i]), edges(layers_t[i])) for i in range(3)) / 3
    tran = mse(change(*layers_s[:2]), change(*layers_t[:2]))
    assert len(edges(layers_s[2])) == b * b
    return w_irg_vert * vert + w_irg_edge * edge + w_irg_tran * tran


def draw(b=3, fm2=(2, 4, 4), fm3=(4, 2, 2), feat=5):
    shapes = (b, *fm2), (b, *fm3), (b, feat), (b, 3)
    return [torch.randn(shape).double() for shape in shapes]


# stages alike, twice the channels, any other ratio either way, sizes that do not divide
SHAPES = [
    ((3, 2, 2), (3, 2, 2)),
    ((2, 4, 4), (4, 2, 2)),
    ((2, 4, 3), (5, 2, 2)),
    ((5, 3, 3), (3, 2, 3)),
    ((3, 2, 2), (2, 3, 4)),
]


@pytest.mark.parametrize("fm2, fm3", SHAPES)
@pytest.mark.parametrize("weights", [(0.1, 5.0, 5.0), (1.0, 0.5, 3.0)])
def test_naive(fm2, fm3, weights):
    layers_s, layers_t = draw(4, fm2, fm3), draw(4, (3, 2, 2), (4, 1, 2), 6)
    value = IRG(*weights)(layers_s, layers_t).item()
    assert value == pytest.approx(naive(layers_s, layers_t, *weights), rel=1e-10)


@pytest.mark.parametrize("fm2, fm3", SHAPES)
def test_gradcheck(fm2, fm3):
    layers_t = draw(3, fm2, fm3)
    layers_s = [x.requires_grad_() for x in draw(3, fm2, fm3)]
    assert torch.autograd.gradcheck(lambda *x: IRG()(x, layers_t), layers_s)


def test_tied_largest_change_shares_the_gradient():
    """Two samples alike, and both the farthest between their maps: neither is preferred."""
    layers_t = draw()
    layers_s = [x.index_copy(0, torch.tensor([1]), x[:1]) for x in draw()]
    layers_s[0][2], layers_s[1][2] = layers_s[0][2] * 1e-3, layers_s[1][2] * 1e-3
    layers_t = [x.index_copy(0, torch.tensor([1]), x[:1]) for x in layers_t]
    fm3 = layers_s[1].requires_grad_()
    (grad,) = torch.autograd.grad(IRG(0.0, 0.0, 1.0)(layers_s, layers_t), fm3)
    assert grad[0].abs().max() > 0
    torch.testing.assert_close(grad[0], grad[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_degenerate_input(dtype):
    layers = [x.to(dtype) for x in draw(4)]
    zeros = [torch.zeros_like(x) for x in layers]
    alike = [(x[:1] + 3).expand_as(x) for x in layers]
    twice = [x[[0, 0, 1, 1]] for x in layers]
    flat = [torch.randn(4, 2, 1, 1), torch.randn(4, 3, 1, 1), torch.randn(4, 1), layers[3] * 200]
    two = [x[:2] for x in layers]
    pairs = [(x, layers) for x in (zeros, alike, twice, layers)]
    pairs += [(layers, zeros), (layers, alike), (zeros, zeros), (alike, zeros), (two, two)]
    pairs += [([x.to(dtype) for x in flat], layers)]
    for layers_s, layers_t in pairs:
        leaves = [x.detach().clone().requires_grad_() for x in layers_s]
        loss = IRG()(leaves, layers_t)
        assert loss.isfinite() and loss.dtype == dtype
        assert (loss == 0) == (layers_s is layers_t)
        grads = torch.autograd.grad(loss, leaves)
        assert all(g.isfinite().all() and g.abs().max() < 1e6 for g in grads)


def test_samples_alike_are_at_one_distance_in_float32():
    x = (torch.randn(1, 1000) * 100).expand(5, -1)
    torch.testing.assert_close(IRG().edges(x)[0], 1 - torch.eye(5))


def test_a_large_common_part_costs_no_digits_in_float32():
    x = torch.randn(6, 1000) + 300
    torch.testing.assert_close(IRG().edges(x).double(), IRG().edges(x.double()), rtol=1e-4, atol=0)


def test_half_types_and_autocast():
    layers_s, layers_t = draw(8, (8, 8, 8), (16, 4, 4), 16), draw(8, (8, 8, 8), (16, 4, 4), 16)
    low_s, low_t = ([x.bfloat16() for x in layers] for layers in (layers_s, layers_t))
    expected = IRG()([x.double() for x in low_s], [x.double() for x in low_t])
    for i in (0, 1):
        low_s[i] = low_s[i].contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        loss = IRG()(low_s, low_t)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


def test_bad_input():
    with pytest.raises(ValueError, match="samples"):
        IRG()(draw(1), draw(1))
    with pytest.raises(ValueError, match="logits"):
        IRG()(draw(2), draw(3))
    layers = draw(3)
    with pytest.raises(ValueError, match="batch"):
        IRG()([layers[0][:1], *layers[1:]], layers)
