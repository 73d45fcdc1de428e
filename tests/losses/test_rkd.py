import math

import pytest
import torch

from kd_losses.rkd import RKD
from reference import agree, agree_grads, cases


@pytest.mark.parametrize("case", cases("rkd"))
@pytest.mark.parametrize(
    "peer, weights",
    [
        ("", None),
        ("alt_mdistiller/", None),
        ("alt_repdistiller/", None),
        ("extra/dist/", dict(w_dist=1.0, w_angle=0.0)),
        ("extra/angle/", dict(w_dist=0.0, w_angle=1.0)),
    ],
)
def test_reference(case, peer, weights):
    feat_s = case.leaf("in/feat_s")
    loss = RKD(**(weights or case.hyper))(feat_s, case["in/feat_t"])
    agree(loss, case[peer + "loss"])
    agree_grads(loss, {"feat_s": feat_s}, {"feat_s": case[peer + "grad/feat_s"]})


def naive(feat_s, feat_t, w_dist, w_angle):
    """The Huber losses pair by pair and triple by triple."""
    n = len(feat_s)
    found = []
    for x in (feat_s.tolist(), feat_t.tolist()):
        norm, e = {}, {}
        for i in range(n):
            for j in range(n):
                diff = [b - a for a, b in zip(x[i], x[j])]
                length = math.sqrt(sum(value**2 for value in diff))
                norm[i, j] = 0.0 if i == j else max(length, 1e-6)
                e[i, j] = [value / length if length else 0.0 for value in diff]
        mu = sum(norm.values()) / (n * (n - 1))
        dist = [value / mu for value in norm.values()]
        angle = [
            sum(p * q for p, q in zip(e[i, a], e[i, b]))
            for i in range(n)
            for a in range(n)
            for b in range(n)
        ]
        found.append((dist, angle))

    def huber(left, right):
        gaps = [abs(p - q) for p, q in zip(left, right)]
        return sum(gap**2 / 2 if gap < 1 else gap - 0.5 for gap in gaps) / len(gaps)

    (dist_s, angle_s), (dist_t, angle_t) = found
    return w_dist * huber(dist_s, dist_t) + w_angle * huber(angle_s, angle_t)


@pytest.mark.parametrize("w_dist, w_angle", [(25.0, 50.0), (1.0, 0.0), (0.0, 2.0)])
@pytest.mark.parametrize("shape_s, shape_t", [((2, 3), (2, 3)), ((5, 2), (5, 7)), ((6, 1), (6, 4))])
def test_naive(shape_s, shape_t, w_dist, w_angle):
    feat_s, feat_t = torch.randn(shape_s).double(), torch.randn(shape_t).double()
    feat_s[0] *= 20  # beyond the bend of the Huber loss
    if len(feat_s) > 2:
        feat_t[1] = feat_t[2]
    expected = naive(feat_s, feat_t, w_dist, w_angle)
    assert RKD(w_dist, w_angle)(feat_s, feat_t).item() == pytest.approx(expected, rel=1e-10)


def test_gradcheck():
    feat_s, feat_t = torch.randn(4, 3).double(), torch.randn(4, 5).double()
    assert torch.autograd.gradcheck(lambda x: RKD()(x, feat_t), feat_s.requires_grad_())


def test_teacher_is_constant():
    feat_s, feat_t = (torch.randn(3, 4).requires_grad_() for _ in range(2))
    RKD()(feat_s, feat_t).backward()
    assert feat_s.grad is not None and feat_t.grad is None


@pytest.mark.parametrize("block", [1, 2**20])
def test_blocks_of_anchors(block, monkeypatch):
    """One anchor at a time or all at once."""
    feat_s, feat_t = torch.randn(7, 3).double().requires_grad_(), torch.randn(7, 5).double()
    monkeypatch.setattr("kd_losses.rkd.BLOCK", block)
    loss = RKD()(feat_s, feat_t)
    (grad,) = torch.autograd.grad(loss, feat_s)
    monkeypatch.setattr("kd_losses.rkd.BLOCK", 150)
    agree(RKD()(feat_s, feat_t), loss)
    agree_grads(RKD()(feat_s, feat_t), {"feat_s": feat_s}, {"feat_s": grad})
    x = feat_s.detach()[:4].requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: RKD()(x, feat_t[:4]), x)


def test_many_blocks_keep_nothing_larger_than_features_and_distances(monkeypatch):
    monkeypatch.setattr("kd_losses.rkd.BLOCK", 2**10)
    sizes = []

    def pack(tensor):
        sizes.append(tensor.numel())
        return tensor

    b, d = 16, 24
    feat_s, feat_t = torch.randn(b, d).requires_grad_(), torch.randn(b, d)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        RKD()(feat_s, feat_t)
    assert sizes and max(sizes) <= b * max(b, d)


def features(name):
    feat = torch.randn(6, 5)
    twice = feat.clone()
    twice[1] = twice[0]
    near = twice.clone()
    near[1] += 1e-7
    zero = torch.zeros_like(feat)
    return {
        "duplicate student rows": (twice, feat),
        "duplicate teacher rows": (feat, twice),
        "duplicates in both": (twice, twice * 2),
        "rows apart by rounding": (near, feat),
        "all rows equal": (feat[:1].expand(6, -1), feat),
        "both zero": (zero, zero),
        "student zero": (zero, feat),
        "teacher zero": (feat, zero),
        "equal": (feat, feat.clone()),
        "two equal samples": (twice[:2], feat[:2]),
    }[name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "name",
    ["duplicate student rows", "duplicate teacher rows", "duplicates in both"]
    + ["rows apart by rounding", "all rows equal", "both zero", "student zero", "teacher zero"]
    + ["equal", "two equal samples"],
)
def test_degenerate(name, dtype):
    feat_s, feat_t = (feat.to(dtype) for feat in features(name))
    feat_s = feat_s.clone().requires_grad_()
    loss = RKD()(feat_s, feat_t)
    (grad,) = torch.autograd.grad(loss, feat_s)
    assert loss.isfinite() and grad.isfinite().all() and grad.abs().max() < 100
    if name in ("both zero", "equal"):
        assert loss.item() == pytest.approx(0, abs=1e-12)


def test_float32_far_from_the_origin():
    feat_s, feat_t = torch.randn(8, 4), torch.randn(8, 4)
    # a Gram expansion would lose the distances here; 64 keeps 18 bits of them
    feat_s = feat_s + 64
    exact = RKD()(feat_s.double(), feat_t.double()).item()
    assert RKD()(feat_s, feat_t).item() == pytest.approx(exact, rel=1e-5)


def test_bad_input():
    with pytest.raises(ValueError, match="weights"):
        RKD(w_dist=-1.0)
    with pytest.raises(ValueError, match="batch"):
        RKD()(torch.zeros(1, 4), torch.zeros(1, 4))
    with pytest.raises(ValueError, match="batch"):  # not a silent broadcast
        RKD()(torch.zeros(3, 4), torch.zeros(1, 4))
