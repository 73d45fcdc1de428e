"""What both training scripts need and nobody else owns: flags, recipes, device, meters, evaluation,
checkpoints and the run directory."""

import argparse
import csv
import ctypes
import difflib
import functools
import hashlib
import io
import json
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
import zipfile
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

# --- a user's mistake: one line, exit code 2 -----------------------------------------------------


class UserError(ValueError):
    """What is wrong and what to do, in one line for the person at the keyboard."""


class Stopped(Exception):
    """A run that a signal stopped, its checkpoint written."""

    def __init__(self, number: int, where: str):
        super().__init__(f"stopped by {signal.Signals(number).name} {where}: --resume goes on")
        self.signal = number


def command(main):
    """Make `main(argv=None)` a command: a UserError becomes one line and exit code 2."""

    @functools.wraps(main)
    def run(argv: list[str] | None = None):
        try:
            return main(argv)
        except UserError as error:
            line, code = f"error: {' '.join(str(error).split())}", 2
        except RuntimeError as error:
            line, code = " ".join(str(error).split()).rstrip("."), 2
            if line.startswith("DataLoader worker"):  # one was killed, wherever we were
                line = f"error: {line}: give fewer --workers, or --workers 0"
            elif isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in line:
                size = re.search(r"allocate ([\d.]+ \w+)", line)
                line = (
                    f"error: out of memory{f' ({size[1]} more are wanted)' if size else ''}: give "
                )
                line += "a smaller --batch_size, --img_size or network"
            else:
                raise
        except Stopped as stopped:
            line, code = str(stopped), 128 + stopped.signal
        except KeyboardInterrupt:
            line, code = "interrupted", 130
        finally:
            leave_ranks()
        if os.environ.get("RANK", "0") != "0":
            time.sleep(2)  # torchrun ends us where the first process failed too and has said so
        print(line, file=sys.stderr)
        raise SystemExit(code) from None

    return run


def first_line(error: Exception) -> str:
    """What an exception says, in a line; its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def named(table: dict, name: str, what: str):
    """`table[name]`, or a UserError with the names that come near, or all of them."""
    if name in table:
        return table[name]
    near = difflib.get_close_matches(str(name), table, n=3)
    if near:
        hint = f"did you mean {' or '.join(near)}?"
    else:
        hint = f"there are {', '.join(table)}" if len(table) < 60 else "none has a name like it"
    raise UserError(f"no {what} {name!r}: {hint}")


# --- protocols: how the published tables were trained --------------------------------------------

CIFAR10 = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
ZOO_CIFAR100 = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
CRD_CIFAR100 = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
REVIEWKD_CIFAR = tuple(
    tuple(round(v / 255, 6) for v in row) for row in ((125.3, 123.0, 113.9), (63.0, 62.1, 66.7))
)
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMG_SIZE = dict(imagenet=224)  # the default; other images stay as large as they are
LIGHT = ("MobileNetV2", "ShuffleV1", "ShuffleV2")  # trained at a lower rate


@dataclass(frozen=True)
class Protocol:
    """A training recipe.

    milestones: the epochs after which the learning rate falls to a tenth; scales: whether `lr` is that
    of `batch_size` and grows with another; networks: {name: fields that it changes}; warmup: epochs in
    which the rate grows linearly to `lr`; label_smoothing: of train_base.py alone, for teachers and
    baselines; img_size: None for that of the data.
    """

    lr: float
    momentum: float
    nesterov: bool
    weight_decay: float
    batch_size: int
    epochs: int
    milestones: tuple[int, ...]
    padding: str
    constants: dict
    networks: dict = field(default_factory=dict)
    scales: bool = False
    warmup: int = 0
    label_smoothing: float = 0.0
    img_size: int | None = None


IMAGENET_RECIPE = Protocol(
    lr=0.2,
    momentum=0.9,
    nesterov=False,
    weight_decay=1e-4,
    batch_size=512,
    scales=True,
    epochs=100,
    milestones=(30, 60, 90),
    padding="zero",
    constants=dict(imagenet=IMAGENET),
    img_size=224,
)
PROTOCOLS = {
    # Knowledge-Distillation-Zoo's scripts
    "kdzoo": Protocol(
        lr=0.1,
        momentum=0.9,
        nesterov=True,
        weight_decay=1e-4,
        batch_size=128,
        epochs=200,
        milestones=(100, 150),
        padding="reflect",
        constants=dict(cifar10=CIFAR10, cifar100=ZOO_CIFAR100, imagenet=IMAGENET),
    ),
    # the CRD benchmark (RepDistiller), which MDistiller's CIFAR-100 configurations follow
    "crd": Protocol(
        lr=0.05,
        networks={name: dict(lr=0.01) for name in LIGHT},
        momentum=0.9,
        nesterov=False,
        weight_decay=5e-4,
        batch_size=64,
        epochs=240,
        milestones=(150, 180, 210),
        padding="zero",
        constants=dict(cifar10=CIFAR10, cifar100=CRD_CIFAR100, imagenet=IMAGENET),
    ),
    # ReviewKD's CIFAR-100 scripts, which lower the rate one epoch later
    "reviewkd": Protocol(
        lr=0.1,
        networks={name: dict(lr=0.02) for name in LIGHT},
        momentum=0.9,
        nesterov=True,
        weight_decay=5e-4,
        batch_size=128,
        epochs=240,
        milestones=(151, 181, 211),
        padding="zero",
        constants=dict(cifar10=REVIEWKD_CIFAR, cifar100=REVIEWKD_CIFAR, imagenet=IMAGENET),
    ),
    # MDistiller's ImageNet configurations; some methods have a smaller batch
    "mdistiller-imagenet": IMAGENET_RECIPE,
    # ReviewKD's ImageNet scripts
    "reviewkd-imagenet": replace(IMAGENET_RECIPE, lr=0.1, batch_size=256),
    # KnowledgeReview: CIFAR-100 at 224 pixels, networks trained on ImageNet before
    "knowledgereview": Protocol(
        lr=0.05,
        momentum=0.9,
        nesterov=False,
        weight_decay=1e-4,
        networks={"torchvision/mobilenet_v2": dict(weight_decay=4e-5)},
        batch_size=128,
        epochs=100,
        milestones=(30, 60, 90),
        warmup=5,
        label_smoothing=0.1,
        padding="zero",
        constants=dict(cifar100=((0.45,) * 3, (0.225,) * 3), imagenet=IMAGENET),
        img_size=224,
    ),
}


def scaled(epochs: int, total: int, protocol: Protocol) -> int:
    """`epochs` of the protocol's number, in a run of `total`: at least one."""
    return max(1, round(epochs * total / protocol.epochs))


# --- flags ---------------------------------------------------------------------------------------

DATA_NAMES = "cifar10, cifar100, digits, imagefolder or imagenet"
SIZES = 5, 4096  # of images, in pixels: mirrored padding needs more than the 4 that it adds


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, whose errors are UserErrors."""

    def __init__(self, **kwargs):
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str):
        raise UserError(message)

    def parse_args(self, argv=None, owner=lambda flag: None):
        """Strict: an unknown flag is an error that says which flag comes near, or whose it is
        (`owner(flag)`: a sentence, or None)."""
        args, rest = self.parse_known_args(argv)
        if rest:
            flag = rest[0].split("=")[0]
            known = [name for action in self._actions for name in action.option_strings]
            near = difflib.get_close_matches(flag, known, n=1)
            hint = owner(flag) or (f"did you mean {near[0]}?" if near else "see --help")
            raise UserError(f"unknown flag {flag}: {hint}")
        return args


def number(kind, low=None, high=None, open_low=False):
    """An argparse type: an int or a float in [low, high], or (low, high] with `open_low`; none so
    large that torch would overflow."""
    what = {int: "a whole number", float: "a number"}[kind]
    bounds = [] if low is None else [f"{'above' if open_low else 'of at least'} {low}"]
    bounds += [] if high is None else [f"at most {high}"]

    def parse(text: str):
        try:
            value = kind(text)
            fine = abs(value) <= (2**53 if kind is int else 1e30)  # not for nan
            fine = fine and (low is None or value > low or (value == low and not open_low))
            fine = fine and (high is None or value <= high)
        except (ValueError, OverflowError):
            fine = False
        if not fine:
            raise argparse.ArgumentTypeError(
                f"{what} {' and '.join(bounds)} is wanted, not {text!r}"
            )
        return value

    return parse


def filled(text: str) -> str:
    """An argparse type: a name or path that is not empty and can be printed."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{text!r} is no UTF-8") from None
    if not text.strip() or "\0" in text:
        raise argparse.ArgumentTypeError(f"a name is wanted, not {text!r}")
    return text


def one_folder(text: str) -> str:
    """An argparse type: the name of one folder."""
    if Path(filled(text)).name != text or text == ".." or "\\" in text or not text.isprintable():
        raise argparse.ArgumentTypeError(
            f"the name of one folder is wanted, not {text!r}; --save_root says where it is"
        )
    return text


def comma(kind):
    """An argparse type: a tuple of `kind`s, written with commas."""

    def parse(text: str):
        return tuple(kind(part) for part in text.split(","))

    return parse


def add_common_flags(parser: Parser) -> None:
    """The flags of both scripts: KD-Zoo's names and meaning, and ours. A default of None stands for
    what the protocol, the dataset or the machine says."""
    add_data_flags(parser, training=True)
    add = parser.add_argument_group("training").add_argument
    add("--protocol", choices=PROTOCOLS, default="kdzoo", help="training recipe (default kdzoo)")
    add("--epochs", type=number(int, 1), metavar="N", help="all else scales with it")
    add_optimizer_flags(add)
    add(
        "--accumulate",
        type=number(int, 1),
        default=1,
        metavar="N",
        help="pieces in which a batch goes through, where it does not fit (default 1)",
    )
    add("--nesterov", type=number(int, 0, 1), metavar="0|1")
    add("--milestones", type=comma(number(int, 1)), metavar="E,E", help="lr falls after these")
    add(
        "--compile",
        action="store_true",
        help="torch.compile: minutes at first, then faster on GPUs",
    )
    add_machine_flags(parser)
    add_run_flags(parser)


def add_optimizer_flags(add) -> None:
    """The flags of the optimizer and of chance, by a group's `add_argument`."""
    add("--batch_size", type=number(int, 2), metavar="N")
    add("--lr", type=number(float, 0, open_low=True), metavar="X")
    add("--momentum", type=number(float, 0, 1), metavar="X")
    add("--weight_decay", type=number(float, 0), metavar="X")
    add(
        "--on_nan",
        choices=("stop", "skip"),
        default="stop",
        help="a loss that is no number stops the run (default), or its steps are left out",
    )
    add("--seed", type=number(int, 0, 2**32 - 1), default=2, metavar="N", help="(default 2)")


def add_run_flags(parser: Parser) -> None:
    """The flags of a run's folder."""
    add = parser.add_argument_group("run directory").add_argument
    add("--save_root", type=filled, default="./runs", metavar="DIR", help="(default ./runs)")
    add("--note", type=one_folder, metavar="NAME", help="name of the run's folder in save_root")
    add("--print_freq", type=number(int, 1), default=50, metavar="N", help="steps (default 50)")
    add("--tensorboard", action="store_true", help="write the epochs' metrics as events too")
    add("--resume", action="store_true", help="go on with the run that is in the folder")
    add(
        "--save_every",
        type=number(float, 0),
        metavar="MIN",
        help="a checkpoint inside an epoch too, after this many minutes",
    )
    add("--dry_run", action="store_true", help="check everything, say the recipe, train nothing")


def add_data_flags(parser: Parser, training: bool = False) -> None:
    """The flags that say which images."""
    add = parser.add_argument_group("data").add_argument
    add("--data_name", type=filled, metavar="NAME", help=DATA_NAMES)
    add("--img_root", type=filled, metavar="DIR", help="where the images are (default ./datasets)")
    add("--num_class", type=number(int, 2), metavar="N", help="checked against the dataset")
    add(
        "--img_size",
        type=number(int, *SIZES),
        metavar="N",
        help="NxN pixels; up to 96 kept on the device, above read batch by batch (imagenet: 224)",
    )
    if training:
        add("--flip", type=number(int, 0, 1), metavar="0|1", help="mirror training images or not")
    add(
        "--mean_std",
        type=mean_std,
        metavar="WHAT",
        help="normalisation: cifar10, cifar100, imagenet, measured, or six numbers M,M,M,S,S,S "
        "(default: the checkpoint's, else the protocol's for those three, else measured on the "
        "training images)",
    )


def add_machine_flags(parser: Parser) -> None:
    """The flags that say where and how it is computed."""
    add = parser.add_argument_group("machine").add_argument
    add("--cuda", type=number(int, 0, 1), metavar="0|1", help="0: CPU (default: what is there)")
    add(
        "--amp",
        choices=("auto", "bf16", "off"),
        default="auto",
        help="bfloat16 autocast; auto: where the hardware has it",
    )
    add(
        "--workers",
        type=number(int, 0, 1024),
        metavar="N",
        help="processes that read images above 96 pixels (default: one a CPU, at most 8)",
    )


def mean_std(text: str):
    """An argparse type: 'measured', a dataset with known constants, or six numbers."""
    if text in ("measured", "cifar10", "cifar100", "imagenet"):
        return text
    values = comma(number(float))(text)
    if len(values) != 6 or min(values[3:]) <= 0:
        raise argparse.ArgumentTypeError(
            "cifar10, cifar100, imagenet, measured or six numbers (the last three above 0), not "
            f"{text!r}"
        )
    if min(values[:3]) < 0 or max(values) > 1 or min(values[3:]) < 1e-3:
        raise argparse.ArgumentTypeError(f"pixels are scaled to 0..1, {text!r} is of another scale")
    return values[:3], values[3:]


def resolve(
    args: argparse.Namespace, net_name: str, knows: dict, batch_size: int | None = None
) -> argparse.Namespace:
    """The flags with everything filled in: from `knows` (the metadata of a checkpoint), then from
    `batch_size` (a method's own under the protocol), then from the protocol. The flags themselves
    stay as they were given."""
    recipe = argparse.Namespace(**vars(args))
    protocol = PROTOCOLS[args.protocol]
    protocol = replace(protocol, **protocol.networks.get(net_name, {}))
    resolve_data(recipe, knows, protocol)
    fill = dict(
        epochs=protocol.epochs,
        batch_size=batch_size or protocol.batch_size,
        momentum=protocol.momentum,
        weight_decay=protocol.weight_decay,
        nesterov=int(protocol.nesterov),
    )
    for flag, value in fill.items():
        if getattr(recipe, flag) is None:
            setattr(recipe, flag, value)
    if recipe.lr is None:
        factor = recipe.batch_size / protocol.batch_size if protocol.scales else 1
        recipe.lr = protocol.lr * factor
    recipe.warmup = scaled(protocol.warmup, recipe.epochs, protocol) if protocol.warmup else 0
    if recipe.nesterov and recipe.momentum == 0:
        raise UserError("--momentum 0 excludes Nesterov's: give --nesterov 0")
    if args.milestones is not None:
        pairs = zip((0, *args.milestones), (*args.milestones, recipe.epochs + 1))
        if any(one >= two for one, two in pairs):
            raise UserError(
                f"--milestones {','.join(map(str, args.milestones))}: each after the one before it, "
                f"and none after the last epoch, {recipe.epochs}"
            )
    if args.milestones is None:
        recipe.milestones = tuple(scaled(e, recipe.epochs, protocol) for e in protocol.milestones)
    recipe.padding = protocol.padding
    return recipe


def describe_recipe(recipe: argparse.Namespace, augmented: bool) -> str:
    """The optimiser of a resolved recipe, in a line. `augmented`: with the protocol's padding."""
    smoothing = getattr(recipe, "label_smoothing", None)
    return (
        f"protocol {recipe.protocol}: lr {recipe.lr:g}, falls after {recipe.milestones}, momentum "
        f"{recipe.momentum:g}{' (Nesterov)' if recipe.nesterov else ''}, weight decay "
        f"{recipe.weight_decay:g}, batch {recipe.batch_size}"
        + (f", warm-up {recipe.warmup}" if recipe.warmup else "")
        + (f", {recipe.accumulate} pieces a batch" if recipe.accumulate > 1 else "")
        + (f", label smoothing {smoothing:g}" if smoothing else "")
        + (f", {recipe.padding} padding" if augmented else "")
    )


def resolve_data(recipe: argparse.Namespace, knows: dict, protocol: Protocol) -> None:
    """Fill in, in place, what `add_data_flags` and --workers left open: from `knows`, then from
    `protocol`."""
    for flag in ("data_name", "num_class", "img_size"):
        given, known = getattr(recipe, flag), knows.get(flag)
        if given is not None and known is not None and given != known:
            raise UserError(f"--{flag} {given} contradicts the checkpoint, which says {known}")
        setattr(recipe, flag, known if given is None else given)
    if recipe.data_name is None:
        raise UserError(f"--data_name is needed: {DATA_NAMES}")
    if recipe.img_size is None:
        recipe.img_size = IMG_SIZE.get(recipe.data_name, protocol.img_size)
    if recipe.workers is None:
        recipe.workers = min(8, cpus())
    recipe.img_root = recipe.img_root or knows.get("img_root") or "./datasets"
    constants = recipe.mean_std
    if constants is None and "mean" in knows:
        constants = tuple(knows["mean"]), tuple(knows["std"])
    elif constants != "measured" and not isinstance(constants, tuple):
        constants = protocol.constants.get(constants or recipe.data_name)
    recipe.mean_std = None if constants == "measured" else constants


def cpus() -> int:
    """CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def load_data(recipe: argparse.Namespace, batch_size: int | None = None):
    """The dataset of a resolved recipe. Raises UserError where --num_class contradicts it, or it is
    smaller than the `batch_size` that was given."""
    import dataset

    data = dataset.load(
        recipe.data_name,
        recipe.img_root,
        recipe.mean_std,
        recipe.img_size,
        None if recipe.flip is None else bool(recipe.flip),
        recipe.workers,
    )
    if recipe.num_class not in (None, data.train.num_class):
        raise UserError(
            f"{recipe.num_class} classes are wanted (--num_class or the checkpoint), "
            f"{recipe.data_name} has {data.train.num_class}"
        )
    if batch_size is not None and batch_size > len(data.train):
        raise UserError(
            f"--batch_size {batch_size}: there are {len(data.train)} training images in {data.name}"
        )
    return data


def describe_data(recipe: argparse.Namespace, data) -> dict:
    """What a checkpoint remembers of the data."""
    return dict(
        data_name=data.name,
        img_root=recipe.img_root,
        img_size=recipe.img_size,
        num_class=data.train.num_class,
        classes=list(data.train.classes),
        mean=list(data.train.mean),
        std=list(data.train.std),
    )


# --- device, precision, randomness ---------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """Where training runs, and whether under bfloat16 autocast."""

    device: torch.device
    bf16: bool

    def autocast(self):
        if not self.bf16:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def __str__(self) -> str:
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        threads = "" if self.device.type == "cuda" else f", {torch.get_num_threads()} threads"
        threads += f", {world()} processes" if world() > 1 else ""
        return f"{name}{threads}, {'bfloat16 autocast' if self.bf16 else 'float32'}"


def machine(cuda: int | None = None, amp: str = "auto", ranks: bool = False) -> Machine:
    """The device and precision that the flags and the hardware give; with `ranks`, one of the
    processes that torchrun started."""
    if cuda and not torch.cuda.is_available():
        raise UserError("--cuda 1: torch sees no CUDA device; leave --cuda out to use the CPU")
    device = torch.device("cuda" if torch.cuda.is_available() and cuda != 0 else "cpu")
    if ranks:
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
            device = torch.device("cuda", torch.cuda.current_device())
        join_ranks(device.type == "cuda")
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        _keep_freed_memory()
        tests = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # private in torch
        native = any(getattr(torch.cpu, test, lambda: False)() for test in tests)
    return Machine(device, amp == "bf16" or (amp == "auto" and native))


def _keep_freed_memory() -> None:
    """Let glibc keep for the next step what this one has freed: to give it back and have it cleared
    anew costs up to a fifth of a step."""
    with suppress(OSError, AttributeError, TypeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 1 << 30) or mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD; the most of older ones
        mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


# --- several processes (torchrun), each with its share of every batch ------------------------------

_control = None  # a group for Python objects, on the CPU


def rank() -> int:
    return dist.get_rank() if world() > 1 else 0


def world() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def share() -> tuple[int, int]:
    """What `dataset` takes for this process's part."""
    return rank(), world()


def join_ranks(cuda: bool) -> None:
    """Under torchrun, meet the other processes."""
    global _control
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and world() == 1:
        dist.init_process_group("nccl" if cuda else "gloo")
        _control = dist.new_group(backend="gloo")


def leave_ranks() -> None:
    global _control
    if world() > 1:
        dist.destroy_process_group()
        _control = None  # its threads end here, and not with the interpreter


def everyone(value) -> list:
    """`value`, a small object, of every rank; none goes on before all have come."""
    if world() == 1:
        return [value]
    values = [None] * world()
    dist.all_gather_object(values, value, group=_control)
    return values


def same_everywhere(*modules: nn.Module) -> None:
    """Give every rank the first one's parameters and buffers."""
    if world() > 1:
        for module in modules:
            for x in module.state_dict().values():
                dist.broadcast(x, 0, group=None if x.is_cuda else _control)


def average_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Between backward and step: the mean over the ranks, whose shares of a batch are equal.

    By hand, where DistributedDataParallel fights with phases, second forwards and autograd.grad.
    """
    if world() > 1:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        _average([p.grad for p in params if p.grad is not None])


def average_batch_norms(*modules: nn.Module) -> None:
    """The running statistics, gathered on each rank's share, become the same on all."""
    if world() > 1:
        kinds = nn.modules.batchnorm._BatchNorm
        norms = [m for module in modules for m in module.modules() if isinstance(m, kinds)]
        found = [x for m in norms for x in (m.running_mean, m.running_var) if x is not None]
        if found:
            _average(found)


def _average(tensors: list[Tensor]) -> None:
    flat = torch.cat([x.detach().float().flatten() for x in tensors])
    dist.all_reduce(flat)
    flat /= world()
    parts = flat.split([x.numel() for x in tensors])
    for x, part in zip(tensors, parts):
        x.copy_(part.view_as(x))


class _Gather(torch.autograd.Function):
    """The batches of all ranks, one after the other. A gradient reaches one's own part; that of the
    whole loss is the sum over the ranks."""

    @staticmethod
    def forward(ctx, x):
        ctx.n = len(x)
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        return grad[rank() * ctx.n : (rank() + 1) * ctx.n]


def gather(x):
    """A tensor (or a list of them) over the samples of all ranks."""
    if isinstance(x, list):
        return [gather(part) for part in x]
    return _Gather.apply(x) if torch.is_tensor(x) else x


def seed_everything(seed: int) -> None:
    """Seed torch (all devices) and numpy."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)


def rng_state() -> dict[str, Tensor]:
    """The states of torch's generators, as tensors."""
    state = dict(cpu=torch.get_rng_state())
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Tensor]) -> None:
    """Go on where `rng_state()` was taken."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    if rank() > 0:  # its own state is nowhere, and it must not draw what the first rank draws
        torch.manual_seed(int(torch.randint(2**31, ())) + rank())


def sgd(parameters, recipe: argparse.Namespace, nesterov: bool | None = None) -> torch.optim.SGD:
    """A fresh optimizer of the recipe over `parameters`, in one group."""
    return torch.optim.SGD(
        parameters,
        lr=recipe.lr,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=bool(recipe.nesterov) if nesterov is None else nesterov,
        fused=True,  # one kernel for all parameters, a sixth of the time on two CPU cores
    )


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Load `state`. Raises ValueError where it belongs to other parameters."""
    optimizer.load_state_dict(state)
    for parameter, kept in optimizer.state.items():
        if any(torch.is_tensor(x) and x.shape not in ((), parameter.shape) for x in kept.values()):
            raise ValueError("the optimizer's state is one of other parameters")


def pieces(count: int, *tensors: Tensor):
    """Yield (parts, share): the tensors cut into `count` parts, and which share of the samples a part
    has. Never into single samples, which batch norm and the relational losses cannot use."""
    n = len(tensors[0])
    count = max(1, min(count, n // 2))
    for parts in zip(*(x.tensor_split(count) for x in tensors)):
        yield parts, len(parts[0]) / n


def step_decay(lr: float, epoch: int, milestones: tuple[int, ...], warmup: int = 0) -> float:
    """The learning rate of `epoch` (from 1): a tenth after each milestone, and growing linearly to `lr`
    over the first `warmup` epochs."""
    grown = min(epoch / warmup, 1.0) if warmup else 1.0
    return lr * grown * 0.1 ** sum(epoch > milestone for milestone in milestones)


# --- meters and evaluation -----------------------------------------------------------------------


class Meter:
    """Means over the samples of an epoch, summed on the device and read only when asked for.

    finite: leave out what holds a value that is none, which asks the device at every step.
    """

    def __init__(self, finite: bool = False):
        self.finite, self.began, self.loaded = finite, time.perf_counter(), 0
        self.sums, self.counts = {}, {}  # by the names that came together: a term may come later

    def add(self, values: dict[str, Tensor], n: int) -> None:
        """Add the means `values`, 0-dim tensors by name, over `n` samples."""
        names = tuple(values)
        total = n * torch.stack([value.detach().float() for value in values.values()])
        if self.finite and not total.isfinite().all():
            return
        self._add(names, total, n)

    def _add(self, names: tuple[str, ...], total: Tensor, n: int) -> None:
        if names in self.sums:  # loaded ones lie on the CPU
            total = self.sums[names].to(total.device) + total
        self.sums[names] = total
        self.counts[names] = self.counts.get(names, 0) + n

    def read(self) -> dict[str, float]:
        """The mean of each name over the samples for which it was added, on all ranks."""
        total, count = {}, {}
        for names, sums, n in self.state():
            for name, value in zip(names, sums.tolist()):
                total[name] = total.get(name, 0.0) + value
                count[name] = count.get(name, 0) + n
        return {name: total[name] / count[name] for name in total}

    def state(self) -> list:
        """What `load` takes: of all ranks together."""
        own = [(list(names), sums.cpu(), self.counts[names]) for names, sums in self.sums.items()]
        return [entry for part in everyone(own) for entry in part] if world() > 1 else own

    def load(self, state: list) -> None:
        """Go on with what other meters had added; the first rank keeps it."""
        if rank() > 0:
            return
        for names, sums, n in state:
            self._add(tuple(names), sums, n)
        self.loaded = self.count

    @property
    def count(self) -> int:
        """Samples added."""
        return sum(self.counts.values())

    @property
    def speed(self) -> float:
        """Samples a second that all processes added since the meter was made."""
        return world() * (self.count - self.loaded) / (time.perf_counter() - self.began)


def by_chance(top1: float, n: int, num_class: int) -> bool:
    """Whether an accuracy (percent) on n images lies within three deviations of guessing."""
    chance = 1 / num_class
    return top1 / 100 <= chance + 3 * (chance * (1 - chance) / n) ** 0.5


def top1(out: Tensor, target: Tensor) -> Tensor:
    """Share of samples, in percent, whose largest logit is the target's: a 0-dim tensor."""
    return 100 * (out.argmax(1) == target).float().mean()


@torch.no_grad()
def evaluate(
    net: nn.Module, images, machine: Machine, batch_size: int | None = None
) -> dict[str, float]:
    """Cross-entropy, top-1 and top-5 accuracy (percent) of `net` over all of `images`.

    `batch_size`: None: 500 images of up to 96 pixels, 100 of 224.
    """
    import dataset

    batch_size = batch_size or max(1, min(500, 100 * 224**2 // images.size**2))
    net.eval()
    meter = Meter()
    for img, target, _ in dataset.test_batches(images, batch_size, share=share()):
        with machine.autocast():
            out = net(img)
        out = out.float()
        five = out.topk(min(5, out.shape[1]), dim=1).indices == target[:, None]
        values = dict(
            test_loss=F.cross_entropy(out, target),
            test_top1=top1(out, target),
            test_top5=100 * five.any(1).float().mean(),
        )
        meter.add(values, len(target))
    return meter.read()


# --- checkpoints ---------------------------------------------------------------------------------


def save_checkpoint(state: dict, path: Path) -> None:
    """Write `state` so that `path` is always a whole file: written aside, flushed, renamed."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    _write(path, buffer.getbuffer())


def read_checkpoint(path: str | Path) -> dict:
    """The dict in a checkpoint, on the CPU, read without running any code that it may hold.

    A `.safetensors` file gives {'net': tensors, 'meta': ...}. Raises UserError where the file is
    missing, damaged, holds code, or holds no dict.
    """
    path = Path(path)
    try:
        path.stat()
    except (OSError, ValueError) as error:
        known = isinstance(error, (FileNotFoundError, NotADirectoryError))
        raise UserError(f"{path}: no such checkpoint{'' if known else f' ({error})'}") from error
    if path.is_dir():
        raise UserError(f"{path} is a folder: name the checkpoint in it, like model_best.pth.tar")
    if not path.is_file():  # one that never ends, perhaps
        raise UserError(f"{path} is no file that could be read twice: give a copy of it")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        # RepDistiller's *_last.pth keep their flags: a Namespace is a bag of values
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old file formats
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if zipfile.is_zipfile(path):  # torch does not look at the checksums
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged:
                raise ValueError(f"wrong checksum of {damaged}")
    except Exception as error:  # torch raises nearly anything on a broken or unsafe file
        unsafe = r"Unsupported (?:global|class|operand|operator)[^\n]*?([\w.]+\.\w+)"
        code = re.search(unsafe, str(error))
        if code:
            raise UserError(
                f"{path} holds more than tensors ({code[1]}), and reading that may run code. If you "
                'trust it, convert it once: python -c "import torch; c = '
                f"torch.load('{path}', map_location='cpu', weights_only=False); c = c if "
                "isinstance(c, dict) else c.state_dict(); torch.save({'net': c.get('model') or "
                f"c.get('net') or c.get('state_dict') or c}}, '{path.stem}.converted.pth')\""
            ) from error
        code = re.search(r"unsupported GLOBAL ([\w.]+) whose module \S+ is blocked", str(error))
        if code:
            raise UserError(
                f"{path} holds code ({code[1]}) that no checkpoint needs and was not read: do not "
                "trust it"
            ) from error
        reason = first_line(error).split(". ")[0]
        raise UserError(f"{path} is damaged, cut short, or not a checkpoint ({reason})") from error
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path}: holds a {type(checkpoint).__name__}, not a checkpoint's dict")
    return checkpoint


def _read_safetensors(path: Path) -> dict:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise UserError(f"{path} needs safetensors: pip install safetensors") from None
    try:
        with safe_open(path, framework="pt") as file:
            net = {key: file.get_tensor(key) for key in file.keys()}
            meta = json.loads((file.metadata() or {}).get("meta", "null"))
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{path} is damaged, cut short, or not safetensors ({first_line(error)})"
        ) from error
    return dict(net=net, meta=meta)


def sha256(path: str | Path) -> str:
    """Fingerprint of a file."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _write(path: Path, data) -> None:
    """All of it or nothing, also when the machine stops: aside, to the disk, then in its place."""
    aside = path.with_name(path.name + ".tmp")
    try:
        with open(aside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError:
        with suppress(OSError):
            aside.unlink()
        raise
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def to_cpu(x):
    """`x` with every tensor in it on the CPU."""
    if torch.is_tensor(x):
        return x.detach().cpu()
    if isinstance(x, dict):
        return {key: to_cpu(value) for key, value in x.items()}
    return type(x)(map(to_cpu, x)) if isinstance(x, (list, tuple)) else x


# --- the run directory ---------------------------------------------------------------------------


class Run:
    """The folder save_root/note of one run and everything in it.

    args.json, log.txt, metrics.csv (a row an epoch, a function of flags and seed alone), timing.csv,
    curves.png, result.json (of a finished run), checkpoint.pth.tar (enough to go on bit for bit) and
    model_best.pth.tar. Nothing is written before `start()`; a folder that holds another run, or that
    another process writes into, is refused.

        with run.start(...):        # signals are caught from here on
            meter, done = run.begin()
            if run.due(): run.pause(state, meter, step, where)    # inside an epoch
            run.epoch(row, speed, state())                        # at its end

    loss, score: the metrics that the curves show; the best epoch is the one of the highest score.
    """

    def __init__(
        self,
        recipe: argparse.Namespace,
        note: str,
        argv: list[str],
        loss: str = "ce",
        score: str = "test_top1",
    ):
        self.dir = Path(recipe.save_root) / note
        self.recipe, self.argv, self.loss, self.score = recipe, argv, loss, score
        self.history, self.timing = [], []
        self.best = dict(epoch=0, score=-1.0)
        self.saved = self.inside = self.events = self.signal = None
        self.handlers, self.where, self.warned = {}, "before its first step", set()
        if recipe.tensorboard:
            summary_writer()  # or say what to install, before anything is written
        self.checkpoint = self.dir / "checkpoint.pth.tar"
        for parent in [self.dir, *self.dir.parents]:
            try:
                file = parent.exists() and not parent.is_dir()
            except OSError as error:
                raise UserError(f"{parent} cannot be used ({error.strerror})") from error
            if file:
                raise UserError(f"{parent} is a file: give another --save_root or --note")
        if recipe.resume:
            if self.checkpoint.exists():
                self.saved = read_checkpoint(self.checkpoint)
                with self.intact():
                    self._same_flags(self.saved["flags"])
                    self.history, self.timing = self.saved["history"], self.saved["timing"]
                    self.best, self.inside = self.saved["best"], self.saved["inside"]
                    self._look_over()
            else:  # stopped before its first checkpoint
                self._same_flags(self._recorded())
        elif self.dir.exists() and any(self.dir.iterdir()):
            raise UserError(
                f"{self.dir} holds another run: --resume goes on with it, --note NAME starts another"
            )

    @contextmanager
    def intact(self):
        """Whatever fails in here, because the checkpoint holds something else, is a UserError."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"--resume: {self.checkpoint} is damaged, or not a run's checkpoint "
                f"({type(error).__name__}: {first_line(error)}): start the run again"
            ) from error

    def _look_over(self) -> None:
        """Raise something where what the checkpoint says of its epochs cannot be."""
        if self.inside:
            Meter().load(self.inside["meter"])
            self.inside["step"] + self.inside["seconds"]
        self.best["score"] + self.best["epoch"] + sum(row["seconds"] for row in self.timing)
        lines = [_line(row) for row in self.history]
        if len(lines) != len(self.timing):
            raise ValueError(f"{len(lines)} epochs and the times of {len(self.timing)}")

    def _recorded(self) -> dict:
        """The flags that args.json remembers."""
        try:
            recipe = json.loads((self.dir / "args.json").read_text(encoding="utf-8"))["recipe"]
            return {key: recipe.get(key) for key in self._flags()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"--resume: there is no run in {self.dir} (checkpoint.pth.tar)"
            ) from error

    def _flags(self) -> dict:
        """The flags that decide the result, as plain values."""
        free = (
            "print_freq",
            "tensorboard",
            "save_every",
            "resume",
            "dry_run",
            "save_root",
            "note",
            "img_root",
            "cuda",
            "workers",
        )
        flags = {key: value for key, value in vars(self.recipe).items() if key not in free}
        return json.loads(json.dumps(flags, default=str))

    def _same_flags(self, saved: dict) -> None:
        now = self._flags()
        scripts = dict(net_name="train_base.py", iters="train_det.py", kd_mode="train_kd.py")
        other, own = (
            next((x for key, x in scripts.items() if key in f), None) for f in (saved, now)
        )
        if other != own:
            raise UserError(f"--resume: the run in {self.dir} is one of {other}")
        for key in sorted(set(now) | set(saved)):
            if now.get(key) != saved.get(key):
                raise UserError(
                    f"--resume: --{key} is {now.get(key)}, the run was started with {saved.get(key)}"
                )

    def start(self, machine: Machine, meta: dict, notes: dict | None = None) -> "Run":
        """Make the folder and write args.json. `meta`: what checkpoints remember of network and data;
        `notes`: what else belongs into args.json."""
        self.meta = meta
        everyone(None)  # all have seen the folder as it was
        self.began = self.kept = time.perf_counter()
        if self.inside:
            self.began -= self.inside["seconds"]
        if rank() > 0:
            return self
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
            self._lock()
            self.log_file = open(self.dir / "log.txt", "a", buffering=1, encoding="utf-8")
            if not self.saved:
                self._write_args(machine, notes or {})
            elif self.history:  # it may have been stopped between the checkpoint and these
                self._write_rows()
        except OSError as error:
            raise UserError(f"{self.dir} cannot be written ({error.strerror})") from error
        if self.recipe.tensorboard:
            self.events = summary_writer()(self.dir, purge_step=len(self.history) + 1)
        return self

    def _lock(self) -> None:
        """Hold the folder until this process ends, however it ends."""
        self.lock = open(self.dir / ".lock", "w")
        try:
            import fcntl
        except ImportError:  # not on Windows
            return
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{self.dir} is in use: another process trains there") from error

    def _write_args(self, machine: Machine, notes: dict) -> None:
        record = dict(
            command=" ".join(self.argv),
            recipe={k: v for k, v in vars(self.recipe).items() if k not in ("resume", "dry_run")},
            machine=str(machine),
            versions=dict(
                python=platform.python_version(),
                torch=torch.__version__,
                numpy=np.__version__,
            ),
            commit=_commit(),
            meta=self.meta,
            **notes,
        )
        text = json.dumps(record, indent=1, default=str) + "\n"
        _write(self.dir / "args.json", text.encode())

    def __enter__(self) -> "Run":
        """Catch the signals that ask for an end. Only a program's main thread may."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.handlers[number] = signal.signal(number, self._stop)
        return self

    def _stop(self, number: int, frame) -> None:
        """The step at work is finished and everything is saved; a second signal ends at once."""
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number
        if rank() == 0:
            os.write(2, b"stopping after this step\n")  # a print may be at work just now

    def __exit__(self, *error) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if rank() > 0:
            return
        self.log_file.close()
        self.lock.close()
        if self.events:
            self.events.close()

    def log(self, text: str) -> None:
        """Print a line and keep it in log.txt."""
        if rank() > 0:
            return
        print(text, flush=True)
        try:
            self.log_file.write(text + "\n")
        except OSError as error:
            raise self._full(error) from error

    def warn(self, text: str) -> None:
        """A warning, once."""
        if text not in self.warned:
            self.warned.add(text)
            self.log(f"warning: {text}")

    def watch(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Under --on_nan skip, the optimizer leaves out the steps whose gradients are no numbers."""

        def leave_out(optimizer, *args):
            grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
            norms = torch._foreach_norm([grad for grad in grads if grad is not None])
            if not torch.stack([norm.float() for norm in norms]).isfinite().all():
                optimizer.zero_grad(set_to_none=True)
                self.log("a step without finite gradients is left out")

        if self.recipe.on_nan == "skip":
            optimizer.register_step_pre_hook(leave_out)
        return optimizer

    def _full(self, error: OSError) -> UserError:
        return UserError(
            f"{self.dir} cannot be written ({error.strerror}): the last checkpoint is whole, "
            "make room and go on with --resume"
        )

    def begin(self) -> tuple[Meter, int]:
        """An epoch begins, or is gone on with: its meter and the number of its steps that are done."""
        meter, inside, self.inside = Meter(self.recipe.on_nan == "skip"), self.inside, None
        if not inside:
            return meter, 0
        meter.load(inside["meter"])
        return meter, inside["step"]

    def due(self) -> bool:
        """Whether to save inside an epoch: a signal wants an end, or --save_every is over."""
        minutes = self.recipe.save_every
        late = minutes is not None and time.perf_counter() - self.kept > 60 * minutes
        if world() > 1:  # all or none
            votes = torch.tensor([self.signal or 0, late], dtype=torch.int32)
            dist.all_reduce(votes, dist.ReduceOp.MAX, group=_control)
            self.signal, late = votes[0].item() or None, bool(votes[1])
        return late or self.signal is not None

    def pause(self, state, meter: Meter, step: int, where: str) -> None:
        """Save inside an epoch, after `step` of it, what `state()` gives; and stop where a signal
        asked for it. A checkpoint with numbers that are none is not written."""
        check_finite(meter.read(), where)
        self.where = f"after {where}"
        self.save(state(), dict(step=step, meter=meter.state()))

    def save(self, state: dict, inside: dict | None = None, better: bool = False) -> None:
        """Write a checkpoint. `state`: what it holds, `state['weights']` also being what model_best
        holds; `inside`: how far the epoch at work is, if it is."""
        self.due()  # the ranks agree on whether this is the end
        signal_now = self.signal
        if inside:
            inside |= dict(seconds=time.perf_counter() - self.began)
        if rank() == 0:
            self._write_checkpoints(state, inside, better)
        self.kept = time.perf_counter()
        if signal_now:
            raise Stopped(signal_now, self.where)

    def _write_checkpoints(self, state: dict, inside: dict | None, better: bool) -> None:
        weights = state.pop("weights")
        scores = {"epoch": len(self.history)}
        row = self.history[-1] if self.history else {}
        if "test_top1" in row:
            scores |= {"prec@1": row["test_top1"], "prec@5": row["test_top5"]}
        everything = dict(
            weights,
            **scores,
            **state,
            rng=rng_state(),
            flags=self._flags(),
            history=self.history,
            timing=self.timing,
            best=self.best,
            inside=inside,
        )
        try:
            if better:
                save_checkpoint(to_cpu(dict(weights, **scores)), self.dir / "model_best.pth.tar")
            save_checkpoint(to_cpu(everything), self.dir / "checkpoint.pth.tar")
            if not inside:
                self._write_rows()
        except OSError as error:
            raise self._full(error) from error

    def _write_rows(self) -> None:
        for name, rows in (("metrics", self.history), ("timing", self.timing)):
            _write(self.dir / f"{name}.csv", _csv(rows).encode())

    def epoch(self, row: dict, speed: float, state: dict, keep_best: bool = True) -> None:
        """An epoch is done: log it, save everything.

        `row`: its metrics; `speed`: training images a second; `state`: as for `save`; `keep_best`:
        whether the epoch may be the best one.
        """
        now = time.perf_counter()
        seconds, self.began = now - self.began, now
        self.history.append({key: _short(value) for key, value in row.items()})
        self.timing.append(
            dict(row=len(self.history), seconds=round(seconds, 3), train_img_per_s=round(speed, 1))
        )
        self.log(_line(row) + f"  {seconds:6.1f} s  {speed:6.0f} img/s")
        if self.events:
            for name, value in row.items():
                if not isinstance(value, str):
                    self.events.add_scalar(name, value, len(self.history))
            self.events.flush()
        better = keep_best and row[self.score] > self.best["score"]
        if better:
            self.best = dict(epoch=len(self.history), score=row[self.score])
        self.where = f"after epoch {len(self.history)}"
        self.save(state, better=better)

    def finish(self) -> dict:
        """Say the result, draw the curves, write result.json: last and best accuracy, the peer's too
        where two networks learned, and the seconds. Returns the same, and the folder."""
        last = self.history[-1][self.score]
        best, seconds = self.best["score"], sum(row["seconds"] for row in self.timing)
        result = dict(last=last, best=best, seconds=round(seconds, 3))
        peer = [row["peer_test_top1"] for row in self.history if "peer_test_top1" in row]
        if peer:
            result |= dict(peer_last=peer[-1], peer_best=max(peer))
        self.log(
            f"last {last:.2f}  best {best:.2f} (row {self.best['epoch']}, chosen on the test set)  "
            f"{seconds:.0f} s  {self.dir}"
        )
        if rank() > 0:
            return dict(result, dir=str(self.dir))
        try:
            draw_curves([self.dir], self.dir / "curves.png", None, self.loss, self.score)
            _write(self.dir / "result.json", (json.dumps(result) + "\n").encode())
        except OSError as error:
            raise self._full(error) from error
        return dict(result, dir=str(self.dir))


def summary_writer():
    """TensorBoard's, or a UserError that says what to install."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("--tensorboard needs a package: pip install tensorboard") from error
    return SummaryWriter


def check_finite(values: dict[str, float], where: str) -> None:
    """Stop a run whose loss is no number, naming the term."""
    if not values:
        raise UserError(f"{where}: every step was left out, none had finite losses: lower --lr")
    bad = [name for name, value in values.items() if not np.isfinite(value)]
    if bad:
        raise UserError(
            f"{where}: {', '.join(bad)} is not finite: lower --lr or the method's weight; the last "
            "checkpoint is whole"
        )


def _commit() -> str | None:
    """The project's commit, with + where the files differ from it."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run(
            git + ["rev-parse", "HEAD"], capture_output=True, text=True, check=True
        )
        dirty = subprocess.run(git + ["status", "--porcelain", "-uno"], capture_output=True)
        return head.stdout.strip() + ("+" if dirty.stdout else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _short(value):
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _line(row: dict) -> str:
    """An epoch's row, aligned."""
    parts = []
    for key, value in row.items():
        if isinstance(value, float):
            value = f"{value:6.2f}" if "top" in key else f"{value:<9.4g}"
        parts.append(f"{key} {value:>3}")
    return "  ".join(parts)


def _csv(rows: list[dict]) -> str:
    text = io.StringIO()
    columns = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def read_metrics(folder: str | Path) -> list[dict]:
    """The rows of a run's metrics.csv, numbers as floats, empty cells left out."""
    with open(Path(folder) / "metrics.csv", encoding="utf-8") as file:
        return [
            {key: _number(value) for key, value in row.items() if value != ""}
            for row in csv.DictReader(file)
        ]


def _number(text: str):
    try:
        return float(text)
    except ValueError:
        return text


def draw_curves(
    folders: list[str | Path],
    path: str | Path,
    labels: list[str] | None = None,
    loss: str = "ce",
    score: str = "test_top1",
) -> bool:
    """Two metrics of some runs, row by row, into one figure. False without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        print("no curves drawn: pip install matplotlib")
        return False
    from matplotlib.figure import Figure  # not pyplot: no window system, no global state
    from matplotlib.ticker import MaxNLocator

    titles = dict(ce="training cross-entropy", loss="training loss", test_top1="test top-1 (%)")
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    colors = matplotlib.colormaps["tab10"].colors
    for i, folder in enumerate(folders):
        rows = read_metrics(folder)
        label = labels[i] if labels else Path(folder).name
        style = dict(color=colors[i % 10], label=label, marker=".", markersize=4)
        for axis, key in ((left, loss), (right, score)):
            points = [(i, row[key]) for i, row in enumerate(rows, 1) if key in row]
            axis.plot(*zip(*points), **style)
    for axis, key in ((left, loss), (right, score)):
        axis.set(title=titles.get(key, key), xlabel="row of metrics.csv")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
    left.set_yscale("log")
    right.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    return True
