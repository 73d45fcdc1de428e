"""Train a table on a SLURM cluster with submitit: one job for each pair of networks and seed.

A job does the same as `tables.py run` on one machine: it locks its trainings, runs them together
and skips finished ones. So jobs, and a `run` on another machine, never train in the same folder at
the same time. A job that is preempted or reaches its time limit saves a checkpoint, is queued again
and continues.
"""

import argparse
import io
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import dataclass, field
from pathlib import Path

from tools.tables_plan import Job
from tools.tables_status import in_queue, remember
from tools.tables_work import ROOT, Process, work
from utils import UserError, first_line

CLUSTER = "slurm"  # submitit's executor; tests use "local", which has no queue
FLAGS = ("partition", "gpus", "cpus", "time", "max_parallel", "slurm_args")
MINUTES = 24 * 60  # time limit of a job without --time
TO_SAVE = 90  # SLURM warns a job at most this many seconds before its time limit


# --- a job ----------------------------------------------------------------------------------------


@dataclass
class Team:
    """The function that a job runs: its trainings, after the teacher if that is missing."""

    jobs: list[Job]
    side_by_side: int
    cuda: int | None
    grouped: bool
    running: list[Process] = field(default_factory=list)

    def __call__(self) -> None:
        signal.signal(signal.SIGTERM, _end)  # scancel, preemption
        todo = [job for job in self.jobs if not job.finished]
        try:
            failed = work(todo, self.jobs, self.side_by_side, self.cuda, self.grouped, self.running)
        except _Ended as end:  # the trainings have saved
            queue_again()
            sys.exit(str(end))
        if failed:
            sys.exit(2)  # `work` has printed the errors

    def checkpoint(self):
        """Stop the trainings, which save checkpoints. submitit calls this shortly before the time
        limit, and queues the returned job."""
        from submitit.helpers import DelayedSubmission

        for entry in self.running:
            entry.process.terminate()
        for entry in self.running:
            entry.process.wait(timeout=TO_SAVE)
        return DelayedSubmission(Team(self.jobs, self.side_by_side, self.cuda, self.grouped))


class _Ended(BaseException):
    """The job received SIGTERM."""


def _end(number: int, frame) -> None:
    signal.signal(number, signal.SIG_IGN)
    raise _Ended(f"ended by {signal.Signals(number).name}")


def queue_again() -> None:
    """Queue this job again if it is being preempted. SLURM does this only for jobs that still run
    at the end of the grace time. A job that was cancelled, queued again or out of time no longer
    has the state RUNNING, and SLURM handles it."""
    job = os.environ.get("SLURM_JOB_ID")
    if job:
        with suppress(OSError, subprocess.SubprocessError):
            show = ["scontrol", "show", "job", "--oneliner", job]
            done = subprocess.run(show, capture_output=True, text=True, timeout=60)
            if "JobState=RUNNING" in done.stdout.split():
                subprocess.run(["scontrol", "requeue", job], timeout=60)


def teams(todo: list[Job], jobs: list[Job]) -> tuple[list[list[Job]], list[list[Job]]]:
    """(first jobs, later jobs) to submit. Each first job trains one teacher. Each later job trains
    the rows of a pair and seed, and before them their teacher, if that is still missing."""
    named = {job.folder: job for job in jobs}
    needed = {job.needs for job in todo}
    first = [[job] for job in todo if job.folder in needed]
    found = {}
    for job in todo:
        if job.folder not in needed:
            seed = job.folder.name.rpartition("-")[2]
            found.setdefault((_pair(job), seed), []).append(job)
    rest = []
    for team in found.values():
        teachers = dict.fromkeys(job.needs for job in team if job.needs in named)
        rest.append([*(named[folder] for folder in teachers), *team])
    return first, rest


def _pair(job: Job) -> tuple[str, str]:
    """The networks of a training: (teacher or '', student)."""
    if job.group:
        return job.group[:2]
    flags = dict(zip(job.argv, job.argv[1:]))
    return flags.get("--t_name", ""), flags.get("--s_name") or flags["--net_name"]


# --- submitted jobs -------------------------------------------------------------------------------


def check(args) -> None:
    """Raise UserError if the flags do not fit the launcher, or if jobs cannot be submitted. Nothing
    is written."""
    if args.launcher == "local":
        for flag in FLAGS:
            if getattr(args, flag) is not None:
                raise UserError(f"--{flag} has no effect without --launcher slurm; give both")
        return
    if args.jobs != 1:
        raise UserError(
            f"--jobs {args.jobs} has no effect with --launcher slurm; use --max_parallel N"
        )
    for flag in ("out", "into"):
        if getattr(args, flag):
            raise UserError(
                f"--{flag} has no effect with --launcher slurm; give it to `tables.py show` when "
                "the jobs have finished"
            )
    import_submitit()
    if CLUSTER == "slurm" and not shutil.which("sbatch"):
        raise UserError(
            "--launcher slurm: command sbatch not found; run this on a machine with SLURM"
        )


def submit(args, todo: list[Job], jobs: list[Job]) -> list:
    """Submit the trainings that are neither finished nor in the queue: first the teachers, then the
    others, which wait for the teachers in the queue. Returns submitit's jobs."""
    submitit, runs = import_submitit(), Path(args.runs)
    busy = in_queue(runs, args.table)
    left = [job for job in todo if str(job.folder) not in busy]
    if len(left) < len(todo):
        print(f"{len(todo) - len(left)} trainings are already in the queue", flush=True)
    remember(runs, args.table, {str(job.folder): dict(epochs=job.epochs) for job in jobs})
    before = {busy[str(job.needs)] for job in left if str(job.needs) in busy}
    ways = max(1, args.gpus or 0) if args.apart else 1
    submitted = []
    for group in filter(None, teams(left, jobs)):
        executor = submitit.AutoExecutor(
            folder=runs / "jobs" / "%j", cluster=CLUSTER, slurm_max_num_timeout=9999
        )
        executor.update_parameters(**parameters(args, before))
        said = io.StringIO()  # output of sbatch: its first line is the reason of a failure
        try:
            with _importable(), redirect_stderr(said), executor.batch():
                found = [
                    executor.submit(Team(team, ways, args.cuda, not args.apart)) for team in group
                ]
        except Exception as error:
            raise UserError(f"--launcher slurm: {_reason(said, error)}") from error
        submitted += found
        names = [job.job_id for job in found]
        own = {str(job.folder) for job in left}
        places = {}
        for name, team in zip(names, group):
            for job in team:
                if str(job.folder) in own and str(job.folder) not in busy:
                    places[str(job.folder)] = dict(epochs=job.epochs, job=name)
                    busy[str(job.folder)] = name
        remember(runs, args.table, places)
        before |= set(names)
        what = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
        print(f"submitted {len(names)} job{'s' * (len(names) > 1)}: {what}", flush=True)
    command = f"python tools/tables.py status {args.table} --runs {args.runs}"
    print(f"show the state of the trainings: {command}", flush=True)
    return submitted


def parameters(args, before: set[str]) -> dict:
    """The parameters of submitit for an array of jobs that waits until the jobs `before` end."""
    minutes = args.time or MINUTES
    more = dict(args.slurm_args or ()) | dict(requeue=True)
    found = dict(
        name=f"tables-{args.table}",
        timeout_min=minutes,
        stderr_to_stdout=True,
        slurm_signal_delay_s=min(TO_SAVE, 60 * minutes // 4),
        slurm_additional_parameters=more,
        slurm_array_parallelism=args.max_parallel or 256,
    )
    if args.partition:
        found["slurm_partition"] = args.partition
    if args.gpus:
        found["gpus_per_node"] = args.gpus
    if args.cpus:
        found["cpus_per_task"] = args.cpus
    if before:  # also after a failure: a job without its teacher trains the teacher
        found["slurm_dependency"] = f"afterany:{':'.join(sorted(before))}"
    return found


@contextmanager
def _importable():
    """Add this repository to PYTHONPATH in the block: jobs inherit it and can import the code."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [before])])
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def _reason(said: io.StringIO, error: Exception) -> str:
    """The error of sbatch, without the command that submitit adds to it."""
    lines = [*said.getvalue().splitlines(), *str(error).splitlines()]
    errors = [line.partition("error: ")[2] for line in lines if "error: " in line]
    return errors[0] if errors else first_line(error)


def import_submitit():
    """The module submitit. Raises UserError if it is not installed."""
    try:
        import submitit
    except ImportError as error:
        raise UserError("--launcher slurm needs submitit; run pip install submitit") from error
    return submitit


# --- flags ----------------------------------------------------------------------------------------


def add_flags(parser, filled, number) -> None:
    """Add the flags of the launcher to `tables.py run`. filled, number: from engine/cli.py."""
    add = parser.add_argument_group("launcher").add_argument
    add(
        "--launcher",
        choices=("local", "slurm"),
        default="local",
        help="local: train on this machine (default); slurm: submit a job for each pair and seed",
    )
    partition = "SLURM partition (default: that of the cluster)"
    add("--partition", type=filled, metavar="NAME", help=partition)
    add("--gpus", type=number(int, 0, 64), metavar="N", help="GPUs per job (default: no GPU)")
    add("--cpus", type=number(int, 1, 1024), metavar="N", help="CPUs per job (default 1)")
    add(
        "--time",
        type=minutes_of,
        metavar="T",
        help="time limit of a job: minutes, H:MM:SS or D-HH:MM:SS (default 1 day); longer "
        "trainings continue in a new job",
    )
    add(
        "--max_parallel",
        type=number(int, 1, 10_000),
        metavar="N",
        help="maximum number of jobs at the same time",
    )
    add(
        "--slurm_args",
        type=sbatch_flags,
        metavar="'K=V K=V'",
        help="more flags for sbatch, for example 'account=lab qos=long exclusive'",
    )


def minutes_of(text: str) -> int:
    """An argparse type: a time in SLURM's notation. Returns minutes."""
    found = re.fullmatch(r"(?:(\d{1,3})-)?(\d{1,4}):(\d\d):(\d\d)", text, re.ASCII)
    if found:
        days, hours, minutes, seconds = (int(x or 0) for x in found.groups())
        total = (24 * days + hours) * 60 + minutes + (seconds > 0)
    else:
        total = int(text) if re.fullmatch(r"\d{1,6}", text, re.ASCII) else 0
    if not 2 <= total <= 525_600:
        raise argparse.ArgumentTypeError(
            f"expected minutes, H:MM:SS or D-HH:MM:SS, from 2 minutes to a year, got {text!r}"
        )
    return total


def sbatch_flags(text: str) -> tuple:
    """An argparse type: flags of sbatch. Returns pairs of the name without dashes, and its value or
    True."""
    found = {}
    own = {"array", "output", "error", "signal", "requeue", "no-requeue", "dependency", "chdir"}
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        if not re.fullmatch(r"[a-z][a-z0-9-]*", name) or not value.isprintable():
            raise argparse.ArgumentTypeError(f"expected flags of sbatch, K=V K=V, got {word!r}")
        if name in own:
            raise argparse.ArgumentTypeError(f"the launcher sets {name} of sbatch; leave it out")
        found[name] = value if equals else True
    if not found:
        raise argparse.ArgumentTypeError(f"expected flags of sbatch, K=V K=V, got {text!r}")
    return tuple(found.items())
