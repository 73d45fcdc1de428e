"""Several students in one process end with the bytes that each has alone."""

import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import toys
from messages import ends
from test_interruption import KILLED, SMALL, assert_same, result, stop_at

import network
import train_base
import train_kd
from engine.checkpoint import read_checkpoint
from engine.kd_cli import command_lines

ROOT = Path(__file__).parent.parent
# one of every kind: no method, logits, maps, two phases, memory banks, own layers, random masks,
# a second view, a ramp, another network to deploy, a teacher in training mode, one with gradients,
# one that is trained, an attack, whole batches, a precomputation, two terms
EVERY = (
    "none,st,at,ft,fsp,crd,vid,mgd,mlkd,crld,dkd,reviewkd,simkd,ofd,sobolev,dml,bss,semckd,wkd_l,"
    "st+at"
)
FEW = "none,at,crd,fsp,mlkd"


def flags(students):
    """crd's flags for a small one, where crd is among the students."""
    return [
        x
        for student in students.split(",")
        for flag, value in zip(*[iter(toys.small_flags(student))] * 2)
        for x in (f"--{student}.{flag[2:]}", value)
    ]


def command(students, teacher, root, *more):
    argv = ["--kd_mode", students, *flags(students), "--t_model", teacher, "--s_name", "resnet8"]
    argv += [*SMALL, "--epochs", "2", "--save_root", str(root), "--note", "r", *more]
    return [str(x) for x in argv]


def alone(argv, student, root):
    """The run of a student by its own command line."""
    own = command_lines(argv)[student]
    own[own.index("--save_root") + 1] = str(root)
    train_kd.main([x for x in own if x != "--resume"])
    return root / f"{student}-r"


def assert_as_alone(students, argv, root, tmp_path):
    for student in students.split(","):
        folder = alone(argv, student, tmp_path / "alone")
        assert_same(result(folder), result(root / f"{student}-r"))


@pytest.mark.parametrize(
    "students, more",
    [
        ("none,crd", []),
        pytest.param("none,at,crd", [], marks=pytest.mark.slow),
        pytest.param(EVERY, [], marks=pytest.mark.slow),
        pytest.param(FEW, ["--accumulate", "3"], marks=pytest.mark.slow),
        pytest.param("st,at,mgd", ["--on_nan", "skip", "--amp", "off"], marks=pytest.mark.slow),
        pytest.param("st,dkd", ["--dkd.beta", "3", "--protocol", "crd"], marks=pytest.mark.slow),
        pytest.param("st,dkd", ["--logit_stand"], marks=pytest.mark.slow),
    ],
)
def test_as_alone(students, more, teacher, tmp_path):
    argv = command(students, teacher, tmp_path / "group", *more)
    train_kd.main(argv)
    assert_as_alone(students, argv, tmp_path / "group", tmp_path)


@pytest.mark.slow
def test_the_baseline_is_train_base(teacher, tmp_path):
    train_kd.main(command("none,st", teacher, tmp_path))
    argv = [*SMALL, "--net_name", "resnet8", "--epochs", "2", "--save_root", tmp_path]
    train_base.main([str(x) for x in [*argv, "--note", "base"]])
    ours, theirs = (
        read_checkpoint(tmp_path / name / "checkpoint.pth.tar") for name in ("none-r", "base")
    )
    assert_same((b"", ours["snet"]), (b"", theirs["net"]))
    assert_same((b"", ours["optimizer"]), (b"", theirs["optimizer"]))


@pytest.mark.slow
@pytest.mark.parametrize("students", ["none,mgd", EVERY])
def test_stopped_and_resumed(students, teacher, tmp_path, monkeypatch, capsys):
    """A signal inside the second epoch stops all of them, --resume ends as if undisturbed."""
    argv = command(students, teacher, tmp_path / "group")
    count = len(students.split(","))
    with monkeypatch.context() as patch:
        stop_at(patch, 14 * count, signal.SIGTERM)
        with pytest.raises(SystemExit) as stop:
            train_kd.main(argv)
    assert stop.value.code == 128 + signal.SIGTERM
    assert "--resume" in capsys.readouterr().err
    stopped = [read_checkpoint(x) for x in (tmp_path / "group").glob("*/checkpoint.pth.tar")]
    assert len(stopped) == count
    train_kd.main([*argv, "--resume"])
    assert_as_alone(students, argv, tmp_path / "group", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kills", [1, 4])
def test_killed_and_resumed(kills, teacher, tmp_path):
    argv = [*command(FEW, teacher, tmp_path / "group"), "--save_every", "0"]
    rng, begun = random.Random(kills), []
    for i in range(kills):
        code = [sys.executable, "-c", KILLED, str(rng.randint(5, 100)), *argv, *begun]
        done = subprocess.run(code, cwd=ROOT, capture_output=True, text=True)
        if done.returncode == 0:
            break  # it was faster
        assert done.returncode == -signal.SIGKILL, done.stderr
        begun = ["--resume"]
    train_kd.main([*argv, *begun])
    assert_as_alone(FEW, argv, tmp_path / "group", tmp_path)


@pytest.mark.slow
def test_one_that_fails_leaves_the_others(teacher, tmp_path, capsys):
    argv = command("st,at,dkd", teacher, tmp_path / "group", "--at.lambda_kd", "1e30")
    with ends(capsys, "at"):
        train_kd.main(argv)
    assert "is not finite" in (tmp_path / "group" / "at-r" / "log.txt").read_text()
    for student in ("st", "dkd"):
        folder = alone(argv, student, tmp_path / "alone")
        assert_same(result(folder), result(tmp_path / "group" / f"{student}-r"))


def test_one_pass_of_the_teacher(teacher, tmp_path, monkeypatch):
    """Of every batch, whatever the number of students; and the network is there once."""
    passes, nets = [], set()
    call = network.Tapped.__call__

    def counted(self, img):
        if sum(p.requires_grad for p in self.net.parameters()) == 0 and len(img) > 2:
            passes.append(img.shape)
            nets.add(id(self.net))
        return call(self, img)

    monkeypatch.setattr(network.Tapped, "__call__", counted)
    argv = command("st,at,dkd,none", teacher, tmp_path)
    train_kd.main([*argv, "--epochs", "1"])
    assert len(passes) == 11 and len(nets) == 1  # 1297 images in batches of 128


def test_a_dry_run_shows_every_student(teacher, tmp_path, capsys):
    train_kd.main([*command("none,st", teacher, tmp_path / "x"), "--dry_run"])
    out = capsys.readouterr().out
    assert "none: phases: train 2 epoch(s)" in out and "st: st: lambda_kd" in out
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_the_baseline_sees_what_the_others_see(tmp_path, capsys):
    """Also where the teacher's checkpoint alone says what that is; else it is refused."""
    own = ["--mean_std", "0.2,0.2,0.2,0.4,0.4,0.4", "--epochs", "1", "--save_root", str(tmp_path)]
    t = train_base.main([*SMALL, *own, "--net_name", "resnet14", "--note", "t"])["dir"]
    files = ["--t_model", f"{t}/model_best.pth.tar", "--s_name", "resnet8", "--epochs", "1"]
    files += ["--save_root", str(tmp_path), "--cuda", "0"]
    train_kd.main(["--kd_mode", "none,st", *files, "--note", "a"])
    alone = [*SMALL, *own, "--kd_mode", "none", "--s_name", "resnet8", "--note", "none-b"]
    train_kd.main(alone)
    one, other = (result(tmp_path / f"none-{x}") for x in "ab")
    assert one[0] == other[0]
    with ends(capsys, "--mean_std", "none", "st"):
        train_kd.main(["--kd_mode", "none,st", *files, "--note", "c", *SMALL])


def test_command_lines():
    argv = "--kd_mode=at,st+dkd,none --lr 0.1 --at.p=1 --st+dkd.dkd.beta 6 --note x --t_model t"
    assert command_lines(argv.split()) == {
        "at": "--kd_mode=at --lr 0.1 --p=1 --note at-x --t_model t".split(),
        "st+dkd": "--kd_mode=st+dkd --lr 0.1 --dkd.beta 6 --note st+dkd-x --t_model t".split(),
        "none": "--kd_mode=none --lr 0.1 --note none-x".split(),
    }


def test_different_batch_sizes_are_refused(teacher, tmp_path, capsys):
    argv = command("st,wkd_l", teacher, tmp_path / "x", "--protocol", "mdistiller-imagenet")
    with ends(capsys, "st", "wkd_l", "--batch_size"):
        train_kd.main(argv)
    assert not (tmp_path / "x").exists()
