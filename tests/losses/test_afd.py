import math

import pytest
import torch

from kd_losses.afd import AFD
from reference import agree, agree_grads, cases


@pytest.mark.parametrize("case", cases("afd"))
def test_reference(case):
    fm_s, fm_t = case.leaf("in/fm_s"), case["in/fm_t"]
    afd = AFD(fm_t.shape[1], **case.hyper).double()
    afd.load_state_dict(case.group("param/"))
    agree(afd.rho(fm_t), case["extra/rho"])
    loss = afd(fm_s, fm_t)
    agree(loss, case["loss"])
    leaves = {"fm_s": fm_s, **dict(afd.named_parameters())}
    agree_grads(loss, leaves, {"fm_s": case["grad/fm_s"], **case.group("grad_param/")})


def test_the_fast_distance_is_the_plain_one():
    """In value and gradient; a channel of zeros in the teacher's map too."""
    afd = AFD(3).double()
    fm_s, fm_t = (torch.randn(2, 3, 4, 5).double() for _ in "st")
    fm_t[0, 1] = 0
    fm_s.requires_grad_()
    plain, fast = afd.distance(fm_s, fm_t), afd._fast_distance(fm_s, fm_t)
    assert plain.shape == (2, 3)
    torch.testing.assert_close(fast, plain, rtol=1e-10, atol=1e-12)
    weight = torch.randn(2, 3).double()
    grads = [torch.autograd.grad((weight * x).sum(), fm_s)[0] for x in (plain, fast)]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)


def naive_rho(afd, sample):
    """The attention of one sample, neuron by neuron; a sample is a list of flat channels."""
    first, _, second = afd.attention
    b_1 = first.bias.tolist()
    w_1, w_2 = first.weight.flatten(1).tolist(), second.weight.flatten(1).tolist()

    def hidden(inputs):
        return [max(sum(w * v for w, v in zip(row, inputs)) + b, 0.0) for row, b in zip(w_1, b_1)]

    if afd.size is None:
        middle = hidden([sum(channel) / len(channel) for channel in sample])
        z = [
            sum(w * v for w, v in zip(row, middle)) + b for row, b in zip(w_2, second.bias.tolist())
        ]
    else:
        z = [
            sum(w * v for w, v in zip(w_2[0], hidden(channel))) + b
            for channel, b in zip(sample, afd.bias.tolist())
        ]
    share = [1 / (1 + math.exp(-v)) for v in z]
    return [v / sum(share) for v in share]


def naive(afd, fm_s, fm_t):
    """The definition, sample by sample and channel by channel."""

    def normalised(channel):
        norm = math.sqrt(sum(v * v for v in channel)) + afd.eps
        return [v / norm for v in channel]

    total = 0.0
    for sample_s, sample_t in zip(fm_s.flatten(2).tolist(), fm_t.flatten(2).tolist()):
        for rho, s, t in zip(naive_rho(afd, sample_t), sample_s, sample_t):
            pairs = list(zip(normalised(s), normalised(t)))
            total += rho * sum((a - b) ** 2 for a, b in pairs) / len(pairs)
    return total / len(fm_s)


def build(channels, size, original):
    """With parameters that all matter."""
    afd = AFD(channels, 0.5 if channels > 1 else 1.0, size if original else None).double()
    with torch.no_grad():
        for parameter in afd.parameters():
            parameter.normal_()
    return afd


@pytest.mark.parametrize("original", [False, True])
@pytest.mark.parametrize(
    "batch, channels, size", [(3, 4, (3, 2)), (1, 1, (1, 1)), (1, 3, (2, 2)), (2, 1, (2, 5))]
)
def test_naive(original, batch, channels, size):
    afd = build(channels, size, original)
    fm_s = torch.randn(batch, channels, *size).double()
    fm_t = torch.randn(batch, channels, *size).double()
    assert afd(fm_s, fm_t).item() == pytest.approx(naive(afd, fm_s, fm_t), rel=1e-10)


@pytest.mark.parametrize("original", [False, True])
def test_gradcheck(original):
    afd = build(3, (2, 2), original)
    fm_s, fm_t = torch.randn(2, 3, 2, 2).double(), torch.randn(2, 3, 2, 2).double()
    params = dict(afd.named_parameters())

    def call(x, *values):
        return torch.func.functional_call(afd, dict(zip(params, values)), (x, fm_t))

    assert torch.autograd.gradcheck(call, (fm_s.requires_grad_(), *params.values()))


@pytest.mark.parametrize("original", [False, True])
@pytest.mark.parametrize("batch, channels, size", [(1, 1, (1, 1)), (1, 4, (3, 3)), (3, 4, (3, 3))])
def test_degenerate(original, batch, channels, size):
    afd = AFD(channels, size=size if original else None)
    some = torch.randn(batch, channels, *size)
    dead = some.clone()
    dead[0, 0] = 0
    for fm_s, fm_t in [(0 * some, 0 * some), (0 * some, some), (dead, some), (some, dead)]:
        fm_s.requires_grad_(), fm_t.requires_grad_()
        loss = afd(fm_s, fm_t)
        grad, *grads, none = torch.autograd.grad(
            loss, (fm_s, *afd.parameters(), fm_t), allow_unused=True
        )
        assert loss.isfinite() and all(grad.isfinite().all() for grad in grads) and none is None
        assert grad.abs().max() < 10  # not 1 / eps
    equal = some.clone().requires_grad_()
    loss = afd(equal, some)
    (grad,) = torch.autograd.grad(loss, equal)
    assert loss == 0 and grad.abs().max() < 1e-6


def test_attention_of_vanishing_sigmoids():
    """All sigmoids underflow; their shares do not."""
    afd = AFD(2)
    with torch.no_grad():
        afd.attention[2].weight.zero_()
        afd.attention[2].bias.copy_(torch.tensor([-200.0, -200.0 - math.log(3)]))
    torch.testing.assert_close(afd.rho(torch.randn(1, 2, 2, 2)), torch.tensor([[0.75, 0.25]]))


def test_bad_input():
    with pytest.raises(ValueError, match="att_f"):
        AFD(4, 0.2)
    with pytest.raises(ValueError, match="3 channels"):  # not a silent broadcast
        AFD(3)(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 1, 1))
    with pytest.raises(ValueError, match="3 channels"):
        AFD(3, size=(4, 4))(torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 4, 4))
    with pytest.raises(ValueError, match=r"\(2, 8\)"):
        AFD(3, size=(4, 4))(torch.zeros(2, 3, 2, 8), torch.zeros(2, 3, 2, 8))
