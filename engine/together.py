"""Several students in one process: one forward pass of the teacher for all that only read from it,
and for each student the numbers that it would have alone.
"""

from contextlib import contextmanager
from dataclasses import replace

import torch

import dataset
import network
import utils
from engine import cli
from engine.console import Stopped
from engine.distiller import Batch, Distiller
from engine.ensemble import Teachers, union, with_strong
from engine.kd_cli import NONE
from engine.signals import Signals
from engine.teacher_cache import KINDS, CachedTeacher
from utils import UserError


class SharedTeacher:
    """The forward pass of one teacher for several students, or a cache in its place.

    A batch's pass is computed when the first student asks for it. It gives the union of what the
    students read; each gets what its own pass would have given it.

    sharing: the students that share a pass; cached: those of them that read from `cache`.
    """

    def __init__(self, sharing: list[Distiller], precision: utils.Precision):
        self.tapped = union([x.teacher for x in sharing])
        self.sharing, self.precision = sharing, precision
        self.cached, self.cache, self.number, self._views = [], None, 0, {}

    @classmethod
    def of(cls, students: list, data: dataset.Data) -> "SharedTeacher | None":
        """The teacher of those students that only read its forward pass; None if fewer than two
        do and none has a cache. Opens the cache. Raises UserError if that cannot be."""
        only_read = [x for x in students if can_share(x.distiller)]
        cached = [x for x in only_read if x.cfg.teacher_cache and not why_not_cached(x.distiller)]
        if len(only_read) < 2 and not cached:
            return None
        shared = cls([x.distiller for x in only_read], students[0].precision)
        if cached:
            cfg, shared.cached = cached[0].cfg, [x.distiller for x in cached]
            shared.cache = CachedTeacher.of(
                shared.cached, cfg.teacher_cache, data, cfg.padding, shared.precision
            )
            for student in cached:
                student.lines.append(shared.cache.note)
        return shared

    def begin_epoch(self, images, batch_size: int, seed: int, epoch: int) -> None:
        if self.cache:
            self.cache.begin(images, batch_size, seed, epoch)

    def next_batch(self, number: int) -> None:
        """What follows belongs to batch `number` (from 1) of the epoch."""
        self.number, self._views = number, {}

    def batch(self, distiller: Distiller, batch: Batch, accumulation_steps: int) -> Batch:
        """The batch with the teacher's features of each micro-batch; unchanged for a student that
        needs a pass of its own."""
        if distiller not in self.sharing:
            return batch
        micros = [micro for micro, _ in batch.micro_batches(accumulation_steps)]
        if self.cache and distiller in self.cached:
            found = self._from_cache(batch.img, [len(x.img) for x in micros])
            teacher = tuple(_as_for(distiller.teacher, x) for x in found)
            return replace(batch, teacher=teacher)
        views = [self._view("img", [x.img for x in micros])]
        if batch.strong is not None:
            views.append(self._view("strong", [x.strong for x in micros]))
        found = []
        for passes in zip(*views):
            plain, *strong = (_as_for(distiller.teacher, x) for x in passes)
            found.append(with_strong(plain, strong[0]) if strong else plain)
        return replace(batch, teacher=tuple(found))

    def _view(self, name: str, images: list[torch.Tensor]) -> list:
        """The features of one view of the micro-batches."""
        if name not in self._views:
            with torch.no_grad(), self.precision.autocast():
                self._views[name] = [self.tapped(img) for img in images]
        return self._views[name]

    def _from_cache(self, img: torch.Tensor, sizes: list[int]) -> list[network.Features]:
        """The features of micro-batches of these sizes."""
        if "cache" not in self._views:
            self._views["cache"] = self.cache(self.number, img)
        x = self._views["cache"]
        parts = [x.out.split(sizes), sizes if x.feat is None else x.feat.split(sizes)]
        return [
            replace(x, out=out, feat=None if x.feat is None else feat) for out, feat in zip(*parts)
        ]


def can_share(distiller: Distiller) -> bool:
    """Whether a student only reads what a forward pass of the teacher gives."""
    return distiller.teacher_is_constant and distiller.teacher_role == "frozen"


def why_not_cached(distiller: Distiller) -> str:
    """Why a student cannot learn from a cache, or ''."""
    if isinstance(distiller.teacher, Teachers):
        return "has several teachers"
    if distiller.two_views:
        return "sees a second view of each image"
    if not can_share(distiller):
        return "does more than read the teacher's outputs"
    more = distiller.teacher.kinds - set(KINDS)
    return f"reads the teacher's feature maps ({', '.join(sorted(more))})" if more else ""


def _as_for(tapped: network.Tapped | Teachers, x):
    """Of the features `x` what `tapped` would have given."""
    if isinstance(tapped, Teachers):
        return tuple(map(_as_for, tapped.members, x))
    kept = {}
    for kind in tapped.kinds:
        value = getattr(x, kind)
        if isinstance(value, list):
            value = [value[x.numbers.index(number)] for number in tapped.numbers]
        kept[kind] = value
    return network.Features(x.out, x.net, numbers=tapped.numbers, **kept)


def check_together(students: list) -> None:
    """Raise UserError if students cannot see the same batches, or none can use the cache."""
    first = students[0]
    reasons = {x.name: why_not_cached(x.distiller) for x in students if x.distiller.teacher}
    if any(x.cfg.teacher_cache for x in students) and all(reasons.values()):
        why = "; ".join(f"{name} {reason}" for name, reason in reasons.items())
        raise UserError(f"--teacher_cache has no effect: {why}")
    for other in students[1:]:
        if other.cfg.batch_size != first.cfg.batch_size:
            raise UserError(
                f"--kd_mode: protocol {first.cfg.protocol} has batch size {first.cfg.batch_size} "
                f"for {first.name} and {other.cfg.batch_size} for {other.name}: train them in two "
                "commands, or give --batch_size"
            )


SEEN = ("data_name", "img_root", "img_size", "flip", "fit", "val", "unlabeled")


def shared_data(args, cfg, others: list) -> dataset.Data:
    """The data of a student, and of the others, which were checked before it: loaded once.

    Raises UserError if they would see different images.
    """
    if not others:
        return cli.load_data(cfg, args.batch_size)
    first = others[0]
    for name in SEEN:
        own, theirs = getattr(cfg, name, None), getattr(first.cfg, name, None)
        if own != theirs:
            raise UserError(
                f"--{name}: {first.name} would see {theirs}, {cfg.kd_mode} {own}: give --{name}"
            )
    train = first.data.train
    if cfg.mean_std != first.cfg.mean_std:
        own = cfg.mean_std
        if own is None and isinstance(train, dataset.Images):
            own = dataset.measure([train.pixels])
        elif own is None:
            measured = cli.load_data(cfg, args.batch_size).train
            own = measured.mean, measured.std
        if tuple(map(tuple, own)) != (tuple(train.mean), tuple(train.std)):
            raise UserError(
                f"--mean_std: {first.name} would see images normalised with {train.mean}, "
                f"{train.std}, {cfg.kd_mode} with {own[0]}, {own[1]}: give --mean_std"
            )
    return first.data


def same_images(args, others: list) -> None:
    """Let a student without a teacher, who names no dataset, see what the others see."""
    if others and args.kd_mode == NONE and args.data_name is None and not args.s_init:
        for name in ("data_name", "img_root", "img_size", "fit", "mean_std"):
            setattr(args, name, getattr(others[0].cfg, name))


class Group:
    """The students of a command, and what they share: the signals that end them, and the accuracy
    of the teacher. One student alone is a group of one, for which nothing here costs anything."""

    def __init__(self, names: list[str]):
        self.several = len(names) > 1
        self.signals, self.ended = Signals(), {}
        self._random, self._once = {}, {}

    def label(self, name: str) -> str:
        """What a student's lines on the terminal begin with."""
        return f"{name}: " if self.several else ""

    def once(self, key, make):
        """`make()`, called for the first student that asks for `key`."""
        if key not in self._once:
            self._once[key] = make()
        return self._once[key]

    @contextmanager
    def alone(self, student):
        """What a student does as if alone: it draws from a random generator of its own. Where it
        fails, or a signal stops it, the others continue; `ended` knows why.

        student: has `name` and `run`.
        """
        if not self.several:
            yield
            return
        name = student.name
        if name in self._random:
            utils.set_rng_state(self._random[name], exact=True)
        try:
            yield
        except Stopped as stopped:
            self.ended[name] = stopped
        except UserError as error:
            self.ended[name] = error
            student.run.log(f"error: {error}")
        self._random[name] = utils.rng_state()

    def active(self, students: list) -> list:
        """The students that have not ended."""
        return [student for student in students if student.name not in self.ended]

    def close(self) -> None:
        """Raise what ended some of several students: the signal, or what says how many failed."""
        for error in self.ended.values():
            if isinstance(error, Stopped):
                raise error
        if self.ended:
            raise UserError(
                f"{', '.join(self.ended)}: failed (see above); the others have finished"
            )
