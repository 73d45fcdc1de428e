"""CSV, TensorBoard and W&B at the same time: what they are told, also after an interruption."""

import json
import os
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import DIGITS, ROOT

import train_base
import train_kd
from engine import loggers
from engine.run import Run, read_metrics

SHORT = [*DIGITS, "--epochs", "2", "--batch_size", "1297"]


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """W&B, which only writes files."""
    wandb = pytest.importorskip("wandb", reason="wandb is not installed: pip install wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return wandb


def train(root: Path, *argv: str) -> Path:
    flags = ["--net_name", "resnet8", *SHORT, "--save_root", str(root), "--note", "r"]
    return Path(train_base.main([*flags, *argv])["dir"])


def stop_after(monkeypatch, epoch: int) -> None:
    """A training is interrupted after an epoch, once."""
    saved = Run.epoch

    def interrupted(self, row, *args, **more):
        saved(self, row, *args, **more)
        if len(self.history) == epoch:
            monkeypatch.setattr(Run, "epoch", saved)
            raise KeyboardInterrupt

    monkeypatch.setattr(Run, "epoch", interrupted)


def read_back(folder: Path) -> list[dict]:
    """What each offline run below a folder holds: id, project, config, rows by step, summary."""
    end = time.monotonic() + 60
    while True:  # W&B's own process writes the last of it
        found = _read(folder)
        if found and all("exit" in parts for parts in found) or time.monotonic() > end:
            return found
        time.sleep(0.1)


def _read(folder: Path) -> list[dict]:
    from wandb.proto import wandb_internal_pb2

    found = []
    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        parts = dict(config={}, rows={}, summary={})
        for data in _records(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            kind = record.WhichOneof("record_type")
            if kind == "run":
                parts |= dict(id=record.run.run_id, project=record.run.project)
                parts["config"] |= _values(record.run.config.update)
            elif kind == "history":
                values = _values(record.history.item)
                step = record.history.step.num or values["_step"]
                parts["rows"].setdefault(step, {}).update(values)
            elif kind == "summary":
                parts["summary"] |= _values(record.summary.update)
            elif kind == "exit":
                parts["exit"] = record.exit.exit_code
        found.append(parts)
    return found


def _records(data: bytes):
    """Yield the records of W&B's file: a header of 7 bytes, then LevelDB's log format, blocks of 32
    KB with pieces of (checksum, length, kind); kind: 1 whole, 2 first, 3 middle, 4 last."""
    at, whole = 7, b""
    while at + 7 <= len(data):
        if at % 32768 > 32768 - 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        if kind == 0:
            return
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield whole
            whole = b""


def _values(items) -> dict:
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


def test_wandb_is_told_config_metrics_and_curves(offline, tmp_path):
    folder = train(tmp_path, "--wandb", "zoo", "--lr", "0.025")
    (run,) = read_back(folder)
    args = json.loads((folder / "args.json").read_text())
    assert (run["project"], run["exit"]) == ("zoo", 0)
    assert run["id"] == json.loads((folder / "wandb.json").read_text())["id"]
    config = {key: value for key, value in run["config"].items() if key != "_wandb"}
    assert config == args["recipe"] | {k: v for k, v in args.items() if k != "recipe"}
    assert config["lr"] == 0.025 and config["milestones"] and config["meta"]["num_class"] == 10
    rows = read_metrics(folder)
    for n, row in enumerate(rows, 1):
        assert {key: run["rows"][n][key] for key in row} == row
        assert run["rows"][n]["seconds"] > 0
    assert any(key.startswith("curves") for row in run["rows"].values() for key in row), run["rows"]
    assert run["summary"]["best"] == max(row["test_top1"] for row in rows)
    (image,) = folder.glob("wandb/offline-run-*/files/media/images/curves*.png")
    assert image.read_bytes() == (folder / "curves.png").read_bytes()


def test_wandb_changes_no_number(offline, tmp_path):
    one, two = train(tmp_path / "a", "--wandb", "zoo"), train(tmp_path / "b")
    assert (one / "metrics.csv").read_bytes() == (two / "metrics.csv").read_bytes()


def test_resume_continues_the_same_wandb_run(offline, tmp_path, monkeypatch, capsys):
    stop_after(monkeypatch, 1)
    with pytest.raises(SystemExit):
        train(tmp_path, "--wandb", "zoo")
    folder = train(tmp_path, "--wandb", "zoo", "--resume")
    runs = read_back(folder)
    assert {run["id"] for run in runs} == {json.loads((folder / "wandb.json").read_text())["id"]}
    assert [run["exit"] for run in runs] == [1, 0] or len(runs) == 1  # one: in the same second
    rows = read_metrics(folder)
    told = {step: row for run in runs for step, row in run["rows"].items()}
    if len(runs) == 2:
        assert [told[n]["test_top1"] for n in (1, 2)] == [row["test_top1"] for row in rows]
    assert "offline: wandb sync" in capsys.readouterr().out


def test_a_run_that_had_no_wandb_sends_its_first_epochs_too(offline, tmp_path, monkeypatch):
    stop_after(monkeypatch, 1)
    with pytest.raises(SystemExit):
        train(tmp_path)
    folder = train(tmp_path, "--wandb", "zoo", "--resume")
    (run,) = read_back(folder)
    for n, row in enumerate(read_metrics(folder), 1):
        assert run["rows"][n]["test_top1"] == row["test_top1"]
    assert run["config"]["net_name"] == "resnet8"


@pytest.mark.slow
def test_students_of_one_process_have_a_run_each(offline, teacher, tmp_path):
    argv = ["--kd_mode", "none,st", "--t_model", teacher, "--s_name", "resnet8", "--note", "x"]
    train_kd.main([*argv, *SHORT, "--save_root", str(tmp_path), "--wandb", "zoo"])
    runs = [read_back(tmp_path / f"{name}-x") for name in ("none", "st")]
    assert [len(found) for found in runs] == [1, 1] and runs[0][0]["id"] != runs[1][0]["id"]
    config = runs[1][0]["config"]
    assert config["kd_mode"] == "st" and config["methods"]["st"]["T"] == 4.0
    for (run,), name in zip(runs, ("none", "st")):
        last = read_metrics(tmp_path / f"{name}-x")[-1]
        assert run["rows"][2]["test_top1"] == last["test_top1"]


@pytest.mark.slow
def test_nobody_is_logged_in(offline, tmp_path):
    flags = ["--net_name", "resnet8", *SHORT, "--save_root", str(tmp_path / "runs")]
    command = [sys.executable, str(ROOT / "train_base.py"), *flags, "--wandb", "zoo"]
    env = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    env["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(
        command, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 2 and "error: --wandb: not logged in" in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_signal_leaves_the_wandb_run_whole(offline, tmp_path):
    """Ctrl-C reaches W&B's own process, too."""
    code = (
        "import os, signal, sys; sys.path.insert(0, sys.argv.pop(1))\n"
        "import train_base; from engine.run import Run; due = Run.due\n"
        "def once(self):\n"
        "    if len(self.history) == 1: os.killpg(0, signal.SIGINT)\n"
        "    return due(self)\n"
        "Run.due = once; train_base.main()\n"
    )
    flags = ["--net_name", "resnet8", *SHORT, "--epochs", "3", "--save_root", str(tmp_path)]
    command = [sys.executable, "-c", code, str(ROOT), *flags, "--note", "r", "--wandb", "zoo"]
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path))
    done = subprocess.run(command, env=env, start_new_session=True, capture_output=True, text=True)
    assert done.returncode == 130 and "continue with --resume" in done.stderr, done.stderr
    (run,) = read_back(tmp_path / "r")
    assert (
        run["exit"] == 1
        and run["rows"][1]["test_top1"] == read_metrics(tmp_path / "r")[0]["test_top1"]
    )


def test_wandb_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SystemExit) as stop:
        train(tmp_path / "runs", "--wandb", "zoo")
    assert stop.value.code == 2 and "pip install wandb" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


class Fails:
    """A run of W&B that does not work."""

    offline = disabled = False

    def log(self, *args, **more):
        raise BrokenPipeError("the service has ended\nsecond line")


def test_a_training_does_not_end_because_wandb_fails(tmp_path, capsys):
    logger = loggers.WandB(tmp_path, "zoo")
    logger.run = Fails()
    logger.epoch([dict(ce=1.0)], [dict(row=1, seconds=2.0)])
    logger.epoch([dict(ce=1.0)], [dict(row=1, seconds=2.0)])
    logger.close()
    out = capsys.readouterr().out
    assert out.count("warning: W&B: the service has ended") == 1


def test_a_damaged_id_is_replaced(tmp_path):
    for text in ("", "[1]", '{"id": 3, "project": "zoo"}', '{"id": "../x", "project": "zoo"}'):
        (tmp_path / "wandb.json").write_text(text)
        assert loggers._known_id(tmp_path / "wandb.json", "zoo") is None
