"""The best epoch is chosen on a validation set, and the test set is looked at once."""

import json
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from messages import ends
from pictures import folder
from PIL import Image
from test_interruption import KILLED, ROOT, SMALL, assert_same, result, stop_at

import train_base
import train_kd
import utils
from engine import stream
from engine.checkpoint import read_checkpoint
from engine.run import read_metrics
from engine.validation import drawn

BASE = ["--net_name", "resnet8", *SMALL, "--epochs", "3", "--val", "0.2"]


def base(root, note, *more):
    return train_base.main([*BASE, "--save_root", str(root), "--note", note, *more])


def written(folder):
    return json.loads((folder / "result.json").read_text())


def accuracy_of(path, key, net_name="resnet8", data=None):
    """The test accuracy of the weights in a checkpoint, by hand."""
    import network

    net = network.build(net_name, 10)
    net.load_state_dict(read_checkpoint(path)[key])
    data = data or stream.load("digits", img_size=12, val=0.2, seed=2)
    precision = utils.precision(torch.device("cpu"))
    return utils.evaluate(net, stream.test_batches(data.test), precision)["test_top1"]


# --- which images ---------------------------------------------------------------------------------


@pytest.mark.parametrize("amount", [1, 7, 0.1, 0.5, 30, 117])
def test_of_every_class_its_share(amount):
    labels = np.repeat([0, 1, 2, 3], [10, 20, 40, 51])
    places = drawn(labels, amount, seed=3)
    count = amount if isinstance(amount, int) else round(amount * len(labels))
    assert len(places) == len(set(places)) == count and (np.diff(places) > 0).all()
    each, exact = np.bincount(labels[places], minlength=4), count * np.bincount(labels) / 121
    assert (np.abs(each - exact) <= 1).all() or amount == 117
    assert (each < np.bincount(labels)).all(), "one of each class stays"
    assert (drawn(labels, amount, seed=3) == places).all()
    assert amount == 117 or (drawn(labels, amount, seed=4) != places).any()


def test_the_rest_is_trained_on():
    whole = stream.load("digits", img_size=12)
    data = stream.load("digits", img_size=12, val=100, seed=5)
    assert (len(data.train), len(data.val), len(data.test)) == (1197, 100, 500)
    both = torch.cat([data.train.pixels, data.val.pixels]).flatten(1).numpy()
    assert (np.sort(both, 0) == np.sort(whole.train.pixels.flatten(1).numpy(), 0)).all()
    assert data.val.mean == data.train.mean, "measured on what is trained on"
    assert whole.selection == "test" and data.selection == "val"
    other = stream.load("digits", img_size=12, val=100, seed=6).identity()
    assert set(data.identity()) == {"train", "test", "val"}
    assert data.identity()["test"] == other["test"] == whole.identity()["test"]
    assert data.identity()["train"] != other["train"] != whole.identity()["train"]


def test_streamed_images_too(tmp_path):
    folder(tmp_path, (120, 110), n=4)
    data = stream.load("imagefolder", tmp_path, None, 112, val=2)
    assert isinstance(data.val, type(data.train)) and data.val.labels.tolist() == [0, 1]
    assert set(data.val.items) | set(data.train.items) == set(
        stream.load("imagefolder", tmp_path, None, 112).train.items
    )
    assert len(list(stream.test_batches(data.val, 2))) == 1


def test_a_val_folder_beside_test(tmp_path, capsys):
    """It chooses the best epoch, and that is said."""
    folder(tmp_path, (16, 16), n=4)
    for label, name in enumerate(("cat", "dog")):
        (tmp_path / "val" / name).mkdir(parents=True)
        color = (100 * label, 0, 200)
        Image.new("RGB", (16, 16), color).save(tmp_path / "val" / name / "0.png")
    argv = ["--net_name", "resnet8", "--data_name", "imagefolder", "--img_root", str(tmp_path)]
    argv += ["--cuda", "0", "--epochs", "1", "--save_root", str(tmp_path / "runs"), "--note", "r"]
    found = train_base.main([*argv, "--batch_size", "4"])
    out = capsys.readouterr().out
    assert f"the best epoch is chosen on {tmp_path / 'val'}" in out
    assert "8 training, 2 validation and 8 test images" in out
    assert found["chosen_on"] == "val" and "val_top1" in read_metrics(tmp_path / "runs/r")[0]
    with ends(capsys, "--val", "val"):
        train_base.main([*argv, "--val", "1", "--note", "s"])
    assert not (tmp_path / "runs/s").exists()


def test_val_without_test_is_the_test_set(tmp_path):
    data = stream.load("imagefolder", folder(tmp_path, test="val"))
    assert data.val is None and len(data.test) == 6


@pytest.mark.parametrize("spoiled", ["class", "size"])
def test_a_val_folder_that_does_not_fit(tmp_path, spoiled):
    folder(tmp_path)
    name = "wolf" if spoiled == "class" else "dog"
    for each in ("cat", name):
        (tmp_path / "val" / each).mkdir(parents=True)
        side = 6 if spoiled == "class" else 7
        Image.new("RGB", (side, side)).save(tmp_path / "val" / each / "0.png")
    with pytest.raises(utils.UserError, match="wolf" if spoiled == "class" else "7"):
        stream.load("imagefolder", tmp_path)


# --- a run ----------------------------------------------------------------------------------------


def test_best_is_chosen_on_it(tmp_path, capsys):
    found = base(tmp_path, "r")
    out, rows = capsys.readouterr().out, read_metrics(tmp_path / "r")
    scores = [row["val_top1"] for row in rows]
    best = scores.index(max(scores)) + 1
    assert {"val_loss", "val_top1", "val_top5"} <= set(rows[0])
    assert not any(key.startswith("test") for row in rows for key in row)
    assert f"(row {best}, chosen on the validation set: {max(scores):.2f})" in out
    assert "chosen on the test set" not in out and "last on the test set: test_loss" in out
    files = dict(last="checkpoint.pth.tar", best="model_best.pth.tar")
    for which, name in files.items():
        assert found[which] == pytest.approx(accuracy_of(tmp_path / "r" / name, "net"), abs=1e-3)
    assert (found["val_last"], found["val_best"]) == (scores[-1], max(scores))
    assert written(tmp_path / "r") == {k: v for k, v in found.items() if k != "dir"}
    saved = read_checkpoint(tmp_path / "r" / "model_best.pth.tar")
    assert saved["epoch"] == best and saved["prec@1"] == pytest.approx(max(scores))
    identity = json.loads((tmp_path / "r" / "args.json").read_text())["sources"]["data"]
    assert identity["val"]["images"] == 259


def test_the_test_set_is_evaluated_once(tmp_path, monkeypatch):
    seen, evaluate = [], utils.evaluate

    def counted(net, batches, precision, split="test"):
        seen.append(split)
        return evaluate(net, batches, precision, split)

    monkeypatch.setattr(utils, "evaluate", counted)
    base(tmp_path, "r")
    assert seen == ["val"] * 3 + ["test"] * 2


@pytest.mark.parametrize("step", [5, 12])
def test_stopped_and_resumed(step, tmp_path, monkeypatch):
    base(tmp_path, "whole")
    with monkeypatch.context() as patch:
        stop_at(patch, step, signal.SIGTERM)
        with pytest.raises(SystemExit):
            base(tmp_path, "r")
    base(tmp_path, "r", "--resume")
    assert_same(result(tmp_path / "whole"), result(tmp_path / "r"))
    one, two = (written(tmp_path / name) for name in ("whole", "r"))
    assert one | dict(seconds=0) == two | dict(seconds=0)


def test_other_amounts_cannot_go_on(tmp_path, capsys):
    base(tmp_path, "r", "--epochs", "1")
    with ends(capsys, "--resume", "--val"):
        base(tmp_path, "r", "--epochs", "1", "--resume", "--val", "0.3")


# killed at the Nth batch of the test set
LATE = """
import os, signal, sys
import train_kd, utils
evaluate, left = utils.evaluate, int(sys.argv[1])
def late(net, batches, precision, split="test"):
    global left
    left -= split == "test"
    if left == 0: os.kill(os.getpid(), signal.SIGKILL)
    return evaluate(net, batches, precision, split)
utils.evaluate = late
train_kd.main(sys.argv[2:])
"""


def distil(mode, teacher, root, note):
    argv = ["--kd_mode", mode, "--s_name", "resnet8", *SMALL, "--epochs", "2", "--val", "200"]
    argv += ["--t_name", "resnet14"] + (["--t_model", teacher] if mode != "dml" else [])
    return [*argv, "--save_root", str(root), "--note", note]


@pytest.mark.parametrize("kill", [1, 2])
def test_killed_at_the_very_end(kill, teacher, tmp_path):
    """The test is repeated, and nothing is lost."""
    argv = distil("at", teacher, tmp_path, "r")
    code = [sys.executable, "-c", LATE, str(kill), *argv]
    done = subprocess.run(code, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "r" / "result.json").exists()
    train_kd.main([*argv, "--resume"])
    train_kd.main(distil("at", teacher, tmp_path, "whole"))
    assert_same(result(tmp_path / "whole"), result(tmp_path / "r"))
    one, two = (written(tmp_path / name) for name in ("whole", "r"))
    assert one | dict(seconds=0) == two | dict(seconds=0)
    data = stream.load("digits", img_size=12, val=200, seed=2)
    saved = read_checkpoint(tmp_path / "r" / "checkpoint.pth.tar")["meta"]
    for split in data.splits.values():
        split.mean, split.std = saved["mean"], saved["std"]
    for which, name in dict(last="checkpoint", best="model_best").items():
        path = tmp_path / "r" / f"{name}.pth.tar"
        assert two[which] == pytest.approx(accuracy_of(path, "snet", data=data), abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("kills", [7, 20])
def test_killed_anywhere(kills, teacher, tmp_path):
    argv = [*distil("crd", teacher, tmp_path, "r"), "--save_every", "0", "--nce_n", "8"]
    code = [sys.executable, "-c", KILLED, str(kills), *argv]
    done = subprocess.run(code, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    train_kd.main([*argv, "--resume"])
    train_kd.main([*distil("crd", teacher, tmp_path, "whole"), "--nce_n", "8"])
    assert_same(result(tmp_path / "whole"), result(tmp_path / "r"))


def test_several_students_as_alone(teacher, tmp_path):
    train_kd.main(distil("at,dkd", teacher, tmp_path, "r"))
    for mode in ("at", "dkd"):
        train_kd.main(distil(mode, teacher, tmp_path, mode))
        assert_same(result(tmp_path / mode), result(tmp_path / f"{mode}-r"))
        one, two = (written(tmp_path / name) for name in (mode, f"{mode}-r"))
        assert one | dict(seconds=0) == two | dict(seconds=0)


def test_the_peer_too(teacher, tmp_path):
    found = train_kd.main(distil("dml", teacher, tmp_path, "r"))
    assert {"peer_last", "peer_best", "val_last", "val_best"} <= set(found)
    for which, name in dict(last="checkpoint", best="model_best").items():
        path, data = tmp_path / "r" / f"{name}.pth.tar", stream.load("digits", img_size=12, val=200)
        saved = read_checkpoint(path)["meta"]
        data.test.mean, data.test.std = saved["mean"], saved["std"]
        score = accuracy_of(path, "net1", "resnet14", data)
        assert found[f"peer_{which}"] == pytest.approx(score, abs=1e-3)


def test_the_teacher_is_not_shown_the_test_set(teacher, tmp_path, capsys):
    train_kd.main(distil("at", teacher, tmp_path, "r"))
    out = capsys.readouterr().out
    assert "teacher val_top1" in out and "teacher test_top1" not in out
