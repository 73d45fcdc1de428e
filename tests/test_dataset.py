import pickle
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import dataset
from toys import images
from utils import UserError


def epoch(data, batch_size=4, seed=0, number=1, **kwargs):
    return list(dataset.train_batches(data, batch_size, seed, number, **kwargs))


def raw(data, img):
    """uint8 (B, H, W, 3) back from a normalised batch."""
    mean, std = (torch.tensor(x) for x in (data.mean, data.std))
    return ((img.permute(0, 2, 3, 1) * std + mean) * 255).round().to(torch.uint8)


# --- batches ---------------------------------------------------------------------------------------


def candidates(picture, pad, padding, flip):
    """Every crop of the padded image, mirrored or not, by hand."""
    n = len(picture)

    def pixel(y, x):
        if padding == "zero":
            return picture[y, x] if 0 <= y < n and 0 <= x < n else torch.zeros(3).byte()
        y, x = (-v if v < 0 else 2 * (n - 1) - v if v >= n else v for v in (y, x))
        return picture[y, x]

    for dy in range(-pad, pad + 1):
        for dx in range(-pad, pad + 1):
            crop = torch.stack(
                [torch.stack([pixel(y + dy, x + dx) for x in range(n)]) for y in range(n)]
            )
            yield crop
            if flip:
                yield crop.flip(1)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("padding", ["reflect", "zero"])
def test_augmentation_is_crop_and_mirror(padding, flip):
    data = replace(images(n=24, size=5), flip=flip)
    seen = set()
    for img, _, index in epoch(data, batch_size=8, pad=2, padding=padding):
        assert img.is_contiguous(memory_format=torch.channels_last) and img.dtype == torch.float32
        for picture, i in zip(raw(data, img), index):
            options = list(candidates(data.pixels[i], 2, padding, flip))
            hits = [k for k, option in enumerate(options) if torch.equal(option, picture)]
            assert hits
            seen.add(hits[0])
    assert len(seen) > 10, "the draws differ from image to image"


def test_an_epoch_is_a_permutation_with_its_labels():
    data = images(n=23)
    batches = epoch(data)
    index = torch.cat([index for _, _, index in batches])
    assert sorted(index.tolist()) == list(range(23)) and index.tolist() != list(range(23))
    assert all(torch.equal(target, data.labels[index]) for _, target, index in batches)


def test_a_function_of_seed_and_epoch():
    data = images(n=23)
    first, again, other_epoch, other_seed = (
        torch.cat([img for img, _, _ in epoch(data, seed=s, number=e)])
        for s, e in ((0, 1), (0, 1), (0, 2), (1, 1))
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other_epoch) and not torch.equal(first, other_seed)
    torch.randn(7)  # torch's own generator plays no part
    assert torch.equal(first, torch.cat([img for img, _, _ in epoch(data)]))


def test_skip_goes_on_inside_an_epoch():
    data = images(n=23)
    for one, two in zip(epoch(data)[2:], epoch(data, skip=2), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two))


@pytest.mark.parametrize("n, batch_size", [(9, 4), (8, 4), (5, 4), (3, 2), (2, 2), (10, 4)])
def test_no_batch_of_one(n, batch_size):
    sizes = [len(target) for _, target, _ in epoch(images(n=n), batch_size)]
    assert sum(sizes) == n and min(sizes) > 1 and max(sizes) <= batch_size + 1


def test_test_batches_are_the_images():
    data = images(n=10)
    img, target, index = (torch.cat(x) for x in zip(*dataset.test_batches(data, 4)))
    assert torch.equal(raw(data, img), data.pixels) and torch.equal(target, data.labels)
    assert index.tolist() == list(range(10))
    plain = data.pixels.permute(0, 3, 1, 2) / 255
    expected = torchvision.transforms.functional.normalize(plain, data.mean, data.std)
    torch.testing.assert_close(img, expected)


def test_unknown_padding():
    with pytest.raises(UserError, match="reflect or zero"):
        epoch(images(), padding="wrap")


# --- datasets --------------------------------------------------------------------------------------


def test_digits():
    data = dataset.load("digits")
    assert (len(data.train), len(data.test), data.train.size) == (1297, 500, 32)
    assert not data.train.flip and data.train.num_class == 10
    assert set(data.train.labels.tolist()) == set(data.test.labels.tolist()) == set(range(10))
    again = dataset.load("digits")
    assert torch.equal(data.train.pixels, again.train.pixels)
    both = {x.numpy().tobytes() for x in data.train.pixels}
    assert len([x for x in data.test.pixels if x.numpy().tobytes() in both]) == 0


def test_measured_normalisation():
    pixels = np.random.default_rng(0).integers(0, 256, (50, 4, 4, 3), dtype=np.uint8)
    mean, std = dataset.measure(pixels)
    flat = pixels.reshape(-1, 3) / 255
    assert mean == pytest.approx(flat.mean(0), abs=1e-4) and std == pytest.approx(
        flat.std(0), abs=1e-4
    )
    assert dataset.measure(np.full((2, 4, 4, 3), 7, np.uint8))[1] == (1.0, 1.0, 1.0)


def folder(root, size=(6, 6), test="test", classes=("cat", "dog"), n=3):
    for split in ("train", test):
        for label, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(n):
                color = (100 * label, 20 * i, 200)
                Image.new("RGB", size, color).save(root / split / name / f"{i}.png")
    return root


@pytest.mark.parametrize("test", ["test", "val"])
def test_imagefolder(tmp_path, test):
    data = dataset.load("imagefolder", folder(tmp_path, test=test))
    assert data.train.classes == ["cat", "dog"] and len(data.train) == len(data.test) == 6
    assert data.train.pixels[4, 0, 0].tolist() == [100, 20, 200] and data.train.labels[4] == 1


def test_imagefolder_resized(tmp_path):
    folder(tmp_path, size=(12, 9))
    with pytest.raises(UserError, match="img_size"):
        dataset.load("imagefolder", tmp_path)
    assert dataset.load("imagefolder", tmp_path, img_size=8).train.pixels.shape == (6, 8, 8, 3)


def test_imagefolder_of_many_kinds(tmp_path):
    """Grey, palette and CMYK images become RGB."""
    folder(tmp_path)
    for kind, name in (("L", "a.png"), ("P", "b.png"), ("CMYK", "c.jpg")):
        Image.new(kind, (6, 6)).save(tmp_path / "train" / "cat" / name)
    assert dataset.load("imagefolder", tmp_path).train.pixels.shape == (9, 6, 6, 3)


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
    elif how == "no image":
        (root / "train" / "cat" / "1.png").write_text("not a picture")
    elif how == "truncated":
        path = root / "train" / "cat" / "1.png"
        path.write_bytes(path.read_bytes()[:40])
    elif how == "odd size":
        Image.new("RGB", (7, 6)).save(root / "train" / "cat" / "9.png")


@pytest.mark.parametrize(
    "how, message",
    [
        ("empty class", "dog: no images"),
        ("no test", "no image folder"),
        ("no classes", "no class folders"),
        ("other classes", "dog, wolf"),
        ("no image", "1.png: not a readable image"),
        ("truncated", "1.png: not a readable image"),
        ("odd size", "9.png is 7x6 pixels .*img_size"),
    ],
)
def test_bad_folders(tmp_path, how, message):
    spoil(tmp_path, how)
    with pytest.raises(UserError, match=message):
        dataset.load("imagefolder", tmp_path)


def test_one_image_is_not_enough(tmp_path):
    folder(tmp_path, classes=("cat",), n=1)
    with pytest.raises(UserError, match="at least two"):
        dataset.load("imagefolder", tmp_path)


def test_unknown_dataset():
    with pytest.raises(UserError, match="cifar10"):
        dataset.load("cifar11")


@pytest.mark.parametrize("kind, classes", [("CIFAR10", 10), ("CIFAR100", 100)])
def test_cifar_in_torchvision_s_layout(tmp_path, monkeypatch, kind, classes):
    """A synthetic archive, its checksums put in place of the real ones."""
    reader = getattr(torchvision.datasets, kind)
    base = tmp_path / reader.base_folder
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
            pixels = rng.integers(0, 256, (20, 3072), dtype=np.uint8)
            parts.append(write(name, {"data": pixels, key: [i % classes for i in range(20)]}))
        lists.append(parts)
    meta = dict(reader.meta)
    meta["md5"] = write(meta["filename"], {meta["key"]: [f"c{i}" for i in range(classes)]})[1]
    for name, value in (("train_list", lists[0]), ("test_list", lists[1]), ("meta", meta)):
        monkeypatch.setattr(reader, name, value)
    data = dataset.load(kind.lower(), tmp_path)
    assert data.train.num_class == classes and data.train.flip
    assert data.train.pixels.shape == (20 * len(lists[0]), 32, 32, 3) and len(data.test) == 20


def test_cifar_that_cannot_be_had(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no route to host\nsecond line")

    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", refuse)
    with pytest.raises(UserError, match=re.escape("no route to host)")) as error:
        dataset.load("cifar10", tmp_path)
    assert "\n" not in str(error.value) and "cifar-10-batches-py" in str(error.value)


def test_data_moves_as_a_whole():
    data = dataset.Data("x", images(), images()).to("meta")
    assert data.train.pixels.is_meta and data.test.labels.is_meta
