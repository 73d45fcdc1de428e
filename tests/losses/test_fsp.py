import pytest
import torch

from kd_losses.fsp import FSP
from reference import agree, agree_grads, cases

MAPS = ("fm_s1", "fm_s2", "fm_t1", "fm_t2")


@pytest.mark.parametrize("case", cases("fsp"))
def test_reference(case):
    maps = {name: case.leaf(f"in/{name}") for name in MAPS}
    loss = FSP()(*maps.values())
    agree(loss, case["loss"])
    agree_grads(loss, {name: maps[name] for name in MAPS[:2]}, case.group("grad/"))
    agree(FSP().flow(maps["fm_s1"], maps["fm_s2"]), case["extra/fsp_s"])


def naive_flow(fm1, fm2):
    """Equation 1 of the paper: (C_1, C_2) sums over the positions, sample by sample."""
    (n, c1, h, w), c2 = fm1.shape, fm2.shape[1]
    flow = torch.zeros(n, c1, c2).double()
    for b in range(n):
        for i in range(c1):
            for j in range(c2):
                for y in range(h):
                    for x in range(w):
                        flow[b, i, j] += fm1[b, i, y, x] * fm2[b, j, y, x] / (h * w)
    return flow


def halve(fm):
    """Average pooling of 2x2, by hand."""
    return (fm[..., ::2, ::2] + fm[..., 1::2, ::2] + fm[..., ::2, 1::2] + fm[..., 1::2, 1::2]) / 4


@pytest.mark.parametrize("larger", [0, 1, None])
def test_naive(larger):
    """Whichever of the two maps is larger is pooled."""
    shapes = [[2, 3, 4, 2], [2, 5, 4, 2]]
    if larger is not None:
        shapes[larger][2:] = [8, 4]
    fms = [torch.randn(shape).double() for shape in shapes * 2]
    pooled = [halve(fm) if fm.shape[2] == 8 else fm for fm in fms]
    flow_s, flow_t = naive_flow(*pooled[:2]), naive_flow(*pooled[2:])
    expected = ((flow_s - flow_t) ** 2).sum() / flow_s.numel()
    assert FSP()(*fms).item() == pytest.approx(expected.item(), rel=1e-12)


def test_gradcheck():
    maps = [torch.randn(2, c, 4, 4).double().requires_grad_() for c in (2, 3)]
    fixed = [torch.randn(2, c, 2, 2).double() for c in (2, 3)]
    assert torch.autograd.gradcheck(lambda a, b: FSP()(a, b, *fixed), maps)


def test_bad_input():
    maps = [torch.zeros(2, c, 4, 4) for c in (3, 5, 3, 1)]
    with pytest.raises(ValueError, match="channels"):
        FSP()(*maps)
