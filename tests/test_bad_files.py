"""Images, checkpoints and networks that cannot be read: one line names them, nothing is written."""

import ctypes
import os
import shlex
import shutil

import pytest
import torch
from mistakes import CRAFTED, DIGITS, cases, is_line, missing, pictures, refused, snapshot

import train_base
import train_kd
from engine import foreign
from engine.checkpoint import read_checkpoint
from tools import eval as evaluation
from tools import export
from utils import UserError

LONG = "x" * 300
SHOWN = "x" * 40 + "*"  # what a message must show of it, at least

# --- the tables: flags, then what the message must name; flags alone: the last of them ------------

# train_base.py ... --data_name imagefolder --img_root ..., and the image that cannot be read
UNREADABLE = [
    *(("text", "0.png"), ("zero", "0.png"), ("half", "0.png"), ("pipe", "pipe.png")),
    *(("dangling", "gone.png"), ("bomb", "0.png")),
    *(("no_utf8", "caf\\udce9.png"), ("escapes", "\\x1b[31m\\nred.png")),
]
# train_base.py --net_name resnet8 --data_name digits --img_size 12 --save_root {runs} --cuda 0 ...
IMAGES = [
    ("--data_name imagefolder --img_root {img}/gone", "{img}/gone"),
    ("--data_name imagefolder --img_root {file}", "--img_root", "{file}"),
    "--data_name imagefolder --img_root ''",
    (f"--data_name imagefolder --img_root {LONG}", "--img_root", SHOWN),
    ("--data_name imagefolder --img_root {img}/no_classes", "{img}/no_classes/train"),
    ("--data_name imagefolder --img_root {img}/no_test", "{img}/no_test"),
    ("--data_name imagefolder --img_root {img}/empty_class", "{img}/empty_class/train", "dog"),
    ("--data_name imagefolder --img_root {img}/one_class", "imagefolder", "cat"),
    ("--data_name imagefolder --img_root {img}/one_image", "imagefolder", "1"),
    ("--data_name imagefolder --img_root {img}/other_classes", "{img}/other_classes", "wolf"),
    ("--data_name imagefolder --img_root {img}/size6 --num_class 3", "--num_class", "3"),
    *(
        (f"--data_name imagefolder --img_root {{img}}/{x}{more}", f"{{img}}/{x}/train/cat/{file}")
        for x, file in UNREADABLE
        for more in ("", " --img_size 97 --workers 0")
    ),
    (
        "--data_name imagefolder --img_root {img}/odd_classes",
        *("{img}/odd_classes", "caf\\udce9\\x1b[31m\\nx*"),
    ),
    (
        "--data_name imagenet --img_root {img}/text --img_size 97 --num_class 5",
        *("--num_class", "5", "imagenet"),
    ),
    ("--data_name wds --img_size 97", "./datasets", "train-"),
    ("--data_name wds --img_size 97 --img_root {img}/size97", "{img}/size97", "train-"),
    ("--data_name wds --img_size 97 --img_root {img}/train-{{0..3}}.tar", "{img}/train-0.tar"),
    ("--data_name wds --img_size 97 --img_root {img}/train-{{3..0}}.tar", "--img_root"),
    ("--data_name wds --img_size 64 --img_root {img}/train-0.tar", "--img_size", "64"),
    ("--data_name cifar10 --img_root {img}/gone/deeper", "CIFAR10", "{img}/gone/deeper"),
    ("--data_name cifar10 --img_root {img}/cut", "{img}/cut/cifar-10-batches-py"),
    ("--data_name cifar100 --img_root {img}/cut", "CIFAR100", "{img}/cut"),
    ("--data_name cifar100 --img_root {file}", "{file}"),
]
# train_base.py --net_name resnet8 --data_name imagefolder --img_root ...
FOLDERS = [
    ("{img}/size1", "--img_size", "1"),
    ("{img}/size4", "--img_size", "4"),
    ("{img}/size97", "--img_size", "{img}/size97/train/cat/0.png"),
    ("{img}/wide", "--img_size", "{img}/wide/train/cat/0.png"),
]
# train_kd.py --kd_mode at --t_model {t} --s_init {s} --save_root {runs} --cuda 0 ...
TEACHERS = [
    "--t_model ''",
    ("--t_model gone.pth", "gone.pth"),
    ("--t_model {ck}", "{ck}"),
    ("--t_model {file}/x", "{file}/x"),
    (f"--t_model {LONG}", SHOWN),
    ("--t_model /dev/null", "/dev/null"),
    (f"--t_model {{ck}}/other.pth --t_name resnet8 {DIGITS}", "{ck}/other.pth", "resnet8"),
    ("--t_model {ck}/nowhere.pth", "gone"),
    ("--kd_mode st --t_model {ck}/hundred.pth --data_name digits", "100", "digits"),
    ("--s_init {ck}/nan.pth", "{ck}/nan.pth", "fc.bias"),
]
# --t_classes {lines}/..., which have to name one of the teacher's classes for each of the digits
LINES = [
    *(("three", "3", "10", "digits"), ("twice", "10", "0"), ("far", "2", "10")),
    *(("wolf", "10", "wolf"), ("gap", "2"), ("odd", "1"), ("none",), ("long", "1"), ("latin",)),
]
TEACHERS += [
    (f"--kd_mode {mode} --t_classes {{lines}}/{x}.txt", "--t_classes", *more)
    for mode, (x, *more) in [("st", row) for row in LINES] + [("at", LINES[0])]
]
TEACHERS += [
    ("--t_classes gone.txt", "--t_classes", "gone.txt"),
    ("--t_classes {ck}", "--t_classes", "{ck}"),
    "--t_classes ''",
    (f"--t_classes {LONG}", "--t_classes", SHOWN),
    ("--kd_mode st --t_model {ck}/wolves.pth", "{ck}/wolves.pth", "wolf 0", "0", "--t_classes"),
    ("--kd_mode catkd --t_model {ck}/wolves.pth", "{ck}/wolves.pth", "catkd", "--t_classes", "at"),
    ("--s_init {ck}/wolves.pth", "--s_init", "{ck}/wolves.pth", "wolf 0"),
    ("--t_model {ck}/pair.pth", "{ck}/pair.pth", "student", "teacher", "--t_key"),
    ("--t_model {ck}/flat_pair.pth", "{ck}/flat_pair.pth", "s", "t", "--t_key"),
    ("--s_init {ck}/pair.pth", "{ck}/pair.pth", "student", "teacher", "--s_key"),
    ("--t_model {ck}/pair.pth --t_key techer", "--t_key", "techer", "teacher", "{ck}/pair.pth"),
    ("--s_init {ck}/pair.pth --s_key techer", "--s_key", "techer", "teacher", "{ck}/pair.pth"),
    ("--t_key meta", "--t_key", "meta", "{t}"),
    "--t_key ''",
    "--s_key ''",
    (
        "--t_model {ck}/half_inside.pth --t_name resnet8",
        *("{ck}/half_inside.pth", "resnet8", "1", "fc.bias"),
    ),
    ("--t_model {ck}/x.pt2", "{ck}/x.pt2", "torch.export", "python"),
    ("--t_model {ck}/graph.onnx", "{ck}/graph.onnx", "ONNX"),
]
# the files of {ck} that are no teachers, and what the message must name besides the file
CHECKPOINTS = [
    *(("pipe.pth",), ("other.pth", "--t_name"), ("own_code.pth", "--t_name", "evil.py:build")),
    *(("lacks.pth", "fc.bias"), ("extra.pth", "more"), ("wrong.pth", "resnet8", "resnet14")),
    *((f"{x}.pth", "fc.bias") for x in "long_bias nan inf complex bools sparse hollow".split()),
    *((f"{x}.pth",) for x in "number nothing listed tensor empty hollow_net".split()),
    *(("numbered.pth", "1"), ("plain.pth", "epoch")),
    *(("evil.pth", "posix.mkdir"), ("evil_old.pth", "posix.mkdir"), ("evil.pkl",)),
    *(("array.pth", "numpy*"), ("flipped.pth", "fine/data/*")),
    *((f"{x}.pth",) for x in "cut0 cut1 cut50 cut99 text zeros archive".split()),
    *((f"{x}.safetensors",) for x in "cut0 cut7 cut100 cutend huge meta".split()),
    *((f"meta_{name}.pth", key) for name, (key, _) in CRAFTED.items()),
    ("meta_escapes.pth", "\\x1b[31m\\x00x*"),
    *(("nested.pth", "fc.bias"), ("claims.pth", "fc.bias")),
    *(("odd_keys.pth", "\\x1b[31mk*"), ("only_keys.pth", "\\x1b[31mk*")),
    ("own_shell.pth", "--t_name", "'x.py:f; touch ran'"),
    *(("bomb.pth",), ("deep.safetensors",), ("digits.safetensors",), ("no_std.pth", "mean")),
]
TEACHERS += [(f"--t_model {{ck}}/{x}", f"{{ck}}/{x}", *more) for x, *more in CHECKPOINTS]
EVAL = [
    ("{ck}/sparse.pth", "{ck}/sparse.pth", "fc.bias"),
    ("{ck}/flipped.pth", "{ck}/flipped.pth"),
    ("{ck}/fine.pth --teacher {ck}/cut50.pth", "{ck}/cut50.pth"),
    ("{ck}/wolves.pth", "{ck}/wolves.pth", "wolf 0", "--classes"),
    ("{ck}/fine.pth --teacher {ck}/wolves.pth", "{ck}/wolves.pth", "wolf 0", "--t_classes"),
    ("{ck}/fine.pth --classes {lines}/three.txt", "--classes", "3", "10", "digits"),
    ("{ck}/fine.pth --classes gone.txt", "--classes", "gone.txt"),
    ("{ck}/fine.pth --t_classes {lines}/three.txt", "--t_classes", "--teacher"),
    ("{ck}/fine.pth --t_key net", "--t_key", "--teacher"),
    ("{ck}/fine.pth --key nett", "--key", "nett", "{ck}/fine.pth", "net"),
    ("{ck}/fine.pth --which peer --key net", "--key", "--which"),
    ("{ck}/meta_img_size.pth", "{ck}/meta_img_size.pth", "img_size", "-3"),
    ("{s} {t}", "--ensemble", "2"),
    ("{s} --ensemble probs", "--ensemble", "probs"),
    ("{s} {t} --ensemble mean", "--ensemble", "mean"),
    ("{s} {t} --ensemble confidence", "--ensemble", "confidence"),
    ("{s} {t} --ensemble probs --net resnet8", "--net", "resnet8", "2"),
    ("{s} {t} --ensemble probs --which peer", "--which"),
    ("{s} {ck}/sparse.pth --ensemble probs", "{ck}/sparse.pth", "fc.bias"),
    ("{s} {ck}/sized.pth --ensemble probs", "--img_size", "{s}", "{ck}/sized.pth"),
]
EXPORT = [
    ("{ck}/nan.pth --out {root}/x.safetensors", "{root}/x.safetensors"),
    ("{ck}/evil.pth --out {root}/x.pt2", "{ck}/evil.pth"),
    ("{ck}/pair.pth --out {root}/x.pt2", "{ck}/pair.pth", "--key", "student", "teacher"),
    ("{ck}/pair.pth --key x --out {root}/x.pt2", "{ck}/pair.pth", "--key", "x", "student"),
    ("{ck}/fine.pth --out {file}/x.pt2", "{file}/x.pt2"),
    ("{ck}/fine.pth --format onnx --out {file}", "--out", "{file}"),
]
NO_DOG = "--kd_mode dml --s_name resnet8 --data_name imagefolder --img_root {img}/empty_class"

RUN = "--save_root {runs} --cuda 0 "
ON_DIGITS = f"--net_name resnet8 {DIGITS} {RUN}"
ON_FILES = RUN + "--kd_mode at --t_model {t} --s_init {s} "
IN_FOLDERS = f"--net_name resnet8 {RUN} --data_name imagefolder --img_root "
CASES = [
    *cases(train_base.main, ON_DIGITS, IMAGES),
    *cases(train_base.main, IN_FOLDERS, FOLDERS),
    *cases(train_kd.main, ON_FILES, TEACHERS),
    *cases(train_kd.main, RUN, [(NO_DOG, "{img}/empty_class/train", "dog")]),
    *cases(evaluation.main, "--cuda 0 ", EVAL),
    *cases(export.main, "", EXPORT),
]


@pytest.mark.filterwarnings("error::UserWarning", "error::RuntimeWarning")
@pytest.mark.parametrize("main, argv, wanted", CASES)
def test_one_line_and_nothing_written(places, monkeypatch, capfd, main, argv, wanted):
    refused(places, monkeypatch, capfd, main, argv, wanted)


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


# --- what may not be read -------------------------------------------------------------------------


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
    assert stop.value.code == 2 and is_line(err), err
    assert missing([str(root / name)], err) == [], err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors", "folder/x.pth"])
def test_checkpoints_that_may_not_be_read(bound, name, tmp_path):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    torch.save(dict(net={}), file)
    closed = file.parent if "/" in name else file
    closed.chmod(0)
    try:
        with pytest.raises(UserError, match=r"x\.(pth|safetensors)") as error:
            read_checkpoint(file)
    finally:
        closed.chmod(0o755)
    assert isinstance(error.value.__context__, PermissionError)  # it is not called damaged


def test_a_network_s_file_that_may_not_be_read(bound, tmp_path):
    file = tmp_path / "folder" / "net.py"
    file.parent.mkdir()
    file.write_text("def build(n): ...")
    for closed in (file, file.parent):
        closed.chmod(0)
        try:
            with pytest.raises(UserError, match=r"net\.py"):
                foreign.constructor(f"{file}:build")
        finally:
            closed.chmod(0o755)
