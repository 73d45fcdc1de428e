"""A validation set taken from the training images, the same share of every class."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from utils import UserError


def held_out(read: Callable, amount: int | float, seed: int) -> Callable:
    """A reader of datasets (engine/folders.py) that holds `amount` of the training images out as
    the validation set: a number of them, or a share below 1, drawn by `seed`."""

    def reader(root: Path, img_size: int | None):
        train, test, *val, classes, options, notes = read(root, img_size)
        if val:
            raise UserError(f"--val {amount}: {root} already has a val folder; leave --val out")
        items, labels = train[0], np.asarray(train[1], np.int64)
        places = drawn(labels, amount, seed)
        rest = np.setdiff1d(np.arange(len(labels)), places)
        source, *others = options["sources"]
        options["sources"] = [_part(source, rest), *others, _part(source, places)]
        notes = [
            *notes,
            f"validation: {len(places)} of {len(labels)} training images, drawn by seed {seed}; "
            "the best epoch is chosen on them",
        ]
        parts = [(items[rest], labels[rest]), test, (items[places], labels[places])]
        return *parts, classes, options, notes

    return reader


def drawn(labels: np.ndarray, amount: int | float, seed: int) -> np.ndarray:
    """Places of the `amount` images that are held out, in order. Raises UserError if no class
    would be left."""
    n = len(labels)
    count = max(1, round(amount * n)) if isinstance(amount, float) else amount
    present, sizes = np.unique(labels, return_counts=True)
    most = int((sizes - 1).sum())  # one of each class stays
    if count > most:
        raise UserError(
            f"--val {amount}: {count} of {n} training images of {len(present)} classes; at most "
            f"{most} can be held out"
        )
    exact = count * sizes / n
    take = np.minimum(np.floor(exact).astype(np.int64), sizes - 1)
    while take.sum() < count:  # the class that is furthest below its share gets one more
        take[np.argmax(np.where(take < sizes - 1, exact - take, -np.inf))] += 1
    order = np.random.RandomState(seed).permutation(n)
    found = [order[labels[order] == label][:k] for label, k in zip(present, take)]
    return np.sort(np.concatenate(found))


def _part(source, places: np.ndarray):
    """What identifies these images of a split: their files, or a hash of it all and the places."""
    if not isinstance(source, str):
        return source[places]
    return hashlib.sha256(source.encode() + places.astype("<i8").tobytes()).hexdigest()
