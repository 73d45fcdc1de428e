"""Images in folders, one for each class: small ones are decoded once, the others only listed.

A reader is a function (root, img_size) -> (items, labels) of each split (train, test and perhaps
val), class names, options, notes; `dataset.load` takes it.
"""

import os
from collections import Counter
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

import numpy as np

from dataset import RESIDENT, identity_of, is_large, no_file, open_image, some
from utils import UserError, printable, shown

FOLDER, VALIDATED = ("test", "val"), ("val", "test")
WAYS = dict(crop="the middle is cropped", squash="they are squashed")


def folder_reader(tests: tuple[str, ...], fit: str = "crop", bare: bool = False):
    """The reader of ROOT/train/<class>/* and ROOT/<test or val>/<class>/*: see `_list_folder`.

    fit: what becomes of an image that is not square where all are resized: its middle ('crop'), or
    the whole of it ('squash'). bare: whether train may be missing.
    """

    def read(root: Path, img_size: int | None):
        folders, lists = _list_folder(root, tests, bare)
        items = sources = as_bytes(*(files for _, files, _, _ in lists))
        notes = [note for *_, note in lists if note]
        small = is_large(img_size) and all(map(_is_small, chain(*items)))
        if small or not is_large(img_size):
            side = None if small else img_size
            decoded = [decode(x, side, folder, fit) for x, folder in zip(items, folders)]
            items, odd = zip(*decoded)
            sides = {x.shape[1]: folder for x, folder in zip(items, folders) if len(x)}
            if len(sides) > 1:
                found = ", ".join(f"{x.name} images have {n} pixels" for n, x in sides.items())
                raise UserError(f"{root}: {found}: give --img_size")
            items = [x if len(x) else np.empty((0, *items[1].shape[1:]), np.uint8) for x in items]
            notes += odd_shapes(sum(odd), sum(map(len, items)), fit)
        else:
            notes.append(f"images that are not square: {WAYS[fit]} (--fit {fit})")
        if len(folders) > 2:
            notes.append(f"the best epoch is chosen on {folders[2]}")
        options = dict(flip=True, sources=list(sources), fit=fit)
        options |= dict(autoaugment=True) if small else {}
        parts = [(x, labels) for x, (_, _, labels, _) in zip(items, lists)]
        return *parts, lists[0][0], options, notes

    return read


def odd_shapes(odd: int, count: int, fit: str) -> list[str]:
    """What to say of images of which `odd` are not square."""
    return [f"{odd} of {count} images are not square: {WAYS[fit]} (--fit {fit})"] if odd else []


def folder_identity(root: Path, tests: tuple[str, ...] = ()) -> dict:
    """`Data.identity` of an image folder, or with VALIDATED of imagenet, without its images being
    read."""
    _, lists = _list_folder(root, tests or FOLDER)
    files = as_bytes(*(files for _, files, _, _ in lists))
    return identity_of(files, list(map(len, files)), root)


def _list_folder(root: Path, tests: tuple[str, ...], bare: bool = False):
    """The folders of the splits, and what `list_images` says of each: train, and the first of
    `tests` that is there. Of FOLDER both: next to a test folder, val is the validation set. bare:
    whether train may be missing."""
    no_file(root)
    train = root / "train"
    there = [root / name for name in tests if (root / name).is_dir()]
    if not (train.is_dir() or bare) or not there:
        needed = f"{tests[0]}/<class>/* (or {tests[1]})"
        needed = f"{needed} is" if bare else f"train/<class>/* and {needed} are"
        raise UserError(f"{root}: not an image folder; {needed} needed")
    folders = [train, *(there if tests == FOLDER else there[:1])]
    lists = [list_images(folder) for folder in folders if folder.is_dir()]
    if len(lists) < len(folders):
        lists.insert(0, (lists[0][0], [], [], None))
    for folder, (theirs, *_) in zip(folders[1:], lists[1:]):
        odd = [
            f"only in {split.name}: {some(sorted(set(mine) - set(others)))}"
            for split, mine, others in ((train, lists[0][0], theirs), (folder, theirs, lists[0][0]))
            if set(mine) - set(others)
        ]
        if odd:
            classes = f"the classes of train and {folder.name} differ"
            raise UserError(f"{root}: {classes}, {'; '.join(odd)}")
    return folders, lists


def as_bytes(*splits: list[str]) -> list[np.ndarray]:
    return [np.array([os.fsencode(path) for path in paths], np.bytes_) for paths in splits]


def _is_small(path: bytes) -> bool:
    """Whether an image is small and square: then it is kept and enlarged, not read from its file
    each time."""
    from PIL import Image

    try:
        if not os.path.isfile(path):  # one that never ends, perhaps
            return False
        with Image.open(os.fsdecode(path)) as image:
            return image.width == image.height <= RESIDENT
    except Exception:  # PIL raises nearly anything on a broken file: said when it is read
        return False


def list_images(folder: Path) -> tuple[list[str], list[str], list[int], str | None]:
    """Class names, paths and labels of the images in `folder`, and a note on what is ignored."""
    classes = sorted(x.name for x in os.scandir(folder) if x.is_dir() and x.name[0] != ".")
    if not classes:
        raise UserError(f"{folder}: expected one folder with images per class")
    files, labels, empty, ignored = [], [], [], Counter()
    for label, name in enumerate(classes):
        found, others = images_in(folder / name)
        files += found
        labels += [label] * len(found)
        empty += [] if found else [name]
        ignored += others
    if empty:
        raise UserError(f"{folder}, class {some(empty)}: no images ({', '.join(_suffixes())})")
    return classes, files, labels, ignored_note(folder, ignored)


def images_in(folder: Path) -> tuple[list[str], Counter]:
    """The images in a folder and those in it, in order, and how many other files there are of each
    suffix."""
    found, ignored, suffixes = [], Counter(), _suffixes()
    for where, inner, names in os.walk(folder, onerror=_raise):
        inner[:] = [x for x in inner if x[0] != "."]
        for path in (os.path.join(where, x) for x in names if x[0] != "."):
            suffix = os.path.splitext(path)[1].lower()
            if suffix in suffixes:
                found.append(path)
            else:
                ignored[suffix or "no suffix"] += 1
    return sorted(found), ignored


def ignored_note(folder: Path, ignored: Counter) -> str | None:
    note = f"{folder}: {ignored.total()} file(s) ignored ({some(sorted(ignored))}): no images"
    return note if ignored else None


def _suffixes() -> tuple[str, ...]:
    from torchvision.datasets.folder import IMG_EXTENSIONS

    return IMG_EXTENSIONS


def _raise(error: OSError) -> None:
    raise error  # os.walk leaves out, without a word, what it may not read


def decode(
    files: np.ndarray, img_size: int | None, folder: Path, fit: str = "crop"
) -> tuple[np.ndarray, int]:
    """The pixels (N, H, W, 3) of files in `folder`, and how many of them are not square: see
    `stack`."""
    images = ((path, open_image(path)) for path in map(os.fsdecode, files))
    return stack(images, len(files), img_size, folder, fit)


def stack(
    images: Iterable, count: int, img_size: int | None, origin: Path | str, fit: str = "crop"
) -> tuple[np.ndarray, int]:
    """The pixels (N, H, W, 3) of `count` images (path, PIL's image) of `origin`, and how many are
    not square. img_size: the side to which they are resized; None: they are square and of one size.
    """
    from PIL import Image, ImageOps
    from tqdm import tqdm

    pixels, first, odd = np.empty((0, 0, 0, 3), np.uint8), None, 0
    bar = tqdm(
        images, f"decoding {origin}", count, unit="img", mininterval=1, leave=False, disable=None
    )
    for i, (path, image) in enumerate(bar):
        path = printable(path)
        odd += image.width != image.height
        if img_size and fit == "squash":
            image = image.resize((img_size, img_size), Image.Resampling.BILINEAR)
        elif img_size:
            image = ImageOps.fit(image, (img_size, img_size), Image.Resampling.BILINEAR)
        if max(image.size) > RESIDENT:
            raise UserError(
                f"{path} is {image.width}x{image.height} pixels: give --img_size (above {RESIDENT} "
                "images are streamed from disk)"
            )
        first = first or (image.size, shown(os.path.basename(path)))
        if image.size != first[0] or image.width != image.height:
            one, two = (f"{w}x{h}" for w, h in (first[0], image.size))
            raise UserError(f"{path} is {two} pixels ({first[1]}: {one}): give --img_size")
        if not len(pixels):
            pixels = np.empty((count, image.height, image.width, 3), np.uint8)
        pixels[i] = np.asarray(image)
    return pixels, odd
