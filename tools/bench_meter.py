"""Measuring time and memory, for bench.py."""

import gc
import itertools
import time
from statistics import median

import torch
from torch.profiler import ProfilerActivity, profile


def seconds(call, times: int, device: torch.device) -> float:
    """Seconds that `times` calls take together, with their work on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    for _ in range(times):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def take_turns(calls: list, rounds: int, steps: int, device: torch.device) -> list[list[float]]:
    """Seconds per call in each round, for each of `calls`, after two warm-up calls.

    A round has `steps` calls of each, alternating: a b a b ... On a GPU a round is a block of a,
    then a block of b, since each change waits for the device.
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
    """`take_turns` with a number of calls and rounds that suits their speed: as many calls per
    round as fit into 0.05 seconds, from 1 to 50; fewer rounds than `rounds`, but at least three, if
    all rounds would take more than a minute."""
    once = sum(seconds(call, 1, device) for call in calls)
    rounds = min(rounds, max(3, int(60 / once)))
    return take_turns(calls, rounds, max(1, min(50, int(0.05 / once))), device)


def spread(name: str, rounds: list[float]) -> dict:
    """The median, minimum and maximum over the rounds."""
    return {name: median(rounds), f"{name}_min": min(rounds), f"{name}_max": max(rounds)}


def peak_bytes(call, device: torch.device) -> int:
    """Peak memory of torch's allocator during `call`, in bytes, minus the memory before."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    # every allocation and release, in order; the profiler's public tables only have sums
    events = profiler.profiler.kineto_results.events()
    changes = (event.nbytes() for event in events if event.name() == "[memory]")
    return max(itertools.accumulate(changes, initial=0))
