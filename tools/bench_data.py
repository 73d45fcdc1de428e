"""`bench.py data`: our data loaders next to plain DataLoaders, up to images on the device."""

import argparse
import itertools
import os
import tempfile
import time
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import torch

import dataset
import utils
from engine import cli, published, stream
from tools import pack
from tools.bench_flags import add_amp, add_numbers, add_rounds
from tools.bench_meter import spread, take_turns
from tools.bench_steps import bare_step, pair, random_images
from utils import UserError


def data_flags(parser: cli.Parser) -> None:
    """The flags of `data`."""
    add_numbers(
        parser,
        batch_size=(2, 128, "batch size "),
        samples=(2, 50_000, "number of images of 32x32 pixels "),
        images=(2, 1024, "number of JPEG files "),
        img_size=(97, 224, "image size of the larger images: NxN pixels "),
        batches=(2, 40, "batches per epoch "),
        workers=(0, 2, "worker processes that read images "),
    )
    parser.set_defaults(student="resnet20", teacher="resnet20", num_class=100)
    add_rounds(parser)
    add_amp(parser)


def data(args: argparse.Namespace, device: torch.device, precision: utils.Precision):
    """Yield two rows for each kind of data: our loader and a plain DataLoader, run alternately."""
    images = random_images(args.samples, args.num_class)
    bare = bare_step(args, device, precision, images, *pair(args, images), alone=True)
    step_s = median(take_turns([bare], args.rounds, 5, device)[0])
    resident = images.to(device)
    larger = replace(resident, img_size=args.img_size, autoaugment=True)
    with tempfile.TemporaryDirectory() as root:
        kilobytes = write_jpegs(Path(root), args.images)
        folder = stream.load(
            "imagefolder", root, published.IMAGENET, args.img_size, workers=args.workers
        )
        turns = (  # our loader: name, images, processes; the plain loader: name, images
            ("resident", resident, 0, "plain DataLoader", InMemory(images)),
            (
                "resident, 32 enlarged, AutoAugment",
                larger,
                0,
                "plain DataLoader, the same",
                InMemory(larger.to("cpu")),
            ),
            (
                f"streamed, JPEG of {kilobytes:.0f} kB",
                folder.train.to(device),
                args.workers,
                "plain DataLoader, the same files",
                on_disk(root, args.img_size),
            ),
            *(
                (
                    name,
                    in_shards(root, side, args).to(device),
                    args.workers,
                    "plain DataLoader, the unpacked files",
                    on_disk(root, args.img_size),
                )
                for name, side in (
                    ("shards of these files", None),
                    (f"shards, shorter side {shorter_side(args)}", shorter_side(args)),
                )
            ),
        )
        for name, own, processes, other, plain in turns:
            rounds = []
            for _ in range(args.rounds):
                batches = stream.train_batches(own, args.batch_size, 2, 1)
                speed = throughput(batches, processes, args.batches, device)
                batches = plain_loader(plain, args)
                rounds.append((speed, throughput(batches, args.workers, args.batches, device)))
            ratios = [a / b for a, b in rounds]
            found = dict(spread("ratio", ratios), met="yes" if median(ratios) >= 1 else "no")
            rows = [dict(loader=name, workers=processes) | found]
            rows += [dict(loader=other, workers=args.workers)]
            for row, speeds in zip(rows, zip(*rounds)):
                speed = median(speeds)
                row |= dict(pixels=own.size, img_per_s=speed)
                row["batch_ms"] = 1000 * args.batch_size / speed
                if own.size == 32:
                    row |= dict(step_ms=1000 * step_s, share=row["batch_ms"] / (10 * step_s))
                yield row


def throughput(batches, workers: int, count: int, device: torch.device) -> float:
    """Images per second of the first `count` batches, on the device. The first batch of each
    worker is warm-up and not counted. Raises UserError if no batches are left to measure."""
    skip, images, began = max(1, workers), 0, time.perf_counter()
    for i, (img, *_) in enumerate(itertools.islice(batches, count), 1):
        img.to(device, non_blocking=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        now = time.perf_counter()
        if i == skip:
            began = now
        elif i > skip:
            images += len(img)
            spent = now - began
    if not images:
        raise UserError(
            f"--images: too few, the first {skip} batch(es) are warm-up and no others are left; "
            "give a larger N"
        )
    return images / spent


def write_jpegs(root: Path, count: int) -> float:
    """Write `count` images of 500x375 pixels into root/train and two into root/test. Returns the
    mean size of a file in kilobytes.

    The images are soft patches with noise, so the files are as large as those of photographs.
    """
    from PIL import Image

    rng = np.random.default_rng(0)
    for split, n in (("train", count), ("test", 2)):
        for label in "ab":
            (root / split / label).mkdir(parents=True)
        for i in range(n):
            coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
            picture = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC)).astype(float)
            picture += rng.normal(0, 12, (375, 500, 1))
            Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(
                root / split / "ab"[i % 2] / f"{i}.jpg", quality=90
            )
    sizes = [path.stat().st_size for path in (root / "train").rglob("*.jpg")]
    return sum(sizes) / len(sizes) / 1000


def shorter_side(args: argparse.Namespace) -> int:
    """Shorter side of the resized test images, as usual for ImageNet: 256 for crops of 224."""
    return round(args.img_size * 256 / 224)


def in_shards(root: str, side: int | None, args: argparse.Namespace) -> dataset.Files:
    """The training images of the folder `root`, packed into a shard by tools/pack.py."""
    out = f"{root}/shards{side or ''}"
    with open(os.devnull, "w") as nothing, redirect_stdout(nothing):
        pack.main([root, out, *(["--max_side", str(side)] if side else [])])
    shard = f"{out}/train-0000.tar"
    return stream.load("wds", shard, published.IMAGENET, args.img_size, workers=args.workers).train


class InMemory(torch.utils.data.Dataset):
    """Small images, transformed one by one with PIL, as torchvision's CIFAR does."""

    def __init__(self, images: dataset.Images):
        from torchvision import transforms
        from torchvision.transforms import v2

        self.pixels, self.labels = images.pixels.numpy(), images.labels.tolist()
        size = images.size
        if images.enlarged:
            steps = [v2.Resize(round(size * 256 / 224)), v2.RandomCrop(size)]
            steps += [v2.RandomHorizontalFlip(), v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)]
        else:
            steps = [transforms.RandomCrop(size, padding=4, padding_mode="reflect")]
            steps += [transforms.RandomHorizontalFlip()]
        steps += [transforms.ToTensor(), transforms.Normalize(images.mean, images.std)]
        self.transform = transforms.Compose(steps)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int):
        from PIL import Image

        return self.transform(Image.fromarray(self.pixels[i])), self.labels[i]


def on_disk(root: str, size: int):
    """torchvision's ImageFolder with the usual ImageNet augmentation."""
    from torchvision import datasets, transforms

    steps = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()]
    steps += [transforms.ToTensor(), transforms.Normalize(*published.IMAGENET)]
    return datasets.ImageFolder(f"{root}/train", transforms.Compose(steps))


def plain_loader(images, args: argparse.Namespace):
    """torch's DataLoader over `images`."""
    return torch.utils.data.DataLoader(
        images, args.batch_size, shuffle=True, num_workers=args.workers, drop_last=True
    )
