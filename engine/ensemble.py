"""Several teachers: the logits of their ensemble, and a method's loss with each of them."""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import network

# --- the ensemble's logits ------------------------------------------------------------------------


def probs(logits: list[Tensor], target: Tensor | None) -> Tensor:
    """The mean of the probabilities of K networks, as logits:

        z = log((1 / K) * sum_k softmax(z_k)), so that softmax(z) is the mean

    At a temperature T, softmax(z / T) is the mean with its entries raised to 1 / T, normalised.
    """
    return torch.stack([z.log_softmax(1) for z in logits]).logsumexp(0) - math.log(len(logits))


def mean(logits: list[Tensor], target: Tensor | None) -> Tensor:
    """The mean of the logits: z = (1 / K) * sum_k z_k."""
    return torch.stack(logits).mean(0)


def confidence(logits: list[Tensor], target: Tensor) -> Tensor:
    """The logits, weighted for each image by how well each network knows its label:

        z = sum_k w_k z_k,   w_k = (1 - softmax_k(CE_k)) / (K - 1),   CE_k = -log softmax(z_k)[y]

    with the softmax over the K networks; the weights of an image sum to 1. They are those of
    CA-MKD (https://arxiv.org/abs/2201.00007, eq. 3), which weights the losses with them instead.
    """
    ce = torch.stack([F.cross_entropy(z, target, reduction="none") for z in logits])
    weights = (1 - ce.softmax(0)) / (len(logits) - 1)
    return (weights[:, :, None] * torch.stack(logits)).sum(0)


KINDS = dict(probs=probs, logits=mean, confidence=confidence)


def ensemble_logits(kind: str, logits: list[Tensor], target: Tensor | None = None) -> Tensor:
    """The logits (B, C) of an ensemble, in float32 at least, from those of each network.

    kind: of KINDS; target (B,): the labels, which 'confidence' needs.
    """
    with torch.autocast(logits[0].device.type, enabled=False):
        full = [z.to(torch.promote_types(z.dtype, torch.float32)) for z in logits]
        return KINDS[kind](full, target)


class Ensemble(nn.Module):
    """Several networks as one, whose call gives the logits of their ensemble.

    A call has no labels: of the kind 'confidence' it gives the plain mean of the logits.
    """

    def __init__(self, nets: list[nn.Module], kind: str):
        super().__init__()
        self.nets, self.kind = nn.ModuleList(nets), kind

    @property
    def kind_without_labels(self) -> str:
        return "logits" if self.kind == "confidence" else self.kind

    def forward(self, img: Tensor) -> Tensor:
        return ensemble_logits(self.kind_without_labels, [net(img) for net in self.nets])


def nets_of(net: nn.Module | None) -> list[nn.Module]:
    """The networks of an ensemble; a network alone, or none."""
    if net is None:
        return []
    return list(net.nets) if isinstance(net, Ensemble) else [net]


# --- their features -------------------------------------------------------------------------------


class Teachers:
    """Several teachers, called like one `network.Tapped`: gives a tuple of the features of each."""

    def __init__(self, members: list[network.Tapped], kind: str):
        self.members, self.kinds = members, members[0].kinds
        self.net = Ensemble([x.net for x in members], kind)

    def __call__(self, img: Tensor) -> tuple[network.Features, ...]:
        return tuple(member(img) for member in self.members)


def union(tapped: list):
    """One object that gives what each of these gives, all of the same networks: a Tapped, or
    Teachers."""
    first = tapped[0]
    if isinstance(first, Teachers):
        members = zip(*(x.members for x in tapped))
        return Teachers([union(list(same)) for same in members], first.net.kind)
    kinds = set().union(*(x.kinds for x in tapped))
    stages = sorted(set().union(*(x.numbers for x in tapped)))
    return network.Tapped(first.net, sorted(kinds), tuple(stages))


def with_strong(x, strong):
    """Features, or a tuple of those of each teacher, with those of the images' second view."""
    if isinstance(x, tuple):
        return tuple(map(with_strong, x, strong))
    return replace(x, strong=strong)


# --- a method with several teachers ---------------------------------------------------------------


class OfEnsemble:
    """A method that reads logits alone: its one criterion, fed the ensemble's logits.

    Called as a `distiller.Criterion`, with a tuple of the teachers' features.
    """

    def __init__(self, make: Callable, net: Ensemble, t: tuple[network.Features, ...]):
        """make: features of the teacher -> Criterion; t: features of a trial pass."""
        self.net = net
        criterion = make(self.combined(t, torch.zeros(len(t[0].out), dtype=torch.long)))
        self.parts, self.settings, self.mode = [criterion], criterion.settings, criterion.mode

    def combined(self, t: tuple[network.Features, ...], target: Tensor) -> network.Features:
        """The ensemble's features: its logits."""
        x = network.Features(ensemble_logits(self.net.kind, [x.out for x in t], target), self.net)
        if t[0].strong is None:
            return x
        return replace(x, strong=self.combined(tuple(x.strong for x in t), target))

    def __call__(self, s, t, batch, inputs=None) -> Tensor:
        return self.parts[0](s, self.combined(t, batch.target), batch, inputs)


class OfEach:
    """A method that reads features: the sum of its losses with each teacher, each of a criterion
    and an adapter of its own. Called as `OfEnsemble`."""

    def __init__(self, parts: list):
        """parts: a Criterion for each teacher."""
        self.parts, self.settings, self.mode = parts, parts[0].settings, parts[0].mode

    def __call__(self, s, t, batch, inputs=None) -> Tensor:
        return sum(criterion(s, x, batch, inputs) for criterion, x in zip(self.parts, t))
