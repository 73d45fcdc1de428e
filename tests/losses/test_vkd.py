import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import orthogonal

from kd_losses.vkd import MAPS, VKD
from reference import agree, agree_grads, cases

WIDTHS = [(3, 6), (6, 3), (4, 4), (1, 3), (3, 1), (1, 1)]
SCALES = [0.0, 1e-20, 1e-12, 1e4]


def random(s, t, map="cayley", scale=1.0):
    """In float64, its parameter away from 0."""
    vkd = VKD(s, t, map).double()
    nn.init.normal_(vkd.weight, std=scale)
    nn.init.orthogonal_(vkd.base)  # to the digits of float64
    return vkd


def orthonormal(w, atol):
    """The smaller side's vectors."""
    w = w.T if w.shape[0] < w.shape[1] else w
    torch.testing.assert_close(w.T @ w, torch.eye(w.shape[1], dtype=w.dtype), rtol=0, atol=atol)


@pytest.mark.parametrize("case", cases("vkd"))
def test_reference(case):
    map = str(case.arrays["extra/map"]).removeprefix("_OrthMaps.")
    feat_s, feat_t = case.leaf("in/feat_s"), case["in/feat_t"]
    vkd = VKD(feat_s.shape[1], feat_t.shape[1], map).double()
    x, base = (case[f"param/parametrizations.weight.{name}"] for name in ("original", "0.base"))
    vkd.load_state_dict(dict(weight=x, base=base))
    w = vkd.projection()
    agree(w, case["extra/W"])
    loss = case.hyper["alpha"] * vkd(feat_s, feat_t)
    agree(loss, case["loss"])
    expected = case["grad_param/parametrizations.weight.original"]
    leaves = {"feat_s": feat_s, "weight": vkd.weight}
    agree_grads(loss, leaves, {"feat_s": case["grad/feat_s"], "weight": expected})
    # what reaches X is the stored gradient in W
    agree(torch.autograd.grad(w, vkd.weight, case["extra/grad_W"])[0], expected)


@pytest.mark.parametrize("map", MAPS)
@pytest.mark.parametrize("s, t", WIDTHS)
def test_torch_s_parametrisation(s, t, map):
    layer = orthogonal(nn.Linear(s, t, bias=False).double(), orthogonal_map=map)
    theirs = layer.parametrizations.weight
    vkd = VKD(s, t, map).double()
    x = torch.randn(max(s, t), min(s, t)).double()
    x.diagonal().sign_()  # as torch's Householder map needs it
    with torch.no_grad():
        vkd.weight.copy_(x)
        theirs.original.copy_(x.T if t < s else x)
        vkd.base.copy_(theirs[0].base)
    torch.testing.assert_close(vkd.projection(), layer.weight, rtol=1e-9, atol=1e-11)
    by = torch.randn(t, s).double()
    (expected,) = torch.autograd.grad(layer.weight, theirs.original, by)
    (grad,) = torch.autograd.grad(vkd.projection(), vkd.weight, by)
    torch.testing.assert_close(grad, expected.T if t < s else expected, rtol=1e-8, atol=1e-10)


def test_cayley_by_its_definition():
    vkd = random(3, 5)
    lower = torch.cat([vkd.weight.tril(), torch.zeros(5, 2).double()], 1)
    a, eye = lower - lower.T, torch.eye(5).double()
    q = torch.linalg.inv(eye - a / 2) @ (eye + a / 2)
    torch.testing.assert_close(vkd.projection(), vkd.base @ q[:, :3])


def naive(vkd, feat_s, feat_t):
    """Entry by entry."""
    w, total = vkd.projection().tolist(), 0.0
    for x, t in zip(feat_s.tolist(), feat_t.tolist()):
        mean = sum(t) / len(t)
        var = sum((value - mean) ** 2 for value in t) / len(t)
        for row, value in zip(w, t):
            diff = abs(sum(p * q for p, q in zip(row, x)) - (value - mean) / (var + 1e-5) ** 0.5)
            total += diff**2 / 2 if diff < 1 else diff - 0.5
    return total / feat_t.numel()


@pytest.mark.parametrize("b", [1, 4])
@pytest.mark.parametrize("s, t", WIDTHS)
def test_naive(s, t, b):
    vkd, feat_s = random(s, t), 2 * torch.randn(b, s).double()
    feat_t = 3 + torch.randn(b, t).double()
    assert vkd(feat_s, feat_t).item() == pytest.approx(naive(vkd, feat_s, feat_t), rel=1e-11)


@pytest.mark.parametrize("map", MAPS)
@pytest.mark.parametrize("s, t", [(3, 5), (4, 2), (3, 3)])
def test_gradcheck(s, t, map):
    vkd = random(s, t, map)
    feat_s, feat_t = torch.randn(2, s).double(), torch.randn(2, t).double()

    def call(x, weight):
        return torch.func.functional_call(vkd, {"weight": weight}, (x, feat_t))

    assert torch.autograd.gradcheck(call, (feat_s.requires_grad_(), vkd.weight))


def test_teacher_is_constant():
    feat_s, feat_t = torch.randn(4, 3).requires_grad_(), torch.randn(4, 5).requires_grad_()
    VKD(3, 5)(feat_s, feat_t).backward()
    assert feat_s.grad is not None and feat_t.grad is None


@pytest.mark.parametrize("map", MAPS)
@pytest.mark.parametrize("s, t", WIDTHS)
def test_orthonormal_whatever_the_parameter(s, t, map):
    for scale in (0.0, 1e-20, 1e-3, 1.0, 10.0):
        orthonormal(random(s, t, map, scale).projection(), 1e-12)
    orthonormal(random(s, t, map, 1e3).projection(), 1e-7)


@pytest.mark.parametrize("map", MAPS)
def test_start(map):
    """A random orthonormal matrix, another each time."""
    one, other = VKD(5, 8, map).projection(), VKD(5, 8, map).projection()
    orthonormal(one, 1e-6)
    assert (one - other).abs().max() > 0.1


@pytest.mark.parametrize("map", MAPS)
@pytest.mark.parametrize("s, t", [(5, 8), (8, 5), (6, 6)])
def test_weight_decay_keeps_it_orthonormal(s, t, map):
    """torch's Householder map truncates a diagonal of -0.99997 to 0, and the matrix is gone."""
    vkd, feat_s, feat_t = VKD(s, t, map), torch.randn(16, s), torch.randn(16, t)
    with torch.no_grad():
        vkd.weight.fill_diagonal_(-1.0)
    start, before = vkd(feat_s, feat_t).item(), vkd.projection().detach()
    optimizer = torch.optim.SGD(vkd.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    for _ in range(50):
        optimizer.zero_grad()
        (25 * vkd(feat_s, feat_t)).backward()
        optimizer.step()
    orthonormal(vkd.projection(), 1e-5)
    assert vkd(feat_s, feat_t).item() < start
    assert (vkd.projection() - before).abs().max() > 0.1


@pytest.mark.parametrize("map", MAPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs(dtype, map):
    """The projection keeps its own precision, under autocast too."""
    vkd, feat_s, feat_t = VKD(6, 8, map), torch.randn(4, 6).to(dtype), torch.randn(4, 8).to(dtype)
    nn.init.normal_(vkd.weight)
    exact = copy.deepcopy(vkd).double()
    expected = exact(feat_s.double(), feat_t.double()).float()
    torch.testing.assert_close(vkd(feat_s, feat_t), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = vkd(feat_s, feat_t)
    torch.testing.assert_close(loss, expected)
    (grad,) = torch.autograd.grad(loss, vkd.weight)
    assert grad.dtype == torch.float32 and grad.isfinite().all()


@pytest.mark.parametrize("scale_s, scale_t", list(itertools.product(SCALES, repeat=2)))
def test_degenerate(scale_s, scale_t):
    vkd = VKD(3, 4)
    feat_s, feat_t = (scale_s * torch.randn(2, 3)).requires_grad_(), scale_t * torch.randn(2, 4)
    for t in (feat_t, feat_t[:, :1].expand(2, 4)):
        loss = vkd(feat_s, t)
        grads = torch.autograd.grad(loss, (feat_s, vkd.weight))
        assert loss.isfinite() and all(grad.isfinite().all() for grad in grads)
    if scale_s == scale_t == 0:
        assert loss.item() == 0


def test_equal_to_the_teacher():
    """Nothing is left where the projected vector is the teacher's normalised one."""
    vkd, feat_t = random(4, 4), torch.randn(3, 4).double()
    feat_s = (nn.functional.layer_norm(feat_t, [4]) @ vkd.projection()).detach().requires_grad_()
    loss = vkd(feat_s, feat_t)
    (grad,) = torch.autograd.grad(loss, feat_s)
    assert loss.item() == pytest.approx(0, abs=1e-25) and grad.abs().max() < 1e-12


def test_bad_input():
    feat_s, feat_t = torch.zeros(3, 2), torch.zeros(3, 4)
    with pytest.raises(ValueError, match="qr"):
        VKD(2, 4, "qr")
    for s, t in ((feat_s[:1], feat_t), (feat_s, feat_t[:, :1]), (feat_s[:, :1], feat_t)):
        with pytest.raises(ValueError, match="vectors"):
            VKD(2, 4)(s, t)
