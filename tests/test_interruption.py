"""An interrupted run ends with exactly the result of an undisturbed one."""

import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import toys
from conftest import tiers
from messages import ends, names, one_line
from PIL import Image

import coco_like
import train_base
import engine.run as run_module
import train_kd
import utils
from detection import coco
from engine.checkpoint import read_checkpoint
from engine.checkpoint import save_checkpoint
from engine.signals import Signals
from engine import cli
from engine import stream

ROOT = Path(__file__).parent.parent
SMALL = ["--data_name", "digits", "--img_size", "12", "--cuda", "0", "--print_freq", "3"]
NETS = ["--t_name", "resnet14", "--s_name", "resnet8"]
STATES = [
    "at",
    "crd",
    "ft",
    "fsp",
    "dml",
    "simkd",
    "mlkd",
    "wkd_l",
]  # between them every kind of state
# a process that is killed at the Nth chance: after a step, before or after a file is put in its
# place
KILLED = """
import os, signal, sys
import train_kd, utils
left = int(sys.argv[1])
def chance(call, after):
    def wrapped(*args):
        global left
        if after: result = call(*args)
        left -= 1
        if left == 0: os.kill(os.getpid(), signal.SIGKILL)
        if not after: result = call(*args)
        return result
    return wrapped
utils.Meter.add = chance(utils.Meter.add, True)
os.replace = chance(chance(os.replace, False), True)
train_kd.main(sys.argv[2:])
"""


def command(mode, teacher, root, note, epochs=2):
    argv = ["--kd_mode", mode, *NETS, *SMALL, *toys.small_flags(mode), "--epochs", str(epochs)]
    argv += ["--t_model", teacher] if mode != "dml" else []
    return [*argv, "--save_root", str(root), "--note", note]


def result(folder):
    """Everything that has to be the same: metrics, and all that the checkpoint holds but times."""
    last = read_checkpoint(folder / "checkpoint.pth.tar")
    del last["timing"]
    return (folder / "metrics.csv").read_bytes(), last


def assert_same(one, other):
    assert one[0] == other[0]
    pairs = [(one[1], other[1])]
    while pairs:
        a, b = pairs.pop()
        if isinstance(a, dict):
            assert a.keys() == b.keys()
            pairs += [(a[key], b[key]) for key in a]
        elif isinstance(a, (list, tuple)):
            assert len(a) == len(b)
            pairs += zip(a, b)
        else:
            assert torch.equal(a, b) if torch.is_tensor(a) else a == b


def kill_and_go_on(mode, teacher, root, kills, rng, epochs=2):
    """Run to the end, killed `kills` times on the way. Returns the folder."""
    argv = [*command(mode, teacher, root, "killed", epochs), "--save_every", "0"]
    for i in range(kills):
        begun = (root / "killed").exists()
        more = ["--resume"] if begun else []
        code = [sys.executable, "-c", KILLED, str(rng.randint(1, 25)), *argv, *more]
        done = subprocess.run(code, cwd=ROOT, capture_output=True, text=True)
        if done.returncode == 0:
            break  # it was faster
        assert done.returncode == -signal.SIGKILL, done.stderr
    train_kd.main([*argv, *(["--resume"] if (root / "killed").exists() else [])])
    return root / "killed"


@pytest.mark.slow
@pytest.mark.parametrize("mode", tiers(STATES, "crd"))
def test_killed_at_a_random_point(mode, teacher, tmp_path):
    train_kd.main(command(mode, teacher, tmp_path, "whole"))
    folder = kill_and_go_on(mode, teacher, tmp_path, 1, random.Random(mode))
    assert_same(result(tmp_path / "whole"), result(folder))


@pytest.mark.soak
@pytest.mark.parametrize("mode", STATES)
def test_killed_twenty_times(mode, teacher, tmp_path):
    train_kd.main(command(mode, teacher, tmp_path, "whole", 8))
    folder = kill_and_go_on(mode, teacher, tmp_path, 20, random.Random(f"{mode} soak"), 8)
    assert_same(result(tmp_path / "whole"), result(folder))


def stop_at(monkeypatch, step, number):
    """Send this process a signal after the `step`th batch, those of evaluations counted."""
    add, count = utils.Meter.add, [0]

    def counted(self, *args):
        add(self, *args)
        count[0] += 1
        if count[0] == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(utils.Meter, "add", counted)


@pytest.mark.parametrize(
    "number, code, step, where",
    tiers(
        [
            (signal.SIGTERM, 143, 6, ("SIGTERM", 1, 5)),  # signal, epoch, step
            (signal.SIGINT, 130, 16, ("SIGINT", 2, 3)),
            (signal.SIGTERM, 143, 12, ("SIGTERM", 1, 11)),  # its last
            (signal.SIGTERM, 143, 13, ("SIGTERM", 1)),  # the epoch's end
        ],
        (signal.SIGTERM, 143, 6, ("SIGTERM", 1, 5)),
    ),
)
def test_a_signal_saves_and_ends(number, code, step, where, teacher, tmp_path, monkeypatch, capsys):
    argv = command("crd", teacher, tmp_path, "stopped")
    train_kd.main(command("crd", teacher, tmp_path, "whole"))
    before = [signal.getsignal(x) for x in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        stop_at(patch, step, number)
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            train_kd.main(argv)
    assert stop.value.code == code
    one_line(capsys.readouterr().err.splitlines()[-1], "--resume", *where)
    assert [signal.getsignal(x) for x in (signal.SIGINT, signal.SIGTERM)] == before
    train_kd.main([*argv, "--resume"])
    assert_same(result(tmp_path / "whole"), result(tmp_path / "stopped"))


def test_train_base_goes_on_inside_an_epoch(tmp_path, monkeypatch):
    argv = ["--net_name", "resnet8", *SMALL, "--epochs", "2", "--save_root", str(tmp_path)]
    train_base.main([*argv, "--note", "whole"])
    with monkeypatch.context() as patch:
        stop_at(patch, 7, signal.SIGTERM)
        with pytest.raises(SystemExit):
            train_base.main([*argv, "--note", "stopped"])
    saved = read_checkpoint(tmp_path / "stopped" / "checkpoint.pth.tar")
    assert saved["inside"]["step"] == 7 and not saved["history"]
    train_base.main([*argv, "--note", "stopped", "--resume"])
    assert_same(result(tmp_path / "whole"), result(tmp_path / "stopped"))


@pytest.mark.slow
def test_streamed_images_go_on_inside_an_epoch(tmp_path, monkeypatch):
    """Files that workers read: the same images in the same order, cropped alike."""
    rng = np.random.default_rng(0)
    for split, name in product(("train", "test"), ("a", "b")):
        (tmp_path / split / name).mkdir(parents=True)
        for i in range(8):
            pixels = rng.integers(256, size=(110, 130, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / split / name / f"{i}.png")
    argv = ["--net_name", "resnet8", "--data_name", "imagefolder", "--img_root", str(tmp_path)]
    argv += ["--img_size", "100", "--batch_size", "4", "--epochs", "2", "--workers", "1"]
    argv += ["--cuda", "0", "--save_root", str(tmp_path / "runs")]
    train_base.main([*argv, "--note", "whole"])
    with monkeypatch.context() as patch:
        stop_at(patch, 7, signal.SIGINT)  # four steps, one of the test, two more
        with pytest.raises(SystemExit):
            train_base.main([*argv, "--note", "stopped"])
    saved = read_checkpoint(tmp_path / "runs" / "stopped" / "checkpoint.pth.tar")
    assert saved["inside"]["step"] == 2 and len(saved["history"]) == 1
    train_base.main([*argv, "--note", "stopped", "--resume"])
    assert_same(*(result(tmp_path / "runs" / note) for note in ("whole", "stopped")))


def test_a_second_signal_ends_at_once(tmp_path, monkeypatch, capsys):
    """It does not wait for the step's end; what was saved before is whole."""
    step = train_base.train_step

    def slow(*args):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return step(*args)

    monkeypatch.setattr(train_base, "train_step", slow)
    argv = ["--net_name", "resnet8", *SMALL, "--epochs", "1", "--save_root", str(tmp_path)]
    with pytest.raises(SystemExit) as stop:
        train_base.main(argv)
    assert stop.value.code == 130
    one_line(capsys.readouterr().err)


def test_a_sigterm_soon_after_a_signal_is_the_same_request():
    """A cluster sends it to a training and to its parent, which ends its children."""
    for first in (signal.SIGINT, signal.SIGTERM):
        with Signals() as signals:
            os.kill(os.getpid(), first)
            os.kill(os.getpid(), signal.SIGTERM)
            assert signals.number == first
            signals._came -= 10.0  # and later it is one of its own
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(1)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["checkpoint.pth.tar", "metrics.csv", "model_best.pth.tar"])
def test_a_full_disk(what, teacher, tmp_path, monkeypatch, capsys):
    """The old checkpoint survives, nothing is left half written, one line; then it can be
    resumed."""
    train_kd.main(command("crd", teacher, tmp_path, "whole"))
    argv = command("crd", teacher, tmp_path, "full")
    fsync, wrote = os.fsync, []

    def full(number):
        path = os.readlink(f"/proc/self/fd/{number}")
        wrote.append(path)
        if path.endswith(f"{what}.tmp") and sum(p.endswith(f"{what}.tmp") for p in wrote) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(number)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        try:
            train_kd.main(argv)
            pytest.skip("the second epoch was no better one")
        except SystemExit as stop:
            assert stop.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    one_line(line, tmp_path / "full", "No space left on device", "--resume")
    assert not list((tmp_path / "full").glob("*.tmp"))
    saved = read_checkpoint(tmp_path / "full" / "checkpoint.pth.tar")
    assert len(saved["history"]) == (2 if what == "metrics.csv" else 1)
    train_kd.main([*argv, "--resume"])
    assert_same(result(tmp_path / "whole"), result(tmp_path / "full"))


@pytest.mark.slow
def test_two_runs_cannot_write_one_folder(tmp_path, capsys):
    argv = ["--net_name", "resnet8", *SMALL, "--epochs", "1", "--save_root", str(tmp_path)]
    folder = Path(train_base.main([*argv, "--note", "r"])["dir"])
    code = (
        "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); "
        "print('held', flush=True); sys.stdin.read()"
    )
    other = [sys.executable, "-c", code, str(folder / ".lock")]
    with subprocess.Popen(other, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        before = {
            path: path.stat().st_mtime_ns for path in folder.iterdir() if path.name != ".lock"
        }
        with ends(capsys, folder):
            train_base.main([*argv, "--note", "r", "--resume"])
        after = {path: path.stat().st_mtime_ns for path in folder.iterdir() if path.name != ".lock"}
        process.stdin.close()
    assert before == after
    train_base.main([*argv, "--note", "r", "--resume"])  # free again


@pytest.mark.slow
def test_stopped_before_the_first_checkpoint(tmp_path, capsys):
    argv = ["--net_name", "resnet8", *SMALL, "--epochs", "1", "--save_root", str(tmp_path)]
    whole = Path(train_base.main([*argv, "--note", "whole"])["dir"])
    folder = tmp_path / "early"
    folder.mkdir()
    record = json.loads((whole / "args.json").read_text())
    (folder / "args.json").write_text(json.dumps(record))
    with ends(capsys, "--lr", 0.3, 0.1):
        train_base.main([*argv, "--note", "early", "--resume", "--lr", "0.3"])
    train_base.main([*argv, "--note", "early", "--resume"])
    assert_same(result(whole), result(folder))


# --- killed before its args.json ------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("left", ["killed", "", ".lock", ".lock args.json.tmp log.txt"])
@pytest.mark.parametrize("more", [[], ["--resume"]])
def test_killed_before_its_args_are_there(left, more, tmp_path):
    """Both a new run and --resume begin in what is left."""
    argv = ["--net_name", "resnet8", *SMALL, "--epochs", "1", "--save_root", str(tmp_path)]
    if left == "killed":
        code = KILLED.replace("train_kd", "train_base")
        done = subprocess.run([sys.executable, "-c", code, "1", *argv, "--note", "r"], cwd=ROOT)
        assert done.returncode == -signal.SIGKILL
        assert not (tmp_path / "r" / "args.json").exists()
    else:
        (tmp_path / "r").mkdir()
        for name in left.split():
            (tmp_path / "r" / name).write_text("" if name == "log.txt" else "half")
    train_base.main([*argv, "--note", "r", *more])
    assert (tmp_path / "r" / "result.json").exists()
    assert not list((tmp_path / "r").glob("*.tmp"))


@pytest.mark.parametrize("name", ["mine.txt", "log.txt"])
@pytest.mark.parametrize("more", [[], ["--resume"]])
def test_what_others_wrote_is_not_taken_for_a_killed_run(name, more, tmp_path, capsys):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / name).write_text("mine")
    argv = ["--net_name", "resnet8", *SMALL, "--save_root", str(tmp_path), "--note", "r"]
    with ends(capsys, tmp_path / "r", "--resume"):
        train_base.main([*argv, *more])
    assert [path.name for path in (tmp_path / "r").iterdir()] == [name]


def test_a_run_that_another_process_wrote_meanwhile(tmp_path, capsys, monkeypatch):
    """Between the look at the folder and its lock."""
    argv = ["--net_name", "resnet8", *SMALL, "--save_root", str(tmp_path), "--note", "r"]
    load = cli.load_data

    def late(*args):
        (tmp_path / "r").mkdir()
        (tmp_path / "r" / "args.json").write_text("{}")
        return load(*args)

    monkeypatch.setattr(cli, "load_data", late)
    with ends(capsys, tmp_path / "r"):
        train_base.main(argv)
    assert (tmp_path / "r" / "args.json").read_text() == "{}"


def test_no_locks_on_a_file_system(tmp_path, capsys, monkeypatch):
    """It is said; the run continues."""
    import fcntl

    def refuse(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    argv = ["--net_name", "resnet8", *SMALL, "--epochs", "1", "--save_root", str(tmp_path)]
    folder = train_base.main(argv)["dir"]
    warnings = [x for x in capsys.readouterr().out.splitlines() if x.startswith("warning:")]
    assert any(names(x, "No locks available", folder) for x in warnings)


# --- other images, another teacher ----------------------------------------------------------------


def pictures(root, size, change=0):
    rng = np.random.default_rng(0)
    for split, name in product(("train", "test"), ("a", "b")):
        (root / split / name).mkdir(parents=True)
        for i in range(4):
            pixels = rng.integers(256, size=(size, size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / split / name / f"{i + change}.png")
    return root


def grown(root):
    for name in ("a", "b"):
        shutil.copy(root / "train" / name / "0.png", root / "train" / name / "more.png")
    return "train", 8, 10


def renamed(root):
    (root / "test" / "a" / "0.png").rename(root / "test" / "a" / "9.png")
    return ("test",)


def repainted(root):
    Image.new("RGB", (6, 6)).save(root / "train" / "a" / "0.png")
    return ("train",)


def swapped(root):
    one, other = root / "train" / "a" / "0.png", root / "train" / "b" / "x.png"
    one.rename(other)
    return ("train",)


@pytest.fixture(scope="module", params=[6, 98], ids=["resident", "streamed"])
def on_files(request, tmp_path_factory):
    """A run of one of two epochs on files: its flags, and its folder's root."""
    root = tmp_path_factory.mktemp("files")
    size = request.param
    pictures(root / "img", size)
    argv = ["--net_name", "resnet8", "--data_name", "imagefolder", "--epochs", "2", "--cuda", "0"]
    argv += ["--batch_size", "4", "--workers", "0", "--note", "r"]
    argv += ["--img_size", str(size)] if size > 96 else []
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 4, signal.SIGTERM)
        with pytest.raises(SystemExit):
            place = ["--img_root", str(root / "img"), "--save_root", str(root / "runs")]
            train_base.main([*argv, *place])
    return argv, root


@pytest.mark.parametrize("change", [grown, renamed, repainted, swapped])
def test_other_images_are_refused(change, on_files, tmp_path, capsys):
    argv, root = on_files
    img, runs = shutil.copytree(root / "img", tmp_path / "img"), tmp_path / "runs"
    shutil.copytree(root / "runs", runs)
    named = change(img)
    before = {path: path.read_bytes() for path in (runs / "r").iterdir()}
    for early in (False, True):  # stopped before its first checkpoint
        if early:
            (runs / "r" / "checkpoint.pth.tar").unlink()
            del before[runs / "r" / "checkpoint.pth.tar"]
        with ends(capsys, img, *named):
            train_base.main([*argv, "--img_root", str(img), "--save_root", str(runs), "--resume"])
        assert {path: path.read_bytes() for path in (runs / "r").iterdir()} == before


def test_a_moved_folder_is_the_same(on_files, tmp_path, monkeypatch):
    argv, root = on_files
    shutil.copytree(root / "img", tmp_path / "elsewhere" / "pictures")
    shutil.copytree(root / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path / "elsewhere")
    runs = ["--save_root", str(tmp_path / "runs"), "--resume"]
    train_base.main([*argv, "--img_root", "pictures", *runs])
    assert (tmp_path / "runs" / "r" / "result.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("old", [False, True])
def test_another_teacher_is_refused(old, teacher, tmp_path, capsys, monkeypatch):
    """The same weights in another file are the same teacher; other ones under its name are not."""
    path = shutil.copy(teacher, tmp_path / "teacher.pth.tar")
    argv = command("st", str(path), tmp_path, "r")
    with monkeypatch.context() as patch:
        stop_at(patch, 7, signal.SIGTERM)
        with pytest.raises(SystemExit):
            train_kd.main(argv)
    if old:  # of a run that did not know its images
        file = tmp_path / "r" / "checkpoint.pth.tar"
        saved = read_checkpoint(file)
        del saved["sources"]
        torch.save(saved, file)
        args = json.loads((tmp_path / "r" / "args.json").read_text())
        del args["sources"]
        (tmp_path / "r" / "args.json").write_text(json.dumps(args))
    content = read_checkpoint(path)
    content["net"]["fc.bias"] += 1
    torch.save(content, path)
    with ends(capsys, "--t_model", path):
        train_kd.main([*argv, "--resume"])
    shutil.copy(teacher, path)
    train_kd.main([*argv, "--resume"])
    warnings = [x for x in capsys.readouterr().out.splitlines() if x.startswith("warning:")]
    unknown = [x for x in warnings if names(x, "images") and not names(x, "teacher")]
    assert len(unknown) == old  # that the images cannot be compared


# --- what is said where there is no checkpoint ----------------------------------------------------


def test_whether_there_is_a_checkpoint_is_said(tmp_path, capsys, monkeypatch):
    argv = ["--net_name", "resnet8", *SMALL, "--epochs", "2", "--save_root", str(tmp_path)]
    step, lines = train_base.train_step, []
    for epoch in (1, 2):
        done = []

        def broken(*args):
            out, loss = step(*args)
            done.append(loss)
            return out, loss * float("nan") if len(done) > 11 * (epoch - 1) else loss

        monkeypatch.setattr(train_base, "train_step", broken)
        with ends(capsys, "ce", "--lr", "checkpoint") as said:
            train_base.main([*argv, "--note", f"r{epoch}"])
        assert (tmp_path / f"r{epoch}" / "checkpoint.pth.tar").exists() is (epoch == 2)
        lines.append(re.sub(r"\d+", "", said[0]))
    assert lines[0] != lines[1], "not the epoch alone"


def test_a_disk_that_is_full_at_the_first_checkpoint(tmp_path, capsys, monkeypatch):
    def full(state, path):
        raise OSError(errno.ENOSPC, "No space left on device")

    save = save_checkpoint

    def first(state, path):
        return (save if "initial" in path.name else full)(state, path)

    monkeypatch.setattr(run_module, "save_checkpoint", first)
    argv = ["--net_name", "resnet8", *SMALL, "--epochs", "1", "--save_root", str(tmp_path)]
    with ends(capsys, tmp_path, "No space left on device"):
        train_base.main(argv)


@pytest.mark.slow
def test_a_wrong_backend_does_not_end_a_run(tmp_path):
    """MPLBACKEND chooses a window system, of which no curve has need."""
    argv = ["--net_name", "resnet8", *SMALL, "--epochs", "1", "--save_root", str(tmp_path)]
    command = [sys.executable, "train_base.py", *argv, "--note", "r"]
    env = dict(os.environ, MPLBACKEND="nonsense")
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "r" / "result.json").exists() and (tmp_path / "r" / "curves.png").exists()


def test_what_identifies_boxes_and_digits(tmp_path):
    """Boxes: the annotations, names and sizes, wherever they lie. Digits: what they are
    unscaled."""
    coco_like.draw(tmp_path / "one", 3, 2, 40, 1)
    known = coco.load(tmp_path / "one").identity()
    shutil.copytree(tmp_path / "one", tmp_path / "moved")
    assert coco.load(tmp_path / "moved").identity() == known
    image = next((tmp_path / "moved" / "val2017").iterdir())
    image.write_bytes(image.read_bytes() + b"more")
    other = coco.load(tmp_path / "moved").identity()
    assert other["train"] == known["train"] and other["val"] != known["val"]
    file = tmp_path / "one" / "annotations" / "instances_train2017.json"
    content = json.loads(file.read_text())
    content["annotations"][0]["bbox"][0] += 0.5
    file.write_text(json.dumps(content))
    assert coco.load(tmp_path / "one").identity()["train"] != known["train"]

    digits = stream.load("digits").identity()
    assert stream.load("digits", img_size=12).to("cpu").identity() == digits
    assert [part["images"] for part in digits.values()] == [1297, 500]
    assert digits["train"]["sha256"] != digits["test"]["sha256"]
