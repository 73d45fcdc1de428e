"""Weights from anywhere: whoever wrote the file, it is read safely and strictly, or refused in one
line."""

import argparse
import copy
import io
import json
import subprocess
import sys
import zipfile
from contextlib import redirect_stderr
from pathlib import Path

import numpy as np
import pytest
from conftest import tiers
import torch
from fill import image
from messages import refused
from torch import nn

import network
from engine import foreign
from engine.checkpoint import find_weights, load_weights, read_checkpoint, read_weights
from engine import console

DATA = Path(__file__).parent / "data"
KDZOO = DATA / "kdzoo_resnet20.pth.tar"
KDZOO_LOGITS = json.loads((DATA / "kdzoo_logits.json").read_text())
QUICK = ("resnet20", "resnet8x4", "wrn_16_2", "vgg8", "MobileNetV2", "ShuffleV1")
NAMES = tiers(network.NETWORKS, *QUICK)


def _same_weights(path, name, num_class, state):
    """The file at `path` gives a network `name` with exactly the entries of `state`."""
    found = find_weights(None, path, "t_name", "t_model")
    assert (found.name, found.meta["num_class"]) == (name, num_class)
    net = found.build(num_class, seed=0, img_size=32)
    torch.testing.assert_close(dict(net.state_dict()), dict(state), rtol=0, atol=0)


def _kdzoo(state):
    return {
        "module." + k.replace("layer", "res").replace("downsample", "ds"): v
        for k, v in state.items()
    }


@pytest.mark.parametrize(
    "wrap",
    {
        "raw": lambda state: state,
        "ours": lambda state: {"snet": state, "net1": {"x": torch.ones(1)}, "epoch": 3},
        "KD-Zoo": lambda state: {"epoch": 1, "net": _kdzoo(state), "prec@1": 5.0, "prec@5": 6.0},
        "KD-Zoo, two": lambda state: {"net1": {"x": torch.ones(1)}, "net2": _kdzoo(state)},
        "MDistiller": lambda state: {"model": state},
        "DataParallel": lambda state: {"model": {f"module.{k}": v for k, v in state.items()}},
        "compiled": lambda state: {f"_orig_mod.{k}": v for k, v in state.items()},
        "Lightning": lambda state: {"state_dict": state, "epoch": 3, "hyper_parameters": {"lr": 1}},
        "one of any name": lambda state: {"weights_ema": state, "epoch": 3, "opt": {"lr": 0.1}},
        "before torch 0.4.1": lambda state: {
            k: v for k, v in state.items() if not k.endswith("num_batches_tracked")
        },
    }.items(),
    ids=lambda item: item[0],
)
def test_weights_in_any_wrapping(wrap, tmp_path):
    state = network.build("resnet8", 7).state_dict()
    torch.save(wrap[1](state), tmp_path / "x.pth")
    _same_weights(tmp_path / "x.pth", "resnet8", 7, state)


def test_repdistillers_files(tmp_path):
    """Its best, its `*_last.pth`, which keeps the flags as a Namespace, and its epochs'."""
    net = network.build("resnet8x4", 100)
    state = net.state_dict()
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    opt = argparse.Namespace(
        model="resnet8x4", lr_decay_epochs=[150, 180, 210], learning_rate=0.05, trial="0", n_gpu=1
    )
    for name, wrapped in {
        "resnet8x4_best.pth": dict(epoch=240, model=state, best_acc=torch.tensor(72.5)),
        "resnet8x4_last.pth": dict(opt=opt, model=state, optimizer=optimizer.state_dict()),
        "ckpt_epoch_240.pth": dict(epoch=240, model=state, accuracy=torch.tensor(72.5)),
    }.items():
        torch.save(wrapped, tmp_path / name)
        _same_weights(tmp_path / name, "resnet8x4", 100, state)


def test_mdistillers_files(tmp_path):
    net = network.build("wrn_16_1", 100)
    wrapped = dict(model=net.state_dict(), epoch=240, best_acc=65.0)
    torch.save(
        {**wrapped, "optimizer": {"state": {}, "param_groups": []}}, tmp_path / "student_best"
    )
    _same_weights(tmp_path / "student_best", "wrn_16_1", 100, net.state_dict())


@pytest.mark.parametrize("name", NAMES)
def test_public_files_give_the_same_logits(name, tmp_path):
    """Written in RepDistiller's and in MDistiller's format and read back."""
    num_class, size = (1000, 64) if name == "MobileNetV1" else (100, 32)
    net = foreign.build(name, num_class).eval()
    state, opt = net.state_dict(), argparse.Namespace(model=name, lr_decay_epochs=[150])
    with torch.no_grad():
        img = torch.randn(1, 3, size, size)
        out = net(img)
        for wrapped in (dict(opt=opt, model=state), dict(epoch=240, model=state)):
            torch.save(wrapped, tmp_path / "x.pth")
            found = find_weights(None, tmp_path / "x.pth", "t_name", "t_model")
            assert found.name == name
            assert torch.equal(found.build(num_class, 0, size).eval()(img), out)


def test_safetensors(tmp_path):
    net = network.build("resnet8", 7)
    safetensors = pytest.importorskip("safetensors.torch")
    path = tmp_path / "x.safetensors"
    safetensors.save_file(net.state_dict(), path)
    _same_weights(path, "resnet8", 7, net.state_dict())
    safetensors.save_file(
        net.state_dict(), path, {"meta": '{"network": "resnet8", "num_class": 7}'}
    )
    _same_weights(path, "resnet8", 7, net.state_dict())
    path.write_bytes(path.read_bytes()[:-100])
    with refused("x.safetensors"):
        read_checkpoint(path)


def test_safetensors_without_the_library(tmp_path, monkeypatch):
    (tmp_path / "x.safetensors").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with refused("x.safetensors", "pip install safetensors"):
        read_checkpoint(tmp_path / "x.safetensors")


def test_a_file_that_kdzoo_wrote():
    """Written by KD-Zoo's train_base.py; its logits were recorded there, in float32."""
    found = find_weights(None, KDZOO, "t_name", "t_model")
    assert (found.name, found.meta["num_class"]) == ("resnet20", 10)
    net = found.build(10, 0, 32).eval()
    with torch.no_grad():
        out = net(image().float())
    torch.testing.assert_close(out, torch.tensor(KDZOO_LOGITS), rtol=1e-5, atol=1e-5)


class Evil:
    def __reduce__(self):
        return Path.touch, (Path("ran"),)


def test_code_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = network.build("resnet8", 10).state_dict()
    for name, payload in {"evil": Evil(), "numpy": np.float64(3.0), "net": nn.Linear(2, 2)}.items():
        torch.save({"model": state, "accuracy": payload}, f"{name}.pth")
        with refused(f"{name}.pth"):
            find_weights(None, f"{name}.pth", "t_name", "t_model")
    torch.save(network.build("resnet8", 10), "whole.pth")
    with refused("whole.pth"):
        find_weights(None, "whole.pth", "t_name", "t_model")
    assert not Path("ran").exists()


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(
    "name",
    ["old", "it's  two", '"; touch ran; "', "$(touch ran)`touch ran`", "a\n!!\033[31m\udce9"],
)
def test_the_conversion_that_is_proposed_works(whole, name, tmp_path, monkeypatch):
    """Whatever the file is called, a shell gives Python what it is to run, and runs nothing
    else."""
    monkeypatch.chdir(tmp_path)
    net = network.build("resnet8", 10)
    state = net.state_dict()
    if whole:
        net = nn.Sequential(net)  # a class that the converting process can import
        torch.save(net, f"{name}.pth")
        state = net.state_dict()
    else:
        torch.save({"model": state, "accuracy": np.float64(3.0)}, f"{name}.pth")
    with pytest.raises(SystemExit) as stop, redirect_stderr(io.StringIO()) as printed:
        console.command(lambda argv: read_checkpoint(f"{name}.pth"))([])
    assert stop.value.code == 2
    line = printed.getvalue()
    assert line.count("\n") == 1 and line[:-1].isprintable()
    command = "printf %s " + line.partition("python -c ")[2]
    code = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True).stdout
    exec(code, {})
    converted = read_weights(read_checkpoint(f"{name}.converted.pth"))
    torch.testing.assert_close(converted, dict(state), rtol=0, atol=0)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        [f"{name}.pth", f"{name}.converted.pth"]
    )


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    """Compressed records, and many that lie over each other; a file that is compressed is read."""
    net = network.build("resnet8", 10)
    path, packed = tmp_path / "x.pth", tmp_path / "packed.pth"
    torch.save({"net": net.state_dict()}, path)
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for record in old.infolist():
            new.writestr(record.filename, old.read(record))
    _same_weights(packed, "resnet8", 10, net.state_dict())

    large, overlaid = tmp_path / "large.pth", tmp_path / "overlaid.pth"
    with zipfile.ZipFile(large, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", bytes(10**7))
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(overlaid, "w") as archive:
        archive.writestr("x/data.pkl", old.read("x/data.pkl") + bytes(10**5))
        for i in range(50):  # the central directory alone says so
            archive.filelist.append(copy.copy(archive.filelist[0]))
            archive.filelist[-1].filename = f"x/data/{i}"
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("it was unpacked"))
    for file in (large, overlaid):
        with refused(file):
            read_checkpoint(file)


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_a_file_cut_short(share, tmp_path):
    path = tmp_path / "x.pth"
    torch.save({"model": network.build("resnet8", 10).state_dict()}, path)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with refused(path):
        find_weights(None, path, "t_name", "t_model")


def test_no_checkpoint_at_all(tmp_path):
    for content in (b"hello", b"\x80\x04N."):
        (tmp_path / "x.pth").write_bytes(content)
        with refused("x.pth"):
            read_checkpoint(tmp_path / "x.pth")
    torch.save({"epoch": 3, "lr": [0.1]}, tmp_path / "x.pth")
    with refused("x.pth", "epoch", "lr"):
        find_weights(None, tmp_path / "x.pth", "t_name", "t_model")
    torch.save(torch.ones(2), tmp_path / "x.pth")
    with refused("x.pth", "Tensor"):
        find_weights(None, tmp_path / "x.pth", "t_name", "t_model")


def test_names_and_files_that_contradict(tmp_path):
    path = tmp_path / "x.pth"
    state = network.build("resnet8", 10).state_dict()
    state["fc.wait"] = state.pop("fc.weight")
    torch.save(state, path)
    with refused(path, "--t_name"):
        find_weights(None, path, "t_name", "t_model")
    found = find_weights("resnet8", path, "t_name", "t_model")
    with refused(path, "resnet8", "fc.weight", "fc.wait"):
        found.build(10, 0, 32)
    torch.save({"net": state, "meta": {"network": "resnet8"}}, path)
    with refused("--t_name", "resnet14", "resnet8", path):
        find_weights("resnet14", path, "t_name", "t_model")
    torch.save({"net": state, "meta": {"network": "evil.py:build"}}, path)
    with refused(path, "--t_name", "evil.py:build"):
        find_weights(None, path, "t_name", "t_model")


@pytest.mark.parametrize(
    "spoil, name",
    [
        (lambda state: state.pop("fc.bias"), "fc.bias"),
        (lambda state: state.update(extra=torch.zeros(1)), "extra"),
        (
            lambda state: state.update({"fc.bias": torch.zeros(3)}),
            "fc.bias",
        ),
        (lambda state: state.clear(), "resnet8"),
    ],
)
def test_nothing_is_loaded_by_halves(spoil, name):
    net = network.build("resnet8", 10)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    state = network.build("resnet8", 10).state_dict()
    spoil(state)
    with refused("x.pth", name):
        load_weights(net, state, "x.pth", "resnet8")
    torch.testing.assert_close(dict(net.state_dict()), before, rtol=0, atol=0)


def test_the_network_that_fits_is_named():
    state = network.build("resnet14", 100).state_dict()
    with refused("x.pth", "resnet14", 100):
        load_weights(network.build("resnet8", 100), state, "x.pth", "resnet8")
