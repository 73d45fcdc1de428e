"""A student in training: what is its own, its phases one after another, its checkpoints."""

from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

import dataset
import utils
from engine import distributed
from engine.checkpoint import Weights
from engine.distiller import Distiller
from engine.run import Run
from engine.schedule import learning_rate, loss_weights, remaining_phases
from kd_losses import Phase


@dataclass
class Student:
    """A student in training, and everything that is its own.

    name: its --kd_mode; found: what is known of its initial weights and of its teacher's file;
    lines: the summary. What follows `step` belongs to the current epoch.
    """

    name: str
    run: Run
    distiller: Distiller
    data: dataset.Data
    cfg: Namespace
    precision: utils.Precision
    phases: list[tuple[Phase, int]]
    found: tuple[Weights | None, Weights]
    lines: list[str] = field(default_factory=list)
    step: Callable[..., dict[str, Tensor]] | None = None
    phase: Phase | None = None
    epoch: int = 0
    epochs: int = 0
    lr: float = 0.0
    done: int = 0
    optimizer: torch.optim.Optimizer | None = None
    meter: utils.Meter | None = None
    weights: dict[str, float] = field(default_factory=dict)

    def __post_init__(self):
        self.remaining = self._remaining()
        n, batch_size = len(self.data.train), self.cfg.batch_size
        self.steps = len(dataset.batch_bounds(n, batch_size, utils.world()))

    @property
    def row(self) -> int:
        """The number of the current epoch among those of all phases."""
        return len(self.run.history) + 1

    @property
    def finished(self) -> bool:
        return self.row > sum(epochs for _, epochs in self.phases)

    @property
    def where(self) -> str:
        return f"{self.phase.name} epoch {self.epoch}"

    def begin_epoch(self) -> None:
        """Choose phase, optimizer and learning rate. `done` is the number of its steps that are
        done."""
        self.phase, self.epoch, self.epochs = next(self.remaining)
        self.lr = learning_rate(self.phase, self.epoch, self.epochs, self.cfg)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        self.distiller.set_trainable(self.phase)  # evaluation has put the networks into eval mode
        self.meter, self.done = self.run.begin()
        done = (self.epoch - 1) / self.epochs
        self.weights = loss_weights(self.distiller, self.phase, done, self.cfg)

    def _remaining(self) -> Iterator[tuple[Phase, int, int]]:
        """Yield (phase, epoch, epochs of the phase) of what is left; with a fresh optimizer where
        a phase begins."""
        run, distiller = self.run, self.distiller
        for phase, first, epochs in remaining_phases(self.phases, len(run.history)):
            groups = distiller.param_groups(phase)
            self.optimizer = run.watch(utils.sgd(groups, self.cfg, phase.nesterov))
            if run.saved:
                restore(run, distiller, first, self.optimizer, self.precision)
                run.saved = None
            for epoch in range(first, epochs + 1):
                yield phase, epoch, epochs


def state(student: Student) -> dict:
    """What a checkpoint holds besides what `Run` adds."""
    distiller, phase = student.distiller, student.phase
    distributed.average_batch_norms(*distiller.networks, distiller.added)
    weights = dict(snet=distiller.deployed.state_dict(), meta=student.run.meta)
    if phase.teacher_learns:  # KD-Zoo's names for two networks that learn
        weights |= dict(net1=distiller.teacher.net.state_dict(), net2=weights["snet"])
    return dict(
        weights=weights,
        kd=distiller.added.state_dict(),
        optimizer=student.optimizer.state_dict(),
        **student.precision.state(),
    )


def restore(run: Run, distiller: Distiller, first: int, optimizer, precision) -> None:
    """Load the run's checkpoint. Where a phase begins, at its epoch `first` = 1 and before any of
    its steps, the optimizer is a new one."""
    saved = run.saved
    distiller.deployed.load_state_dict(saved["snet"])
    if "net1" in saved:
        distiller.teacher.net.load_state_dict(saved["net1"])
    utils.load_state(distiller.added, saved["kd"])
    if first > 1 or run.inside:
        utils.load_optimizer(optimizer, saved["optimizer"])
    precision.load(saved)
    utils.set_rng_state(saved["rng"])


def check_checkpoint(run: Run, distiller: Distiller, phases, data, cfg, precision) -> None:
    """Restore once on trial, so that a damaged checkpoint is found before anything is written."""
    with run.intact():
        rows = [dict(phase=p.name, epoch=i + 1) for p, epochs in phases for i in range(epochs)]
        run.fits(rows, len(dataset.batch_bounds(len(data.train), cfg.batch_size)))
        for phase, first, _ in remaining_phases(phases, len(run.history)):
            optimizer = utils.sgd(distiller.param_groups(phase), cfg, phase.nesterov)
            return restore(run, distiller, first, optimizer, precision)
