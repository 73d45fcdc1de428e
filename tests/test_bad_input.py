"""Whatever a user gets wrong, in flags, files or folders: one line, exit code 2, and nothing is written.

A table of mistakes, then random bytes for the checkpoint reader and random words for the parsers.
"""

import argparse
import contextlib
import ctypes
import errno
import functools
import json
import os
import pickle
import resource
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time
import warnings
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import network
import train_base
import train_kd
import utils
import engine.run as run_module
from detection import train_det
from engine import cli
from engine.checkpoint import find_weights, read_checkpoint
from engine.run import Run
from kd_losses import METHODS
from tools import eval as evaluation
from tools import export
from utils import UserError
from engine.checkpoint import check_weights
from engine import foreign
from engine.run import read_metrics

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


# --- the files and folders that the table names ---------------------------------------------------


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
    for name, content in files.items():
        torch.save(content, root / f"{name}.pth")
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
    """Everything below a folder: sizes and bytes by path."""
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else p.lstat().st_mode
        for p in sorted(folder.rglob("*"))
    }


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """The names that the table may use in braces, and what is there."""
    root = tmp_path_factory.mktemp("bad")
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
    names |= dict(nets=root / "nets.py", exits=root / "exits.py")
    names["nets"].write_text(NETS)
    names["exits"].write_text("import sys\nsys.exit(0)\n")
    return [names, snapshot(root)]


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
    logical=("num_class", True),
    tensor=("num_class", torch.tensor(10)),
    pixels=("img_size", 2.0**70),
    logical_mean=("mean", [True, True, True]),
    large_mean=("mean", [10**400] * 3),
    scale=("mean", [125.0, 123.0, 114.0]),
    deep=("mean", functools.reduce(lambda x, _: [x, x], range(60), 0)),
    large_std=("std", [10**400] * 3),
    tensor_std=("std", torch.ones(3)),
)


# --- the table -------------------------------------------------------------------------------------

LONG = "x" * 300
WHOLE = "a whole number"

# train_base.py --net_name resnet8 --data_name digits --img_size 12 --save_root {runs} --cuda 0 ...
BASE = [
    # types and ranges
    ("--epochs -1", "--epochs: a whole number of at least 1 is wanted, not '-1'"),
    ("--epochs 1.5", WHOLE),
    ("--epochs 1e3", WHOLE),
    ("--epochs 0x10", WHOLE),
    ("--epochs ''", "not ''"),
    ("--epochs 99999999999999999999", WHOLE),
    (f"--epochs {'9' * 5000}", WHOLE),
    ("--batch_size 1", "at least 2"),
    ("--batch_size 1298", "--batch_size 1298: there are 1297 training images in digits"),
    ("--batch_size 99999999999999999999", WHOLE),
    ("--lr 0", "--lr: a number above 0"),
    ("--lr -0", "--lr: a number above 0"),
    ("--lr -0.1", "--lr: a number above 0"),
    ("--lr nan", "--lr: a number above 0"),
    ("--lr inf", "--lr: a number above 0"),
    ("--lr 1e999", "--lr: a number above 0"),
    ("--lr 1e300", "--lr: a number above 0"),
    ("--lr 0,1", "--lr: a number above 0"),
    ("--lr=", "--lr: a number above 0"),
    ("--momentum 1.5", "at most 1"),
    ("--momentum -1", "at least 0"),
    ("--weight_decay=-1e-4", "at least 0"),
    ("--weight_decay inf", "at least 0"),
    ("--nesterov 2", "at most 1"),
    ("--nesterov yes", WHOLE),
    ("--seed -1", "at least 0"),
    ("--seed 4294967296", "at most 4294967295"),
    ("--print_freq 0", "at least 1"),
    ("--workers -1", "at least 0"),
    ("--workers 100000", "at most 1024"),
    ("--cuda 2", "at most 1"),
    ("--cuda -1", "at least 0"),
    ("--flip maybe", WHOLE),
    ("--amp fp16", "invalid choice: 'fp16'"),
    ("--protocol mine", "kdzoo"),
    ("--protocol ''", "kdzoo"),
    ("--num_class 1", "at least 2"),
    ("--num_class 9223372036854775808", "at most 1000000"),
    ("--num_class 7", "7 classes are wanted (--num_class or the checkpoint), digits has 10"),
    ("--img_size 4", "at least 5"),
    ("--img_size 1000000", "at most 4096"),
    ("--net_name vgg8 --img_size 5", "vgg8 does not take 5-pixel images"),
    ("--net_name torchvision/inception_v3", "does not take 12-pixel images"),
    ("--mean_std 1,2,3", "six numbers"),
    ("--mean_std 0,0,0,1,1,0", "above 0"),
    ("--mean_std 0,0,0,1,1,nan", "a number is wanted"),
    ("--mean_std 125,123,114,63,62,67", "pixels are scaled to 0..1"),
    ("--mean_std 0,0,0,1e-300,1,1", "of another scale"),
    ("--mean_std cifar", "a number is wanted"),
    ("--epochs 9 --milestones 3,2", "--milestones 3,2: each after the one before"),
    ("--epochs 9 --milestones 3,3", "--milestones 3,3: each after the one before"),
    ("--epochs 9 --milestones 150,180", "none after the last epoch, 9"),
    ("--milestones 3,", WHOLE),
    ("--milestones 0", "at least 1"),
    # combinations
    ("--momentum 0", "excludes Nesterov"),
    ("--pretrained", "resnet8 has no weights of its own"),
    ("--resume", "there is no run in"),
    # flags that are none
    ("--lamda 1", "unknown flag --lamda"),
    ("--net resnet8", "unknown flag --net"),
    ("--epoch 3", "unknown flag --epoch: did you mean --epochs?"),
    ("--kd_mode at", "unknown flag --kd_mode"),
    ("--dry_run=1", "ignored explicit argument '1'"),
    ("--resume yes", "unknown flag yes"),
    ("stray", "unknown flag stray"),
    ("-- stray", "unknown flag"),
    ("--epochs", "--epochs: expected one argument"),
    ("--net_name", "--net_name: expected one argument"),
    ("--note -x", "--note: expected one argument"),
    # names
    ("--net_name resnet9", "no network 'resnet9': did you mean"),
    ("--net_name ''", "--net_name: a name is wanted"),
    ("--net_name torchvision/", "no network 'torchvision/'"),
    ("--net_name torchvision/qqq", "no network of torchvision 'qqq': none has a name like it"),
    ("--net_name gone.py:net", "gone.py: no such file"),
    (f"--net_name {LONG}/a.py:net", "File name too long"),
    ("--net_name {exits}:net", "exits.py cannot be imported (SystemExit: 0)"),
    ("--net_name {nets}:leaves", "leaves(10) failed (SystemExit: 3)"),
    ("--net_name {nets}:long", "long(10) failed (ValueError: \\x1b[31mxxx"),
    ("--net_name {nets}:ExitsEarly", "does not take 12-pixel images (SystemExit: at once)"),
    ("--net_name {nets}:Empty", "nets.py:Empty has no parameters that learn"),
    ("--net_name {nets}:Still", "nets.py:Still has no parameters that learn"),
    ("--net_name {nets}:Detached", "nets.py:Detached cannot be trained (RuntimeError: element 0"),
    ("--net_name {nets}:Raises", "cannot be trained (KeyError: 'only in training')"),
    ("--net_name {nets}:Two", "cannot be trained (TypeError: a tuple that is not logits"),
    ("--net_name {nets}:Exits", "cannot be trained (SystemExit: 0)"),
    (f"--net_name {'simkd:' * 3000}resnet8{':1' * 15_000}", "one simkd in another"),
    (f"--net_name simkd:resnet8:{'9' * 5000}:1:1:1:1", "five numbers are wanted, 1 to 99999"),
    ("--net_name simkd:resnet8:0:1:1:1:1", "five numbers are wanted, 1 to 99999"),
    ("--net_name {file}.py:", "no such file"),
    ("--data_name digit", "no dataset 'digit': did you mean digits?"),
    ("--data_name ''", "--data_name: a name is wanted"),
    # where it is written
    ("--save_root {file}", "is a file"),
    ("--save_root {file}/deeper", "is a file"),
    ("--save_root ''", "--save_root: a name is wanted"),
    ("--save_root 'a\0b'", "--save_root: a name is wanted"),
    ("--save_root '\udce4'", "is no UTF-8"),
    (f"--save_root {{runs}}/{LONG}", "cannot be used (File name too long)"),
    ("--save_root /proc/none", "cannot be written"),
    ("--note ''", "--note: a name is wanted"),
    ("--note a/b", "--note: the name of one folder is wanted, not 'a/b'"),
    ("--note ..", "the name of one folder"),
    ("--note .", "the name of one folder"),
    ("--note ../out", "the name of one folder"),
    ("--note {root}/out", "the name of one folder"),
    ("--note 'a\nb'", "the name of one folder"),
    (f"--note {LONG}", "cannot be used (File name too long)"),
    ("--note taken", "holds another run"),
    # data
    ("--data_name imagefolder --img_root {img}/gone", "no image folder: train/<class>/*"),
    ("--data_name imagefolder --img_root {file}", "is a file, a folder is wanted"),
    ("--data_name imagefolder --img_root ''", "--img_root: a name is wanted"),
    (f"--data_name imagefolder --img_root {LONG}", "File name too long"),
    ("--data_name imagefolder --img_root {img}/no_classes", "no class folders"),
    ("--data_name imagefolder --img_root {img}/no_test", "no image folder"),
    ("--data_name imagefolder --img_root {img}/empty_class", "class dog: no images"),
    ("--data_name imagefolder --img_root {img}/one_class", "cat is the only class"),
    ("--data_name imagefolder --img_root {img}/one_image", "at least two are needed"),
    ("--data_name imagefolder --img_root {img}/other_classes", "only in test: wolf"),
    ("--data_name imagefolder --img_root {img}/size6 --num_class 3", "3 classes are wanted"),
    ("--data_name imagefolder --img_root {img}/text", "0.png: not a readable image"),
    ("--data_name imagefolder --img_root {img}/zero", "0.png: not a readable image"),
    ("--data_name imagefolder --img_root {img}/half", "0.png: not a readable image"),
    ("--data_name imagefolder --img_root {img}/pipe", "pipe.png: not a readable image"),
    ("--data_name imagefolder --img_root {img}/dangling", "gone.png: not a readable image"),
    *(
        (
            f"--data_name imagefolder --img_root {{img}}/{name}{more}",
            f"{file}: not a readable image",
        )
        for name, file in dict(
            half="0.png",
            pipe="pipe.png",
            bomb="0.png",
            no_utf8="caf\\udce9.png",
            escapes="\\x1b[31m\\nred.png",
        ).items()
        for more in ("", " --img_size 97 --workers 0")
    ),
    (
        "--data_name imagefolder --img_root {img}/odd_classes",
        "only in train: caf\\udce9\\x1b[31m\\nxxx",
    ),
    (
        "--data_name imagenet --img_root {img}/text --img_size 97 --num_class 5",
        "5 classes are wanted",
    ),
    ("--data_name cifar10 --img_root {img}/gone/deeper", "no route to host): put the folder"),
    ("--data_name cifar10 --img_root {img}/cut", "batches-py is no whole CIFAR10"),
    ("--data_name cifar10 --img_root {img}/cut", "remove this folder, and it is downloaded"),
    ("--data_name cifar100 --img_root {file}", "is a file, a folder is wanted"),
    # going on with a run
    ("--epochs 1 --batch_size 1297 --resume --note base --lr 0.2", "--lr is 0.2, the run was"),
    ("--epochs 2 --batch_size 1297 --resume --note base", "--epochs is 2, the run was"),
    ("--resume --note at", "the run in {runs}/at is one of train_kd.py"),
    ("--resume --note gone", "there is no run in"),
    ("--resume --note taken", "there is no run in"),
    ("--resume --note args_list", "there is no run in"),
    ("--resume --note args_number", "there is no run in"),
    *(
        (f"--epochs 1 --batch_size 1297 --resume --note {name}", message)
        for name, message in dict(
            cut="checkpoint.pth.tar is damaged, cut short",
            best="(KeyError: 'flags'): start the run again",
            no_net="(KeyError: 'net')",
            half_net="or not a run's checkpoint",
            no_groups="or not a run's checkpoint",
            momentum="the optimizer's state is one of other parameters",
            rng="or not a run's checkpoint",
            history="3 epochs and the times of 1",
            flags="or not a run's checkpoint",
            inside="or not a run's checkpoint",
        ).items()
    ),
]
# train_base.py --net_name resnet8 --data_name imagefolder --img_root ...
FOLDERS = [
    ("{img}/size1", "images of 1 pixels: give --img_size, at least 5"),
    ("{img}/size4", "images of 4 pixels: give --img_size, at least 5"),
    ("{img}/size97", "0.png is 97x97 pixels: give --img_size"),
    ("{img}/wide", "7x6): give --img_size"),
]

# train_kd.py --kd_mode at --t_model {t} --s_init {s} --save_root {runs} --cuda 0 ...
KD = [
    # flags of the methods
    ("--lamda_kd 1", "unknown flag --lamda_kd: did you mean --lambda_kd?"),
    ("--lambda 1", "unknown flag --lambda"),
    ("--kd_mode", "--kd_mode: expected one argument"),
    ("--kd_mode ''", "--kd_mode: a name is wanted"),
    ("--kd_mode fitnets", "no --kd_mode 'fitnets': did you mean fitnet?"),
    ("--kd_mode qqq", "there are logits, st, at"),
    ("--kd_mode at+", "no --kd_mode ''"),
    ("--kd_mode at,st", "no --kd_mode 'at,st'"),
    ("--kd_mode AT", "no --kd_mode 'AT'"),
    ("--kd_mode st --p 2", "--p: it belongs to --kd_mode at, not st"),
    ("--p 0", "--kd_mode at: the exponent p must be at least 1"),
    ("--p -2", "at least 0"),
    ("--p two", "a number"),
    ("--p 1e6", "its loss for two training images is nan, its weight 1000"),
    ("--absolute 2", "at most 1"),
    ("--net_name resnet8", "unknown flag --net_name"),
    ("--kd_mode crd --mode loose", "exact"),
    ("--kd_mode crd --nce_n 1000000000", "at most 100000"),
    ("--kd_mode crd --feat_dim 0", "feat_dim above 0"),
    ("--kd_mode vid --init_var 0", "--kd_mode vid: init_var must be above"),
    ("--kd_mode cc --P_order 5000", "P_order must be a whole number from 1 to 100"),
    ("--kd_mode cc --gamma 0", "--kd_mode cc: gamma must be above 0"),
    ("--kd_mode dkd --alpha -1", "at least 0"),
    ("--kd_mode st --T 0", "the temperature T must be above 0"),
    ("--kd_mode st --T 1e-300", "--kd_mode st: "),
    ("--kd_mode reviewkd --mid_channel 0", "mid_channel must be at least 1"),
    ("--kd_mode ft --k 0.001", "--kd_mode ft: int(64 * k) must be at least 1"),
    ("--kd_mode kdsvd --stages 3", "--kd_mode kdsvd: KDSVD wants two"),
    ("--kd_mode ofd --margin none", "invalid choice: 'none'"),
    ("--kd_mode at+at", "a method twice"),
    ("--kd_mode st+fsp", "fsp has phases of its own"),
    # of the newer ones
    ("--kd_mode lskd --T 0", "--kd_mode lskd: the temperature T must be above 0, not 0.0"),
    ("--kd_mode dist --T -1", "--T: a number of at least 0"),
    ("--kd_mode nkd --T 0", "the temperature T must be above 0"),
    ("--kd_mode wsld --T 0", "the temperature T must be above 0"),
    ("--kd_mode ttm --gamma 0", "--kd_mode ttm: the power gamma must be above 0"),
    ("--kd_mode wttm --gamma 0", "--kd_mode wttm: the power gamma must be above 0"),
    ("--kd_mode rld --alpha_T 0", "T and alpha_T must be above 0"),
    ("--kd_mode ctkd --loops 0", "t_start, t_end and loops must be above 0"),
    ("--kd_mode ctkd --t_end nan", "--t_end: a number of at least 0"),
    ("--kd_mode srrl --project pooled", "--project: invalid choice: 'pooled'"),
    ("--kd_mode simkd --factor 100", "the factor must be from 1 to t_dim 64, not 100"),
    ("--kd_mode simkd --lambda_kd 0", "0 leaves phase distil nothing to learn from"),
    ("--kd_mode simkd+st", "simkd has a deployed network of its own, use it alone"),
    ("--kd_mode itrd --power 0", "the power alpha must be above 0"),
    ("--kd_mode pefd --n 0", "at least one projector"),
    ("--kd_mode vkd --map qr", "--map: invalid choice: 'qr'"),
    ("--kd_mode catkd --resolution 0", "resolution and top must be at least 1"),
    ("--kd_mode mlkd --base 0", "different temperatures above 0"),
    ("--kd_mode mlkd --base 2", "different temperatures above 0"),
    ("--kd_mode mlkd --form paper", "--form: invalid choice: 'paper'"),
    ("--kd_mode wkd_l --eps 0", "T and eps must be above 0, iters at least 1"),
    ("--kd_mode wkd_l --measured maps", "--measured: invalid choice: 'maps'"),
    ("--kd_mode wkd_f --grid 50", "grid must be from 1 to the map's (3, 3), not 50"),
    ("--kd_mode sdd --scales 1,x", "--scales: invalid choice: '1,x'"),
    ("--kd_mode sdd --inner at", "--inner: invalid choice: 'at'"),
    ("--kd_mode mgd --lam 1", "lam must be from 0 to below 1"),
    ("--kd_mode crld --tau_w 2", "tau_w and tau_s must be from 0 to 1"),
    ("--kd_mode semckd --batch_size 3", "batches of at least 4"),
    ("--kd_mode ofa --eps 0", "T and eps must be above 0"),
    ("--logit_stand", "--logit_stand: at compares more than logits"),
    ("--kd_mode st+at --logit_stand", "--logit_stand: at compares more than logits"),
    ("--kd_mode st --gather", "--gather: st compares no images of a batch with each other"),
    # weights and stages
    ("--kd_mode st+at --lambda_kd 1", "2 weight(s) wanted"),
    ("--lambda_kd 1,2", "1 weight(s) wanted"),
    ("--lambda_kd 1,", "--lambda_kd: a number of at least 0"),
    ("--lambda_kd -1", "--lambda_kd: a number of at least 0"),
    ("--lambda_kd inf", "--lambda_kd: a number of at least 0"),
    ("--lambda_ce nan", "--lambda_ce: a number of at least 0"),
    ("--lambda_kd 0 --lambda_ce 0", "0 leaves phase distil nothing to learn from"),
    ("--kd_mode ab --lambda_kd 0", "0 leaves phase init nothing to learn from"),
    ("--kd_mode ab --lambda_ce 0", "0 leaves phase train nothing to learn from"),
    ("--stages 4", "no stage 4"),
    ("--stages 0", "no stage 0"),
    ("--stages 1.5", WHOLE),
    ("--stages ''", WHOLE),
    ("--stages 1,1", "--stages 1,1: from the shallowest to the deepest, each once"),
    ("--stages 1,-3", "each once"),
    ("--stages 3,1", "from the shallowest"),
    ("--reduce max", "invalid choice: 'max'"),
    ("--adapter big", "invalid choice: 'big'"),
    ("--t_taps ''", "--t_taps: a name is wanted"),
    ("--t_taps layer1,", "--t_taps: a name is wanted"),
    ("--t_taps layr1", "no module in resnet14 called 'layr1': did you mean layer1"),
    ("--s_taps fc", "fc is not a feature map, it gives (2, 10)"),
    ("--s_taps layer1#0", "layer1#0: a tap is MODULE, MODULE#2"),
    ("--s_taps layer1#-1", "layer1#-1: a tap is MODULE, MODULE#2"),
    ("--s_taps layer1#9", "it is called 1 times"),
    ("--s_taps layer1:out", "layer1:out: a tap is MODULE, MODULE#2"),
    ("--s_taps layer1,layer1", "each once"),
    ("--s_taps layer3,layer1", "from the shallowest on"),
    ("--cuda_graph", "--cuda_graph needs a CUDA device"),
    # what the checkpoints know
    ("--t_name resnet20", "--t_name resnet20 contradicts"),
    ("--s_name resnet20", "--s_name resnet20 contradicts"),
    ("--t_name ''", "--t_name/--net1_name: a name is wanted"),
    ("--num_class 100", "--num_class 100 contradicts"),
    ("--data_name cifar10", "--data_name cifar10 contradicts"),
    ("--img_size 16", "--img_size 16 contradicts the checkpoint, which says 12"),
    ("--s_init {ck}/hundred.pth", "{ck}/hundred.pth has 100 classes, digits 10"),
    ("--s_pretrained", "has weights of its own: pretrained contradicts it"),
    ("--kd_mode dml --t_model {s}", "would stay equal"),
    ("--batch_size 1", "at least 2"),
    ("--batch_size 5000", "there are 1297 training images"),
    ("--note taken", "holds another run"),
    ("--note a/b", "the name of one folder"),
    ("--resume", "there is no run"),
    ("--resume --note base", "the run in {runs}/base is one of train_base.py"),
    ("--resume --note at2", "the run in {runs}/at2 is one of train_base.py"),
    ("--resume --note at --seed 5", "--resume: --"),
    ("--resume --note cut", "is damaged, cut short"),
    # teachers
    ("--t_model ''", "--t_model/--net1_init: a name is wanted"),
    ("--t_model gone.pth", "gone.pth: no such checkpoint"),
    ("--t_model {ck}", "is a folder"),
    ("--t_model {file}/x", "no such checkpoint"),
    (f"--t_model {LONG}", "File name too long"),
    ("--t_model /dev/null", "no file that could be read twice"),
    ("--t_model {ck}/pipe.pth", "no file that could be read twice"),
    ("--t_model {ck}/other.pth", "does not say which network it is"),
    (f"--t_model {{ck}}/other.pth --t_name resnet8 {DIGITS}", "is not a resnet8"),
    ("--t_model {ck}/own_code.pth", "say so with --t_name evil.py:build"),
    ("--t_model {ck}/nowhere.pth", "no image folder"),
    ("--t_model {ck}/hundred.pth --data_name digits", "100 classes are wanted"),
    ("--t_model {ck}/lacks.pth", "1 missing (fc.bias)"),
    ("--t_model {ck}/extra.pth", "1 unknown (more)"),
    ("--t_model {ck}/wrong.pth", "the file fits resnet14 with 10 classes"),
    ("--t_model {ck}/long_bias.pth", "1 of another shape (fc.bias)"),
    ("--t_model {ck}/nan.pth", "1 entries are not finite (fc.bias)"),
    ("--t_model {ck}/inf.pth", "1 entries are not finite (fc.bias)"),
    ("--s_init {ck}/nan.pth", "1 entries are not finite (fc.bias)"),
    *((f"--t_model {{ck}}/{x}.pth", "1 of another type") for x in ("complex", "bools")),
    *((f"--t_model {{ck}}/{x}.pth", "1 of another type") for x in ("sparse", "hollow")),
    ("--t_model {ck}/number.pth", "holds a int, not a checkpoint's dict"),
    ("--t_model {ck}/nothing.pth", "holds a NoneType"),
    ("--t_model {ck}/listed.pth", "holds a list"),
    ("--t_model {ck}/tensor.pth", "holds a Tensor"),
    ("--t_model {ck}/empty.pth", "holds no weights, only: nothing at all"),
    ("--t_model {ck}/hollow_net.pth", "holds no weights"),
    ("--t_model {ck}/numbered.pth", "holds no weights, only: 1"),
    ("--t_model {ck}/plain.pth", "holds no weights, only: epoch"),
    ("--t_model {ck}/evil.pth", "holds code (posix.mkdir)"),
    ("--t_model {ck}/evil_old.pth", "holds code (posix.mkdir)"),
    ("--t_model {ck}/evil.pkl", "evil.pkl"),
    ("--t_model {ck}/array.pth", "holds more than tensors (numpy"),
    ("--t_model {ck}/flipped.pth", "wrong checksum"),
    *((f"--t_model {{ck}}/cut{n}.pth", "is damaged, cut short") for n in (0, 1, 50, 99)),
    *((f"--t_model {{ck}}/{x}.pth", "is damaged") for x in ("text", "zeros", "archive")),
    *(
        (f"--t_model {{ck}}/cut{n}.safetensors", "is damaged, cut short, or not safetensors")
        for n in (0, 7, 100, "end")
    ),
    ("--t_model {ck}/huge.safetensors", "is damaged"),
    ("--t_model {ck}/meta.safetensors", "is damaged"),
    *(
        (f"--t_model {{ck}}/meta_{name}.pth", f"is damaged: its {key} cannot be")
        for name, (key, _) in CRAFTED.items()
    ),
    ("--t_model {ck}/meta_escapes.pth", "its network cannot be \\x1b[31m\\x00xxx"),
    ("--t_model {ck}/nested.pth", "1 entries are nested, or larger than what is stored (fc.bias)"),
    ("--t_model {ck}/claims.pth", "1 entries are nested, or larger than what is stored (fc.bias)"),
    ("--t_model {ck}/odd_keys.pth", "1 unknown (\\x1b[31mkkk"),
    ("--t_model {ck}/only_keys.pth", "holds no weights, only: \\x1b[31mkkk"),
    ("--t_model {ck}/own_shell.pth", "say so with --t_name 'x.py:f; touch ran'"),
    ("--t_model {ck}/bomb.pth", "is not read: its "),
    ("--t_model {ck}/deep.safetensors", "is damaged, cut short, or not safetensors"),
    ("--t_model {ck}/digits.safetensors", "is damaged, cut short, or not safetensors"),
    ("--t_model {ck}/no_std.pth", "its mean cannot be"),
]
# and nothing but these
BARE_KD = [
    ("", "required: --kd_mode"),
    ("--kd_mod at", "--kd_mode"),
    ("--kd_mode at --s_init {s}", "--t_model is needed"),
    ("--kd_mode at --t_model {t}", "--s_name or --s_init is needed"),
    ("--kd_mode at --t_model {t} --s_name resnet9", "no network 'resnet9'"),
    ("--kd_mode at --s_init {s} --t_pretrained", "--t_name or --t_model is needed"),
    ("--kd_mode at --s_init {s} --t_pretrained --t_name resnet8", "no weights of its own"),
    ("--kd_mode dml --s_name resnet8", "--data_name is needed"),
    *(
        (f"--kd_mode {mode} --s_name {{nets}}:Exits {more} {DIGITS}", "trained (SystemExit: 0)")
        for mode, more in dict(dml="--t_name resnet8", st="--t_model {t}").items()
    ),
    (f"--kd_mode dml --s_name resnet8 --t_name {{nets}}:Raises {DIGITS}", "trained (KeyError"),
    (
        "--kd_mode dml --s_name resnet8 --data_name imagefolder --img_root {img}/empty_class",
        "dog: no images",
    ),
]
EVAL = [
    ("{ck}/sparse.pth", "1 of another type (fc.bias)"),
    ("{ck}/flipped.pth", "wrong checksum"),
    ("{ck}/fine.pth --teacher {ck}/cut50.pth", "is damaged, cut short"),
    ("{ck}/meta_img_size.pth", "its img_size cannot be -3"),
]
EXPORT = [
    ("{ck}/nan.pth --out {root}/x.safetensors", "is not written: read back, its logits differ"),
    ("{ck}/evil.pth --out {root}/x.pt2", "holds code"),
    ("{ck}/fine.pth --out {file}/x.pt2", "cannot be written"),
    ("{ck}/fine.pth --format onnx --out {file}", "ends in .onnx is wanted"),
]

RUN = "--save_root {runs} --cuda 0 "
ON_DIGITS = f"--net_name resnet8 {DIGITS} {RUN}"
ON_FILES = RUN + "--kd_mode at --t_model {t} --s_init {s} "
CASES = [
    *((train_base.main, ON_DIGITS, case) for case in BASE),
    *(
        (train_base.main, f"--net_name resnet8 {RUN} --data_name imagefolder --img_root ", case)
        for case in FOLDERS
    ),
    (train_base.main, RUN, ("", "required: --net_name")),
    (train_base.main, RUN, ("--net_name resnet8", "--data_name is needed: cifar10")),
    *((train_kd.main, ON_FILES, case) for case in KD),
    *((train_kd.main, RUN, case) for case in BARE_KD),
    *((evaluation.main, "--cuda 0 ", case) for case in EVAL),
    *((export.main, "", case) for case in EXPORT),
]


def name_of(value) -> str | None:
    return ascii(value[0])[1:60] if isinstance(value, tuple) else ""


@pytest.mark.filterwarnings("error::UserWarning", "error::RuntimeWarning")
@pytest.mark.parametrize("main, common, case", CASES, ids=name_of)
def test_one_line_and_nothing_written(places, monkeypatch, capfd, main, common, case):
    (names, before), (argv, message) = places, case

    def refuse(url, root, filename, **kwargs):
        os.makedirs(root, exist_ok=True)
        open(os.path.join(root, filename), "w").close()
        raise OSError("no route to host\nsecond line")

    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", refuse)
    monkeypatch.setattr(Run, "log", lambda *_: sys.exit("a run was started"))
    monkeypatch.chdir(names["root"])
    words = [word.format(**names) for word in shlex.split(common + argv)]
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(words)
    out, err = capfd.readouterr()
    after = places[1] = snapshot(names["root"])
    assert [x for x in after.keys() | before.keys() if after.get(x) != before.get(x)] == []
    assert stop.value.code == 2
    assert err.startswith("error: ") and err.count("\n") == 1 and out == "", err
    wanted = message.format(**names)
    assert wanted in err
    assert len(err) < 1000 or max(map(len, words)) > 1000


def test_the_good_files_are_good(places, monkeypatch):
    """Or the table would prove nothing."""
    names, before = places
    monkeypatch.chdir(names["root"])
    words = [word.format(**names) for word in shlex.split(ON_FILES)]
    for file in ("teacher.pth", "fine.safetensors", "odd_dict.pth", "odd_tensor.pth"):
        train_kd.main([*words, "--t_model", f"{names['ck']}/{file}", "--dry_run"])
    argv = [*ON_DIGITS.format(**names).split(), "--epochs", "1", "--batch_size", "1297"]
    train_base.main([*argv, "--resume", "--note", "base", "--dry_run"])
    assert snapshot(names["root"]) == before


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: you tried to allocate 64 bytes."),
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
    ids=["GPU", "CPU", "Python", "fork"],
)
@pytest.mark.parametrize("where", ["data", "network"])
def test_too_large_for_the_memory(monkeypatch, capsys, error, where):
    def fail(*args):
        raise error

    owner, name = dict(data=(cli, "load_data"), network=(network.BasicBlock, "forward"))[where]
    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(SystemExit) as stop:
        train_base.main(["--net_name", "resnet8", "--data_name", "digits"])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and "smaller --batch_size" in err


@pytest.mark.parametrize(
    "error, message",
    [
        (RuntimeError("can't start new thread"), "limits are too low (can't start new thread)"),
        (OSError(errno.EAGAIN, "Resource temporarily unavailable"), "limits are too low ("),
        (OSError(errno.EMFILE, "Too many open files"), "limits are too low ("),
        (OSError(errno.ENOSPC, "No space left on device", "/x\033[31m"), "/x\\x1b[31m cannot be"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), "/x cannot be used (Permission"),
    ],
    ids=["threads", "processes", "files", "space", "permission"],
)
def test_what_the_system_refuses(monkeypatch, capsys, error, message):
    def fail(*args):
        raise error

    monkeypatch.setattr(cli, "load_data", fail)
    with pytest.raises(SystemExit) as stop:
        train_base.main(["--net_name", "resnet8", "--data_name", "digits"])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and message in err


def test_a_defect_keeps_its_traceback(monkeypatch):
    """Or what ends in a line would hide what is wrong with the program."""
    for error in (ValueError("x"), OSError("x"), RuntimeError("connection closed"), SystemExit(3)):

        def fail(*args):
            raise error

        monkeypatch.setattr(cli, "load_data", fail)
        with pytest.raises(type(error)) as stop:
            train_base.main(["--net_name", "resnet8", "--data_name", "digits"])
        assert stop.value is error


# --- what may not be read --------------------------------------------------------------------------


@pytest.fixture
def bound():
    """This thread without root's right to read and write everything; back in the end."""
    if os.geteuid():
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header, caps = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    if libc.capget(header, caps):
        pytest.skip("root's rights cannot be given up here")
    effective = caps[0]
    caps[0] = effective & ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    assert libc.capset(header, caps) == 0
    yield
    caps[0] = effective
    assert libc.capset(header, caps) == 0


@pytest.mark.parametrize(
    "name", [".", "train", "test", "train/cat", "train/cat/deep", "train/cat/0.png"]
)
@pytest.mark.parametrize("size", [[], ["--img_size", "97", "--workers", "0"]], ids=["as is", "97"])
def test_images_that_may_not_be_read(bound, name, size, tmp_path, capsys):
    root = pictures(tmp_path / "img")
    (root / "train/cat/deep").mkdir()
    shutil.copy(root / "train/cat/0.png", root / "train/cat/deep/9.png")
    (root / name).chmod(0)
    argv = ["--net_name", "resnet8", "--data_name", "imagefolder", "--img_root", str(root), *size]
    try:
        with pytest.raises(SystemExit) as stop:
            train_base.main([*argv, "--cuda", "0", "--save_root", str(tmp_path / "runs")])
    finally:
        (root / name).chmod(0o755)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1, err
    assert "Permission denied" in err and str(root / name) in err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors", "folder/x.pth"])
def test_checkpoints_that_may_not_be_read(bound, name, tmp_path):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    torch.save(dict(net={}), file)
    closed = file.parent if "/" in name else file
    closed.chmod(0)
    try:
        with pytest.raises(UserError, match="x.(pth|safetensors).*Permission denied") as error:
            read_checkpoint(file)
    finally:
        closed.chmod(0o755)
    assert "damaged" not in str(error.value)


def test_a_network_s_file_that_may_not_be_read(bound, tmp_path):
    file = tmp_path / "folder" / "net.py"
    file.parent.mkdir()
    file.write_text("def build(n): ...")
    for closed in (file, file.parent):
        closed.chmod(0)
        try:
            with pytest.raises(UserError, match="net.py.*Permission denied"):
                foreign.constructor(f"{file}:build")
        finally:
            closed.chmod(0o755)


# --- where it is printed ---------------------------------------------------------------------------

SHORT = [*DIGITS.split(), "--cuda", "0", "--epochs", "2", "--batch_size", "1297"]


def trained(folder):
    """Whether a run went to its end."""
    return (folder / "result.json").exists() and len(read_metrics(folder)) == 2


@pytest.mark.parametrize("where", ["pipe", "both pipes", "full"])
def test_a_training_whose_lines_nobody_reads(where, tmp_path):
    argv = ["--net_name", "resnet8", *SHORT, "--save_root", str(tmp_path), "--note", "r"]
    command = [sys.executable, str(ROOT / "train_base.py"), *argv]
    if where == "full":
        with open("/dev/full", "w") as full:
            done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
        assert done.returncode == 0 and done.stderr.startswith("warning: nothing more is printed")
        assert done.stderr.count("\n") == 1
    else:
        err = subprocess.STDOUT if where == "both pipes" else subprocess.PIPE
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=err) as process:
            process.stdout.readline()
            process.stdout.close()
            said = process.stderr.read() if process.stderr else b""
            assert process.wait() == 0 and said == b""
    assert trained(tmp_path / "r")
    assert "last " in (tmp_path / "r" / "log.txt").read_text()


def test_a_result_that_nobody_reads_or_that_cannot_be_written(places):
    names, _ = places
    command = [sys.executable, str(ROOT / "tools/eval.py"), str(names["s"]), "--cuda", "0"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "standard output" in done.stderr and "No space left" in done.stderr
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_names_that_are_no_utf8(encoding, tmp_path):
    """Classes and files of any bytes train, under LC_ALL=C too; what is printed can be shown."""
    odd = os.fsdecode(b"caf\xe9\x1b[31m\n")
    root = pictures(tmp_path / "img", size=12, classes=(odd, "dog\u00e9"))
    for split in ("train", "test"):
        (root / split / odd / "0.png").rename(root / split / odd / f"{odd}.png")
        (root / split / odd / f"x.{odd}").write_text("no picture")
    env = dict(os.environ, LC_ALL="C", MPLBACKEND="nonsense")
    if encoding == "ascii":
        env |= dict(PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    argv = ["--net_name", "resnet8", "--data_name", "imagefolder", "--img_root", str(root)]
    argv += ["--cuda", "0", "--epochs", "2", "--save_root", str(tmp_path), "--note", "r"]
    command = [sys.executable, str(ROOT / "train_base.py"), *argv]
    done = subprocess.run(command, capture_output=True, env=env)
    assert done.returncode == 0 and done.stderr == b"", done.stderr
    assert trained(tmp_path / "r") and (tmp_path / "r" / "curves.png").exists()
    for text in (done.stdout.decode("ascii"), (tmp_path / "r" / "log.txt").read_text("ascii")):
        assert text.replace("\n", "").isprintable() and ".caf\\udce9\\x1b[31m\\n" in text
    meta = read_checkpoint(tmp_path / "r" / "model_best.pth.tar")["meta"]
    assert [*map(os.fsencode, meta["classes"])] == [os.fsencode(odd), os.fsencode("dog\u00e9")]


def test_a_limit_on_the_size_of_files(tmp_path, capsys):
    """`ulimit -f`: the initial weights do not fit, then the checkpoint does not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size, file in ((50_000, "initial_r8.pth.tar"), (400_000, "")):
        folder = tmp_path / str(size)
        argv = ["--net_name", "resnet8", *SHORT, "--save_root", str(tmp_path), "--note", str(size)]
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            with pytest.raises(SystemExit) as stop:
                train_base.main(argv)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.count("\n") == 1, err
        assert str(folder / file) in err and "cannot be" in err and "File too large" in err
        assert not [*folder.glob("*.tmp")]


# --- at random: checkpoints ------------------------------------------------------------------------


@pytest.fixture
def fuzz(request):
    """Settings for so many examples, ten times as many with --slow."""

    def make(examples):
        slow = request.config.getoption("--slow")
        return settings(
            max_examples=examples * (10 if slow else 1),
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        )

    return make


@pytest.fixture
def consume(tmp_path):
    """Read bytes as a checkpoint, as far as a network: a value or a UserError, soon, in little room."""
    args = train_base.parse(["--net_name", "resnet8"])
    detection, _ = train_det.parse(["--kd_mode", "none"])

    def read(data: bytes, name: str):
        path = tmp_path / name
        path.write_bytes(data)
        before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        for known in (None, "resnet8"):
            with contextlib.suppress(UserError):
                found = find_weights(known, str(path), "t_name", "t_model")
                recipe = cli.resolve(args, found.name, found.meta)
                if recipe.data_name in ("imagefolder", "imagenet"):
                    cli.load_data(recipe)
                check_weights(found.load(10, 12), found.path)
        with contextlib.suppress(UserError):
            found = train_det.find(None, str(path), "s")
            train_det.resolve(detection, found, None)
        assert time.process_time() - began < 5
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB
        assert sorted(tmp_path.iterdir()) == [path]
        path.unlink()

    return read


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The bytes of a small checkpoint in torch's two formats and as safetensors."""
    safe = pytest.importorskip("safetensors.torch")
    folder = tmp_path_factory.mktemp("small")
    net = {"conv1.weight": torch.ones(2, 3), "fc.weight": torch.ones(10, 4)}
    content = dict(net=net, meta=META, epoch=3, opt=argparse.Namespace(lr=0.1))
    torch.save(content, folder / "new.pth")
    torch.save(content, folder / "old.pth", _use_new_zipfile_serialization=False)
    safe.save_file(net, folder / "x.safetensors", {"meta": json.dumps(META)})
    return {path.name: path.read_bytes() for path in folder.iterdir()}


KINDS = ("new.pth", "old.pth", "x.safetensors")


def test_random_bytes(fuzz, consume):
    starts = (b"", b"PK\x03\x04", b"\x80\x02", b"\x80\x04\x95", (40).to_bytes(8, "little") + b"{")

    @fuzz(150)
    @given(st.sampled_from(starts), st.binary(max_size=200), st.sampled_from(KINDS))
    def check(start, data, name):
        consume(start + data, name)

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_truncations_and_flips(fuzz, consume, small, kind):
    data = small[kind]
    places = st.integers(0, len(data) - 1)
    early = st.integers(0, min(600, len(data) - 1))

    @fuzz(100)
    @given(
        st.lists(st.tuples(places | early, st.integers(1, 255)), max_size=4),
        st.none() | places,
    )
    def check(flips, end):
        changed = bytearray(data)
        for place, bits in flips:
            changed[place] ^= bits
        consume(bytes(changed[:end]), kind)

    check()


NAMES = ["net", "snet", "net2", "model", "state_dict", "meta", *META, "fc.weight", "module.fc.bias"]
TENSORS = st.builds(
    lambda shape, dtype: torch.zeros(shape).to(dtype),
    st.lists(st.integers(0, 12), max_size=3),
    st.sampled_from([torch.float32, torch.float16, torch.int64, torch.bool, torch.complex64]),
)
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["resnet8", "digits", "torchvision/resnet18", "x.py:f", *META.values()])
    | TENSORS
)
PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
KEYS = st.sampled_from(NAMES) | st.text(max_size=4) | st.integers(-3, 3) | st.none()


def test_random_objects(fuzz, consume, tmp_path_factory):
    path = tmp_path_factory.mktemp("objects") / "x.pth"
    nested = st.recursive(
        LEAVES,
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.tuples(inner, inner)
            | st.dictionaries(KEYS, inner, max_size=5)
        ),
        max_leaves=12,
    )
    wrapped = st.fixed_dictionaries(
        dict(net=st.dictionaries(KEYS, TENSORS, max_size=3)),
        optional=dict(
            meta=st.fixed_dictionaries({}, optional=dict.fromkeys(META, LEAVES)) | LEAVES
        ),
    )

    @fuzz(200)
    @given(nested | wrapped)
    def check(content):
        torch.save(content, path)
        consume(path.read_bytes(), "x.pth")

    check()


DETECTOR = dict(network="fasterrcnn_resnet18", min_size=[64], max_size=96, anchor=8, rois=16)
NASTY = st.sampled_from(
    [
        *(True, -1, 0, 1, 10, 2**31, 2**63, 2**64, 10**400, 0.0, 1e308, float("nan"), float("inf")),
        *(
            "",
            "\0",
            "\n",
            "\x1b[31m",
            "\ud800",
            "\udce9",
            "x" * 5000,
            "..",
            "/",
            "/dev/null",
            "a/b.py:f",
        ),
        *("simkd:" * 3000 + "resnet8" + ":1" * 15_000, "simkd:" * 60 + "resnet8" + ":1" * 300),
        *(
            "simkd:resnet8:64:99999:1:1:1",
            f"simkd:resnet8:{'9' * 5000}:1:1:1:1",
            "simkd::1:1:1:1:1",
        ),
        *(
            "timm/resnet18",
            "torchvision/",
            "imagefolder",
            "imagenet",
            "digits",
            "retinanet_resnet50",
        ),
        *([], [[]], {}, [0] * 3, [True] * 3, [10**400] * 3, [0.5, 0.5, "x"], [0.5, 0.5, None]),
        functools.reduce(lambda x, _: [x, x], range(12), 0),
        functools.reduce(lambda x, _: [x], range(900), 0),
        functools.reduce(lambda x, _: {"a": x}, range(900), 0),
    ]
)
DIMS = st.sampled_from([0, 1, 2, 3, 10, 16, 64, 2**20, 2**31, 2**62, 2**63, -1])


def shadowed(x: dict, name: str) -> dict:
    """The same, pickled with an attribute over one of its methods."""
    x = OrderedDict(x)
    setattr(x, name, 3)
    return x


def ripped(x, name: str):
    x = torch.nn.Parameter(x.detach().float(), requires_grad=False)
    setattr(x, name, 3)
    return x


def test_crafted_checkpoints(fuzz, consume, tmp_path_factory):
    """A whole file, of which this or that is something else."""
    path = tmp_path_factory.mktemp("crafted") / "x.pth"
    net = dict(network.build("resnet8", 10).state_dict())
    plain = ("get", "copy", "pop", "update")
    methods = ("detach", "isfinite", "numel", "is_floating_point", "untyped_storage", "copy_")
    small = st.lists(st.sampled_from([0, 1, 2, 10, 64]), max_size=3).map(torch.zeros)
    with warnings.catch_warnings(action="ignore"):
        nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
        quantized = torch.quantize_per_tensor(torch.ones(10), 0.1, 0, torch.qint8)
    tensor = st.one_of(
        small,
        st.builds(lambda n, x: torch.ones(1).expand(n, *x), st.just(10**9), st.just([10**4])),
        st.builds(lambda x, kind: x.to(kind), small, st.sampled_from(KINDS_OF_NUMBERS)),
        st.builds(ripped, small, st.sampled_from(methods)),
        st.just(nested),
        st.sampled_from([torch.ones(10).to_sparse(), torch.zeros(10, device="meta")]),
        st.just(quantized),
        st.just(torch.full((10,), float("nan"))),
    )
    keys = st.sampled_from(["fc.bias", "fc.weight", "conv1.weight", "projector.projector.0.weight"])
    state = st.dictionaries(keys | KEYS, tensor | NASTY, max_size=2).map(lambda x: net | x)
    value = NASTY | LEAVES
    meta = st.dictionaries(st.sampled_from([*META, *DETECTOR]), value, max_size=2)
    known = st.sampled_from([META, META | DETECTOR])
    content = st.builds(
        lambda state, known, meta, more, name: {
            name: state,
            "meta": known | meta,
            **{key: x for key, x in more.items() if key not in ("net", "meta")},
        },
        state | st.builds(shadowed, state, st.sampled_from(plain)),
        known,
        meta,
        st.dictionaries(st.sampled_from(["epoch", "net1", "snet", "x"]), value, max_size=2),
        st.sampled_from(["net", "model", "anything"]),
    )
    content |= st.builds(shadowed, content, st.sampled_from(plain))

    @fuzz(200)
    @given(content)
    def check(content):
        torch.save(content, path)
        consume(path.read_bytes(), "x.pth")

    check()


KINDS_OF_NUMBERS = [
    *(torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.int64, torch.uint16),
    *(torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2),
]


def test_crafted_safetensors(fuzz, consume):
    """A header of any entries over the bytes of a small file."""
    dtypes = "F32 F64 F16 BF16 I64 I32 U8 U16 U64 BOOL F8_E4M3 F8_E5M2 F8_E8M0 F4 C64 X".split()
    names = st.sampled_from(
        ["fc.weight", "fc.bias", "conv1.weight", "a", "", "\x1b[31m", "x" * 999]
    )
    place = st.integers(0, 64) | DIMS
    entry = st.fixed_dictionaries(
        dict(
            dtype=st.sampled_from(dtypes),
            shape=st.lists(DIMS, max_size=4),
            data_offsets=st.tuples(place, place),
        )
    )
    # one that is whole, so that some come through
    whole = st.sampled_from(dtypes).map(
        lambda kind: dict(dtype=kind, shape=[64 // size_of(kind)], data_offsets=(0, 64))
    )
    values = st.dictionaries(st.sampled_from([*META, *DETECTOR]), NASTY | PLAIN, max_size=3)
    text = st.builds(lambda known, x: json.dumps(known | x), st.sampled_from([{}, META]), values)
    text |= st.sampled_from(
        ["[" * 50_000, '{"a":' * 50_000, "9" * 5000, "NaN", "null", "\0", "[1]"]
    )
    meta = st.dictionaries(st.sampled_from(["meta", "format"]), text | NASTY, max_size=2)
    meta |= st.builds(lambda x: dict(meta=x), text)

    @fuzz(200)
    @given(
        st.dictionaries(names, entry, max_size=3) | st.builds(lambda n, x: {n: x}, names, whole),
        meta | NASTY,
        st.integers(-3, 3),
    )
    def check(entries, meta, off):
        try:
            header = json.dumps(dict(entries, __metadata__=meta)).encode()
        except ValueError:  # too many digits for Python
            header = b"{"
        consume((len(header) + off).to_bytes(8, "little") + header + bytes(64), "x.safetensors")

    check()


def size_of(kind: str) -> int:
    """Bytes of a number of safetensors' `kind`."""
    return int("".join(x for x in kind.split("_")[0] if x.isdigit()) or 8) // 8 or 1


# --- at random: flags ------------------------------------------------------------------------------

ODD = [
    *(
        "0 -0 -1 1 2 10 0.5 1e999 -1e999 nan -nan inf 0x10 1_0 1e3 .5 5. + - -- = , ,, 1,2 1,,2".split()
    ),
    *("2,1 measured cifar10 0,0,0,1,1,1 0,0,0,0,0,0 at st+at + at+ at++st None True []".split()),
    *(
        "٣ ½ ¹ \u200b1 1\u00a0 \0 \n \udce4 ../x a/b {} {0} %s %(prog)s * ~ $HOME -5 -x @x".split(
            " "
        )
    ),
    *("", " ", "9" * 400, "9" * 5000, "x" * 5000, "1e" + "9" * 50, "--lr", "--help=1", "-h"),
]


@pytest.mark.parametrize("script", [train_kd, train_base])
def test_random_flags(fuzz, capsys, script):
    own = ["--kd_mode", "at"] if script is train_kd else ["--net_name", "resnet8"]
    args = script.parse(own)
    known = vars(args[0] if isinstance(args, tuple) else args)
    flags = {f"--{name}" for name in known} | {
        f"--{x}" for row in METHODS.values() for x in row.flags
    }
    flags = sorted(flags | {"--help", "-h", "--net1_init", "--"})
    flag = st.sampled_from(flags)
    near = st.builds(lambda x, i: x[:i] + x[i + 1 :], flag, st.integers(0, 12))
    near |= st.builds(lambda x, i: x[:i] + x[i - 1 :], flag, st.integers(1, 12))
    value = st.sampled_from(ODD) | st.sampled_from([*METHODS]) | st.text(max_size=6)
    value |= st.integers().map(str) | st.floats().map(str)
    word = st.one_of(
        st.tuples(flag, value),
        st.builds(lambda x, y: (f"{x}={y}",), flag | near, value),
        st.tuples(flag | near | value),
    )

    @fuzz(400)
    @given(st.booleans(), st.lists(word, max_size=5))
    def check(whole, words):
        argv = [*(own if whole else []), *(x for pair in words for x in pair)]
        began = time.process_time()
        try:
            args = script.parse(argv)
            cli.resolve(args[0] if isinstance(args, tuple) else args, "resnet8", {})
        except UserError as error:
            assert str(error)
        except SystemExit as stop:
            assert stop.code == 0 and any(x.startswith(("--help", "-h")) for x in argv)
        assert time.process_time() - began < 2
        capsys.readouterr()

    check()


# --- a checkpoint that was edited, and --resume -----------------------------------------------------


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """Runs that were stopped inside their second epoch, and the flags that go on with them."""
    root = tmp_path_factory.mktemp("stopped")
    few = shlex.split(f"{DIGITS} --cuda 0 --epochs 2 --batch_size 300 --save_root {root} --note")
    commands = dict(
        base=(train_base.main, ["--net_name", "resnet8", *few, "base"]),
        fit=(train_kd.main, shlex.split("--kd_mode fitnet+crd --lambda_kd 1,0 --nce_n 64")),
        kd=(train_kd.main, shlex.split("--kd_mode dml --net1_name resnet14 --s_name resnet8")),
    )
    commands["kd"][1].extend([*few, "kd"])
    net = network.build("resnet14", 10).state_dict()
    torch.save(dict(net=net, meta=META | dict(network="resnet14")), root / "t.pth")
    commands["fit"][1].extend(
        ["--t_model", str(root / "t.pth"), "--s_name", "resnet8", *few, "fit"]
    )
    for main, argv in commands.values():
        add, count = utils.Meter.add, []

        def counted(self, *args):
            add(self, *args)
            count.append(self)
            if len(count) == 8:  # five steps, one or two evaluations
                os.kill(os.getpid(), signal.SIGTERM)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(utils.Meter, "add", counted)
            with pytest.raises(SystemExit):
                main(argv)
    return root, commands


def at(path, value):
    """Put `value` at a path of a checkpoint's keys, or what `value` makes of what is there."""
    *way, last = (int(x) if x.isdigit() else x for x in path.split("."))

    def change(saved):
        part = saved
        for key in way:
            part = part[key]
        part[last] = value(part.get(last)) if callable(value) else value

    return change


def without(path, key):
    return at(path, lambda part: {k: v for k, v in part.items() if k != key})


def longer(saved):
    for key in ("history", "timing"):
        saved[key] += [dict(saved[key][0], epoch=2, row=2), dict(saved[key][0], epoch=3, row=3)]
    saved["epoch"] = 3


def done(saved):
    for key in ("history", "timing"):
        saved[key].append(dict(saved[key][0], epoch=2, row=2))
    saved["epoch"] = 2


NAN, INF = float("nan"), float("inf")
EDITED = [
    *((at("inside.step", x), f"step {x!r} of the epoch at work") for x in (-1, 0, 1.5, True, "2")),
    (at("inside.step", None), "step None of the epoch at work"),
    (at("inside.step", 10**6), "step 1000000 of an epoch of 5"),
    (at("inside.step", 6), "step 6 of an epoch of 5"),
    (at("inside", {}), "of the epoch at work it needs meter, seconds, step"),
    (at("inside", []), "of the epoch at work it needs"),
    (at("inside", 0), "of the epoch at work it needs"),
    (without("inside", "meter"), "of the epoch at work it needs"),
    (at("inside.meter", []), "no sums of the epoch at work"),
    *(
        (at("inside.meter", lambda x, n=n: [(*x[0][:2], n)]), f"over {n!r} images")
        for n in (0, -300, 1.5, True)
    ),
    (at("inside.meter", lambda x: [(x[0][0], x[0][1][:1], x[0][2])]), "sums of"),
    (at("inside.meter", lambda x: [(x[0][0], x[0][1] * NAN, x[0][2])]), "inside has entries"),
    *((at("inside.seconds", x), f"{x!r} s of the epoch") for x in (-1.0, NAN, INF, "1", True)),
    (at("optimizer.param_groups.0.weight_decay", -1.0), "the optimizer's weight_decay is -1.0"),
    (at("optimizer.param_groups.0.momentum", 0.5), "the optimizer's momentum is 0.5, not 0.9"),
    (at("optimizer.param_groups.0.nesterov", False), "the optimizer's nesterov is False"),
    (
        at("optimizer.state.0.momentum_buffer", lambda x: x * NAN),
        "optimizer has entries that are not",
    ),
    (longer, "row 3 of its metrics is none of this run"),
    (done, "of an epoch of 5"),
    (at("history.0.epoch", 2), "row 1 of its metrics is none of this run"),
    (at("epoch", 7), "epoch 7 and 1 rows of metrics"),
    (at("timing.0.seconds", NAN), "the time of epoch 1 is nan s"),
    (at("timing.0.seconds", -1.0), "the time of epoch 1 is -1.0 s"),
    (at("timing.0.row", 2), "the time of epoch 1"),
    *((at("best.epoch", x), f"the best epoch is {x!r}") for x in (5, -1, 0.5, 0)),
    *((at("best.score", x), "the best epoch is 1, its score") for x in (99.5, NAN, "x")),
    (at("sources", 3), "is damaged, or not a run's checkpoint"),
    (at("sources.data", 3), "is damaged, or not a run's checkpoint"),
    (at("sources.data.train.images", 3), "the train images in ./datasets are not those"),
]
OF_BASE = [
    (at("net", lambda net: net | dict(more=torch.zeros(10))), "or not a run's checkpoint"),
    (
        lambda saved: saved["net"].update({"fc.bias": torch.full((10,), NAN)}),
        "net has entries that",
    ),
    (lambda saved: saved["net"].update({"bn1.running_var": torch.full((16,), INF)}), "net has"),
]
OF_KD = [
    (lambda saved: saved["net1"].update({"fc.bias": torch.full((10,), NAN)}), "net1 has entries"),
    (lambda saved: saved["snet"].update({"fc.bias": torch.full((10,), NAN)}), "snet has entries"),
    (at("history.0.phase", "init"), "row 1 of its metrics is none of this run"),
    (at("sources.teacher", "abc"), "is another file than the run was started with"),
]
OF_FIT = [  # one of its parts, of weight 0, has seen no batch yet
    (at("kd", lambda kd: {k: x * NAN for k, x in kd.items()}), "has entries that are not finite"),
]


@pytest.mark.parametrize(
    "which, change, says",
    [("base", *case) for case in EDITED + OF_BASE]
    + [("kd", *case) for case in EDITED + OF_KD]
    + [("fit", *case) for case in OF_FIT],
    ids=lambda x: ascii(x)[1:40] if isinstance(x, str) else "",
)
def test_an_edited_checkpoint_is_refused(which, change, says, stopped, tmp_path, capsys):
    root, commands = stopped
    main, argv = commands[which]
    folder = shutil.copytree(root / which, tmp_path / which)
    saved = read_checkpoint(folder / "checkpoint.pth.tar")
    assert len(saved["history"]) == 1 and saved["inside"]["step"] > 0
    change(saved)
    torch.save(saved, folder / "checkpoint.pth.tar")
    before = snapshot(tmp_path)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([*argv, "--save_root", str(tmp_path), "--resume"])
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and err.count("\n") == 1 and out == "" and says in err
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("which", ["base", "kd", "fit"])
def test_an_untouched_checkpoint_is_accepted(which, stopped, tmp_path):
    """Or the table would prove nothing."""
    root, commands = stopped
    main, argv = commands[which]
    shutil.copytree(root / which, tmp_path / which)
    main([*argv, "--save_root", str(tmp_path), "--resume", "--dry_run"])
