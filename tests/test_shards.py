"""WebDataset's shards: the same numbers as the folder that was packed; and what is refused."""

import io
import os
import signal
import tarfile

import numpy as np
import pytest
import torch
from mistakes import is_line
from PIL import Image

import dataset
import train_base
from engine import shards, stream
from engine.run import Run, read_metrics
from tools import pack
from utils import UserError

UNIT = ((0.5,) * 3, (0.25,) * 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """20 training and 6 test images of 130x110 pixels, JPEG and PNG, in two classes."""
    root, rng = tmp_path_factory.mktemp("pictures") / "img", np.random.default_rng(0)
    for split, count in (("train", 10), ("test", 3)):
        for label in ("cat", "dog"):
            (root / split / label).mkdir(parents=True)
            for i in range(count):
                image = Image.fromarray(rng.integers(0, 256, (110, 130, 3), dtype=np.uint8))
                image.save(root / split / label / f"{i}.{'png' if i % 3 == 0 else 'jpg'}")
    return root


@pytest.fixture(scope="module")
def packed(folder):
    """The same in shards of seven."""
    out = folder.parent / "shards"
    pack.main([str(folder), str(out), "--per_shard", "7", "--workers", "0"])
    return str(out / "train-{0000..0002}.tar")


def both(folder, packed, **more):
    one = stream.load("imagefolder", str(folder), UNIT, 97, **more)
    return one, stream.load("wds", packed, UNIT, 97, **more)


def test_the_batches_of_the_folder(folder, packed):
    one, other = both(folder, packed)
    assert other.train.classes == ["cat", "dog"] and len(other.test) == 6
    for skip, share in ((0, (0, 1)), (2, (1, 2))):
        batches = [
            list(stream.train_batches(data.train, 4, 2, 3, skip=skip, share=share))
            for data in (one, other)
        ]
        assert len(batches[0]) == 5 - skip
        for a, b in zip(*batches, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b))
    seen = torch.cat([x[2] for x in stream.train_batches(other.train, 4, 2, 3)])
    assert sorted(seen.tolist()) == list(range(20))  # an epoch: every image once
    tests = [list(stream.test_batches(data.test, 4)) for data in (one, other)]
    assert all(torch.equal(x, y) for a, b in zip(*tests) for x, y in zip(a, b))


def test_what_identifies_the_data(folder, packed, tmp_path):
    data = stream.load("wds", packed, UNIT, 97)
    assert data.identity() == shards.identity(packed)
    again = tmp_path / "again"
    pack.main([str(folder), str(again), "--per_shard", "9", "--workers", "0"])
    other = shards.identity(str(again / "train-{0000..0002}.tar"))
    assert other == shards.identity(packed)  # however many are in a shard
    small = tmp_path / "small"
    pack.main([str(folder), str(small), "--max_side", "100", "--workers", "0"])
    assert shards.identity(str(small / "train-0000.tar")) != other


def test_the_shorter_side(folder, tmp_path, capsys):
    pack.main([str(folder), str(tmp_path / "a"), "--max_side", "100", "--workers", "2"])
    assert "--img_root" in capsys.readouterr().out
    pack.main([str(folder), str(tmp_path / "b"), "--max_side", "100", "--workers", "0"])
    for name in ("train-0000.tar", "test-0000.tar", "classes.txt"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    data = stream.load("wds", str(tmp_path / "a" / "train-0000.tar"), UNIT, 97)
    sizes = {shards.open_item(os.fsdecode(item)).size for item in data.train.items}
    assert sizes == {(118, 100)}


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_training_stopped_inside_an_epoch_equals_that_on_the_folder(
    folder, packed, workers, tmp_path, monkeypatch
):
    common = "--net_name resnet8 --img_size 97 --cuda 0 --epochs 2 --batch_size 4 --amp off".split()
    common += ["--workers", workers, "--save_root", str(tmp_path), "--note"]
    train_base.main([*common, "a", "--data_name", "imagefolder", "--img_root", str(folder)])
    argv = [*common, "b", "--data_name", "wds", "--img_root", packed]
    due, calls = Run.due, []

    def stop(self):
        calls.append(1)
        if len(calls) == 8:
            os.kill(os.getpid(), signal.SIGTERM)
        return due(self)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "due", stop)
        with pytest.raises(SystemExit) as stopped:
            train_base.main(argv)
    assert stopped.value.code == 143
    train_base.main([*argv, "--resume"])
    assert read_metrics(tmp_path / "a") == read_metrics(tmp_path / "b")
    with pytest.raises(SystemExit):  # other shards than those of the start
        small = folder.parent / "other"
        pack.main([str(folder), str(small), "--max_side", "97", "--workers", "0"])
        argv[-1] = str(small / "train-0000.tar")
        train_base.main([*argv, "--resume"])


def shard(path, *members):
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def picture(side=100) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (side, side)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    "members, says",
    [
        ([("a.png", picture())], "a needs both an image and a label"),
        ([("a.cls", b"1")], "a needs both an image and a label"),
        ([("a.png", picture()), ("a.cls", b"cat")], "not a shard of images"),
        ([("a.png", picture()), ("a.cls", b"-1")], "not a label"),
        ([("a.png", picture()), ("a.cls", b"9999999")], "not a label"),
        ([("a.txt", b"x")], "no images found"),
        ([], "no images found"),
    ],
)
def test_a_damaged_shard(members, says, tmp_path):
    shard(tmp_path / "train-0.tar", *members)
    fine = [("a.png", picture()), ("a.cls", b"0"), ("b.png", picture()), ("b.cls", b"1")]
    shard(tmp_path / "test-0.tar", *fine)
    with pytest.raises(UserError, match=says):
        shards.load(str(tmp_path / "train-0.tar"))


def test_an_image_that_cannot_be_read(tmp_path):
    members = [("a.png", b"none"), ("a.cls", b"0"), ("b.png", picture()), ("b.cls", b"1")]
    for split in ("train", "val"):
        shard(tmp_path / f"{split}-0.tar", *members)
    data = stream.load("wds", str(tmp_path / "train-0.tar"), UNIT, 97)
    with pytest.raises(UserError, match="train-0.tar, 4 bytes from byte 512: not a readable image"):
        list(stream.train_batches(data.train, 2, 1, 1))


@pytest.mark.parametrize(
    "root, more, says",
    [
        ("{root}", "", "expected the training shards"),
        ("{root}/x.tar", "", "expected the training shards"),
        ("{root}/train-{{0..9}}.tar", "", "no file"),
        ("{root}/train-{{3..1}}.tar", "", "not a valid range of shards"),
        ("{root}/train-cut.tar", "", "train-cut.tar"),
        ("{root}/train-text.tar", "", "train-text.tar"),
        ("{root}/train-alone.tar", "", "test shards"),
        ("{root}/train-0.tar", "--img_size 96", "--img_size 96"),
        ("{root}/train-0.tar", "--num_class 7", "7"),
    ],
)
def test_no_shards(root, more, says, tmp_path, capsys):
    fine = [("a.png", picture()), ("a.cls", b"0"), ("b.png", picture()), ("b.cls", b"1")]
    for name in ("train-0", "test-0", "train-cut", "test-cut", "test-text", "train-alone"):
        shard(tmp_path / f"{name}.tar", *fine)
    data = (tmp_path / "train-cut.tar").read_bytes()
    (tmp_path / "train-cut.tar").write_bytes(data[:700])
    (tmp_path / "train-text.tar").write_text("no archive")
    argv = ["--net_name", "resnet8", "--data_name", "wds", "--save_root", str(tmp_path / "runs")]
    with pytest.raises(SystemExit) as stop:
        train_base.main([*argv, "--img_root", root.format(root=tmp_path), *more.split()])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and is_line(err) and says in err, err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "argv, says",
    [
        ("{folder} {out} --max_side 4", "--max_side"),
        ("{folder} {out} --max_side x", "--max_side"),
        ("{folder} {out} --quality 50", "--quality"),
        ("{folder} {out} --max_side 100 --quality 101", "--quality"),
        ("{folder} {out} --per_shard 0", "--per_shard"),
        ("{folder} {out} --workers -1", "--workers"),
        ("{folder} {folder}", "is not empty"),
        ("{folder} {folder}/train/cat/0.png", "is a file"),
        ("{folder}/train {out}", "train"),
        ("{folder} {out} --data_name digits", "--data_name"),
        ("{folder} {out} --side 3", "--side"),
        ("{folder}", "OUT"),
    ],
)
def test_bad_flags_of_pack(argv, says, folder, tmp_path, capsys):
    words = [word.format(folder=folder, out=tmp_path / "out") for word in argv.split()]
    with pytest.raises(SystemExit) as stop:
        pack.main(words)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and is_line(err) and says in err, err
    assert list(tmp_path.iterdir()) == []


def test_small_images_are_not_packed(tmp_path, capsys):
    for split in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / "img" / split / name).mkdir(parents=True)
            Image.new("RGB", (32, 32)).save(tmp_path / "img" / split / name / "0.png")
    with pytest.raises(SystemExit):
        pack.main([str(tmp_path / "img"), str(tmp_path / "out")])
    err = capsys.readouterr().err
    assert "nothing to pack" in err and not (tmp_path / "out").exists()
    assert dataset.RESIDENT == 96
