"""Count the kernels and library calls that the host launches in a training step, for every method:
in the plain step, and in the step as a CUDA graph. No GPU is needed: a stand-in for the CUDA
runtime counts kernels and does not run them. FAKE_CUDA names its start script.

    FAKE_CUDA=path/to/run python tools/bench_kernels.py
    FAKE_CUDA=path/to/run python tools/bench_kernels.py at dkd
"""

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from unittest import mock

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
BEFORE = ROOT / "results" / "bench" / "kernels_before.json"
COUNTERS = (
    *("kernels", "library", "h2d_pinned", "h2d_pageable", "d2h_pinned", "d2h_pageable", "d2d"),
    *("memset", "stream_sync", "device_sync", "event_sync", "malloc", "free", "host_alloc"),
    *("captures", "captured", "escaped", "illegal", "replays", "event_query", "stream_wait"),
)
PAIR = argparse.Namespace(student="resnet8", teacher="resnet14", num_class=10, batch_size=32)


def counts() -> dict[str, int]:
    """{name: value} of the stand-in's counters."""
    library = ctypes.CDLL(None)
    library.fake_count.restype = ctypes.c_long
    return {name: library.fake_count(i) for i, name in enumerate(COUNTERS)}


def decide() -> None:
    """Replace decisions that read values of tensors, since no kernel writes values here:
    eigenvectors are always found, and bss attacks all its images for all its steps."""
    eigh, any_of = torch.linalg.eigh, torch.Tensor.any

    def found(x):
        try:
            return eigh(x)
        except RuntimeError:  # the result has arbitrary values
            return x[..., 0], x

    def some(x, *args, **kwargs):
        return any_of(x, *args, **kwargs) if args or kwargs else bool(any_of(x)) or True

    from kd_losses import bss

    def select(*args):
        index, attack_class, _ = bss.select(*args)
        return index, attack_class, slice(None)

    torch.linalg.eigh, torch.Tensor.any = found, some
    mock.patch("kd_losses._wiring.select", select).start()


def count(mode: str, captured: bool) -> int:
    """Number of kernels and library calls in a step of `mode`. captured: of the step as a CUDA
    graph: its replay, copies into its inputs, and calls outside the graph."""
    import train_base
    import train_kd
    import utils
    from engine.cuda_graph import CapturedStep
    from tools import bench_steps

    script = train_base if mode == bench_steps.BASE else train_kd
    step = CapturedStep(script.train_step) if captured else script.train_step
    device, images = torch.device("cuda", 0), bench_steps.random_images(512, PAIR.num_class)
    nets = bench_steps.pair(PAIR, images)
    with mock.patch.object(script, "train_step", step):
        call, _ = bench_steps.full_step(mode, PAIR, device, utils.Precision(), images, *nets)
        for _ in range(CapturedStep.WARM_UP + 2):
            call()
        before = counts()
        call()
        after = counts()
    names = ("kernels", "library", *(("d2d", "memset", "replays") if captured else ()))
    return sum(after[name] - before[name] for name in names)


def table(rows: dict[str, tuple]) -> str:
    """The Markdown table and a line of medians. rows: {mode: (before, plain, captured)}; None: not
    counted."""
    lines = ["| mode | before | plain | captured |", "| --- | --- | --- | --- |"]
    for mode, row in rows.items():
        lines.append(f"| `{mode}` | " + " | ".join("" if x is None else str(x) for x in row) + " |")
    methods = [row for mode, row in rows.items() if mode != "train_base" and row[0]]
    before, plain = (statistics.median(row[i] for row in methods) for i in (0, 1))
    default = statistics.median(row[1] if row[2] is None else row[2] for row in methods)
    return "\n".join(lines) + (
        f"\n\nMedians of the methods: before {before:g}, plain {plain:g} ({plain / before:.2f} of "
        f"before), by default (captured if the method can be captured) {default:g} "
        f"({default / before:.2f}).\n"
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("modes", nargs="*", metavar="MODE", help="methods (default: all)")
    args = parser.parse_args(argv)
    if not hasattr(ctypes.CDLL(None), "fake_count"):
        start = os.environ.get("FAKE_CUDA") or parser.error(
            "FAKE_CUDA is not set; set it to the start script of the stand-in for CUDA"
        )
        sys.exit(subprocess.call([start, sys.executable, __file__, *args.modes]))
    from kd_losses import METHODS

    decide()
    before, rows = json.loads(BEFORE.read_text()), {}
    for mode in args.modes or ["train_base", *METHODS]:
        can = mode == "train_base" or METHODS[mode].capturable
        rows[mode] = before.get(mode), count(mode, False), count(mode, True) if can else None
    print(table(rows))


if __name__ == "__main__":
    main()
