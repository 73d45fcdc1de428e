"""Batches of whichever kind of images: those on the device (dataset.py), and files of larger ones,
which worker processes read for each batch.

    data = load("imagenet", "./datasets", workers=8)
    for img, target, index in train_batches(data.train, 128, seed=2, epoch=1): ...
    for img, target, index in test_batches(data.test, 512): ...
"""

import os
import signal
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

import dataset
from dataset import Data, Files, Images, normalise, scale_shift_of
from engine import shards
from engine.augment import Rotation, StrongView, autoaugment_view
from engine.published import ROTATED
from engine.readers import reader_of
from engine.shards import open_item
from utils import UserError


def load(
    name: str,
    root: str = "./datasets",
    mean_std: tuple[tuple, tuple] | None = None,
    img_size: int | None = None,
    flip: bool | None = None,
    workers: int = 0,
    **flags,
) -> Data:
    """`dataset.load` of any dataset, or shards, with the normalisation of files measured where it
    is not given. flags: fit, val, seed and unlabeled, see `readers.reader_of`."""
    if name == shards.NAME:
        for flag in ("fit", "val", "unlabeled"):
            if flags.get(flag) is not None:
                raise UserError(f"--{flag} does not work with --data_name {shards.NAME}")
        data = shards.load(root, mean_std, img_size, flip, workers)
    else:
        read = reader_of(name, img_size or dataset.IMG_SIZE.get(name), **flags)
        data = dataset.load(name, root, mean_std, img_size, flip, workers, read)
    train = data.train
    if not isinstance(train, Files):
        return data
    steps = [type(step).__name__ for step in transform(train, train=True).transforms]
    note = f"{workers} workers, streamed from disk; in training {', '.join(steps)}"
    data = replace(data, notes=[*data.notes, note])
    if mean_std is None:
        places, bounds = dataset.sample(train, True, dataset.SAMPLE_BATCH)
        data = data.measured(_read(train, places, bounds), len(places))
    return data


def train_batches(
    images: Images | Files,
    batch_size: int,
    seed: int,
    epoch: int,
    padding: str = "reflect",
    skip: int = 0,
    share: tuple[int, int] = (0, 1),
    two_views: bool = False,
):
    """Yield the batches of one shuffled, augmented epoch, from batch `skip` on; of every batch the
    `share` (rank, world) of one process: (img, target, index), and with `two_views` a second view,
    strongly augmented. Images on the device: see `dataset.train_batches`; files: see `transform`.
    """
    if isinstance(images, Images):
        augment = autoaugment_view if images.enlarged and images.autoaugment else None
        rotated = padding == ROTATED
        if rotated and not images.enlarged:
            augment = Rotation
        yield from dataset.train_batches(
            images,
            batch_size,
            seed,
            epoch,
            pad=0 if rotated else 4,
            padding="zero" if rotated else padding,
            skip=skip,
            share=share,
            augment=augment,
            second_view=StrongView if two_views else None,
        )
        return
    generator = dataset.generator_of(seed, epoch)
    order = torch.randperm(len(images), generator=generator)
    bounds = dataset.batch_bounds(len(images), batch_size, share[1])[skip:]
    seeds = torch.randint(2**63 - 1, (len(images),), generator=generator)
    yield from _stream(images, order, dataset.share_of(bounds, *share), seeds)


def test_batches(
    images: Images | Files,
    batch_size: int | None = None,
    workers: int | None = None,
    share: tuple[int, int] = (0, 1),
):
    """Yield (img, target, index) in order, normalised and otherwise untouched, or enlarged; of
    files resized and cropped by `workers` processes (None: their own number). share: (rank, world),
    for every world-th batch. batch_size: None for 500 images of up to 96 pixels, 100 of 224."""
    batch_size = batch_size or max(1, min(500, 100 * 224**2 // images.size**2))
    if isinstance(images, Images):
        yield from dataset.test_batches(images, batch_size, share)
        return
    rank, world = share
    bounds = dataset.parts_of(len(images), batch_size)[rank::world]
    yield from _stream(images, torch.arange(len(images)), bounds, workers=workers)


def transform(images: Files, train: bool):
    """The torchvision transform that makes (3, size, size) of an image's uint8 (3, H, W).

    As for ImageNet: a crop of random scale and shape, mirrored; in the test the centre of the image
    resized to 256 where the size is 224. With fit 'squash' the whole image is made square: in
    training before the crop, in the test instead of it.
    """
    from torchvision.transforms import v2

    size, squash = images.size, images.fit == "squash"
    larger = round(size * 256 / 224)
    if train:
        steps = [v2.Resize((larger, larger))] * squash
        steps += [v2.RandomResizedCrop(size), *[v2.RandomHorizontalFlip()] * images.flip]
    elif squash:
        steps = [v2.Resize((size, size))]
    else:
        steps = [v2.Resize(larger), v2.CenterCrop(size)]
    return v2.Compose(steps)


@dataclass
class Reader:
    """What a worker does: reader[index, seeds] are those images, uint8 (B, H, W, 3), or a line
    about the one that cannot be read (an exception would come back as a whole traceback)."""

    items: np.ndarray
    transform: torch.nn.Module

    def __getitem__(self, batch: tuple[np.ndarray, np.ndarray]) -> Tensor | str:
        pixels = []
        from torchvision.transforms.v2.functional import pil_to_tensor

        try:
            with torch.random.fork_rng(devices=[]):  # torchvision draws from torch's own generator
                for i, seed in zip(*batch):
                    torch.default_generator.manual_seed(int(seed))
                    image = pil_to_tensor(open_item(os.fsdecode(self.items[i])))
                    pixels.append(self.transform(image).permute(1, 2, 0))
        except UserError as error:
            return str(error)
        return torch.stack(pixels).contiguous()


def _leave_signals_to_the_parent(worker: int) -> None:
    """Ctrl-C reaches the workers too: they read on until the current step is done."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def loader_of(reader, batches, workers: int, device: torch.device, **more):
    """A DataLoader of what `reader` makes of each of `batches`, in processes that leave torch's
    generator and the signals alone."""
    return torch.utils.data.DataLoader(
        reader,
        batch_size=None,  # what the sampler gives is a batch
        sampler=batches,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=_leave_signals_to_the_parent,
        generator=torch.Generator(),  # or it would draw from torch's own
        **more,
    )


def _read(images: Files, order: Tensor, bounds: list, seeds=None, workers: int | None = None):
    """Yield the uint8 pixels, on the device, of order[start:stop] for each of `bounds`; for
    training where there is a seed for each place of `order`.

    Training's processes continue from epoch to epoch; a test's start again. Kept as well, they
    would be as many again, with nothing to do through all of training's steps.
    """
    train, workers = seeds is not None, images.workers if workers is None else workers
    workers = min(workers, len(bounds)) if len(bounds) > 1 else 0
    order, draws = (x.numpy() for x in (order, seeds if train else order))
    loader = None
    if train:  # taken away, and put back by a whole epoch alone
        loader, images.loader = images.loader, None
    if loader is None or loader.num_workers != workers:
        reader = Reader(images.items, transform(images, train))
        stays = dict(persistent_workers=train and workers > 0)
        loader = loader_of(reader, [], workers, images.device, **stays)
    loader.sampler[:] = [(order[start:stop], draws[start:stop]) for start, stop in bounds]
    try:
        for pixels in loader:
            if isinstance(pixels, str):
                raise UserError(pixels)
            yield pixels.to(images.device, non_blocking=True)
    except BaseException:
        loader = None  # ends its processes, which a traceback would keep
        raise
    if train:
        images.loader = loader


def _stream(images: Files, order: Tensor, bounds: list, seeds=None, workers: int | None = None):
    """Yield (img, target, index) for each of `bounds`."""
    scale_shift = scale_shift_of(images)
    place = order.to(images.device)
    # the pixels first: zip asks for one more, so that `_read` comes to its end
    for pixels, (start, stop) in zip(_read(images, order, bounds, seeds, workers), bounds):
        index = place[start:stop]
        yield normalise(pixels, *scale_shift), images.labels[index], index
