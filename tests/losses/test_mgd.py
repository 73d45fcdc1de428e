import pytest
import torch

from kd_losses.mgd import MGD
from reference import agree, agree_grads, cases


def build(case):
    mgd = MGD(case["in/fm_s"].shape[1], case["in/fm_t"].shape[1], case.hyper["lam"]).double()
    mgd.load_state_dict(case.group("param/"))
    return mgd


@pytest.mark.parametrize("case", cases("mgd"))
def test_reference(case):
    """With the authors' weight alpha."""
    mgd, fm_s, alpha = build(case), case.leaf("in/fm_s"), case.hyper["alpha"]
    loss = alpha * mgd(fm_s, case["in/fm_t"], case["in/rand"])
    agree(loss, case["loss"])
    leaves = {"fm_s": fm_s, **dict(mgd.named_parameters())}
    agree_grads(loss, leaves, {"fm_s": case["grad/fm_s"], **case.group("grad_param/")})
    # the mask itself, by the draws that it implies
    again = alpha * mgd(fm_s, case["in/fm_t"], case["extra/mask"].double())
    agree(again, case["loss"])


def conv3x3(x, layer):
    """A map (C, H, W) as nested lists, entry by entry, zeros around."""
    h, w = len(x[0]), len(x[0][0])
    weight, bias = layer.weight.tolist(), layer.bias.tolist()
    return [
        [
            [
                bias[o]
                + sum(
                    weight[o][i][dy + 1][dx + 1] * x[i][y + dy][z + dx]
                    for i in range(len(x))
                    for dy in (-1, 0, 1)
                    for dx in (-1, 0, 1)
                    if 0 <= y + dy < h and 0 <= z + dx < w
                )
                for z in range(w)
            ]
            for y in range(h)
        ]
        for o in range(len(weight))
    ]


def naive(mgd, fm_s, fm_t, rand):
    total = 0.0
    for x, t, draws in zip(fm_s, fm_t, rand[:, :, 0, 0].tolist()):
        c, h, w = t.shape
        if mgd.s_dim != mgd.t_dim:
            weight, bias = mgd.align.weight[:, :, 0, 0], mgd.align.bias
            x = [sum(weight[o, i] * x[i] for i in range(len(x))) + bias[o] for o in range(c)]
        x = [fm.tolist() if u >= mgd.lam else [[0.0] * w] * h for fm, u in zip(x, draws)]
        x = conv3x3(x, mgd.generation[0])
        x = conv3x3([[[max(v, 0.0) for v in row] for row in fm] for fm in x], mgd.generation[2])
        total += sum((torch.tensor(x, dtype=t.dtype) - t).square().flatten().tolist())
    return total / len(fm_s)


@pytest.mark.parametrize("lam", [0.0, 0.15, 0.5])
@pytest.mark.parametrize("s_dim, t_dim, size", [(2, 3, (3, 2)), (3, 3, (2, 4)), (2, 1, (1, 1))])
def test_naive(s_dim, t_dim, size, lam):
    mgd = MGD(s_dim, t_dim, lam).double()
    fm_s, fm_t = torch.randn(3, s_dim, *size).double(), torch.randn(3, t_dim, *size).double()
    rand = torch.rand(3, t_dim, 1, 1)
    with torch.no_grad():
        expected = naive(mgd, fm_s, fm_t, rand)
    assert mgd(fm_s, fm_t, rand).item() == pytest.approx(expected, rel=1e-11)


def test_gradcheck():
    mgd = MGD(3, 2, 0.5).double()
    fm_s, fm_t = torch.randn(2, 3, 2, 2).double(), torch.randn(2, 2, 2, 2).double()
    params, rand = dict(mgd.named_parameters()), torch.tensor([[0.2, 0.7], [0.5, 0.9]])

    def call(x, *values):
        args = x, fm_t, rand[:, :, None, None]
        return torch.func.functional_call(mgd, dict(zip(params, values)), args)

    assert torch.autograd.gradcheck(call, (fm_s.requires_grad_(), *params.values()))


def test_draws():
    """Of torch's generator, the same ones in any precision, lam of them masked."""
    mgd, seen = MGD(400, 400, lam=0.25), []
    fm = torch.ones(50, 400, 1, 1)
    mgd.generation[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(7)
        mgd.to(dtype)(fm.to(dtype), fm)
    torch.manual_seed(7)
    expected = (torch.rand(50, 400, 1, 1) >= 0.25).double()
    assert torch.equal(seen[0].double(), expected) and torch.equal(seen[1], expected)
    mgd(fm.double(), fm)  # a fresh mask, with a deviation of 0.003 about the share
    assert not torch.equal(seen[2], expected)
    assert seen[2].mean().item() == pytest.approx(0.75, abs=0.02)
    mgd(fm.double(), fm, torch.full((50, 400, 1, 1), 0.25))  # as large as lam: kept
    assert seen[3].min() == 1


@pytest.mark.parametrize("scale_s, scale_t", [(0, 0), (0, 1), (1, 0), (1e4, 1e4), (1e-20, 1e-20)])
def test_degenerate(scale_s, scale_t):
    mgd = MGD(3, 2)
    fm_s, fm_t = torch.randn(1, 3, 1, 1) * scale_s, torch.randn(1, 2, 1, 1) * scale_t
    fm_s.requires_grad_(), fm_t.requires_grad_()
    loss = mgd(fm_s, fm_t)
    *grads, none = torch.autograd.grad(loss, (fm_s, *mgd.parameters(), fm_t), allow_unused=True)
    assert loss.isfinite() and all(grad.isfinite().all() for grad in grads) and none is None


def test_a_sum_beyond_half_precision():
    """70000 entries of 1, which float16 cannot hold."""
    mgd = MGD(1, 1).requires_grad_(False)
    for param in mgd.parameters():
        param.zero_()
    fm = torch.ones(1, 1, 700, 100, dtype=torch.float16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert mgd(fm, fm).item() == 70000


def test_half_precision():
    mgd, rand = MGD(8, 6), torch.rand(4, 6, 1, 1)
    fm_s, fm_t = torch.randn(4, 8, 4, 4).bfloat16(), torch.randn(4, 6, 4, 4).bfloat16()
    expected = mgd(fm_s.float(), fm_t.float(), rand).item()
    fm_s = fm_s.contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = mgd(fm_s, fm_t, rand)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected, rel=1e-2)
    assert mgd(fm_s, fm_t, rand).item() == pytest.approx(expected, rel=1e-6)


def test_bad_input():
    for lam in (-0.1, 1.0):
        with pytest.raises(ValueError, match="lam"):
            MGD(3, 2, lam)
    mgd, fm_s, fm_t = MGD(3, 2), torch.zeros(2, 3, 4, 4), torch.zeros(2, 2, 4, 4)
    for bad in (fm_t[:1], fm_t[:, :1], fm_t[:, :, :1], fm_t[:, :, :2, :2]):  # no silent broadcast
        with pytest.raises(ValueError, match="batch"):
            mgd(fm_s, bad)
    with pytest.raises(ValueError, match="batch"):
        mgd(fm_t, fm_t)
    with pytest.raises(ValueError, match="rand"):
        mgd(fm_s, fm_t, torch.rand(2, 3, 1, 1))
