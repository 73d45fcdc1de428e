"""Every dataset, by name: small images, decoded once and kept on the training device as one tensor.

    data = load("cifar100", "./datasets")
    for img, target, index in train_batches(data.train, 128, seed=2, epoch=1): ...
    for img, target, index in test_batches(data.test, 512): ...

All the randomness of an epoch (order, crops, flips) is drawn up front from a generator seeded by
(seed, epoch), so batch k of an epoch is a function of the two, on every device.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from utils import UserError, named


@dataclass
class Images:
    """One split, resident: `pixels` uint8 (N, H, W, 3), `labels` int64 (N,); `pixels[i]` is RGB.

    `mean`, `std`: per channel, of pixels scaled to 0..1; `flip`: whether training mirrors images.
    """

    pixels: Tensor
    labels: Tensor
    classes: list[str]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    flip: bool = True

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_class(self) -> int:
        return len(self.classes)

    @property
    def size(self) -> int:
        return self.pixels.shape[1]

    def to(self, device) -> "Images":
        return replace(self, pixels=self.pixels.to(device), labels=self.labels.to(device))


@dataclass
class Data:
    """A dataset: its two splits and its name."""

    name: str
    train: Images
    test: Images

    def to(self, device) -> "Data":
        return replace(self, train=self.train.to(device), test=self.test.to(device))


def load(
    name: str,
    root: str = "./datasets",
    mean_std: tuple[tuple, tuple] | None = None,
    img_size: int | None = None,
    flip: bool | None = None,
) -> Data:
    """The dataset `name`, read from `root`; see DATASETS for the names.

    `mean_std`: normalisation; None: measured on the training split. `img_size`: side to which the
    images of a folder are resized and cropped; None: they must have one size already. `flip`: mirror
    in training; None: what suits the dataset. Raises UserError where the data cannot be had.
    """
    train, test, classes, mirror = named(DATASETS, name, "dataset")(Path(root), img_size)
    mean, std = mean_std or measure(train[0])
    mirror = mirror if flip is None else flip
    splits = [
        Images(
            torch.from_numpy(np.ascontiguousarray(pixels)),
            torch.as_tensor(np.asarray(labels), dtype=torch.int64),
            classes,
            tuple(mean),
            tuple(std),
            mirror,
        )
        for pixels, labels in (train, test)
    ]
    if len(splits[0]) < 2:
        raise UserError(f"{name}: {len(splits[0])} training image(s): at least two are needed")
    return Data(name, *splits)


def measure(pixels: np.ndarray) -> tuple[tuple, tuple]:
    """Mean and standard deviation per channel of uint8 images (N, H, W, 3), scaled to 0..1."""
    values = np.arange(256) / 255.0
    mean, std = [], []
    for channel in range(3):
        count = np.bincount(pixels[..., channel].ravel(), minlength=256)
        share = count / count.sum()
        mean.append(round(float(share @ values), 4))
        std.append(round(float(np.sqrt(share @ (values - share @ values) ** 2)), 4) or 1.0)
    return tuple(mean), tuple(std)


# --- batches -------------------------------------------------------------------------------------


def batch_bounds(n: int, batch_size: int) -> list[tuple[int, int]]:
    """Where each training batch begins and ends. A single image left over joins the last batch:
    batch norm and the relational losses need two."""
    starts = list(range(0, n, batch_size))
    if n % batch_size == 1 and len(starts) > 1:
        starts.pop()
    return list(zip(starts, starts[1:] + [n]))


def train_batches(
    images: Images,
    batch_size: int,
    seed: int,
    epoch: int,
    pad: int = 4,
    padding: str = "reflect",
    skip: int = 0,
):
    """Yield (img, target, index) over one shuffled, augmented epoch, from batch `skip` on.

    img: float32 (B, 3, H, W) in channels_last, normalised; target, index: int64 (B,).
    A crop at a random place of the image padded by `pad` pixels ('reflect' or 'zero'), then a mirror
    image with probability 1/2 where the dataset allows it.
    """
    if padding not in ("reflect", "zero"):
        raise UserError(f"padding must be reflect or zero, not {padding!r}")
    n, device = len(images), images.pixels.device
    mix = np.random.SeedSequence([seed, epoch]).generate_state(1)
    generator = torch.Generator().manual_seed(int(mix[0]))
    order = torch.randperm(n, generator=generator)
    shift = torch.randint(-pad, pad + 1, (2, n), generator=generator)
    flip = torch.randint(0, 2, (n,), generator=generator).bool() & images.flip
    order, shift, flip = (x.to(device, non_blocking=True) for x in (order, shift, flip))
    scale_shift = _scale_shift(images)
    arange = torch.arange(images.size, device=device)
    for start, stop in batch_bounds(n, batch_size)[skip:]:
        index = order[start:stop]
        rows = arange + shift[0, start:stop, None]
        columns = torch.where(flip[start:stop, None], arange.flip(0), arange)
        columns = columns + shift[1, start:stop, None]
        pixels = _gather(images, index, rows, columns, padding)
        yield _normalise(pixels, *scale_shift), images.labels[index], index


def test_batches(images: Images, batch_size: int):
    """Yield (img, target, index) in order, normalised and otherwise untouched."""
    index = torch.arange(len(images), device=images.pixels.device)
    scale_shift = _scale_shift(images)
    for i in index.split(batch_size):
        yield _normalise(images.pixels[i], *scale_shift), images.labels[i], i


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


def _scale_shift(images: Images) -> tuple[Tensor, Tensor]:
    """What normalises a row of pixels, channel by channel: the inner loop is long instead of three."""
    mean, std = (torch.tensor(x, device=images.pixels.device) for x in (images.mean, images.std))
    return tuple(x.repeat(images.size) for x in (1 / (255 * std), -mean / std))


def _normalise(pixels: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W), stored as channels_last."""
    flat = torch.addcmul(shift, pixels.flatten(2).float(), scale)
    return flat.view(pixels.shape).permute(0, 3, 1, 2)


# --- the datasets: (root, img_size) -> (pixels, labels) twice, class names, whether to mirror -----


def _cifar(kind: str):
    def read(root: Path, img_size: int | None):
        import torchvision

        reader = getattr(torchvision.datasets, kind)
        splits = []
        try:
            here = (root / reader.base_folder).is_dir()
            for train in (True, False):
                split = reader(str(root), train=train, download=not here)
                splits.append((split.data, split.targets))
        except (RuntimeError, OSError, EOFError, ValueError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise UserError(
                f"{kind} is not to be had in {root} ({reason}): put the folder "
                f"{reader.base_folder} there, or a network connection"
            ) from error
        splits = [(_resize_all(x, img_size), y) for x, y in splits]
        return *splits, list(split.classes), True

    return read


def _resize_all(pixels: np.ndarray, size: int | None) -> np.ndarray:
    if size in (None, pixels.shape[1]):
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
    pixels = _resize_all(np.repeat(grey[..., None], 3, axis=3), img_size or 32)
    order = np.random.RandomState(0).permutation(len(pixels))
    train, test = order[:1297], order[1297:]
    labels = digits.target
    return (
        (pixels[train], labels[train]),
        (pixels[test], labels[test]),
        [str(digit) for digit in range(10)],
        False,  # a mirrored digit is another sign
    )


def _imagefolder(root: Path, img_size: int | None):
    """ROOT/train/<class>/* and ROOT/test/<class>/* (or val)."""
    train = root / "train"
    test = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
    if not train.is_dir() or test is None:
        raise UserError(f"{root}: no image folder: train/<class>/* and test/<class>/* are needed")
    classes, train_files = _list_images(train)
    test_classes, test_files = _list_images(test)
    if test_classes != classes:
        odd = sorted(set(classes) ^ set(test_classes))
        raise UserError(
            f"{root}: train and {test.name} differ in their classes: {', '.join(odd[:5])}"
        )
    splits = []
    for folder, files in ((train, train_files), (test, test_files)):
        pixels = _decode(files, img_size, folder)
        splits.append((pixels, [label for _, label in files]))
    if splits[0][0].shape[1:] != splits[1][0].shape[1:]:
        sizes = " and ".join(f"{x.shape[2]}x{x.shape[1]}" for x, _ in splits)
        raise UserError(f"{root}: train and {test.name} images are {sizes} pixels: give --img_size")
    return *splits, classes, True


def _list_images(folder: Path) -> tuple[list[str], list[tuple[Path, int]]]:
    from torchvision.datasets.folder import IMG_EXTENSIONS

    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    files = []
    for label, name in enumerate(classes):
        found = sorted(
            path for path in (folder / name).rglob("*") if path.suffix.lower() in IMG_EXTENSIONS
        )
        if not found:
            raise UserError(f"{folder / name}: no images ({', '.join(IMG_EXTENSIONS)})")
        files += [(path, label) for path in found]
    if not files:
        raise UserError(f"{folder}: no class folders with images in them")
    return classes, files


def _decode(files: list[tuple[Path, int]], img_size: int | None, folder: Path) -> np.ndarray:
    from PIL import Image, ImageOps
    from tqdm import tqdm

    pixels, first = None, None
    for i, (path, _) in enumerate(
        tqdm(files, f"decoding {folder}", unit="img", mininterval=1, leave=False)
    ):
        try:
            with Image.open(path) as image:
                image = image.convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise UserError(f"{path}: not a readable image ({error})") from error
        if img_size:
            image = ImageOps.fit(image, (img_size, img_size), Image.Resampling.BILINEAR)
        first = first or image.size
        if image.size != first or image.width != image.height:
            one, two = (f"{w}x{h}" for w, h in (first, image.size))
            raise UserError(f"{path} is {two} pixels ({files[0][0].name}: {one}): give --img_size")
        if pixels is None:
            pixels = np.empty((len(files), image.height, image.width, 3), np.uint8)
        pixels[i] = np.asarray(image)
    return pixels


DATASETS = {
    "cifar10": _cifar("CIFAR10"),
    "cifar100": _cifar("CIFAR100"),
    "digits": _digits,
    "imagefolder": _imagefolder,
}
