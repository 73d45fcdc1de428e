import math

import pytest
import torch
from torch import nn

from kd_losses.catkd import CATKD
from reference import agree, agree_grads, cases


@pytest.mark.parametrize("case", cases("catkd"))
def test_reference(case):
    fm_s, w_s = case.leaf("in/fm_s"), case.leaf("in/w_s")
    loss = CATKD(**case.hyper)(fm_s, w_s, case["in/fm_t"], case["in/w_t"])
    agree(loss, case["loss"])
    leaves, expected = {"fm_s": fm_s, "w_s": w_s}, ("grad/fm_s", "grad/w_s")
    agree_grads(loss, leaves, {name: case[key] for name, key in zip(leaves, expected)})


def cam(fm, weight):
    """The CAM of one sample as nested lists, [class][y][x]."""
    c, h, w = fm.shape
    return [
        [
            [sum(row[i].item() * fm[i, y, x].item() for i in range(c)) for x in range(w)]
            for y in range(h)
        ]
        for row in weight
    ]


def pool(a, r):
    """A class's CAM [y][x] averaged to a list of r * r numbers."""
    cells = []
    for i in range(r):
        for j in range(r):
            rows, columns = (
                range(math.floor(k * n / r), math.ceil((k + 1) * n / r))
                for k, n in ((i, len(a)), (j, len(a[0])))
            )
            values = [a[y][x] for y in rows for x in columns]
            cells.append(sum(values) / len(values))
    return cells


def naive(fm_s, weight_s, fm_t, weight_t, resolution, normalize, binarize, top):
    """Sample by sample and class by class, the pooling after the classifier."""
    total, count = 0.0, 0
    for b in range(len(fm_s)):
        cams_s, cams_t = cam(fm_s[b], weight_s), cam(fm_t[b], weight_t)
        score = [pool(a, 1)[0] for a in cams_t]
        order = sorted(range(len(score)), key=lambda k: -score[k])
        for k in order[:top]:
            a_t = cams_t[k]
            if binarize:
                values = [abs(v) for row in a_t for v in row]
                a_t = [[float(v > sum(values) / len(values)) for v in row] for row in a_t]
            a_s, a_t = pool(cams_s[k], resolution), pool(a_t, resolution)
            if normalize:
                a_s, a_t = ([v / (math.hypot(*a) or 1) for v in a] for a in (a_s, a_t))
            total += sum((s - t) ** 2 for s, t in zip(a_s, a_t))
            count += resolution**2
    return total / count


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("binarize", [False, True])
@pytest.mark.parametrize("resolution, top", [(1, None), (2, 2), (3, 1), (4, None)])
@pytest.mark.parametrize("sizes", [((4, 4), (8, 8)), ((3, 5), (7, 2)), ((1, 1), (2, 2))])
def test_naive(sizes, resolution, top, binarize, normalize):
    hyper = dict(resolution=resolution, normalize=normalize, binarize=binarize, top=top)
    fm_s, fm_t = torch.randn(2, 3, *sizes[0]).double(), torch.randn(2, 4, *sizes[1]).double()
    weight_s, weight_t = torch.randn(5, 3).double(), torch.randn(5, 4).double()
    fm_t.mul_(2).add_(1)  # binarisation keeps some
    expected = naive(fm_s, weight_s, fm_t, weight_t, **hyper)
    value = CATKD(**hyper)(fm_s, weight_s, fm_t, weight_t).item()
    assert value == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("hyper", [dict(), dict(normalize=True), dict(top=2, binarize=True)])
def test_gradcheck(hyper):
    fm_s, fm_t = torch.randn(2, 3, 4, 4).double(), torch.randn(2, 2, 5, 4).double()
    weight_s, weight_t = torch.randn(4, 3).double(), torch.randn(4, 2).double()
    assert torch.autograd.gradcheck(
        lambda x, w: CATKD(**hyper)(x, w, fm_t, weight_t),
        (fm_s.requires_grad_(), weight_s.requires_grad_()),
    )


def test_teacher_is_constant():
    fm_s, fm_t, w_s, w_t = (
        torch.randn(shape).requires_grad_() for shape in 2 * [(2, 3, 4, 4)] + 2 * [(5, 3)]
    )
    CATKD()(fm_s, w_s, fm_t, w_t).backward()
    assert fm_s.grad is not None and w_s.grad is not None
    assert fm_t.grad is None and w_t.grad is None


def test_logits_at_resolution_one():
    """The CAM's mean is the logit without bias."""
    fm_s, fm_t, fc = torch.randn(3, 4, 5, 5), torch.randn(3, 4, 2, 2), nn.Linear(4, 6, bias=False)
    expected = (fc(fm_s.mean((2, 3))) - fc(fm_t.mean((2, 3)))).square().mean()
    torch.testing.assert_close(CATKD(1)(fm_s, fc.weight, fm_t, fc.weight), expected)


def test_ties_at_the_top():
    """As many classes as asked for, where all the scores are equal."""
    fm_s, fm_t = torch.ones(2, 1, 2, 2), torch.zeros(2, 1, 2, 2)
    weight = torch.tensor([[1.0], [2.0], [4.0]])
    loss = CATKD(top=1)(fm_s, weight, fm_t, weight)
    assert loss.item() in (1, 4, 16, 2.5, 8.5, 10)  # of each sample one class


@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e-12, 1e-8, 1.0, 1e4])
@pytest.mark.parametrize("teacher", [0.0, 1.0])
def test_normalised_gradients_are_moderate(scale, teacher):
    fm_s, fm_t = torch.randn(2, 3, 4, 4) * scale, torch.randn(2, 3, 4, 4) * teacher
    weight_s, weight_t = torch.randn(5, 3).requires_grad_(), torch.randn(5, 3)
    loss = CATKD(normalize=True)(fm_s.requires_grad_(), weight_s, fm_t, weight_t)
    grads = torch.autograd.grad(loss, (fm_s, weight_s))
    assert all(grad.isfinite().all() and grad.abs().max() < 1e4 for grad in grads)
    if scale < 1e-11 and teacher:  # a vector of length 1 against zeros
        assert loss.item() == pytest.approx(1 / 4, rel=1e-5)
    if scale < 1e-11 and not teacher:
        assert loss.item() == pytest.approx(0, abs=1e-12)


def test_half_precision_and_channels_last():
    fm_s, fm_t = (torch.randn(2, 8, 4, 4).bfloat16() for _ in range(2))
    w_s, w_t = torch.randn(5, 8).double(), torch.randn(5, 8).double()
    expected = CATKD()(fm_s.double(), w_s, fm_t.double(), w_t).item()
    fm_s = fm_s.contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = CATKD()(fm_s, w_s.float(), fm_t, w_t.float())
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected, rel=1e-5)
    assert CATKD()(fm_s, w_s, fm_t, w_t).item() == pytest.approx(expected, rel=1e-5)


def test_bad_input():
    fm, weight = torch.zeros(2, 3, 4, 4), torch.zeros(5, 3)
    with pytest.raises(ValueError, match="resolution"):
        CATKD(resolution=0)
    with pytest.raises(ValueError, match="top"):
        CATKD(top=0)
    with pytest.raises(ValueError, match="classifier"):
        CATKD()(fm, torch.zeros(5, 4), fm, weight)
    with pytest.raises(ValueError, match="classifier"):
        CATKD()(fm, weight, fm[:, :, 0], weight)
    for other, w in ((fm[:1], weight), (fm, weight[:1])):  # not a silent broadcast
        with pytest.raises(ValueError, match="classes"):
            CATKD()(fm, weight, other, w)
    with pytest.raises(ValueError, match="top"):
        CATKD(top=6)(fm, weight, fm, weight)
