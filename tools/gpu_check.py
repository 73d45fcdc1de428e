"""Check and measure the code on a GPU: captured and plain steps, their times, an epoch, table rows.

    tools/gpu_check.sh                              # all parts, at most six minutes, with a summary
    python tools/gpu_check.py steps --seconds 100   # plain and captured step of every method
    python tools/gpu_check.py runs                  # every method trains two epochs on digits
    python tools/gpu_check.py epoch --img_root DIR  # an epoch, ours and of a public-style loop
    python tools/gpu_check.py students              # K students, each with its own CUDA graph
    python tools/gpu_check.py rows --img_root DIR   # KD-Zoo's CIFAR-10 protocol, resumable
    python tools/gpu_check.py summary               # the results of all parts, as Markdown

Each part writes its figures into --out immediately, so they are kept if the part is interrupted.
`--tiny` uses small sizes and also works without a GPU.
"""

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

# bench before torch: it sets a variable that torch's profiler reads at import
from tools import bench, bench_data, bench_flags, bench_meter, bench_steps  # noqa: E402
from tools import gpu_students  # noqa: E402

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402

import train_kd  # noqa: E402
import utils  # noqa: E402
from engine import cli, console, foreign, stream  # noqa: E402
from engine.cuda_graph import CapturedStep  # noqa: E402
from engine.schedule import loss_weights  # noqa: E402
from kd_losses import METHODS  # noqa: E402
from utils import UserError  # noqa: E402

PAIRS = (("resnet20", "resnet20", 128), ("resnet32x4", "resnet8x4", 64))  # teacher, student, batch
ROWS = "st at fitnet nst pkt fsp ft rkd ab sp sobolev bss cc lwm irg vid ofd afd crd".split()
COMPARED = 6  # number of steps after which losses and weights are compared

# --- steps: captured and plain step of every method -----------------------------------------------


def steps(args: argparse.Namespace, device: torch.device, precision: utils.Precision) -> None:
    """Write a row of steps.jsonl for each method and pair, until the time is up."""
    end = time.monotonic() + args.seconds
    with open(args.out / "steps.jsonl", "a") as out:
        for teacher, student, batch_size in PAIRS[: args.pairs]:
            size = 8 if args.tiny else batch_size
            sizes = dict(teacher=teacher, student=student, batch_size=size, num_class=100)
            flags = argparse.Namespace(samples=4 * size if args.tiny else 4096, **sizes)
            images = bench_steps.random_images(flags.samples, flags.num_class)
            nets = bench_steps.pair(flags, images)
            bare = bench_steps.bare_step(flags, device, precision, images, *nets, False)
            bare_ms = 1000 * per_call(bare, args.steps, device, precision)
            head = dict(pair=f"{teacher} -> {student}", batch=size)
            for mode in args.modes:
                if time.monotonic() > end:
                    print(f"time is up: {mode} and the methods after it were not run", flush=True)
                    return
                row = head | dict(mode=mode, bare_ms=bare_ms)
                try:
                    row |= one_mode(mode, flags, device, precision, images, nets, args.steps)
                except Exception as error:  # continue with the other methods
                    row["error"] = f"{type(error).__name__}: {utils.first_line(error)}"
                    if device.type == "cuda" and "CUDA error" in str(error):
                        out.write(json.dumps(row) + "\n")
                        raise
                print(json.dumps(bench.short(row)), flush=True)
                out.write(json.dumps(bench.short(row)) + "\n")
                out.flush()


def one_mode(mode: str, flags, device, precision, images, nets, count: int) -> dict:
    """Times and kernels of a plain step of `mode`, and of a captured one if it can be captured."""
    plain = Stepper(mode, flags, device, precision, images, nets, train_kd.train_step)
    losses, weights = plain.compared()
    row = dict(step_ms=1000 * per_call(plain, count, device, precision))
    if device.type == "cuda":
        if METHODS[mode].capturable:
            captured = Stepper(
                mode, flags, device, precision, images, nets, CapturedStep(train_kd.train_step)
            )
            others, other_weights = captured.compared()
            row["loss_difference"] = relative(losses, others)
            row["weight_difference"] = relative(weights, other_weights)
            row["captured_ms"] = 1000 * per_call(captured, count, device, precision)
        row |= on_the_gpu(plain, row["step_ms"])
    return row


class Stepper:
    """Training steps of `mode`, cycling through four batches. Each Stepper starts with the same
    weights and random numbers."""

    def __init__(self, mode: str, flags, device, precision, images, nets, step):
        torch.manual_seed(0)
        self.distiller, self.phase, self.optimizer, images = bench_steps.distillation(
            mode, flags, device, precision, images, *nets
        )
        self.distiller.set_trainable(self.phase)
        for group in self.optimizer.param_groups:
            group["lr"] = 1e-3
        images = images.to(device)
        batches = stream.train_batches(
            images, flags.batch_size, 2, 1, two_views=self.distiller.two_views
        )
        self.batches = [self.distiller.batch(*batch) for _, batch in zip(range(4), batches)]
        self.step, self.precision, self.taken = step, precision, 0
        self.weights = loss_weights(self.distiller, self.phase, 0.5, bench_steps.recipe())

    def __call__(self) -> dict:
        batch = self.batches[self.taken % len(self.batches)]
        self.taken += 1
        return self.step(
            self.distiller, self.phase, self.optimizer, batch, self.weights, self.precision
        )

    def compared(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(losses of the first steps, weights after them), each as one vector."""
        terms = [torch.stack([x.float() for x in self().values()]).clone() for _ in range(COMPARED)]
        groups = self.optimizer.param_groups
        weights = [p.detach().float().flatten() for group in groups for p in group["params"]]
        return torch.cat(terms), torch.cat(weights)


def per_call(call, count: int, device: torch.device, precision: utils.Precision) -> float:
    """Seconds per call: the median of three blocks of `count` calls, after six warm-up calls."""
    bench_meter.seconds(call, 6, device)
    return median(bench_meter.seconds(call, count, device) / count for _ in range(3))


def on_the_gpu(call, step_ms: float, count: int = 4) -> dict:
    """Kernels per step, their time, and the share of the step in which the GPU is busy."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(count):
            call()
        torch.cuda.synchronize()
    kernels = [
        event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    kernel_ms = sum(event.self_device_time_total for event in kernels) / 1000 / count
    return dict(
        kernels=len(kernels) / count, kernel_ms=kernel_ms, busy=min(1.0, kernel_ms / step_ms)
    )


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one - other).norm() / one.norm()).item()


# --- runs: train_kd.py with every method ---------------------------------------------------------


def runs(args: argparse.Namespace, device: torch.device, precision: utils.Precision) -> None:
    """Train every method for two epochs on digits, several at the same time, captured if possible.
    Write runs.json: the failed methods, each with the last line that it printed."""
    end = time.monotonic() + args.seconds
    root = args.out / "runs"
    data = ["--data_name", "digits", "--img_size", "12", "--save_root", str(root)]
    data += ["--epochs", "2"]
    for net in ("resnet14", "resnet8"):
        train("train_base.py", "--net_name", net, *data, "--note", net)
    files = ["--t_model", str(root / "resnet14" / "model_best.pth.tar")]
    files += ["--s_init", str(root / "resnet8" / "initial_r8.pth.tar")]
    jobs = [(m, ["--kd_mode", m, *files, *data, "--note", m]) for m in args.modes]
    failed = dict.fromkeys(args.modes, "not run")
    save(args.out / "runs.json", dict(count=len(args.modes), failed=failed))
    # each process trains one method after another: starting Python takes longer than a training
    context = torch.multiprocessing.get_context("spawn")
    with context.Pool(args.jobs) as pool:
        for mode, error in pool.imap_unordered(one_run, jobs):
            failed.pop(mode)
            if error:
                failed[mode] = error
            save(args.out / "runs.json", dict(count=len(args.modes), failed=failed))
            print(mode, error or "trained", flush=True)
            if time.monotonic() > end:
                pool.terminate()
                break


def one_run(job: tuple[str, list[str]]) -> tuple[str, str]:
    """Run a training. Returns (the method, its error, or '' if it succeeded)."""
    mode, argv = job
    torch.set_num_threads(1)
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            train_kd.main(argv)
    except SystemExit as stop:
        if stop.code:
            return mode, said.getvalue().strip().splitlines()[-1]
    except Exception as error:
        return mode, f"{type(error).__name__}: {utils.first_line(error)}"
    return mode, ""


# --- epoch: ours next to a plain public-style loop ------------------------------------------------


def epoch(args: argparse.Namespace, device: torch.device, precision: utils.Precision) -> None:
    """Write epoch.json: images per second of `st`, with plain and captured steps, and of a loop
    like those of the public repositories."""
    found = {}
    name = "resnet8" if args.tiny else "resnet20"
    workers = min(8, utils.cpus())
    found[f"st, public-style loop, {workers} workers"] = public_loop(
        args, device, precision, name, workers
    )
    save(args.out / "epoch.json", found)
    teacher = args.out / "work" / "teacher" / "model_best.pth.tar"
    data = ["--data_name", "imagefolder", "--img_root", args.img_root]
    where = ["--save_root", str(args.out / "work"), "--print_freq", "1000"]
    train("train_base.py", "--net_name", name, *data, *where, "--note", "teacher", "--epochs", "2")
    found["train_base, resnet20"] = speed(args.out / "work" / "teacher")
    distil = ["--s_name", name, "--t_model", str(teacher), *where, "--kd_mode", "st"]
    ways = {"st, plain steps": ["--cuda_graph", "0"]}
    if device.type == "cuda":
        ways["st, captured"] = ["--cuda_graph", "1"]
    for way, flags in ways.items():
        note = way.replace(", ", "-").replace(" ", "-")
        train("train_kd.py", *distil, *flags, "--note", note, "--epochs", "2")
        found[way] = speed(args.out / "work" / note)
        save(args.out / "epoch.json", found)
    print(json.dumps(found, indent=1), flush=True)


def train(*argv) -> None:
    subprocess.run([sys.executable, *argv], cwd=ROOT, check=True)


def speed(folder: Path) -> dict:
    """Training speed of the last epoch in images per second, and its seconds with evaluation."""
    rows = (folder / "timing.csv").read_text().splitlines()
    last = dict(zip(rows[0].split(","), rows[-1].split(",")))
    return dict(img_per_s=float(last["train_img_per_s"]), seconds=float(last["seconds"]))


def public_loop(args, device, precision, name: str, workers: int) -> dict:
    """Images per second of a loop like those of the public repositories: float32, NCHW, PIL images
    from worker processes, and losses read in every step."""
    train, device = stream.load("imagefolder", args.img_root).train, device
    num_class = train.num_class
    tnet, snet = (foreign.build(name, num_class).to(device) for _ in "ts")
    tnet.eval(), snet.train()
    optimizer = torch.optim.SGD(snet.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)
    loader = torch.utils.data.DataLoader(
        bench_data.InMemory(train), 128, shuffle=True, num_workers=workers, pin_memory=True
    )
    total = images = 0
    began, warm, limit = time.perf_counter(), 20, 2 if args.tiny else 20
    for i, (img, target) in enumerate(loader):
        img, target = img.to(device, non_blocking=True), target.to(device, non_blocking=True)
        with torch.no_grad():
            out_t = tnet(img)
        out = snet(img)
        ce = F.cross_entropy(out, target)
        soft = F.kl_div(F.log_softmax(out / 4, 1), F.softmax(out_t / 4, 1), reduction="batchmean")
        loss = ce + 0.1 * 16 * soft
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += ce.item() + soft.item() + (out.argmax(1) == target).float().mean().item()
        if i == warm:
            began = time.perf_counter()
        elif i > warm:
            images += len(img)
        if time.perf_counter() - began > limit and i > warm:
            break
    return dict(img_per_s=images / (time.perf_counter() - began), images=images)


# --- rows: KD-Zoo's CIFAR-10 protocol -------------------------------------------------------------


def rows(args: argparse.Namespace, device: torch.device, precision: utils.Precision) -> None:
    """Train the teacher and the baseline, then the methods, several at the same time, until the
    time is up. Unfinished trainings save a checkpoint and continue at the next call."""
    end = time.monotonic() + args.seconds
    root = args.out / "rows"
    epochs = ["--epochs", "2"] if args.tiny else []
    net = "resnet8" if args.tiny else "resnet20"
    data = ["--data_name", "imagefolder", "--img_root", args.img_root]
    same = ["--save_root", str(root), "--print_freq", "100000", *epochs]
    base = ["train_base.py", "--net_name", net, *data, *same]
    together(
        [[*base, "--note", "teacher"], [*base, "--note", "baseline", "--seed", "1"]], root, 2, end
    )
    teacher = root / "teacher" / "checkpoint.pth.tar"
    if not finished(root / "teacher"):
        return
    modes = [mode for mode in args.modes if mode in ROWS]
    jobs = [
        ["train_kd.py", "--kd_mode", mode, "--s_name", net, "--t_model", str(teacher), *same]
        + ["--note", mode, "--seed", "1"]
        for mode in modes
    ]
    together(jobs, root, args.jobs, end)


def finished(folder: Path) -> bool:
    return (folder / "result.json").exists()


def together(jobs: list[list[str]], root: Path, count: int, end: float) -> None:
    """Run `jobs`, `count` at the same time, until `end`. Then running ones get SIGTERM: they save
    and stop."""
    waiting = [job for job in jobs if not finished(root / job[job.index("--note") + 1])]
    running = []
    env = os.environ | dict(OMP_NUM_THREADS="1")
    while (waiting or running) and time.monotonic() < end:
        running = [process for process in running if process.poll() is None]
        while waiting and len(running) < count:
            job = waiting.pop(0)
            note = job[job.index("--note") + 1]
            resume = ["--resume"] if (root / note / "checkpoint.pth.tar").exists() else []
            root.mkdir(parents=True, exist_ok=True)
            log = open(root / f"{note}.out", "a")
            command = [sys.executable, *job, *resume]
            running.append(subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=env))
        time.sleep(0.5)
    for process in running:
        process.terminate()
    for process in running:
        process.wait()


# --- summary --------------------------------------------------------------------------------------

COLUMNS = dict(
    mode=("mode", ""),
    bare_ms=("bare ms", ".2f"),
    step_ms=("plain ms", ".2f"),
    captured_ms=("captured ms", ".2f"),
    times=("times faster", ".2f"),
    captured_per_s=("captured steps/s", ".0f"),
    kernels=("kernels", ".0f"),
    kernel_ms=("GPU ms", ".2f"),
    busy=("GPU busy, plain", ".0%"),
    loss_difference=("losses differ", ".0e"),
    weight_difference=("weights differ", ".0e"),
)


def summary(args: argparse.Namespace, device: torch.device, precision: utils.Precision) -> None:
    """Write summary.md from the results that exist."""
    lines = [f"# {utils.describe_device(device, precision)}, torch {torch.__version__}", ""]
    tests = args.out / "tests.log"
    if tests.exists():
        lines += ["`pytest tests/test_cuda.py`: " + tests.read_text().strip().splitlines()[-1], ""]
    if (args.out / "runs.json").exists():
        found = json.loads((args.out / "runs.json").read_text())
        lines += [
            f"Two epochs on digits: {found['count']} methods, {len(found['failed'])} failed",
            "",
        ]
        lines += [f"- {mode}: {line}" for mode, line in found["failed"].items()] + [""]
    path = args.out / "steps.jsonl"
    found = [json.loads(x) for x in path.read_text().splitlines()] if path.exists() else []
    for name in dict.fromkeys((row["pair"], row["batch"]) for row in found):
        lines += [f"## A step, {name[0]}, batch {name[1]}", "", *bench.head(COLUMNS)]
        for row in found:
            if (row["pair"], row["batch"]) == name and "error" not in row:
                if "captured_ms" in row:
                    row["times"] = row["step_ms"] / row["captured_ms"]
                    row["captured_per_s"] = 1000 / row["captured_ms"]
                lines.append(bench.line(row, COLUMNS))
        lines.append("")
    lines += [f"- {row['mode']}, {row['pair']}: {row['error']}" for row in found if "error" in row]
    if (args.out / "epoch.json").exists():
        lines += ["", "## An epoch", "", "| | images per second |", "| --- | --- |"]
        found = json.loads((args.out / "epoch.json").read_text())
        lines += [f"| {way} | {x['img_per_s']:.0f} |" for way, x in found.items()]
    lines += gpu_students.lines_of(args.out / "students.jsonl")
    results = sorted((args.out / "rows").glob("*/result.json"))
    if results:
        lines += ["", "## KD-Zoo's protocol, CIFAR-10 (JPEG)", ""]
        lines += ["| run | last top-1 | best top-1 | seconds |", "| --- | --- | --- | --- |"]
        for path in results:
            x = json.loads(path.read_text())
            numbers = " | ".join(f"{x[key]:.2f}" for key in ("last", "best", "seconds"))
            lines.append(f"| {path.parent.name} | {numbers} |")
    text = "\n".join(lines) + "\n"
    (args.out / "summary.md").write_text(text)
    print(text)


def save(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")


# --- the command ----------------------------------------------------------------------------------

PARTS = dict(
    steps=steps,
    runs=runs,
    epoch=epoch,
    students=gpu_students.students,
    rows=rows,
    summary=summary,
)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = cli.Parser(prog="gpu_check.py", description=__doc__)
    add = parser.add_argument
    add("part", choices=PARTS, help="part to run, see above")
    out = Path("results/gpu/here")
    add("--out", type=Path, default=out, metavar="DIR", help=f"folder of results (default {out})")
    methods = dict(type=bench_flags.some(METHODS), default=tuple(METHODS), metavar="M,M")
    add("--modes", **methods, help=bench_flags.MODES_HELP)
    folder = "image folder with train and test, for the parts epoch and rows"
    add("--img_root", metavar="DIR", help=folder)
    limit = "time limit of the part in seconds (default 100)"
    add("--seconds", type=cli.number(float, 0), default=100, metavar="X", help=limit)
    add(
        "--steps",
        type=cli.number(int, 1),
        default=10,
        metavar="N",
        help="steps per measured block (default 10)",
    )
    pairs = "measure the first N pairs of networks (default 2)"
    add("--pairs", type=cli.number(int, 1, 2), default=2, metavar="N", help=pairs)
    add(
        "--jobs",
        type=cli.number(int, 1),
        default=4,
        metavar="N",
        help="trainings at the same time (default 4)",
    )
    cuda = "0: CPU, 1: GPU (default: GPU if available)"
    add("--cuda", type=cli.number(int, 0, 1), metavar="0|1", help=cuda)
    add("--tiny", action="store_true", help="small sizes, also without a GPU")
    bench_flags.add_amp(parser)
    args = parser.parse_args(argv)
    if args.tiny:
        args.steps, args.pairs = min(args.steps, 2), 1
    return args


@console.command
def main(argv: list[str] | None = None) -> None:
    args = parse(sys.argv[1:] if argv is None else list(argv))
    if args.part in ("epoch", "rows") and not args.img_root:
        raise UserError(
            f"--img_root is required for {args.part}; give a folder with train and test"
        )
    args.out = args.out.absolute()
    args.out.mkdir(parents=True, exist_ok=True)
    device = utils.select_device(cuda=args.cuda)
    PARTS[args.part](args, device, utils.precision(device, args.amp))


if __name__ == "__main__":
    main()
