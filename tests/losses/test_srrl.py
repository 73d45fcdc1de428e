import copy

import pytest
import torch
from torch import nn

from kd_losses.srrl import SRRL
from reference import agree, agree_grads, cases


def build(case, form, weight=1.0):
    c_s, c_t = case["in/fm_s"].shape[1], case["in/fm_t"].shape[1]
    srrl = SRRL(c_s, c_t, weight, form).double()
    params = {f"projector.{k}": v for k, v in case.group("param/Connectors.").items()}
    srrl.load_state_dict(params)
    return srrl, linear(case["in/fc_weight"], case["in/fc_bias"])


def linear(weight, bias):
    layer = nn.Linear(*weight.shape[::-1]).to(weight.dtype).requires_grad_(False)
    layer.load_state_dict(dict(weight=weight, bias=bias))
    return layer


@pytest.mark.parametrize("case", cases("srrl"))
def test_reference(case):
    srrl, classifier = build(case, "map", case.hyper["weight"])
    fm_s, feat_t, out_t = case.leaf("in/fm_s"), case["in/fm_t"].mean((2, 3)), case["extra/out_t"]
    agree(srrl.projector(fm_s), case["extra/projected"])
    srrl, _ = build(case, "map", case.hyper["weight"])
    loss = srrl(fm_s, feat_t, out_t, classifier)
    agree(loss, case["loss"])
    leaves = {"fm_s": fm_s, **dict(srrl.projector.named_parameters())}
    expected = {"fm_s": case["grad/fm_s"], **case.group("grad_param/Connectors.")}
    agree_grads(loss, leaves, expected)
    for name, value in case.group("after/Connectors.").items():
        torch.testing.assert_close(srrl.projector.state_dict()[name], value, rtol=1e-9, atol=1e-15)
    for weight, key in ((0.0, "extra/fm_loss"), (5.0, "alt_cls_kd/loss")):
        agree(build(case, "map", weight)[0](fm_s, feat_t, out_t, classifier), case[key])


@pytest.mark.parametrize("case", cases("srrl"))
def test_reference_pooled(case):
    srrl, classifier = build(case, "pooled")
    feat_s, feat_t = case.leaf("pooled/feat_s"), case["in/fm_t"].mean((2, 3))
    loss = srrl(feat_s, feat_t, case["extra/out_t"], classifier)
    agree(loss, case["pooled/loss"])
    leaves = {"feat_s": feat_s, **dict(srrl.projector.named_parameters())}
    grads = case.group("pooled/grad_param/transfer.")
    agree_grads(loss, leaves, {"feat_s": case["pooled/grad/feat_s"], **grads})


def naive(srrl, x_s, feat_t, out_t, classifier):
    """Number by number, with batch norm in training mode."""
    w, norm = srrl.projector[0].weight[:, :, 0, 0].tolist(), srrl.projector[1]
    fm_s = x_s if x_s.dim() == 4 else x_s[:, :, None, None]
    b, _, height, width = fm_s.shape
    v = [[0.0] * len(w) for _ in range(b)]
    for d in range(len(w)):
        x = [
            [sum(a * c for a, c in zip(w[d], fm_s[i, :, y, z].tolist()))]
            for i in range(b)
            for y in range(height)
            for z in range(width)
        ]
        x = [value for (value,) in x]
        mean = sum(x) / len(x)
        var = sum((value - mean) ** 2 for value in x) / len(x)
        for j, value in enumerate(x):
            value = (value - mean) / (var + norm.eps) ** 0.5
            value = value * norm.weight[d].item() + norm.bias[d].item()
            v[j // (height * width)][d] += max(value, 0.0) / (height * width)
    features = logits = 0.0
    for i in range(b):
        features += sum((p - q) ** 2 for p, q in zip(v[i], feat_t[i].tolist())) / feat_t.numel()
        for k, (row, bias) in enumerate(zip(classifier.weight.tolist(), classifier.bias.tolist())):
            z = sum(p * q for p, q in zip(row, v[i])) + bias
            logits += (z - out_t[i, k].item()) ** 2 / out_t.numel()
    return features + srrl.weight * logits


@pytest.mark.parametrize("form, weight", [("map", 1.0), ("map", 0.3), ("pooled", 2.0)])
@pytest.mark.parametrize("b, s, t, k", [(2, 3, 5, 2), (4, 2, 1, 7)])
def test_naive(b, s, t, k, form, weight):
    srrl, classifier = SRRL(s, t, weight, form).double(), nn.Linear(t, k).double()
    with torch.no_grad():
        srrl.projector[1].weight.normal_()
        srrl.projector[1].bias.normal_()
    x_s = torch.randn(b, s, *[3, 2][: 2 * (form == "map")]).double()
    feat_t, out_t = torch.randn(b, t).double(), torch.randn(b, k).double()
    expected = naive(srrl, x_s, feat_t, out_t, classifier)
    assert srrl(x_s, feat_t, out_t, classifier).item() == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize("form", ["map", "pooled"])
def test_gradcheck(form):
    srrl, classifier = SRRL(3, 4, 2.0, form).double(), nn.Linear(4, 5).double()
    x_s = torch.randn(3, 3, *[2, 2][: 2 * (form == "map")]).double()
    feat_t, out_t = torch.randn(3, 4).double(), torch.randn(3, 5).double()
    params = dict(srrl.named_parameters())

    def call(x, *values):
        named = dict(zip(params, values))
        return torch.func.functional_call(srrl, named, (x, feat_t, out_t, classifier))

    assert torch.autograd.gradcheck(call, (x_s.requires_grad_(), *params.values()))


def test_classifier_is_a_constant():
    """It is nobody's part, keeps its weights and gets no gradient, frozen or not; v gets its."""
    srrl = SRRL(3, 4)
    classifier = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5))
    before = copy.deepcopy(classifier.state_dict())
    feat_t, out_t = torch.randn(2, 4).requires_grad_(), torch.randn(2, 5).requires_grad_()
    fm_s = torch.randn(2, 3, 2, 2)
    srrl(fm_s, feat_t, out_t, classifier).backward()
    assert all(p.grad is None for p in (*classifier.parameters(), feat_t, out_t))
    assert all(p.requires_grad for p in classifier.parameters())
    torch.testing.assert_close(classifier.state_dict(), before, rtol=0, atol=0)
    assert {name.split(".")[0] for name in srrl.state_dict()} == {"projector"}
    whole = srrl.projector[0].weight.grad.clone()
    srrl.zero_grad()
    srrl.weight = 0.0
    srrl(fm_s, feat_t, out_t, classifier).backward()
    assert not torch.allclose(whole, srrl.projector[0].weight.grad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_classifier_of_another_precision(dtype):
    srrl, classifier = SRRL(3, 4), nn.Linear(4, 5)
    x = torch.randn(2, 3, 2, 2), torch.randn(2, 4), torch.randn(2, 5)
    expected = srrl(*x, classifier)
    loss = srrl(*x, copy.deepcopy(classifier).to(dtype))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-2, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(srrl(*x, classifier), expected, rtol=1e-2, atol=0)


def test_start():
    """As in the authors' code, and for the pooled form as in torch."""
    torch.testing.assert_close(
        SRRL(400, 50).projector[0].weight.std(), torch.tensor(0.2), rtol=0.02, atol=0
    )
    assert SRRL(400, 50, form="pooled").projector[0].weight.abs().max() <= 0.05


@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e-12, 1e4])
@pytest.mark.parametrize("form", ["map", "pooled"])
def test_degenerate(form, scale):
    srrl, classifier = SRRL(3, 4, form=form), nn.Linear(4, 2)
    shape = (3, 3, 1, 1) if form == "map" else (3, 3)
    x_s, feat_t = (scale * torch.randn(shape)).requires_grad_(), scale * torch.randn(3, 4)
    out_t = 200 * torch.eye(2)[[0, 1, 0]]
    loss = srrl(x_s, feat_t, out_t, classifier)
    grads = torch.autograd.grad(loss, (x_s, *srrl.parameters()))
    assert loss.isfinite() and all(grad.isfinite().all() for grad in grads)
    if scale == 0:  # v is 0: the classifier's bias alone answers
        expected = (classifier.bias - out_t).square().mean()
        torch.testing.assert_close(loss, expected)


def test_nothing_moves_in_eval_mode():
    srrl = SRRL(3, 4, form="pooled").eval()
    before = copy.deepcopy(srrl.state_dict())
    loss = srrl(torch.randn(1, 3), torch.randn(1, 4), torch.randn(1, 5), nn.Linear(4, 5))
    assert loss.isfinite()
    torch.testing.assert_close(srrl.state_dict(), before, rtol=0, atol=0)


def test_bad_input():
    fm, feat, feat_t, out = (torch.zeros(2, *x) for x in ((3, 4, 4), (3,), (4,), (5,)))
    fc = nn.Linear(4, 5)
    with pytest.raises(ValueError, match="form"):
        SRRL(3, 4, form="maps")
    with pytest.raises(ValueError, match="weight"):
        SRRL(3, 4, weight=-1.0)
    for x_s, t in ((feat, feat_t), (fm[:, :2], feat_t), (fm[:1], feat_t), (fm, feat_t[:, :1])):
        with pytest.raises(ValueError, match="3 channels"):
            SRRL(3, 4)(x_s, t, out, fc)
    with pytest.raises(ValueError, match="3 channels"):
        SRRL(3, 4, form="pooled")(fm, feat_t, out, fc)
    with pytest.raises(ValueError, match="logits"):  # not a silent broadcast
        SRRL(3, 4)(fm, feat_t, out[:, :1], fc)
    with pytest.raises(ValueError, match="samples"):
        SRRL(3, 4, form="pooled")(feat[:1], feat_t[:1], out[:1], fc)
    with pytest.raises(ValueError, match="samples"):
        SRRL(3, 4)(fm[:1, :, :1, :1], feat_t[:1], out[:1], fc)
