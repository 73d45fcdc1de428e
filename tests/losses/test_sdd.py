import math
from functools import partial

import pytest
import torch
from torch import nn

from kd_losses.sdd import SDD, dkd, kl
from reference import agree, agree_grads, cases


def linear(weight, bias):
    layer = nn.Linear(*reversed(weight.shape), bias=bias is not None).double()
    layer.load_state_dict(dict(weight=weight) if bias is None else dict(weight=weight, bias=bias))
    return layer


def build(case):
    hyper = case.hyper
    scales = {"[1,2]": (1, 2), "[1,2,4]": (1, 2, 4)}[hyper["M"]]
    keys = ("T",) if hyper["base"] == "kd" else ("alpha", "beta", "T")
    inner = partial(kl if hyper["base"] == "kd" else dkd, **{key: hyper[key] for key in keys})
    heads = (linear(case[f"in/w_{x}"], case[f"in/b_{x}"]) for x in "st")
    return SDD(inner, scales), *heads


@pytest.mark.parametrize("case", cases("sdd"))
def test_reference(case):
    sdd, head_s, head_t = build(case)
    fm_s, target = case.leaf("in/fm_s"), case["in/target"]
    loss = sdd(fm_s, head_s, case["in/fm_t"], head_t, target)
    agree(loss, case["loss"])
    leaves = {"fm_s": fm_s, "w_s": head_s.weight, "b_s": head_s.bias}
    agree_grads(loss, leaves, case.group("grad/"))
    agree(sdd.local(fm_s, head_s).transpose(1, 2), case["extra/local_s"])
    agree(sdd.local(case["in/fm_t"], head_t).transpose(1, 2), case["extra/local_t"])


def soft(z, T):
    power = [math.exp(value / T) for value in z]
    return [p / sum(power) for p in power]


def divergence(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q))


def naive_kl(z_s, z_t, y, T):
    return T**2 * divergence(soft(z_t, T), soft(z_s, T))


def naive_dkd(z_s, z_t, y, alpha, beta, T):
    p_s, p_t = soft(z_s, T), soft(z_t, T)
    rest_s, rest_t = ([p for k, p in enumerate(x) if k != y] for x in (p_s, p_t))
    tckd = divergence([p_t[y], sum(rest_t)], [p_s[y], sum(rest_s)])
    q_s, q_t = ([p / sum(x) for p in x] for x in (rest_s, rest_t))
    return T**2 * (alpha * tckd + beta * divergence(q_t, q_s))


def naive(inner, fm_s, head_s, fm_t, head_t, target, scales, w_comp):
    """Region by region and sample by sample; by sample the whole map comes first."""

    def logits(fm, head, n, i, j):
        cell = [slice(k * m // n, -(-(k + 1) * m // n)) for k, m in zip((i, j), fm.shape[1:])]
        return head(fm[:, cell[0], cell[1]].mean((1, 2))).tolist()

    total, count = 0.0, 0
    for x_s, x_t, y in zip(fm_s, fm_t, target.tolist()):
        whole = logits(x_t, head_t, 1, 0, 0)
        right = whole.index(max(whole)) == y
        for n in scales:
            for i in range(n):
                for j in range(n):
                    z_s, z_t = logits(x_s, head_s, n, i, j), logits(x_t, head_t, n, i, j)
                    weight = 1.0 if (z_t.index(max(z_t)) == y) == right else w_comp
                    total += weight * inner(z_s, z_t, y)
                    count += 1
    return total / count


INNERS = {
    "kl": (partial(kl, T=2.0), partial(naive_kl, T=2.0)),
    "default": (None, partial(naive_kl, T=4.0)),
    "dkd": (partial(dkd, beta=2.0), partial(naive_dkd, alpha=1.0, beta=2.0, T=4.0)),
}


@pytest.mark.parametrize("inner", INNERS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "scales, w_comp, size_s, size_t",
    [((1, 2, 4), 2.0, (8, 8), (4, 4)), ((1, 2), 0.3, (7, 5), (2, 2)), ((1,), 2.0, (3, 3), (1, 1))],
)
def test_naive(inner, bias, scales, w_comp, size_s, size_t):
    fm_s, fm_t = torch.randn(4, 3, *size_s).double(), torch.randn(4, 5, *size_t).double()
    head_s, head_t = nn.Linear(3, 3, bias=bias).double(), nn.Linear(5, 3, bias=bias).double()
    target, (ours, theirs) = torch.tensor([0, 1, 2, 1]), INNERS[inner]
    with torch.no_grad():
        expected = naive(theirs, fm_s, head_s, fm_t, head_t, target, scales, w_comp)
    value = SDD(ours, scales, w_comp)(fm_s, head_s, fm_t, head_t, target).item()
    assert value == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("size", [1, 2, 7, 8])
def test_the_whole_map_gives_the_networks_logits(size):
    """Also where 4 does not divide the side."""
    fm, head = torch.randn(3, 4, size, size), nn.Linear(4, 5)
    torch.testing.assert_close(SDD().local(fm, head)[:, 0], head(fm.mean((2, 3))))


@pytest.mark.parametrize("inner", [kl, dkd])
def test_gradcheck(inner):
    fm_s, fm_t = torch.randn(2, 3, 4, 4).double(), torch.randn(2, 2, 4, 4).double()
    head_t, target = nn.Linear(2, 4).double(), torch.tensor([0, 3])
    leaves = (fm_s, torch.randn(4, 3).double(), torch.randn(4).double())

    def call(x, weight, bias):
        head_s = nn.Module()
        head_s.weight, head_s.bias = weight, bias
        return SDD(inner, (1, 2))(x, head_s, fm_t, head_t, target)

    assert torch.autograd.gradcheck(call, [x.requires_grad_() for x in leaves])


def test_teacher_is_constant_and_classifiers_stay_outside():
    fm_s, fm_t = (torch.randn(2, 3, 4, 4).requires_grad_() for _ in range(2))
    head_s, head_t, sdd = nn.Linear(3, 4), nn.Linear(3, 4), SDD()
    sdd(fm_s, head_s, fm_t, head_t, torch.tensor([0, 3])).backward()
    assert all(x.grad is not None for x in (fm_s, *head_s.parameters()))
    assert all(x.grad is None for x in (fm_t, *head_t.parameters()))
    assert not list(sdd.parameters())


def test_hooks_of_the_classifier_are_silent():
    """A hook on the classifier's input would take a region's vectors for the network's feature."""
    head, called = nn.Linear(3, 4), []
    head.register_forward_hook(lambda *args: called.append(args))
    SDD()(torch.randn(2, 3, 4, 4), head, torch.randn(2, 3, 4, 4), head, torch.tensor([0, 3]))
    assert not called


@pytest.mark.parametrize("inner", [kl, dkd])
@pytest.mark.parametrize("scale", [0.0, 1e-20, 1.0, 1e4])
def test_equal_networks(inner, scale):
    fm, head = (torch.randn(1, 3, 4, 4) * scale).requires_grad_(), nn.Linear(3, 2)
    loss = SDD(inner)(fm, head, fm, head, torch.tensor([1]))
    assert loss.item() == pytest.approx(0, abs=1e-5)
    assert torch.autograd.grad(loss, fm)[0].abs().max() < 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("inner", [kl, dkd])
def test_saturated_logits(inner, dtype):
    """Every region sees the same map: the loss of the networks' own logits, gap apart."""
    gap, head = 200.0, nn.Linear(3, 3, bias=False).to(dtype)
    with torch.no_grad():
        head.weight.copy_(torch.eye(3))
    fm_s, fm_t = (gap * torch.eye(3)[[i]].to(dtype)[:, :, None, None] for i in (0, 1))
    fm_s, target = fm_s.expand(-1, -1, 4, 4).clone().requires_grad_(), torch.tensor([1])
    loss = SDD(partial(inner, T=1.0))(fm_s, head, fm_t, head, target)
    (grad,) = torch.autograd.grad(loss, fm_s)
    # the target against the rest: gap; the rest: uniform in the teacher, one peak in the student
    expected = gap if inner is kl else gap + 8 * (gap / 2 - math.log(2))
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert grad.isfinite().all() and grad.abs().max() < 10


def test_half_precision():
    fm_s, fm_t = torch.randn(4, 8, 4, 4).bfloat16(), torch.randn(4, 8, 4, 4).bfloat16()
    head, target = nn.Linear(8, 6), torch.tensor([0, 1, 2, 3])
    expected = SDD()(fm_s.float(), head, fm_t.float(), head, target).item()
    fm_s = fm_s.contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = SDD()(fm_s, head, fm_t, head, target)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected, rel=1e-5)
    loss = SDD()(fm_s, head.double(), fm_t, head, target)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_bad_input():
    fm, head, target = torch.zeros(2, 3, 4, 4), nn.Linear(3, 4), torch.zeros(2).long()
    for scales in ((), (2, 4), (1, 0)):
        with pytest.raises(ValueError, match="scales"):
            SDD(scales=scales)
    for fm_t, y in ((fm[:1], target), (fm, target[:1])):  # not a silent broadcast
        with pytest.raises(ValueError, match="batch"):
            SDD()(fm, head, fm_t, head, y)
    with pytest.raises(ValueError, match="classifier"):
        SDD()(fm, nn.Linear(5, 4), fm, head, target)
    with pytest.raises(ValueError, match="classes"):
        SDD()(fm, head, fm, nn.Linear(3, 5), target)
    with pytest.raises(ValueError, match="inner"):
        SDD(lambda out_s, out_t, target: (out_s - out_t).mean())(fm, head, fm, head, target)
