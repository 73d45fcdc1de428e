"""The teacher's values of every view, kept on disk: the same training, and what can go wrong."""

import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from messages import ends
from test_interruption import SMALL, assert_same, result

import dataset
import train_kd
from engine import stream, teacher_cache
from engine.run import read_metrics

ROOT = Path(__file__).parent.parent


def command(students, teacher, root, note, *more):
    argv = ["--kd_mode", students, "--t_model", teacher, "--s_name", "resnet8", *SMALL]
    argv += ["--epochs", "2", "--save_root", root, "--note", note, *more]
    return [str(x) for x in argv]


@pytest.fixture
def passes(monkeypatch):
    """How many forward passes of the teacher each run of this test needed."""
    found = []
    begin = teacher_cache.CachedTeacher.__init__

    def counted(self, *args):
        begin(self, *args)
        found.append(self)

    monkeypatch.setattr(teacher_cache.CachedTeacher, "__init__", counted)
    return found


def test_the_same_training_without_a_teacher(teacher, tmp_path, passes, capsys):
    """A filled cache gives what was computed when it was filled, and no pass is needed."""
    cache = "--teacher_cache", tmp_path / "cache"
    train_kd.main(command("dkd", teacher, tmp_path, "plain"))
    train_kd.main(command("dkd", teacher, tmp_path, "filling", *cache))
    capsys.readouterr()
    train_kd.main(command("dkd", teacher, tmp_path, "filled", *cache))
    assert [x.passes for x in passes] == [22, 0]
    # 1297 images, 162 views, 10 classes in float32 or bfloat16; 2 epochs
    assert "1.2 % of the views are filled" in capsys.readouterr().out
    assert_same(result(tmp_path / "filling"), result(tmp_path / "filled"))
    plain, cached = (read_metrics(tmp_path / x) for x in ("plain", "filled"))
    assert plain[0] == cached[0]  # nothing was there: whole batches
    assert plain[1]["kd"] == pytest.approx(cached[1]["kd"], rel=1e-3)


@pytest.mark.slow
def test_several_students_and_pooled_features(teacher, tmp_path, passes):
    """Some read logits, some pooled features, one needs maps and has a pass of its own."""
    argv = command("none,st,rkd,at", teacher, tmp_path, "x", "--teacher_cache", tmp_path / "cache")
    train_kd.main(argv)
    train_kd.main([*argv[:-3], "y", *argv[-2:]])
    assert [x.passes for x in passes] == [22, 0]
    for student in ("none", "st", "rkd", "at"):
        assert_same(result(tmp_path / f"{student}-x"), result(tmp_path / f"{student}-y"))
    train_kd.main(command("at", teacher, tmp_path, "alone"))
    one, other = result(tmp_path / "at-x"), result(tmp_path / "alone")
    assert one[1].pop("flags")["teacher_cache"] and not other[1].pop("flags")["teacher_cache"]
    assert_same(one, other)


@pytest.mark.slow
def test_damaged_rows_are_computed_again(teacher, tmp_path, passes):
    cache = "--teacher_cache", tmp_path / "cache"
    train_kd.main(command("st", teacher, tmp_path, "a", *cache))
    (file,) = (tmp_path / "cache").glob("*.out")
    values = np.memmap(file, np.uint8, "r+")
    values[:: 10 * 1000] ^= 255
    values.flush()
    train_kd.main(command("st", teacher, tmp_path, "b", *cache))
    assert 0 < passes[1].passes <= 22
    one, two = (read_metrics(tmp_path / x)[-1]["kd"] for x in "ab")
    assert one == pytest.approx(two, rel=1e-3)


@pytest.mark.slow
def test_two_processes_fill_one_cache(teacher, tmp_path):
    code = [sys.executable, "train_kd.py"]
    more = "--teacher_cache", tmp_path / "cache", "--seed"
    runs = [command("st", teacher, tmp_path, f"p{seed}", *more, seed) for seed in (1, 2)]
    processes = [subprocess.Popen([*code, *argv], cwd=ROOT) for argv in runs]
    assert [x.wait() for x in processes] == [0, 0]
    for argv in runs:
        train_kd.main(
            [*argv[: argv.index("--note") + 1], "again", *argv[argv.index("--note") + 2 :]]
        )
        first = tmp_path / argv[argv.index("--note") + 1]
        assert_same(result(first), result(tmp_path / "again"))
        shutil.rmtree(tmp_path / "again")


@pytest.mark.slow
def test_killed_while_filling(teacher, tmp_path):
    argv = command("st", teacher, tmp_path, "a", "--teacher_cache", tmp_path / "cache")
    code = (
        "import os, signal, sys, train_kd\n"
        "from engine.teacher_cache import TeacherCache as C\n"
        "write, left = C.write, [8]\n"
        "def counted(*a):\n"
        "    left[0] -= 1\n"
        "    left[0] or os.kill(os.getpid(), signal.SIGKILL)\n"
        "    write(*a)\n"
        "C.write = counted\n"
        "train_kd.main(sys.argv[1:])\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *argv], cwd=ROOT, capture_output=True)
    assert done.returncode == -signal.SIGKILL
    train_kd.main([*argv, "--resume"])
    train_kd.main(command("st", teacher, tmp_path, "b", "--teacher_cache", tmp_path / "cache"))
    assert_same(result(tmp_path / "a"), result(tmp_path / "b"))


@pytest.mark.parametrize("mode", ["at", "dml", "mlkd", "sobolev", "at,fitnet"])
def test_what_cannot_be_cached_is_refused(mode, teacher, tmp_path, capsys):
    with ends(capsys, "--teacher_cache", mode.split(",")[0]):
        train_kd.main(
            command(mode, teacher, tmp_path / "x", "a", "--teacher_cache", tmp_path / "c")
        )
    assert not (tmp_path / "x").exists() and not (tmp_path / "c").exists()


def test_no_room(teacher, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with ends(capsys, "--teacher_cache", "MB"):
        train_kd.main(
            command("st", teacher, tmp_path / "x", "a", "--teacher_cache", tmp_path / "c")
        )
    assert not (tmp_path / "x").exists() and not list((tmp_path / "c").iterdir())


def test_a_file_in_its_place(teacher, tmp_path, capsys):
    (tmp_path / "c").touch()
    with ends(capsys, "--teacher_cache"):
        train_kd.main(
            command("st", teacher, tmp_path / "x", "a", "--teacher_cache", tmp_path / "c")
        )


def test_the_views_are_those_of_the_batches():
    """Two images with the same index and view are the same pixels, in any epoch."""
    pixels = torch.randint(0, 256, (5, 8, 8, 3), dtype=torch.uint8)
    images = dataset.Images(pixels, torch.arange(5), list("abcde"), (0.5,) * 3, (0.25,) * 3)
    seen = {}
    for padding in ("reflect", "zero"):
        for epoch in range(1, 200):
            views = teacher_cache.train_views(images, 2, 3, epoch)
            batches = stream.train_batches(images, 2, 3, epoch, padding=padding)
            for (index, view), (img, _, place) in zip(views, batches, strict=True):
                assert index.tolist() == place.tolist() and view.max() < teacher_cache.view_count()
                for i, v, x in zip(index, view, img):
                    before = seen.setdefault((padding, i, v), x)
                    assert torch.equal(before, x)
    assert len(seen) > 500


def test_checksums_differ():
    rows = np.random.default_rng(0).integers(0, 256, (1000, 20), dtype=np.uint8)
    rows[1] = 0
    sums = teacher_cache._checksums(rows)
    assert sums.min() > 0 and len(set(sums.tolist())) == 1000
    for bit in range(160):
        changed = rows[:1].copy()
        changed[0, bit // 8] ^= 1 << bit % 8
        assert teacher_cache._checksums(changed) != sums[0]
    assert teacher_cache._checksums(rows[:, ::-1].copy()[:1]) != sums[0]
