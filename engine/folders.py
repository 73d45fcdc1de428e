"""Images in folders, one for each class: small ones are decoded once, the others only listed.

A reader is a function (root, img_size) -> (items, labels) of each split (train, test and perhaps
val), class names, options, notes; `dataset.load` takes it.
"""

import os
from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np

from dataset import DATASETS, RESIDENT, identity_of, is_large, no_file, open_image, some
from utils import UserError, printable, shown

FOLDER, VALIDATED = ("test", "val"), ("val", "test")


def _folder(*tests: str):
    """ROOT/train/<class>/* and ROOT/<test or val>/<class>/*: see `_list_folder`."""

    def read(root: Path, img_size: int | None):
        folders, lists = _list_folder(root, tests)
        items = sources = _paths(*(files for _, files, _, _ in lists))
        small = is_large(img_size) and all(map(_is_small, chain(*items)))
        if small or not is_large(img_size):
            side = None if small else img_size
            items = [_decode(x, side, folder) for x, folder in zip(items, folders)]
            for pixels, folder in zip(items, folders):
                if pixels.shape[1] != items[0].shape[1]:
                    raise UserError(
                        f"{root}: train images have {items[0].shape[1]} pixels, {folder.name} "
                        f"images {pixels.shape[1]}: give --img_size"
                    )
        notes = [note for *_, note in lists if note]
        if len(folders) > 2:
            notes.append(f"the best epoch is chosen on {folders[2]}")
        options = dict(flip=True, sources=sources, **dict(autoaugment=True) if small else {})
        parts = [(x, labels) for x, (_, _, labels, _) in zip(items, lists)]
        return *parts, lists[0][0], options, notes

    return read


def folder_identity(root: Path, tests: tuple[str, ...] = ()) -> dict:
    """`Data.identity` of an image folder, or with VALIDATED of imagenet, without its images being
    read."""
    _, lists = _list_folder(root, tests or FOLDER)
    files = _paths(*(files for _, files, _, _ in lists))
    return identity_of(files, list(map(len, files)), root)


def _list_folder(root: Path, tests: tuple[str, ...]):
    """The folders of the splits, and what `_list_images` says of each: train, and the first of
    `tests` that is there. Of FOLDER both: beside a test folder, val is the validation set."""
    no_file(root)
    train = root / "train"
    there = [root / name for name in tests if (root / name).is_dir()]
    if not train.is_dir() or not there:
        raise UserError(
            f"{root}: no image folder: train/<class>/* and {tests[0]}/<class>/* "
            f"(or {tests[1]}) are needed"
        )
    folders = [train, *(there if tests == FOLDER else there[:1])]
    lists = [_list_images(folder) for folder in folders]
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


def _paths(*splits: list[str]) -> list[np.ndarray]:
    return [np.array([os.fsencode(path) for path in paths]) for paths in splits]


def _is_small(path: bytes) -> bool:
    """Whether an image is one to be kept and enlarged, rather than read when it is wanted."""
    from PIL import Image

    try:
        if not os.path.isfile(path):  # one that never ends, perhaps
            return False
        with Image.open(os.fsdecode(path)) as image:
            return image.width == image.height <= RESIDENT
    except Exception:  # PIL raises nearly anything on a broken file: said when it is read
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
        for where, inner, names in os.walk(folder / name, onerror=_raise):
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
        raise UserError(f"{folder}, class {some(empty)}: no images ({', '.join(IMG_EXTENSIONS)})")
    note = f"{folder}: {ignored.total()} file(s) ignored ({some(sorted(ignored))}): no images"
    return classes, files, labels, note if ignored else None


def _raise(error: OSError) -> None:
    raise error  # os.walk leaves out, without a word, what it may not read


def _decode(files: np.ndarray, img_size: int | None, folder: Path) -> np.ndarray:
    from PIL import Image, ImageOps
    from tqdm import tqdm

    pixels, first = None, None
    bar = tqdm(files, f"decoding {folder}", unit="img", mininterval=1, leave=False, disable=None)
    for i, path in enumerate(map(os.fsdecode, bar)):
        image, path = open_image(path), printable(path)
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
            name = shown(os.path.basename(os.fsdecode(files[0])))
            raise UserError(f"{path} is {two} pixels ({name}: {one}): give --img_size")
        if pixels is None:
            pixels = np.empty((len(files), image.height, image.width, 3), np.uint8)
        pixels[i] = np.asarray(image)
    return pixels


READERS = DATASETS | {
    "imagefolder": _folder(*FOLDER),
    "imagenet": _folder(*VALIDATED),  # its test folder, where there is one, has no labels
}
