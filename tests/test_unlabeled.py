"""Training images without labels."""

import json
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # torchrun starts this file

import toys  # noqa: E402
from messages import ends  # noqa: E402
from on_meta import Guard, batch_on, distiller_on, without_autocast  # noqa: E402
from pictures import epoch, folder  # noqa: E402
from test_interruption import SMALL, assert_same, result, stop_at  # noqa: E402
from test_needs import CPU, step  # noqa: E402
from test_ranks import torchrun  # noqa: E402

import train_kd  # noqa: E402
import utils  # noqa: E402
from engine import distributed, stream  # noqa: E402
from engine.checkpoint import read_checkpoint  # noqa: E402
from engine.run import read_metrics  # noqa: E402
from kd_losses import METHODS  # noqa: E402

FREE = [mode for mode, method in METHODS.items() if not method.reads_labels]


@pytest.fixture
def bare(tmp_path):
    """Images in folders of any depth and of many sizes, and a file that is not an image."""
    rng = np.random.default_rng(0)
    for i in range(30):
        where = tmp_path / "bare" / "/".join("ab"[: i % 3])
        where.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (*rng.integers(9, 20, 2), 3), dtype=np.uint8)
        Image.fromarray(pixels).save(where / f"{i}.png")
    (tmp_path / "bare" / "notes.txt").write_text("none")
    return tmp_path / "bare"


def distil(mode, teacher, root, *more):
    argv = ["--kd_mode", mode, "--t_model", teacher, "--s_name", "resnet8", *SMALL]
    argv += ["--epochs", "2", "--save_root", str(root), "--note", "r", *map(str, more)]
    return train_kd.main(argv)


# --- which images ---------------------------------------------------------------------------------


def test_they_follow_the_labelled_ones(bare, tmp_path):
    data = stream.load("digits", img_size=12, unlabeled=bare)
    whole = stream.load("digits", img_size=12)
    assert len(data.train) == len(whole.train) + 30 and data.train.pixels.shape[1] == 12
    assert torch.equal(data.train.labels[:-30], whole.train.labels)
    assert (data.train.labels[-30:] == -1).all() and data.train.num_class == 10
    assert torch.equal(data.test.pixels, whole.test.pixels)
    assert any("30 training images without labels" in x for x in data.notes)
    assert any("notes" in x or ".txt" in x for x in data.notes)
    before = data.identity()
    assert (
        before["train"] != whole.identity()["train"] and before["test"] == whole.identity()["test"]
    )
    bare.rename(tmp_path / "moved")
    moved = stream.load("digits", img_size=12, unlabeled=tmp_path / "moved")
    assert moved.identity() == before
    (tmp_path / "moved" / "0.png").unlink()
    assert stream.load("digits", img_size=12, unlabeled=tmp_path / "moved").identity() != before


def test_held_out_are_labelled_ones(bare):
    data = stream.load("digits", img_size=12, unlabeled=bare, val=0.1, seed=1)
    assert (data.val.labels >= 0).all() and (len(data.train), len(data.val)) == (1197, 130)


def test_streamed(bare, tmp_path):
    root = folder(tmp_path / "img", (120, 110))
    data = stream.load("imagefolder", root, None, 112, unlabeled=bare)
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1] + [-1] * 30
    found = torch.cat([target for _, target, _ in epoch(data.train, 8)])
    assert (found == -1).sum() == 30


@pytest.mark.parametrize("img_size", [8, 112])
def test_no_labels_at_all(img_size, bare, tmp_path):
    root = folder(tmp_path / "img", (img_size + 8, img_size))
    for path in (root / "train").rglob("*.png"):
        path.unlink()
    for path in (root / "train").iterdir():
        path.rmdir()
    (root / "train").rmdir()
    data = stream.load("imagefolder", root, None, img_size, unlabeled=bare)
    assert len(data.train) == 30 and (data.train.labels == -1).all()
    assert data.train.classes == ["cat", "dog"] and len(data.test) == 6
    assert len(epoch(data.train, 8)) == 4


# --- the loss -------------------------------------------------------------------------------------


def some_labelled(mode="st", none=False):
    """A distiller of images of which some have no labels, and a batch of them."""
    images = toys.images()
    images.labels[1::2] = -1
    distiller, batch = toys.distiller(mode, train=images), toys.batch(dtype=torch.float32)
    batch.target[:] = -1 if none else torch.tensor([2, -1, -1, 0, 1, 4, -1, 3])
    return distiller, batch


@pytest.mark.parametrize("parts", [1, 3])
def test_the_cross_entropy_is_of_the_labelled_images(parts):
    distiller, batch = some_labelled()
    with torch.no_grad():
        out = distiller.student.net.eval()(batch.img)
    kept = batch.target >= 0
    expected = F.cross_entropy(out[kept], batch.target[kept])
    weights, phase = toys.weights(distiller, 0.0), distiller.phases[0]
    optimizer = torch.optim.SGD(distiller.param_groups(phase), lr=0.0)
    whole = distiller.batch(**batch.tensors())
    terms = train_kd.train_step(distiller, phase, optimizer, whole, weights, CPU, parts)
    grad = distiller.student.net.fc.weight.grad.clone()
    meter = utils.Meter()
    meter.add(terms, len(batch.img))
    now = train_kd.of_the_labelled(meter.read())
    assert set(now) == {"ce", "train_top1"}
    assert now["ce"] == pytest.approx(expected.item(), rel=1e-5)
    right = utils.top1(out[kept], batch.target[kept]).item()
    assert now["train_top1"] == pytest.approx(right, rel=1e-5)
    net = distiller.student.net
    net.zero_grad()
    F.cross_entropy(net(batch.img[kept]), batch.target[kept]).backward()
    torch.testing.assert_close(grad, distiller.lambda_ce * net.fc.weight.grad)


def test_a_batch_without_labels_is_finite():
    distiller, batch = some_labelled(none=True)
    terms = step(distiller, batch, weight=0.0)
    assert terms["ce"] == terms["train_top1"] == terms["labelled"] == 0
    assert not distiller.student.net.fc.weight.grad.any()
    assert train_kd.of_the_labelled({k: float(v) for k, v in terms.items()}) == {}


def test_means_over_batches_of_unequal_shares():
    """Each labelled image counts the same, in whichever batch it is."""
    distiller, batch = some_labelled()
    one, two = (
        distiller.batch(*(x[part] for x in (batch.img, batch.target, batch.index)))
        for part in (slice(0, 3), slice(3, 8))
    )
    meter = utils.Meter()
    weights, phase = toys.weights(distiller, 0.0), distiller.phases[0]
    optimizer = torch.optim.SGD(distiller.param_groups(phase), lr=0.0)
    for part in (one, two):
        terms = train_kd.train_step(distiller, phase, optimizer, part, weights, CPU)
        meter.add(terms, len(part.img))
    with torch.no_grad():
        out, kept = distiller.student.net.eval()(batch.img), batch.target >= 0
    expected = F.cross_entropy(out[kept], batch.target[kept]).item()
    assert train_kd.of_the_labelled(meter.read())["ce"] == pytest.approx(expected, rel=1e-5)


def test_labelled_images_alone_cost_nothing():
    distiller = toys.distiller("st")
    batch = distiller.batch(*(getattr(toys.batch(), x) for x in ("img", "target", "index")))
    assert batch.labelled is None and "labelled" not in step(
        toys.distiller("st"), toys.batch(dtype=torch.float32)
    )


@pytest.mark.parametrize("mode", FREE)
def test_no_method_reads_what_it_says_it_does_not(mode):
    distiller = toys.distiller(mode)
    batch = toys.batch(dtype=torch.float32, strong=distiller.two_views)
    found = []
    for target in (batch.target, torch.full_like(batch.target, -1)):
        batch.target = target
        torch.manual_seed(1)
        for name, criterion in distiller.criteria.items():
            with torch.no_grad():
                s, t = batch.features(distiller.student), batch.features(distiller.teacher)
                found.append(criterion.eval()(s, t, batch))
    half = len(found) // 2
    assert all(map(torch.equal, found[:half], found[half:])) and torch.stack(found).isfinite().all()


def test_a_step_stays_on_the_device(monkeypatch):
    with without_autocast(monkeypatch):
        distiller = distiller_on("meta", "st")
        distiller.labels, phase = "some", distiller.phases[0]
        optimizer = torch.optim.SGD(distiller.param_groups(phase), lr=0.1)
        weights = toys.weights(distiller)
        with Guard():
            batch = batch_on("meta", distiller)
            precision = utils.Precision("meta")
            terms = train_kd.train_step(distiller, phase, optimizer, batch, weights, precision, 2)
            utils.Meter().add(terms, len(batch.img))


# --- a run ----------------------------------------------------------------------------------------


def test_a_run(teacher, bare, tmp_path, capsys):
    distil("st+at", teacher, tmp_path, "--unlabeled", bare)
    out, rows = capsys.readouterr().out, read_metrics(tmp_path / "r")
    assert "1327 training (30 of them without labels) and 500 test images" in out
    assert {"ce", "train_top1", "test_top1", "kd_st", "kd_at"} <= set(rows[0])
    assert "labelled" not in rows[0]
    assert json.loads((tmp_path / "r" / "args.json").read_text())["recipe"]["unlabeled"]


@pytest.mark.slow
def test_stopped_and_resumed(teacher, bare, tmp_path, monkeypatch, capsys):
    more = ["--unlabeled", bare, "--accumulate", 2]
    distil("at", teacher, tmp_path / "whole", *more)
    with monkeypatch.context() as patch:
        stop_at(patch, 14, signal.SIGTERM)
        with pytest.raises(SystemExit):
            distil("at", teacher, tmp_path, *more)
    with ends(capsys, "--resume", "train"):
        distil("at", teacher, tmp_path, "--accumulate", 2, "--resume")
    moved = bare.rename(tmp_path / "moved")
    distil("at", teacher, tmp_path, "--resume", "--unlabeled", moved, "--accumulate", 2)
    one, two = result(tmp_path / "whole" / "r"), result(tmp_path / "r")
    for _, last in (one, two):
        del last["flags"]
    assert_same(one, two)


def test_without_labels(teacher, bare, tmp_path, capsys):
    root = folder(tmp_path / "img", (12, 12), classes=[str(i) for i in range(10)])
    (root / "train").rename(root / "rest")
    argv = ["--kd_mode", "st", "--t_model", teacher, "--s_name", "resnet8", "--img_size", 12]
    argv += ["--cuda", 0, "--epochs", 2, "--save_root", tmp_path, "--note", "r"]
    argv += ["--data_name", "imagefolder", "--img_root", root, "--batch_size", 8]
    argv += ["--t_classes", tmp_path / "lines.txt", "--unlabeled", bare]
    (tmp_path / "lines.txt").write_text("".join(f"{i}\n" for i in range(10)))
    with ends(capsys, "--unlabeled", "--lambda_ce"):
        train_kd.main([str(x) for x in argv])
    train_kd.main([str(x) for x in [*argv, "--lambda_ce", 0]])
    rows = read_metrics(tmp_path / "r")
    assert {"kd", "test_top1"} <= set(rows[0]) and "ce" not in rows[0]
    assert (tmp_path / "r" / "curves.png").exists()
    assert read_checkpoint(tmp_path / "r" / "checkpoint.pth.tar")["meta"]["num_class"] == 10


@pytest.mark.slow
def test_several_students(teacher, bare, tmp_path):
    distil("at,st", teacher, tmp_path, "--unlabeled", bare)
    for mode in ("at", "st"):
        distil(mode, teacher, tmp_path / mode, "--unlabeled", bare)
        one, two = result(tmp_path / mode / "r"), result(tmp_path / f"{mode}-r")
        for _, last in (one, two):
            del last["flags"]
        assert_same(one, two)


@pytest.mark.slow
def test_several_teachers(base, bare, tmp_path):
    both = ",".join(str(base / name / "model_best.pth.tar") for name in ("resnet14", "resnet8"))
    distil("st+at", both, tmp_path, "--unlabeled", bare, "--val", "0.1")
    rows = read_metrics(tmp_path / "r")
    assert {"ce", "kd_st", "kd_at", "val_top1"} <= set(rows[0])


# --- two processes --------------------------------------------------------------------------------


def worker(root: Path) -> None:
    """What each of two processes does: a run with a validation set, and one step of which one share
    has more labels than the other."""
    leave, utils.leave_ranks = utils.leave_ranks, lambda: None  # one meeting for all
    argv = ["--kd_mode", "dml", "--t_name", "resnet14", "--s_name", "resnet8", *SMALL]
    argv += ["--epochs", "1", "--save_root", str(root), "--unlabeled", f"{root}/bare"]
    train_kd.main([*argv, "--val", "0.1", "--note", "r"])

    def stepped(batch):
        torch.manual_seed(0)
        distiller, _ = some_labelled()
        phase = distiller.phases[0]
        params = distiller.set_trainable(phase)
        distiller.student.net.eval()
        optimizer, weights = torch.optim.SGD(params, lr=0.0), toys.weights(distiller, 1.0)
        whole = distiller.batch(**batch.tensors())
        terms = train_kd.train_step(distiller, phase, optimizer, whole, weights, CPU)
        meter = utils.Meter()
        meter.add(terms, len(batch.img))
        grad = torch.cat([p.grad.flatten() for p in params if p.grad is not None])
        return train_kd.of_the_labelled(meter.read()), grad

    torch.manual_seed(5)
    _, batch = some_labelled()
    half = slice(4 * utils.rank(), 4 * utils.rank() + 4)
    batch.target[:4] = -1
    share = replace(batch, **{name: x[half] for name, x in batch.tensors().items()})
    now, grad = stepped(share)
    distributed.average_gradients, distributed.mean = lambda optimizer: None, lambda x: x
    wanted, expected = stepped(batch)
    assert now == pytest.approx(wanted, rel=1e-4), (now, wanted)
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-6)
    leave()


@pytest.mark.slow
def test_two_processes(bare, tmp_path):
    done = torchrun(str(Path(__file__)), str(tmp_path), timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "r" / "result.json").read_text())
    assert {"last", "best", "peer_last", "peer_best", "val_best"} <= set(found)


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
