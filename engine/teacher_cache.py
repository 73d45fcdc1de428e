"""What a teacher says of every view of the training images, computed once and kept on disk.

A crop of an image padded by 4 pixels, mirrored or not, is one of 9 * 9 * 2 = 162 views. The file
has a row for each view of each image, filled when a view is first met.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import dataset
import network
import utils
from engine import stream
from engine.checkpoint import write_file
from engine.distiller import Distiller
from engine.published import ROTATED
from utils import UserError

KINDS = ("out", "feat")  # what is small enough to be kept


class TeacherCache:
    """Logits and pooled features of a teacher, in a file for each.

    A row is valid where its checksum agrees: whatever a killed process, a crash of the machine or
    two processes at once have left there is found and computed again.
    """

    def __init__(self, folder: str | Path, key: dict, images: int, widths: dict[str, tuple]):
        """key: what the values depend on, a part of the files' names. images: their number; widths:
        {kind: (values in a row, dtype)}. Raises UserError if the disk has no room."""
        self.folder, self.views = Path(folder), view_count()
        text = json.dumps(key, sort_keys=True, indent=1)
        name = f"{key['network']}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
        self.name = name.replace("/", "_")
        self.rows, self.widths = images * self.views, widths
        self.bytes = sum(self.rows * (w * dtype.itemsize + 4) for w, dtype in widths.values())
        self.text = text
        self.kept = {}

    def open(self) -> str:
        """Make or open the files. Returns what to log."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            new = sum(
                size for path, size in self._files() if not path.exists() or _reserved(path) < size
            )
            free = shutil.disk_usage(self.folder).free
            if new > free:
                raise UserError(
                    f"--teacher_cache {self.folder}: it needs {_size(self.bytes)}, but only "
                    f"{_size(free)} are free; give another folder, or leave the flag out"
                )
            about = self.folder / f"{self.name}.json"
            if not about.exists():
                write_file(about, self.text.encode())
            for path, size in self._files():
                with open(path, "ab"):
                    pass
                with open(path, "r+b") as file:  # reserved: a full disk would kill us later
                    if hasattr(os, "posix_fallocate"):
                        os.posix_fallocate(file.fileno(), 0, size)
                    elif path.stat().st_size < size:
                        file.truncate(size)
        except OSError as error:
            raise UserError(
                f"--teacher_cache {self.folder} cannot be written ({error.strerror})"
            ) from error
        for kind, (width, dtype) in self.widths.items():
            values = np.memmap(
                self._path(kind), np.uint8, "r+", shape=(self.rows, width * dtype.itemsize)
            )
            checks = np.memmap(self._path(f"{kind}.check"), np.uint32, "r+", shape=(self.rows,))
            self.kept[kind] = values, checks
        return f"teacher cache {self.folder / self.name}: {_size(self.bytes)}, {self.filled()}"

    def _files(self) -> list[tuple[Path, int]]:
        found = []
        for kind, (width, dtype) in self.widths.items():
            found.append((self._path(kind), self.rows * width * dtype.itemsize))
            found.append((self._path(f"{kind}.check"), self.rows * 4))
        return found

    def _path(self, kind: str) -> Path:
        return self.folder / f"{self.name}.{kind}"

    def filled(self) -> str:
        """Which share of the views is there, in words."""
        share = min(np.count_nonzero(checks) / self.rows for _, checks in self.kept.values())
        return f"{100 * share:.1f} % of the views are filled"

    def read(self, index: np.ndarray, view: np.ndarray) -> tuple[dict[str, Tensor], np.ndarray]:
        """{kind: (B, width) on the CPU} of views of images, and which of them are there (B,)."""
        rows = index * self.views + view
        found, there = {}, np.ones(len(rows), bool)
        for kind, (values, checks) in self.kept.items():
            value = values[rows]
            there &= checks[rows] == _checksums(value)
            found[kind] = torch.from_numpy(value).view(self.widths[kind][1])
        return found, there

    def write(self, index: np.ndarray, view: np.ndarray, found: dict[str, Tensor]) -> None:
        """Keep {kind: (B, width) on the CPU}."""
        rows = index * self.views + view
        for kind, (values, checks) in self.kept.items():
            value = found[kind].contiguous().view(torch.uint8).numpy()
            values[rows] = value
            checks[rows] = _checksums(value)


class CachedTeacher:
    """The teacher of students that read its logits and pooled features alone: from the cache, and
    where a view is not there yet, by a forward pass of the images that lack.

    note: what to log. passes: how many forward passes there were.
    """

    def __init__(self, tapped: network.Tapped, cache: TeacherCache, precision: utils.Precision):
        self.tapped, self.cache, self.precision = tapped, cache, precision
        self.batches, self.passes, self.note = [], 0, cache.open()

    @classmethod
    def of(cls, distillers: list[Distiller], folder, data, padding, precision) -> "CachedTeacher":
        """For `distillers`, which have one teacher, and training images that stay on the device.
        Raises UserError for other images."""
        images = data.train
        if not isinstance(images, dataset.Images) or images.enlarged or padding == ROTATED:
            raise UserError(
                "--teacher_cache: these images have more than the 162 views of a crop of small "
                "images: leave it out"
            )
        teacher = distillers[0].teacher
        kinds = sorted(set().union(*(x.teacher.kinds for x in distillers)))
        tapped = network.Tapped(teacher.net, kinds)
        with torch.no_grad(), precision.autocast():
            x = tapped(next(stream.train_batches(images, 2, 0, 1, padding=padding))[0])
        widths = {k: (getattr(x, k).shape[1], getattr(x, k).dtype) for k in ("out", *kinds)}
        key = dict(
            network=type(teacher.net).__name__,
            weights=_digest(teacher.net),
            images=data.identity()["train"],
            size=images.size,
            padding=padding,
            mirrored=images.flip,
            mean=images.mean,
            std=images.std,
            values={kind: [w, str(dtype)] for kind, (w, dtype) in widths.items()},
            device=precision.device.type,
            precision=str(precision),
        )
        return cls(tapped, TeacherCache(folder, key, len(images), widths), precision)

    def begin(self, images, batch_size: int, seed: int, epoch: int) -> None:
        """An epoch begins."""
        self.batches = train_views(images, batch_size, seed, epoch, utils.share())

    def __call__(self, number: int, img: Tensor) -> network.Features:
        """The teacher's features of batch `number` (from 1), whose images are `img`."""
        index, view = self.batches[number - 1]
        found, there = self.cache.read(index, view)
        device = img.device
        pinned = device.type == "cuda"
        values = {
            kind: (x.pin_memory() if pinned else x).to(device, non_blocking=pinned)
            for kind, x in found.items()
        }
        if not there.all():
            self.passes += 1
            values = self._fill(img, index, view, values, np.flatnonzero(~there))
        return network.Features(net=self.tapped.net, **values)

    def _fill(self, img, index, view, values, lack) -> dict[str, Tensor]:
        """`values` with what a forward pass of the images at the places `lack` gives; kept, too."""
        places = torch.from_numpy(lack).to(img.device)
        with torch.no_grad(), self.precision.autocast():
            x = self.tapped(img.index_select(0, places))
        fresh = {kind: getattr(x, kind) for kind in values}
        self.cache.write(index[lack], view[lack], {k: v.cpu() for k, v in fresh.items()})
        return {kind: values[kind].index_copy(0, places, fresh[kind]) for kind in values}


def view_count(pad: int = 4) -> int:
    """How many views an image has: crops of it padded by `pad` pixels, and their mirror images."""
    return 2 * (2 * pad + 1) ** 2


def train_views(
    images: dataset.Images, batch_size: int, seed: int, epoch: int, share=(0, 1), pad: int = 4
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(index, view) of the images in each batch of `dataset.train_batches`, on the CPU: which
    image, and the number of its view, below `view_count`."""
    generator = dataset.generator_of(seed, epoch)
    order = torch.randperm(len(images), generator=generator)
    rows, columns = dataset.draw_windows(images, -pad, pad, generator)
    view = rows * (2 * (2 * pad + 1)) + columns
    bounds = dataset.share_of(dataset.batch_bounds(len(images), batch_size, share[1]), *share)
    return [(order[i:j].numpy(), view[i:j].numpy()) for i, j in bounds]


def _digest(net: torch.nn.Module) -> str:
    """The sha256 of a network's weights."""
    digest = hashlib.sha256()
    for name, value in net.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _checksums(values: np.ndarray) -> np.ndarray:
    """A number above 0 for each row of bytes (B, width): a weighted sum of its halves of words."""
    if values.shape[1] % 2:
        values = np.pad(values, ((0, 0), (0, 1)))
    words = values.view(np.uint16).astype(np.uint64)
    weights = np.arange(1, 2 * words.shape[1], 2, dtype=np.uint64) * np.uint64(2654435761)
    return ((words * weights % np.uint64(2**32 - 5)).sum(1) % np.uint64(2**32 - 1) + 1).astype(
        np.uint32
    )


def _reserved(path: Path) -> int:
    """The bytes that a file has on disk."""
    return path.stat().st_blocks * 512


def _size(count: float) -> str:
    """Bytes in words."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
