import copy
import math

import pytest
import torch
import torch.distributed as dist

import kd_losses.crd
from kd_losses.crd import CRD
from reference import agree, agree_grads, cases

SIDES = ("s", "t")
WAYS = {"whole": math.inf, "gather": 0}


def go(way):
    """Take the scores one way, whatever the sizes; gathered rows come a few columns at a time."""
    kd_losses.crd.GATHER, kd_losses.crd.SLICE = WAYS[way], 24


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    for name in ("GATHER", "SLICE"):
        monkeypatch.setattr(kd_losses.crd, name, getattr(kd_losses.crd, name))
    go(request.param)
    return request.param


def build(case, bank):
    widths = case["in/feat_s"].shape[1], case["in/feat_t"].shape[1]
    crd = CRD(*widths, bank=bank, **case.hyper).double()
    state = {
        f"embed_{x}.{p}": case[f"param/embed_{x}.linear.{p}"]
        for x in SIDES
        for p in ("weight", "bias")
    }
    state |= {f"memory_{x}": case[f"param/contrast.memory_{x}"] for x in SIDES}
    state |= {f"log_z_{x}": torch.tensor(math.nan).double() for x in SIDES}
    crd.load_state_dict(state)
    return crd


@pytest.mark.parametrize("bank", ["device", "host"])
@pytest.mark.parametrize("case", cases("crd"))
def test_reference(case, bank, way):
    """Two steps: the first fixes Z, the second sees the banks that the first moved."""
    crd = build(case, bank)
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


def test_naive(way):
    crd = toy()
    feat_s, feat_t = torch.randn(2, 3).double(), torch.randn(2, 6).double()
    sample_idx = torch.tensor([[0, 1, 2, 4, 5, 7], [1, 0, 2, 3, 5, 6]])
    expected = naive(crd, feat_s, feat_t, sample_idx)
    assert crd(feat_s, feat_t, sample_idx[:, 0], sample_idx).item() == pytest.approx(
        expected, rel=1e-10
    )


@pytest.mark.parametrize("z_is_set", [False, True])
def test_gradcheck(z_is_set, way):
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


def test_small_temperature_stays_finite(way):
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
    with pytest.raises(ValueError, match="classes"):
        toy(labels=torch.zeros(12, dtype=torch.int64))
    with pytest.raises(ValueError, match="12"):
        toy(labels=torch.arange(5))
    with pytest.raises(ValueError, match="labels"):
        toy(labels=None)(torch.zeros(2, 3).double(), torch.zeros(2, 6).double(), torch.arange(2))
    with pytest.raises(ValueError, match="nce_t"):
        toy(nce_t=0.0)
    with pytest.raises(ValueError, match="bank.*disk"):
        toy(bank="disk")


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


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_both_ways_are_one(batch, dtype, monkeypatch):
    """In loss, gradients, banks and Z, over steps of training; on the host too."""
    monkeypatch.setattr(kd_losses.crd, "GATHER", None)
    monkeypatch.setattr(kd_losses.crd, "SLICE", None)
    settings = dict(feat_dim=4, nce_n=9, nce_t=0.2, n_data=30, labels=torch.arange(30) % 3)
    crd = CRD(3, 6, **settings)
    crd = crd.double() if dtype == torch.float64 else crd
    features = torch.randn(3, batch, 9).to(dtype)
    found = []
    for way, bank in (("whole", "device"), ("gather", "device"), ("gather", "host")):
        go(way)
        part = CRD(3, 6, **settings, bank=bank).to(crd.embed_s.weight.dtype)
        part.load_state_dict(crd.state_dict())
        torch.manual_seed(1)
        values = []
        for step, feat in enumerate(features):
            feat_s = feat[:, :3].clone().requires_grad_()
            loss = part(feat_s, feat[:, 3:], torch.arange(batch) * 5 + step)
            values += [loss, *torch.autograd.grad(loss, [feat_s, *part.parameters()])]
        found.append((values, part.state_dict()))
    for other in found[1:]:
        rtol = 1e-10 if dtype == torch.float64 else None
        torch.testing.assert_close(other, found[0], rtol=rtol, atol=rtol and 1e-12)


@pytest.mark.parametrize("n_data, gathered", [(50_000, False), (200_000, False), (1_281_167, True)])
def test_the_size_says_which_way(n_data, gathered, monkeypatch):
    """Without the work: whether rows are asked for, of a bank and draws of that size."""
    asked = []
    monkeypatch.setattr(kd_losses.crd, "_rows", lambda *args: asked.append(args) or ())
    crd = CRD(3, 6, feat_dim=1, n_data=n_data)
    sample_idx = torch.zeros(1, 1 + 16384, dtype=torch.int64)
    crd.z_is_set = True
    crd._side(torch.ones(1, 1), crd.memory_t, crd.log_z_s, sample_idx)
    assert bool(asked) == gathered


def test_gathered_rows_stay_within_bounds(monkeypatch):
    """However many are drawn: of SLICE, of a board of half the batch, or of one column."""
    monkeypatch.setattr(kd_losses.crd, "SLICE", 200)
    memory = torch.randn(40, 4)
    for batch, limit in ((6, 200), (2, 40), (60, 240)):
        sample_idx = torch.randint(40, (batch, 33))
        rows = []
        for part in kd_losses.crd._rows(memory, sample_idx):
            assert part.untyped_storage().nbytes() <= 4 * limit
            rows.append(part.clone())
        assert torch.equal(torch.cat(rows, dim=1), memory[sample_idx])


def test_draws_among_a_million_are_fair():
    """A float32 in [0, 1) has 2^24 values, of which 14 would fall to one sample and 13 to the
    next."""
    n, size = 1_281_167, 1300
    crd = CRD(3, 6, feat_dim=1, nce_n=4_000_000, n_data=n, labels=torch.arange(n) // size)
    drawn = crd.draw(torch.tensor([n - 1]))[0, 1:]  # of the last class: the others come first
    others = n - n % size
    assert drawn.min() >= 0 and drawn.max() < others
    assert abs(drawn.double().mean() / others - 0.5) < 6 * (1 / 12 / 4_000_000) ** 0.5
    eighth = others // 8
    values = (torch.arange(2**21).double() * others / 2**24).long().bincount()[:eighth]
    favoured, drawn = values == 14, drawn[drawn < eighth]
    expected = len(drawn) * favoured.double().mean()
    assert 0.05 < favoured.double().mean() < 0.2
    assert abs(favoured[drawn].sum() - expected) < 4 * expected**0.5


def test_a_bank_on_the_host_stays_there():
    crd = CRD(3, 6, feat_dim=4, nce_n=5, n_data=12, labels=torch.arange(12) % 3, bank="host")
    keys = list(crd.state_dict())
    bank = crd.memory_s.clone()
    crd = copy.deepcopy(crd).to("meta")  # a device that is always there
    assert {x.device.type for x in crd.parameters()} == {"meta"}
    assert {x.device.type for x in crd.buffers()} == {"cpu"}
    assert torch.equal(crd.memory_s, bank) and list(crd.state_dict()) == keys
    crd.double()
    assert crd.memory_s.dtype == crd.log_z_t.dtype == torch.float64
    assert crd.order.dtype == torch.int64 and torch.equal(crd.memory_s, bank.double())
    assert keys == list(toy().state_dict()), "a checkpoint is good for both"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_bank_on_the_host_serves_the_device(way):
    """As one on the device does, the negatives being given."""
    feat_s, feat_t = torch.randn(4, 3).cuda().requires_grad_(), torch.randn(4, 6).cuda()
    idx, sample_idx = torch.arange(4).cuda(), torch.randint(12, (4, 6)).cuda()
    one, other = toy().float(), toy(bank="host").float()
    other.load_state_dict(one.state_dict())
    one.cuda(), other.cuda()
    assert other.memory_s.device.type == "cpu" and one.memory_s.device.type == "cuda"
    for _ in range(2):
        expected, loss = (crd(feat_s, feat_t, idx, sample_idx) for crd in (one, other))
        torch.testing.assert_close(loss, expected)
        grads = [torch.autograd.grad(x, feat_s)[0] for x in (loss, expected)]
        torch.testing.assert_close(*grads)
    torch.testing.assert_close(other.memory_s, one.memory_s.cpu())
    assert other(feat_s, feat_t, idx).isfinite()


def a_process(rank, folder):
    """Two steps with features of your own, each way and each place."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    found = {}
    for way in WAYS:
        go(way)
        for bank in ("device", "host"):
            torch.manual_seed(0)
            crd = toy(bank=bank)
            torch.manual_seed(1 + rank)
            for step in range(2):
                idx = torch.tensor([2, 5]) + 3 * rank + step
                crd(torch.randn(2, 3).double(), torch.randn(2, 6).double(), idx)
            found[way, bank] = crd.state_dict()
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_processes_keep_equal_banks(tmp_path):
    torch.multiprocessing.spawn(a_process, (str(tmp_path),), nprocs=2)
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    whole = one["whole", "device"]
    assert len(one) == 4 and not whole["log_z_s"].isnan()
    for name, state in one.items():
        torch.testing.assert_close(state, other[name], rtol=0, atol=0)
        torch.testing.assert_close(state, whole, rtol=1e-10, atol=1e-12)
