"""The clock and the memory meter of bench.py."""

import gc
import itertools
import time
from statistics import median

import torch
from torch.profiler import ProfilerActivity, profile


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


def spread(name: str, rounds: list[float]) -> dict:
    """The median of all rounds, the least and the largest."""
    return {name: median(rounds), f"{name}_min": min(rounds), f"{name}_max": max(rounds)}


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
