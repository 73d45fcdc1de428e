"""What changes from epoch to epoch: the phase, the learning rate, the weights of the methods."""

from collections.abc import Iterator

import utils
from engine import published
from engine.distiller import Distiller
from kd_losses import Phase


def schedule(phases: tuple[Phase, ...], cfg) -> list[tuple[Phase, int]]:
    """The phases with their numbers of epochs, scaled with --epochs."""
    protocol, total = published.PROTOCOLS[cfg.protocol], cfg.epochs
    return [(p, published.scaled(p.epochs, total, protocol) if p.epochs else total) for p in phases]


def remaining_phases(
    phases: list[tuple[Phase, int]], done: int
) -> Iterator[tuple[Phase, int, int]]:
    """Yield (phase, first epoch to train, epochs) of what is left after `done` epochs."""
    for phase, epochs in phases:
        if done < epochs:
            yield phase, done + 1, epochs
        done = max(done - epochs, 0)


def learning_rate(phase: Phase, epoch: int, epochs: int, cfg) -> float:
    """The learning rate of `epoch` (from 1) of a phase of `epochs`."""
    if phase.lr is None:
        return utils.step_decay(cfg.lr, epoch, cfg.milestones, cfg.warmup)
    done, end = (epoch - 1) / epochs, 0.0
    for share, factor in phase.lr:
        end += share
        if done < end - 1e-9:
            break
    return cfg.lr * factor


def loss_weights(distiller: Distiller, phase: Phase, done: float, cfg) -> dict[str, float]:
    """The weight of each criterion when the share `done` of the phase is over; 0 in a phase without
    the methods' losses. Ramps change once per epoch of the protocol, so that a warm-up of ten
    epochs in a hundred stays 10 %. Also gives the losses that epoch."""
    epochs = published.PROTOCOLS[cfg.protocol].epochs
    epoch = int(done * epochs + 1e-6) + 1
    distiller.set_epoch(epoch, epochs)
    weights = {}
    for name, criterion in distiller.criteria.items():
        settings = criterion.settings
        weight = settings.lambda_kd * settings.ramp(epoch, epochs)
        weights[name] = (weight if phase.weight is None else phase.weight) if phase.kd else 0.0
    return weights
