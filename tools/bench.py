"""Measure the cost of each method: training step, loss, data loading, and the rest of an epoch.

    python tools/bench.py step                            # each method's step / a bare step
    python tools/bench.py step --modes at,crd --json step.json
    python tools/bench.py step --profile crd              # the slowest operators of that step
    python tools/bench.py loss --size imagenet            # only the losses: time and memory
    python tools/bench.py loss --modes crd --crd_paths    # crd: gathered rows, whole bank
    python tools/bench.py data --workers 2                # our data loaders / plain DataLoaders
    python tools/bench.py together                        # K students in one process / K processes
    python tools/bench.py cache --modes st,dkd            # steps that read the teacher from a cache
    python tools/bench.py epoch                           # loader, evaluation, files of an epoch

Prints a Markdown table and explains its columns below it. --json FILE also writes the figures as
JSON ('-': JSON to stdout, table to stderr). Compared variants alternate in one process, on the
same machine.
"""

import argparse
import contextlib
import copy
import io
import itertools
import json
import os
import platform
import re
import sys
import tempfile
from pathlib import Path
from statistics import median

# hides the profiler's messages; the profiler reads this variable when torch is imported
os.environ.setdefault("KINETO_LOG_LEVEL", "6")

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import utils  # noqa: E402  before torch: it sets how torch's threads wait
import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402

import dataset  # noqa: E402
from engine import cli, console, stream  # noqa: E402
from engine.run import Run  # noqa: E402
from kd_losses import METHODS  # noqa: E402
from tools.bench_data import data, data_flags  # noqa: E402
from tools.bench_flags import MODES_HELP, add_networks, some  # noqa: E402
from tools.bench_loss import loss, loss_flags  # noqa: E402
from tools.bench_meter import seconds, spread, take_turns  # noqa: E402
from tools.bench_together import CACHE, TOGETHER, cache, together, together_flags  # noqa: E402
from tools.bench_steps import (  # noqa: E402
    BASE,
    bare_step,
    distillation,
    flags_of,
    full_step,
    pair,
    random_images,
    settings_of,
)
from utils import UserError  # noqa: E402

BUDGET = {  # largest time of a step, as a multiple of the bare step
    mode: limit
    for limit, modes in {
        1.10: "logits st dkd pkt cc fitnet",
        1.15: "lskd dist nkd ttm wttm rld ctkd wsld itrd pefd vkd",
        1.20: "at sp nst fsp ab irg afd rkd",
        1.35: "vid ft ofd srrl simkd ickd catkd wkd_f sdd mgd semckd ofa",
        1.7: "reviewkd",
        2.0: "lwm crd",
        2.2: "dml mlkd crld",  # mlkd and crld: forward passes of two views
        3.0: "bss kdsvd wkd_l",
        7.0: "sobolev",
    }.items()
    for mode in modes.split()
}
SPARE = 0.05  # "yes" needs a ratio this far below its budget; closer is "just"


# --- bench.py step --------------------------------------------------------------------------------


def step_flags(parser: cli.Parser) -> None:
    """The flags of `step`."""
    add = parser.add_argument
    everything = (BASE, *METHODS)
    add("--modes", type=some(everything), default=everything, metavar="M,M", help=MODES_HELP)
    add("--profile", metavar="MODE", help="print the slowest operators in the step of this method")
    add_networks(parser)


def step(args: argparse.Namespace, device: torch.device, precision: utils.Precision):
    """Yield a row for each mode: its step and the bare step, measured alternately."""
    images = random_images(args.samples, args.num_class)
    nets = pair(args, images)
    bare = {
        alone: bare_step(args, device, precision, images, *nets, alone) for alone in (False, True)
    }
    for mode in args.modes:
        call, phase = full_step(mode, args, device, precision, images, *nets)
        rounds = take_turns([bare[mode == BASE], call], args.rounds, args.steps, device)
        yield step_row(mode, phase, *rounds, args.batch_size)


def step_row(mode: str, phase: str, bare: list[float], own: list[float], batch_size: int) -> dict:
    """The row of `mode`. bare, own: seconds of the bare step and of its step, per round."""
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


def verdict(ratio: float, budget: float | None) -> str | None:
    """Whether a budget is met: 'yes' if `ratio` is at least SPARE below it, 'just', or 'no'."""
    if budget is None:
        return None
    return "yes" if ratio <= budget - SPARE else "just" if ratio <= budget else "no"


def operators(args: argparse.Namespace, device: torch.device, precision: utils.Precision):
    """Yield the slowest operators of a mode's step; their time excludes called operators."""
    images = random_images(args.samples, args.num_class)
    call, _ = full_step(args.profile, args, device, precision, images, *pair(args, images))
    steps, cuda = args.steps, device.type == "cuda"
    seconds(call, 2, device)
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * cuda]
    with profile(activities=activities) as profiler:
        wall = seconds(call, steps, device)
    own = "self_device_time_total" if cuda else "self_cpu_time_total"
    found = [
        (getattr(event, own), event)
        for event in profiler.key_averages()
        if event.device_type == torch.autograd.DeviceType.CPU  # GPU kernels would count twice
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


# --- bench.py epoch -------------------------------------------------------------------------------


def epoch(args: argparse.Namespace, device: torch.device, precision: utils.Precision):
    """Yield a row for each part of an epoch apart from its steps: loader, evaluation, files."""
    images = random_images(args.samples, args.num_class)
    nets, rounds = pair(args, images), args.rounds
    steps = [
        full_step(BASE, args, device, precision, images, *nets, fixed)[0] for fixed in (True, False)
    ]
    one, loaded = take_turns(steps, rounds, args.steps, device)
    shares = [100 * (b / a - 1) for a, b in zip(one, loaded)]
    yield share_row("loader, extra time of a step", loaded, one, shares, "at most 3")

    test = random_images(max(8, args.samples // 5), args.num_class)  # as many as CIFAR has
    evaluations = evaluation(copy.deepcopy(nets[0]), test, device, precision)
    bare, own = take_turns(evaluations, rounds, 1, device)
    shares = [100 * a / b for a, b in zip(bare, own)]
    yield share_row("evaluation, speed of bare inference", own, bare, shares, "at least 90")

    call, _ = full_step("st", args, device, precision, images, *nets)
    count = len(dataset.batch_bounds(args.samples, args.batch_size))
    with tempfile.TemporaryDirectory() as root:
        calls = [call, writing(args, device, precision, images, nets, root, count)]
        step_s, files = take_turns(calls, rounds, args.steps, device)
    whole = [count * a + b + median(own) for a, b in zip(step_s, files)]
    shares = [100 * b / a for a, b in zip(whole, files)]
    yield share_row("log, CSV, checkpoints, share of an epoch", files, whole, shares, "at most 2")


def share_row(what: str, own: list[float], other: list[float], shares: list, budget: str) -> dict:
    """A row. own, other: seconds per round; shares: percent per round."""
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


def evaluation(
    net: nn.Module, test: dataset.Images, device: torch.device, precision: utils.Precision
) -> list:
    """Two functions that run all of `test`: only the network, on prepared batches; and
    utils.evaluate, with meter and accuracies."""
    net.to(device, memory_format=torch.channels_last).eval()
    test, sizes = test.to(device), set()
    hook = net.register_forward_pre_hook(lambda _, args: sizes.add(len(args[0])))
    utils.evaluate(net, stream.test_batches(test), precision)
    hook.remove()
    batches = [img for img, *_ in stream.test_batches(test, max(sizes))]

    @torch.inference_mode()
    def bare():
        for img in batches:
            with precision.autocast():
                net(img)

    return [bare, lambda: utils.evaluate(net, stream.test_batches(test), precision)]


def writing(args, device, precision, images, nets, root: str, steps: int):
    """A function that writes the files of a late epoch with `steps` steps: log lines, CSV files and
    both checkpoints, since each epoch is the best one. The optimizer has taken one step."""
    flags = flags_of("st")
    run = Run(argparse.Namespace(**vars(flags) | dict(save_root=root)), "run", ["bench.py"])
    run.start(utils.describe_device(device, precision), {})
    distiller, phase, optimizer, _ = distillation("st", args, device, precision, images, *nets)
    for x in distiller.set_trainable(phase):
        x.grad = torch.zeros_like(x)
    optimizer.step()
    terms = dict.fromkeys(("ce", "kd", "train_top1"), torch.tensor(1.0, device=device))
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
                weights=dict(snet=distiller.student.net.state_dict(), meta=run.meta),
                kd=distiller.added.state_dict(),
                optimizer=optimizer.state_dict(),
            )
            run.epoch(dict(row, test_top1=float(next(tops))), 1000.0, state)

    return write


# --- output ---------------------------------------------------------------------------------------

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
    calls=("calls per step", ".1f"),
    self_ms=("self ms per step", ".2f"),
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
    state_mb=("state MB", ".2f"),
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
    batch_ms=("ms per batch", ".2f"),
    ratio=("times plain", ".2f"),
    ratio_min=("min", ".2f"),
    ratio_max=("max", ".2f"),
    met=("met", ""),
    step_ms=("step ms", ".1f"),
    share=("share of step %", ".2f"),
)
EPOCH = dict(
    what=("what", ""),
    own_ms=("ms", ".1f"),
    other_ms=("reference ms", ".1f"),
    share=("%", ".2f"),
    share_min=("min", ".2f"),
    share_max=("max", ".2f"),
    budget=("budget", ""),
    met=("met", ""),
)
NOTES = dict(
    step=(
        "bare: the student's forward, backward and SGD step with cross-entropy, and the teacher's "
        "forward; one batch, no hooks, no loader; train_base: without the teacher",
        "step: the step of train_kd.py with loader and meter; ratio: step / bare step of the same "
        "round, median over rounds",
        f"met: 'yes' if the ratio is at least {SPARE} below the budget, 'just' if it is closer",
        "the loss weight is that in the middle of the phase; the learning rate is 0, so the "
        "networks do not change; bss: attacks as many images as it may, with all attack steps; "
        "wkd_l: without its pass over all training images, its costs are 0, which changes the "
        "values, not the work",
    ),
    profile=("self: time of the operator, without the operators that it calls",),
    loss=(
        "float32, forward and backward, on random features; times faster, difference: compared "
        "with the broadcast version at its batch size ('at batch'), which is smaller if the "
        "version would not fit into memory; wkd_l's costs are 0",
        "CPU ms (only with --crd_paths): CPU time of all threads, less affected by other programs",
        "memory: peak of torch's allocator above the inputs, with the gradients of inputs and "
        "parameters, plus the state (parameters and banks, which the method keeps)",
        "budget: layers of an adapter count as layers of the method; crd: 2 x banks and labels, "
        "and 5 float32 matrices (batch, samples)",
    ),
    data=(
        "plain: torchvision's dataset and transforms on PIL images one by one, normalised by the "
        "workers",
        "times plain: images/s of our loader / images/s of the plain loader in the same round, "
        "median over rounds; met: at least 1",
        "share: time per batch / bare step of the student, resnet20",
    ),
    together=(
        "alone: sum of the steps of K separate processes, one after another, with loader; ratio: "
        "step together / alone in the same round, median over rounds",
        "p: time of the teacher's forward pass / mean step alone; bound for K students: "
        "(p + K (1 - p)) / K",
    ),
    cache=(
        "times are relative to the student's training step without a teacher in the same round, "
        "median over rounds",
        "difference: largest difference between logits computed in batches of 5 and in whole "
        "batches, relative to the largest logit",
    ),
    epoch=(
        "loader: extra time of a train_base step with the loader, compared with a step on one "
        "fixed batch",
        "evaluation: of one fifth as many images, compared with forward passes in eval mode under "
        "inference_mode on prepared batches of the same size",
        "files: written after the last of 200 epochs, which is the best one, as a share of an "
        "epoch: --samples images at the measured step of st, the evaluation and these files",
    ),
)
COMMANDS = dict(
    step=(step_flags, step, STEP),
    loss=(loss_flags, loss, LOSS),
    data=(data_flags, data, DATA),
    epoch=(add_networks, epoch, EPOCH),
    together=(together_flags, together, TOGETHER),
    cache=(together_flags, cache, CACHE),
)


def line(row: dict, columns: dict) -> str:
    """A row of the Markdown table."""
    values = [(row.get(key), form) for key, (_, form) in columns.items()]
    cells = ("-" if value is None else format(value, form) for value, form in values)
    return "| " + " | ".join(cells) + " |"


def head(columns: dict) -> list[str]:
    """The two lines above the rows of the Markdown table."""
    titles = [title for title, _ in columns.values()]
    return ["| " + " | ".join(titles) + " |", "| " + " | ".join("---" for _ in titles) + " |"]


def short(row: dict) -> dict:
    """Floats with six digits."""
    return {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()}


def about(device: torch.device, precision: utils.Precision) -> dict:
    """Machine, versions and load, as they are before the run."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return dict(
        machine=utils.describe_device(device, precision),
        processor=processor(),
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        precision=str(precision),
        load_average=load,
    )


def processor() -> str:
    """The processor's name and the number of its cores."""
    try:
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return f"{found[1] if found else platform.processor()}, {os.cpu_count()} cores"


def parse(argv: list[str]) -> argparse.Namespace:
    """The command and its flags."""
    first = cli.Parser(prog="bench.py", description=__doc__)
    first.add_argument("command", choices=COMMANDS, help="COMMAND --help lists its flags")
    command = first.parse_args(argv[:1]).command
    parser = cli.Parser(prog=f"bench.py {command}")
    parser.set_defaults(command=command, profile=None, steps=0)
    COMMANDS[command][0](parser)
    return parser.parse_args(argv[1:])


@console.command
def main(argv: list[str] | None = None) -> dict:
    """Measure, print the table, and write --json. Returns what --json writes."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parse(argv)
    path = Path(args.json or "-")
    if path.is_dir() or not path.parent.is_dir():
        raise UserError(
            f"--json {path} cannot be written: it is a folder, or its folder does not exist; "
            "give another file"
        )
    if args.profile and args.profile != BASE:
        # raises UserError for an unknown mode before anything is measured
        settings_of(args.profile, args.num_class, args.batch_size)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = utils.select_device(cuda=args.cuda)
    precision = utils.precision(device, args.amp)
    if not args.steps:
        args.steps = 50 if device.type == "cuda" else 5
    _, run, columns = COMMANDS[args.command]
    if args.profile:
        run, columns = operators, OPERATORS
    out = sys.stderr if args.json == "-" else sys.stdout
    silent = ("command", "modes", "cuda", "amp", "threads", "json")  # not printed, or elsewhere
    flags = {k: v for k, v in vars(args).items() if k not in silent and v}
    result = dict(command=" ".join(["bench.py", *argv]), **about(device, precision), flags=flags)
    lines = [f"bench.py {args.command}: {utils.describe_device(device, precision)}"]
    lines += [f"{result['processor']}; torch {torch.__version__}"]
    lines += [", ".join(f"{key} {value}" for key, value in flags.items())]
    load = result["load_average"]
    if load is not None:
        busy = ": other programs ran in the last minute, so the times are not reliable"
        lines += [f"load average before the run {load:.2f}{busy if load > 0.5 else ''}"]
    print(*lines, "", *head(columns), sep="\n", file=out)
    result["rows"] = []
    for row in map(short, run(args, device, precision)):
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
