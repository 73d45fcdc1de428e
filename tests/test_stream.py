"""Images that are read from disk for each batch."""

import multiprocessing
import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
import toys
from messages import ends, refused
from pictures import BROKEN, SIZE, assert_same, epoch, folder, raw, spoil
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import pil_to_tensor

import dataset
import train_base
import train_kd
import utils
from engine import cli, console, published, stream
from engine.checkpoint import read_checkpoint
from engine.run import Run


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


def test_the_same_bytes_for_any_number_of_workers(photos):
    data = load(photos)
    two = dataset.Data("x", *(replace(split, workers=2) for split in (data.train, data.test)))
    assert_same(epoch(data.train), epoch(two.train))
    assert_same(stream.test_batches(data.test, 4), stream.test_batches(two.test, 4))
    del two
    assert not children()


def children():
    return {process.pid for process in multiprocessing.active_children()}


@pytest.mark.slow
def test_processes_go_on_from_epoch_to_epoch(photos):
    """The same from the first, begun inside an epoch, on; a test's own end with it. Where an epoch
    is left half-way, or the images go, they end."""
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

    with ends(capsys, "--workers"):
        main()


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
    monkeypatch.setattr(stream, "open_item", lambda path: opened.append(path) or read(path))
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
    with refused(tmp_path / "train" / "cat" / ("1.tif" if how == "float" else "1.png")):
        epoch(data.train, 2)
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
    cli.add_common_flags(parser, cli.recipe_defaults("kdzoo", ""))
    return parser.parse_args(list(argv))


@pytest.mark.parametrize(
    "protocol", [name for name, x in published.PROTOCOLS.items() if "imagenet" in x.constants]
)
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
    with refused("--workers", "-1"):
        flags("--workers", "-1")


@pytest.mark.parametrize("size, largest", [(8, 500), (96, 500), (112, 400), (224, 100), (2500, 1)])
def test_evaluation_takes_batches_that_fit(monkeypatch, size, largest):
    asked = []
    monkeypatch.setattr(dataset, "test_batches", lambda x, size, share: asked.append(size) or [])
    large = dataset.Images(torch.zeros(4, size, size, 3), torch.zeros(4), [], (0,), (1,))
    list(stream.test_batches(large))
    assert asked == [largest]


# --- and both scripts -----------------------------------------------------------------------------


@pytest.fixture
def script(photos, tmp_path):
    def run(main, note, *argv):
        flags = ["--save_root", tmp_path, "--note", note, "--batch_size", "6", "--cuda", "0"]
        return Path(main([str(x) for x in (*flags, *argv)])["dir"])

    return run


@pytest.mark.slow
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
    with ends(capfd, tmp_path / "x" / "train" / "cat" / "1.png"):
        script(train_base.main, "broken", *argv)
