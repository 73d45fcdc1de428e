"""A table on a SLURM cluster, by submitit: one job for each pair of networks and seed.

A job is what `tables.py run` is on one machine: it claims its trainings, runs them together and
leaves finished ones alone. So several jobs, and a `run` elsewhere, never train in one folder. A job
that is preempted or runs out of time saves, is queued again and continues.
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

CLUSTER = "slurm"  # submitit's name; its "local" has no queue and is for tests
FLAGS = ("partition", "gpus", "cpus", "time", "max_parallel", "slurm_args")
MINUTES = 24 * 60  # of a job where --time says nothing
TO_SAVE = 90  # seconds, at most, before the end of a job's time


# --- a job ----------------------------------------------------------------------------------------


@dataclass
class Team:
    """What a job does: its trainings, and before them a teacher that is not there."""

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
            sys.exit(2)  # what failed has been said

    def checkpoint(self):
        """Called by submitit when the time is nearly over: save; then this is queued again."""
        from submitit.helpers import DelayedSubmission

        for entry in self.running:
            entry.process.terminate()
        for entry in self.running:
            entry.process.wait(timeout=TO_SAVE)
        return DelayedSubmission(Team(self.jobs, self.side_by_side, self.cuda, self.grouped))


class _Ended(BaseException):
    """A signal asks the job to end."""


def _end(number: int, frame) -> None:
    signal.signal(number, signal.SIG_IGN)
    raise _Ended(f"ended by {signal.Signals(number).name}")


def queue_again() -> None:
    """Put this job into the queue again, where it is to be preempted. SLURM itself does so only for
    jobs that are still running at the end of the grace time. A job that was cancelled, queued again
    or out of time has another state by now, and is left to SLURM."""
    job = os.environ.get("SLURM_JOB_ID")
    if job:
        with suppress(OSError, subprocess.SubprocessError):
            show = ["scontrol", "show", "job", "--oneliner", job]
            done = subprocess.run(show, capture_output=True, text=True, timeout=60)
            if "JobState=RUNNING" in done.stdout.split():
                subprocess.run(["scontrol", "requeue", job], timeout=60)


def teams(todo: list[Job], jobs: list[Job]) -> tuple[list[list[Job]], list[list[Job]]]:
    """What is trained first, a teacher each, and what after it, for each pair and seed. The latter
    have their teacher before them, for the case that it is still not there."""
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
    """The networks of a training: teacher or '', and student."""
    if job.group:
        return job.group[:2]
    flags = dict(zip(job.argv, job.argv[1:]))
    return flags.get("--t_name", ""), flags.get("--s_name") or flags["--net_name"]


# --- what is submitted ----------------------------------------------------------------------------


def check(args) -> None:
    """Raise UserError if the flags do not fit the launcher or no job can be submitted. Nothing
    is written."""
    if args.launcher == "local":
        for flag in FLAGS:
            if getattr(args, flag) is not None:
                raise UserError(f"--{flag} has no effect without --launcher slurm")
        return
    if args.jobs != 1:
        raise UserError(f"--jobs {args.jobs} is for this machine; give --max_parallel for SLURM")
    for flag in ("out", "into"):
        if getattr(args, flag):
            raise UserError(
                f"--{flag}: the table is not there when the jobs are submitted: give it to show"
            )
    import_submitit()
    if CLUSTER == "slurm" and not shutil.which("sbatch"):
        raise UserError("--launcher slurm: no sbatch on this machine; is SLURM installed?")


def submit(args, todo: list[Job], jobs: list[Job]) -> list:
    """Submit what is neither finished nor in the queue: first the teachers, then the rest, which
    waits for them in the queue. Returns the jobs, as submitit has them."""
    submitit, runs = import_submitit(), Path(args.runs)
    busy = in_queue(runs, args.table)
    left = [job for job in todo if str(job.folder) not in busy]
    if len(left) < len(todo):
        print(f"{len(todo) - len(left)} trainings are in the queue already", flush=True)
    remember(runs, args.table, {str(job.folder): dict(epochs=job.epochs) for job in jobs})
    before = {busy[str(job.needs)] for job in left if str(job.needs) in busy}
    ways = max(1, args.gpus or 0) if args.apart else 1
    submitted = []
    for group in filter(None, teams(left, jobs)):
        executor = submitit.AutoExecutor(
            folder=runs / "jobs" / "%j", cluster=CLUSTER, slurm_max_num_timeout=9999
        )
        executor.update_parameters(**parameters(args, before))
        said = io.StringIO()  # by sbatch: its first line is the reason
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
    print(f"tools/tables.py status {args.table} --runs {args.runs} shows the trainings", flush=True)
    return submitted


def parameters(args, before: set[str]) -> dict:
    """submitit's, of an array that waits for the end of the jobs `before`."""
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
    if before:  # however they end: what lacks its teacher trains it
        found["slurm_dependency"] = f"afterany:{':'.join(sorted(before))}"
    return found


@contextmanager
def _importable():
    """The jobs find this repository, whatever the working directory; they inherit PYTHONPATH."""
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
    """What sbatch says, without the command that submitit shows with it."""
    lines = [*said.getvalue().splitlines(), *str(error).splitlines()]
    errors = [line.partition("error: ")[2] for line in lines if "error: " in line]
    return errors[0] if errors else first_line(error)


def import_submitit():
    """The module, or a UserError that says what to install."""
    try:
        import submitit
    except ImportError as error:
        raise UserError("--launcher slurm needs a package: pip install submitit") from error
    return submitit


# --- flags ----------------------------------------------------------------------------------------


def add_flags(parser, filled, number) -> None:
    """Those of `tables.py run`. filled, number: of engine/cli.py."""
    add = parser.add_argument_group("launcher").add_argument
    add(
        "--launcher",
        choices=("local", "slurm"),
        default="local",
        help="local: on this machine (default); slurm: a job for each pair and seed, and `status` "
        "shows them",
    )
    add("--partition", type=filled, metavar="NAME", help="SLURM partition (default: the cluster's)")
    add("--gpus", type=number(int, 0, 64), metavar="N", help="GPUs per job (default: no GPU)")
    add("--cpus", type=number(int, 1, 1024), metavar="N", help="CPUs per job (default 1)")
    add(
        "--time",
        type=minutes_of,
        metavar="T",
        help="time limit of a job: minutes, H:MM:SS or D-HH:MM:SS; a longer training continues in "
        "the next one (default 1 day)",
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
        help="further flags of sbatch: 'account=lab qos=long exclusive'",
    )


def minutes_of(text: str) -> int:
    """An argparse type: a time as SLURM writes it, in minutes."""
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
    """An argparse type: pairs of a flag of sbatch, without dashes, and its value or True."""
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
            raise argparse.ArgumentTypeError(f"{name} of sbatch is set by the launcher")
        found[name] = value if equals else True
    if not found:
        raise argparse.ArgumentTypeError(f"expected flags of sbatch, K=V K=V, got {text!r}")
    return tuple(found.items())
