import math

import pytest
import torch

from kd_losses.wkd_l import WKDL, cka_cost
from reference import agree, agree_grads, cases


@pytest.mark.parametrize("case", cases("wkd_l"))
def test_reference(case):
    hyper = {k: v for k, v in case.hyper.items() if k != "sharpen"}
    cost, out_s = case["extra/cost"], case.leaf("in/out_s")
    out_t, target = case["in/out_t"], case["in/target"]
    loss = WKDL(cost, **hyper)(out_s, out_t, target)
    agree(loss, case["loss"])
    agree_grads(loss, {"out_s": out_s}, {"out_s": case["grad/out_s"]})
    agree(WKDL(cost, **hyper)(out_s, out_t, target, 0.0), case["extra/target_part"])
    one = WKDL(cost, **hyper | dict(weight=1.0))(out_s, out_t, target)
    agree(one - case["extra/target_part"], case["extra/sinkhorn_part"])
    half = WKDL(cost, **hyper)(out_s, out_t, target, torch.tensor(0.5))
    agree(half, 0.5 * (case["loss"] + case["extra/target_part"]))


@pytest.mark.parametrize("case", cases("wkd_l"))
def test_reference_in_float32(case):
    hyper = {k: v for k, v in case.hyper.items() if k != "sharpen"}
    out_s, out_t = case["in/out_s"].float().requires_grad_(), case["in/out_t"].float()
    loss = WKDL(case["extra/cost"].float(), **hyper)(out_s, out_t, case["in/target"])
    (grad,) = torch.autograd.grad(loss, out_s)
    torch.testing.assert_close(loss.double(), case["loss"], rtol=1e-5, atol=0)
    torch.testing.assert_close(grad.double(), case["grad/out_s"], rtol=0, atol=2e-5)


@pytest.mark.parametrize("case", cases("wkd_l"))
def test_reference_cost(case):
    features = case["in/class_features"]
    agree(cka_cost(features, case.hyper["sharpen"]), case["extra/cost"])
    agree(cka_cost(features, 0.0), case["extra/cka_distance"])


def naive(cost, out_s, out_t, target, T, weight, eps, iters, decay=1.0):
    """Sample by sample, on lists of the K - 1 other classes."""
    total, n = 0.0, len(out_s)
    for z_s, z_t, y in zip(out_s.tolist(), out_t.tolist(), target.tolist()):
        others = [k for k in range(len(z_s)) if k != y]
        p_s, p_t = ([math.exp(v) / sum(math.exp(w) for w in z) for v in z] for z in (z_s, z_t))
        a, b = (
            [math.exp(z[k] / T) / sum(math.exp(z[j] / T) for j in others) for k in others]
            for z in (z_s, z_t)
        )
        C = [[max(cost[i, j].item(), 0.0) + 1e-8 for j in others] for i in others]
        G = [[math.exp(-value / eps) for value in row] for row in C]
        size = range(len(others))
        u = [1 / len(others) for _ in size]
        for _ in range(iters):
            v = [b[j] / (sum(G[i][j] * u[i] for i in size) + 1e-8) for j in size]
            u = [a[i] / (sum(G[i][j] * v[j] for j in size) + 1e-8) for i in size]
        flow = sum(u[i] * G[i][j] * v[j] * C[i][j] for i in size for j in size)
        total += weight * decay * flow - p_t[y] * math.log(p_s[y])
    return total / n


@pytest.mark.parametrize("hyper", [(8.0, 600.0, 0.05, 10), (1.0, 3.0, 0.3, 1), (2.0, 1.0, 1.0, 4)])
@pytest.mark.parametrize("b, k", [(1, 3), (4, 6), (5, 2)])
def test_naive(b, k, hyper):
    cost = torch.randn(k, k).double()  # neither symmetric nor positive
    out_s, out_t = torch.randn(b, k).double(), torch.randn(b, k).double()
    target = torch.randint(k, (b,))
    for decay in (1.0, 0.25):
        value = WKDL(cost, *hyper)(out_s, out_t, target, decay).item()
        expected = naive(cost, out_s, out_t, target, *hyper, decay)
        assert value == pytest.approx(expected, rel=1e-11)


def naive_cka(x, sharpen):
    """Pair by pair, by the Gram matrices of the samples."""
    K, N = len(x), x.shape[1]
    centre = torch.eye(N).double() - 1 / N
    grams = [centre @ c @ c.T @ centre for c in x.double()]
    cost = torch.zeros(K, K).double()
    for i in range(K):
        for j in range(K):
            hsic = [(grams[a] * grams[b]).sum() for a, b in ((i, j), (i, i), (j, j))]
            distance = 1 - hsic[0] / (hsic[1] * hsic[2]).sqrt()
            cost[i, j] = 1 - math.exp(-sharpen * distance) if sharpen else distance
    return cost


@pytest.mark.parametrize("sharpen", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("shape", [(4, 7, 3), (3, 3, 6), (2, 2, 1)])
def test_naive_cost(shape, sharpen):
    x = torch.randn(*shape).double() + 3
    expected = naive_cka(x, sharpen)
    torch.testing.assert_close(cka_cost(x, sharpen), expected, rtol=0, atol=1e-12)
    # scales and offsets of the features do not matter, not even where their squares underflow
    for scale in (1e4, 1e-12, 1e-20):
        small = cka_cost((scale * x).float(), sharpen).double()
        torch.testing.assert_close(small, expected, rtol=0, atol=1e-4)


def test_cost_of_dead_features():
    x = torch.randn(4, 5, 3).double()
    x[1], x[2] = 0, 7
    cost = cka_cost(x, 0.0)
    expected = 1 - torch.eye(4).double()
    expected[0, 3] = expected[3, 0] = naive_cka(x[[0, 3]], 0.0)[0, 1]
    torch.testing.assert_close(cost, expected)


def test_gradcheck():
    wkd = WKDL(torch.rand(4, 4).double(), T=2.0, weight=5.0, eps=0.2)
    out_s, out_t = torch.randn(3, 4).double(), torch.randn(3, 4).double()
    target = torch.tensor([0, 3, 3])
    assert torch.autograd.gradcheck(lambda x: wkd(x, out_t, target), out_s.requires_grad_())


def test_teacher_and_cost_are_constant():
    out_s, out_t, cost = (torch.randn(4, 4).requires_grad_() for _ in range(3))
    wkd = WKDL(cost)
    wkd(out_s, out_t, torch.tensor([0, 3, 3, 1])).backward()
    assert out_s.grad is not None and out_t.grad is None and cost.grad is None
    assert list(wkd.state_dict()) == ["cost"] and not list(wkd.parameters())


def test_two_classes_are_a_constant():
    cost = torch.tensor([[0.25, 1.0], [1.0, 0.5]])
    out_s, out_t = torch.randn(5, 2).requires_grad_(), torch.randn(5, 2)
    target = torch.tensor([0, 1, 1, 0, 1])
    wkd = WKDL(cost)
    loss = wkd(out_s, out_t, target) - wkd(out_s, out_t, target, 0.0)
    # the one class left is carried over to itself; 1e-8 aside
    assert loss.item() == pytest.approx(600 * (2 * 0.5 + 3 * 0.25) / 5, rel=1e-2)
    assert torch.autograd.grad(loss, out_s)[0].abs().max() < 1e-5


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
def test_equal_logits(scale):
    out, wkd = torch.randn(5, 4).requires_grad_(), WKDL(cka_cost(torch.randn(4, 9, 3)))
    loss = wkd(scale * out, scale * out, torch.zeros(5, dtype=torch.int64))
    (grad,) = torch.autograd.grad(loss, out)
    assert loss.isfinite() and grad.isfinite().all() and grad.abs().max() < 1e4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("T", [1.0, 8.0])
def test_saturated_logits(T, dtype):
    peak, cost = 200 * torch.eye(4), 1 - torch.eye(4)
    out_s = peak[[0, 1, 3]].to(dtype).requires_grad_()
    out_t = peak[[0, 2, 1]].to(dtype)
    wkd = WKDL(cost, T=T, weight=10.0, eps=0.5)
    loss = wkd(out_s, out_t, torch.tensor([0, 0, 3]))
    (grad,) = torch.autograd.grad(loss, out_s)
    # uniform rests, a peak against another, a uniform rest against a peak: what is carried is the
    # smoothed 0, all, two thirds; the target's part is 0 in all three
    stay = math.exp(-1 / 0.5)
    expected = [2 * stay / (1 + 2 * stay), 1, 2 / 3]
    assert loss.item() == pytest.approx(10 * sum(expected) / 3, rel=1e-4)
    assert grad.isfinite().all() and grad.abs().max() < 10


@pytest.mark.parametrize("largest, eps", [(1.0, 0.05), (1.0, 1e-3), (1e4, 0.05), (1e-20, 0.05)])
def test_extreme_costs(largest, eps):
    cost = largest * torch.rand(10, 10)
    for out_s in (torch.zeros(6, 10), 200 * torch.eye(10)[:6], 1e4 * torch.randn(6, 10)):
        out_s = out_s.clone().requires_grad_()
        loss = WKDL(cost, T=1.0, eps=eps)(out_s, 200 * torch.eye(10)[3:9], torch.arange(6))
        assert loss.isfinite() and torch.autograd.grad(loss, out_s)[0].isfinite().all()


def test_bad_input():
    cost, out, target = torch.zeros(4, 4), torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64)
    for bad in (dict(T=0.0), dict(eps=0.0), dict(iters=0)):
        with pytest.raises(ValueError, match=rf"\b{[*bad][0]}\b"):
            WKDL(cost, **bad)
    for bad in (cost[0], cost[:3], cost.long()):
        with pytest.raises(ValueError, match="cost"):
            WKDL(bad)
    with pytest.raises(ValueError, match="classes"):
        WKDL(cost[:1, :1])
    wkd = WKDL(cost)
    for outs in ((out, out[:1]), (out[:, :3], out[:, :3]), (out[:1], out)):
        with pytest.raises(ValueError, match="shape"):  # not a silent broadcast
            wkd(*outs, target)
    with pytest.raises(ValueError, match="shape"):
        wkd(out, out, target[:, None])
    with pytest.raises(ValueError, match="features"):
        cka_cost(torch.zeros(4, 1, 3))
    with pytest.raises(ValueError, match="features"):
        cka_cost(torch.zeros(4, 3))
    with pytest.raises(ValueError, match="sharpen"):
        cka_cost(torch.zeros(4, 3, 2), -1.0)
