"""Device and precision: which is chosen, float16's loss scaling, and going on with a scaler.

float16 has no fast kernels on most CPUs: the scaler's path runs here with float32 forward passes,
in the slow tier for a step in float16 itself, and with --soak for whole trainings with convolutions
that are rounded to it.
"""

import contextlib
import itertools
import signal
from pathlib import Path
from statistics import fmean

import pytest
import torch
from conftest import tiers
from test_interruption import assert_same, command, result, stop_at
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import network
import train_base
import train_kd
import utils
from engine.checkpoint import read_checkpoint
from engine.run import read_metrics
from utils import Precision, UserError

FP16 = ["--amp", "fp16"]


@pytest.fixture
def float32_forward(monkeypatch):
    """--amp fp16 with everything but the casts."""
    monkeypatch.setattr(Precision, "autocast", lambda self: contextlib.nullcontext())


def one_step(precision, grads):
    """SGD on w = 1 with the given gradients, one step each. Returns w after each step."""
    w = nn.Parameter(torch.ones(1))
    optimizer = utils.sgd([w], utils.argparse.Namespace(**RECIPE))
    seen = []
    for grad in grads:
        optimizer.zero_grad(set_to_none=True)
        precision.backward((w * grad).sum())
        precision.step(optimizer)
        seen.append(w.item())
    return seen


RECIPE = dict(lr=0.1, momentum=0.9, weight_decay=0.0, nesterov=0)


# --- the scaler -----------------------------------------------------------------------------------


def test_scaled_steps_are_the_plain_steps():
    grads = [1.0, -0.5, 0.25]
    scaled = Precision("cpu", torch.float16)
    assert one_step(scaled, grads) == pytest.approx(one_step(Precision(), grads))
    assert scaled.scaler.get_scale() == 2.0**16


def test_a_step_with_infinite_gradients_is_skipped():
    """The first one too, in which the optimizer has no momentum yet."""
    scaled = Precision("cpu", torch.float16)
    found = one_step(scaled, [float("inf"), 1.0, float("nan"), 1.0])
    plain = one_step(Precision(), [1.0, 1.0])
    assert found == pytest.approx([1.0, plain[0], plain[0], plain[1]])
    assert scaled.scaler.get_scale() == 2.0**14


def test_the_scaler_is_saved_and_loaded():
    one, two = (Precision("cpu", torch.float16) for _ in range(2))
    one_step(one, [float("inf"), 1.0])
    two.load(one.state())
    assert two.scaler.state_dict() == one.scaler.state_dict() and two.scaler.get_scale() == 2.0**15
    with pytest.raises(ValueError):
        two.load({})
    assert Precision().state() == {}
    Precision().load({})


@pytest.mark.parametrize("mode", tiers(["st", "at", "vkd", "fsp"], "st"))
@pytest.mark.parametrize("more", tiers([[], ["--accumulate", "2"]], []))
def test_a_training_with_the_scaler_is_that_without(
    mode,
    more,
    teacher,
    tmp_path,
    float32_forward,
):
    """Parameter groups, phases and micro-batches: a scale of powers of two changes no digit."""
    rows = []
    for amp in ("off", "fp16"):
        argv = command(mode, teacher, tmp_path, amp, 1)
        rows.append(read_metrics(train_kd.main([*argv, "--amp", amp, *more])["dir"]))
    assert rows[0] == rows[1]


@pytest.mark.slow
def test_stopped_with_a_scaler_goes_on_exactly(
    teacher,
    tmp_path,
    monkeypatch,
    float32_forward,
):
    argv = command("crd", teacher, tmp_path, "stopped")
    train_kd.main([*command("crd", teacher, tmp_path, "whole"), *FP16])
    with monkeypatch.context() as patch:
        stop_at(patch, 6, signal.SIGTERM)
        with pytest.raises(SystemExit):
            train_kd.main([*argv, *FP16])
    saved = read_checkpoint(tmp_path / "stopped" / "checkpoint.pth.tar")
    assert saved["inside"]["step"] and saved["scaler"]["scale"] == 2.0**16
    train_kd.main([*argv, *FP16, "--resume"])
    assert_same(result(tmp_path / "whole"), result(tmp_path / "stopped"))


def test_train_base_with_a_scaler_goes_on_exactly(tmp_path, monkeypatch, float32_forward):
    argv = ["--net_name", "resnet8", "--data_name", "digits", "--img_size", "12", "--cuda", "0"]
    argv += [*FP16, "--epochs", "2", "--save_root", str(tmp_path), "--note"]
    train_base.main([*argv, "whole"])
    with monkeypatch.context() as patch:
        stop_at(patch, 7, signal.SIGTERM)
        with pytest.raises(SystemExit):
            train_base.main([*argv, "stopped"])
    train_base.main([*argv, "stopped", "--resume"])
    assert_same(result(tmp_path / "whole"), result(tmp_path / "stopped"))


@pytest.mark.slow
def test_float16_itself():
    """Forward in float16, the loss and the gradients finite: a step of a small network."""
    precision = Precision("cpu", torch.float16)
    net = network.build("resnet8", 10).to(memory_format=torch.channels_last)
    optimizer = utils.sgd(net.parameters(), utils.argparse.Namespace(**RECIPE))
    img, target = torch.randn(4, 3, 8, 8), torch.arange(4)
    before = [p.detach().clone() for p in net.parameters()]
    for _ in range(2):
        out, loss = train_base.train_step(net, optimizer, img, target, precision)
    assert loss.isfinite() and precision.scaler.get_scale() > 1
    assert not all(torch.equal(a, b) for a, b in zip(before, net.parameters()))


class RoundedConvolutions(TorchDispatchMode):
    """float16 convolutions, computed as GPUs do, summed in float32 and rounded to float16: fifty
    times as fast as a CPU's own."""

    KINDS = (torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func not in self.KINDS or args[0].dtype != torch.float16:
            return func(*args, **(kwargs or {}))

        def cast(x, dtype):
            return x.to(dtype) if torch.is_tensor(x) else x

        args = tree_map(lambda x: cast(x, torch.float32), args)
        return tree_map(lambda x: cast(x, torch.float16), func(*args, **(kwargs or {})))


@pytest.fixture(scope="module")
def good_teacher(tmp_path_factory):
    argv = ["--net_name", "resnet14", *LEARN, "--save_root", tmp_path_factory.mktemp("t")]
    return train_base.main([str(x) for x in argv])["dir"] + "/model_best.pth.tar"


LEARN = ["--data_name", "digits", "--img_size", "12", "--cuda", "0", "--batch_size", "32"]
LEARN += ["--lr", "0.05", "--epochs", "10", "--milestones", "7,9"]


@pytest.mark.soak
@pytest.mark.parametrize("mode", ["st", "at", "dkd"])
def test_float16_learns_what_float32_learns(mode, good_teacher, tmp_path):
    """To within a point of accuracy, the mean of three seeds: through autocast, the scaler and its
    skipped steps."""
    last = {"off": [], "fp16": []}
    for amp, seed in itertools.product(last, (1, 2, 3)):
        argv = [*LEARN, "--kd_mode", mode, "--t_model", good_teacher, "--s_name", "resnet8"]
        argv += ["--amp", amp, "--seed", seed, "--save_root", tmp_path, "--note", f"{amp}{seed}"]
        with RoundedConvolutions():
            last[amp].append(train_kd.main([str(x) for x in argv])["last"])
    print(mode, last)
    assert fmean(last["off"]) > 85 and fmean(last["fp16"]) >= fmean(last["off"]) - 1, last
    saved = read_checkpoint(tmp_path / "fp163" / "checkpoint.pth.tar")
    assert saved["scaler"]["scale"] >= 1


# --- what is chosen -------------------------------------------------------------------------------


class Accelerator:
    """torch.accelerator of a machine with `count` devices of a kind."""

    def __init__(self, kind, count=1):
        self.kind, self.count, self.index = kind, count, 0

    def is_available(self):
        return self.kind is not None

    def current_accelerator(self):
        return torch.device(self.kind) if self.kind else None

    def device_count(self):
        return self.count

    def current_device_index(self):
        return self.index

    def set_device_index(self, index):
        self.index = index


@pytest.mark.parametrize(
    "there, flags, expected",
    [
        (None, {}, "cpu"),
        ("cuda", {}, "cuda:0"),
        ("cuda", dict(cuda=0), "cpu"),
        ("cuda", dict(device="cpu"), "cpu"),
        ("cuda", dict(device="cuda:1"), "cuda:1"),
        ("cuda", dict(device="cuda:1", cuda=1), "cuda:1"),
        ("mps", {}, "mps"),
        ("mps", dict(device="mps"), "mps"),
        ("xpu", {}, "xpu:0"),
        ("xpu", dict(cuda=0), "cpu"),
    ],
)
def test_the_device(there, flags, expected, monkeypatch):
    monkeypatch.setattr(torch, "accelerator", Accelerator(there, 2))
    assert str(utils.select_device(**flags)) == expected


@pytest.mark.parametrize(
    "there, flags, name",
    [
        (None, dict(cuda=1), "--cuda 1"),
        (None, dict(device="cuda"), "--device cuda"),
        ("mps", dict(device="cuda"), "--device cuda"),
        ("mps", dict(cuda=1), "--cuda 1"),
        ("cuda", dict(device="cuda:2"), "--device cuda:2"),
        ("cuda", dict(device="cuda:-1"), "--device cuda:-1"),
        ("cuda", dict(device="cpu", cuda=1), "--device cpu"),
        ("cuda", dict(device="cpu:0"), "--device cpu:0"),
        ("cuda", dict(device="tpu"), "--device tpu"),
    ],
)
def test_a_device_that_is_not_there(there, flags, name, monkeypatch):
    monkeypatch.setattr(torch, "accelerator", Accelerator(there, 2))
    with pytest.raises(UserError) as error:
        utils.select_device(**flags)
    assert name in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("native, dtype", [(True, torch.bfloat16), (False, torch.float16)])
def test_auto_takes_float16_where_bfloat16_is_emulated(native, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device: device)
    assert utils.precision(torch.device("cuda"), "auto").dtype == dtype
    assert utils.precision(torch.device("mps"), "auto").dtype is None


@pytest.mark.slow
@pytest.mark.parametrize(
    "amp, words", [("bf16", "bfloat16"), ("fp16", "float16"), ("off", "float32")]
)
def test_the_log_says_the_precision(amp, words, tmp_path, float32_forward):
    argv = ["--net_name", "resnet8", "--data_name", "digits", "--img_size", "8", "--epochs", "1"]
    argv += ["--batch_size", "256", "--amp", amp, "--cuda", "0", "--save_root", str(tmp_path)]
    folder = Path(train_base.main([*argv, "--note", amp])["dir"])
    assert f"threads, {words}" in (folder / "log.txt").read_text().splitlines()[0]
