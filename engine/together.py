"""Several students in one process: one forward pass of the teacher for all that only read from it,
and for each student the numbers that it would have alone.
"""

from contextlib import contextmanager
from dataclasses import replace

import torch

import network
import utils
from engine.console import Stopped
from engine.distiller import Batch, Distiller
from engine.signals import Signals
from utils import UserError


class SharedTeacher:
    """The forward pass of one teacher for several students.

    A batch's pass is computed when the first student asks for it, and forgotten with `forget`. It
    gives the union of what the students read; each gets what its own pass would have given it.
    """

    def __init__(self, distillers: list[Distiller], precision: utils.Precision):
        """distillers: of the students, with the same teacher network."""
        teachers = [x.teacher for x in distillers]
        kinds = set().union(*(x.kinds for x in teachers))
        stages = sorted(set().union(*(x.numbers for x in teachers)))
        self.tapped = network.Tapped(teachers[0].net, sorted(kinds), tuple(stages))
        self.precision, self.distillers = precision, distillers
        self._views = {}

    @classmethod
    def of(cls, distillers: list[Distiller], precision: utils.Precision) -> "SharedTeacher | None":
        """The teacher of those that only read what its forward pass gives; None of less than two."""
        sharing = [x for x in distillers if x.teacher_is_constant and x.teacher_role == "frozen"]
        return cls(sharing, precision) if len(sharing) > 1 else None

    def forget(self) -> None:
        """The next batch is another one."""
        self._views = {}

    def batch(self, distiller: Distiller, batch: Batch, accumulation_steps: int) -> Batch:
        """The batch with the teacher's features of each micro-batch; unchanged for a student that
        needs a pass of its own."""
        if distiller not in self.distillers:
            return batch
        micros = [micro for micro, _ in batch.micro_batches(accumulation_steps)]
        views = [self._view("img", [x.img for x in micros])]
        if batch.strong is not None:
            views.append(self._view("strong", [x.strong for x in micros]))
        found = []
        for passes in zip(*views):
            plain, *strong = (_as_for(distiller.teacher, x) for x in passes)
            found.append(replace(plain, strong=strong[0]) if strong else plain)
        return replace(batch, teacher=tuple(found))

    def _view(self, name: str, images: list[torch.Tensor]) -> list[network.Features]:
        """The features of one view of the micro-batches."""
        if name not in self._views:
            with torch.no_grad(), self.precision.autocast():
                self._views[name] = [self.tapped(img) for img in images]
        return self._views[name]


def _as_for(tapped: network.Tapped, x: network.Features) -> network.Features:
    """Of the features `x` what `tapped` would have given."""
    places = [x.numbers.index(number) for number in tapped.numbers]
    kept = {}
    for kind in tapped.kinds:
        value = getattr(x, kind)
        kept[kind] = [value[i] for i in places] if isinstance(value, list) else value
    return network.Features(x.out, x.net, numbers=tapped.numbers, **kept)


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
        fails, or a signal stops it, the others go on; `ended` knows why.

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
            raise UserError(f"{', '.join(self.ended)}: failed, see above; the others are finished")
