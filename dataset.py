"""Datasets, by name: small images, decoded once and kept on the training device as one tensor,
enlarged there if need be, and files of larger ones, which worker processes read when wanted.

    data = load("cifar100", "./datasets")
    for img, target, index in train_batches(data.train, 128, seed=2, epoch=1): ...
    for img, target, index in test_batches(data.test, 512): ...

All the randomness of an epoch (order, crops, flips, AutoAugment; a seed for each image read) is
drawn up front from a generator seeded by (seed, epoch), so batch k of an epoch is a function of the
two, on every device and with any number of workers.
"""

import hashlib
import io
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from utils import UserError, first_line, named, printable, shown

IMG_SIZE = dict(imagenet=224, wds=224)  # the default; other images stay as large as they are
CLASSES = 2, 1_000_000  # how many there may be
SIZES = 5, 4096  # of images, in pixels: mirrored padding needs more than the 4 that it adds

RESIDENT = 96  # pixels: images up to here stay on the device, files of larger ones are streamed
PIECE = 8  # images that a CPU enlarges at a time: less memory to and fro
SAMPLE = 2000  # training images on which the normalisation of larger ones is measured
SAMPLE_BATCH = 50  # of them read at a time


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
class Files(Split):
    """One split whose images, of `size` pixels, are read when wanted, by `workers` processes.

    `items`: the files' paths as an array of bytes (a list of str would be copied into every worker,
    reference count by reference count). `fit`: 'crop', or 'squash' for one that is not square, as a
    whole. `loader`: that of the last whole epoch of training, whose
    processes wait for the next and end with the Files. The rest as in Images.
    """

    items: np.ndarray
    labels: Tensor
    classes: list[str]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    size: int
    flip: bool = True
    workers: int = 0
    fit: str = "crop"
    loader: torch.utils.data.DataLoader | None = field(default=None, init=False, repr=False)

    def to(self, device) -> "Files":
        return replace(self, labels=self.labels.to(device))


@dataclass
class Data:
    """A dataset: its splits, its name, and what the log should say of it.

    `sources`: of each split, the sha256 of its pixels and labels, or the files under `root`; `val`:
    the validation set, on which the best epoch is chosen; None: on the test set.
    """

    name: str
    train: Images | Files
    test: Images | Files
    notes: list[str] = field(default_factory=list)
    sources: tuple = ()
    root: Path = Path()
    val: Images | Files | None = None

    @property
    def splits(self) -> dict[str, Images | Files]:
        found = dict(train=self.train, test=self.test, val=self.val)
        return {name: split for name, split in found.items() if split is not None}

    @property
    def selection(self) -> str:
        """The split on which the best epoch is chosen."""
        return "test" if self.val is None else "val"

    def to(self, device) -> "Data":
        return replace(self, **{name: split.to(device) for name, split in self.splits.items()})

    def measured(self, pixels: Iterable[Tensor], count: int) -> "Data":
        """The same with the normalisation measured on `pixels`, `count` training images."""
        mean, std = measure(pixels)
        splits = {name: replace(x, mean=mean, std=std) for name, x in self.splits.items()}
        of = f"{count} of {len(self.train)} training images"
        note = f"normalisation measured on {of}: mean {mean}, std {std}"
        return replace(self, **splits, notes=[*self.notes, note])

    def identity(self) -> dict:
        """What is the same wherever the data lie, and for no other data: {split: {images,
        sha256}}."""
        return identity_of(self.sources, list(map(len, self.splits.values())), self.root)


def identity_of(sources, counts, root: Path) -> dict:
    """See `Data.identity`. Of files it is the names below `root` and the sizes."""
    found = {}
    for split, source, count in zip(("train", "test", "val"), sources, counts):
        sha = source if isinstance(source, str) else digest_files(source, root)
        found[split] = dict(images=count, sha256=sha)
    return found


def digest_files(files: np.ndarray, root: Path) -> str:
    """The sha256 of the names of files below `root` and their sizes."""
    digest, above = hashlib.sha256(), os.fsencode(root)
    for path in files:
        try:
            size = os.stat(path).st_size
        except OSError as error:
            raise UserError(
                f"{os.fsdecode(path)!r}: not a readable image ({error.strerror}); "
                "repair or remove it"
            ) from error
        digest.update(b"%s\0%d\0" % (path.removeprefix(above).lstrip(b"/\\"), size))
    return digest.hexdigest()


def _digest(pixels: np.ndarray, labels) -> str:
    digest = hashlib.sha256(np.ascontiguousarray(pixels))
    digest.update(np.asarray(labels, np.int64))
    return digest.hexdigest()


def load(
    name: str,
    root: str = "./datasets",
    mean_std: tuple[tuple, tuple] | None = None,
    img_size: int | None = None,
    flip: bool | None = None,
    workers: int = 0,
    read: Callable | None = None,
) -> Data:
    """The dataset `name`, read from `root`; see DATASETS for the names; or `read` by
    another function, as engine/folders.py has them.

    `mean_std`: normalisation; None: measured on the training split. `img_size`: side to which
    images are resized and cropped, files streamed by `workers` processes above RESIDENT; None: what
    they have, and the images of a folder must have one size. `flip`: mirror in training; None: what
    suits the dataset. Raises UserError if the data are missing.
    """
    read = read or named(DATASETS, name, "dataset")
    img_size = img_size or IMG_SIZE.get(name)
    try:
        *parts, classes, options, notes = read(Path(root), img_size)
    except OSError as error:  # a folder that may not be read, or is gone in the meantime
        raise UserError(f"{printable(str(error.filename or root))}: {error.strerror}") from error
    sources, fit = options.pop("sources"), options.pop("fit", "crop")
    if len(parts[0][1]) < 2:
        raise UserError(f"{name}: {len(parts[0][1])} training image(s); at least two are needed")
    if len(classes) < 2:
        raise UserError(f"{name}: {shown(classes[0])} is the only class; at least two are needed")
    if flip is not None:
        options["flip"] = flip
    mean, std = map(tuple, mean_std or ((0.0,) * 3, (1.0,) * 3))
    splits = []
    for items, labels in parts:
        labels = torch.as_tensor(np.asarray(labels), dtype=torch.int64)
        if items.ndim == 1:
            where = img_size, options["flip"], workers, fit
            split = Files(items, labels, classes, mean, std, *where)
        else:
            pixels = torch.from_numpy(np.ascontiguousarray(items))
            if pixels.shape[1] < SIZES[0]:
                raise UserError(
                    f"{name}: images of {pixels.shape[1]} pixels are too small; give --img_size >= "
                    f"{SIZES[0]}"
                )
            split = Images(pixels, labels, classes, mean, std, img_size=img_size, **options)
        splits.append(split)
    train, test, *val = splits
    data = Data(name, train, test, notes, sources, Path(root), *val)
    if isinstance(train, Files):
        return data
    if train.enlarged:
        steps = ["Resize", "RandomCrop"] + ["RandomHorizontalFlip"] * train.flip
        steps += ["AutoAugment"] * train.autoaugment
        pixels = train.pixels.shape[1]
        notes.append(f"{pixels} pixels, enlarged on the device; in training {', '.join(steps)}")
    if mean_std is None:
        size = SAMPLE_BATCH if is_large(img_size) else 4096
        places, bounds = sample(train, is_large(img_size), size)
        shown_pixels = (_shown(train, places[start:stop]) for start, stop in bounds)
        return data.measured(shown_pixels, len(places))
    return data


def sample(train: Images | Files, few: bool, batch_size: int) -> tuple[Tensor, list]:
    """Places of the training images on which the normalisation is measured, all of them or a `few`,
    and the bounds of batches of them."""
    count = min(len(train), SAMPLE) if few else len(train)
    return torch.arange(count) * len(train) // count, parts_of(count, batch_size)


def is_large(img_size: int | None) -> bool:
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
    less than two images for each of `world` processes: batch norm and the relational losses need
    two.
    """
    starts = list(range(0, n, batch_size))
    if 0 < n % batch_size < 2 * world and len(starts) > 1:
        starts.pop()
    return list(zip(starts, starts[1:] + [n]))


def parts_of(n: int, size: int) -> list[tuple[int, int]]:
    return [(start, min(start + size, n)) for start in range(0, n, size)]


def generator_of(seed: int, epoch: int) -> torch.Generator:
    """From which all that an epoch leaves to chance is drawn."""
    mix = np.random.SeedSequence([seed, epoch]).generate_state(1)
    return torch.Generator().manual_seed(int(mix[0]))


def padded(images: Images | Files) -> bool:
    """Whether training crops them at a random place of the padded image."""
    return isinstance(images, Images) and not images.enlarged


def share_of(bounds: list[tuple[int, int]], rank: int, world: int) -> list[tuple[int, int]]:
    """The part of each batch that is one process's. All have as many images: up to world - 1 of a
    batch are left out."""
    each = [(start, (stop - start) // world) for start, stop in bounds]
    return [(start + rank * n, start + (rank + 1) * n) for start, n in each]


def train_batches(
    images: Images,
    batch_size: int,
    seed: int,
    epoch: int,
    pad: int = 4,
    padding: str = "reflect",
    skip: int = 0,
    share: tuple[int, int] = (0, 1),
    augment: Callable | None = None,
    second_view: Callable | None = None,
):
    """Yield (img, target, index) over one shuffled, augmented epoch, from batch `skip` on; of every
    batch the `share` (rank, world) of one process.

    img: float32 (B, 3, H, W) in channels_last, normalised; target, index: int64 (B,).
    A crop at a random place of the image padded by `pad` pixels ('reflect' or 'zero'), then a
    mirror image with probability 1/2 where the dataset allows it. Enlarged, as KnowledgeReview
    trains CIFAR at 224 pixels: resized to 256/224 of the size, a crop at a random place, the mirror
    image. `augment`, `second_view`: (n, size, generator, bounds, device) -> a function that changes
    the uint8 pixels (B, 3, H, W) of batch k (see engine/augment.py). With a `second_view` the
    batches are (img, target, index, a second view of the images), with a crop and a mirror image of
    its own.
    """
    if padding not in ("reflect", "zero"):
        raise UserError(f"expected padding 'reflect' or 'zero', got {padding!r}")
    n, device = len(images), images.device
    generator = generator_of(seed, epoch)
    order = torch.randperm(n, generator=generator)
    bounds = share_of(batch_bounds(n, batch_size, share[1])[skip:], *share)
    size = images.size
    side = round(size * 256 / 224) if images.enlarged else size
    low, high = (0, side - size) if images.enlarged else (-pad, pad)

    windows = _windows(size, low, high, device)
    inside = (windows >= 0) & (windows < size)
    if padding == "zero":
        windows = windows.clamp(0, side - 1)
    elif not images.enlarged:
        windows = size - 1 - (size - 1 - windows.abs()).abs()

    def draw() -> Tensor:
        return draw_windows(images, low, high, generator)

    views = [[draw(), augment and augment(n, size, generator, bounds, device)]]
    if second_view:
        views.append([draw(), second_view(n, size, generator, bounds, device)])
    order = order.to(device, non_blocking=True)
    views = [(which.to(device, non_blocking=True), change) for which, change in views]
    scale_shift = scale_shift_of(images)

    def crop(index: Tensor, which: Tensor) -> Tensor:
        rows, columns = windows[which]
        if images.enlarged:
            return _enlarge(images.pixels[index], rows, columns, side)
        pixels = _gather(images, index, rows, columns)
        if padding == "zero":
            rows, columns = inside[which]
            pixels = pixels * (rows[:, :, None] & columns[:, None, :])[..., None]
        return pixels.permute(0, 3, 1, 2)

    for k, (start, stop) in enumerate(bounds):
        index = order[start:stop]
        batch = []
        for number, (which, change) in enumerate(views):
            pixels = crop(index, which[:, start:stop])
            if number:
                pixels = pixels.contiguous()
            batch.append(change(k, pixels) if change else pixels)
        img, *others = (normalise(_interleave(x), *scale_shift) for x in batch)
        yield img, images.labels[index], index, *others


def test_batches(images: Images, batch_size: int, share: tuple[int, int] = (0, 1)):
    """Yield (img, target, index) in order, normalised and otherwise untouched, or enlarged.
    share: (rank, world), for every world-th batch."""
    index, (rank, world) = torch.arange(len(images)), share
    scale_shift = scale_shift_of(images)
    for i in index.to(images.device).split(batch_size)[rank::world]:
        yield normalise(_shown(images, i), *scale_shift), images.labels[i], i


def draw_windows(images: Images, low: int, high: int, generator) -> Tensor:
    """The numbers of the windows that are each image's rows and its columns (2, n): see
    `_windows`."""
    n = len(images)
    which = torch.randint(low, high + 1, (2, n), generator=generator) - low
    flip = torch.randint(0, 2, (n,), generator=generator)
    which[1] += flip * images.flip * (high + 1 - low)
    return which


def _windows(size: int, low: int, high: int, device) -> Tensor:
    """Every run of `size` places that begins at `low` to `high`, then every one backwards. Looked
    up, so that a batch takes few kernels."""
    ahead = torch.arange(low, high + 1, device=device)[:, None] + torch.arange(size, device=device)
    return torch.cat([ahead, ahead.flip(1)])


def _gather(images: Images, index: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Pixels (rows[b, i], columns[b, j]) of image index[b], uint8 (B, H, W, 3)."""
    # one flat gather of whole pixels: three times as fast as indexing by three tensors
    line = torch.add(rows, index[:, None], alpha=images.size)
    place = torch.add(columns[:, None, :], line[:, :, None], alpha=images.size)
    return images.pixels.view(-1, 3).index_select(0, place.flatten()).view(*place.shape, 3)


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


def scale_shift_of(images: Images | Files) -> tuple[Tensor, Tensor]:
    """What normalises a row of pixels, channel by channel: the inner loop is long instead of
    three."""
    mean, std = (torch.tensor(x, device=images.device) for x in (images.mean, images.std))
    return tuple(x.repeat(images.size) for x in (1 / (255 * std), -mean / std))


def normalise(pixels: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W), stored as channels_last."""
    flat = pixels.flatten(2).float()
    torch.addcmul(shift, flat, scale, out=flat)
    return flat.view(pixels.shape).permute(0, 3, 1, 2)


# --- the datasets: (root, img_size) -> (items, labels) of each split, class names, options, notes -


def _cifar(kind: str):
    def read(root: Path, img_size: int | None):
        import torchvision

        reader = getattr(torchvision.datasets, kind)
        splits = []
        no_file(root)
        missing = [x for x in (root / reader.filename, root, *root.parents) if not x.exists()]
        here = (root / reader.base_folder).is_dir()
        try:
            for train in (True, False):
                split = reader(str(root), train=train, download=not here)
                splits.append((split.data, split.targets))
        except Exception as error:  # what a broken archive or network raises
            for path in missing:  # a failed download leaves nothing behind
                with suppress(OSError):
                    path.rmdir() if path.is_dir() else path.unlink()
            if here:
                raise UserError(
                    f"{root / reader.base_folder} is no whole {kind} ({first_line(error)}): remove "
                    "this folder, and it is downloaded again"
                ) from error
            raise UserError(
                f"{kind} not found in {root} ({first_line(error)}); put the folder "
                f"{reader.base_folder} there, or connect to the network"
            ) from error
        sources = [_digest(x, y) for x, y in splits]
        splits = [(_resize_all(x, img_size), y) for x, y in splits]
        options = dict(flip=True, autoaugment=True, sources=sources)
        return *splits, list(split.classes), options, []

    return read


def no_file(root: Path) -> None:
    for path in (root, *root.parents):
        try:
            if path.exists() and not path.is_dir():
                raise UserError(f"--img_root {root}: expected a folder, but {path} is a file")
        except OSError as error:
            raise UserError(f"--img_root {root}: {error.strerror}") from error


def _resize_all(pixels: np.ndarray, size: int | None) -> np.ndarray:
    if size in (None, pixels.shape[1]) or is_large(size):
        return pixels
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    parts = [
        F.interpolate(part.float(), size=(size, size), mode="bilinear", antialias=True)
        for part in x.split(4096)
    ]
    x = torch.cat([part.round().clamp(0, 255).to(torch.uint8) for part in parts])
    return x.permute(0, 2, 3, 1).numpy()


def _digits(root: Path, img_size: int | None):
    """scikit-learn's 1797 handwritten digits: 8x8 grey, here 32x32 RGB; 1297 to train, 500 to
    test."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError("--data_name digits needs scikit-learn: pip install scikit-learn") from None
    digits = load_digits()
    grey = np.round(digits.images * (255 / 16)).astype(np.uint8)
    size = 32 if img_size is None or is_large(img_size) else img_size
    pixels = _resize_all(np.repeat(grey[..., None], 3, axis=3), size)
    order = np.random.RandomState(0).permutation(len(pixels))
    train, test = order[:1297], order[1297:]
    labels = digits.target
    sources = [_digest(grey[part], labels[part]) for part in (train, test)]
    return (
        (pixels[train], labels[train]),
        (pixels[test], labels[test]),
        [str(digit) for digit in range(10)],
        dict(flip=False, sources=sources),  # a mirrored digit is another sign
        [],
    )


def some(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(map(shown, names[:5])) + more


def open_image(path: str, data: bytes | None = None):
    """The image in a file, or in the bytes `data` that go by the name `path`, as RGB; transparency
    is dropped."""
    from PIL import Image

    try:
        if data is None and not os.path.isfile(path):  # one that never ends, perhaps
            raise ValueError("no file")
        with Image.open(path if data is None else io.BytesIO(data)) as image:
            if image.mode.startswith("I"):  # 16-bit grey, which PIL would clip at 255
                grey = np.asarray(image).clip(0, 65535) / 257
                image = Image.fromarray(grey.round().astype(np.uint8))
            elif image.mode == "P" and "transparency" in image.info:
                image = image.convert("RGBA")
            elif image.mode == "F":
                raise ValueError("floating-point pixels, of unknown range")
            return image.convert("RGB")
    except Exception as error:  # PIL raises nearly anything on a broken file
        raise UserError(
            f"{printable(path)}: not a readable image ({first_line(error)}): repair or remove it"
        ) from error


DATASETS = {  # those of one archive; engine/folders.py has those of files in folders
    "cifar10": _cifar("CIFAR10"),
    "cifar100": _cifar("CIFAR100"),
    "digits": _digits,
}
