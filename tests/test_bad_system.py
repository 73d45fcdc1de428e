"""Too little memory, a full disk, limits, pipes that nobody reads, names of any bytes."""

import errno
import os
import resource
import subprocess
import sys

import pytest
import torch
from mistakes import DIGITS, META, ROOT, is_line, missing, pictures

import network
import train_base
from engine import cli
from engine.checkpoint import read_checkpoint
from engine.run import read_metrics

pytestmark = pytest.mark.slow

# --- what the machine refuses ---------------------------------------------------------------------


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
    assert stop.value.code == 2 and is_line(err) and missing(["--batch_size"], err) == [], err


@pytest.mark.parametrize(
    "error, name",
    [
        (RuntimeError("can't start new thread"), "can't start new thread"),
        (
            OSError(errno.EAGAIN, "Resource temporarily unavailable"),
            "Resource temporarily unavailable",
        ),
        (OSError(errno.EMFILE, "Too many open files"), "Too many open files"),
        (OSError(errno.ENOSPC, "No space left on device", "/x\033[31m"), "/x\\x1b[31m"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), "/x"),
    ],
    ids=["threads", "processes", "files", "space", "permission"],
)
def test_what_the_system_refuses(monkeypatch, capsys, error, name):
    def fail(*args):
        raise error

    monkeypatch.setattr(cli, "load_data", fail)
    with pytest.raises(SystemExit) as stop:
        train_base.main(["--net_name", "resnet8", "--data_name", "digits"])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and is_line(err) and missing([name], err) == [], err


def test_a_defect_keeps_its_traceback(monkeypatch):
    """Or what ends in a line would hide what is wrong with the program."""
    for error in (ValueError("x"), OSError("x"), RuntimeError("connection closed"), SystemExit(3)):

        def fail(*args):
            raise error

        monkeypatch.setattr(cli, "load_data", fail)
        with pytest.raises(type(error)) as stop:
            train_base.main(["--net_name", "resnet8", "--data_name", "digits"])
        assert stop.value is error


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
        assert stop.value.code == 2 and is_line(err), err
        assert str(folder / file) in err
        assert not [*folder.glob("*.tmp")]


# --- where it is printed --------------------------------------------------------------------------

SHORT = [*DIGITS.split(), "--cuda", "0", "--epochs", "2", "--batch_size", "1297"]


def trained(folder):
    """Whether a run went to its end."""
    return (folder / "result.json").exists() and len(read_metrics(folder)) == 2


@pytest.mark.parametrize(
    "where", ["pipe", pytest.param("both pipes", marks=pytest.mark.slow), "full"]
)
def test_a_training_whose_lines_nobody_reads(where, tmp_path):
    argv = ["--net_name", "resnet8", *SHORT, "--save_root", str(tmp_path), "--note", "r"]
    command = [sys.executable, str(ROOT / "train_base.py"), *argv]
    if where == "full":
        with open("/dev/full", "w") as full:
            done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
        assert done.returncode == 0 and done.stderr.startswith("warning: ")
        assert done.stderr.count("\n") == 1 and "No space left" in done.stderr
    else:
        err = subprocess.STDOUT if where == "both pipes" else subprocess.PIPE
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=err) as process:
            process.stdout.readline()
            process.stdout.close()
            said = process.stderr.read() if process.stderr else b""
            assert process.wait() == 0 and said == b""
    assert trained(tmp_path / "r")
    last = read_metrics(tmp_path / "r")[-1]
    assert f"{last['test_top1']:.2f}" in (tmp_path / "r" / "log.txt").read_text()


def test_a_result_that_nobody_reads_or_that_cannot_be_written(tmp_path):
    torch.save(dict(net=network.build("resnet8", 10).state_dict(), meta=META), tmp_path / "x.pth")
    command = [sys.executable, str(ROOT / "tools/eval.py"), str(tmp_path / "x.pth"), "--cuda", "0"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and is_line(done.stderr)
    assert missing(["standard output"], done.stderr) == []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""


@pytest.mark.parametrize("encoding", [pytest.param("utf-8", marks=pytest.mark.slow), "ascii"])
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
