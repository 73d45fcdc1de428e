import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kd_losses.simkd import SimKD
from reference import agree, agree_grads, cases


def build(case):
    c_s, (c_t, side) = case["in/fm_s"].shape[1], case["in/fm_t"].shape[1:3]
    simkd = SimKD(c_s, c_t, case.hyper["factor"], side).double()
    params = case.group("param/transfer.")
    simkd.load_state_dict({f"projector.{name}": value for name, value in params.items()})
    return simkd


@pytest.mark.parametrize("case", cases("simkd"))
def test_reference(case):
    simkd, fm_s = build(case), case.leaf("in/fm_s")
    loss = simkd(fm_s, case["in/fm_t"])
    agree(loss, case["loss"])
    leaves = {"fm_s": fm_s, **dict(simkd.projector.named_parameters())}
    expected = {"fm_s": case["grad/fm_s"], **case.group("grad_param/transfer.")}
    agree_grads(loss, leaves, expected)
    for name, value in case.group("after/transfer.").items():
        torch.testing.assert_close(simkd.projector.state_dict()[name], value, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("case", cases("simkd"))
def test_reference_prediction(case):
    simkd = build(case)
    agree(simkd.project(case["in/fm_s"], case["in/fm_t"].shape[2:]), case["extra/trans_feat_s"])
    classifier = nn.Linear(*case["in/fc_weight"].shape[::-1]).double()
    classifier.load_state_dict(dict(weight=case["in/fc_weight"], bias=case["in/fc_bias"]))
    logits = simkd.predict(case["in/fm_s"], classifier)
    agree(logits, case["extra/logit_s"])
    ce = F.cross_entropy(logits, case["in/target"])
    agree(ce + simkd(case["in/fm_s"], case["in/fm_t"]), case["extra/loss_plus_ce"])


def pool(fm, size):
    """Windows from floor(i H / h) to ceil((i + 1) H / h), averaged one by one."""
    rows, columns = ((n, fm.shape[2 + i]) for i, n in enumerate(size))
    result = fm.new_empty(*fm.shape[:2], *size)
    for i in range(size[0]):
        for j in range(size[1]):
            (h, height), (w, width) = rows, columns
            top, bottom = i * height // h, -(-(i + 1) * height // h)
            left, right = j * width // w, -(-(j + 1) * width // w)
            for b in range(len(fm)):
                for c in range(fm.shape[1]):
                    result[b, c, i, j] = fm[b, c, top:bottom, left:right].mean()
    return result


def naive_layer(fm, conv, norm):
    """Convolution, batch norm in training mode and ReLU, pixel by pixel."""
    w, edge = conv.weight.detach(), conv.kernel_size[0] // 2
    b, _, height, width = fm.shape
    result = fm.new_zeros(b, len(w), height, width)
    for i in range(b):
        for y in range(height):
            for x in range(width):
                for dy in range(-edge, edge + 1):
                    for dx in range(-edge, edge + 1):
                        if 0 <= y + dy < height and 0 <= x + dx < width:
                            pixel = fm[i, :, y + dy, x + dx]
                            result[i, :, y, x] += w[:, :, dy + edge, dx + edge] @ pixel
    for c in range(len(w)):
        x = result[:, c]
        mean = x.sum() / x.numel()
        var = (x - mean).square().sum() / x.numel()
        result[:, c] = (x - mean) / (var + norm.eps).sqrt() * norm.weight[c] + norm.bias[c]
    return result.clamp(min=0).detach()


@pytest.mark.parametrize("size_s, size_t", [((2, 3), (2, 3)), ((5, 4), (2, 3)), ((2, 2), (3, 4))])
@pytest.mark.parametrize("factor", [1, 2, 4])
def test_naive(factor, size_s, size_t):
    simkd = SimKD(3, 4, factor).double()
    assert [m.out_channels for m in simkd.projector[::3]] == [4 // factor, 4 // factor, 4]
    with torch.no_grad():
        for norm in simkd.projector[1::3]:
            norm.weight.normal_()
            norm.bias.normal_()
    fm_s, fm_t = torch.randn(2, 3, *size_s).double(), torch.randn(2, 4, *size_t).double()
    size = [min(pair) for pair in zip(size_s, size_t)]
    x, t = pool(fm_s, size), pool(fm_t, size)
    for i in (0, 3, 6):
        x = naive_layer(x, simkd.projector[i], simkd.projector[i + 1])
    expected = sum((p - q) ** 2 for p, q in zip(x.flatten().tolist(), t.flatten().tolist()))
    assert simkd(fm_s, fm_t).item() == pytest.approx(expected / t.numel(), rel=1e-11)


@pytest.mark.parametrize("train", [True, False])
def test_gradcheck(train):
    simkd = SimKD(2, 4).double().train(train)
    with torch.no_grad():
        for norm in simkd.projector[1::3]:
            norm.bias.normal_()  # a ReLU at 0 has no derivative
    fm_s, fm_t = torch.randn(3, 2, 4, 4).double(), torch.randn(3, 4, 2, 2).double()
    params = dict(simkd.named_parameters())

    def call(x, *values):
        return torch.func.functional_call(simkd, dict(zip(params, values)), (x, fm_t))

    assert torch.autograd.gradcheck(call, (fm_s.requires_grad_(), *params.values()))


def test_teacher_is_constant():
    fm_s, fm_t = torch.randn(2, 3, 2, 2).requires_grad_(), torch.randn(2, 4, 3, 3).requires_grad_()
    SimKD(3, 4)(fm_s, fm_t).backward()
    assert fm_s.grad is not None and fm_t.grad is None


def test_prediction_pools_as_the_loss_does():
    """Without a teacher, by its size; the student's own where it is not larger."""
    fm, classifier = torch.randn(2, 3, 6, 4), nn.Linear(4, 5)
    pair, side, none = SimKD(3, 4, t_size=(3, 2)), SimKD(3, 4, t_size=8), SimKD(3, 4)
    for simkd in (side, none):
        simkd.load_state_dict(pair.state_dict())
    pooled = F.avg_pool2d(fm, 2)
    same = [pair.eval().predict(x, classifier) for x in (fm, pooled)]
    torch.testing.assert_close(*same)
    own = [simkd.eval().predict(fm, classifier) for simkd in (side, none)]
    torch.testing.assert_close(*own)
    assert not torch.allclose(own[0], same[0])
    assert "classifier" not in dict(pair.named_modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_prediction_in_half_precision(dtype):
    simkd, classifier, fm = SimKD(3, 4).eval(), nn.Linear(4, 5), torch.randn(2, 3, 4, 4)
    expected = simkd.predict(fm, classifier)
    half = fm.to(dtype).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(simkd.predict(half, classifier), expected, rtol=0, atol=2e-2)


@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e-12, 1e4])
def test_degenerate(scale):
    simkd = SimKD(3, 4)
    fm_s, fm_t = (scale * torch.randn(2, 3, 1, 1)).requires_grad_(), torch.randn(2, 4, 1, 1)
    loss = simkd(fm_s, fm_t)
    grads = torch.autograd.grad(loss, (fm_s, *simkd.parameters()))
    assert loss.isfinite() and all(grad.isfinite().all() for grad in grads)
    if scale == 0:  # projected to 0
        torch.testing.assert_close(loss, fm_t.square().mean())
    assert simkd(fm_s[:1].expand(2, 3, 2, 2), fm_t[:1].expand(2, 4, 2, 2)).isfinite()


def test_nothing_moves_in_eval_mode():
    simkd = SimKD(3, 4, t_size=1).eval()
    before = copy.deepcopy(simkd.state_dict())
    assert simkd(torch.randn(1, 3, 2, 2), torch.randn(1, 4, 1, 1)).isfinite()
    simkd.predict(torch.randn(1, 3, 2, 2), nn.Linear(4, 5))
    torch.testing.assert_close(simkd.state_dict(), before, rtol=0, atol=0)


def test_bad_input():
    fm_s, fm_t = torch.zeros(2, 3, 2, 2), torch.zeros(2, 4, 2, 2)
    for factor in (0, 5):  # a projector without channels
        with pytest.raises(ValueError, match="factor"):
            SimKD(3, 4, factor)
    for t in (fm_t[:1], fm_t[:, :1], fm_t[:, :, 0, 0]):  # not a silent broadcast
        with pytest.raises(ValueError, match="teacher.*map"):
            SimKD(3, 4)(fm_s, t)
    for s in (fm_s[:, :2], fm_s[:, :, 0, 0]):
        with pytest.raises(ValueError, match="student.*map"):
            SimKD(3, 4)(s, fm_t)
    with pytest.raises(ValueError, match=r"\(4, 4\)"):
        SimKD(3, 4, t_size=4)(fm_s, fm_t)
    with pytest.raises(ValueError, match="samples"):
        SimKD(3, 4)(fm_s[:1], fm_t[:1, :, :1, :1])
