"""Training images without labels: feature maps and logits can be compared without them.

Their label is NONE. The cross-entropy and the training accuracy are those of the labelled images
alone.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from dataset import digest_files
from engine.folders import as_bytes, decode, ignored_note, images_in, odd_shapes
from utils import UserError

NONE = -1  # the label


def with_unlabeled(read: Callable, folder: Path, fit: str) -> Callable:
    """A reader of datasets (engine/folders.py) whose training images are followed by those in
    `folder` and the folders in it."""

    def reader(root: Path, img_size: int | None):
        (items, labels), test, *val, classes, options, notes = read(root, img_size)
        if not folder.is_dir():
            raise UserError(f"--unlabeled {folder}: no such folder")
        files, ignored = images_in(folder)
        if not files:
            raise UserError(f"--unlabeled {folder}: no images found")
        (more,) = paths = as_bytes(files)
        notes = [*notes, f"{len(files)} training images without labels from {folder}"]
        if items.ndim > 1:
            side = test[0].shape[1]
            more, odd = decode(more, side, folder, fit)
            notes[-1] += f", as {side}x{side} pixels"
            notes += odd_shapes(odd, len(files), fit)
        note = ignored_note(folder, ignored)
        source, *others = options["sources"]
        source = source if isinstance(source, str) else digest_files(source, root)
        source = hashlib.sha256(f"{source} {digest_files(*paths, folder)}".encode()).hexdigest()
        options["sources"] = [source, *others]
        labels = np.concatenate([np.asarray(labels, np.int64), np.full(len(files), NONE)])
        train = np.concatenate([items, more]), labels
        return train, test, *val, classes, options, [*notes, *[note] * bool(note)]

    return reader


def label_terms(logits: list[Tensor], batch) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The cross-entropies of `logits` over the labelled images of a micro-batch, and what the meter
    adds up: cross-entropy, accuracy and the share of labelled images, as means over all images (see
    `of_the_labelled`). Of no labelled image all are 0.

    batch: has target (B,), and labelled, 0-dim, the share of labelled images in the whole batch.
    """
    n = len(batch.target)
    sums = [F.cross_entropy(x, batch.target, ignore_index=NONE, reduction="sum") for x in logits]
    labelled = batch.labelled.clamp(min=1e-9)
    right = logits[0].detach().argmax(1) == batch.target
    measured = dict(
        ce=sums[0] / n,
        train_top1=100 * right.float().mean(),
        labelled=(batch.target != NONE).float().mean(),
    )
    return [x / n / labelled for x in sums], measured


def of_the_labelled(now: dict[str, float]) -> dict[str, float]:
    """What a meter has read, its cross-entropy and accuracy as means over the labelled images; left
    out where there were none."""
    if "labelled" not in now:
        return now
    share = now["labelled"]
    found = {}
    for name, value in now.items():
        if name not in ("ce", "train_top1", "labelled"):
            found[name] = value
        elif name != "labelled" and share:
            found[name] = value / share
    return found
