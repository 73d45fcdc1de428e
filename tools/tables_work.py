"""Running trainings, one after another or several at the same time: start, resume, wait."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import torch

import utils
from engine import locks
from tools.tables_files import read_json
from tools.tables_plan import Job, together
from tools.tables_runs import checked
from utils import UserError

ROOT = Path(__file__).parent.parent
AGAIN = 2.0  # seconds between two checks of a training that another process runs


@dataclass
class Process:
    """A running process, its trainings, and their locked files; it prints into the first file."""

    jobs: list[Job]
    process: subprocess.Popen
    files: list
    slot: int


def work(
    todo: list[Job],
    jobs: list[Job],
    side_by_side: int,
    cuda: int | None,
    grouped: bool = False,
    running: list[Process] | None = None,
) -> list[Job]:
    """Run the jobs in `side_by_side` processes at the same time. Returns the failed jobs.

    grouped: jobs of a group run in one process. running: a list that is kept up to date with the
    running processes.
    """
    gpus = torch.cuda.device_count() if cuda != 0 else 0
    running = [] if running is None else running
    waiting, failed = list(todo), []
    slots = list(range(side_by_side))
    again = {}  # when to check again the jobs that another process trains
    single = set()  # folders of jobs that are run in a separate process

    def tell(words: list[str]) -> None:
        left = [*waiting, *(job for entry in running for job in entry.jobs)]
        done = len([job for job in jobs if job.finished])
        ahead = time_left(jobs, left, side_by_side)
        print(f"{done} of {len(jobs)}  {' '.join(words)}{ahead}", flush=True)

    def fail(job: Job, why: str) -> None:
        failed.append(job)
        print(f"{job.folder}: {why}", flush=True)

    def claims(team: list[Job]) -> list[tuple]:
        """(job, its file) of the jobs that can start. The others are reported and tried again."""
        found = []
        for job in team:
            try:
                if job.needs in [other.folder for other in failed]:
                    raise UserError("not run, since its teacher failed")
                file = claim(job)
            except UserError as error:
                waiting.remove(job)
                fail(job, str(error))
            except locks.Held as other:
                if job.folder not in again:
                    print(f"{job.folder}: waiting for {other}, which trains it", flush=True)
                again[job.folder] = time.monotonic() + AGAIN
            else:
                waiting.remove(job)
                if file:
                    found.append((job, file))
                else:
                    tell([f"{job.folder}: finished by another process"])
        return found

    try:
        while waiting or running:
            at_work = (job for entry in running for job in entry.jobs)
            busy = {job.folder for job in (*waiting, *at_work)}
            ready = [job for job in waiting if job.needs not in busy]
            ready = [job for job in ready if time.monotonic() >= again.get(job.folder, 0)]
            if ready and slots:
                found = claims(team(ready, single) if grouped else ready[:1])
                if found:
                    begun, files = (list(x) for x in zip(*found))
                    try:
                        process = launch(begun, files, slots[0], side_by_side, gpus)
                        running.append(Process(begun, process, files, slots.pop(0)))
                    except UserError as error:
                        for job, file in found:
                            fail(job, str(error))
                            file.close()
                continue
            time.sleep(0.1)
            for entry in [x for x in running if x.process.poll() is not None]:
                running.remove(entry)
                slots.append(entry.slot)
                for job in end(entry, fail, tell):  # not finished: run again in separate processes
                    waiting.append(job)
                    single.add(job.folder)
    finally:
        for entry in running:
            entry.process.terminate()
        for entry in running:
            entry.process.wait()
            for file in entry.files:
                file.close()
    return failed


def team(ready: list[Job], single: set[Path]) -> list[Job]:
    """The first job, and the jobs that one process can train with it, except those in `single`."""

    def fits(job: Job) -> bool:
        """Whether its run is new, or can continue together with others."""
        if job.group is None or job.folder in single:
            return False
        return not job.folder.exists() or made_by(job).startswith("train_kd.py")

    first = ready[0]
    found = [job for job in ready if job.group == first.group and fits(job)]
    distils = any(not job.student for job in found)
    return found if len(found) > 1 and distils and fits(first) else [first]


def end(entry: Process, fail, tell) -> list[Job]:
    """Report how each training of a process ended. Returns the unfinished ones without an error,
    which were stopped only because the process ended."""
    says, again = read_lines(output(entry.jobs[0])), []
    for job, file in zip(entry.jobs, entry.files):
        last = says
        if len(entry.jobs) > 1:
            name = (job.student or job.argv)[1]
            last = [x.removeprefix(f"{name}: ") for x in says if x.startswith(f"{name}: ")]
        failed = entry.process.returncode if len(entry.jobs) == 1 else not job.finished
        if not failed and job.finished:
            output(job).unlink(missing_ok=True)
            tell([f"{job.folder.name}:", *last[-1:]] if len(entry.jobs) > 1 else last[-1:])
        elif len(entry.jobs) == 1 or any(line.startswith("error: ") for line in last):
            fail(job, f"failed: {' '.join(last[-1:])}\n  {job}")
        else:
            again.append(job)
        file.close()
    return again


def claim(job: Job):
    """The file that a training prints into, locked for this process; None if another process has
    just finished the training. No file is removed.

    The file is locked as long as the training runs, even if this process is killed. So of several
    `run`s of one table only one runs a training. Raises locks.Held if another process runs it, and
    UserError if the run in the folder was made by another command.
    """
    try:
        job.folder.parent.mkdir(parents=True, exist_ok=True)
        file = hold(job)
    except OSError as error:
        raise UserError(f"cannot be started ({error.strerror})") from error
    try:
        if job.finished:
            output(job).unlink(missing_ok=True)
            file.close()
            return None
        check_command(job)
    except BaseException:
        file.close()
        raise
    return file


def hold(job: Job):
    """The file that a training prints into, locked for this process. Raises locks.Held."""
    try:
        file = locks.hold(output(job))
    except locks.Held:
        raise locks.Held(locks.held(job.folder / ".lock") or "another process") from None
    except OSError as error:
        if error.errno not in locks.NO_LOCKS:
            raise
        print(
            f"warning: {job.folder.parent}: the file system has no locks; use only one `run` at a "
            "time",
            flush=True,
        )
        return open(output(job), "a", encoding="utf-8")
    other = locks.held(job.folder / ".lock")  # a training that was not started by tables.py
    if other:
        file.close()
        raise locks.Held(other)
    return file


def launch(
    jobs: list[Job], files: list, slot: int, side_by_side: int, gpus: int
) -> subprocess.Popen:
    """Start the process that trains the jobs and prints into the first file. Raises UserError if it
    cannot be started."""
    script, argv = jobs[0].script, jobs[0].argv
    if len(jobs) > 1:
        script, argv = "train_kd.py", together(jobs)
    elif jobs[0].student and made_by(jobs[0]).startswith("train_kd.py"):
        script, argv = "train_kd.py", jobs[0].student  # it was started together with others
    # --resume continues the run in a folder, or prints why it cannot
    more = ["--resume"] if any(job.folder.exists() for job in jobs) else []
    files[0].truncate(0)
    env = dict(os.environ)
    if gpus:  # only the GPUs of this process: a cluster may give a job some of the machine's GPUs
        own = [x for x in env.get("CUDA_VISIBLE_DEVICES", "").split(",") if x.strip()]
        own = own or [str(number) for number in range(gpus)]
        env["CUDA_VISIBLE_DEVICES"] = own[slot % len(own)]
    elif side_by_side > 1:  # threads of several processes slow each other down
        env["OMP_NUM_THREADS"] = str(max(1, utils.cpus() // side_by_side))
    try:
        return subprocess.Popen(
            [sys.executable, str(ROOT / script), *argv, *more],
            env=env,
            stdout=files[0],
            stderr=subprocess.STDOUT,
            pass_fds=[file.fileno() for file in files],  # keeps the locks while it runs
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,
        )
    except OSError as error:
        raise UserError(f"cannot be started ({error.strerror})") from error


def made_by(job: Job) -> str:
    """The command that started the run in the folder of a job, or ''."""
    try:
        made = read_json(job.folder / "args.json").get("command")
    except (ValueError, AttributeError):
        return ""
    return made if isinstance(made, str) else ""


def check_command(job: Job) -> None:
    """Raise UserError if another command than that of the job made the run in its folder."""
    made = made_by(job)
    if not made:
        return
    recipe = read_json(job.folder / "args.json").get("recipe")
    commands = [[job.script, *job.argv]]
    if job.student:
        commands.append(["train_kd.py", *job.student])
    if without_place(made, recipe) not in [
        without_place(" ".join(x), dict(zip(x[1:], x[2:]))) for x in commands
    ]:
        raise UserError(
            f"its run was made by another command ({made}); remove it or give another --runs DIR"
        )


def without_place(command: str, flags) -> str:
    """A command without --resume and the flags that may differ between two calls: the folder of the
    images (its contents are compared elsewhere), device and workers. flags: {name or --name: its
    value}."""
    flags = flags if isinstance(flags, dict) else {}
    for name in ("img_root", "cuda", "workers"):
        value = flags.get(f"--{name}", flags.get(name))
        command = command.replace(f" --{name} {value}", "", 1)
    return command.removesuffix(" --resume")


def read_lines(path: Path) -> list[str]:
    """The lines of a file; [] if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    except OSError:
        return []


def _die_with_parent() -> None:
    """Stop a training if its `run` is killed: the next `run` would find the folder in use. SIGUSR2
    is ignored: SLURM sends it to all processes of a job before the time limit, and only `run`
    handles it."""
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def output(job: Job) -> Path:
    """The file with the output of a training; it is kept if the training fails."""
    return job.folder.with_name(job.folder.name + ".out")


def time_left(jobs: list[Job], left: list[Job], side_by_side: int) -> str:
    """Estimate of the remaining time, from the mean seconds per epoch of the same method, or of all
    methods if it has no finished training. '' if there is no estimate."""
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
