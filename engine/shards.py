"""Images in tar files as WebDataset writes them (shards), read in place.

    data = load("shards/train-{0000..0127}.tar", img_size=224, workers=8)

A sample is two members that follow each other, KEY.jpg (or another kind of image) and KEY.cls, its
label as a number. classes.txt next to the shards has the names, a line each. The headers are read
once, at the start; from then on an image is a place in a file. So an epoch sees every image once,
in an order of its own, each process gets its share, and a run resumes inside an epoch, as with a
folder; shards of a folder that were packed in its order give the same numbers. The test images are
in shards of the same name with `test` or `val` in the place of `train`.
"""

import functools
import hashlib
import os
import re
import tarfile
from pathlib import Path

import numpy as np
import torch

from dataset import CLASSES, IMG_SIZE, RESIDENT, Data, Files, open_image
from utils import UserError, first_line, printable

NAME = "wds"
SEPARATOR = "\t"  # between file, offset and size of an item


def load(
    pattern: str,
    mean_std: tuple[tuple, tuple] | None = None,
    img_size: int | None = None,
    flip: bool | None = None,
    workers: int = 0,
) -> Data:
    """The data of the shards that `pattern` names. Raises UserError if they are missing or
    damaged. The normalisation is 0 and 1 where none is given."""
    size = img_size or IMG_SIZE[NAME]
    if size <= RESIDENT:
        raise UserError(
            f"--img_size {size}: shards are read image by image, for sizes above {RESIDENT}; "
            "smaller ones are kept on the device: --data_name imagefolder"
        )
    train, test = paths_of(pattern)
    splits = [_index(train), _index(test)]
    names = _class_names(train[0].parent, max(int(labels.max()) for _, labels, _ in splits) + 1)
    if len(splits[0][0]) < 2 or len(names) < 2:
        raise UserError(f"{pattern}: at least two training images and two classes are needed")
    mean, std = map(tuple, mean_std or ((0.0,) * 3, (1.0,) * 3))
    mirror = True if flip is None else flip
    files = [
        Files(items, torch.from_numpy(labels), names, mean, std, size, mirror, workers)
        for items, labels, _ in splits
    ]
    note = f"{len(train)} training and {len(test)} test shards"
    return Data(NAME, *files, [note], tuple(digest for *_, digest in splits), train[0].parent)


def identity(pattern: str) -> dict:
    """`Data.identity` of shards, without their images being read."""
    found = {}
    for split, paths in zip(("train", "test"), paths_of(pattern)):
        items, _, digest = _index(paths)
        found[split] = dict(images=len(items), sha256=digest)
    return found


def paths_of(pattern: str) -> tuple[list[Path], list[Path]]:
    """The files of both splits. Raises UserError if one is missing."""
    folder, name = os.path.split(pattern)
    if not name.endswith(".tar") or "train" not in name:
        raise UserError(
            f"--img_root {pattern}: expected the training shards, as in "
            "'shards/train-{0000..0127}.tar'"
        )
    train = [Path(folder, x) for x in _expand(name)]
    missing = [path for path in train if not path.is_file()]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise UserError(f"--img_root {pattern}: no file {missing[0]}{more}")
    for other in ("test", "val"):
        kind = re.escape(name).replace("train", other)
        kind = re.sub(r"\\\{\d+\\\.\\\.\d+\\\}", r"\\d+", kind)
        test = sorted(x for x in Path(folder).iterdir() if re.fullmatch(kind, x.name))
        if test:
            return train, test
    raise UserError(f"--img_root {pattern}: test shards (named test or val) not found")


def _expand(name: str) -> list[str]:
    """The names that {0000..0127} stands for."""
    found = re.search(r"\{(\d{1,9})\.\.(\d{1,9})\}", name)
    if not found:
        return [name]
    first, last = int(found[1]), int(found[2])
    if last < first or last - first >= 10**6:
        raise UserError(f"--img_root {name}: {found[0]} is not a valid range of shards")
    width = len(found[1])
    return [
        f"{name[: found.start()]}{i:0{width}}{name[found.end() :]}" for i in range(first, last + 1)
    ]


def _index(paths: list[Path]) -> tuple[np.ndarray, np.ndarray, str]:
    """Items, labels, and a digest of names, sizes and labels."""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    items, labels, digest = [], [], hashlib.sha256()
    for path in paths:
        try:
            with tarfile.open(path, "r:") as archive:
                waiting = {}
                for member in archive:
                    key, dot, suffix = member.name.rpartition(".")
                    if (
                        not member.isfile()
                        or suffix != "cls"
                        and f".{suffix}".lower() not in IMG_EXTENSIONS
                    ):
                        continue
                    before = waiting.pop(key, None)
                    if before is None:
                        waiting[key] = member
                        continue
                    image, label = (before, member) if suffix == "cls" else (member, before)
                    number = int(archive.extractfile(label).read(30))
                    if not 0 <= number < CLASSES[1]:
                        raise ValueError(f"{label.name} is {number}, which is not a label")
                    places = str(path), str(image.offset_data), str(image.size)
                    items.append(os.fsencode(SEPARATOR.join(places)))
                    labels.append(number)
                    digest.update(b"%s\0%d\0%d\0" % (os.fsencode(image.name), image.size, number))
                if waiting:
                    raise ValueError(f"{next(iter(waiting))} needs both an image and a label")
        except (OSError, ValueError, tarfile.TarError, EOFError) as error:
            raise UserError(
                f"{printable(str(path))}: not a shard of images ({first_line(error)})"
            ) from error
    if not items:
        raise UserError(f"{paths[0]}: no images found (KEY.jpg and KEY.cls)")
    return np.array(items), np.array(labels, np.int64), digest.hexdigest()


def _class_names(folder: Path, count: int) -> list[str]:
    """The lines of classes.txt, or numbers."""
    path = folder / "classes.txt"
    if not path.exists():
        return [str(i) for i in range(count)]
    try:
        lines = os.fsdecode(path.read_bytes()).splitlines()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error
    if len(lines) < count or len(set(lines)) < len(lines):
        raise UserError(
            f"{path}: {len(set(lines))} class names, but the shards have {count} classes"
        )
    return lines


def open_item(item: str):
    """The image at an item of `load`, or in a file, as RGB."""
    path, *place = item.rsplit(SEPARATOR, 2)
    if not place:
        return open_image(item)
    offset, size = map(int, place)
    try:
        data = os.pread(_opened(path).fileno(), size, offset)
    except OSError as error:
        raise UserError(f"{printable(path)} cannot be read ({error.strerror})") from error
    return open_image(f"{path}, {size} bytes from byte {offset}", data)


@functools.lru_cache(maxsize=256)
def _opened(path: str):
    """The file; up to 256 files stay open."""
    return open(path, "rb", buffering=0)
