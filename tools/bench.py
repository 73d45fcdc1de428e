"""What a method costs: its training step, its loss alone, the images' way to the device, and what an
epoch is besides its steps.

    python tools/bench.py step                            # every method's step over a bare one
    python tools/bench.py step --modes at,crd --json step.json
    python tools/bench.py step --profile crd              # where that step spends its time
    python tools/bench.py loss --size imagenet            # time and memory of every loss alone
    python tools/bench.py loss --modes crd --crd_paths    # crd by gathered rows and by the whole bank
    python tools/bench.py data --workers 2                # loaders, ours against plain ones
    python tools/bench.py epoch                           # loader, evaluation, files of an epoch

A Markdown table on stdout, what it means below it; --json FILE writes the same figures ('-': to
stdout, the table to stderr). What is compared takes turns in one process, on the same machine.
"""

import argparse
import contextlib
import copy
import functools
import gc
import io
import itertools
import json
import math
import os
import platform
import re
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler's own messages, read at the import

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import dataset  # noqa: E402
import network  # noqa: E402
import train_base  # noqa: E402
import train_kd  # noqa: E402
import utils  # noqa: E402
from engine import (
    console,
    cli,  # noqa: E402
    published,  # noqa: E402
    stream,  # noqa: E402
)
from engine.adapter import align  # noqa: E402
from engine.checkpoint import Weights  # noqa: E402
from engine.run import Run  # noqa: E402
from kd_losses import METHODS, crd  # noqa: E402
from utils import UserError  # noqa: E402

BASE = "train_base"
BUDGET = {  # of a step, as a multiple of the bare one
    mode: limit
    for limit, modes in {
        1.10: "logits st dkd pkt cc fitnet",
        1.15: "lskd dist nkd ttm wttm rld ctkd wsld itrd pefd vkd",
        1.20: "at sp nst fsp ab irg afd rkd",
        1.35: "vid ft ofd srrl simkd ickd catkd wkd_f sdd mgd semckd ofa",
        1.7: "reviewkd",
        2.0: "lwm crd",
        2.2: "dml mlkd crld",  # the latter forward two views
        3.0: "bss kdsvd wkd_l",
        7.0: "sobolev",
    }.items()
    for mode in modes.split()
}
SPARE = 0.05  # of a budget, to be sure of it
MB = 1e6

# --- the clock and the memory meter ---------------------------------------------------------------


def seconds(call, times: int, device: torch.device) -> float:
    """Seconds of `times` calls, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    for _ in range(times):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def take_turns(calls: list, rounds: int, steps: int, device: torch.device) -> list[list[float]]:
    """For each of `calls` its seconds a call in every round, after two calls to warm up.

    A round has `steps` calls of each: a b a b ..., on a GPU a whole block of a, then one of b,
    since each change waits for the device.
    """
    block = steps if device.type == "cuda" else 1
    for call in calls:
        seconds(call, 2, device)
    times = [[] for _ in calls]
    for _ in range(rounds):
        total = [0.0] * len(calls)
        for _ in range(steps // block):
            for i, call in enumerate(calls):
                total[i] += seconds(call, block, device)
        for i, own in enumerate(total):
            times[i].append(own / steps)
    return times


def quick_or_slow(calls: list, rounds: int, device: torch.device) -> list[list[float]]:
    """`take_turns` with as many calls a round as fill a twentieth of a second, at most 50, and with
    fewer than `rounds` rounds, but three, where all would take more than a minute."""
    once = sum(seconds(call, 1, device) for call in calls)
    rounds = min(rounds, max(3, int(60 / once)))
    return take_turns(calls, rounds, max(1, min(50, int(0.05 / once))), device)


def peak_bytes(call, device: torch.device) -> int:
    """The most bytes that torch's allocator holds at a time during `call`, above those before."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    # every allocation and release, in order; the public tables only have sums
    events = profiler.profiler.kineto_results.events()
    changes = (event.nbytes() for event in events if event.name() == "[memory]")
    return max(itertools.accumulate(changes, initial=0))


# --- bench.py step --------------------------------------------------------------------------------


def step_flags(parser: cli.Parser) -> None:
    add = parser.add_argument
    everything = (BASE, *METHODS)
    add("--modes", type=some(everything), default=everything, metavar="M,M", help="(default all)")
    add("--profile", metavar="MODE", help="print the operators of that mode's step instead")
    add_networks(parser)


def add_networks(parser: cli.Parser) -> None:
    """The flags of `step` and `epoch`."""
    for side in ("student", "teacher"):
        parser.add_argument(
            f"--{side}", default="resnet20", metavar="NAME", help="(default resnet20)"
        )
    numbers = dict(batch_size=(2, 128, ""), num_class=(2, 100, ""))
    numbers["samples"] = (8, 50_000, "random training images of 32 pixels ")
    add_numbers(parser, **numbers)
    steps = cli.number(int, 1)
    parser.add_argument("--steps", type=steps, metavar="N", help="a round (default 5, CUDA 50)")
    add_rounds(parser)
    add_amp(parser)


def step(args: argparse.Namespace, machine: utils.Machine):
    """Yield a row for each mode: its step against the bare one, in turns."""
    images = random_images(args.samples, args.num_class)
    nets = pair(args, images)
    bare = {alone: bare_step(args, machine, images, *nets, alone) for alone in (False, True)}
    for mode in args.modes:
        call, phase = full_step(mode, args, machine, images, *nets)
        rounds = take_turns([bare[mode == BASE], call], args.rounds, args.steps, machine.device)
        yield step_row(mode, phase, *rounds, args.batch_size)


def step_row(mode: str, phase: str, bare: list[float], own: list[float], batch_size: int) -> dict:
    """The row of `mode` from the seconds of the bare step and of its own, round by round."""
    ratios = [b / a for a, b in zip(bare, own)]
    ratio, budget = median(ratios), BUDGET.get(mode)
    return dict(
        mode=mode,
        phase=phase,
        bare_ms=1000 * median(bare),
        step_ms=1000 * median(own),
        **spread("ratio", ratios),
        img_per_s=batch_size / median(own),
        budget=budget,
        met=verdict(ratio, budget),
    )


def spread(name: str, rounds: list[float]) -> dict:
    """The median of all rounds, the least and the largest."""
    return {name: median(rounds), f"{name}_min": min(rounds), f"{name}_max": max(rounds)}


def verdict(ratio: float, budget: float | None) -> str | None:
    """Whether a budget is met: 'yes' with SPARE to spare, 'just', or 'no'."""
    if budget is None:
        return None
    return "yes" if ratio <= budget - SPARE else "just" if ratio <= budget else "no"


def random_images(n: int, num_class: int) -> dataset.Images:
    pixels = torch.randint(0, 256, (n, 32, 32, 3), dtype=torch.uint8)
    names = [str(i) for i in range(num_class)]
    return dataset.Images(pixels, torch.arange(n) % num_class, names, (0.5,) * 3, (0.25,) * 3)


def recipe() -> argparse.Namespace:
    """KD-Zoo's at a rate of 0: the arithmetic is that of any other, random labels spoil nothing."""
    protocol = vars(published.PROTOCOLS["kdzoo"])
    return argparse.Namespace(**protocol | dict(protocol="kdzoo", lr=0.0))


def pair(args: argparse.Namespace, images: dataset.Images) -> tuple[nn.Module, nn.Module]:
    """Student and teacher with fresh weights, on the CPU."""
    names = (args.student, args.teacher)
    nets = [Weights(x).build(args.num_class, i, 32) for i, x in enumerate(names)]
    img, *_ = next(stream.test_batches(images, 64))
    for net in nets:
        norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
        momenta = [norm.momentum for norm in norms]
        for norm in norms:  # that have seen no image: a deep network runs away in eval mode
            norm.momentum = 1.0
        with torch.no_grad():
            net.train()(img)
        for norm, momentum in zip(norms, momenta):
            norm.momentum = momentum
    return tuple(nets)


def bare_step(args, machine, images, snet, tnet, alone: bool):
    """A function that takes the student's step and, unless `alone`, runs the teacher: no hooks,
    no loader, one batch."""
    device = machine.device
    nets = [
        copy.deepcopy(net).to(device, memory_format=torch.channels_last) for net in (snet, tnet)
    ]
    snet, tnet = nets[0].train().requires_grad_(True), nets[1].eval().requires_grad_(False)
    optimizer = utils.sgd(snet.parameters(), recipe())
    img, target, _ = next(stream.train_batches(images, args.batch_size, 0, 1))
    img, target = img.to(device), target.to(device)

    def call():
        with machine.autocast():
            if not alone:  # first: the student then works in the memory it has left
                with torch.no_grad():
                    tnet(img)
            out = snet(img)
        loss = F.cross_entropy(out.float(), target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return call


def full_step(mode: str, args, machine, images, snet, tnet, fixed: bool = False):
    """A function that takes a step as the training scripts do, loader (`fixed`: one batch instead)
    and meter included, and what to call its phase: the longest of those that have the method's
    loss, half-way through."""
    settings, meter, device = recipe(), utils.Meter(), machine.device
    torch.manual_seed(0)
    if mode == BASE:
        net = copy.deepcopy(snet).to(device, memory_format=torch.channels_last)
        optimizer = utils.sgd(net.train().requires_grad_(True).parameters(), settings)
        batches = endless(images.to(device), args.batch_size, settings, fixed)

        def call():
            img, target, _ = next(batches)
            out, loss = train_base.train_step(net, optimizer, img, target, machine)
            meter.add(dict(ce=loss, train_top1=utils.top1(out, target)), len(target))

        return call, "no teacher"

    job, phase, optimizer, images = distillation(mode, args, machine, images, snet, tnet)
    batches = endless(images.to(device), args.batch_size, settings, fixed, job.strong)

    def call():
        batch = train_kd.Batch(*next(batches))
        weights = train_kd.kd_weights(job, phase, 0.5, settings)
        terms = train_kd.train_step(job, phase, optimizer, batch, weights, machine)
        meter.add(terms, len(batch.target))

    return call, phase.name + ("" if phase.ce else ", its loss alone")


def distillation(mode: str, args, machine, images, snet, tnet):
    """The job of `mode` on the device, its longest phase, the optimizer and the images."""
    snet, tnet = copy.deepcopy((snet, tnet))
    if "bss" in mode.split("+"):
        images = attackable(images, snet, tnet)
    rows = rows_of(mode, args.num_class, args.batch_size)
    job = train_kd.Distillation(snet, tnet, rows, images)
    job.to(machine.device)
    phase = longest(job.phases)
    return job, phase, utils.sgd(job.groups(phase), recipe(), phase.nesterov), images


def endless(images: dataset.Images, batch_size: int, settings, fixed: bool, strong: bool = False):
    """Batches of one epoch after another, or the first for ever; `strong`: with a second view."""
    epochs = (
        stream.train_batches(
            images, batch_size, 2, epoch, padding=settings.padding, two_views=strong
        )
        for epoch in itertools.count(1)
    )
    batches = itertools.chain.from_iterable(epochs)
    return itertools.repeat(next(batches)) if fixed else batches


def attackable(images: dataset.Images, *nets) -> dataset.Images:
    """All of class 0, and networks that answer 0 whatever they see: bss attacks as many images as
    it may and none gets away, so that it takes all its steps. On random labels it takes none."""
    for net in nets:
        classifier = net.get_submodule(net.taps["feat"].removesuffix(":in"))
        with torch.no_grad():
            classifier.bias[0] += 20
    return replace(images, labels=torch.zeros_like(images.labels))


def rows_of(mode: str, num_class: int, batch_size: int) -> dict:
    _, rows = train_kd.parse(["--kd_mode", mode, "--t_model", "none"])
    rows = train_kd.sized(rows, batch_size)
    return {
        m: replace(row, lambda_kd=row.lambda_kd(num_class)) if callable(row.lambda_kd) else row
        for m, row in rows.items()
    }


def longest(phases):
    return max((p for p in phases if p.kd), key=lambda phase: phase.epochs or math.inf)


def operators(args: argparse.Namespace, machine: utils.Machine):
    """Yield the operators of a mode's step that take the most time, their callees left out."""
    images = random_images(args.samples, args.num_class)
    call, _ = full_step(args.profile, args, machine, images, *pair(args, images))
    steps, cuda = args.steps, machine.device.type == "cuda"
    seconds(call, 2, machine.device)
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * cuda]
    with profile(activities=activities) as profiler:
        wall = seconds(call, steps, machine.device)
    own = "self_device_time_total" if cuda else "self_cpu_time_total"
    found = [
        (getattr(event, own), event)
        for event in profiler.key_averages()
        if event.device_type == torch.autograd.DeviceType.CPU  # not a GPU's kernels once more
    ]
    total = sum(own_us for own_us, _ in found)
    for own_us, event in sorted(found, key=lambda x: -x[0])[:20]:
        yield dict(
            operator=event.key,
            calls=event.count / steps,
            self_ms=own_us / 1000 / steps,
            share=100 * own_us / total,
        )
    yield dict(operator="all operators", self_ms=total / 1000 / steps, share=100.0)
    yield dict(operator="the step, by the clock", self_ms=1000 * wall / steps)


# --- bench.py loss --------------------------------------------------------------------------------

PAIRS = dict(  # teacher, student, batch
    cifar=(("resnet20", "resnet20", 128), ("resnet32x4", "resnet8x4", 64)),
    imagenet=(("torchvision/resnet50", "torchvision/resnet18", 64),),
)
SIZES = dict(
    cifar=(32, 100, 50_000), imagenet=(224, 1000, 200_000)
)  # pixels, classes, crd's samples
READS = dict(  # what a comparison reads of student and teacher, where it is not all that it wants
    reviewkd=(("stages", "feat"), ("preacts", "feat")),
    srrl=(("last",), ("feat", "out")),
    catkd=(("last",), ("last",)),
    sdd=(("last",), ("last",)),
    ofa=(("stages", "out"), ("out",)),
)
HEADS = "srrl catkd sdd".split()  # read classifiers too
MAPS = {"stem", "stages", "preacts", "last"}
FIT = 1.1e9  # bytes: a broadcast version whose largest tensor would be larger gets fewer samples
VECTORS, BARE_MAPS, NET_MAPS = 64 * MB, 2, 6  # budgets: bytes, multiples of the inputs
PATHS = {"rows gathered": 0, "whole bank": math.inf}  # crd's ways to its scores: what GATHER says


def loss_flags(parser: cli.Parser) -> None:
    add = parser.add_argument
    add("--modes", type=some(METHODS), default=tuple(METHODS), metavar="M,M", help="(default all)")
    add("--size", choices=PAIRS, default="cifar", help="whose feature maps (default cifar)")
    add("--student", metavar="NAME", help="another pair of networks, for their shapes")
    add("--teacher", metavar="NAME", help="the same")
    add("--batch_size", type=cli.number(int, 3), metavar="N", help="(default: the size's)")
    add(
        "--n_data",
        type=cli.number(int, 4),
        metavar="N",
        help="samples in the banks of crd (default: cifar 50000, imagenet 200000)",
    )
    add(
        "--layout",
        choices=("channels_last", "contiguous"),
        default="channels_last",
        help="of the maps (default channels_last, as training has them)",
    )
    add(
        "--crd_paths",
        action="store_true",
        help="crd twice: rows of the banks gathered, then products with whole banks, in turns",
    )
    add("--memory", action="store_true", help="memory alone, no times")
    add_rounds(parser)
    parser.set_defaults(amp="off")


def loss(args: argparse.Namespace, machine: utils.Machine):
    """Yield a row for each mode and pair of networks: its loss alone, forward and backward."""
    size, num_class, n_data = SIZES[args.size]
    pairs = PAIRS[args.size]
    if args.student or args.teacher:
        if not (args.student and args.teacher):
            raise UserError("--student and --teacher go together")
        pairs = [(args.teacher, args.student, pairs[0][2])]
    for teacher, student, batch_size in pairs:
        nets = [Weights(x).build(num_class, 0, size).eval() for x in (student, teacher)]
        for mode in args.modes:
            how = args.batch_size or batch_size, 0 if args.memory else args.rounds, machine.device
            bench = Loss(mode, nets, size, num_class, args.n_data or n_data, args.layout, how[0])
            # a name's last part tells torchvision's networks apart
            names = " -> ".join(x.split("/")[-1] for x in (teacher, student))
            if mode == "crd" and args.crd_paths:
                measured = {f"crd, {path}": found for path, found in bench.paths(*how).items()}
            else:
                measured = {mode: bench.measure(*how)}
            for name, found in measured.items():
                yield dict(mode=name, pair=names, batch=how[0], **found)


class Loss:
    """One mode between random features of the networks' shapes."""

    def __init__(
        self,
        mode: str,
        nets: list,
        size: int,
        num_class: int,
        n_data: int,
        layout: str,
        batch_size: int,
    ):
        self.mode, self.num_class, self.n_data, self.layout = mode, num_class, n_data, layout
        (self.row,) = rows_of(mode, num_class, batch_size).values()
        self.alone = self.row.teacher != "grad" and mode != "bss"
        if not self.alone:
            return
        self.phase = longest(self.row.phases)
        self.reads = READS.get(mode, (self.row.compare.wants,) * 2)
        stages = align(*nets, self.row.stages)
        dry = torch.zeros(2, 3, size, size)
        with torch.no_grad():
            # a loss may be built from more than its comparison reads
            wants = [{*reads, *self.row.compare.wants} for reads in self.reads]
            self.shapes = [network.Tapped(x, r, stages)(dry) for x, r in zip(nets, wants)]
        heads = mode in HEADS
        self.shapes = [replace(x, net=Head(x.classifier) if heads else None) for x in self.shapes]
        classes = [str(i) for i in range(num_class)]
        labels = torch.arange(n_data) % num_class
        train = dataset.Images(dry, labels, classes, (0.5,) * 3, (0.25,) * 3)
        torch.manual_seed(0)
        with torch.no_grad():
            self.part = train_kd.Part(mode, self.row, range(len(stages)), *self.shapes, train)
        self.part.eval().requires_grad_(False)
        for name in self.phase.learns:
            head, _, inner = name.partition(".")
            if head == "kd":
                module = self.part.loss.get_submodule(inner) if inner else self.part
                module.train().requires_grad_(True)

    def features(self, batch_size: int, device: torch.device):
        """Random features of both networks and a batch of the training set."""
        generator = torch.Generator().manual_seed(1)
        learn = (True, "teacher" in self.phase.learns)
        both = []
        for shapes, reads, grad in zip(self.shapes, self.reads, learn):

            def draw(x: Tensor, kind: str) -> Tensor:
                x = torch.randn(batch_size, *x.shape[1:], generator=generator)
                if kind not in ("out", "preacts"):
                    x = x.relu()
                if x.ndim == 4 and self.layout == "channels_last":
                    x = x.contiguous(memory_format=torch.channels_last)
                return x.to(device).requires_grad_(grad)

            found = {}
            for kind in reads:
                value = getattr(shapes, kind)
                one = torch.is_tensor(value)
                found[kind] = draw(value, kind) if one else [draw(x, kind) for x in value]
            if shapes.net is not None:
                found["net"] = copy.deepcopy(shapes.net).to(device).requires_grad_(grad)
            if self.row.strong:
                found["strong"] = replace(shapes, out=draw(shapes.out, "out"))
            both.append(replace(shapes, **dict(out=None) | found))
        index = torch.randperm(self.n_data, generator=generator)[:batch_size].to(device)
        return *both, train_kd.Batch(None, index % self.num_class, index)

    def inputs(self, s, t) -> list[Tensor]:
        """The tensors that the comparison reads."""
        values = [getattr(x, kind) for x, reads in zip((s, t), self.reads) for kind in reads]
        values += [x.strong.out for x in (s, t) if x.strong]
        return [x for value in values for x in ([value] if torch.is_tensor(value) else value)]

    def broadcast(self) -> train_kd.Part:
        """The same part with the straightforward version of its loss in the place of its own."""
        f, part = BROADCAST[self.mode][0], copy.deepcopy(self.part)
        many = isinstance(part.loss, nn.ModuleList)
        part.loss = nn.ModuleList(Plain(x, f) for x in part.loss) if many else Plain(part.loss, f)
        return part

    def call(self, part: train_kd.Part, s, t, batch):
        """A function that computes loss and gradients afresh and returns the loss."""
        heads = [p for x in (s, t) if x.net is not None for p in x.net.parameters()]
        leaves = [x for x in (*self.inputs(s, t), *part.parameters(), *heads) if x.requires_grad]

        def run():
            for x in leaves:
                x.grad = None
            value = part(part.comparison(self.phase), s, t, batch)
            value.backward()
            return value.detach()

        return run

    def budget(self, inputs: list[Tensor], batch_size: int) -> tuple[str, float]:
        """What the memory is allowed to be, in words and in bytes."""
        if isinstance(self.part.loss, crd.CRD):
            bank = sum(x.nbytes for x in self.part.loss.buffers())
            board = 4 * batch_size * self.n_data
            return f"2 x banks + 5 x ({batch_size}, {self.n_data})", 2 * bank + 5 * board
        if not MAPS & {kind for reads in self.reads for kind in reads}:
            return f"{VECTORS / MB:.0f} MB", VECTORS
        learns = next(self.part.parameters(), None) is not None
        factor = NET_MAPS if learns else BARE_MAPS
        return f"{factor} x inputs", factor * sum(x.nbytes for x in inputs)

    def measure(self, batch_size: int, rounds: int, device: torch.device) -> dict:
        """Time, memory, and both against the broadcast version where there is one; without rounds
        memory alone."""
        if not self.alone:
            return dict(budget="needs networks: see step")
        part = copy.deepcopy(self.part).to(device)
        features = self.features(batch_size, device)
        run, inputs = self.call(part, *features), self.inputs(*features[:2])
        found = {}
        if rounds:
            if self.mode in BROADCAST:
                found = self.against_broadcast(batch_size, rounds, device)
            (own,) = quick_or_slow([run], rounds, device)
            found["ms"] = 1000 * median(own)
        else:
            run()  # what is made at the first call alone is not counted
        return found | self.memory(run, part, inputs, batch_size, device)

    def paths(self, batch_size: int, rounds: int, device: torch.device) -> dict[str, dict]:
        """For each of PATHS what `measure` says of crd, without the broadcast version."""
        part = copy.deepcopy(self.part).to(device)
        features = self.features(batch_size, device)
        run, inputs = self.call(part, *features), self.inputs(*features[:2])

        cpu = [[] for _ in PATHS]

        def along(limit: float, spent: list[float]):
            crd.GATHER = limit
            began = time.process_time()
            run()
            spent.append(1000 * (time.process_time() - began))

        calls = [functools.partial(along, *x) for x in zip(PATHS.values(), cpu)]
        before = crd.GATHER
        try:
            times = quick_or_slow(calls, rounds, device) if rounds else [[]] * len(calls)
            found = [dict(ms=1000 * median(own)) if own else {} for own in times]
            for call, one, spent in zip(calls, found, cpu):
                if rounds and device.type == "cpu":
                    one["cpu_ms"] = median(spent)
                call()
                one |= self.memory(call, part, inputs, batch_size, device)
        finally:
            crd.GATHER = before
        return dict(zip(PATHS, found))

    def memory(self, run, part, inputs: list[Tensor], batch_size: int, device) -> dict:
        """What a call of `run` needs and what `part` holds, against the budget."""
        for x in (*inputs, *part.parameters()):
            x.grad = None
        memory = peak_bytes(run, device)
        state = sum(x.nbytes for x in (*part.parameters(), *part.buffers()))
        words, limit = self.budget(inputs, batch_size)
        total = sum(x.nbytes for x in inputs)
        return dict(
            memory_mb=(memory + state) / MB,
            state_mb=state / MB,
            inputs_mb=total / MB,
            multiple=(memory + state) / total,
            budget=words,
            budget_mb=limit / MB,
            met="yes" if memory + state <= limit else "no",
        )

    def against_broadcast(self, batch_size: int, rounds: int, device: torch.device) -> dict:
        """Loss and broadcast version in turns, and how far their values are apart, relatively."""
        fewer = self.fitting(batch_size)
        features = self.features(fewer, device)
        parts = copy.deepcopy(self.part).to(device), self.broadcast().to(device)
        calls, values = [self.call(part, *features) for part in parts], []
        for call in calls:
            torch.manual_seed(0)  # of crd's draws
            values.append(call().item())
        fast, slow = quick_or_slow(calls, rounds, device)
        return dict(
            broadcast_ms=1000 * median(slow),
            broadcast_batch=fewer,
            faster=median(b / a for a, b in zip(fast, slow)),
            difference=abs(values[0] - values[1]) / abs(values[0]),
        )

    def fitting(self, batch_size: int) -> int:
        """`batch_size`, or fewer where the broadcast version would have a tensor above FIT."""
        largest = BROADCAST[self.mode][1]
        while largest and batch_size > 3 and 4 * largest(self, batch_size) > FIT:
            batch_size = max(3, batch_size * 3 // 4)
        return batch_size


class Head(nn.Module):
    """What is left of a network whose classifier alone is read."""

    def __init__(self, classifier: nn.Module):
        super().__init__()
        self.classifier, self.taps = copy.deepcopy(classifier), dict(feat="classifier:in")


class Plain(nn.Module):
    """A loss computed by `f(loss, ...)`, with the settings and the parameters of `loss`."""

    def __init__(self, loss: nn.Module, f):
        super().__init__()
        self.loss, self.f = loss, f

    def forward(self, *args):
        return self.f(self.loss, *args)


# --- the losses as their formulas say them --------------------------------------------------------


def plain_at(loss, fm_s, fm_t):
    one, two = (F.normalize(fm.abs().pow(loss.p).sum(1).flatten(1)) for fm in (fm_s, fm_t))
    return (one - two).square().mean()


def plain_nst(loss, fm_s, fm_t):
    x, y = (F.normalize(fm.flatten(2), dim=2) for fm in (fm_s, fm_t))

    def kernel(a, b):
        return (a[:, :, None] * b[:, None]).sum(3).square().mean()

    return kernel(y, y) + kernel(x, x) - 2 * kernel(x, y)


def plain_fsp(loss, fm_s1, fm_s2, fm_t1, fm_t2):
    def flow(a, b):
        size = tuple(map(min, a.shape[2:], b.shape[2:]))
        a, b = (F.adaptive_avg_pool2d(x, size).flatten(2) for x in (a, b))
        return (a[:, :, None] * b[:, None]).mean(3)

    return (flow(fm_s1, fm_s2) - flow(fm_t1, fm_t2)).square().mean()


def plain_rkd(loss, feat_s, feat_t):
    def relations(x):
        n, diff = len(x), x[None] - x[:, None]
        dist, e = diff.norm(dim=2), F.normalize(diff, dim=2)
        return dist / (dist.sum() / (n * (n - 1))), (e[:, :, None] * e[:, None]).sum(3)

    (dist_s, angle_s), (dist_t, angle_t) = relations(feat_s), relations(feat_t)
    dist = F.smooth_l1_loss(dist_s, dist_t)
    return loss.w_dist * dist + loss.w_angle * F.smooth_l1_loss(angle_s, angle_t)


def plain_ab(loss, fm_s, fm_t):
    m = loss.margin
    rise = (fm_s - m).square() * ((fm_s <= m) & (fm_t > 0)).float()
    fall = (fm_s + m).square() * ((fm_s > -m) & (fm_t <= 0)).float()
    return (rise + fall).mean()


def plain_sp(loss, fm_s, fm_t):
    def similarity(fm):
        x = fm.flatten(1)
        return F.normalize((x[:, None] * x[None]).sum(2))

    return (similarity(fm_s) - similarity(fm_t)).square().mean()


def plain_irg(loss, layers_s, layers_t):
    def edges(x):
        x = x.flatten(1)
        distance = (x[:, None] - x[None]).square().sum(2).clamp(min=1e-12)
        distance = distance * (1 - torch.eye(len(x), device=x.device))
        return distance / distance.max()

    edge = [(edges(s) - edges(t)).square().mean() for s, t in zip(layers_s[:3], layers_t)]
    vert = (layers_s[3] - layers_t[3]).square().mean()
    tran = loss.transformation(*layers_s[:2]) - loss.transformation(*layers_t[:2])
    return (
        loss.w_irg_vert * vert
        + loss.w_irg_edge * sum(edge) / 3
        + loss.w_irg_tran * tran.square().mean()
    )


def plain_afd(loss, fm_s, fm_t):
    one, two = (
        fm / (fm.flatten(2).norm(dim=2)[:, :, None, None] + loss.eps) for fm in (fm_s, fm_t)
    )
    return (loss.rho(fm_t) * (one - two).square().mean((2, 3))).sum(1).mean()


def plain_crd(loss, feat_s, feat_t, idx):
    """The rows of the banks gathered, as the public code does."""
    sample_idx = loss.draw(idx)
    e_s, e_t = F.normalize(loss.embed_s(feat_s)), F.normalize(loss.embed_t(feat_t))
    count, total = sample_idx.shape[1] - 1, 0.0
    c = count / loss.n_data
    for e, memory, log_z in (
        (e_s, loss.memory_t, loss.log_z_s),
        (e_t, loss.memory_s, loss.log_z_t),
    ):
        rows = memory.index_select(0, sample_idx.flatten()).view(len(e), -1, e.shape[1])
        score = torch.exp(torch.bmm(rows, e[:, :, None])[:, :, 0] / loss.nce_t)
        log_z.copy_(torch.where(log_z.isnan(), (score.detach().mean() * loss.n_data).log(), log_z))
        p = score / log_z.exp()
        total = total - (p[:, 0] / (p[:, 0] + c + 1e-7)).log().sum()
        total = total - (c / (p[:, 1:] + c + 1e-7)).log().sum()
    with torch.no_grad():
        for e, memory in ((e_s, loss.memory_s), (e_t, loss.memory_t)):
            memory[idx] = F.normalize(loss.nce_mom * memory[idx] + (1 - loss.nce_mom) * e)
    return total / len(e_s)


def plain_kdsvd(loss, fms_s, fms_t):
    stages, k = [], loss.k
    for fm_s, fm_t in zip(fms_s, fms_t):
        v_s = torch.linalg.svd(fm_s.flatten(1, 2), full_matrices=False)[2].mT[:, :, : k + 3]
        _, sigma, vh_t = torch.linalg.svd(fm_t.flatten(1, 2), full_matrices=False)
        sigma, v_t = F.normalize(sigma[:, :k])[:, None], vh_t.mT[:, :, :k]
        v_t = v_t * v_t.gather(1, v_t.abs().argmax(1, keepdim=True)).sign()
        cosine = v_t.mT @ v_s.detach()
        best = cosine.abs().argmax(2, keepdim=True)
        v_s = v_s.gather(2, best.mT.expand(-1, v_s.shape[1], -1)) * cosine.gather(2, best).mT.sign()
        stages.append((v_s * sigma, v_t * sigma))
    total = 0.0
    for before, now in zip(stages, stages[1:]):
        one, two = ((-(a[:, :, None] - b[:, None]).square() / 8).exp() for a, b in zip(now, before))
        total = total + (one - two).square().sum()
    return total / len(fms_s[0])


def _flow(bench: Loss, n: int) -> int:
    fms = [bench.shapes[1].stem, *bench.shapes[1].stages]
    return max(
        n * a.shape[1] * b.shape[1] * min(a.shape[2:].numel(), b.shape[2:].numel())
        for a, b in zip(fms, fms[1:])
    )


def _channel_pairs(bench: Loss, n: int) -> int:
    return n * max(fm.shape[1] * fm[0].numel() for x in bench.shapes for fm in x.stages)


def _sample_pairs(bench: Loss, n: int) -> int:
    return n**2 * max(fm[0].numel() for x in bench.shapes for fm in x.stages)


def _triples(bench: Loss, n: int) -> int:
    return n**3 * max(x.feat.shape[1] for x in bench.shapes)


def _bank_rows(bench: Loss, n: int) -> int:
    return n * (1 + bench.part.loss.nce_n) * bench.part.loss.memory_s.shape[1]


BROADCAST = {  # the version, and how many numbers its largest tensor has where inputs have fewer
    "at": (plain_at, None),
    "nst": (plain_nst, _channel_pairs),
    "fsp": (plain_fsp, _flow),
    "rkd": (plain_rkd, _triples),
    "ab": (plain_ab, None),
    "sp": (plain_sp, _sample_pairs),
    "irg": (plain_irg, _sample_pairs),
    "afd": (plain_afd, None),
    "crd": (plain_crd, _bank_rows),
    "kdsvd": (plain_kdsvd, None),
}

# --- bench.py data --------------------------------------------------------------------------------


def data_flags(parser: cli.Parser) -> None:
    add_numbers(
        parser,
        batch_size=(2, 128, ""),
        samples=(2, 50_000, "of 32 pixels "),
        images=(2, 1024, "JPEG files "),
        img_size=(97, 224, ""),
        batches=(2, 40, "of each epoch "),
        workers=(0, 2, "reading processes "),
    )
    parser.set_defaults(student="resnet20", teacher="resnet20", num_class=100)
    add_rounds(parser)
    add_amp(parser)


def data(args: argparse.Namespace, machine: utils.Machine):
    """Yield two rows for each way in which images come: ours and a plain DataLoader, in turns."""
    device = machine.device
    images = random_images(args.samples, args.num_class)
    bare = bare_step(args, machine, images, *pair(args, images), alone=True)
    step_s = median(take_turns([bare], args.rounds, 5, device)[0])
    resident = images.to(device)
    larger = replace(resident, img_size=args.img_size, autoaugment=True)
    with tempfile.TemporaryDirectory() as root:
        kilobytes = write_jpegs(Path(root), args.images)
        folder = stream.load(
            "imagefolder", root, published.IMAGENET, args.img_size, workers=args.workers
        )
        turns = (  # name, images and processes of ours; name and images of the plain loader
            ("resident", resident, 0, "plain DataLoader", InMemory(images)),
            (
                "resident, 32 enlarged, AutoAugment",
                larger,
                0,
                "plain DataLoader, the same",
                InMemory(larger.to("cpu")),
            ),
            (
                f"streamed, JPEG of {kilobytes:.0f} kB",
                folder.train.to(device),
                args.workers,
                "plain DataLoader, the same files",
                on_disk(root, args.img_size),
            ),
        )
        for name, own, processes, other, plain in turns:
            rounds = []
            for _ in range(args.rounds):
                batches = stream.train_batches(own, args.batch_size, 2, 1)
                speed = throughput(batches, processes, args.batches, device)
                batches = plain_loader(plain, args)
                rounds.append((speed, throughput(batches, args.workers, args.batches, device)))
            ratios = [a / b for a, b in rounds]
            found = dict(spread("ratio", ratios), met="yes" if median(ratios) >= 1 else "no")
            rows = [dict(loader=name, workers=processes) | found]
            rows += [dict(loader=other, workers=args.workers)]
            for row, speeds in zip(rows, zip(*rounds)):
                speed = median(speeds)
                row |= dict(pixels=own.size, img_per_s=speed)
                row["batch_ms"] = 1000 * args.batch_size / speed
                if own.size == 32:
                    row |= dict(step_ms=1000 * step_s, share=row["batch_ms"] / (10 * step_s))
                yield row


def throughput(batches, workers: int, count: int, device: torch.device) -> float:
    """Images a second of the first `count` batches, on the device, from the arrival of each
    worker's first one on. Raises UserError where nothing is left to measure."""
    skip, images, began = max(1, workers), 0, time.perf_counter()
    for i, (img, *_) in enumerate(itertools.islice(batches, count), 1):
        img.to(device, non_blocking=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        now = time.perf_counter()
        if i == skip:
            began = now
        elif i > skip:
            images += len(img)
            spent = now - began
    if not images:
        raise UserError(f"{skip} batch(es) warm the loader up, and there are no more: --images N")
    return images / spent


def write_jpegs(root: Path, count: int) -> float:
    """Write `count` pictures of 500x375 pixels into root/train and two into root/test. Returns the
    kilobytes of one, on average.

    Soft patches and some noise: their files are as large as those of photographs.
    """
    from PIL import Image

    rng = np.random.default_rng(0)
    for split, n in (("train", count), ("test", 2)):
        for label in "ab":
            (root / split / label).mkdir(parents=True)
        for i in range(n):
            coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
            picture = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC)).astype(float)
            picture += rng.normal(0, 12, (375, 500, 1))
            Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(
                root / split / "ab"[i % 2] / f"{i}.jpg", quality=90
            )
    sizes = [path.stat().st_size for path in (root / "train").rglob("*.jpg")]
    return sum(sizes) / len(sizes) / 1000


class InMemory(torch.utils.data.Dataset):
    """Small images one by one through PIL, as torchvision's CIFAR does it."""

    def __init__(self, images: dataset.Images):
        from torchvision import transforms
        from torchvision.transforms import v2

        self.pixels, self.labels = images.pixels.numpy(), images.labels.tolist()
        size = images.size
        if images.enlarged:
            steps = [v2.Resize(round(size * 256 / 224)), v2.RandomCrop(size)]
            steps += [v2.RandomHorizontalFlip(), v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)]
        else:
            steps = [transforms.RandomCrop(size, padding=4, padding_mode="reflect")]
            steps += [transforms.RandomHorizontalFlip()]
        steps += [transforms.ToTensor(), transforms.Normalize(images.mean, images.std)]
        self.transform = transforms.Compose(steps)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int):
        from PIL import Image

        return self.transform(Image.fromarray(self.pixels[i])), self.labels[i]


def on_disk(root: str, size: int):
    """torchvision's own folder of images, with ImageNet's usual augmentation."""
    from torchvision import datasets, transforms

    steps = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()]
    steps += [transforms.ToTensor(), transforms.Normalize(*published.IMAGENET)]
    return datasets.ImageFolder(f"{root}/train", transforms.Compose(steps))


def plain_loader(images, args: argparse.Namespace):
    return torch.utils.data.DataLoader(
        images, args.batch_size, shuffle=True, num_workers=args.workers, drop_last=True
    )


# --- bench.py epoch -------------------------------------------------------------------------------


def epoch(args: argparse.Namespace, machine: utils.Machine):
    """Yield a row for each of what surrounds the steps: loader, evaluation, files."""
    images = random_images(args.samples, args.num_class)
    nets, rounds = pair(args, images), args.rounds
    steps = [full_step(BASE, args, machine, images, *nets, fixed)[0] for fixed in (True, False)]
    one, loaded = take_turns(steps, rounds, args.steps, machine.device)
    shares = [100 * (b / a - 1) for a, b in zip(one, loaded)]
    yield share_row("loader, of a step on one batch", loaded, one, shares, "at most 3")

    test = random_images(max(8, args.samples // 5), args.num_class)  # as CIFAR has them
    evaluations = evaluation(copy.deepcopy(nets[0]), test, machine)
    bare, own = take_turns(evaluations, rounds, 1, machine.device)
    shares = [100 * a / b for a, b in zip(bare, own)]
    yield share_row("evaluation, rate of bare inference", own, bare, shares, "at least 90")

    call, _ = full_step("st", args, machine, images, *nets)
    count = len(dataset.batch_bounds(args.samples, args.batch_size))
    with tempfile.TemporaryDirectory() as root:
        calls = [call, writing(args, machine, images, nets, root, count)]
        step_s, files = take_turns(calls, rounds, args.steps, machine.device)
    whole = [count * a + b + median(own) for a, b in zip(step_s, files)]
    shares = [100 * b / a for a, b in zip(whole, files)]
    yield share_row("log, CSV, checkpoints, of an epoch", files, whole, shares, "at most 2")


def share_row(what: str, own: list[float], other: list[float], shares: list, budget: str) -> dict:
    """A row from seconds and percentages round by round."""
    share, limit = median(shares), float(budget.split()[-1])
    met = share >= limit if "least" in budget else share <= limit
    return dict(
        what=what,
        own_ms=1000 * median(own),
        other_ms=1000 * median(other),
        **spread("share", shares),
        budget=budget,
        met="yes" if met else "no",
    )


def evaluation(net: nn.Module, test: dataset.Images, machine: utils.Machine) -> list:
    """Two functions that run all of `test`: the network alone on batches that lie ready, and
    utils.evaluate, meter and accuracies included."""
    net.to(machine.device, memory_format=torch.channels_last).eval()
    test, sizes = test.to(machine.device), set()
    hook = net.register_forward_pre_hook(lambda _, args: sizes.add(len(args[0])))
    utils.evaluate(net, stream.test_batches(test), machine)
    hook.remove()
    batches = [img for img, *_ in stream.test_batches(test, max(sizes))]

    @torch.inference_mode()
    def bare():
        for img in batches:
            with machine.autocast():
                net(img)

    return [bare, lambda: utils.evaluate(net, stream.test_batches(test), machine)]


def writing(args, machine, images, nets, root: str, steps: int):
    """A function that writes what a late epoch of `steps` does: log lines, CSV files and both
    checkpoints, each epoch being the best. The optimizer's state is that after a step."""
    flags, _ = train_kd.parse(["--kd_mode", "st", "--t_model", "none"])
    run = Run(argparse.Namespace(**vars(flags) | dict(save_root=root)), "run", ["bench.py"])
    run.start(machine, {})
    job, phase, optimizer, _ = distillation("st", args, machine, images, *nets)
    for x in job.learners(phase):
        x.grad = torch.zeros_like(x)
    optimizer.step()
    terms = dict.fromkeys(("ce", "kd", "train_top1"), torch.tensor(1.0, device=machine.device))
    meter = utils.Meter()
    meter.add(terms, 1)
    row = dict(phase=phase.name, epoch=1, lr=0.1, **meter.read(), test_loss=1.0, test_top5=1.0)
    run.history = [dict(row, test_top1=1.0)] * 200
    run.timing = [dict(row=1, seconds=100.0, train_img_per_s=1000.0)] * 200
    tops = itertools.count(1)

    def write():
        with contextlib.redirect_stdout(io.StringIO()):
            for _ in range(steps // flags.print_freq):
                run.log("  ".join(f"{name} {value:.4g}" for name, value in meter.read().items()))
            state = dict(
                weights=dict(snet=job.student.net.state_dict(), meta=run.meta),
                kd=job.kd.state_dict(),
                optimizer=optimizer.state_dict(),
            )
            run.epoch(dict(row, test_top1=float(next(tops))), 1000.0, state)

    return write


# --- what is printed ------------------------------------------------------------------------------

STEP = dict(  # key: title and format
    mode=("mode", ""),
    phase=("phase", ""),
    bare_ms=("bare ms", ".1f"),
    step_ms=("step ms", ".1f"),
    ratio=("ratio", ".3f"),
    ratio_min=("min", ".3f"),
    ratio_max=("max", ".3f"),
    img_per_s=("img/s", ".0f"),
    budget=("budget", ".2f"),
    met=("met", ""),
)
OPERATORS = dict(
    operator=("operator", ""),
    calls=("calls a step", ".1f"),
    self_ms=("self ms a step", ".2f"),
    share=("share %", ".1f"),
)
LOSS = dict(
    mode=("mode", ""),
    pair=("teacher -> student", ""),
    batch=("batch", "d"),
    ms=("ms", ".2f"),
    cpu_ms=("CPU ms", ".2f"),
    broadcast_ms=("broadcast ms", ".2f"),
    broadcast_batch=("at batch", "d"),
    faster=("times faster", ".1f"),
    difference=("difference", ".1e"),
    memory_mb=("memory MB", ".2f"),
    state_mb=("of it state", ".2f"),
    inputs_mb=("inputs MB", ".2f"),
    multiple=("times the inputs", ".2f"),
    budget=("budget", ""),
    met=("met", ""),
)
DATA = dict(
    loader=("loader", ""),
    pixels=("pixels", "d"),
    workers=("workers", "d"),
    img_per_s=("img/s", ".0f"),
    batch_ms=("ms a batch", ".2f"),
    ratio=("times plain", ".2f"),
    ratio_min=("min", ".2f"),
    ratio_max=("max", ".2f"),
    met=("met", ""),
    step_ms=("step ms", ".1f"),
    share=("share of it %", ".2f"),
)
EPOCH = dict(
    what=("what", ""),
    own_ms=("ms", ".1f"),
    other_ms=("ms of the other", ".1f"),
    share=("%", ".2f"),
    share_min=("min", ".2f"),
    share_max=("max", ".2f"),
    budget=("budget", ""),
    met=("met", ""),
)
NOTES = dict(
    step=(
        "bare: student forward, backward and SGD step and the teacher's forward, cross-entropy, "
        "one batch, no hooks, no loader; for train_base the student alone",
        "step: as train_kd.py takes it, loader and meter included; ratio: a round's step over its "
        "bare step, the median of the rounds",
        f"met: 'yes' with {SPARE} to spare, 'just' without",
        "the method's weight is that of the middle of the phase; the learning rate is 0, so that "
        "networks stay as they are; bss: all images that it may attack, for all its steps; wkd_l: "
        "without its look at all the images, its costs 0: that changes the values, not the work",
    ),
    profile=("self: an operator's own time, without that of the operators it calls",),
    loss=(
        "float32, forward and backward, on random features; times faster, difference: of the "
        "broadcast version at its own batch, which is smaller where it would not fit; wkd_l's costs "
        "are 0",
        "CPU ms, of --crd_paths: the processor's time of all threads, where other work takes its turn",
        "memory: peak of torch's allocator above the inputs, gradients of inputs and parameters "
        "included, and what the method holds all the time (state: parameters, banks)",
        "budget: an adapter's layers count as a network of the method's own; crd: its banks and "
        "labels twice and five float32 matrices (batch, samples)",
    ),
    data=(
        "plain: torchvision's own dataset and transforms, of PIL's images one by one, normalised by "
        "the workers",
        "times plain: ours over the plain one's images a second, round by round, the median; met: "
        "at least 1",
        "share: of the student's bare step, resnet20",
    ),
    epoch=(
        "loader: what a step of train_base costs more than the same on one batch",
        "evaluation: of a fifth as many images, over the network's eval mode under inference_mode "
        "on batches of the same size that lie ready",
        "files: of the last of 200 epochs, the best so far, over an epoch: --samples images at the "
        "measured step of st, the evaluation and the files themselves",
    ),
)
COMMANDS = dict(
    step=(step_flags, step, STEP),
    loss=(loss_flags, loss, LOSS),
    data=(data_flags, data, DATA),
    epoch=(add_networks, epoch, EPOCH),
)


def line(row: dict, columns: dict) -> str:
    """A row of the Markdown table."""
    values = [(row.get(key), form) for key, (_, form) in columns.items()]
    cells = ("-" if value is None else format(value, form) for value, form in values)
    return "| " + " | ".join(cells) + " |"


def head(columns: dict) -> list[str]:
    titles = [title for title, _ in columns.values()]
    return ["| " + " | ".join(titles) + " |", "| " + " | ".join("---" for _ in titles) + " |"]


def short(row: dict) -> dict:
    """Floats with six digits."""
    return {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()}


def about(machine: utils.Machine) -> dict:
    """The machine as it is before the run."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return dict(
        machine=str(machine),
        processor=processor(),
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        precision="bfloat16 autocast" if machine.bf16 else "float32",
        load_average=load,
    )


def processor() -> str:
    try:
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return f"{found[1] if found else platform.processor()}, {os.cpu_count()} cores"


def some(names):
    """An argparse type: 'all', or some of `names`, joined by commas."""

    def parse(text: str) -> tuple[str, ...]:
        if text == "all":
            return tuple(names)
        try:
            for name in text.split(","):
                utils.named(dict.fromkeys(names), name, "mode")
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        return tuple(text.split(","))

    return parse


def add_numbers(parser: cli.Parser, **flags) -> None:
    """Flags that are whole numbers: the least, the default, the help."""
    for flag, (least, default, text) in flags.items():
        parser.add_argument(
            f"--{flag}",
            type=cli.number(int, least),
            default=default,
            metavar="N",
            help=f"{text}(default {default})",
        )


def add_rounds(parser: cli.Parser) -> None:
    """The flags that all commands have."""
    add_numbers(parser, rounds=(1, 7, ""))
    add, cuda = parser.add_argument, cli.number(int, 0, 1)
    add("--cuda", type=cuda, metavar="0|1", help="0: CPU (default: what is there)")
    add("--threads", type=cli.number(int, 1), metavar="N", help="on the CPU (default: torch's)")
    add("--json", metavar="FILE", help="the figures, as JSON; '-': to stdout")


def add_amp(parser: cli.Parser) -> None:
    choices = ("auto", "bf16", "off")
    parser.add_argument(
        "--amp", choices=choices, default="auto", help="as in training (default auto)"
    )


def parse(argv: list[str]) -> argparse.Namespace:
    first = cli.Parser(prog="bench.py", description=__doc__)
    first.add_argument("command", choices=COMMANDS, help="COMMAND --help lists its flags")
    command = first.parse_args(argv[:1]).command
    parser = cli.Parser(prog=f"bench.py {command}")
    parser.set_defaults(command=command, profile=None, steps=0)
    COMMANDS[command][0](parser)
    return parser.parse_args(argv[1:])


@console.command
def main(argv: list[str] | None = None) -> dict:
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parse(argv)
    path = Path(args.json or "-")
    if path.is_dir() or not path.parent.is_dir():
        raise UserError(f"--json {path} cannot be written: a folder, or in none that is there")
    if args.profile and args.profile != BASE:
        # an unknown mode is an error at once
        rows_of(args.profile, args.num_class, args.batch_size)
    if args.threads:
        torch.set_num_threads(args.threads)
    machine = utils.machine(args.cuda, args.amp)
    if not args.steps:
        args.steps = 50 if machine.device.type == "cuda" else 5
    _, run, columns = COMMANDS[args.command]
    if args.profile:
        run, columns = operators, OPERATORS
    out = sys.stderr if args.json == "-" else sys.stdout
    silent = ("command", "modes", "cuda", "amp", "threads", "json")  # or said otherwise
    flags = {k: v for k, v in vars(args).items() if k not in silent and v}
    result = dict(command=" ".join(["bench.py", *argv]), **about(machine), flags=flags)
    lines = [f"bench.py {args.command}: {machine}"]
    lines += [f"{result['processor']}; torch {torch.__version__}"]
    lines += [", ".join(f"{key} {value}" for key, value in flags.items())]
    load = result["load_average"]
    if load is not None:
        busy = ": something else ran in the last minute, which spoils the times"
        lines += [f"load average before the run {load:.2f}{busy if load > 0.5 else ''}"]
    print(*lines, "", *head(columns), sep="\n", file=out)
    result["rows"] = []
    for row in map(short, run(args, machine)):
        result["rows"].append(row)
        print(line(row, columns), file=out, flush=True)
    result["notes"] = list(NOTES["profile" if args.profile else args.command])
    print("", *(f"- {note}" for note in result["notes"]), sep="\n", file=out)
    if args.json:
        text = json.dumps(result, indent=1) + "\n"
        if args.json == "-":
            sys.stdout.write(text)
        else:
            path.write_text(text, encoding="utf-8")
    return result


if __name__ == "__main__":
    main()
