"""Batches of images that lie in memory, and where each dataset comes from."""

import os
from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision
from messages import one_line, refused
from PIL import Image
from pictures import BROKEN, RGB, archive, epoch, folder, raw, spoil
from toys import images

import dataset
from engine import published, stream


# --- batches --------------------------------------------------------------------------------------


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
    for img, _, index in dataset.train_batches(data, 8, 0, 1, pad=2, padding=padding):
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
    img, target, index = (torch.cat(x) for x in zip(*stream.test_batches(data, 4)))
    assert torch.equal(raw(data, img), data.pixels) and torch.equal(target, data.labels)
    assert index.tolist() == list(range(10))
    plain = data.pixels.permute(0, 3, 1, 2) / 255
    expected = torchvision.transforms.functional.normalize(plain, data.mean, data.std)
    torch.testing.assert_close(img, expected)


def test_unknown_padding():
    with refused("padding", "wrap"):
        epoch(images(), padding="wrap")


# --- datasets -------------------------------------------------------------------------------------


def test_digits():
    data = stream.load("digits")
    assert (len(data.train), len(data.test), data.train.size) == (1297, 500, 32)
    assert not data.train.flip and data.train.num_class == 10
    assert set(data.train.labels.tolist()) == set(data.test.labels.tolist()) == set(range(10))
    again = stream.load("digits")
    assert torch.equal(data.train.pixels, again.train.pixels)
    both = {x.numpy().tobytes() for x in data.train.pixels}
    assert len([x for x in data.test.pixels if x.numpy().tobytes() in both]) == 0
    eight = stream.load("digits", img_size=8).train.pixels
    assert set(eight.unique().tolist()) == {round(grey * 255 / 16) for grey in range(17)}


def test_measured_normalisation():
    pixels = np.random.default_rng(0).integers(0, 256, (50, 4, 4, 3), dtype=np.uint8)
    mean, std = dataset.measure(torch.from_numpy(pixels).split(20))
    flat = pixels.reshape(-1, 3) / 255
    assert mean == pytest.approx(flat.mean(0), abs=1e-4) and std == pytest.approx(
        flat.std(0), abs=1e-4
    )
    assert dataset.measure([torch.full((2, 4, 4, 3), 7).byte()])[1] == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("test", ["test", "val"])
def test_imagefolder(tmp_path, test):
    data = stream.load("imagefolder", folder(tmp_path, test=test))
    assert data.train.classes == ["cat", "dog"] and len(data.train) == len(data.test) == 6
    assert data.train.pixels[4, 0, 0].tolist() == [100, 20, 200] and data.train.labels[4] == 1


def test_imagefolder_resized(tmp_path):
    folder(tmp_path, size=(12, 9))
    with refused("--img_size", "12x9"):
        stream.load("imagefolder", tmp_path)
    assert stream.load("imagefolder", tmp_path, img_size=8).train.pixels.shape == (6, 8, 8, 3)


DEEP = np.random.default_rng(1).integers(0, 65536, (6, 6), dtype=np.uint16)


def odd_image(kind, path):
    """Write an image of an unusual kind; returns its pixels as RGB, found without PIL's convert."""
    rgb = Image.fromarray(RGB)
    if kind in ("L", "LA"):
        rgb.convert(kind).save(path)
        return np.asarray(rgb.convert("L"))[..., None].repeat(3, 2)
    if kind == "RGBA":
        alpha = np.dstack([RGB, RGB[..., :1]])
        Image.fromarray(alpha).save(path)
        return RGB
    if kind == "CMYK":
        Image.fromarray(np.dstack([255 - RGB, 0 * RGB[..., :1]]), "CMYK").save(path)
        return RGB
    if kind.startswith("P"):
        palette = rgb.quantize(8)
        clear = dict(transparency=bytes([0, 128] + [255] * 6)) if kind == "P transparent" else {}
        palette.save(path, **clear)
        return np.reshape(palette.getpalette(), (-1, 3))[np.asarray(palette)]
    grey = Image.fromarray(DEEP if kind == "I;16" else DEEP.astype(np.int32))
    assert grey.mode == kind
    grey.save(path)
    return (DEEP / 257).round()[..., None].repeat(3, 2)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "kind, suffix",
    [
        ("L", "png"),
        ("LA", "png"),
        ("RGBA", "png"),
        ("CMYK", "tif"),
        ("P", "png"),
        ("P transparent", "png"),
        ("I;16", "png"),
        ("I;16", "tif"),
        ("I", "tif"),
    ],
)
def test_every_kind_of_image_becomes_rgb(tmp_path, kind, suffix):
    folder(tmp_path)
    path = tmp_path / "train" / "cat" / f"0a.{suffix}"
    expected = torch.from_numpy(odd_image(kind, path).astype(np.uint8))
    assert torch.equal(stream.load("imagefolder", tmp_path).train.pixels[1], expected)
    read = stream.Reader(np.array([os.fsencode(path)]), torch.nn.Identity())
    assert torch.equal(read[[0], [0]][0], expected)


def test_a_cmyk_jpeg(tmp_path):
    red = np.zeros((8, 8, 4), np.uint8) + np.array([0, 255, 255, 0], np.uint8)
    Image.fromarray(red, "CMYK").save(tmp_path / "x.jpg")
    difference = np.asarray(dataset.open_image(tmp_path / "x.jpg")).astype(int) - [255, 0, 0]
    assert abs(difference).max() < 10


def test_what_is_no_image_is_ignored_and_counted(tmp_path):
    folder(tmp_path)
    for name in ("Thumbs.db", "notes.txt", "more.TXT", ".DS_Store", "._0.png"):
        (tmp_path / "train" / "cat" / name).write_text("x")
    (tmp_path / "train" / ".cache").mkdir()
    (tmp_path / "train" / "cat" / ".thumbs").mkdir()
    (tmp_path / "train" / "cat" / ".thumbs" / "a.png").write_text("x")
    (tmp_path / "train" / "dog" / "deeper").mkdir()
    Image.new("RGB", (6, 6)).save(tmp_path / "train" / "dog" / "deeper" / "x.PNG")
    data = stream.load("imagefolder", tmp_path, published.IMAGENET)
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1, 1]
    (note,) = data.notes
    one_line(note, tmp_path / "train", 3, ".db", ".txt")


@pytest.mark.parametrize(
    "how, where, names",
    [
        ("empty class", "train", ["dog"]),
        ("no test", "", ["test"]),
        ("no classes", "train", []),
        ("other classes", "", ["train", "dog", "test", "wolf"]),
        ("one class more", "", ["test", "wolf"]),
        ("large", "train/cat/0.png", ["97x90", "--img_size"]),
        ("odd size", "train/cat/9.png", ["7x6", "--img_size"]),
        *((how, f"train/cat/1.{'tif' if how == 'float' else 'png'}", []) for how in BROKEN),
    ],
)
def test_bad_folders(tmp_path, how, where, names):
    root = tmp_path / "x"
    spoil(root, how)
    with refused(root / where) as said:
        stream.load("imagefolder", root)
    one_line(said[0].replace(str(root / where), "", 1), *names)


def test_one_image_is_not_enough(tmp_path):
    folder(tmp_path, classes=("cat",), n=1)
    with refused("imagefolder", 1):
        stream.load("imagefolder", tmp_path)


def test_unknown_dataset():
    with refused("cifar11", "cifar10"):
        stream.load("cifar11")


@pytest.mark.parametrize("kind, classes", [("CIFAR10", 10), ("CIFAR100", 100)])
def test_cifar_in_torchvision_s_layout(tmp_path, monkeypatch, kind, classes):
    n, n_test = archive(tmp_path, monkeypatch, kind, classes)
    data = stream.load(kind.lower(), tmp_path)
    assert data.train.num_class == classes and data.train.flip
    assert data.train.pixels.shape == (n, 32, 32, 3) and len(data.test) == n_test
    assert data.notes[0].startswith(f"normalisation measured on {n} of {n} training images")


def test_cifar_that_cannot_be_had(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no route to host\nsecond line")

    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", refuse)
    with refused("no route to host", "cifar-10-batches-py"):
        stream.load("cifar10", tmp_path)


def test_data_moves_as_a_whole():
    data = dataset.Data("x", images(), images()).to("meta")
    assert data.train.pixels.is_meta and data.test.labels.is_meta
