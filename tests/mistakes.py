"""What a user may get wrong: damaged files and folders for the tests, and what a refusal must be.

A refusal is one line and exit code 2, and nothing is written. Its wording is free, but it must name
the flag, the file or the value that is wrong.
"""

import functools
import json
import os
import pickle
import shlex
import shutil
import struct
import sys
import warnings
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from messages import named
from PIL import Image
from torch import nn

import engine.run as run_module
import network
import train_base
import train_kd
from engine.checkpoint import read_checkpoint
from engine.run import Run

ROOT = Path(__file__).parent.parent
META = dict(
    network="resnet8",
    data_name="digits",
    img_root="./datasets",
    img_size=12,
    num_class=10,
    classes=[str(i) for i in range(10)],
    mean=[0.3] * 3,
    std=[0.3] * 3,
)
DIGITS = "--data_name digits --img_size 12"

# file: (key, value) of its metadata
CRAFTED = dict(
    network=("network", 5),
    data_name=("data_name", 5),
    img_root=("img_root", 7),
    num_class=("num_class", "10"),
    img_size=("img_size", -3),
    mean=("mean", [1]),
    std=("std", [0, 0, 0]),
    simkd=("network", "simkd:" * 3000 + "resnet8" + ":1" * 15_000),
    empty=("network", ""),
    zero=("img_root", "a\0b"),
    escapes=("network", "\x1b[31m\0" + "x" * 5000),
    surrogate=("data_name", "\ud800"),
    classes=("num_class", 2**63),
    digits=("num_class", 10**400),
    names=("classes", list(range(10))),
    few_names=("classes", ["cat", "dog"]),
    one_name=("classes", "0123456789"),
    logical=("num_class", True),
    tensor=("num_class", torch.tensor(10)),
    pixels=("img_size", 2.0**70),
    fit=("fit", "stretch"),
    logical_mean=("mean", [True, True, True]),
    large_mean=("mean", [10**400] * 3),
    scale=("mean", [125.0, 123.0, 114.0]),
    deep=("mean", functools.reduce(lambda x, _: [x, x], range(60), 0)),
    large_std=("std", [10**400] * 3),
    tensor_std=("std", torch.ones(3)),
)


# --- the files and folders that the tables name --------------------------------------------------


class Evil:
    """A pickle that makes a folder when it is read."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


def pictures(root, size=6, classes=("cat", "dog"), n=2):
    for split in ("train", "test"):
        for label, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(n):
                color = (90 * label, 20 * i, 200)
                Image.new("RGB", (size, size), color).save(root / split / name / f"{i}.png")
    return root


def png(width, height):
    """The beginning of a PNG of any size."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", b"")


def make_images(root):
    for size in (1, 4, 6, 97):
        pictures(root / f"size{size}", size)
    for name, change in {
        "empty_class": lambda x: [p.unlink() for p in (x / "train/dog").iterdir()],
        "no_test": lambda x: (x / "test").rename(x / "rest"),
        "other_classes": lambda x: (x / "test/dog").rename(x / "test/wolf"),
        "text": lambda x: (x / "train/cat/0.png").write_text("no picture"),
        "zero": lambda x: (x / "train/cat/0.png").write_bytes(b""),
        "half": lambda x: (x / "train/cat/0.png").write_bytes(
            (x / "train/cat/0.png").read_bytes()[:40]
        ),
        "wide": lambda x: Image.new("RGB", (7, 6)).save(x / "train/cat/0.png"),
        "pipe": lambda x: os.mkfifo(x / "train/cat/pipe.png"),
        "dangling": lambda x: (x / "train/cat/gone.png").symlink_to("gone"),
        "bomb": lambda x: (x / "train/cat/0.png").write_bytes(png(60_000, 60_000)),
        "no_utf8": lambda x: (x / os.fsdecode(b"train/cat/caf\xe9.png")).write_bytes(b"none"),
        "escapes": lambda x: (x / "train/cat/\x1b[31m\nred.png").write_bytes(b"none"),
        "odd_classes": lambda x: (x / "train/dog").rename(
            x / "train" / (os.fsdecode(b"caf\xe9\x1b[31m\n") + "x" * 200)
        ),
    }.items():
        change(pictures(root / name))
    pictures(root / "one_class", classes=("cat",))
    pictures(root / "one_image", classes=("cat",), n=1)
    (root / "no_classes" / "train").mkdir(parents=True)
    (root / "no_classes" / "test").mkdir()
    (root / "cut" / "cifar-10-batches-py").mkdir(parents=True)
    (root / "cut" / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"x" * 50)


def make_checkpoints(root):
    net = dict(network.build("resnet8", 10).state_dict())
    bias = {
        "nan": torch.full((10,), float("nan")),
        "inf": torch.full((10,), float("inf")),
        "complex": torch.zeros(10, dtype=torch.complex64),
        "bools": torch.zeros(10, dtype=torch.bool),
        "sparse": torch.ones(10).to_sparse(),
        "hollow": torch.zeros(10, device="meta"),
        "long_bias": torch.zeros(11),
    }
    files = {name: dict(net=net | {"fc.bias": x}, meta=META) for name, x in bias.items()}
    for name, (key, value) in CRAFTED.items():
        files[f"meta_{name}"] = dict(net=net, meta=META | {key: value})
    odd = OrderedDict(net=net, meta=META)
    odd.get = 3  # an attribute, which torch.save keeps
    attributes = torch.nn.Parameter(torch.zeros(10))
    attributes.isfinite = attributes.is_floating_point = 3
    with warnings.catch_warnings(action="ignore"):  # a prototype
        nested = torch.nested.nested_tensor([torch.ones(2)] * 2)
    files |= dict(
        nested=dict(net=net | {"fc.bias": nested}),
        claims=dict(net=net | {"fc.bias": torch.ones(1).expand(10**9, 10**4)}),
        odd_dict=odd,
        odd_tensor=dict(net=net | {"fc.bias": attributes}, meta=META),
        odd_keys=dict(net=net | {"\x1b[31m" + "k" * 5000: torch.ones(1)}, meta=META),
        only_keys={"\x1b[31m" + "k" * 5000: 3},
        own_shell=dict(net=net, meta=META | dict(network="x.py:f; touch ran")),
    )
    files |= dict(
        fine=dict(net=net, meta=META),
        own_code=dict(net=net, meta=META | dict(network="evil.py:build")),
        nowhere=dict(net=net, meta=META | dict(data_name="imagefolder", img_root="gone")),
        no_std=dict(net=net, meta={k: v for k, v in META.items() if k != "std"}),
        other=dict(net={"weight": torch.zeros(3)}),
        hundred=dict(net=network.build("resnet8", 100).state_dict()),
        lacks=dict(net={k: v for k, v in net.items() if k != "fc.bias"}, meta=META),
        extra=dict(net=net | {"more": torch.zeros(1)}, meta=META),
        wrong=dict(net=network.build("resnet14", 10).state_dict(), meta=META),
        number=3,
        nothing=None,
        listed=[1, 2],
        tensor=torch.zeros(2),
        empty={},
        hollow_net=dict(net={}),
        numbered={1: torch.zeros(2)},
        plain=dict(net={"epoch": 1}),
        evil=dict(net=Evil(os.mkdir, str(root / "pwned"))),
        array=dict(net=net, accuracy=np.float64(3.0)),
    )
    wolves = [f"wolf {i}" for i in range(10)]
    files |= dict(
        wolves=dict(net=net, meta=META | dict(classes=wolves)),
        pair=dict(student=net, teacher=net),
        flat_pair=dict(state_dict={f"{x}.{k}": v for k, v in net.items() for x in ("s", "t")}),
        half_inside=dict(state_dict={f"model.{k}": v for k, v in net.items() if k != "fc.bias"}),
        sized=dict(net=net, meta=META | dict(img_size=16)),
    )
    files["a,b"] = files["fine"]  # a comma separates several teachers
    for name, content in files.items():
        torch.save(content, root / f"{name}.pth")
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.zeros(1, 2),)), root / "x.pt2")
    (root / "graph.onnx").write_bytes(b"\x08\x08\x12\x07pytorch")
    old = dict(_use_new_zipfile_serialization=False)
    torch.save(files["evil"], root / "evil_old.pth", **old)
    (root / "evil.pkl").write_bytes(pickle.dumps(files["evil"]))
    data = (root / "fine.pth").read_bytes()
    for percent in (0, 1, 50, 99):
        (root / f"cut{percent}.pth").write_bytes(data[: len(data) * percent // 100])
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 16
    (root / "flipped.pth").write_bytes(flipped)
    shutil.copy(root / "fine.pth", root / "bomb.pth")
    with zipfile.ZipFile(root / "bomb.pth", "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("fine/data/99", bytes(30_000_000))
    (root / "text.pth").write_text("weights\nand biases")
    (root / "zeros.pth").write_bytes(bytes(2000))
    with zipfile.ZipFile(root / "archive.pth", "w") as archive:
        archive.writestr("readme.txt", "none")
    os.mkfifo(root / "pipe.pth")
    safe = pytest.importorskip("safetensors.torch")
    safe.save_file(net, root / "fine.safetensors", {"meta": json.dumps(META)})
    safe.save_file(net, root / "meta.safetensors", {"meta": "no json"})
    for name, text in dict(deep="[" * 50_000, digits="9" * 5000).items():
        safe.save_file(net, root / f"{name}.safetensors", {"meta": text})
    data = (root / "fine.safetensors").read_bytes()
    for n in (0, 7, 100, len(data) - 1):
        (root / f"cut{n if n < 101 else 'end'}.safetensors").write_bytes(data[:n])
    (root / "huge.safetensors").write_bytes((2**60).to_bytes(8, "little") + data[8:])


NETS = """
import sys
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, num_class):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, num_class)
    def forward(self, x):
        return self.fc(torch.relu(self.conv(x)).mean((2, 3)))
class Empty(Net):
    def __init__(self, num_class):
        nn.Module.__init__(self)
        self.num_class = num_class
    def forward(self, x):
        return x.mean((1, 2, 3))[:, None].expand(-1, self.num_class)
class Still(Net):
    def __init__(self, num_class):
        super().__init__(num_class)
        self.requires_grad_(False)
class Detached(Net):
    def forward(self, x):
        return super().forward(x).detach()
class Raises(Net):
    def forward(self, x):
        return super().forward(x) if not self.training else {}["only in training"]
class Two(Net):
    def forward(self, x):
        return (super().forward(x), x) if self.training else super().forward(x)
class TwoOfOne(Net):
    def forward(self, x):
        out = super().forward(x)
        return out, 2 * out
class NoneOfThem(Net):
    def forward(self, x):
        return dict(features=x)
class Exits(Net):
    def forward(self, x):
        return sys.exit(0) if self.training else super().forward(x)
class ExitsEarly(Net):
    def forward(self, x):
        sys.exit("at once")
def leaves(num_class):
    sys.exit(3)
def long(num_class):
    raise ValueError("\\x1b[31m" + "x" * 5000)
"""


def make_runs(root, teacher):
    """A run of each script, and copies with damaged checkpoints."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "draw_curves", lambda *_: None)  # a second each
        few = shlex.split(f"--cuda 0 --epochs 1 --batch_size 1297 --save_root {root} --note")
        train_base.main(shlex.split(f"--net_name resnet8 {DIGITS}") + [*few, "base"])
        files = ["--t_model", str(teacher), "--s_name", "resnet8"]
        train_kd.main(["--kd_mode", "at", *files, *few, "at"])
    saved = read_checkpoint(root / "base" / "checkpoint.pth.tar")
    short = saved["optimizer"] | dict(param_groups=[])
    momentum = {0: dict(momentum_buffer=torch.zeros(3))}
    other = saved["optimizer"] | dict(state=saved["optimizer"]["state"] | momentum)
    damaged = dict(
        best=read_checkpoint(root / "base" / "model_best.pth.tar"),
        no_net={k: v for k, v in saved.items() if k != "net"},
        half_net=saved | dict(net={k: v for k, v in saved["net"].items() if k != "fc.bias"}),
        no_groups=saved | dict(optimizer=short),
        momentum=saved | dict(optimizer=other),
        rng=saved | dict(rng=dict(cpu=torch.zeros(3))),
        history=saved | dict(history=3 * saved["history"]),
        flags=saved | dict(flags=None),
        inside=saved | dict(inside=3),
    )
    for name, content in damaged.items():
        (root / name).mkdir()
        torch.save(content, root / name / "checkpoint.pth.tar")
    data = (root / "base" / "checkpoint.pth.tar").read_bytes()
    (root / "cut").mkdir()
    (root / "cut" / "checkpoint.pth.tar").write_bytes(data[:-1000])
    for name, text in dict(taken=None, args_list="[1]", args_number='{"recipe": 3}').items():
        (root / name).mkdir()
        (root / name / ("args.json" if text else "log.txt")).write_text(text or "mine")
    shutil.copytree(root / "at", root / "at2")
    (root / "at2" / "checkpoint.pth.tar").write_bytes(data)  # of the other script


def snapshot(folder):
    """Everything below a folder: what changes when a path is written, also with the same bytes."""
    found = {}
    for p in sorted(folder.rglob("*")):
        s = p.lstat()
        name, inside = str(p.relative_to(folder)), (s.st_ino, s.st_size, s.st_mtime_ns)
        found[name] = (s.st_mode, *(inside if p.is_file() else ()))
    return found


def make_places(root):
    """The names that the tables may use in braces, and what is there."""
    names = dict(root=root, runs=root / "runs", img=root / "img", ck=root / "ck")
    for path in names.values():
        path.mkdir(exist_ok=True)
    torch.manual_seed(0)
    make_images(names["img"])
    make_checkpoints(names["ck"])
    state = network.build("resnet14", 10).state_dict()
    names |= dict(t=names["ck"] / "teacher.pth", s=names["ck"] / "fine.pth", file=root / "file")
    torch.save(dict(net=state, meta=META | dict(network="resnet14")), names["t"])
    make_runs(names["runs"], names["t"])
    names["file"].write_text("mine")
    lines = dict(
        three="0\n1\n2\n",
        ten="".join(f"{i}\n" for i in range(10)),
        twice="".join(f"{i % 9}\n" for i in range(10)),
        far="".join(f"{i}0\n" for i in range(10)),
        wolf="".join(f"{i}\n" for i in range(9)) + "wolf\n",
        gap="0\n\n" + "".join(f"{i}\n" for i in range(2, 10)),
        odd="\x1b[31m\n" * 10,
        none="",
        long="9" * 5000,
    )
    (root / "classes").mkdir()
    for name, text in lines.items():
        (root / "classes" / f"{name}.txt").write_text(text)
    (root / "classes" / "latin.txt").write_bytes(b"caf\xe9\n")
    names["lines"] = root / "classes"
    names |= dict(nets=root / "nets.py", exits=root / "exits.py")
    names["nets"].write_text(NETS)
    names["exits"].write_text("import sys\nsys.exit(0)\n")
    return [names, snapshot(root)]


# --- what a refusal must be -----------------------------------------------------------------------


def missing(names, message: str, root="/none/") -> list[str]:
    """Those names that a message does not have. What `root` itself is called does not count."""
    hidden = message.replace(str(root), "ROOT")
    return [name for name in names if not named(name.replace(str(root), "ROOT"), hidden)]


def is_line(err: str) -> bool:
    """Whether this is one line that says an error."""
    return err.startswith("error: ") and err.count("\n") == 1


def cases(main, common: str, rows) -> list:
    """The parameters of `refused`, one for each row of a table.

    A row has the flags and then the names that the message must have. A row of flags alone must
    have the last of them named.
    """
    found = []
    for row in rows:
        argv, *names = [row] if isinstance(row, str) else row
        names = names or [[x for x in argv.split() if x.startswith("--")][-1].split("=")[0]]
        label = f"{main.__module__} {ascii(argv)[1:-1][:60]}"
        slow = [pytest.mark.slow] * (len(found) % 3 > 0)  # every third row is in the first tier
        found.append(pytest.param(main, common + argv, names, id=label, marks=slow))
    return found


def refused(places, monkeypatch, capfd, main, argv: str, wanted: list[str]):
    """Run a command that must be refused: one line with the wanted names, and nothing is
    written."""
    names, before = places

    def refuse(url, root, filename, **kwargs):
        os.makedirs(root, exist_ok=True)
        open(os.path.join(root, filename), "w").close()
        raise OSError("no route to host\nsecond line")

    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", refuse)
    monkeypatch.setattr(Run, "log", lambda *_: sys.exit("a run was started"))
    monkeypatch.chdir(names["root"])
    words = [word.format(**names) for word in shlex.split(argv)]
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(words)
    out, err = capfd.readouterr()
    after = places[1] = snapshot(names["root"])
    assert [x for x in after.keys() | before.keys() if after.get(x) != before.get(x)] == []
    assert stop.value.code == 2
    assert is_line(err) and out == "", err
    assert missing([x.format(**names) for x in wanted], err, names["root"]) == [], err
    assert len(err) < 1000 or max(map(len, words)) > 1000
