"""The reader of a dataset by its name, with what the flags make of it (see engine/folders.py)."""

from collections.abc import Callable
from pathlib import Path

import dataset
from engine import tiny_imagenet
from engine.folders import FOLDER, VALIDATED, folder_reader
from engine.parquet import hub_reader
from engine.unlabeled import with_unlabeled
from engine.validation import held_out
from utils import UserError, named

FOLDERS = dict(
    imagefolder=FOLDER,
    imagenet=VALIDATED,  # its test folder, where there is one, has no labels
)
DATASETS = dataset.DATASETS | {"tiny-imagenet": tiny_imagenet.read}


def reader_of(
    name: str,
    img_size: int | None,
    fit: str | None = None,
    val: int | float | None = None,
    seed: int = 0,
    unlabeled: str | None = None,
) -> Callable:
    """The reader of the dataset `name`. fit: 'crop' or 'squash', None for the first; val: how many
    training images, or which share, `seed` chooses for the validation set; unlabeled: a folder of
    images that are trained on without labels."""
    own = name.startswith("hf/") and len(name) > 3  # a folder of Parquet files, or of the hub
    read = own or named(DATASETS | FOLDERS | {"hf/NAME": None}, name, "dataset")
    if fit and name in DATASETS and not unlabeled:
        raise UserError(f"--fit {fit} has no effect: the images of {name} are square")
    if fit and name not in DATASETS and img_size is None:
        raise UserError(f"--fit {fit} has no effect without --img_size N, which resizes images")
    if name in FOLDERS:
        read = folder_reader(FOLDERS[name], fit or "crop", bare=unlabeled is not None)
    if own:
        read = hub_reader(name[3:], fit or "crop")
    if val is not None:
        read = held_out(read, val, seed)
    if unlabeled is not None:
        read = with_unlabeled(read, Path(unlabeled), fit or "crop")
    return read
