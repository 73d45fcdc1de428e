"""Tiny-ImageNet in the folders of its archive, tiny-imagenet-200.

    train/<wnid>/images/*.JPEG
    val/images/*.JPEG, val/val_annotations.txt    (file, wnid and a box in a line): the test set
    words.txt                                     (wnid and words; optional)

A val folder that was sorted into val/<wnid>/* is read, too. The archive's test folder has no
labels.
"""

from pathlib import Path

from dataset import is_large, no_file
from engine.folders import as_bytes, decode, images_in, list_images
from utils import UserError, shown

FOLDER = "tiny-imagenet-200"


def read(root: Path, img_size: int | None):
    """The reader (engine/folders.py) of ROOT/tiny-imagenet-200 or ROOT."""
    no_file(root)
    home = root / FOLDER if (root / FOLDER).is_dir() else root
    train, val = home / "train", home / "val"
    if not train.is_dir() or not val.is_dir():
        raise UserError(
            f"{root}: Tiny-ImageNet not found; {FOLDER}/train/<wnid>/images/* and {FOLDER}/val are "
            "needed"
        )
    wnids, files, labels, _ = list_images(train)
    annotations = val / "val_annotations.txt"
    if annotations.is_file():
        lists = [(files, labels), _annotated(val, annotations, wnids)]
    else:
        others, *second, _ = list_images(val)
        if others != wnids:
            raise UserError(f"{val}: expected {annotations.name}, or the folders of train")
        lists = [(files, labels), tuple(second)]
    sources = as_bytes(*(files for files, _ in lists))
    side = None if img_size is None or is_large(img_size) else img_size
    parts = []
    for paths, folder, (_, numbers) in zip(sources, (train, val), lists):
        pixels, _ = decode(paths, side, folder)
        parts.append((pixels, numbers))
    if parts[0][0].shape[1] != parts[1][0].shape[1]:
        raise UserError(f"{home}: train and val have images of different sizes: give --img_size")
    options = dict(flip=True, autoaugment=True, sources=sources)
    return *parts, _names(home / "words.txt", wnids), options, []


def _annotated(val: Path, annotations: Path, wnids: list[str]) -> tuple[list[str], list[int]]:
    """Paths and labels of the validation images, in order of their paths."""
    numbers, label_of = {wnid: i for i, wnid in enumerate(wnids)}, {}
    for i, line in enumerate(_lines(annotations), 1):
        name, _, rest = line.partition("\t")
        wnid = rest.split("\t")[0]
        if wnid not in numbers:
            raise UserError(f"{annotations}, line {i}: {shown(wnid)} is not a class of train")
        label_of[name] = numbers[wnid]
    files, _ = images_in(val / "images")
    names = [Path(path).name for path in files]
    lacks = [name for name in names if name not in label_of] or sorted(set(label_of) - set(names))
    if lacks:
        raise UserError(f"{annotations}: it and {val / 'images'} differ: {shown(lacks[0])}")
    return files, [label_of[name] for name in names]


def _names(path: Path, wnids: list[str]) -> list[str]:
    """The classes' names: the first word of each in words.txt, with the wnid where it is not one
    class's alone; the wnids without such a file."""
    if not path.is_file():
        return wnids
    words = dict(line.split("\t", 1) for line in _lines(path) if "\t" in line)
    first = [words.get(wnid, wnid).split(",")[0].strip() for wnid in wnids]
    return [
        x if first.count(x) == 1 and x and x.isprintable() else f"{x} ({wnid})".strip()
        for x, wnid in zip(first, wnids)
    ]


def _lines(path: Path) -> list[str]:
    try:
        return [x for x in path.read_text(encoding="utf-8-sig").splitlines() if x.strip()]
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text") from None
