"""A run that is interrupted, however, goes on to exactly the result of the undisturbed one."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import toys
from PIL import Image

import train_base
import train_kd
import utils
from engine.checkpoint import read_checkpoint

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
# a process that is killed at the Nth chance: after a step, before or after a file is put in its place
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


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    root = tmp_path_factory.mktemp("teacher")
    argv = ["--net_name", "resnet14", *SMALL, "--epochs", "1", "--note", "t"]
    return train_base.main([*argv, "--save_root", str(root)])["dir"] + "/model_best.pth.tar"


def command(mode, teacher, root, note, epochs=2):
    argv = ["--kd_mode", mode, *NETS, *SMALL, *toys._small(mode), "--epochs", str(epochs)]
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


@pytest.mark.parametrize("mode", STATES)
def test_killed_at_a_random_point(mode, teacher, tmp_path):
    train_kd.main(command(mode, teacher, tmp_path, "whole"))
    folder = kill_and_go_on(mode, teacher, tmp_path, 1, random.Random(mode))
    assert_same(result(tmp_path / "whole"), result(folder))


@pytest.mark.slow
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
    [
        (signal.SIGTERM, 143, 6, "SIGTERM after distil epoch 1, step 5"),
        (signal.SIGINT, 130, 16, "SIGINT after distil epoch 2, step 3"),
        (signal.SIGTERM, 143, 12, "SIGTERM after distil epoch 1, step 11"),  # its last
        (signal.SIGTERM, 143, 13, "SIGTERM after epoch 1"),
    ],
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
    assert capsys.readouterr().err.splitlines()[-1] == f"stopped by {where}: --resume goes on"
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
    assert stop.value.code == 130 and capsys.readouterr().err.endswith("interrupted\n")


@pytest.mark.parametrize("what", ["checkpoint.pth.tar", "metrics.csv", "model_best.pth.tar"])
def test_a_full_disk(what, teacher, tmp_path, monkeypatch, capsys):
    """The old checkpoint survives, nothing is left half written, one line; then it goes on."""
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
    assert "No space left on device" in line and "--resume" in line
    assert not list((tmp_path / "full").glob("*.tmp"))
    saved = read_checkpoint(tmp_path / "full" / "checkpoint.pth.tar")
    assert len(saved["history"]) == (2 if what == "metrics.csv" else 1)
    train_kd.main([*argv, "--resume"])
    assert_same(result(tmp_path / "whole"), result(tmp_path / "full"))


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
        capsys.readouterr()
        with pytest.raises(SystemExit):
            train_base.main([*argv, "--note", "r", "--resume"])
        after = {path: path.stat().st_mtime_ns for path in folder.iterdir() if path.name != ".lock"}
        process.stdin.close()
    assert "is in use: another process trains there" in capsys.readouterr().err
    assert before == after
    train_base.main([*argv, "--note", "r", "--resume"])  # free again


def test_stopped_before_the_first_checkpoint(tmp_path, capsys):
    argv = ["--net_name", "resnet8", *SMALL, "--epochs", "1", "--save_root", str(tmp_path)]
    whole = Path(train_base.main([*argv, "--note", "whole"])["dir"])
    folder = tmp_path / "early"
    folder.mkdir()
    record = json.loads((whole / "args.json").read_text())
    (folder / "args.json").write_text(json.dumps(record))
    with pytest.raises(SystemExit):
        train_base.main([*argv, "--note", "early", "--resume", "--lr", "0.3"])
    assert "--lr is 0.3, the run was started with 0.1" in capsys.readouterr().err
    train_base.main([*argv, "--note", "early", "--resume"])
    assert_same(result(whole), result(folder))
