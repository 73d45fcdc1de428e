"""The state of the trainings of a table: finished, running, queued, failed, stopped or waiting.

`run` writes the trainings of a table, and their jobs on a cluster, to RUNS/jobs/TABLE.json.
"""

import csv
import json
import subprocess
from contextlib import suppress
from pathlib import Path

from engine import locks
from engine.checkpoint import write_file
from tools.tables_files import read_json, shown
from utils import UserError

ENDS = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"}


def remember(runs: Path, table: str, places: dict[str, dict]) -> None:
    """Add trainings to the file. places: {folder: its epochs and the last submitted job}."""
    path = runs / "jobs" / f"{table}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock = locks.hold(path.with_suffix(".lock"), patience=30)
        except OSError as error:
            if error.errno not in locks.NO_LOCKS:
                raise
            lock = None
        known = remembered(runs, table)
        for folder, about in places.items():
            known[folder] = known.get(folder, {}) | about
        write_file(path, (json.dumps(known, indent=1) + "\n").encode())
        if lock:
            lock.close()
    except locks.Held:
        raise UserError(f"{shown(path)} is in use by another process; try again later") from None
    except OSError as error:
        raise UserError(f"{shown(path)} cannot be written ({error.strerror})") from error


def remembered(runs: Path, table: str) -> dict[str, dict]:
    """{folder: its epochs and job} of the trainings that were started or submitted."""
    path = runs / "jobs" / f"{table}.json"
    if not path.exists():
        return {}
    try:
        known = read_json(path)
        for about in known.values():
            if type(about["epochs"]) is not int or not isinstance(about.get("job", ""), str):
                raise ValueError(f"{path.name} is damaged")
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{shown(path)}: {error}; remove it, `run` writes it again") from error
    return known


def queue(jobs: set[str]) -> dict[str, str] | None:
    """{job: SLURM's state} of the jobs that have not ended; None if squeue fails."""
    if not jobs:
        return {}
    ids = ",".join(sorted({job.partition("_")[0] for job in jobs}))
    command = ["squeue", "--noheader", "--array", "--format=%i %T", "--jobs", ids]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode:  # "Invalid job id": SLURM no longer knows any of them
        return {} if "Invalid job id" in done.stderr else None
    states = dict(line.split()[:2] for line in done.stdout.splitlines() if line.strip())
    return {name: state for name, state in states.items() if name in jobs and state not in ENDS}


def in_queue(runs: Path, table: str) -> dict[str, str]:
    """{folder: job} of the trainings whose job has not ended."""
    known = {
        folder: about["job"]
        for folder, about in remembered(runs, table).items()
        if about.get("job")
    }
    there = queue(set(known.values())) or {}
    return {folder: job for folder, job in known.items() if job in there}


def status(runs: Path, table: str) -> list[str]:
    """A line for each training that was started or submitted, then a line with their counts."""
    known = remembered(runs, table)
    if not known:
        raise UserError(
            f"{table}: no training was started or submitted in {shown(runs)}; use `run` first"
        )
    there = queue({about["job"] for about in known.values() if about.get("job")})
    lines, counts = [], {}
    for folder, about in known.items():
        state, more = state_of(Path(folder), about, there)
        counts[state] = counts.get(state, 0) + 1
        job = f"job {about['job']}" if about.get("job") and state != "finished" else ""
        name = "/".join(Path(folder).parts[-2:])
        lines.append("  ".join(filter(None, (f"{state:<9}{shown(Path(name))}", job, more))))
    order = "finished running queued stopped failed waiting".split()
    lines.append(", ".join(f"{counts[state]} {state}" for state in order if state in counts))
    return lines


def state_of(folder: Path, about: dict, there: dict | None) -> tuple[str, str]:
    """(state, details). The state is finished, running, queued, failed, stopped or waiting."""
    with suppress(ValueError):
        result = read_json(folder / "result.json")
        if result:
            return "finished", f"last {result['last']:.2f}" if "last" in result else ""
    if at_work(folder):
        return "running", progress(folder, about["epochs"])
    job = about.get("job")
    if job and there is not None and job in there:
        if there[job] == "RUNNING":  # another training of this job is running
            return "queued", f"in a running job, {progress(folder, about['epochs'])}"
        return "queued", progress(folder, about["epochs"]) if folder.exists() else ""
    last = last_line(folder)
    if job and there is not None or last.startswith("error: "):
        return "failed", last or "its log is empty"
    if not folder.exists():
        return "waiting", ""
    return "stopped", f"{progress(folder, about['epochs'])}: {last}"


def at_work(folder: Path) -> bool:
    """Whether a process is training in this folder."""
    return any(
        locks.held(path) is not None
        for path in (folder / ".lock", folder.with_name(folder.name + ".out"))
    )


def progress(folder: Path, epochs: int) -> str:
    """The current epoch, and the remaining time estimated from the last five epochs."""
    try:
        with open(folder / "timing.csv", encoding="utf-8") as file:
            seconds = [float(row["seconds"]) for row in csv.DictReader(file)]
    except (OSError, ValueError, KeyError, TypeError):
        seconds = []
    text = f"epoch {min(len(seconds) + 1, epochs)} of {epochs}"
    if not seconds:
        return text
    beside = 1
    with suppress(ValueError, TypeError):
        beside = len(read_json(folder / "args.json").get("together") or "1")
    recent = seconds[-5:]
    left = (epochs - len(seconds)) * beside * sum(recent) / len(recent)
    return f"{text}, about {duration(left)} left"


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def last_line(folder: Path) -> str:
    """The last line that a training printed: an error, or the last line of its log."""
    lines = []
    for path in (folder.with_name(folder.name + ".out"), folder / "log.txt"):
        with suppress(OSError):
            text = path.read_bytes()[-10_000:].decode("utf-8", "replace")
            lines += [line.strip() for line in text.splitlines() if line.strip()][-1:]
    errors = [line for line in lines if line.startswith("error: ")]
    last = (errors or lines or [""])[-1]
    return last if last.isprintable() else ascii(last)[1:-1]
