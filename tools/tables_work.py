"""Trainings one after another or side by side: begun, gone on with, waited for."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean

import torch

import utils
from engine import locks
from tools.tables_files import read_json
from tools.tables_plan import Job
from tools.tables_runs import checked
from utils import UserError

ROOT = Path(__file__).parent.parent
AGAIN = 2.0  # seconds after which to look again at what another process trains


def work(todo: list[Job], jobs: list[Job], side_by_side: int, cuda: int | None) -> list[Job]:
    """Run the jobs, some side by side. Returns those that failed."""
    gpus = torch.cuda.device_count() if cuda != 0 else 0
    waiting, running, failed = list(todo), [], []
    slots = list(range(side_by_side))
    again = {}  # when to look again at those that another process trains

    def tell(words: list[str]) -> None:
        left = [*waiting, *(job for job, *_ in running)]
        done = len([job for job in jobs if job.finished])
        ahead = time_left(jobs, left, side_by_side)
        print(f"{done} of {len(jobs)}  {' '.join(words)}{ahead}", flush=True)

    try:
        while waiting or running:
            busy = {job.folder for job in (*waiting, *(job for job, *_ in running))}
            ready = [job for job in waiting if job.needs not in busy]
            ready = [job for job in ready if time.monotonic() >= again.get(job.folder, 0)]
            if ready and slots:
                job = ready[0]
                try:
                    if job.needs in [other.folder for other in failed]:
                        raise UserError("not run, its teacher failed")
                    begun = start(job, slots[0], side_by_side, gpus)
                except UserError as error:
                    waiting.remove(job)
                    failed.append(job)
                    print(f"{job.folder}: {error}", flush=True)
                    continue
                except locks.Held as other:
                    if job.folder not in again:
                        print(f"{job.folder}: waits for {other}, which trains there", flush=True)
                    again[job.folder] = time.monotonic() + AGAIN
                    continue
                waiting.remove(job)
                if begun:
                    running.append((job, *begun, slots.pop(0)))
                else:
                    tell([f"{job.folder}: finished by another process"])
                continue
            time.sleep(0.1)
            for entry in [e for e in running if e[1].poll() is not None]:
                running.remove(entry)
                job, process, file, slot = entry
                slots.append(slot)
                says = last_line(output(job))
                if process.returncode or not job.finished:
                    failed.append(job)
                    print(f"{job.folder}: failed: {' '.join(says)}\n  {job}", flush=True)
                else:
                    output(job).unlink(missing_ok=True)
                    tell(says)
                file.close()
    finally:
        for _, process, *_ in running:
            process.terminate()
        for _, process, file, _ in running:
            process.wait()
            file.close()
    return failed


def start(job: Job, slot: int, side_by_side: int, gpus: int):
    """Begin a training, or go on with one that was interrupted: its process and the file that it
    prints into; None where another process has just finished it. Nothing is removed.

    The file is locked as long as the training lives, also where this process is killed, so of
    several `run`s on one table only one works on a training. Raises locks.Held where another does.
    """
    try:
        job.folder.parent.mkdir(parents=True, exist_ok=True)
        file = claim(job)
    except OSError as error:
        raise UserError(f"cannot be begun ({error.strerror})") from error
    try:
        if job.finished:
            output(job).unlink(missing_ok=True)
            file.close()
            return None
        return launch(job, file, slot, side_by_side, gpus), file
    except BaseException:
        file.close()
        raise


def claim(job: Job):
    """The file that a training prints into, for this process alone. Raises locks.Held."""
    try:
        file = locks.hold(output(job))
    except locks.Held:
        raise locks.Held(locks.held(job.folder / ".lock") or "another process") from None
    except OSError as error:
        if error.errno not in locks.NO_LOCKS:
            raise
        print(f"warning: no locks in {job.folder.parent}: start one run at a time", flush=True)
        return open(output(job), "a", encoding="utf-8")
    other = locks.held(job.folder / ".lock")  # one that no table has begun
    if other:
        file.close()
        raise locks.Held(other)
    return file


def launch(job: Job, file, slot: int, side_by_side: int, gpus: int) -> subprocess.Popen:
    """The process of a training that prints into `file`. Raises UserError where the run that is
    there was made by another command."""
    more = []
    if job.folder.exists():  # whatever state it is in, --resume goes on or says what is wrong
        more = ["--resume"]
        try:
            args = read_json(job.folder / "args.json")
        except ValueError:
            args = {}
        made = args.get("command")
        if isinstance(made, str) and without_place(made, args.get("recipe")) != without_place(
            " ".join([job.script, *job.argv]), dict(zip(job.argv, job.argv[1:]))
        ):
            raise UserError(f"made by another command: {made}; remove it or give another --runs")
    file.truncate(0)
    env = dict(os.environ)
    if gpus:
        env["CUDA_VISIBLE_DEVICES"] = str(slot % gpus)
    elif side_by_side > 1:  # threads of several processes stall each other
        env["OMP_NUM_THREADS"] = str(max(1, utils.cpus() // side_by_side))
    try:
        return subprocess.Popen(
            [sys.executable, str(ROOT / job.script), *job.argv, *more],
            env=env,
            stdout=file,
            stderr=subprocess.STDOUT,
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,
        )
    except OSError as error:
        raise UserError(f"cannot be begun ({error.strerror})") from error


def without_place(command: str, flags) -> str:
    """A command without --resume and the flags that may change meanwhile: where the images lie
    (that they are the same is looked at) and on what it is computed. flags: their values, by
    --name or name."""
    flags = flags if isinstance(flags, dict) else {}
    for name in ("img_root", "cuda", "workers"):
        value = flags.get(f"--{name}", flags.get(name))
        command = command.replace(f" --{name} {value}", "", 1)
    return command.removesuffix(" --resume")


def last_line(path: Path) -> list[str]:
    """The last line of a file in a list; an empty one where there is none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
    except OSError:
        return []


def _die_with_parent() -> None:
    """No training outlives a `run` that was killed: the next one would find its folder in use."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def output(job: Job) -> Path:
    """What a training prints, kept where it fails."""
    return job.folder.with_name(job.folder.name + ".out")


def time_left(jobs: list[Job], left: list[Job], side_by_side: int) -> str:
    """How long the rest may take, from the seconds an epoch of the same method or of any took."""
    rates = {}
    for job in jobs:
        try:
            seconds = checked("seconds", read_json(job.folder / "result.json").get("seconds"))
        except ValueError:
            continue
        rates.setdefault(job.folder.name.rsplit("-", 1)[0], []).append(seconds / job.epochs)
    if not left or not rates:
        return ""
    usual = mean(mean(rate) for rate in rates.values())
    seconds = sum(
        job.epochs * mean(rates.get(job.folder.name.rsplit("-", 1)[0], [usual])) for job in left
    )
    return f"  about {seconds / side_by_side / 60:.0f} min left"
