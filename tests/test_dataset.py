import multiprocessing
import os
import pickle
import random
import re
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
import toys
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import pil_to_tensor
from toys import images

import dataset
import train_base
import train_kd
import utils
from engine import augment, cli, console, published, stream
from engine.checkpoint import read_checkpoint
from engine.run import Run
from utils import UserError


def epoch(data, batch_size=4, seed=0, number=1, **kwargs):
    return list(stream.train_batches(data, batch_size, seed, number, **kwargs))


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
    with pytest.raises(UserError, match="reflect or zero"):
        epoch(images(), padding="wrap")


# --- datasets --------------------------------------------------------------------------------------


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
    data = stream.load("imagefolder", folder(tmp_path, test=test))
    assert data.train.classes == ["cat", "dog"] and len(data.train) == len(data.test) == 6
    assert data.train.pixels[4, 0, 0].tolist() == [100, 20, 200] and data.train.labels[4] == 1


def test_imagefolder_resized(tmp_path):
    folder(tmp_path, size=(12, 9))
    with pytest.raises(UserError, match="img_size"):
        stream.load("imagefolder", tmp_path)
    assert stream.load("imagefolder", tmp_path, img_size=8).train.pixels.shape == (6, 8, 8, 3)


RGB = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
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
    assert data.notes == [f"{tmp_path / 'train'}: 3 file(s) ignored (.db, .txt): no images"]


BROKEN = ("empty file", "no image", "truncated", "half a JPEG", "float")


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


@pytest.mark.parametrize(
    "how, message",
    [
        ("empty class", "train, class dog: no images"),
        ("no test", "no image folder"),
        ("no classes", "no class folders"),
        ("other classes", "only in train: dog; only in test: wolf"),
        ("one class more", "differ, only in test: wolf$"),
        ("large", "0.png is 97x90 pixels: give --img_size"),
        ("odd size", "9.png is 7x6 pixels .*img_size"),
        *(
            (how, r"train/cat/1.\w+: not a readable image \(.+\): mend or remove it$")
            for how in BROKEN
        ),
    ],
)
def test_bad_folders(tmp_path, how, message):
    spoil(tmp_path, how)
    with pytest.raises(UserError, match=message) as error:
        stream.load("imagefolder", tmp_path)
    assert "\n" not in str(error.value)


def test_one_image_is_not_enough(tmp_path):
    folder(tmp_path, classes=("cat",), n=1)
    with pytest.raises(UserError, match="at least two"):
        stream.load("imagefolder", tmp_path)


def test_unknown_dataset():
    with pytest.raises(UserError, match="cifar10"):
        stream.load("cifar11")


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
    with pytest.raises(UserError, match=re.escape("no route to host)")) as error:
        stream.load("cifar10", tmp_path)
    assert "\n" not in str(error.value) and "cifar-10-batches-py" in str(error.value)


def test_data_moves_as_a_whole():
    data = dataset.Data("x", images(), images()).to("meta")
    assert data.train.pixels.is_meta and data.test.labels.is_meta


# --- images that are read when they are wanted -----------------------------------------------------

SIZE = 112


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """train/ and val/ with three classes of unequal numbers of noisy images, of many sizes."""
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for split, n in (("train", 4), ("val", 2)):
        for label, name in enumerate(("cat", "dog", "emu")):
            (root / split / name).mkdir(parents=True)
            for i in range(n + label):
                shape = (*rng.integers(70, 190, 2), 3)
                noise = rng.integers(0, 120, shape) + 60 * label
                path = root / split / name / f"{i}.{'jpg' if i % 2 else 'png'}"
                Image.fromarray(noise.astype(np.uint8)).save(path)
    return root


def load(root, mean_std=published.IMAGENET, **kwargs):
    return stream.load("imagefolder", root, mean_std, **{"img_size": SIZE, **kwargs})


def by_hand(item):
    """(3, H, W) of a path, by torchvision's own way."""
    return pil_to_tensor(Image.open(os.fsdecode(item)).convert("RGB"))


def drawn(data, seed, number):
    """The order and the seeds of an epoch, drawn as the module's docstring says."""
    state = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
    generator = torch.Generator().manual_seed(state)
    n = len(data)
    return torch.randperm(n, generator=generator), torch.randint(
        2**63 - 1, (n,), generator=generator
    )


def assert_by_hand(data, batches, steps, order, seeds=None):
    k = 0
    for img, target, index in batches:
        assert img.shape[1:] == (3, data.size, data.size) and img.dtype == torch.float32
        assert img.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(index, order[k : k + len(index)])
        assert torch.equal(target, data.labels[index])
        for picture in raw(data, img):
            if seeds is not None:
                torch.manual_seed(seeds[k].item())
            expected = v2.Compose(steps)(by_hand(data.items[order[k]]))
            assert torch.equal(picture, expected.permute(1, 2, 0))
            k += 1
    assert k == len(data)


@pytest.mark.parametrize("flip", [True, False])
def test_training_is_torchvision_s_own_transform(photos, flip):
    data = load(photos, flip=flip).train
    steps = [v2.RandomResizedCrop(SIZE), *[v2.RandomHorizontalFlip()] * flip]
    assert_by_hand(data, epoch(data, seed=3, number=2), steps, *drawn(data, 3, 2))


def test_the_test_is_torchvision_s_own_transform(photos):
    data = load(photos).test
    steps = [v2.Resize(SIZE * 256 // 224), v2.CenterCrop(SIZE)]
    assert_by_hand(data, stream.test_batches(data, 4), steps, torch.arange(9))


def test_normalised_as_torchvision_does(photos):
    data = load(photos).test
    img, _, _ = next(stream.test_batches(data, 3))
    plain = raw(data, img).permute(0, 3, 1, 2) / 255
    expected = torchvision.transforms.functional.normalize(plain, *published.IMAGENET)
    torch.testing.assert_close(img, expected)


def assert_same(one, two):
    for a, b in zip(one, two, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_the_same_bytes_for_any_number_of_workers(photos):
    data = load(photos)
    two = dataset.Data("x", *(replace(split, workers=2) for split in (data.train, data.test)))
    assert_same(epoch(data.train), epoch(two.train))
    assert_same(stream.test_batches(data.test, 4), stream.test_batches(two.test, 4))
    del two
    assert not children()


def children():
    return {process.pid for process in multiprocessing.active_children()}


def test_processes_go_on_from_epoch_to_epoch(photos):
    """The same from the first, begun inside an epoch, on; a test's own end with it. Where an epoch is
    left half-way, or the images go, they end."""
    alone, data = load(photos).train, load(photos, workers=2).train
    seen = []
    for number, skip in ((1, 2), (2, 0), (3, 0), (1, 0)):
        assert_same(epoch(alone, number=number, skip=skip), epoch(data, number=number, skip=skip))
        list(stream.test_batches(data, 4))
        seen.append(children())
    assert len(seen[0]) == 2 and seen.count(seen[0]) == 4
    batches = stream.train_batches(data, 4, 0, 4)
    next(batches)
    assert children() == seen[0]
    del batches
    assert not children()
    assert_same(epoch(alone, number=4, skip=1), epoch(data, number=4, skip=1))
    assert len(children()) == 2
    del data
    assert not children()


def test_two_epochs_at_a_time(photos):
    data = load(photos, workers=2).train
    whole = epoch(data)
    both = zip(*(stream.train_batches(data, 4, 0, 1) for _ in range(2)))
    for expected, (one, other) in zip(whole, both, strict=True):
        assert_same([expected, expected], [one, other])


def test_a_worker_killed_between_epochs_is_one_line(photos, capsys):
    @console.command
    def main(argv=None):
        data = load(photos, workers=2).train
        epoch(data)
        victim, _ = multiprocessing.active_children()
        os.kill(victim.pid, signal.SIGKILL)
        time.sleep(1)  # as an evaluation would pass the time
        epoch(data, number=2)

    with pytest.raises(SystemExit) as stop:
        main()
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1
    assert re.search(r"^error: DataLoader worker .* give fewer --workers, or --workers 0$", err)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_workers_that_start_afresh(photos, method, monkeypatch):
    data, loader = load(photos).train, torch.utils.data.DataLoader
    expected = epoch(data)
    monkeypatch.setattr(
        torch.utils.data,
        "DataLoader",
        lambda *args, **kwargs: loader(*args, **kwargs, multiprocessing_context=method),
    )
    assert_same(expected, epoch(replace(data, workers=2)))


def test_a_streamed_epoch_is_a_function_of_seed_and_epoch(photos):
    data = load(photos).train
    first = epoch(data)
    torch.randn(7)
    assert_same(first, epoch(data))
    for other in (dict(seed=1), dict(number=2)):
        assert not torch.equal(first[0][0], epoch(data, **other)[0][0])
    index = torch.cat([index for _, _, index in first])
    assert sorted(index.tolist()) == list(range(15)) and index.tolist() != list(range(15))


@pytest.mark.parametrize("workers", [0, 2])
def test_generators_of_the_process_are_left_alone(photos, workers):
    data = load(photos, workers=workers)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    list(epoch(data.train)), list(stream.test_batches(data.test, 4))
    load(photos, None)  # measures
    after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]


def test_what_is_skipped_is_not_read(photos, monkeypatch):
    data = load(photos).train
    whole, opened, read = epoch(data), [], dataset.open_image
    monkeypatch.setattr(stream, "open_image", lambda path: opened.append(path) or read(path))
    assert_same(whole[2:], epoch(data, skip=2))
    assert len(opened) == sum(len(target) for _, target, _ in whole[2:]) == 7


@pytest.mark.parametrize("n, batch_size", [(9, 4), (5, 4), (3, 2), (2, 2)])
def test_no_streamed_batch_of_one(photos, n, batch_size):
    data = load(photos).train
    data = replace(data, items=data.items[:n], labels=data.labels[:n])
    sizes = [len(target) for _, target, _ in epoch(data, batch_size)]
    assert sum(sizes) == n and min(sizes) > 1 and max(sizes) <= batch_size + 1


def test_crops_have_the_scales_and_shapes_of_the_literature(tmp_path):
    """8 to 100 % of the area, 3:4 to 4:3, half of them mirrored: read off an image whose red grows
    to the right and whose green grows downwards."""
    ramp = np.arange(200, dtype=np.uint8)
    pixels = np.stack([*np.meshgrid(ramp, ramp), np.zeros((200, 200), np.uint8)], -1)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    items = np.array([os.fsencode(tmp_path / "x.png")] * 300)
    labels = torch.zeros(300, dtype=torch.int64)
    data = dataset.Files(items, labels, ["x", "y"], (0.0,) * 3, (1.0,) * 3, 97)
    img = torch.cat([img for img, _, _ in epoch(data, 50)]) * 255
    width = (img[:, 0, 48, -1] - img[:, 0, 48, 0]) * 97 / 96
    height = (img[:, 1, -1, 48] - img[:, 1, 0, 48]) * 97 / 96
    area, shape = (width.abs() * height) / 200**2, width.abs() / height
    assert 0.07 < area.min() < 0.15 and 0.9 < area.max() < 1.03
    assert 0.45 < area.mean() < 0.63, "uniform over 0.08 to 1"
    assert 0.7 < shape.min() < 0.8 and 1.25 < shape.max() < 1.42
    assert abs(shape.log().mean()) < 0.06
    assert 0.38 < (width < 0).float().mean() < 0.62 and (height > 0).all()


def test_streaming_begins_above_96_pixels(photos):
    assert isinstance(load(photos, img_size=96).train, dataset.Images)
    assert isinstance(load(photos, img_size=97).train, dataset.Files)


def test_measured_on_what_the_test_shows(photos, monkeypatch):
    data = load(photos, None)
    assert data.notes[-1].startswith("normalisation measured on 15 of 15 training images")
    steps = v2.Compose([v2.Resize(128), v2.CenterCrop(SIZE)])
    for count, places in ((15, range(15)), (6, (0, 2, 5, 7, 10, 12))):
        monkeypatch.setattr(dataset, "SAMPLE", count)
        data = load(photos, None)
        pixels = torch.stack([steps(by_hand(data.train.items[i])) for i in places]) / 255
        for split in (data.train, data.test):
            assert split.mean == pytest.approx(pixels.mean((0, 2, 3)).tolist(), abs=1e-4)
            assert split.std == pytest.approx(pixels.std((0, 2, 3)).tolist(), abs=1e-4)
    assert data.notes[-1].startswith("normalisation measured on 6 of 15 training images: mean (")


def test_a_tiny_image_is_enlarged(tmp_path):
    folder(tmp_path, size=(1, 3))
    for split in (load(tmp_path).train, load(tmp_path).test):
        img = torch.cat([img for img, _, _ in stream.test_batches(split, 4)])
        assert raw(split, img)[4].unique(dim=0).shape[0] == 1
        assert raw(split, img)[4, 0, 0].tolist() == [100, 20, 200]
    assert all(img.shape[2:] == (SIZE, SIZE) for img, _, _ in epoch(load(tmp_path).train))


def test_a_folder_of_small_images_is_kept_and_enlarged(tmp_path):
    """As CIFAR's are; one large image among them, and all are streamed."""
    folder(tmp_path)
    data = load(tmp_path)
    assert isinstance(data.train, dataset.Images) and data.train.enlarged
    assert data.train.autoaugment and data.train.size == SIZE and data.train.pixels.shape[1] < 96
    assert "enlarged on the device" in data.notes[0]
    img, _, _ = next(stream.test_batches(data.test, 2))
    assert img.shape[2:] == (SIZE, SIZE)
    Image.new("RGB", (120, 120)).save(tmp_path / "test" / "dog" / "large.png")
    assert isinstance(load(tmp_path).train, dataset.Files)


@pytest.mark.parametrize("how", BROKEN)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_file_is_one_line_from_any_process(tmp_path, how, workers):
    spoil(tmp_path, how)
    Image.new("RGB", (120, 120)).save(tmp_path / "train" / "dog" / "large.png")
    data = load(tmp_path, workers=workers)  # streamed: nothing is decoded yet
    with pytest.raises(UserError) as error:
        epoch(data.train, 2)
    text = r"\S+/train/cat/1.\w+: not a readable image \([^\n]+\): mend or remove it"
    assert re.fullmatch(text, str(error.value))
    assert multiprocessing.active_children() == []


def test_a_rehearsal_starts_no_process(photos, monkeypatch):
    train, asked, loader = load(photos, workers=2).train, [], torch.utils.data.DataLoader

    def watched(*args, num_workers, **kwargs):
        asked.append(num_workers)
        return loader(*args, num_workers=num_workers, **kwargs)

    monkeypatch.setattr(torch.utils.data, "DataLoader", watched)
    toys.distiller("at", train=train).check_losses(train)
    next(stream.test_batches(train, 2))
    assert asked == [0, 2]


def test_imagenet(photos):
    data = stream.load("imagenet", photos)
    assert (data.name, data.train.size, len(data.train), len(data.test)) == ("imagenet", 224, 15, 9)
    (photos / "test").mkdir()  # the official one has no class folders
    try:
        assert len(stream.load("imagenet", photos, published.IMAGENET).test) == 9
    finally:
        (photos / "test").rmdir()


def flags(*argv):
    parser = cli.Parser()
    cli.add_common_flags(parser)
    return parser.parse_args(list(argv))


@pytest.mark.parametrize("protocol", published.PROTOCOLS)
def test_what_imagenet_is_unless_told_otherwise(protocol):
    def of(*argv, knows={}):
        argv = "--data_name", "imagenet", "--protocol", protocol, *argv
        return cli.resolve(flags(*argv), "resnet18", knows)

    recipe = of()
    assert recipe.img_size == 224
    assert recipe.mean_std == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert of("--img_size", "128").img_size == 128
    assert of(knows=dict(data_name="imagenet", img_size=160)).img_size == 160
    assert of("--mean_std", "measured").mean_std is None
    other = cli.resolve(flags("--data_name", "digits", "--mean_std", "imagenet"), "x", {})
    assert other.mean_std == published.IMAGENET and other.img_size is None


def test_workers_are_as_many_as_cpus_but_eight(monkeypatch):
    def of(cpus, *argv):
        monkeypatch.setattr(utils, "cpus", lambda: cpus)
        return cli.resolve(flags("--data_name", "digits", *argv), "x", {}).workers

    assert (of(2), of(64), of(4, "--workers", "0"), of(4, "--workers", "9")) == (2, 8, 0, 9)
    with pytest.raises(UserError, match="--workers: a whole number of at least 0"):
        flags("--workers", "-1")


@pytest.mark.parametrize("size, largest", [(8, 500), (96, 500), (112, 400), (224, 100), (2500, 1)])
def test_evaluation_takes_batches_that_fit(monkeypatch, size, largest):
    asked = []
    monkeypatch.setattr(dataset, "test_batches", lambda x, size, share: asked.append(size) or [])
    large = dataset.Images(torch.zeros(4, size, size, 3), torch.zeros(4), [], (0,), (1,))
    list(stream.test_batches(large))
    assert asked == [largest]


# --- small images, enlarged ------------------------------------------------------------------------


def enlarged(n=23, size=SIZE, **kwargs):
    return replace(images(n=n, size=32), img_size=size, **kwargs)


def resized(pixels, size):
    """uint8 (B, 3, size, size), rounded once: a CPU's uint8 in torchvision is rounded twice."""
    return v2.functional.resize(pixels.permute(0, 3, 1, 2).float(), [size, size]).round().byte()


@pytest.mark.parametrize("size, flip", [(112, True), (224, False), (128, True), (100, True)])
def test_enlarged_training_is_torchvision_s_resize_crop_and_mirror(size, flip):
    data = enlarged(n=13, size=size, flip=flip)
    mix = int(np.random.SeedSequence([3, 2]).generate_state(1)[0])
    generator = torch.Generator().manual_seed(mix)
    side = round(size * 256 / 224)
    order = torch.randperm(13, generator=generator)
    top, left = torch.randint(0, side - size + 1, (2, 13), generator=generator)
    mirrored = torch.randint(0, 2, (13,), generator=generator).bool() & flip
    crops = []
    for picture, y, x, m in zip(resized(data.pixels[order], side), top, left, mirrored):
        crop = picture[:, y : y + size, x : x + size]
        crops.append(crop.flip(2) if m else crop)
    img, target, index = map(torch.cat, zip(*epoch(data, seed=3, number=2)))
    assert img.is_contiguous(memory_format=torch.channels_last) and img.dtype == torch.float32
    assert torch.equal(index, order) and torch.equal(target, data.labels[order])
    difference = raw(data, img).permute(0, 3, 1, 2).int() - torch.stack(crops)
    assert difference.abs().max() <= 1, "of what lies half-way between two integers"
    exact = side in (128, 256)  # weights that are multiples of 1/16
    assert (difference != 0).float().mean() <= (0 if exact else 1e-3)


@pytest.mark.parametrize("size", [112, 128, 224])
def test_enlarged_test_is_torchvision_s_resize(size):
    data = enlarged(n=10, size=size)
    img, target, index = map(torch.cat, zip(*stream.test_batches(data, 4)))
    assert img.is_contiguous(memory_format=torch.channels_last) and img.dtype == torch.float32
    assert torch.equal(index, torch.arange(10)) and torch.equal(target, data.labels)
    shown = raw(data, img).permute(0, 3, 1, 2).int()
    assert ((shown - resized(data.pixels, size)) != 0).float().mean() <= 2e-3
    native = v2.functional.resize(data.pixels.permute(0, 3, 1, 2), [size, size])
    assert (shown - native).abs().max() <= 1


def test_autoaugment_comes_last(monkeypatch):
    plain, seen = enlarged(), []

    class Watched(augment.Augment):
        def __call__(self, k, pixels):
            seen.append(pixels.permute(0, 2, 3, 1).clone())
            return super().__call__(k, pixels)

    monkeypatch.setattr(augment, "Augment", Watched)
    batches = epoch(replace(plain, autoaugment=True))
    assert all(torch.equal(raw(plain, x[0]), y) for x, y in zip(epoch(plain), seen, strict=True))
    changed = [(raw(plain, x[0]) != y).flatten(1).any(1) for x, y in zip(batches, seen)]
    assert 10 < torch.cat(changed).sum() < 23


def test_an_enlarged_epoch_is_a_function_of_seed_and_epoch():
    data = enlarged(autoaugment=True)
    whole = epoch(data)
    torch.randn(7)
    assert_same(whole, epoch(data))
    assert_same(whole[2:], epoch(data, skip=2))
    for other in (dict(seed=1), dict(number=2)):
        assert not torch.equal(whole[0][0], epoch(data, **other)[0][0])
    halves = [epoch(data, 8, share=(rank, 2)) for rank in (0, 1)]
    both = [tuple(map(torch.cat, zip(*pair))) for pair in zip(*halves)]
    assert_same(both[:2], epoch(data, 8)[:2])
    img, *_ = map(torch.cat, zip(*whole))
    assert torch.equal(img, torch.cat([img for img, *_ in epoch(data, 7)])), "whatever the batches"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_enlarges_without_a_host_sync():
    data = enlarged(n=60, autoaugment=True)
    batches = stream.train_batches(data.to("cuda"), 8, 0, 1)
    found = [next(batches)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        found += batches
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for one, other in zip(epoch(data, 8), found, strict=True):
        assert torch.equal(one[2], other[2].cpu())
        assert (raw(data, one[0]) != raw(data, other[0].cpu())).float().mean() < 1e-2


def test_cifar_above_96_pixels_as_knowledgereview_trains_it(tmp_path, monkeypatch):
    n, n_test = archive(tmp_path, monkeypatch, "CIFAR100", 100)
    data = stream.load("cifar100", tmp_path, published.ZOO_CIFAR100, img_size=128)
    assert data.train.pixels.shape == (n, 32, 32, 3) and data.test.pixels.shape[0] == n_test
    assert data.train.size == data.test.size == 128
    assert data.train.flip and data.train.autoaugment
    steps = "Resize, RandomCrop, RandomHorizontalFlip, AutoAugment"
    assert data.notes == [f"32 pixels, enlarged on the device; in training {steps}"]
    small = stream.load("cifar100", tmp_path, published.ZOO_CIFAR100, img_size=40)
    assert small.train.pixels.shape[1] == small.train.size == 40 and small.notes == []


def test_digits_above_96_pixels_keep_their_meaning():
    data = stream.load("digits", img_size=112)
    assert data.train.pixels.shape == (1297, 32, 32, 3) and data.train.size == 112
    assert not data.train.flip and not data.train.autoaugment
    assert data.notes[0] == "32 pixels, enlarged on the device; in training Resize, RandomCrop"
    mirrored = stream.load("digits", mean_std=published.CIFAR10, img_size=112, flip=True)
    assert mirrored.notes[0].endswith("Resize, RandomCrop, RandomHorizontalFlip")


def test_enlarged_images_are_measured_as_the_test_shows_them(monkeypatch):
    monkeypatch.setattr(dataset, "SAMPLE", 60)
    data = stream.load("digits", img_size=112)
    places = torch.arange(60) * 1297 // 60
    pixels = resized(data.train.pixels[places], 112) / 255
    for split in (data.train, data.test):
        assert split.mean == pytest.approx(pixels.mean((0, 2, 3)).tolist(), abs=1e-3)
        assert split.std == pytest.approx(pixels.std((0, 2, 3)).tolist(), abs=1e-3)
    assert data.notes[-1].startswith("normalisation measured on 60 of 1297 training images")


# --- and both scripts ------------------------------------------------------------------------------


@pytest.fixture
def script(photos, tmp_path):
    def run(main, note, *argv):
        flags = ["--save_root", tmp_path, "--note", note, "--batch_size", "6", "--cuda", "0"]
        return Path(main([str(x) for x in (*flags, *argv)])["dir"])

    return run


def test_both_scripts_on_photographs(photos, script, monkeypatch):
    """Any number of workers, stopped and gone on with: the same bytes."""
    data = ["--net_name", "resnet8", "--epochs", "2"]
    data += ["--data_name", "imagefolder", "--img_root", photos, "--img_size", SIZE]
    base = script(train_base.main, "base", *data, "--workers", "0")
    log = (base / "log.txt").read_text()
    assert "15 training and 9 test images of 112 pixels, 3 classes" in log
    assert "0 workers, streamed from disk; in training RandomResizedCrop" in log
    assert "normalisation measured on 15 of 15 training images" in log

    saved = Run.epoch

    def stop(self, *args, **kwargs):
        saved(self, *args, **kwargs)
        raise KeyboardInterrupt

    def in_parts(main, note, *argv):
        monkeypatch.setattr(Run, "epoch", stop)
        with pytest.raises(SystemExit):
            script(main, note, *argv, "--workers", "0")
        monkeypatch.setattr(Run, "epoch", saved)
        return script(main, note, *argv, "--workers", "2", "--resume")

    parts = in_parts(train_base.main, "parts", *data)
    assert "2 workers, streamed from disk" in (parts / "log.txt").read_text()
    assert (base / "metrics.csv").read_bytes() == (parts / "metrics.csv").read_bytes()
    # the teacher's checkpoint knows folder, size and normalisation
    known = read_checkpoint(base / "model_best.pth.tar")["meta"]
    assert known["img_size"] == SIZE and known["img_root"] == str(photos)
    kd = ["--kd_mode", "at", "--t_model", base / "model_best.pth.tar", "--s_name", "resnet8"]
    kd += ["--epochs", "2"]
    whole = script(train_kd.main, "kd", *kd, "--workers", "0")
    log = (whole / "log.txt").read_text()
    assert "streamed from disk" in log and "measured" not in log and "padding" not in log
    parts = in_parts(train_kd.main, "kd-parts", *kd)
    assert (whole / "metrics.csv").read_bytes() == (parts / "metrics.csv").read_bytes()


def test_a_broken_file_is_one_line_of_a_script(photos, script, tmp_path, capfd):
    spoil(tmp_path / "x", "half a JPEG")
    argv = ["--net_name", "resnet8", "--data_name", "imagefolder", "--img_root", tmp_path / "x"]
    argv += ["--img_size", SIZE, "--epochs", "1", "--workers", "2", "--batch_size", "2"]
    argv += ["--mean_std", "imagenet"]
    with pytest.raises(SystemExit) as end:
        script(train_base.main, "broken", *argv)
    err = capfd.readouterr().err
    assert end.value.code == 2 and err.count("\n") == 1
    assert err.startswith("error: ") and "train/cat/1.png: not a readable image (" in err
