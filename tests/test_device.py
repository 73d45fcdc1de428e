"""What a GPU would refuse or wait for, found without one: whole steps on torch's `meta` device, and
the losses under CUDA's own autocast on fake tensors."""

from argparse import Namespace

import pytest
import torch
import toys
from conftest import tiers
from on_meta import Guard, Illegal, batch_on, distiller_on, like_on, without_autocast
from torch._subclasses.fake_tensor import FakeTensorMode

import dataset
import train_kd
import utils
from engine import stream
from engine.published import IMAGENET
from kd_losses import METHODS

CFG = Namespace(lr=0.1, momentum=0.9, weight_decay=1e-4, nesterov=1)
READING = {"bss": "the attack picks images by what the networks predict"}
MODES = [mode for mode in METHODS if mode not in READING]
# one of each kind: logits, maps, features, banks, phases, two views, second derivatives
QUICK = ["st", "at", "rkd", "crd", "fsp", "ft", "mlkd", "reviewkd", "ctkd", "sobolev", "dml"]


@pytest.fixture(autouse=True)
def no_autocast(monkeypatch):
    with without_autocast(monkeypatch):
        yield


def sgd(params):
    """As utils.sgd, but not fused: `meta` lacks that kernel."""
    return torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=1e-4, nesterov=True)


def steps(mode, *argv, accumulate=1, epoch=1, standardise=False):
    """One step in each phase. Returns the calls of operators."""
    distiller, calls = distiller_on("meta", mode, *argv), []
    for criterion in distiller.added:
        criterion.standardise = standardise
    for phase in distiller.phases:
        optimizer = sgd(distiller.param_groups(phase))
        batch, meter = batch_on("meta", distiller), utils.Meter()
        weights, precision = toys.weights(distiller, 1.0, phase), utils.Precision("meta")
        distiller.set_epoch(epoch, 240)  # outside of what a graph captures
        with Guard() as guard:
            terms = train_kd.train_step(
                distiller, phase, optimizer, batch, weights, precision, accumulate
            )
            meter.add(terms, len(batch.img))
        assert ("kd" in terms) == phase.kd
        calls += guard.calls
    return calls


# --- a step ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", tiers(MODES, *QUICK))
def test_a_step_stays_on_the_device(mode):
    assert steps(mode)


@pytest.mark.parametrize("mode", READING)
def test_what_reads_by_design(mode):
    assert not METHODS[mode].capturable
    with pytest.raises(Illegal):
        steps(mode)


@pytest.mark.parametrize("mode", tiers(["st", "rkd", "mlkd", "crd", "ctkd"], "st", "crd"))
def test_micro_batches_stay_on_the_device(mode):
    assert steps(mode, accumulate=2)


@pytest.mark.parametrize(
    "mode", tiers([m for m, x in METHODS.items() if x.inputs.logits_only], "st", "mlkd", "wkd_l")
)
def test_standardised_logits_stay_on_the_device(mode):
    assert steps(mode, standardise=True)


@pytest.mark.parametrize("protocol", tiers(["crd", "mdistiller-imagenet", "reviewkd"], "crd"))
@pytest.mark.parametrize(
    "mode",
    tiers(["ab", "fsp", "ft", "ofd", "reviewkd", "wkd_l", "cc", "fitnet"], "ab", "ofd", "cc"),
)
def test_published_settings_stay_on_the_device(mode, protocol):
    assert steps(mode, "--protocol", protocol)


def test_the_bank_on_the_host_is_there():
    """--bank host stores the banks on the CPU: that is what it is for, and no graph captures it."""
    distiller = distiller_on("meta", "crd", "--bank", "host", make=lambda x: x)
    assert all(x.device.type == "cpu" for x in distiller.added.buffers())


@pytest.mark.parametrize(
    "mode", tiers([m for m in MODES if METHODS[m].capturable], "st", "crd", "ctkd")
)
def test_no_number_that_changes_is_baked_into_a_step(mode):
    """A captured graph replays Python numbers as they were: those of two epochs are the same."""
    one, two = (steps(mode, epoch=epoch) for epoch in (1, 200))
    assert one == two


# --- outside the step -----------------------------------------------------------------------------


def test_evaluation_and_meters_stay_on_the_device(monkeypatch):
    distiller = distiller_on("meta", "st")
    monkeypatch.setattr(utils.Meter, "read", lambda self: self.counts)  # read once, at the end
    batches = [
        (batch_on("meta", distiller).img, torch.zeros(8, dtype=torch.long, device="meta"), 0)
    ]
    with Guard() as guard:
        net = distiller.student.net
        assert utils.evaluate(net, batches * 2, utils.Precision("meta"))
    assert guard.calls


@pytest.mark.parametrize("img_size", [16, 24])
@pytest.mark.parametrize("flags", [{}, dict(padding="zero"), dict(two_views=True)])
def test_batches_are_made_on_the_device(flags, img_size):
    """All the randomness is drawn up front; from the second batch on, nothing comes from the
    CPU."""
    take_batches(img_size, {}, **flags)


def test_autoaugment_runs_on_the_device():
    take_batches(24, dict(autoaugment=True))


def take_batches(img_size, fields, **flags):
    pixels = torch.zeros(40, 16, 16, 3, dtype=torch.uint8)
    fields |= dict(img_size=img_size)
    images = dataset.Images(pixels, torch.arange(40) % 5, [*"abcde"], *IMAGENET, **fields)
    batches = stream.train_batches(images.to("meta"), 8, 1, 1, **flags)
    next(batches)
    with Guard():
        for _ in range(3):
            next(batches)


# --- CUDA's autocast ------------------------------------------------------------------------------


@pytest.fixture
def cuda_autocast(monkeypatch):
    """torch.autocast("cuda") on a machine without CUDA: the casts are those of fake tensors."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args, **kwargs: True)


@pytest.mark.parametrize("dtype", tiers([torch.bfloat16, torch.float16], torch.bfloat16))
@pytest.mark.parametrize("mode", tiers(MODES, "st", "at", "crd", "rkd", "vkd"))
def test_the_losses_are_float32_under_cudas_autocast(mode, dtype, cuda_autocast):
    """CUDA casts other operators than the CPU does. Forward alone: backward needs a driver."""
    fake = FakeTensorMode(allow_non_fake_inputs=False)

    def make(x):
        with fake:
            return like_on("cuda")(x)

    distiller = distiller_on("cuda", mode, make=make)
    precision = utils.Precision("cuda", dtype) if dtype is torch.bfloat16 else utils.Precision()
    precision.device_type, precision.dtype = "cuda", dtype
    with fake:
        for phase in distiller.phases:
            distiller.set_trainable(phase)
            batch = batch_on("cuda", distiller)
            with precision.autocast(), Guard("cuda"):
                if distiller.image_grad:
                    return  # differentiates inside the loss: see above
                s, t = batch.features(distiller.student), batch.features(distiller.teacher)
                assert s.out.dtype == dtype
                for criterion in distiller.added if phase.kd else []:
                    loss = criterion(s, t, batch, phase.inputs)
                    assert loss.dtype == torch.float32 and loss.device.type == "cuda"


def test_no_loss_has_a_backward_of_its_own_that_autocast_would_surprise():
    """A custom autograd function sees other dtypes under CUDA's autocast than under the CPU's."""
    from test_kd_losses import ROOT

    own = {
        path.stem
        for path in (ROOT / "kd_losses").glob("*.py")
        if "autograd.Function" in path.read_text(encoding="utf-8")
    }
    assert own == {"kdsvd"}, "kdsvd's runs with autocast off"


# --- planted faults -------------------------------------------------------------------------------


class Cpu:
    generator = torch.Generator()
    noted = []


def item(self, out_s, out_t):
    return out_s.float().sum() * float(out_t.sum().item())


def arange(self, out_s, out_t):
    return (out_s.float() * torch.arange(out_s.shape[1])).sum()


def generator(self, out_s, out_t):
    noise = torch.empty_like(out_s).uniform_(generator=Cpu.generator)
    return (out_s.float() * noise).sum()


def mask(self, out_s, out_t):
    return out_s.float()[out_t > 0].sum()


@pytest.mark.parametrize(
    "fault, line",
    [
        (item, "out_t.sum().item()"),
        (arange, "torch.arange(out_s.shape[1])"),
        (generator, "uniform_(generator="),
        (mask, "[out_t > 0]"),
    ],
)
def test_a_planted_fault_is_found(fault, line, monkeypatch):
    monkeypatch.setattr("kd_losses.st.SoftTarget.forward", fault)
    with pytest.raises(Illegal) as error:
        steps("st")
    assert line in str(error.value) and "test_device.py" in str(error.value)


def test_a_planted_copy_in_a_meter_is_found(monkeypatch):
    add = utils.Meter.add

    def on_the_host(self, values, n):
        add(self, {name: value.cpu() for name, value in values.items()}, n)

    monkeypatch.setattr(utils.Meter, "add", on_the_host)
    with pytest.raises(Illegal) as error:
        steps("st")
    assert "value.cpu()" in str(error.value)


def test_a_planted_number_that_changes_is_found(monkeypatch):
    def fading(self, out_s, out_t):
        return out_s.float().sum() * (0.5 + 0.001 * len(Cpu.noted))

    monkeypatch.setattr("kd_losses.st.SoftTarget.forward", fading)
    one = steps("st")
    Cpu.noted.append(1)
    assert one != steps("st")
