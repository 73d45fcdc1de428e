"""Every dataset, by name: small images, decoded once and kept on the training device as one tensor,
enlarged there if need be, and files of larger ones, which worker processes read when wanted.

    data = load("cifar100", "./datasets")
    for img, target, index in train_batches(data.train, 128, seed=2, epoch=1): ...
    for img, target, index in test_batches(data.test, 512): ...

All the randomness of an epoch (order, crops, flips, AutoAugment; a seed for each image read) is drawn
up front from a generator seeded by (seed, epoch), so batch k of an epoch is a function of the two, on
every device and with any number of workers.
"""

import math
import os
import signal
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from utils import IMG_SIZE, SIZES, UserError, first_line, named

RESIDENT = 96  # pixels: images up to here stay on the device, files of larger ones are streamed
PIECE = 8  # images that a CPU enlarges at a time: less memory to and fro
SAMPLE = 2000  # training images on which the normalisation of larger ones is measured


class Split:
    """What both kinds of images answer from their labels and classes."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_class(self) -> int:
        return len(self.classes)

    @property
    def device(self) -> torch.device:
        return self.labels.device


@dataclass
class Images(Split):
    """One split, resident: `pixels` uint8 (N, H, W, 3), `labels` int64 (N,); `pixels[i]` is RGB.

    `mean`, `std`: per channel, of pixels scaled to 0..1; `flip`: whether training mirrors images.
    `img_size`: side to which they are enlarged, batch by batch; None: as they are. `autoaugment`:
    whether training applies AutoAugment's CIFAR-10 policy to enlarged ones.
    """

    pixels: Tensor
    labels: Tensor
    classes: list[str]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    flip: bool = True
    img_size: int | None = None
    autoaugment: bool = False

    @property
    def size(self) -> int:
        return self.img_size or self.pixels.shape[1]

    @property
    def enlarged(self) -> bool:
        return self.size != self.pixels.shape[1]

    def to(self, device) -> "Images":
        return replace(self, pixels=self.pixels.to(device), labels=self.labels.to(device))


@dataclass
class Stream(Split):
    """One split whose images, of `size` pixels, are read when wanted, by `workers` processes.

    `items`: the files' paths as an array of bytes (a list of str would be copied into every worker,
    reference count by reference count). `loader`: that of the last whole epoch of training, whose
    processes wait for the next and end with the Stream. The rest as in Images.
    """

    items: np.ndarray
    labels: Tensor
    classes: list[str]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    size: int
    flip: bool = True
    workers: int = 0
    loader: torch.utils.data.DataLoader | None = field(default=None, init=False, repr=False)

    def to(self, device) -> "Stream":
        return replace(self, labels=self.labels.to(device))


@dataclass
class Data:
    """A dataset: its two splits, its name, and what the log should say of it."""

    name: str
    train: Images | Stream
    test: Images | Stream
    notes: list[str] = field(default_factory=list)

    def to(self, device) -> "Data":
        return replace(self, train=self.train.to(device), test=self.test.to(device))


def load(
    name: str,
    root: str = "./datasets",
    mean_std: tuple[tuple, tuple] | None = None,
    img_size: int | None = None,
    flip: bool | None = None,
    workers: int = 0,
) -> Data:
    """The dataset `name`, read from `root`; see DATASETS for the names.

    `mean_std`: normalisation; None: measured on the training split. `img_size`: side to which
    images are resized and cropped, files streamed by `workers` processes above RESIDENT; None: what
    they have, and the images of a folder must have one size. `flip`: mirror in training; None: what
    suits the dataset. Raises UserError where the data cannot be had.
    """
    read = named(DATASETS, name, "dataset")
    img_size = img_size or IMG_SIZE.get(name)
    *parts, classes, options, notes = read(Path(root), img_size)
    if len(parts[0][1]) < 2:
        raise UserError(f"{name}: {len(parts[0][1])} training image(s): at least two are needed")
    if len(classes) < 2:
        raise UserError(f"{name}: {classes[0]} is the only class: at least two are needed")
    if flip is not None:
        options["flip"] = flip
    mean, std = map(tuple, mean_std or ((0.0,) * 3, (1.0,) * 3))
    splits = []
    for items, labels in parts:
        labels = torch.as_tensor(np.asarray(labels), dtype=torch.int64)
        if items.ndim == 1:
            split = Stream(items, labels, classes, mean, std, img_size, options["flip"], workers)
        else:
            pixels = torch.from_numpy(np.ascontiguousarray(items))
            if pixels.shape[1] < SIZES[0]:
                raise UserError(
                    f"{name}: images of {pixels.shape[1]} pixels: give --img_size, at least {SIZES[0]}"
                )
            split = Images(pixels, labels, classes, mean, std, img_size=img_size, **options)
        splits.append(split)
    train = splits[0]
    if isinstance(train, Stream):
        steps = [type(step).__name__ for step in transform(train, train=True).transforms]
        notes.append(f"{workers} workers, streamed from disk; in training {', '.join(steps)}")
    elif train.enlarged:
        steps = ["Resize", "RandomCrop"] + ["RandomHorizontalFlip"] * train.flip
        steps += ["AutoAugment"] * train.autoaugment
        pixels = train.pixels.shape[1]
        notes.append(f"{pixels} pixels, enlarged on the device; in training {', '.join(steps)}")
    if mean_std is None:
        n = len(train)
        count, part = (min(n, SAMPLE), 50) if _large(img_size) else (n, 4096)
        places, bounds = torch.arange(count) * n // count, _parts(count, part)
        if isinstance(train, Stream):
            pixels = _read(train, places, bounds)
        else:
            pixels = (_shown(train, places[start:stop]) for start, stop in bounds)
        mean, std = measure(pixels)
        splits = [replace(split, mean=mean, std=std) for split in splits]
        notes.append(
            f"normalisation measured on {count} of {n} training images: mean {mean}, std {std}"
        )
    return Data(name, *splits, notes)


def _large(img_size: int | None) -> bool:
    return img_size is not None and img_size > RESIDENT


def measure(parts: Iterable[Tensor]) -> tuple[tuple, tuple]:
    """Mean and standard deviation per channel of uint8 images (N, H, W, 3), scaled to 0..1."""
    counts = sum(
        np.stack([np.bincount(part[..., c].ravel(), minlength=256) for c in range(3)])
        for part in map(np.asarray, parts)
    )
    values = np.arange(256) / 255.0
    mean, std = [], []
    for count in counts:
        share = count / count.sum()
        mean.append(round(float(share @ values), 4))
        std.append(round(float(np.sqrt(share @ (values - share @ values) ** 2)), 4) or 1.0)
    return tuple(mean), tuple(std)


# --- batches -------------------------------------------------------------------------------------


def batch_bounds(n: int, batch_size: int, world: int = 1) -> list[tuple[int, int]]:
    """Where each training batch begins and ends. What is left over joins the last batch where it is
    less than two images for each of `world` processes: batch norm and the relational losses need two.
    """
    starts = list(range(0, n, batch_size))
    if 0 < n % batch_size < 2 * world and len(starts) > 1:
        starts.pop()
    return list(zip(starts, starts[1:] + [n]))


def _parts(n: int, size: int) -> list[tuple[int, int]]:
    return [(start, min(start + size, n)) for start in range(0, n, size)]


def generator_of(seed: int, epoch: int) -> torch.Generator:
    """From which all that an epoch leaves to chance is drawn."""
    mix = np.random.SeedSequence([seed, epoch]).generate_state(1)
    return torch.Generator().manual_seed(int(mix[0]))


def padded(images: Images | Stream) -> bool:
    """Whether training crops them at a random place of the padded image."""
    return isinstance(images, Images) and not images.enlarged


def _share(bounds: list[tuple[int, int]], rank: int, world: int) -> list[tuple[int, int]]:
    """The part of each batch that is one process's. All have as many images: up to world - 1 of a
    batch are left out."""
    each = [(start, (stop - start) // world) for start, stop in bounds]
    return [(start + rank * n, start + (rank + 1) * n) for start, n in each]


def train_batches(
    images: Images | Stream,
    batch_size: int,
    seed: int,
    epoch: int,
    pad: int = 4,
    padding: str = "reflect",
    skip: int = 0,
    share: tuple[int, int] = (0, 1),
    strong: bool = False,
):
    """Yield (img, target, index) over one shuffled, augmented epoch, from batch `skip` on; of every
    batch the `share` (rank, world) of one process. `strong`: (img, target, index, a second view of
    the images), with a crop and a mirror image of its own, RandAugment and a square cut out.

    img: float32 (B, 3, H, W) in channels_last, normalised; target, index: int64 (B,).
    Images: a crop at a random place of the image padded by `pad` pixels ('reflect' or 'zero'), then
    a mirror image with probability 1/2 where the dataset allows it. Enlarged, as KnowledgeReview
    trains CIFAR at 224 pixels: resized to 256/224 of the size, a crop at a random place, the mirror
    image, AutoAugment. Stream: see `transform`.
    """
    if padding not in ("reflect", "zero"):
        raise UserError(f"padding must be reflect or zero, not {padding!r}")
    n, device = len(images), images.device
    generator = generator_of(seed, epoch)
    order = torch.randperm(n, generator=generator)
    bounds = _share(batch_bounds(n, batch_size, share[1])[skip:], *share)
    if isinstance(images, Stream):
        seeds = torch.randint(2**63 - 1, (n,), generator=generator)
        yield from _stream(images, order, bounds, seeds)
        return
    size, side = images.size, round(images.size * 256 / 224)
    low, high = (0, side - size) if images.enlarged else (-pad, pad)
    shift = torch.randint(low, high + 1, (2, n), generator=generator)
    flip = torch.randint(0, 2, (n,), generator=generator).bool() & images.flip
    augment = second = None
    if images.enlarged and images.autoaugment:
        augment = Augment(*autoaugment(n, size, generator), size, bounds, device)
    if strong:
        draws = torch.randint(low, high + 1, (2, n), generator=generator)
        mirror = torch.randint(0, 2, (n,), generator=generator).bool() & images.flip
        change = Augment(*randaugment(n, size, generator), size, bounds, device)
        square = torch.rand(3, n, generator=generator)
        second = [x.to(device, non_blocking=True) for x in (draws, mirror, square)]
    order, shift, flip = (x.to(device, non_blocking=True) for x in (order, shift, flip))
    scale_shift = _scale_shift(images)
    arange = torch.arange(size, device=device)

    def view(index: Tensor, shift: Tensor, flip: Tensor) -> Tensor:
        rows = arange + shift[0, :, None]
        columns = torch.where(flip[:, None], arange.flip(0), arange) + shift[1, :, None]
        if images.enlarged:
            return _enlarge(images.pixels[index], rows, columns, side)
        return _gather(images, index, rows, columns, padding).permute(0, 3, 1, 2)

    for k, (start, stop) in enumerate(bounds):
        index = order[start:stop]
        pixels = view(index, shift[:, start:stop], flip[start:stop])
        batch = [augment(k, pixels) if augment else pixels]
        if strong:
            draws, mirror, square = (x[..., start:stop] for x in second)
            pixels = change(k, view(index, draws, mirror).contiguous())
            batch.append(cut_out(pixels, square))
        img, *views = (_normalise(_interleave(x), *scale_shift) for x in batch)
        yield img, images.labels[index], index, *views


def test_batches(
    images: Images | Stream,
    batch_size: int,
    workers: int | None = None,
    share: tuple[int, int] = (0, 1),
):
    """Yield (img, target, index) in order, normalised and otherwise untouched, or enlarged; of a
    Stream resized and cropped by `workers` processes (None: its own number). share: (rank, world),
    for every world-th batch."""
    index, (rank, world) = torch.arange(len(images)), share
    if isinstance(images, Stream):
        bounds = _parts(len(index), batch_size)[rank::world]
        yield from _stream(images, index, bounds, workers=workers)
        return
    scale_shift = _scale_shift(images)
    for i in index.to(images.device).split(batch_size)[rank::world]:
        yield _normalise(_shown(images, i), *scale_shift), images.labels[i], i


def _gather(images: Images, index: Tensor, rows: Tensor, columns: Tensor, padding: str) -> Tensor:
    """Pixels (rows[b, i], columns[b, j]) of image index[b], uint8 (B, H, W, 3); outside is padding."""
    last = images.size - 1
    if padding == "zero":
        inside_rows, inside_columns = ((x >= 0) & (x <= last) for x in (rows, columns))
        rows, columns = rows.clamp(0, last), columns.clamp(0, last)
    else:
        rows, columns = (last - (last - x.abs()).abs() for x in (rows, columns))
    # one flat gather of whole pixels: three times as fast as indexing by three tensors
    line = index[:, None] * images.size + rows
    place = line[:, :, None] * images.size + columns[:, None, :]
    pixels = images.pixels.view(-1, 3).index_select(0, place.flatten()).view(*place.shape, 3)
    if padding == "zero":
        pixels = pixels * (inside_rows[:, :, None] & inside_columns[:, None, :])[..., None]
    return pixels


def _shown(images: Images, index: Tensor) -> Tensor:
    """What the test shows of images `index`, uint8 (B, H, W, 3)."""
    pixels = images.pixels[index]
    if images.enlarged:
        place = torch.arange(images.size, device=images.device).expand(len(index), -1)
        pixels = _interleave(_enlarge(pixels, place, place, images.size))
    return pixels


def _enlarge(pixels: Tensor, rows: Tensor, columns: Tensor, side: int) -> Tensor:
    """Pixels (rows[b, i], columns[b, j]) of image b resized to `side`, uint8 (B, 3, H, W).

    Bilinear, as torchvision does it on a GPU; on a CPU it rounds twice, to up to one more or less.
    """
    if pixels.device.type == "cpu" and len(pixels) > PIECE:
        pieces = zip(*(x.split(PIECE) for x in (pixels, rows, columns)))
        return torch.cat([_enlarge(*piece, side) for piece in pieces])
    n, size = pixels.shape[:2]
    x = pixels.permute(0, 3, 1, 2).float()
    one, two, share = _neighbours(columns, size, side)
    one, two = (x.gather(3, i[:, None, None].expand(-1, 3, size, -1)) for i in (one, two))
    x = one.lerp_(two, share[:, None, None]).flatten(0, 2)
    one, two, share = _neighbours(rows, size, side)
    first = torch.arange(3 * n, device=x.device).view(n, 3, 1) * size
    one, two = (x.index_select(0, (first + i[:, None]).flatten()) for i in (one, two))  # whole rows
    x = one.lerp_(two, share[:, None].expand(-1, 3, -1).reshape(-1, 1))
    return x.round_().to(torch.uint8).view(n, 3, rows.shape[1], -1)


def _neighbours(place: Tensor, size: int, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """The two of `size` pixels between which a place among `side` lies, and the second's share."""
    source = ((place + 0.5) * (size / side) - 0.5).clamp(0, size - 1)
    one = source.long()
    return one, (one + 1).clamp(max=size - 1), source - one


def _interleave(pixels: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, H, W, 3), contiguous."""
    if pixels.is_contiguous(memory_format=torch.channels_last):
        return pixels.permute(0, 2, 3, 1)
    return torch.stack(pixels.unbind(1), -1)


def _scale_shift(images: Images | Stream) -> tuple[Tensor, Tensor]:
    """What normalises a row of pixels, channel by channel: the inner loop is long instead of three."""
    mean, std = (torch.tensor(x, device=images.device) for x in (images.mean, images.std))
    return tuple(x.repeat(images.size) for x in (1 / (255 * std), -mean / std))


def _normalise(pixels: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W), stored as channels_last."""
    flat = pixels.flatten(2).float()
    torch.addcmul(shift, flat, scale, out=flat)
    return flat.view(pixels.shape).permute(0, 3, 1, 2)


# --- AutoAugment's policy for CIFAR-10, and RandAugment, on whole batches --------------------------
# uint8 (B, 3, S, S), on their device, as torchvision.transforms.v2.AutoAugment applies it to one tensor:
# the same chances, magnitudes and pixels, but the images of a batch that get the same operation get it
# together, each with numbers of its own. What an image gets is drawn before the epoch, so that no step
# waits for the device.

# what comes first and what second: an operation, its probability, its level of 0 to 9
POLICY = """
    Invert       0.1 -   Contrast     0.2 6
    Rotate       0.7 2   TranslateX   0.3 9
    Sharpness    0.8 1   Sharpness    0.9 3
    ShearY       0.5 8   TranslateY   0.7 9
    AutoContrast 0.5 -   Equalize     0.9 -
    ShearY       0.2 7   Posterize    0.3 7
    Color        0.4 3   Brightness   0.6 7
    Sharpness    0.3 9   Brightness   0.7 9
    Equalize     0.6 -   Equalize     0.5 -
    Contrast     0.6 7   Sharpness    0.6 5
    Color        0.7 7   TranslateX   0.5 8
    Equalize     0.3 -   AutoContrast 0.4 -
    TranslateY   0.4 3   Sharpness    0.2 6
    Brightness   0.9 6   Color        0.2 8
    Solarize     0.5 2   Invert       0.0 -
    Equalize     0.2 -   AutoContrast 0.6 -
    Equalize     0.2 -   Equalize     0.6 -
    Color        0.9 9   Equalize     0.6 -
    AutoContrast 0.8 -   Solarize     0.2 8
    Brightness   0.1 3   Color        0.7 0
    Solarize     0.4 5   AutoContrast 0.9 -
    TranslateY   0.9 9   TranslateY   0.7 9
    AutoContrast 0.9 -   Solarize     0.8 3
    Equalize     0.8 -   Invert       0.1 -
    TranslateY   0.7 9   AutoContrast 0.9 -
"""
TOP = dict(ShearX=0.3, ShearY=0.3, Rotate=30.0)  # magnitude at level 9; that of 0 is 0
TOP |= dict.fromkeys(("Brightness", "Color", "Contrast", "Sharpness"), 0.9)
SIGNED = {*TOP, "TranslateX", "TranslateY"}
NUMBERS = 6  # of an image, for whatever operation it gets


def policy() -> list[tuple[tuple[str, float, int | None], ...]]:
    """The sub-policies, each two (operation, probability, level)."""
    rows = (line.split() for line in POLICY.strip().splitlines())
    return [tuple((row[i], float(row[i + 1]), _level(row[i + 2])) for i in (0, 3)) for row in rows]


def _level(text: str) -> int | None:
    return None if text == "-" else int(text)


def magnitude(op: str, level: int | None, size: int) -> float:
    """What a level means, for images of `size` pixels; 0 where an operation has no levels."""
    if op == "Posterize":
        return round(8 - level * 4 / 9)  # bits that stay
    if op == "Solarize":
        return float(torch.linspace(1.0, 0.0, 10)[level])
    top = 150.0 / 331.0 * size if op.startswith("Translate") else TOP.get(op)
    return 0.0 if top is None else float(torch.linspace(0.0, top, 10)[level])


def autoaugment(n: int, size: int, generator) -> tuple[list[tuple[str, float]], Tensor]:
    """What AutoAugment does to `n` images: the changes that there are, and which of them each image
    gets first and second (2, n), counted from 1; 0 stands for none."""
    policies = policy()
    changes = [
        (op, sign * magnitude(op, level, size))
        for steps in policies
        for op, _, level in steps
        for sign in (1, -1 if op in SIGNED else 1)
    ]
    chances = torch.tensor([[p for _, p, _ in steps] for steps in policies])
    which = torch.randint(len(policies), (n,), generator=generator)
    applied = torch.rand(2, n, generator=generator) <= chances[which].T
    negative = torch.rand(2, n, generator=generator) <= 0.5
    row = 1 + 4 * which + 2 * torch.tensor([[0], [1]]) + negative
    return changes, torch.where(applied, row, 0)


LEVELS = 31  # of RandAugment's magnitudes
FACTORS = "Brightness", "Color", "Contrast", "Sharpness"


def randaugment(n: int, size: int, generator) -> tuple[list[tuple[str, float]], Tensor]:
    """The same of RandAugment as semi-supervised training has it: two of fourteen operations, the
    identity among them, each at a magnitude drawn evenly."""
    even = torch.linspace(0, 1, LEVELS).tolist()
    ways = {op: [(op, -0.95 + 0.9 * x) for x in even] for op in FACTORS}  # factors of 0.05 to 0.95
    for op, top in (("Rotate", 30.0), ("ShearX", 0.3), ("ShearY", 0.3)):
        ways[op] = [(op, top * (2 * x - 1)) for x in even]
    for op in ("TranslateX", "TranslateY"):
        ways[op] = [(op, 0.3 * size * (2 * x - 1)) for x in even]
    ways["Posterize"] = [("Posterize", round(4 + 4 * x)) for x in even]  # bits
    ways["Solarize"] = [("Solarize", x) for x in even]
    ways |= {op: [(op, 0.0)] * LEVELS for op in ("AutoContrast", "Equalize")}
    changes = [change for way in ways.values() for change in way]
    row = torch.randint((len(ways) + 1) * LEVELS, (2, n), generator=generator) + 1
    return changes, torch.where(row > len(changes), 0, row)


def cut_out(pixels: Tensor, square: Tensor) -> Tensor:
    """`pixels` (B, 3, S, S) with a grey square of up to half the side; `square` (3, B) in 0..1: its
    side and the place of its middle."""
    size = pixels.shape[-1]
    half, y, x = (square * torch.tensor([[0.25], [1.0], [1.0]], device=square.device)) * size
    place = torch.arange(size, device=pixels.device) + 0.5
    rows, columns = ((place - middle[:, None]).abs() < half[:, None] for middle in (y, x))
    inside = rows[:, None, :, None] & columns[:, None, None, :]
    return pixels.masked_fill(inside, 127)


class Augment:
    """Changes for the images of an epoch, in their order, whose batches have the `bounds`; `changes`
    and `row` as of `autoaugment`."""

    def __init__(
        self,
        changes: list[tuple[str, float]],
        row: Tensor,
        size: int,
        bounds: list[tuple[int, int]],
        device,
    ):
        # a row of numbers for each way in which an image can be changed; the first: not at all
        functions, kinds, rows = [None], [0], [[0.0] * NUMBERS]
        for op, value in changes:
            function, *numbers = numbers_of(op, value, size)
            if function not in functions:
                functions.append(function)
            kinds.append(functions.index(function))
            rows.append(numbers + [0.0] * (NUMBERS - len(numbers)))

        # each batch sorted by function; a group is (function, first or second, from, to)
        kinds, place, self.groups = torch.tensor(kinds), torch.zeros_like(row), []
        for start, stop in bounds:
            groups = []
            for i in (0, 1):
                kind = kinds[row[i, start:stop]]
                place[i, start:stop] = kind.argsort(stable=True)
                row[i, start:stop] = row[i, start:stop][place[i, start:stop]]
                ends = kind.bincount(minlength=len(functions)).cumsum(0).tolist()
                for function, a, b in zip(functions[1:], ends, ends[1:]):
                    if a < b:
                        groups.append((function, i, start + a, start + b))
            self.groups.append(groups)
        self.place = place.to(device, non_blocking=True)
        self.numbers = torch.tensor(rows)[row].to(device, non_blocking=True)

    def __call__(self, k: int, pixels: Tensor) -> Tensor:
        """Batch `k`, changed in place."""
        for function, i, start, stop in self.groups[k]:
            place = self.place[i, start:stop]
            group = pixels.index_select(0, place)
            pixels[place] = function(group, self.numbers[i, start:stop])
        return pixels


# --- the operations: uint8 (B, 3, S, S) and float32 (B, NUMBERS) -> uint8 (B, 3, S, S) -----------


def numbers_of(op: str, magnitude: float, size: int) -> tuple:
    """The function of an operation, and its numbers; those that are factors are 1 + magnitude."""
    half, factor = size / 2, 1.0 + magnitude
    if op in ("ShearX", "ShearY"):
        x, y = (magnitude * (op[-1] == axis) for axis in "XY")
        return affine, *_scaled([1.0, x, x * half, y, 1.0, y * half], half)
    if op in ("TranslateX", "TranslateY"):
        x, y = (-int(magnitude) * (op[-1] == axis) for axis in "XY")
        return affine, *_scaled([1.0, 0.0, x, 0.0, 1.0, y], half)
    if op == "Rotate":
        angle = math.radians(-(magnitude % 360))
        cos, sin = math.cos(angle), math.sin(angle)
        return affine, *_scaled([cos, sin, 0.0, -sin, cos, 0.0], half)
    return {
        "Brightness": (blend, factor, 1 - factor, 0.0, 0.0),
        "Color": (blend, factor, 1 - factor, 1.0, 0.0),
        "Contrast": (blend, factor, 1 - factor, 0.0, 1.0),
        "Sharpness": (sharpness, 1 - factor),
        "Posterize": (posterize, 256 - 2 ** (8 - magnitude)),
        "Solarize": (solarize, 255.0 * magnitude),
        "Invert": (solarize, 0.0),
        "AutoContrast": (autocontrast,),
        "Equalize": (equalize,),
    }[op]


def _scaled(matrix: list[float], half: float) -> list[float]:
    return (torch.tensor(matrix) / half).tolist()


def _columns(numbers: Tensor) -> list[Tensor]:
    return [x.view(-1, 1, 1, 1) for x in numbers.unbind(1)]


def affine(pixels: Tensor, numbers: Tensor) -> Tensor:
    """Each pixel is the one nearest to where the matrix takes its place, or black."""
    size, device = pixels.shape[-1], pixels.device
    middle = torch.linspace((1.0 - size) * 0.5, (size - 1.0) * 0.5, size, device=device)
    x, y = middle.view(1, 1, -1, 1), middle.view(1, -1, 1, 1)
    a, b, c = (part.view(-1, 1, 1, 2) for part in numbers.view(-1, 2, 3).unbind(2))
    # no matrix product, which a GPU may round to ten bits
    grid = (x * a + y * b).add_(c)
    moved = F.grid_sample(pixels.float(), grid, mode="nearest", align_corners=False)
    return moved.to(torch.uint8)


def blend(pixels: Tensor, numbers: Tensor) -> Tensor:
    """Brightness, colour, contrast: towards black, one's own grey, the grey of the whole image."""
    from torchvision.transforms.v2.functional import rgb_to_grayscale

    factor, rest, own, whole, *_ = _columns(numbers)
    grey = rgb_to_grayscale(pixels).float()
    other = grey * own + grey.mean((1, 2, 3), keepdim=True) * whole
    mixed = pixels.float().mul_(factor).addcmul_(other, rest)
    return mixed.clamp_(0, 255).to(torch.uint8)


def sharpness(pixels: Tensor, numbers: Tensor) -> Tensor:
    """Away from, or towards, the mean of 3x3 pixels with five times the middle; not at the edge."""
    out = pixels.float()
    middle = out[..., 1:-1, 1:-1]
    total = (out[..., :-2, :] + out[..., 1:-1, :]).add_(out[..., 2:, :])
    total = (total[..., :-2] + total[..., 1:-1]).add_(total[..., 2:])
    mean = total.add_(middle, alpha=4).div_(13).round_()
    middle.addcmul_(mean.sub_(middle), numbers[:, :1, None, None])
    return out.clamp_(0, 255).to(torch.uint8)


def posterize(pixels: Tensor, numbers: Tensor) -> Tensor:
    return pixels & numbers[:, :1, None, None].to(torch.uint8)


def solarize(pixels: Tensor, numbers: Tensor) -> Tensor:
    threshold = numbers[:, :1, None, None].ceil().to(torch.uint8)
    return pixels ^ (pixels >= threshold).to(torch.uint8).mul_(255)


def autocontrast(pixels: Tensor, _) -> Tensor:
    from torchvision.transforms.v2 import functional

    return functional.autocontrast(pixels)


def equalize(pixels: Tensor, _) -> Tensor:
    from torchvision.transforms.v2 import functional

    return functional.equalize(pixels)


# --- images that are read when they are wanted ---------------------------------------------------


def transform(images: Stream, train: bool):
    """The torchvision transform that makes (3, size, size) of an image's uint8 (3, H, W).

    As for ImageNet: a crop of random scale and shape, mirrored; in the test the centre of the image
    resized to 256 where the size is 224.
    """
    from torchvision.transforms import v2

    size = images.size
    if train:
        steps = [v2.RandomResizedCrop(size), *[v2.RandomHorizontalFlip()] * images.flip]
    else:
        steps = [v2.Resize(round(size * 256 / 224)), v2.CenterCrop(size)]
    return v2.Compose(steps)


@dataclass
class Reader:
    """What a worker does: reader[index, seeds] are those images, uint8 (B, H, W, 3), or a line
    about the one that cannot be read (an exception would come back as a whole traceback)."""

    items: np.ndarray
    transform: torch.nn.Module

    def __getitem__(self, batch: tuple[np.ndarray, np.ndarray]) -> Tensor | str:
        pixels = []
        from torchvision.transforms.v2.functional import pil_to_tensor

        try:
            with torch.random.fork_rng(devices=[]):  # torchvision draws from torch's own generator
                for i, seed in zip(*batch):
                    torch.default_generator.manual_seed(int(seed))
                    image = pil_to_tensor(_open(os.fsdecode(self.items[i])))
                    pixels.append(self.transform(image).permute(1, 2, 0))
        except UserError as error:
            return str(error)
        return torch.stack(pixels).contiguous()


def _leave_signals_to_the_parent(worker: int) -> None:
    """Ctrl-C reaches the workers too: they read on until the step at work is done."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def loader_of(reader, batches, workers: int, device: torch.device, **more):
    """A DataLoader of what `reader` makes of each of `batches`, in processes that leave torch's
    generator and the signals alone."""
    return torch.utils.data.DataLoader(
        reader,
        batch_size=None,  # what the sampler gives is a batch
        sampler=batches,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=_leave_signals_to_the_parent,
        generator=torch.Generator(),  # or it would draw from torch's own
        **more,
    )


def _read(images: Stream, order: Tensor, bounds: list, seeds=None, workers: int | None = None):
    """Yield the uint8 pixels, on the device, of order[start:stop] for each of `bounds`; for
    training where there is a seed for each place of `order`.

    Training's processes go on from epoch to epoch; a test's start anew. Kept as well, they would be
    as many again, with nothing to do through all of training's steps.
    """
    train, workers = seeds is not None, images.workers if workers is None else workers
    workers = min(workers, len(bounds)) if len(bounds) > 1 else 0
    order, draws = (x.numpy() for x in (order, seeds if train else order))
    loader = None
    if train:  # taken away, and put back by a whole epoch alone
        loader, images.loader = images.loader, None
    if loader is None or loader.num_workers != workers:
        reader = Reader(images.items, transform(images, train))
        stays = dict(persistent_workers=train and workers > 0)
        loader = loader_of(reader, [], workers, images.device, **stays)
    loader.sampler[:] = [(order[start:stop], draws[start:stop]) for start, stop in bounds]
    try:
        for pixels in loader:
            if isinstance(pixels, str):
                raise UserError(pixels)
            yield pixels.to(images.device, non_blocking=True)
    except BaseException:
        loader = None  # ends its processes, which a traceback would keep
        raise
    if train:
        images.loader = loader


def _stream(images: Stream, order: Tensor, bounds: list, seeds=None, workers: int | None = None):
    """Yield (img, target, index) for each of `bounds`."""
    scale_shift = _scale_shift(images)
    place = order.to(images.device)
    # the pixels first: zip asks for one more, so that `_read` comes to its end
    for pixels, (start, stop) in zip(_read(images, order, bounds, seeds, workers), bounds):
        index = place[start:stop]
        yield _normalise(pixels, *scale_shift), images.labels[index], index


# --- the datasets: (root, img_size) -> (items, labels) twice, class names, options, notes ---------


def _cifar(kind: str):
    def read(root: Path, img_size: int | None):
        import torchvision

        reader = getattr(torchvision.datasets, kind)
        splits = []
        _no_file(root)
        missing = [x for x in (root / reader.filename, root, *root.parents) if not x.exists()]
        try:
            here = (root / reader.base_folder).is_dir()
            for train in (True, False):
                split = reader(str(root), train=train, download=not here)
                splits.append((split.data, split.targets))
        except Exception as error:  # what a broken archive or network raises
            for path in missing:  # a failed download leaves nothing behind
                with suppress(OSError):
                    path.rmdir() if path.is_dir() else path.unlink()
            raise UserError(
                f"{kind} is not to be had in {root} ({first_line(error)}): put the folder "
                f"{reader.base_folder} there, or a network connection"
            ) from error
        splits = [(_resize_all(x, img_size), y) for x, y in splits]
        return *splits, list(split.classes), dict(flip=True, autoaugment=True), []

    return read


def _no_file(root: Path) -> None:
    for path in (root, *root.parents):
        try:
            if path.exists() and not path.is_dir():
                raise UserError(f"--img_root {root}: {path} is a file, a folder is wanted")
        except OSError as error:
            raise UserError(f"--img_root {root}: {error.strerror}") from error


def _resize_all(pixels: np.ndarray, size: int | None) -> np.ndarray:
    if size in (None, pixels.shape[1]) or _large(size):
        return pixels
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    parts = [
        F.interpolate(part.float(), size=(size, size), mode="bilinear", antialias=True)
        for part in x.split(4096)
    ]
    x = torch.cat([part.round().clamp(0, 255).to(torch.uint8) for part in parts])
    return x.permute(0, 2, 3, 1).numpy()


def _digits(root: Path, img_size: int | None):
    """scikit-learn's 1797 handwritten digits: 8x8 grey, here 32x32 RGB; 1297 to train, 500 to test."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError("--data_name digits needs scikit-learn: pip install scikit-learn") from None
    digits = load_digits()
    grey = np.round(digits.images * (255 / 16)).astype(np.uint8)
    size = 32 if img_size is None or _large(img_size) else img_size
    pixels = _resize_all(np.repeat(grey[..., None], 3, axis=3), size)
    order = np.random.RandomState(0).permutation(len(pixels))
    train, test = order[:1297], order[1297:]
    labels = digits.target
    return (
        (pixels[train], labels[train]),
        (pixels[test], labels[test]),
        [str(digit) for digit in range(10)],
        dict(flip=False),  # a mirrored digit is another sign
        [],
    )


def _folder(*tests: str):
    """ROOT/train/<class>/* and ROOT/<the first of `tests` that is there>/<class>/*."""

    def read(root: Path, img_size: int | None):
        _no_file(root)
        train = root / "train"
        test = next((root / name for name in tests if (root / name).is_dir()), None)
        if not train.is_dir() or test is None:
            raise UserError(
                f"{root}: no image folder: train/<class>/* and {tests[0]}/<class>/* "
                f"(or {tests[1]}) are needed"
            )
        (classes, files, labels, note), second = _list_images(train), _list_images(test)
        odd = [
            f"only in {split.name}: {_some(sorted(set(mine) - set(others)))}"
            for split, mine, others in ((train, classes, second[0]), (test, second[0], classes))
            if set(mine) - set(others)
        ]
        if odd:
            raise UserError(
                f"{root}: the classes of train and {test.name} differ, {'; '.join(odd)}"
            )
        items = [np.array([os.fsencode(path) for path in paths]) for paths in (files, second[1])]
        small = _large(img_size) and all(map(_is_small, chain(*items)))
        if small or not _large(img_size):
            side = None if small else img_size
            items = [_decode(x, side, folder) for x, folder in zip(items, (train, test))]
            sizes = [x.shape[1] for x in items]
            if sizes[0] != sizes[1]:
                raise UserError(
                    f"{root}: train images have {sizes[0]} pixels, {test.name} images {sizes[1]}: "
                    "give --img_size"
                )
        notes = [x for x in (note, second[3]) if x]
        options = dict(flip=True, **dict(autoaugment=True) if small else {})
        return (items[0], labels), (items[1], second[2]), classes, options, notes

    return read


def _is_small(path: bytes) -> bool:
    """Whether an image is one to be kept and enlarged, rather than read when it is wanted."""
    from PIL import Image

    try:
        with Image.open(os.fsdecode(path)) as image:
            return image.width == image.height <= RESIDENT
    except (OSError, ValueError, SyntaxError):  # said when it is read
        return False


def _list_images(folder: Path) -> tuple[list[str], list[str], list[int], str | None]:
    """Class names, paths and labels of the images in `folder`, and a note on what is ignored."""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    classes = sorted(x.name for x in os.scandir(folder) if x.is_dir() and x.name[0] != ".")
    if not classes:
        raise UserError(f"{folder}: no class folders with images in them")
    files, labels, empty, ignored = [], [], [], Counter()
    for label, name in enumerate(classes):
        found = []
        for where, inner, names in os.walk(folder / name):
            inner[:] = [x for x in inner if x[0] != "."]
            for path in (os.path.join(where, x) for x in names if x[0] != "."):
                suffix = os.path.splitext(path)[1].lower()
                if suffix in IMG_EXTENSIONS:
                    found.append(path)
                else:
                    ignored[suffix or "no suffix"] += 1
        files += sorted(found)
        labels += [label] * len(found)
        empty += [] if found else [name]
    if empty:
        raise UserError(f"{folder}, class {_some(empty)}: no images ({', '.join(IMG_EXTENSIONS)})")
    note = f"{folder}: {ignored.total()} file(s) ignored ({_some(sorted(ignored))}): no images"
    return classes, files, labels, note if ignored else None


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _open(path: str):
    """The image in a file, as RGB; transparency is dropped."""
    from PIL import Image

    try:
        if not os.path.isfile(path):  # one that never ends, perhaps
            raise ValueError("no file")
        with Image.open(path) as image:
            if image.mode.startswith("I"):  # 16-bit grey, which PIL would clip at 255
                grey = np.asarray(image).clip(0, 65535) / 257
                image = Image.fromarray(grey.round().astype(np.uint8))
            elif image.mode == "P" and "transparency" in image.info:
                image = image.convert("RGBA")
            elif image.mode == "F":
                raise ValueError("floating-point pixels, of unknown range")
            return image.convert("RGB")
    except Exception as error:  # PIL raises nearly anything on a broken file
        reason = str(error) or type(error).__name__
        raise UserError(f"{path}: not a readable image ({reason}): mend or remove it") from error


def _decode(files: np.ndarray, img_size: int | None, folder: Path) -> np.ndarray:
    from PIL import Image, ImageOps
    from tqdm import tqdm

    pixels, first = None, None
    bar = tqdm(files, f"decoding {folder}", unit="img", mininterval=1, leave=False, disable=None)
    for i, path in enumerate(map(os.fsdecode, bar)):
        image = _open(path)
        if img_size:
            image = ImageOps.fit(image, (img_size, img_size), Image.Resampling.BILINEAR)
        if max(image.size) > RESIDENT:
            raise UserError(
                f"{path} is {image.width}x{image.height} pixels: give --img_size (above {RESIDENT} "
                "images are streamed from disk)"
            )
        first = first or image.size
        if image.size != first or image.width != image.height:
            one, two = (f"{w}x{h}" for w, h in (first, image.size))
            name = os.path.basename(os.fsdecode(files[0]))
            raise UserError(f"{path} is {two} pixels ({name}: {one}): give --img_size")
        if pixels is None:
            pixels = np.empty((len(files), image.height, image.width, 3), np.uint8)
        pixels[i] = np.asarray(image)
    return pixels


DATASETS = {
    "cifar10": _cifar("CIFAR10"),
    "cifar100": _cifar("CIFAR100"),
    "digits": _digits,
    "imagefolder": _folder("test", "val"),
    "imagenet": _folder("val", "test"),  # its test folder, where there is one, has no labels
}
