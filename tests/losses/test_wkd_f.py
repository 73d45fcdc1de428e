import math

import pytest
import torch

from kd_losses.wkd_f import WKDF, regressor
from reference import agree, agree_grads, cases


def build(case):
    shapes = case["in/fm_s"].shape[1:], case["in/fm_t"].shape[1:]
    wkd = WKDF(*shapes, case.hyper["ratio"], case.hyper["grid"]).double()
    wkd.load_state_dict(case.group("param/"))
    return wkd


@pytest.mark.parametrize("case", cases("wkd_f"))
def test_reference(case):
    wkd, fm_s = build(case), case.leaf("in/fm_s")
    loss = wkd(fm_s, case["in/fm_t"])
    agree(loss, case["loss"])
    leaves = {"fm_s": fm_s, **dict(wkd.named_parameters())}
    expected = {"fm_s": case["grad/fm_s"], **case.group("grad_param/")}
    # a bias in front of batch norm has no effect: its gradient is rounding
    (bias,) = torch.autograd.grad(loss, leaves.pop("conv.bias"), retain_graph=True)
    assert bias.abs().max() < 1e-12 and expected.pop("conv.bias").abs().max() < 1e-12
    agree_grads(loss, leaves, expected)
    for name, value in case.group("after/").items():
        torch.testing.assert_close(wkd.state_dict()[name], value, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("case", cases("wkd_f"))
def test_parts(case):
    agree(build(case).project(case["in/fm_s"]), case["extra/projected"])
    # the part of the means is what grows with ratio, that of the deviations stays
    wkd, losses = build(case), []
    for wkd.ratio in (0.0, 1.0):
        losses.append(wkd(case["in/fm_s"], case["in/fm_t"]))
    agree(losses[0], case["extra/std_part"])
    agree(losses[1] - losses[0], case["extra/mean_part"])


def naive(x, fm_t, ratio, grid):
    """The distance of projected maps, sample, channel and cell by themselves."""
    total = 0.0
    b, c, *size = x.shape
    for n in range(b):
        for k in range(c):
            for i in range(grid):
                for j in range(grid):
                    parts = []
                    for fm in (x, fm_t):
                        rows, columns = (
                            range(math.floor(m * s / grid), math.ceil((m + 1) * s / grid))
                            for m, s in zip((i, j), size)
                        )
                        values = [fm[n, k, y, z].item() for y in rows for z in columns]
                        mean = sum(values) / len(values)
                        square = sum((v - mean) ** 2 for v in values)
                        var = square / (len(values) - 1) if len(values) > 1 else 0.0
                        parts.append((mean, math.sqrt(var + 1e-5)))
                    (mu_s, sigma_s), (mu_t, sigma_t) = parts
                    total += ratio * (mu_s - mu_t) ** 2 + (sigma_s - sigma_t) ** 2
    return total / (b * grid**2)


@pytest.mark.parametrize("size, grid", [((4, 4), 1), ((4, 4), 4), ((5, 3), 2), ((1, 3), 1)])
@pytest.mark.parametrize("ratio", [0.0, 4.0])
def test_naive(size, grid, ratio):
    wkd = WKDF((3, *size), (5, *size), ratio, grid).double()
    fm_s, fm_t = torch.randn(2, 3, *size).double(), torch.randn(2, 5, *size).double()
    expected = naive(wkd.project(fm_s), fm_t, ratio, grid)
    assert wkd(fm_s, fm_t).item() == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize(
    "s, t, kernel",
    [(8, 8, (1, 1)), (8, 4, (3, 3)), (4, 8, (4, 4)), (7, 4, (4, 4)), (9, 4, (6, 6))],
)
def test_regressors(s, t, kernel):
    layer = regressor((3, s, s), (5, t, t))
    assert layer.kernel_size == kernel and layer.bias is not None
    assert layer(torch.zeros(2, 3, s, s)).shape == (2, 5, t, t)
    assert isinstance(layer, torch.nn.ConvTranspose2d) == (s < t)


@pytest.mark.parametrize("train", [True, False])
def test_gradcheck(train):
    wkd = WKDF((3, 4, 4), (2, 4, 4), grid=2).double().train(train)
    with torch.no_grad():
        wkd.bn.bias.fill_(5.0)  # away from the corner of ReLU
    fm_s, fm_t = torch.randn(2, 3, 4, 4).double(), torch.randn(2, 2, 4, 4).double()
    params = dict(wkd.named_parameters())

    def call(x, *values):
        # in training mode the value depends on no buffer, so that their moving is harmless
        return torch.func.functional_call(wkd, dict(zip(params, values)), (x, fm_t))

    assert torch.autograd.gradcheck(call, (fm_s.requires_grad_(), *params.values()))


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("size, grid", [((1, 1), 1), ((4, 4), 4), ((4, 4), 1)])
@pytest.mark.parametrize("scale_s, scale_t", [(0, 0), (0, 1), (1, 0), (1e4, 1e4), (1e-20, 1e-20)])
def test_degenerate(size, grid, scale_s, scale_t, train):
    wkd = WKDF((3, *size), (3, *size), grid=grid).train(train)
    fm_s, fm_t = (torch.randn(2, 3, *size) * scale for scale in (scale_s, scale_t))
    fm_t.requires_grad_()
    loss = wkd(fm_s.requires_grad_(), fm_t)
    *grads, none = torch.autograd.grad(loss, (fm_s, *wkd.parameters(), fm_t), allow_unused=True)
    assert loss.isfinite() and none is None
    limit = math.inf if scale_t == 1e4 else 1e4
    assert all(grad.isfinite().all() and grad.abs().max() < limit for grad in grads)
    if scale_s == scale_t == 0 and train:
        assert loss.item() == pytest.approx(0, abs=1e-9)


def test_one_entry_a_cell_leaves_the_means():
    """Without a variance on either side the squared distance of the entries is left."""
    wkd = WKDF((3, 2, 2), (2, 2, 2), ratio=3.0, grid=2).double()
    fm_s, fm_t = torch.randn(4, 3, 2, 2).double(), torch.randn(4, 2, 2, 2).double()
    expected = 3 * (wkd.project(fm_s) - fm_t).square().sum() / (4 * 4)
    assert wkd(fm_s, fm_t).item() == pytest.approx(expected.item(), rel=1e-12)


def test_half_precision():
    wkd = WKDF((8, 4, 4), (8, 4, 4))
    fm_s, fm_t = torch.randn(4, 8, 4, 4).bfloat16(), torch.randn(4, 8, 4, 4).bfloat16()
    expected = wkd(fm_s.float(), fm_t.float()).item()
    fm_s, fm_t = (x.contiguous(memory_format=torch.channels_last) for x in (fm_s, fm_t))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = wkd(fm_s, fm_t)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected, rel=1e-2)
    assert wkd(fm_s, fm_t).item() == pytest.approx(expected, rel=1e-6)


def test_bad_input():
    with pytest.raises(ValueError, match="grid"):
        WKDF((3, 4, 4), (3, 4, 4), grid=5)
    with pytest.raises(ValueError, match="grid"):
        WKDF((3, 4, 4), (3, 4, 4), grid=0)
    with pytest.raises(ValueError, match=r"\(8, 8\)"):
        WKDF((3, 2, 2), (3, 8, 8))
    wkd, fm = WKDF((3, 4, 4), (2, 4, 4)), torch.zeros(2, 3, 4, 4)
    for bad in (fm[:1, :2], fm, fm[:, :2, :2]):  # not a silent broadcast
        with pytest.raises(ValueError, match="maps"):
            wkd(fm, bad)
    with pytest.raises(ValueError, match="maps"):
        wkd(fm[:, :2], fm[:, :2])
    wkd = WKDF((3, 2, 2), (2, 1, 1))
    with pytest.raises(ValueError, match="samples"):
        wkd(torch.zeros(1, 3, 2, 2), torch.zeros(1, 2, 1, 1))
    assert wkd.bn.num_batches_tracked == 0
    assert wkd.eval()(torch.zeros(1, 3, 2, 2), torch.zeros(1, 2, 1, 1)).isfinite()
