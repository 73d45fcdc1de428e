"""`bench.py together` and `cache`: students that share the teacher's forward pass, and students
that read the teacher's outputs from a cache."""

import argparse
import contextlib
import copy
import itertools
import tempfile
from statistics import median

import torch

import train_kd
import utils
from engine import cli, stream
from engine.adapter import count_macs
from engine.distiller import Distiller
from engine.schedule import loss_weights
from engine.teacher_cache import CachedTeacher
from engine.together import SharedTeacher, can_share
from kd_losses import METHODS
from tools.bench_flags import add_amp, add_numbers, add_rounds, add_steps, some
from tools.bench_meter import take_turns
from tools.bench_steps import (
    bare_step,
    full_step,
    longest,
    pair,
    random_images,
    recipe,
    settings_of,
)

PAIRS = "resnet56-resnet20,resnet32x4-resnet8x4,vgg13-MobileNetV2"
MODES = "st,at,fitnet,pkt,sp,cc,vid,rkd,nst,dkd,dist,ickd,srrl"  # 13 that share the teacher's pass

TOGETHER = dict(
    pair=("pair", ""),
    students=("students", "d"),
    solo_ms=("alone, ms", ".0f"),
    together_ms=("together, ms", ".0f"),
    ratio=("ratio", ".3f"),
    teacher=("teacher's share p", ".3f"),
    bound=("bound", ".3f"),
    over=("ratio / bound", ".3f"),
)
CACHE = dict(
    pair=("pair", ""),
    mode=("mode", ""),
    student_ms=("student alone, ms", ".0f"),
    plain=("with the teacher", ".2f"),
    filling=("filling the cache", ".2f"),
    filled=("filled cache", ".2f"),
    difference=("largest difference", ".1e"),
)


def together_flags(parser: cli.Parser) -> None:
    """The flags of `together` and `cache`."""
    add = parser.add_argument
    add(
        "--pairs",
        type=cli.comma(str),
        default=PAIRS.split(","),
        metavar="T-S,T-S",
        help=f"pairs of networks, TEACHER-STUDENT (default {PAIRS})",
    )
    add(
        "--counts",
        type=cli.comma(cli.number(int, 1, 13)),
        default=(1, 4, 13),
        metavar="K,K",
        help="numbers of students, only for together (default 1,4,13)",
    )
    add(
        "--modes",
        type=some(METHODS),
        default=MODES.split(","),
        metavar="M,M",
        help=f"methods of the students (default {MODES})",
    )
    numbers = dict(batch_size=(2, 64, "batch size "), num_class=(2, 100, "number of classes "))
    numbers["samples"] = (8, 4096, "number of random training images ")
    add_numbers(parser, **numbers)
    add_steps(parser)
    add_rounds(parser)
    add_amp(parser)


def networks(name: str, args: argparse.Namespace):
    """(images, student, teacher) of a pair `T-S`."""
    args.teacher, args.student = name.split("-")
    images = random_images(args.samples, args.num_class)
    return images, *pair(args, images)


def students_of(modes, args, device, images, snet, tnet) -> list[Distiller]:
    """A Distiller for each method, all with the same teacher, on the device."""
    found, tnet = [], copy.deepcopy(tnet)
    for mode in modes:
        chosen = settings_of(mode, args.num_class, args.batch_size)
        found.append(Distiller(copy.deepcopy(snet), tnet, list(chosen.values()), images))
        found[-1].to(device)
    return found


def group_step(
    distillers, args, precision, images, shared: SharedTeacher, fixed=False, steps=None, streams=()
):
    """A function that takes one step of every student, as train_kd.py does.

    fixed: repeat the batches of one epoch, so that a cache is filled once. steps: the step function
    of each student (default: `train_kd.train_step`); streams: one CUDA stream per student.
    """
    cfg = recipe()
    optimizers = []
    for distiller in distillers:
        phase = longest(distiller.phases)
        optimizers.append(utils.sgd(distiller.param_groups(phase), cfg, phase.nesterov))
    meters = [utils.Meter() for _ in distillers]
    steps = steps or [train_kd.train_step] * len(distillers)

    def batches():
        for epoch in itertools.repeat(1) if fixed else itertools.count(1):
            shared.begin_epoch(images, args.batch_size, 2, epoch)
            yield from enumerate(
                stream.train_batches(images, args.batch_size, 2, epoch, padding=cfg.padding), 1
            )

    found = batches()

    def call():
        number, tensors = next(found)
        shared.next_batch(number)
        for i, (distiller, optimizer, meter) in enumerate(zip(distillers, optimizers, meters)):
            phase = longest(distiller.phases)
            weights = loss_weights(distiller, phase, 0.5, cfg)
            batch = shared.batch(distiller, distiller.batch(*tensors), 1)
            with beside(streams[i]) if streams else contextlib.nullcontext():
                terms = steps[i](distiller, phase, optimizer, batch, weights, precision)
            if not streams:
                meter.add(terms, len(batch.target))
        for own in streams:
            torch.cuda.current_stream().wait_stream(own)

    return call


@contextlib.contextmanager
def beside(own):
    """Run the block on the stream `own`, after all work queued so far on the current stream."""
    own.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(own):
        yield


def together(args: argparse.Namespace, device, precision):
    """Yield a row for each pair and number of students."""
    for name in args.pairs:
        images, snet, tnet = networks(name, args)
        on_device = images.to(device)
        forward = teacher_pass(tnet, args, device, precision, images)
        for count in args.counts:
            modes = args.modes[:count]
            distillers = students_of(modes, args, device, images, snet, tnet)
            shared = SharedTeacher([x for x in distillers if can_share(x)], precision)
            solo = [full_step(m, args, device, precision, images, snet, tnet)[0] for m in modes]
            calls = [group_step(distillers, args, precision, on_device, shared), forward, *solo]
            ours, passes, *alone = take_turns(calls, args.rounds, args.steps, device)
            sums = [sum(x) for x in zip(*alone)]
            ratios = [one / all_of for one, all_of in zip(ours, sums)]
            shares = [count * one / all_of for one, all_of in zip(passes, sums)]
            share = median(shares)
            bound = (share + count * (1 - share)) / count
            yield dict(
                pair=name,
                students=count,
                solo_ms=1e3 * median(sums),
                together_ms=1e3 * median(ours),
                ratio=median(ratios),
                teacher=share,
                bound=bound,
                over=median(ratios) / bound,
                macs_share=macs_share(snet, tnet),
            )


def teacher_pass(tnet, args, device, precision, images):
    """A function that runs the teacher's forward pass on a batch."""
    net = copy.deepcopy(tnet).to(device, memory_format=torch.channels_last).eval()
    img = next(stream.train_batches(images, args.batch_size, 0, 1))[0].to(device)

    def call():
        with torch.no_grad(), precision.autocast():
            net(img)

    return call


def macs_share(snet, tnet) -> float:
    """The teacher's share of a step's multiply-adds. A backward pass counts as two forwards."""
    img = torch.zeros(2, 3, 32, 32)
    with torch.no_grad():
        s, t = (count_macs(net.eval(), lambda net=net: net(img)) for net in (snet, tnet))
    return t / (t + 3 * s)


def cache(args: argparse.Namespace, device, precision):
    """Yield a row for each pair and method: steps relative to the student's step alone."""
    for name in args.pairs:
        images, snet, tnet = networks(name, args)
        for mode in args.modes:
            with tempfile.TemporaryDirectory() as folder:
                yield cached_row(name, mode, folder, args, device, precision, images, snet, tnet)


def cached_row(name, mode, folder, args, device, precision, images, snet, tnet) -> dict:
    on_device = images.to(device)
    data = argparse.Namespace(train=on_device, identity=lambda: dict(train=name))
    calls = [
        bare_step(args, device, precision, images, snet, tnet, alone=True),
        full_step(mode, args, device, precision, images, snet, tnet)[0],
    ]
    for kind in ("filling", "filled"):
        distillers = students_of([mode], args, device, images, snet, tnet)
        shared = SharedTeacher(distillers, precision)
        shared.cached = distillers
        shared.cache = CachedTeacher.of(
            distillers, f"{folder}/{kind}", data, recipe().padding, precision
        )
        call = group_step(distillers, args, precision, on_device, shared, kind == "filled")
        if kind == "filled":
            for _ in range(len(images) // args.batch_size + 1):
                call()
            filled = shared
        calls.append(call)
    student, plain, filling, full = take_turns(calls, args.rounds, args.steps, device)

    def over(times):
        return median(one / own for one, own in zip(times, student))

    return dict(
        pair=name,
        mode=mode,
        student_ms=1e3 * median(student),
        plain=over(plain),
        filling=over(filling),
        filled=over(full),
        difference=largest_difference(filled, on_device, args, recipe().padding),
    )


def largest_difference(shared: SharedTeacher, images, args, padding: str) -> float:
    """Largest difference between logits computed in batches of 5 images and in whole batches,
    relative to the largest logit."""
    img = next(stream.train_batches(images, args.batch_size, 5, 1, padding=padding))[0]
    with torch.no_grad(), shared.precision.autocast():
        whole = shared.tapped(img).out.float()
        parts = torch.cat([shared.tapped(x).out.float() for x in img.split(5)])
    return ((whole - parts).abs().max() / whole.abs().max()).item()
