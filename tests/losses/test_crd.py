import math

import pytest
import torch

from kd_losses.crd import CRD
from reference import agree, agree_grads, cases

SIDES = ("s", "t")


def build(case):
    hyper = case.hyper
    crd = CRD(case["in/feat_s"].shape[1], case["in/feat_t"].shape[1], **hyper).double()
    state = {
        f"embed_{x}.{p}": case[f"param/embed_{x}.linear.{p}"]
        for x in SIDES
        for p in ("weight", "bias")
    }
    state |= {f"memory_{x}": case[f"param/contrast.memory_{x}"] for x in SIDES}
    state |= {f"log_z_{x}": torch.tensor(math.nan).double() for x in SIDES}
    crd.load_state_dict(state)
    return crd


@pytest.mark.parametrize("case", cases("crd"))
def test_reference(case):
    """Two steps: the first fixes Z, the second sees the banks that the first moved."""
    crd = build(case)
    for step, suffix in (("", ""), ("step1/", "_step1")):
        feat_s = case.leaf(f"in/feat_s{suffix}")
        inputs = [case[f"in/{name}{suffix}"] for name in ("feat_t", "idx", "sample_idx")]
        loss = crd(feat_s, *inputs)
        agree(loss, case[f"{step}loss"])
        leaves = {"feat_s": feat_s, **dict(crd.named_parameters())}
        grads = {k.replace(".linear.", "."): v for k, v in case.group(f"{step}grad_param/").items()}
        agree_grads(loss, leaves, {"feat_s": case[f"{step}grad/feat_s"], **grads})
        for x in SIDES:
            agree(getattr(crd, f"memory_{x}"), case[f"{step}after/memory_{x}"])
            agree(getattr(crd, f"log_z_{x}").exp(), case[f"{step}after/Z_{x}"])


def naive(crd, feat_s, feat_t, sample_idx):
    """Equations 10 and 19 of the paper with the estimate of Z, sample by sample."""
    units = []
    for linear, feat in ((crd.embed_s, feat_s), (crd.embed_t, feat_t)):
        e = [linear(row) for row in feat]
        units.append([row / row.norm() for row in e])
    n, count = crd.n_data, sample_idx.shape[1] - 1
    loss = 0.0
    for unit, memory in ((units[0], crd.memory_t), (units[1], crd.memory_s)):
        scores = [
            [math.exp((memory[j] @ e).item() / crd.nce_t) for j in row]
            for e, row in zip(unit, sample_idx)
        ]
        z = n * sum(map(sum, scores)) / sum(map(len, scores))
        c = count / n
        for row in scores:
            p = [score / z for score in row]
            loss -= math.log(p[0] / (p[0] + c + 1e-7))
            loss -= sum(math.log(c / (q + c + 1e-7)) for q in p[1:])
    return loss / len(feat_s)


def toy(**kwargs):
    settings = dict(feat_dim=4, nce_n=5, nce_t=0.2, n_data=12, labels=torch.arange(12) % 3)
    return CRD(3, 6, **{**settings, **kwargs}).double()


def test_naive():
    crd = toy()
    feat_s, feat_t = torch.randn(2, 3).double(), torch.randn(2, 6).double()
    sample_idx = torch.tensor([[0, 1, 2, 4, 5, 7], [1, 0, 2, 3, 5, 6]])
    expected = naive(crd, feat_s, feat_t, sample_idx)
    assert crd(feat_s, feat_t, sample_idx[:, 0], sample_idx).item() == pytest.approx(
        expected, rel=1e-10
    )


@pytest.mark.parametrize("z_is_set", [False, True])
def test_gradcheck(z_is_set):
    """In eval mode, where the banks stand still. Z counts as a constant: it is fixed first."""
    crd = toy()
    feat_t, idx = torch.randn(2, 6).double(), torch.tensor([0, 1])
    sample_idx = torch.tensor([[0, 1, 2, 4, 5, 7], [1, 0, 2, 3, 5, 6]])
    feat_s = torch.randn(2, 3).double().requires_grad_()
    crd(feat_s, feat_t, idx, sample_idx)
    crd.eval()
    if not z_is_set:
        crd.log_z_s.fill_(1.0)
    params = dict(crd.named_parameters())

    def call(x, *values):
        return torch.func.functional_call(
            crd, dict(zip(params, values)), (x, feat_t, idx, sample_idx)
        )

    assert torch.autograd.gradcheck(call, (feat_s, *params.values()))


def test_negatives_come_from_all_other_classes_alike():
    labels = torch.tensor([0] * 7 + [1] * 2 + [2] * 3)[torch.randperm(12)]
    crd = toy(labels=labels, nce_n=4000)
    drawn = crd.draw(torch.arange(12))
    assert (drawn[:, 0] == torch.arange(12)).all()
    for i in range(12):
        count = torch.bincount(drawn[i, 1:], minlength=12)
        other = labels != labels[i]
        assert (count[~other] == 0).all()
        expected = 4000 / other.sum()
        # six standard deviations
        assert ((count[other] - expected).abs() < 6 * expected**0.5).all()


def test_relaxed_positives_are_of_the_same_class():
    labels = torch.arange(12) % 3
    crd = toy(labels=labels, mode="relax")
    drawn = torch.stack([crd.draw(torch.arange(12))[:, 0] for _ in range(200)])
    assert (labels[drawn] == labels).all()
    assert all(len(set(drawn[:, i].tolist())) == 4 for i in range(12))


def test_small_temperature_stays_finite():
    crd = CRD(3, 6, feat_dim=4, nce_n=5, nce_t=0.005, n_data=12, labels=torch.arange(12) % 3)
    feat_s = torch.randn(4, 3, requires_grad=True)
    loss = crd(feat_s, torch.randn(4, 6), torch.arange(4))
    assert loss.isfinite() and torch.autograd.grad(loss, feat_s)[0].isfinite().all()


def test_banks_move_only_in_training():
    crd = toy()
    inputs = torch.randn(2, 3).double(), torch.randn(2, 6).double(), torch.tensor([3, 4])
    before = {k: v.clone() for k, v in crd.state_dict().items()}
    crd.eval()(*inputs)
    torch.testing.assert_close(dict(crd.state_dict()), before, rtol=0, atol=0, equal_nan=True)
    crd.train()(*inputs)
    moved = (crd.memory_s != before["memory_s"]).any(1).nonzero().flatten()
    assert moved.tolist() == [3, 4] and not crd.log_z_s.isnan()


def test_bad_input():
    with pytest.raises(ValueError, match="two classes"):
        toy(labels=torch.zeros(12, dtype=torch.int64))
    with pytest.raises(ValueError, match="12"):
        toy(labels=torch.arange(5))
    with pytest.raises(ValueError, match="labels"):
        toy(labels=None)(torch.zeros(2, 3).double(), torch.zeros(2, 6).double(), torch.arange(2))
    with pytest.raises(ValueError, match="nce_t"):
        toy(nce_t=0.0)


def test_z_that_is_loaded_as_unset_is_estimated_again():
    crd = toy()
    state = {k: v.clone() for k, v in crd.state_dict().items()}
    inputs = torch.randn(2, 3).double(), torch.randn(2, 6).double(), torch.tensor([3, 4])
    for _ in range(2):
        crd.load_state_dict(state)
        assert crd(*inputs).isfinite() and not crd.log_z_s.isnan()
        crd.log_z_s.copy_(before := crd.log_z_s + 1)
        crd(*inputs)
        assert crd.log_z_s == before, "what is set stays"
