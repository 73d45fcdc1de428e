import math

import pytest
import torch
from torch import nn

from kd_losses.ofd import OFD, bn_margin
from reference import agree, agree_grads, cases

RTOL = 2e-8  # the reference counts the negatives in float32


def build(case, margin=None):
    c_s, c_t = case["in/fm_s"].shape[1], case["in/fm_t"].shape[1]
    ofd = OFD(c_s, c_t, margin).double()
    ofd.load_state_dict(case.group("param/zoo."), strict=margin is None)
    return ofd


def batch_norm(case):
    bn = nn.BatchNorm2d(case["in/fm_t"].shape[1]).double()
    bn.load_state_dict(case.group("param/alt_mdistiller.bn."), strict=False)
    return bn


@pytest.mark.parametrize("case", cases("ofd"))
def test_reference(case):
    ofd, fm_s = build(case), case.leaf("in/fm_s")
    loss = ofd(fm_s, case["in/fm_t"])
    agree(loss, case["loss"], RTOL)
    leaves = {"fm_s": fm_s, **dict(ofd.named_parameters())}
    agree_grads(loss, leaves, {"fm_s": case["grad/fm_s"], **case.group("grad_param/")}, RTOL)
    for name, value in case.group("after/").items():
        torch.testing.assert_close(ofd.state_dict()[name], value, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("case", cases("ofd"))
def test_given_margin(case):
    """The batch's own margin as a constant changes nothing; MDistiller sums over C, H, W."""
    loss = build(case, case["extra/margin"].flatten())(case["in/fm_s"], case["in/fm_t"])
    agree(loss, case["loss"], RTOL)
    agree(loss * case["in/fm_t"][0].numel(), case["alt_mdistiller/loss_with_zoo_margin"], RTOL)


@pytest.mark.parametrize("case", cases("ofd"))
def test_mdistiller(case):
    expected = case["alt_mdistiller/margin_float32"].flatten()
    margin = bn_margin(batch_norm(case))
    torch.testing.assert_close(margin.float(), expected.float(), rtol=2e-7, atol=0)
    # rounded to float32, as there
    ofd, fm_s = build(case, margin.float().double()), case.leaf("in/fm_s")
    loss = ofd(fm_s, case["in/fm_t"]) * case["in/fm_t"][0].numel()
    agree(loss, case["alt_mdistiller/loss"], RTOL)
    agree_grads(loss, {"fm_s": fm_s}, {"fm_s": case["alt_mdistiller/grad/fm_s"]}, RTOL)


def test_bn_margin():
    """The mean of a normal variable's negative part, by a sum; and the rule where it is rare."""
    bn = nn.BatchNorm2d(7).double()
    with torch.no_grad():
        bn.weight.copy_(torch.tensor([1.0, -0.5, 2.0, 1.0, 0.0, 0.0, 0.0]))
        bn.bias.copy_(torch.tensor([0.0, 1.0, -3.0, 3.2, -0.7, 0.7, 0.0]))
    expected = []
    for b, w in zip(bn.bias.tolist()[:3], bn.weight.abs().tolist()[:3]):
        grid = [b + w * (i / 1000) for i in range(-10000, 10000)]
        below = [(x, math.exp(-(((x - b) / w) ** 2) / 2)) for x in grid if x < 0]
        expected.append(sum(x * p for x, p in below) / sum(p for _, p in below))
    expected += [-3.0, -0.7, 0.0, 0.0]
    assert bn_margin(bn).tolist() == pytest.approx(expected, abs=2e-3)
    with pytest.raises(ValueError, match="weight"):
        bn_margin(nn.BatchNorm2d(3, affine=False))


def naive(ofd, fm_s, fm_t, margin):
    """The definition, entry by entry, with batch norm in training mode."""
    conv, bn = ofd.connector
    places = [
        (b, y, x)
        for b in range(fm_s.shape[0])
        for y in range(fm_s.shape[2])
        for x in range(fm_s.shape[3])
    ]
    total = 0.0
    for c in range(fm_t.shape[1]):
        s = [
            sum(
                conv.weight[c, i, 0, 0].item() * fm_s[b, i, y, x].item()
                for i in range(fm_s.shape[1])
            )
            for b, y, x in places
        ]
        mean = sum(s) / len(s)
        std = math.sqrt(sum((v - mean) ** 2 for v in s) / len(s) + bn.eps)
        t = [fm_t[b, c, y, x].item() for b, y, x in places]
        if margin is None:
            negative = [v for v in t if v < 0]
            m = sum(negative) / len(negative) if negative else 0.0
        else:
            m = margin[c].item()
        for s_v, t_v in zip(s, t):
            s_v = (s_v - mean) / std * bn.weight[c].item() + bn.bias[c].item()
            t_v = max(t_v, m)
            total += 0.0 if s_v <= t_v and t_v <= 0 else (s_v - t_v) ** 2
    return total / fm_t.numel()


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("c_s, c_t, size", [(3, 5, (3, 2)), (2, 1, (2, 2)), (1, 3, (1, 4))])
def test_naive(given, c_s, c_t, size):
    margin = -torch.rand(c_t).double() if given else None
    ofd = OFD(c_s, c_t, margin).double()
    with torch.no_grad():
        ofd.connector[1].weight.normal_()
        ofd.connector[1].bias.normal_()
    fm_s, fm_t = torch.randn(3, c_s, *size).double(), torch.randn(3, c_t, *size).double()
    fm_t[:, 0] = fm_t[:, 0].abs()  # a channel without a negative entry
    expected = naive(ofd, fm_s, fm_t, margin)
    assert ofd(fm_s, fm_t).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("train", [True, False])
def test_gradcheck(train):
    ofd = OFD(3, 2).double().train(train)
    fm_s, fm_t = torch.randn(2, 3, 2, 2).double(), torch.randn(2, 2, 2, 2).double()
    params = dict(ofd.named_parameters())

    def call(x, *values):
        # in training mode the value depends on no buffer, so that their moving is harmless
        return torch.func.functional_call(ofd, dict(zip(params, values)), (x, fm_t))

    assert torch.autograd.gradcheck(call, (fm_s.requires_grad_(), *params.values()))


@pytest.mark.parametrize(
    "fm_s, fm_t",
    [
        (torch.zeros(2, 3, 2, 2), torch.zeros(2, 3, 2, 2)),
        (torch.zeros(2, 3, 2, 2), torch.ones(2, 3, 2, 2)),
        (torch.ones(1, 3, 2, 2), -torch.ones(1, 3, 2, 2)),
        (torch.randn(2, 3, 1, 1), torch.randn(2, 3, 1, 1)),
    ],
)
def test_degenerate(fm_s, fm_t):
    ofd, fm_s, fm_t = OFD(3, 3), fm_s.requires_grad_(), fm_t.requires_grad_()
    loss = ofd(fm_s, fm_t)
    *grads, none = torch.autograd.grad(loss, (fm_s, *ofd.parameters(), fm_t), allow_unused=True)
    assert loss.isfinite() and all(grad.isfinite().all() for grad in grads) and none is None


def test_state():
    """The margin is a buffer when it is given, and nothing moves in eval mode."""
    assert "margin" not in OFD(3, 2).state_dict()
    given = torch.tensor([-0.5, -1.0])
    ofd = OFD(3, 2, given).eval()
    given.zero_()  # the caller's own
    before = {k: v.clone() for k, v in ofd.state_dict().items()}
    assert before["margin"].tolist() == [-0.5, -1.0]
    ofd(torch.randn(1, 3, 1, 1), torch.randn(1, 2, 1, 1))
    for name, value in ofd.state_dict().items():
        assert torch.equal(value, before[name])


def test_bad_input():
    with pytest.raises(ValueError, match="margins"):
        OFD(3, 2, torch.zeros(3))
    for shape in [(2, 2, 1, 1), (2, 1, 4, 4), (1, 2, 4, 4)]:  # not a silent broadcast
        with pytest.raises(ValueError, match=r"\(2, 2, 4, 4\)"):
            OFD(3, 2)(torch.zeros(2, 3, 4, 4), torch.zeros(shape))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        OFD(3, 2)(torch.zeros(1, 3, 1, 1), torch.zeros(1, 2, 1, 1))
