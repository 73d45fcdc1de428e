import copy
import itertools
import math

import pytest
import torch

from kd_losses.ickd import ICKD
from reference import agree, agree_grads, cases

SCALES = [0.0, 1e-20, 1e-12, 1.0, 1e4]

NAMES = {"embed.0": "embed_s.conv2d", "embed.1": "embed_s.l2norm"}


def named(arrays):
    """The reference's arrays by this class's names."""
    return {
        f"{mine}.{k.removeprefix(theirs + '.')}": value
        for mine, theirs in NAMES.items()
        for k, value in arrays.items()
        if k.startswith(theirs)
    }


@pytest.mark.parametrize("case", cases("ickd"))
def test_reference(case):
    fm_s, fm_t = case.leaf("in/fm_s"), case["in/fm_t"]
    ickd = ICKD(fm_s.shape[1], fm_t.shape[1]).double()
    ickd.load_state_dict(named(case.group("param/")))
    agree(ickd.correlation(fm_t), case["extra/gram_t"])
    loss = ickd(fm_s, fm_t)
    agree(loss, case["loss"])
    leaves = {"fm_s": fm_s, **dict(ickd.named_parameters())}
    expected = {"fm_s": case["grad/fm_s"], **named(case.group("grad_param/"))}
    agree_grads(loss, leaves, expected)
    for name, value in named(case.group("after/")).items():
        torch.testing.assert_close(ickd.state_dict()[name], value, rtol=1e-9, atol=1e-15)
    agree(ickd.correlation(ickd.embed(fm_s)), case["extra/gram_s"])


def naive(ickd, fm_s, fm_t):
    """Channel by channel, with batch norm in training mode."""
    weight, norm = ickd.embed[0].weight[:, :, 0, 0].tolist(), ickd.embed[1]
    b, x_s, x_t = len(fm_s), fm_s.flatten(2).tolist(), fm_t.flatten(2).tolist()
    e = [[] for _ in range(b)]
    for c, row in enumerate(weight):
        raw = [[sum(w * x for w, x in zip(row, pixel)) for pixel in zip(*x_s[i])] for i in range(b)]
        flat = [x for sample in raw for x in sample]
        mean = sum(flat) / len(flat)
        std = math.sqrt(sum((x - mean) ** 2 for x in flat) / len(flat) + norm.eps)
        for i in range(b):
            scale, shift = norm.weight[c].item(), norm.bias[c].item()
            e[i].append([(x - mean) / std * scale + shift for x in raw[i]])

    def rows(f):
        gram = [[sum(p * q for p, q in zip(x, y)) for y in f] for x in f]
        return [[v / math.sqrt(sum(u * u for u in row)) for v in row] for row in gram]

    total = 0.0
    for i in range(b):
        for row_s, row_t in zip(rows(e[i]), rows(x_t[i])):
            total += sum((p - q) ** 2 for p, q in zip(row_s, row_t))
    return total / (b * len(weight))


@pytest.mark.parametrize("s, t, size_s, size_t", [(3, 5, (3, 2), (3, 2)), (4, 2, (2, 2), (1, 3))])
@pytest.mark.parametrize("b", [1, 3])
def test_naive(b, s, t, size_s, size_t):
    ickd = ICKD(s, t).double()
    with torch.no_grad():
        ickd.embed[1].weight.normal_()
        ickd.embed[1].bias.normal_()
    fm_s, fm_t = torch.randn(b, s, *size_s).double(), torch.randn(b, t, *size_t).double()
    assert ickd(fm_s, fm_t).item() == pytest.approx(naive(ickd, fm_s, fm_t), rel=1e-10)


@pytest.mark.parametrize("train", [True, False])
def test_gradcheck(train):
    ickd = ICKD(3, 2).double().train(train)
    fm_s, fm_t = torch.randn(2, 3, 2, 2).double(), torch.randn(2, 2, 3, 1).double()
    params = dict(ickd.named_parameters())

    def call(x, *values):
        return torch.func.functional_call(ickd, dict(zip(params, values)), (x, fm_t))

    assert torch.autograd.gradcheck(call, (fm_s.requires_grad_(), *params.values()))


def test_teacher_is_constant():
    fm_s, fm_t = torch.randn(2, 3, 2, 2).requires_grad_(), torch.randn(2, 4, 3, 3).requires_grad_()
    ICKD(3, 4)(fm_s, fm_t).backward()
    assert fm_s.grad is not None and fm_t.grad is None


def test_scale_of_the_teacher_is_no_matter():
    ickd, fm_s, fm_t = ICKD(3, 4), torch.randn(2, 3, 2, 2), torch.randn(2, 4, 2, 2)
    torch.testing.assert_close(ickd(fm_s, 1e4 * fm_t), ickd(fm_s, fm_t))


def test_zero_maps_and_channels():
    ickd, fm_t = ICKD(3, 4), torch.randn(2, 4, 2, 2)
    zero = torch.zeros(2, 3, 2, 2, requires_grad=True)
    loss = ickd(zero, fm_t)  # every row of G_t has norm 1
    assert loss.item() == pytest.approx(1)
    assert torch.autograd.grad(loss, zero)[0].count_nonzero() == 0
    assert ickd(zero, 0 * fm_t).item() == 0
    dead = ickd.correlation(fm_t * torch.tensor([1.0, 0, 1, 1])[:, None, None])
    assert dead[:, 1].count_nonzero() == dead[:, :, 1].count_nonzero() == 0
    torch.testing.assert_close(dead[:, [0, 2, 3]].norm(dim=2), torch.ones(2, 3))


def test_gradient_of_a_dead_channel():
    """Divided by no norm: as large as batch norm, whose least deviation is 0.003, makes it."""
    ickd, fm_s = ICKD(3, 4), torch.randn(2, 3, 2, 2)
    with torch.no_grad():
        ickd.embed[0].weight[1] = 0
    ickd(fm_s, torch.randn(2, 4, 2, 2)).backward()
    grad = ickd.embed[0].weight.grad[1]
    assert 0 < grad.abs().max() < 1e4


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("scale_s, scale_t", list(itertools.product(SCALES, repeat=2)))
def test_degenerate(scale_s, scale_t, size):
    ickd = ICKD(3, 4)
    raw, fm_t = torch.randn(3, 3, size, size).requires_grad_(), torch.randn(3, 4, size, size)
    for fm_s in (raw, raw[:1].expand_as(raw), raw[[0, 0, 1]], torch.ones_like(raw) * raw[0, 0, 0]):
        loss = ickd(scale_s * fm_s, scale_t * fm_t)
        grads = torch.autograd.grad(loss, (raw, *ickd.parameters()))
        assert loss.isfinite() and all(grad.isfinite().all() for grad in grads)
        assert all(grad.abs().max() < 1e6 for grad in grads)


def test_nothing_moves_in_eval_mode():
    ickd = ICKD(3, 4).eval()
    before = copy.deepcopy(ickd.state_dict())
    assert ickd(torch.randn(1, 3, 1, 1), torch.randn(1, 4, 1, 1)).isfinite()
    torch.testing.assert_close(ickd.state_dict(), before, rtol=0, atol=0)


def test_bad_input():
    fm_s, fm_t = torch.zeros(2, 3, 2, 2), torch.zeros(2, 4, 2, 2)
    for s, t in (
        (fm_s[:1], fm_t),
        (fm_s[:, :1], fm_t),
        (fm_s, fm_t[:, :1]),  # not a silent broadcast
        (fm_s[..., 0, 0], fm_t),
        (fm_s, fm_t[..., 0, 0]),
    ):
        with pytest.raises(ValueError, match="maps"):
            ICKD(3, 4)(s, t)
    with pytest.raises(ValueError, match="samples"):
        ICKD(3, 4)(fm_s[:1, :, :1, :1], fm_t[:1])
