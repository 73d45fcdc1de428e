"""The training steps that bench.py measures, on random images, and their networks."""

import argparse
import copy
import itertools
import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

import dataset
import train_base
import train_kd
import utils
from engine import kd_cli, published, stream
from engine.checkpoint import Weights
from engine.distiller import Distiller
from engine.schedule import loss_weights

BASE = "train_base"


def random_images(n: int, num_class: int) -> dataset.Images:
    """`n` random images of 32x32 pixels; label i is i modulo `num_class`."""
    pixels = torch.randint(0, 256, (n, 32, 32, 3), dtype=torch.uint8)
    names = [str(i) for i in range(num_class)]
    return dataset.Images(pixels, torch.arange(n) % num_class, names, (0.5,) * 3, (0.25,) * 3)


def recipe() -> argparse.Namespace:
    """KD-Zoo's recipe with learning rate 0. The work of a step is the same, and training on random
    labels does not change the networks."""
    protocol = vars(published.PROTOCOLS["kdzoo"])
    return argparse.Namespace(**protocol | dict(protocol="kdzoo", lr=0.0))


def pair(args: argparse.Namespace, images: dataset.Images) -> tuple[nn.Module, nn.Module]:
    """Student and teacher with random weights, on the CPU."""
    names = (args.student, args.teacher)
    nets = [Weights(x).build(args.num_class, i, 32) for i, x in enumerate(names)]
    img, *_ = next(stream.test_batches(images, 64))
    for net in nets:
        norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
        momenta = [norm.momentum for norm in norms]
        for norm in norms:  # without statistics, activations of a deep network explode in eval mode
            norm.momentum = 1.0
        with torch.no_grad():
            net.train()(img)
        for norm, momentum in zip(norms, momenta):
            norm.momentum = momentum
    return tuple(nets)


def bare_step(args, device, precision, images, snet, tnet, alone: bool):
    """A function that takes the student's step and, unless `alone`, runs the teacher. No hooks, no
    loader, always the same batch."""
    nets = [
        copy.deepcopy(net).to(device, memory_format=torch.channels_last) for net in (snet, tnet)
    ]
    snet, tnet = nets[0].train().requires_grad_(True), nets[1].eval().requires_grad_(False)
    optimizer = utils.sgd(snet.parameters(), recipe())
    img, target, _ = next(stream.train_batches(images, args.batch_size, 0, 1))
    img, target = img.to(device), target.to(device)

    def call():
        with precision.autocast():
            if not alone:  # teacher first: the student then reuses the memory that it has released
                with torch.no_grad():
                    tnet(img)
            out = snet(img)
        loss = F.cross_entropy(out.float(), target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return call


def full_step(mode: str, args, device, precision, images, snet, tnet, fixed: bool = False):
    """A function that takes a step as the training scripts do, with loader and meter, and the name
    of its phase. fixed: always the same batch instead of the loader.

    The phase is the longest one with the method's loss; weights are those half-way through it.
    """
    settings, meter, device = recipe(), utils.Meter(), device
    torch.manual_seed(0)
    if mode == BASE:
        net = copy.deepcopy(snet).to(device, memory_format=torch.channels_last)
        optimizer = utils.sgd(net.train().requires_grad_(True).parameters(), settings)
        batches = endless(images.to(device), args.batch_size, settings, fixed)

        def call():
            img, target, _ = next(batches)
            out, loss = train_base.train_step(net, optimizer, img, target, precision)
            meter.add(dict(ce=loss, train_top1=utils.top1(out, target)), len(target))

        return call, "no teacher"

    distiller, phase, optimizer, images = distillation(
        mode, args, device, precision, images, snet, tnet
    )
    batches = endless(images.to(device), args.batch_size, settings, fixed, distiller.two_views)

    def call():
        batch = distiller.batch(*next(batches))
        weights = loss_weights(distiller, phase, 0.5, settings)
        terms = train_kd.train_step(distiller, phase, optimizer, batch, weights, precision)
        meter.add(terms, len(batch.target))

    return call, phase.name + ("" if phase.ce else ", only its loss")


def distillation(mode: str, args, device, precision, images, snet, tnet):
    """(distiller, phase, optimizer, images) of `mode`: the distiller is on the device, the phase is
    the longest one."""
    snet, tnet = copy.deepcopy((snet, tnet))
    if "bss" in mode.split("+"):
        images = attackable(images, snet, tnet)
    chosen = settings_of(mode, args.num_class, args.batch_size)
    distiller = Distiller(snet, tnet, list(chosen.values()), images)
    distiller.to(device)
    phase = longest(distiller.phases)
    optimizer = utils.sgd(distiller.param_groups(phase), recipe(), phase.nesterov)
    return distiller, phase, optimizer, images


def endless(images: dataset.Images, batch_size: int, settings, fixed: bool, strong: bool = False):
    """Batches of one epoch after another. fixed: the first batch again and again; strong: with a
    second view."""
    epochs = (
        stream.train_batches(
            images, batch_size, 2, epoch, padding=settings.padding, two_views=strong
        )
        for epoch in itertools.count(1)
    )
    batches = itertools.chain.from_iterable(epochs)
    return itertools.repeat(next(batches)) if fixed else batches


def attackable(images: dataset.Images, *nets) -> dataset.Images:
    """The images with label 0, after changing the networks so that they predict class 0 for all.
    So bss attacks as many images as it may, and takes all its attack steps; with random labels it
    would take none."""
    for net in nets:
        classifier = net.get_submodule(net.taps["feat"].removesuffix(":in"))
        with torch.no_grad():
            classifier.bias[0] += 20
    return replace(images, labels=torch.zeros_like(images.labels))


def flags_of(mode: str) -> argparse.Namespace:
    """The flags of `train_kd.py --kd_mode MODE` without other flags."""
    return kd_cli.parse(["--kd_mode", mode, "--t_model", "none"], "")


def settings_of(mode: str, num_class: int, batch_size: int) -> dict:
    """{method: its settings} for a number of classes and a batch size."""
    return kd_cli.settings_of(flags_of(mode), "", "", num_class, batch_size)


def longest(phases):
    """The phase with the most epochs, of those with the method's loss."""
    return max((p for p in phases if p.kd), key=lambda phase: phase.epochs or math.inf)
