import math

import pytest
import torch

from kd_losses.cc import CC, NeighbourCC
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
    with pytest.raises(ValueError, match="batch"):  # not a silent broadcast
        CC()(torch.zeros(3, 4), torch.zeros(1, 4))


@pytest.mark.parametrize("case", [c for c in cases("cc") if "alt_repdistiller/loss" in c])
def test_neighbours_reference(case):
    """Without embeddings; with those that change nothing it is the same."""
    feat_s, feat_t = case.leaf("in/feat_s"), case["in/feat_t"]
    width = feat_s.shape[1]
    net = NeighbourCC(width, width, width).double()
    with torch.no_grad():
        for embed in (net.embed_s, net.embed_t):
            embed.weight.copy_(torch.eye(width))
            embed.bias.zero_()
    for call in (NeighbourCC.neighbours, net):
        loss = call(feat_s, feat_t)
        agree(loss, case["alt_repdistiller/loss"])
        expected = {"feat_s": case["alt_repdistiller/grad/feat_s"]}
        agree_grads(loss, {"feat_s": feat_s}, expected)


def naive_neighbours(net, feat_s, feat_t):
    """The definition, neuron by neuron, sample by sample and entry by entry."""

    def embed(linear, feat):
        weight, bias = linear.weight.tolist(), linear.bias.tolist()
        return [
            [sum(w * v for w, v in zip(row, x)) + b for row, b in zip(weight, bias)]
            for x in feat.flatten(1).tolist()
        ]

    e_s, e_t = embed(net.embed_s, feat_s), embed(net.embed_t, feat_t)
    delta = [[abs(p - q) for p, q in zip(s, t)] for s, t in zip(e_s, e_t)]
    pairs = len(delta) - 1
    total = 0.0
    for b in range(pairs):
        for here, there in zip(delta[b], delta[b + 1]):
            total += here * there
    return total / pairs if pairs else 0.0


@pytest.mark.parametrize(
    "shape_s, shape_t, feat_dim",
    [
        ((4, 3), (4, 6), 5),
        ((2, 3), (2, 3), 1),
        ((1, 3), (1, 2), 4),
        ((5, 2, 3, 1), (5, 4, 1, 1), 3),
    ],
)
def test_neighbours_naive(shape_s, shape_t, feat_dim):
    net = NeighbourCC(math.prod(shape_s[1:]), math.prod(shape_t[1:]), feat_dim).double()
    feat_s, feat_t = torch.randn(shape_s).double(), torch.randn(shape_t).double()
    expected = naive_neighbours(net, feat_s, feat_t)
    assert net(feat_s, feat_t).item() == pytest.approx(expected, rel=1e-12)


def test_neighbours_gradcheck():
    net = NeighbourCC(4, 3, 2).double()
    feat_s, feat_t = torch.randn(4, 4).double(), torch.randn(4, 3).double()
    params = dict(net.named_parameters())

    def call(x, *values):
        return torch.func.functional_call(net, dict(zip(params, values)), (x, feat_t))

    assert torch.autograd.gradcheck(call, (feat_s.requires_grad_(), *params.values()))
    e_s, e_t = (torch.randn(4, 2).double().requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(NeighbourCC.neighbours, (e_s, e_t))


def test_neighbours_both_embeddings_learn_and_the_teacher_is_constant():
    net = NeighbourCC(4, 4, 3)
    feat_s, feat_t = (torch.randn(3, 4).requires_grad_() for _ in range(2))
    net(feat_s, feat_t).backward()
    assert feat_s.grad.any() and feat_t.grad is None
    assert all(parameter.grad.any() for parameter in net.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "name",
    ["both zero", "student zero", "teacher zero", "zero row", "equal", "tiny", "duplicates"]
    + ["one sample"],
)
def test_neighbours_degenerate(name, dtype):
    net = NeighbourCC(5, 5, 3).to(dtype)
    feat_s, feat_t = (feat.to(dtype) for feat in features(name))
    feat_s = feat_s.clone().requires_grad_()
    leaves = (feat_s, *net.parameters())
    loss = net(feat_s, feat_t)
    grads = torch.autograd.grad(loss, leaves)  # all of them are part of the graph
    assert loss.isfinite() and all(g.isfinite().all() and g.abs().max() < 100 for g in grads)
    if name == "one sample":
        assert loss == 0 and not any(grad.any() for grad in grads)
    if name == "equal":
        net.embed_t.load_state_dict(net.embed_s.state_dict())
        loss = net(feat_s, feat_t)
        assert loss == 0
        assert not any(grad.any() for grad in torch.autograd.grad(loss, leaves))


def test_neighbours_half_types_and_autocast():
    net = NeighbourCC(16, 8)
    feat_s, feat_t = torch.randn(6, 16).bfloat16(), torch.randn(6, 8).bfloat16()
    expected = naive_neighbours(net.double(), feat_s.double(), feat_t.double())
    net.float()
    for active in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=active):
            loss = net(feat_s, feat_t)
            alone = NeighbourCC.neighbours(feat_s, feat_s.roll(1, 0))
        assert loss.dtype == alone.dtype == torch.float32
        assert loss.item() == pytest.approx(expected, rel=1e-5)
    exact = NeighbourCC.neighbours(feat_s.double(), feat_s.double().roll(1, 0))
    assert alone.item() == pytest.approx(exact.item(), rel=1e-5)


def test_neighbours_bad_input():
    with pytest.raises(ValueError, match="feat_dim"):
        NeighbourCC(4, 4, 0)
    with pytest.raises(ValueError, match="batch"):  # not a silent broadcast
        NeighbourCC(4, 4, 2)(torch.zeros(3, 4), torch.zeros(1, 4))
