"""Small images that the device enlarges, batch by batch."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from pictures import SIZE, archive, assert_same, epoch, raw
from toys import images
from torchvision.transforms import v2

import dataset
from engine import augment, published, stream


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
