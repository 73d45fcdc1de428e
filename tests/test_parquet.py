"""Data sets in the form of the Hugging Face hub: Parquet files that the tests write."""

import io
import json
import sys

import numpy as np
import pytest
import torch
from messages import ends
from PIL import Image

import train_base
import utils
from engine import stream
from engine.checkpoint import read_checkpoint

NAMES = ["cat", "dog", "emu"]


def encoded(pixels, kind="PNG"):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def rows(n, seed=0, size=(12, 12)):
    """Noisy images of three classes, and their labels."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 150, (n, *size, 3), dtype=np.uint8)
    labels = np.arange(n) % 3
    return pixels + (50 * labels)[:, None, None, None].astype(np.uint8), labels.tolist()


def write(path, pixels, labels, image="image", label="label", names=NAMES, plain=False):
    """A Parquet file as `datasets` writes it."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    data = [encoded(x) for x in pixels]
    column = data if plain else [dict(bytes=x, path=f"{i}.png") for i, x in enumerate(data)]
    table = pa.table({image: column, label: labels, "note": ["x"] * len(labels)})
    if names:
        features = {label: {"names": names, "_type": "ClassLabel"}, image: {"_type": "Image"}}
        about = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": about})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)


@pytest.fixture
def hub(tmp_path):
    """Two files of training images, and one of test images."""
    root = tmp_path / "hub"
    for i in (0, 1):
        write(root / f"data/train-{i:05}-of-00002.parquet", *rows(9, seed=i))
    write(root / "data/test-00000-of-00001.parquet", *rows(6, seed=5))
    return root


def test_a_folder(hub):
    data = stream.load(f"hf/{hub}")
    assert (len(data.train), len(data.test), data.val) == (18, 6, None)
    expected = np.concatenate([rows(9, seed=i)[0] for i in (0, 1)])
    assert (data.train.pixels.numpy() == expected).all()
    assert data.train.labels.tolist() == [0, 1, 2] * 6 and data.train.classes == NAMES
    assert stream.load(f"hf/{hub}", img_size=8).identity() == data.identity(), "of the files"
    assert stream.load(f"hf/{hub}", img_size=8).train.pixels.shape == (18, 8, 8, 3)
    enlarged = stream.load(f"hf/{hub}", img_size=112).train
    assert enlarged.enlarged and enlarged.pixels.shape[1] == 12
    assert len(stream.load(f"hf/{hub}", val=3).val) == 3


@pytest.mark.parametrize("labels", ["strings", "numbers"])
def test_without_names(tmp_path, labels):
    pixels, _ = rows(6)
    values = list("babcab") if labels == "strings" else [7, 3, 7, 9, 3, 7]
    for split in ("train", "validation"):
        path = tmp_path / split / "0000.parquet"
        write(path, pixels, values, "img", "fine_label", None, plain=True)
    data = stream.load(f"hf/{tmp_path}")
    classes = ["a", "b", "c"] if labels == "strings" else ["3", "7", "9"]
    assert data.train.classes == classes
    assert [classes[i] for i in data.train.labels] == [str(x) for x in values]
    assert data.val is None and len(data.test) == 6


def test_a_validation_split(hub):
    write(hub / "data/validation-00000-of-00001.parquet", *rows(4, seed=8))
    data = stream.load(f"hf/{hub}")
    assert (len(data.val), len(data.test)) == (4, 6)
    assert any("best epoch is chosen on the validation split" in x for x in data.notes)


def test_a_test_split_without_labels(hub):
    write(hub / "data/validation-00000-of-00001.parquet", *rows(4, seed=8))
    write(hub / "data/test-00000-of-00001.parquet", rows(6)[0], [-1] * 6)
    data = stream.load(f"hf/{hub}")
    assert data.val is None and len(data.test) == 4
    assert any("no labels" in x for x in data.notes)


def test_not_square(tmp_path):
    for split in ("train", "test"):
        write(tmp_path / f"{split}.parquet", *rows(3, size=(12, 20)))
    with pytest.raises(utils.UserError, match="20x12"):
        stream.load(f"hf/{tmp_path}")
    one, two = (stream.load(f"hf/{tmp_path}", img_size=8, fit=x) for x in ("crop", "squash"))
    assert not torch.equal(one.train.pixels, two.train.pixels)
    assert any("6 of 6 images are not square" in x for x in two.notes)


def test_a_run(hub, tmp_path, capsys):
    argv = ["--net_name", "resnet8", "--data_name", f"hf/{hub}", "--cuda", "0", "--epochs", "1"]
    argv += ["--batch_size", "6", "--save_root", str(tmp_path / "runs")]
    found = train_base.main(argv)
    assert found["dir"] == str(tmp_path / "runs" / "base-hf-hub-resnet8")
    meta = read_checkpoint(f"{found['dir']}/model_best.pth.tar")["meta"]
    assert (meta["data_name"], meta["classes"]) == (f"hf/{hub}", NAMES)
    write(hub / "data/train-00000-of-00002.parquet", *rows(9, seed=3))
    with ends(capsys, "--resume", "train"):
        train_base.main([*argv, "--resume"])


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """`datasets` has its cache in the test's folder."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("plain", [False, True])
def test_large_images_are_read_by_workers(tmp_path, cached, plain):
    """As those of a folder with the same files, in the same order, bit for bit."""
    sets = dict(zip(("train", "test"), (rows(n, size=(120, 130)) for n in (30, 7))))
    for split, (pixels, labels) in sets.items():
        half = len(labels) // 2
        for i, part in enumerate((slice(0, half), slice(half, None))):
            name = tmp_path / f"hub/{split}-{i}.parquet"
            write(name, pixels[part], labels[part], plain=plain)
        for k in np.argsort(labels, kind="stable"):
            file = tmp_path / "img" / split / NAMES[labels[k]] / f"{k:03}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(encoded(pixels[k]))
    options = dict(img_size=112, workers=2, mean_std=((0.5,) * 3, (0.25,) * 3))
    ours = stream.load(f"hf/{tmp_path / 'hub'}", **options)
    folder = stream.load("imagefolder", str(tmp_path / "img"), **options)
    assert ours.train.labels.tolist() == sets["train"][1] and ours.train.items.ndim == 1
    place = np.argsort(sets["test"][1], kind="stable")
    one, two = (list(stream.test_batches(x.test, 7))[0] for x in (ours, folder))
    assert torch.equal(one[0][place], two[0]) and torch.equal(one[1][place], two[1])
    batches = list(stream.train_batches(ours.train, 8, seed=1, epoch=1))
    assert sorted(i for _, _, index in batches for i in index.tolist()) == list(range(30))
    assert ours.identity() == stream.load(f"hf/{tmp_path / 'hub'}", **options).identity()


def test_large_images_need_datasets(tmp_path, monkeypatch):
    for split in ("train", "test"):
        write(tmp_path / f"{split}.parquet", *rows(3, size=(120, 120)))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(utils.UserError, match="pip install datasets"):
        stream.load(f"hf/{tmp_path}", img_size=112)


def test_other_labels_are_other_images(tmp_path, cached):
    pixels, labels = rows(3, size=(120, 120))
    found = []
    for name, own in (("one", labels), ("other", labels[::-1])):
        for split in ("train", "test"):
            write(tmp_path / name / f"{split}.parquet", pixels, own)
        found.append(stream.load(f"hf/{tmp_path / name}", img_size=112).identity())
    assert found[0] != found[1]


def test_large_images_of_a_damaged_file(tmp_path, cached, monkeypatch):
    import datasets

    def broken(*args, **kwargs):
        raise OSError("no space left\nsecond line")

    for split in ("train", "test"):
        write(tmp_path / f"{split}.parquet", *rows(3, size=(120, 120)))
    monkeypatch.setattr(datasets, "load_dataset", broken)
    with pytest.raises(utils.UserError, match="train.parquet.*no space left") as error:
        stream.load(f"hf/{tmp_path}", img_size=112)
    assert "\n" not in str(error.value)


def test_large_images_without_bytes(tmp_path, cached):
    import pyarrow as pa
    import pyarrow.parquet as pq

    for split in ("train", "test"):
        write(tmp_path / f"{split}.parquet", *rows(3, size=(120, 120)))
    column = [dict(bytes=encoded(rows(1, size=(120, 120))[0][0])), dict(bytes=None)]
    pq.write_table(pa.table({"image": column, "label": [0, 1]}), tmp_path / "train.parquet")
    with pytest.raises(utils.UserError, match="column image has no bytes"):
        stream.load(f"hf/{tmp_path}", img_size=112)


def broken(how, root):
    pixels, labels = rows(3)
    good = root / "test.parquet"
    write(good, pixels, labels)
    path = root / "train.parquet"
    if how == "no train":
        return "train"
    if how == "labels":
        write(path, pixels, [0, -1, 2])
        return "-1"
    if how == "mixed":
        write(path, pixels, list("abc"), names=None)
        return "numbers and strings"
    if how == "no labels":
        write(path, pixels, labels, label="points")
        return "points"
    if how == "no images":
        write(path, pixels, labels, image="photo", plain=True)
        return "photo"
    if how == "no split":
        write(root / "odd.parquet", pixels, labels)
        return "odd.parquet"
    if how == "other columns":
        write(path, pixels, labels)
        write(root / "train-2.parquet", pixels, labels, label="kind")
        return "train-2.parquet"
    write(path, pixels, labels)
    data = path.read_bytes()
    cut = {"cut": data[:-50], "empty": b"", "text": b"no table"}[how]
    path.write_bytes(cut)
    return "train.parquet"


HOW = "no train,labels,mixed,no labels,no images,no split,other columns,cut,empty,text"


@pytest.mark.parametrize("how", HOW.split(","))
def test_one_line(how, tmp_path, capsys):
    told = broken(how, tmp_path / "hub")
    argv = ["--net_name", "resnet8", "--data_name", f"hf/{tmp_path / 'hub'}", "--cuda", "0"]
    argv += ["--save_root", str(tmp_path / "runs")]
    with pytest.raises(SystemExit) as stop:
        train_base.main(argv)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and told in err
    assert not (tmp_path / "runs").exists()


def test_a_damaged_image(tmp_path):
    for split in ("train", "test"):
        write(tmp_path / f"{split}.parquet", *rows(3))
    import pyarrow as pa
    import pyarrow.parquet as pq

    column = [dict(bytes=encoded(rows(1)[0][0])), dict(bytes=b"none"), dict(bytes=None)]
    pq.write_table(pa.table({"image": column, "label": [0, 1, 2]}), tmp_path / "train.parquet")
    with pytest.raises(utils.UserError, match="train.parquet, image 1: not a readable image"):
        stream.load(f"hf/{tmp_path}")


@pytest.mark.parametrize("what", ["pyarrow", "datasets"])
def test_what_to_install(what, tmp_path, monkeypatch):
    for name in ("pyarrow", "pyarrow.parquet", "datasets"):
        monkeypatch.setitem(sys.modules, name, None)
    name = f"hf/{tmp_path}" if what == "pyarrow" else "hf/someone/something"
    with pytest.raises(utils.UserError, match=f"pip install {what}"):
        stream.load(name)


def test_a_data_set_of_the_hub(hub, monkeypatch, tmp_path):
    """By its name: here `datasets` finds it in a folder."""
    datasets = pytest.importorskip("datasets")
    load = datasets.load_dataset
    cache = str(tmp_path / "cache")
    monkeypatch.setattr(datasets, "load_dataset", lambda name: load(str(hub), cache_dir=cache))
    data = stream.load("hf/someone/something")
    assert data.train.classes == NAMES and data.identity() == stream.load(f"hf/{hub}").identity()
    monkeypatch.setattr(datasets, "load_dataset", lambda name: load(str(tmp_path / "gone")))
    with pytest.raises(utils.UserError, match="hf/someone/something was not found"):
        stream.load("hf/someone/something")
