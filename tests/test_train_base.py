import json
import sys
from pathlib import Path

import pytest
import torch
from messages import ends

import network
import train_base
import utils
from engine import stream
from engine import cli
from engine.checkpoint import read_checkpoint
from engine.run import Run, read_metrics

SMALL = ["--net_name", "resnet8", "--data_name", "digits", "--img_size", "12", "--cuda", "0"]


def run(tmp_path, *argv, note="r"):
    return train_base.main([*SMALL, "--save_root", str(tmp_path), "--note", note, *argv])


def test_a_run_and_its_folder(tmp_path, capsys):
    result = run(tmp_path, "--epochs", "2", "--print_freq", "4")
    out = capsys.readouterr().out
    assert "epoch 1 step    4" in out and "chosen on the test set" in out
    folder = Path(result["dir"])
    assert {p.name for p in folder.iterdir()} == {
        ".lock",
        "args.json",
        "log.txt",
        "metrics.csv",
        "timing.csv",
        "curves.png",
        "result.json",
        "checkpoint.pth.tar",
        "model_best.pth.tar",
        "initial_r8.pth.tar",
    }
    assert out.strip() == (folder / "log.txt").read_text().strip()
    args = json.loads((folder / "args.json").read_text())
    assert args["recipe"]["lr"] == 0.1 and args["command"].startswith("train_base.py --net_name")
    written = json.loads((folder / "result.json").read_text())
    assert written == {key: result[key] for key in ("last", "best", "seconds")}
    rows = read_metrics(folder)
    assert [row["epoch"] for row in rows] == [1, 2] and rows[0]["ce"] > rows[1]["ce"]

    initial, last = (
        read_checkpoint(folder / f"{name}.pth.tar") for name in ("initial_r8", "checkpoint")
    )
    assert {"net", "epoch", "prec@1", "prec@5", "meta"} <= set(initial) & set(last)
    torch.manual_seed(2)
    fresh = network.build("resnet8", 10).state_dict()
    torch.testing.assert_close(initial["net"], dict(fresh), rtol=0, atol=0)
    # what the checkpoint holds is what was evaluated
    net = network.build("resnet8", 10)
    net.load_state_dict(last["net"])
    precision = utils.precision(torch.device("cpu"))
    net.to(memory_format=torch.channels_last)
    images = cli.load_data(cli.resolve(train_base.parse(SMALL), "resnet8", {})).test
    score = utils.evaluate(net, stream.test_batches(images), precision)["test_top1"]
    assert score == pytest.approx(last["prec@1"]) == pytest.approx(result["last"])


@pytest.mark.slow
def test_resumed_is_the_same_run(tmp_path, monkeypatch):
    """Stopped after an epoch and gone on with: byte for byte the same metrics and weights."""
    whole = run(tmp_path, "--epochs", "3", note="whole")
    saved = Run.epoch

    def stop(self, *args, **kwargs):
        saved(self, *args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "epoch", stop)
    with pytest.raises(SystemExit) as end:
        run(tmp_path, "--epochs", "3", note="parts")
    assert end.value.code == 130
    monkeypatch.setattr(Run, "epoch", saved)
    parts = run(tmp_path, "--epochs", "3", "--resume", note="parts")
    one, two = (Path(result["dir"]) for result in (whole, parts))
    assert (one / "metrics.csv").read_bytes() == (two / "metrics.csv").read_bytes()
    nets = [read_checkpoint(p / "checkpoint.pth.tar")["net"] for p in (one, two)]
    torch.testing.assert_close(*nets, rtol=0, atol=0)


def test_a_run_is_never_written_over(tmp_path, capsys):
    folder = tmp_path / "r"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    with ends(capsys, folder):
        run(tmp_path, "--epochs", "1")
    assert [p.name for p in folder.iterdir()] == ["notes.txt"]


def test_a_dry_run_says_the_recipe_and_writes_nothing(tmp_path, capsys):
    assert run(tmp_path / "runs", "--epochs", "20", "--protocol", "crd", "--dry_run") is None
    out = capsys.readouterr().out
    assert "lr 0.05, falls after (12, 15, 18), momentum 0.9, weight decay 0.0005" in out
    assert "nothing trained, nothing written" in out and not (tmp_path / "runs").exists()


def test_events_for_tensorboard(tmp_path, monkeypatch):
    """What TensorBoard reads is metrics.csv, also after an interruption."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    saved = Run.epoch

    def interrupted(self, row, *args):
        saved(self, row, *args)
        if row["epoch"] == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Run, "epoch", interrupted)
    with pytest.raises(SystemExit):
        run(tmp_path, "--epochs", "2", "--tensorboard")
    monkeypatch.setattr(Run, "epoch", saved)
    folder = run(tmp_path, "--epochs", "2", "--tensorboard", "--resume")["dir"]
    reader = events.EventAccumulator(folder)
    reader.Reload()
    rows = read_metrics(folder)
    assert {"ce", "train_top1", "test_loss", "test_top1", "lr"} <= set(reader.Tags()["scalars"])
    for name in reader.Tags()["scalars"]:
        found = [(event.step, event.value) for event in reader.Scalars(name)]
        wanted = [(i, pytest.approx(row[name], rel=1e-3)) for i, row in enumerate(rows, 1)]
        assert found == wanted


def test_tensorboard_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with ends(capsys, "pip install tensorboard"):
        run(tmp_path / "runs", "--tensorboard")
    assert not (tmp_path / "runs").exists()
