import math

import pytest
import torch

from kd_losses.reviewkd import ABF, ReviewKD, hcl
from reference import agree, agree_grads, cases


def levels(case, name):
    """The maps `name0`, `name1`, ... of a case."""
    return [case[f"in/{name}{i}"] for i in range(4) if f"in/{name}{i}" in case]


@pytest.mark.parametrize("case", cases("reviewkd"))
def test_reference_hcl(case):
    fms_s = [x.requires_grad_() for x in levels(case, "fs")]
    loss = hcl(fms_s, levels(case, "ft"))
    agree(loss, case["loss"])
    agree(loss, case["alt_reviewkd_official/loss"])
    agree_grads(loss, {f"fs{i}": x for i, x in enumerate(fms_s)}, case.group("grad/"))


@pytest.mark.parametrize("case", cases("reviewkd"))
def test_reference_fusion(case):
    hyper, x, y = case.hyper["abf"], case.leaf("in/abf_x"), case.leaf("in/abf_y")
    target = case["in/abf_target"]
    abf = ABF(hyper["in"], hyper["mid"], hyper["out"], fuse=True).double()
    abf.load_state_dict(case.group("param/abf."))
    out, fused = abf(x, y, target.shape[2:])
    agree(out, case["abf/out"])
    agree(fused, case["abf/residual"])
    loss = hcl([out], [target])
    agree(loss, case["abf/loss"])
    leaves = {"abf_x": x, "abf_y": y, **dict(abf.named_parameters())}
    agree_grads(loss, leaves, {**case.group("abf/grad/"), **case.group("abf/grad_param/")})
    for name, value in case.group("abf/after/").items():
        torch.testing.assert_close(abf.state_dict()[name], value, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("case", cases("reviewkd"))
def test_reference_chain(case):
    hyper = case.hyper["chain"]
    mid_channel = case["param/chain.abfs.0.conv1.0.weight"].shape[0]
    reviewkd = ReviewKD(hyper["in_channels"], hyper["out_channels"], mid_channel).double()
    reviewkd.load_state_dict(case.group("param/chain."))
    leaves = {f"chain_fs{i}": x.requires_grad_() for i, x in enumerate(levels(case, "chain_fs"))}
    leaves["chain_pool_s"] = case.leaf("in/chain_pool_s")
    fms_t = [*levels(case, "chain_ft"), case["in/chain_pool_t"]]
    loss = reviewkd(list(leaves.values()), fms_t)
    loss = loss * hyper["weight"] * min(hyper["epoch"] / hyper["warmup"], 1)
    agree(loss, case["chain/loss"])
    leaves |= dict(reviewkd.named_parameters())
    expected = {**case.group("chain/grad/"), **case.group("chain/grad_param/")}
    assert leaves.keys() == expected.keys()
    grads = torch.autograd.grad(loss, list(leaves.values()))
    for (name, _), grad in zip(leaves.items(), grads):
        agree(grad, expected[name])


def naive_hcl(fms_s, fms_t):
    """Every average written out, bin by bin."""
    total = 0.0
    for fm_s, fm_t in zip(fms_s, fms_t):
        height, width = fm_s.shape[2:]
        diff = (fm_s - fm_t).tolist()
        sizes = [(height, width)] + [(n, n) for n in (4, 2, 1) if n < height]
        loss = 0.0
        for j, (h, w) in enumerate(sizes):
            squares = []
            for sample in diff:
                for channel in sample:
                    for y in range(h):
                        for x in range(w):
                            rows = range(y * height // h, math.ceil((y + 1) * height / h))
                            columns = range(x * width // w, math.ceil((x + 1) * width / w))
                            cell = [channel[a][b] for a in rows for b in columns]
                            squares.append((sum(cell) / len(cell)) ** 2)
            loss += 0.5**j * sum(squares) / len(squares)
        total += loss / sum(0.5**j for j in range(len(sizes)))
    return total


@pytest.mark.parametrize("sizes", [[(8, 8), (5, 5), (1, 1)], [(3, 7), (2, 2)], [(4, 4)], [(1, 1)]])
def test_naive_hcl(sizes):
    fms_s, fms_t = ([torch.randn(2, 3, h, w).double() for h, w in sizes] for _ in range(2))
    assert hcl(fms_s, fms_t).item() == pytest.approx(naive_hcl(fms_s, fms_t), rel=1e-12)


def naive_conv_bn(conv, bn, x):
    """A convolution that keeps the size and batch norm by its buffers, place by place."""
    pad = conv.kernel_size[0] // 2
    out = torch.zeros(x.shape[0], conv.out_channels, *x.shape[2:]).double()
    for b in range(x.shape[0]):
        for c in range(conv.out_channels):
            for y in range(x.shape[2]):
                for z in range(x.shape[3]):
                    value = 0.0 if conv.bias is None else conv.bias[c].item()
                    for i in range(-pad, pad + 1):
                        for j in range(-pad, pad + 1):
                            if 0 <= y + i < x.shape[2] and 0 <= z + j < x.shape[3]:
                                w = conv.weight[c, :, i + pad, j + pad]
                                value += (w @ x[b, :, y + i, z + j]).item()
                    if bn is not None:
                        value -= bn.running_mean[c].item()
                        value /= math.sqrt(bn.running_var[c].item() + bn.eps)
                        value = value * bn.weight[c].item() + bn.bias[c].item()
                    out[b, c, y, z] = value
    return out


def naive_resize(x, size):
    """Every place takes the nearest one's value."""
    out = torch.zeros(*x.shape[:2], *size).double()
    for y in range(size[0]):
        for z in range(size[1]):
            out[:, :, y, z] = x[:, :, y * x.shape[2] // size[0], z * x.shape[3] // size[1]]
    return out


@torch.no_grad()
def naive(reviewkd, fms_s, fms_t):
    outs, fused = [], None
    for level in range(len(fms_s) - 1, -1, -1):
        abf = reviewkd.abfs[len(fms_s) - 1 - level]
        x = naive_conv_bn(*abf.conv1, fms_s[level])
        if fused is not None:
            y = naive_resize(fused, x.shape[2:])
            a = 1 / (1 + (-naive_conv_bn(abf.att_conv[0], None, torch.cat([x, y], 1))).exp())
            x = x * a[:, 0].unsqueeze(1) + y * a[:, 1].unsqueeze(1)
        fused = naive_resize(x, fms_t[level].shape[2:])
        outs.insert(0, naive_conv_bn(*abf.conv2, fused))
    return naive_hcl(outs, fms_t)


@pytest.mark.parametrize(
    "sizes_s, sizes_t",
    [
        ([(4, 4), (2, 2), (1, 1)], [(4, 4), (2, 2), (1, 1)]),
        ([(4, 4), (2, 2), (1, 1)], [(5, 5), (4, 4), (1, 1)]),
        ([(4, 6), (2, 3)], [(2, 3), (2, 2)]),
    ],
)
def test_naive(sizes_s, sizes_t):
    widths_s, widths_t = [2, 3, 4][-len(sizes_s) :], [3, 2, 2][-len(sizes_s) :]
    reviewkd = ReviewKD(widths_s, widths_t, 3).double().eval()
    for name, value in reviewkd.state_dict().items():
        if value.is_floating_point():
            value.uniform_(0.5, 1.5) if name.endswith("running_var") else value.normal_()
    fms_s = [torch.randn(2, c, *size).double() for c, size in zip(widths_s, sizes_s)]
    fms_t = [torch.randn(2, c, *size).double() for c, size in zip(widths_t, sizes_t)]
    expected = naive(reviewkd, fms_s, fms_t)
    assert reviewkd(fms_s, fms_t).item() == pytest.approx(expected, rel=1e-10)


def test_gradcheck():
    reviewkd = ReviewKD([2, 3], [2, 2], 2).double().eval()
    fms_s = [torch.randn(2, 2, 3, 3).double(), torch.randn(2, 3).double()]
    fms_t = [torch.randn(2, 2, 3, 3).double(), torch.randn(2, 2).double()]
    params = dict(reviewkd.named_parameters())

    def call(a, b, *values):
        return torch.func.functional_call(reviewkd, dict(zip(params, values)), ([a, b], fms_t))

    leaves = [x.requires_grad_() for x in fms_s]
    assert torch.autograd.gradcheck(call, (*leaves, *params.values()))
    a, b = torch.randn(2, 2, 5, 5).double().requires_grad_(), torch.randn(2, 2, 5, 5).double()
    assert torch.autograd.gradcheck(lambda x: hcl([x], [b]), a)


@pytest.mark.parametrize("batch, train", [(2, True), (2, False), (1, False)])
def test_degenerate(batch, train):
    some = [torch.randn(batch, 3, 4, 4), torch.randn(batch, 3, 1, 1), torch.randn(batch, 3)]
    zero = [0 * x for x in some]
    reviewkd = ReviewKD([3, 3, 3], [3, 3, 3]).train(train)
    state = {k: v.clone() for k, v in reviewkd.state_dict().items()}
    for fms_s, fms_t in [(zero, zero), (zero, some), (some, zero), (some, some)]:
        fms_s, fms_t = ([x.clone().requires_grad_() for x in fms] for fms in (fms_s, fms_t))
        loss = reviewkd(fms_s, fms_t)
        leaves = [*fms_s, *reviewkd.parameters()]
        grads = torch.autograd.grad(loss, leaves + fms_t, allow_unused=True)
        assert loss.isfinite() and all(g.isfinite().all() for g in grads[: len(leaves)])
        assert all(g is None for g in grads[len(leaves) :])
    assert hcl(some, some) == 0
    same = all(torch.equal(v, state[k]) for k, v in reviewkd.state_dict().items())
    assert same != train  # in eval mode nothing moves


def test_bad_input():
    reviewkd = ReviewKD([2, 3], [2, 4], 2)
    state = {k: v.clone() for k, v in reviewkd.state_dict().items()}

    def call(batch_s=2, batch_t=2, channels_s=3, channels_t=4, n=2):
        fms_s = [torch.zeros(batch_s, 2, 4, 4), torch.zeros(batch_s, channels_s)]
        fms_t = [torch.zeros(batch_t, 2, 4, 4), torch.zeros(batch_t, channels_t)]
        return reviewkd(fms_s[:n], fms_t)

    with pytest.raises(ValueError, match="samples"):
        call(1, 1)
    with pytest.raises(ValueError, match="batch"):
        call(batch_t=1)
    with pytest.raises(ValueError, match="student"):
        call(channels_s=2)
    with pytest.raises(ValueError, match="teacher"):
        call(channels_t=1)
    with pytest.raises(ValueError, match="student"):
        call(n=1)
    # and no batch norm has moved
    assert all(torch.equal(v, state[k]) for k, v in reviewkd.state_dict().items())
    for widths in ([2], [2, 3, 4]):
        with pytest.raises(ValueError, match="widths"):
            ReviewKD(widths, [2, 4])
    with pytest.raises(ValueError, match="shape"):  # not a silent broadcast
        hcl([torch.zeros(2, 3, 4, 4)], [torch.zeros(2, 3, 1, 1)])
    with pytest.raises(ValueError, match="shape"):
        hcl([torch.zeros(2, 3)], [torch.zeros(2, 3), torch.zeros(2, 3)])
    with pytest.raises(ValueError, match="shape"):
        hcl([], [])


def test_default_mid_channel():
    assert ReviewKD([4, 8], [4, 8]).abfs[0].conv1[0].out_channels == 8
    assert ReviewKD([4, 600], [4, 8]).abfs[0].conv1[0].out_channels == 512
