"""The part `students` of gpu_check.py: students that share the teacher's forward pass. Each has its
own CUDA graph; they run one after another, or at the same time on separate streams.
"""

import argparse
import json
import time

import torch

import train_kd
from engine.cuda_graph import CapturedStep
from engine.together import SharedTeacher
from kd_losses import METHODS
from tools import bench, bench_together
from tools.bench_meter import take_turns

COUNTS = (1, 4, 13)
COLUMNS = dict(
    pair=("pair", ""),
    students=("students", "d"),
    alone_ms=("alone, plain, ms", ".2f"),
    plain_ms=("together, plain", ".2f"),
    alone_captured_ms=("alone, captured", ".2f"),
    captured_ms=("together, a graph per student", ".2f"),
    streams_ms=("and a stream per student", ".2f"),
)


def students(args: argparse.Namespace, device, precision) -> None:
    """Write a row of students.jsonl for each pair and number of students, until the time limit."""
    end = time.monotonic() + args.seconds
    with open(args.out / "students.jsonl", "a") as out:
        for name in bench_together.PAIRS.split(","):
            for count in COUNTS[:2] if args.tiny else COUNTS:
                if time.monotonic() > end:
                    print(f"time is up: {name} with {count} students was not run", flush=True)
                    return
                row = one_group(name, count, args, device, precision)
                print(json.dumps(bench.short(row)), flush=True)
                out.write(json.dumps(bench.short(row)) + "\n")
                out.flush()
            if args.tiny:
                return


def one_group(name: str, count: int, args, device, precision) -> dict:
    """Milliseconds of a step of all students, for each way to run them."""
    size = 8 if args.tiny else 64
    sizes = argparse.Namespace(batch_size=size, num_class=100, samples=8 * size)
    images, snet, tnet = bench_together.networks(name, sizes)
    modes = bench_together.MODES.split(",")[:count]
    on_device = images.to(device)
    cuda = device.type == "cuda"

    def together(step=None, streams=()):
        group = bench_together.students_of(modes, sizes, device, images, snet, tnet)
        shared = SharedTeacher(group, precision)
        steps = step and [step() for _ in group]
        return bench_together.group_step(
            *(group, sizes, precision, on_device, shared), steps=steps, streams=streams
        )

    def alone(step=None):
        calls = []
        for mode in modes:
            own = bench_together.students_of([mode], sizes, device, images, snet, tnet)
            shared = SharedTeacher(own, precision)
            steps = step and [step()]
            calls.append(
                bench_together.group_step(own, sizes, precision, on_device, shared, steps=steps)
            )
        return lambda: [call() for call in calls]

    ways = dict(alone_ms=alone(), plain_ms=together())
    if cuda and all(METHODS[mode].capturable for mode in modes):
        ways["alone_captured_ms"] = alone(lambda: CapturedStep(train_kd.train_step))
        ways["captured_ms"] = together(lambda: CapturedStep(train_kd.train_step))
        streams = [torch.cuda.Stream() for _ in modes]
        ways["streams_ms"] = together(lambda: CapturedStep(train_kd.train_step), streams)
    for call in ways.values():
        for _ in range(6):  # a step is captured after three calls
            call()
    times = take_turns(list(ways.values()), 3, args.steps, device)
    row = dict(pair=name, students=count)
    return row | {way: 1000 * sorted(x)[1] for way, x in zip(ways, times)}


def lines_of(path) -> list[str]:
    """The lines of the summary for the written rows."""
    if not path.exists():
        return []
    rows = [json.loads(x) for x in path.read_text().splitlines()]
    return ["", "## Students together", "", *bench.head(COLUMNS)] + [
        bench.line(row, COLUMNS) for row in rows
    ]
