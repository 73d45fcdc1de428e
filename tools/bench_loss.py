"""`bench.py loss`: time and memory of every loss without networks, on random features."""

import argparse
import copy
import functools
import math
import time
from dataclasses import replace
from statistics import median

import torch
from torch import Tensor, nn

import dataset
import network
import utils
from engine import cli
from engine.adapter import align
from engine.checkpoint import Weights
from engine.distiller import Batch, Criterion
from kd_losses import METHODS, crd
from tools.bench_flags import MODES_HELP, add_rounds, some
from tools.bench_meter import peak_bytes, quick_or_slow
from tools.bench_steps import longest, settings_of
from tools.plain_losses import BROADCAST
from utils import UserError

PAIRS = dict(  # teacher, student, batch
    cifar=(("resnet20", "resnet20", 128), ("resnet32x4", "resnet8x4", 64)),
    imagenet=(("torchvision/resnet50", "torchvision/resnet18", 64),),
)
SIZES = dict(
    cifar=(32, 100, 50_000), imagenet=(224, 1000, 200_000)
)  # pixels, classes, crd's samples
READS = dict(  # features of student and teacher that a loss is fed, if fewer than its inputs
    reviewkd=(("stages", "feat"), ("preacts", "feat")),
    srrl=(("last",), ("feat", "out")),
    catkd=(("last",), ("last",)),
    sdd=(("last",), ("last",)),
    ofa=(("stages", "out"), ("out",)),
)
HEADS = "srrl catkd sdd".split()  # also read the classifiers
MAPS = {"stem", "stages", "preacts", "last"}
FIT = 1.1e9  # bytes: if a tensor of a broadcast version would be larger, it gets fewer samples
MB = 1e6
VECTORS, BARE_MAPS, NET_MAPS = 64 * MB, 2, 6  # budgets: bytes, multiples of the inputs
PATHS = {"rows gathered": 0, "whole bank": math.inf}  # values of crd.GATHER for its two ways


def loss_flags(parser: cli.Parser) -> None:
    """The flags of `loss`."""
    add = parser.add_argument
    add("--modes", type=some(METHODS), default=tuple(METHODS), metavar="M,M", help=MODES_HELP)
    size = "pairs of networks and image size that give the feature shapes (default cifar)"
    add("--size", choices=PAIRS, default="cifar", help=size)
    add("--student", metavar="NAME", help="student of another pair of networks; needs --teacher")
    add("--teacher", metavar="NAME", help="teacher of that pair; needs --student")
    batch = "batch size (default: 128 or 64, by the pair)"
    add("--batch_size", type=cli.number(int, 3), metavar="N", help=batch)
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
        help="memory layout of the feature maps (default channels_last, as in training)",
    )
    add(
        "--crd_paths",
        action="store_true",
        help="measure crd twice, alternately: with gathered rows of the banks and with whole banks",
    )
    add("--memory", action="store_true", help="measure only memory, no times")
    add_rounds(parser)
    parser.set_defaults(amp="off")


def loss(args: argparse.Namespace, device: torch.device, precision: utils.Precision):
    """Yield a row for each mode and pair of networks: forward and backward of only the loss."""
    size, num_class, n_data = SIZES[args.size]
    pairs = PAIRS[args.size]
    if args.student or args.teacher:
        if not (args.student and args.teacher):
            given, other = ("student", "teacher") if args.student else ("teacher", "student")
            raise UserError(f"--{given} {getattr(args, given)}: needs --{other} NAME too")
        pairs = [(args.teacher, args.student, pairs[0][2])]
    for teacher, student, batch_size in pairs:
        nets = [Weights(x).build(num_class, 0, size).eval() for x in (student, teacher)]
        for mode in args.modes:
            how = args.batch_size or batch_size, 0 if args.memory else args.rounds, device
            bench = Loss(mode, nets, size, num_class, args.n_data or n_data, args.layout, how[0])
            # names without the library: torchvision/resnet50 is shown as resnet50
            names = " -> ".join(x.split("/")[-1] for x in (teacher, student))
            if mode == "crd" and args.crd_paths:
                measured = {f"crd, {path}": found for path, found in bench.paths(*how).items()}
            else:
                measured = {mode: bench.measure(*how)}
            for name, found in measured.items():
                yield dict(mode=name, pair=names, batch=how[0], **found)


class Loss:
    """The loss of one mode, on random features with the shapes of the networks' features."""

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
        (self.settings,) = settings_of(mode, num_class, batch_size).values()
        self.alone = self.settings.method.teacher != "grad" and mode != "bss"
        if not self.alone:
            return
        self.phase = longest(self.settings.phases)
        self.reads = READS.get(mode, (self.settings.inputs.reads,) * 2)
        stages = align(*nets, self.settings.stages)
        dry = torch.zeros(2, 3, size, size)
        with torch.no_grad():
            # a loss may be built from more than it is fed
            wants = [{*reads, *self.settings.inputs.reads} for reads in self.reads]
            self.shapes = [network.Tapped(x, r, stages)(dry) for x, r in zip(nets, wants)]
        heads = mode in HEADS
        self.shapes = [replace(x, net=Head(x.classifier) if heads else None) for x in self.shapes]
        classes = [str(i) for i in range(num_class)]
        labels = torch.arange(n_data) % num_class
        train = dataset.Images(dry, labels, classes, (0.5,) * 3, (0.25,) * 3)
        torch.manual_seed(0)
        with torch.no_grad():
            ids = list(range(len(stages)))
            self.criterion = Criterion(self.settings, ids, *self.shapes, train)
        self.criterion.eval().requires_grad_(False)
        for name in self.phase.trainable:
            head, _, inner = name.partition(".")
            if head == "kd":
                module = self.criterion.loss.get_submodule(inner) if inner else self.criterion
                module.train().requires_grad_(True)

    def features(self, batch_size: int, device: torch.device):
        """(student's, teacher's) random features and a random batch of the training set."""
        generator = torch.Generator().manual_seed(1)
        learn = (True, "teacher" in self.phase.trainable)
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
            if self.settings.method.two_views:
                found["strong"] = replace(shapes, out=draw(shapes.out, "out"))
            both.append(replace(shapes, **dict(out=None) | found))
        index = torch.randperm(self.n_data, generator=generator)[:batch_size].to(device)
        clock = torch.tensor(1.0, device=device), torch.tensor(240.0, device=device)
        return *both, Batch(None, index % self.num_class, index, None, *clock)

    def inputs(self, s, t) -> list[Tensor]:
        """The tensors that the loss is fed."""
        values = [getattr(x, kind) for x, reads in zip((s, t), self.reads) for kind in reads]
        values += [x.strong.out for x in (s, t) if x.strong]
        return [x for value in values for x in ([value] if torch.is_tensor(value) else value)]

    def broadcast(self) -> Criterion:
        """The same criterion with the broadcast version of its loss."""
        f, criterion = BROADCAST[self.mode][0], copy.deepcopy(self.criterion)
        many = isinstance(criterion.loss, nn.ModuleList)
        criterion.loss = (
            nn.ModuleList(Plain(x, f) for x in criterion.loss) if many else Plain(criterion.loss, f)
        )
        return criterion

    def call(self, criterion: Criterion, s, t, batch):
        """A function that computes the loss and new gradients, and returns the loss."""
        heads = [p for x in (s, t) if x.net is not None for p in x.net.parameters()]
        leaves = [
            x for x in (*self.inputs(s, t), *criterion.parameters(), *heads) if x.requires_grad
        ]

        def run():
            for x in leaves:
                x.grad = None
            value = criterion(s, t, batch, self.phase.inputs)
            value.backward()
            return value.detach()

        return run

    def budget(self, inputs: list[Tensor], batch_size: int) -> tuple[str, float]:
        """The memory budget, in words and in bytes."""
        if isinstance(self.criterion.loss, crd.CRD):
            bank = sum(x.nbytes for x in self.criterion.loss.buffers())
            board = 4 * batch_size * self.n_data
            return f"2 x banks + 5 x ({batch_size}, {self.n_data})", 2 * bank + 5 * board
        if not MAPS & {kind for reads in self.reads for kind in reads}:
            return f"{VECTORS / MB:.0f} MB", VECTORS
        learns = next(self.criterion.parameters(), None) is not None
        factor = NET_MAPS if learns else BARE_MAPS
        return f"{factor} x inputs", factor * sum(x.nbytes for x in inputs)

    def measure(self, batch_size: int, rounds: int, device: torch.device) -> dict:
        """Time and memory, and if a broadcast version exists, a comparison with it. With 0 rounds
        only the memory."""
        if not self.alone:
            return dict(budget="needs networks: see step")
        criterion = copy.deepcopy(self.criterion).to(device)
        features = self.features(batch_size, device)
        run, inputs = self.call(criterion, *features), self.inputs(*features[:2])
        found = {}
        if rounds:
            if self.mode in BROADCAST:
                found = self.against_broadcast(batch_size, rounds, device)
            (own,) = quick_or_slow([run], rounds, device)
            found["ms"] = 1000 * median(own)
        else:
            run()  # tensors that only the first call makes are not counted
        return found | self.memory(run, criterion, inputs, batch_size, device)

    def paths(self, batch_size: int, rounds: int, device: torch.device) -> dict[str, dict]:
        """{path: result of `measure`} of crd for each of PATHS, without the broadcast version."""
        criterion = copy.deepcopy(self.criterion).to(device)
        features = self.features(batch_size, device)
        run, inputs = self.call(criterion, *features), self.inputs(*features[:2])

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
                one |= self.memory(call, criterion, inputs, batch_size, device)
        finally:
            crd.GATHER = before
        return dict(zip(PATHS, found))

    def memory(self, run, criterion, inputs: list[Tensor], batch_size: int, device) -> dict:
        """Memory of a call of `run` and of the state of `criterion`, compared with the budget."""
        for x in (*inputs, *criterion.parameters()):
            x.grad = None
        memory = peak_bytes(run, device)
        state = sum(x.nbytes for x in (*criterion.parameters(), *criterion.buffers()))
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
        """Times of the loss and its broadcast version, run alternately, and the relative difference
        of their values."""
        fewer = self.fitting(batch_size)
        features = self.features(fewer, device)
        parts = copy.deepcopy(self.criterion).to(device), self.broadcast().to(device)
        calls, values = [self.call(criterion, *features) for criterion in parts], []
        for call in calls:
            torch.manual_seed(0)  # for the negatives that crd draws
            values.append(call().item())
        fast, slow = quick_or_slow(calls, rounds, device)
        return dict(
            broadcast_ms=1000 * median(slow),
            broadcast_batch=fewer,
            faster=median(b / a for a, b in zip(fast, slow)),
            difference=abs(values[0] - values[1]) / abs(values[0]),
        )

    def fitting(self, batch_size: int) -> int:
        """`batch_size`, or less if the broadcast version would have a tensor above FIT bytes."""
        largest = BROADCAST[self.mode][1]
        while largest and batch_size > 3 and 4 * largest(self, batch_size) > FIT:
            batch_size = max(3, batch_size * 3 // 4)
        return batch_size


class Head(nn.Module):
    """A stand-in for a network of which a loss reads only the classifier."""

    def __init__(self, classifier: nn.Module):
        super().__init__()
        self.classifier, self.taps = copy.deepcopy(classifier), dict(feat="classifier:in")


class Plain(nn.Module):
    """The loss `f(loss, ...)`: another formula with the settings and parameters of `loss`."""

    def __init__(self, loss: nn.Module, f):
        super().__init__()
        self.loss, self.f = loss, f

    def forward(self, *args):
        return self.f(self.loss, *args)
