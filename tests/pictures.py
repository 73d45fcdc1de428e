"""Image folders and archives for tests of the datasets, and what batches give back."""

import pickle

import numpy as np
import torch
import torchvision
from PIL import Image

from engine import stream

SIZE = 112
RGB = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
BROKEN = ("empty file", "no image", "truncated", "half a JPEG", "float")


def epoch(data, batch_size=4, seed=0, number=1, **kwargs):
    return list(stream.train_batches(data, batch_size, seed, number, **kwargs))


def raw(data, img):
    """uint8 (B, H, W, 3) back from a normalised batch."""
    mean, std = (torch.tensor(x) for x in (data.mean, data.std))
    return ((img.permute(0, 2, 3, 1) * std + mean) * 255).round().to(torch.uint8)


def assert_same(one, two):
    for a, b in zip(one, two, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def folder(root, size=(6, 6), test="test", classes=("cat", "dog"), n=3):
    for split in ("train", test):
        for label, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(n):
                color = (100 * label, 20 * i, 200)
                Image.new("RGB", size, color).save(root / split / name / f"{i}.png")
    return root


def spoil(root, how):
    folder(root)
    if how == "empty class":
        for path in (root / "train" / "dog").iterdir():
            path.unlink()
    elif how == "no test":
        (root / "test").rename(root / "holdout")
    elif how == "no classes":
        for path in (root / "train").iterdir():
            path.rename(root / path.name)
    elif how == "other classes":
        (root / "test" / "dog").rename(root / "test" / "wolf")
    elif how == "one class more":
        (root / "test" / "wolf").mkdir()
        Image.new("RGB", (6, 6)).save(root / "test" / "wolf" / "0.png")
    elif how == "empty file":
        (root / "train" / "cat" / "1.png").write_text("")
    elif how == "no image":
        (root / "train" / "cat" / "1.png").write_text("not a picture")
    elif how == "truncated":
        path = root / "train" / "cat" / "1.png"
        path.write_bytes(path.read_bytes()[:40])
    elif how == "half a JPEG":
        path = root / "train" / "cat" / "1.png"
        Image.fromarray(RGB.repeat(9, 0).repeat(9, 1)).save(path, format="jpeg")
        path.write_bytes(path.read_bytes()[:-60])
    elif how == "float":
        Image.fromarray(np.zeros((6, 6), np.float32)).save(root / "train" / "cat" / "1.tif")
    elif how == "large":
        Image.new("RGB", (97, 90)).save(root / "train" / "cat" / "0.png")
    elif how == "odd size":
        Image.new("RGB", (7, 6)).save(root / "train" / "cat" / "9.png")


def archive(root, monkeypatch, kind, classes, n=20):
    """A synthetic archive in torchvision's layout, its checksums put in place of the real ones."""
    reader = getattr(torchvision.datasets, kind)
    base = root / reader.base_folder
    base.mkdir()
    rng = np.random.default_rng(0)
    key = "labels" if kind == "CIFAR10" else "fine_labels"

    def write(name, content):
        (base / name).write_bytes(pickle.dumps(content))
        return [name, torchvision.datasets.utils.calculate_md5(base / name)]

    lists = []
    for names in (reader.train_list, reader.test_list):
        parts = []
        for name, _ in names:
            pixels = rng.integers(0, 256, (n, 3072), dtype=np.uint8)
            parts.append(write(name, {"data": pixels, key: [i % classes for i in range(n)]}))
        lists.append(parts)
    meta = dict(reader.meta)
    meta["md5"] = write(meta["filename"], {meta["key"]: [f"c{i}" for i in range(classes)]})[1]
    for name, value in (("train_list", lists[0]), ("test_list", lists[1]), ("meta", meta)):
        monkeypatch.setattr(reader, name, value)
    return n * len(lists[0]), n * len(lists[1])
