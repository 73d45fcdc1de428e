"""Tables trained by jobs of a cluster: submitit's local executor, and a real SLURM with one node.

SLURM needs `apt-get install slurm-wlm munge`, both need `pip install submitit`.
"""

import csv
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path

import pytest
from finished_runs import DIGITS
from messages import ends, one_line

from engine import locks
from engine.run import read_metrics
from tools import tables, tables_plan, tables_slurm, tables_status, tables_work

ROOT = Path(__file__).parents[2]
METHODS = "baseline,st,dml"
# long enough that a signal finds each training before its end
SMALL = ["small", *DIGITS, "--epochs", "8", "--methods", METHODS, "--seeds", "2"]
HOME = Path("kdzoo") / "digits-12px-8ep"


def undated(path: Path) -> list[dict]:
    """A table's rows without their times."""
    with open(path, encoding="utf-8") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def wait(until, seconds: float = 900, what=lambda: "") -> None:
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end, what()
        time.sleep(0.2)


def states(runs: Path) -> dict[str, str]:
    """{training: state}, as `tables.py status` prints them."""
    lines = tables_status.status(runs, "small")[:-1]
    return {line.split()[1]: line.split()[0] for line in lines}


def same(one: Path, other: Path, bytewise: bool = True) -> None:
    """Two tables and all their metrics are equal: byte for byte, or except for the column `phase`,
    which a baseline trained in a separate process does not have."""
    for root in (one, other):
        tables.main(["show", "small", "--runs", str(root), "--out", str(root)])
    assert undated(one / "small.csv") == undated(other / "small.csv")
    found = sorted(path.relative_to(one) for path in one.glob("kdzoo/**/metrics.csv"))
    assert len(found) == 7
    for path in found:
        if bytewise:
            assert (one / path).read_bytes() == (other / path).read_bytes(), path
        rows = [read_metrics((root / path).parent) for root in (one, other)]
        for row in sum(rows, []):
            row.pop("phase", None)
        assert rows[0] == rows[1], path


# --- submitted jobs -------------------------------------------------------------------------------


def planned(tmp_path, *argv: str):
    args = tables.parse(["run", *SMALL, "--runs", str(tmp_path), "--launcher", "slurm", *argv])
    table = tables_plan.TABLES["small"]
    rows = tables_plan.rows_of("small", "digits", None, args.methods)
    return args, tables_plan.jobs_of(args, table, rows)


def names(team) -> list[str]:
    return [job.folder.name for job in team]


def test_a_job_for_each_pair_and_seed(tmp_path):
    _, jobs = planned(tmp_path)
    first, rest = tables_slurm.teams(jobs, jobs)
    assert [names(team) for team in first] == [["base-resnet20-1"]]
    teacher = "base-resnet20-1"
    assert [names(team) for team in rest] == [
        [teacher, "base-resnet8-1", "st-1", "dml-1"],
        [teacher, "base-resnet8-2", "st-2", "dml-2"],
    ]
    left = [job for job in jobs if job.folder.name in ("dml-1", "base-resnet8-2")]
    first, rest = tables_slurm.teams(left, jobs)
    assert first == [] and [names(team) for team in rest] == [["dml-1"], ["base-resnet8-2"]]


def test_the_flags_of_a_job(tmp_path):
    flags = "--partition p --gpus 1 --cpus 4 --time 1-00:30:00 --max_parallel 3".split()
    args, _ = planned(tmp_path, *flags, "--slurm_args", "account=lab --qos=long exclusive")
    found = tables_slurm.parameters(args, {"7", "8_1"})
    assert found["timeout_min"] == 24 * 60 + 30 and found["slurm_array_parallelism"] == 3
    assert found["slurm_partition"] == "p" and found["gpus_per_node"] == 1
    assert found["cpus_per_task"] == 4 and found["slurm_dependency"] == "afterany:7:8_1"
    more = dict(account="lab", qos="long", exclusive=True, requeue=True)
    assert found["slurm_additional_parameters"] == more
    assert (
        tables_slurm.parameters(planned(tmp_path, "--time", "2")[0], set())["slurm_signal_delay_s"]
        == 30
    )  # of 120 seconds, so that some work is done before the warning


def test_times():
    for text, minutes in (("90", 90), ("1:30:00", 90), ("0:02:01", 3), ("2-01:00:00", 49 * 60)):
        assert tables_slurm.minutes_of(text) == minutes


@pytest.mark.parametrize(
    "argv, names",
    [
        ("--launcher pbs", "--launcher pbs"),
        ("--time 10", "--time --launcher"),
        ("--slurm_args qos=x", "--slurm_args --launcher"),
        ("--launcher slurm --jobs 2", "--jobs --max_parallel"),
        ("--launcher slurm --out x", "--out"),
        ("--launcher slurm --into x", "--into"),
        ("--launcher slurm --time 1", "--time"),
        ("--launcher slurm --time 1:30", "--time"),
        ("--launcher slurm --time inf", "--time"),
        ("--launcher slurm --time -5", "--time"),
        ("--launcher slurm --gpus -1", "--gpus"),
        ("--launcher slurm --gpus two", "--gpus"),
        ("--launcher slurm --cpus 0", "--cpus"),
        ("--launcher slurm --max_parallel 0", "--max_parallel"),
        ("--launcher slurm --partition ''", "--partition"),
        ("--launcher slurm --slurm_args ''", "--slurm_args"),
        ("--launcher slurm --slurm_args 'a=b ;rm'", "--slurm_args"),
        ("--launcher slurm --slurm_args array=1-3", "--slurm_args array"),
        ('--launcher slurm --slurm_args "x=\'"', "--slurm_args"),
    ],
)
def test_bad_flags(argv, names, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with ends(capsys, *names.split()) as said:
        tables.main(["run", *SMALL, *shlex.split(argv)])
    assert said[0].startswith("error: ") and list(tmp_path.iterdir()) == []


def test_submitit_or_slurm_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    for module, name in ((None, "pip install submitit"), (tables_slurm, "sbatch")):
        monkeypatch.setitem(sys.modules, "submitit", module)
        with ends(capsys, "--launcher", name):
            tables.main(["run", *SMALL, "--launcher", "slurm"])
    assert list(tmp_path.iterdir()) == []


def test_a_job_uses_the_gpus_that_it_was_given(tmp_path, monkeypatch):
    """SLURM tells which GPUs: number 0 may belong to another job."""
    found = []
    monkeypatch.setattr(subprocess, "Popen", lambda *args, env, **more: found.append(env))
    job = Namespace(script="x.py", argv=[], folder=tmp_path / "a", student=None)
    for given in ("2,5", "", None):
        if given is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
        for slot in (0, 1, 2):
            with open(tmp_path / "out", "w") as file:
                tables_work.launch([job], [file], slot, 3, 2)
    assert [env["CUDA_VISIBLE_DEVICES"] for env in found] == [*"252", *"010", *"010"]


# --- status ---------------------------------------------------------------------------------------


def test_what_a_training_does(tmp_path):
    folder = tmp_path / "st-1"
    about, out = dict(epochs=4, job="7_1"), tmp_path / "st-1.out"

    def state(there, about=about):
        return tables_status.state_of(folder, about, there)

    assert state({"7_1": "PENDING"}) == ("queued", "")
    assert state({}) == ("failed", "its log is empty")
    assert state(None) == ("waiting", "") and state({}, dict(epochs=4)) == ("waiting", "")
    folder.mkdir()
    (folder / "timing.csv").write_text("row,seconds,train_img_per_s\n1,60,9\n2,80,9\n")
    (folder / "args.json").write_text('{"together": ["st", "at"]}')
    lock = locks.hold(folder / ".lock")
    assert state({"7_1": "RUNNING"}) == ("running", "epoch 3 of 4, about 5 min left")
    lock.close()
    assert state({"7_1": "RUNNING"})[0] == "queued"
    out.write_text("begun\nerror: NaN loss\n")
    (folder / "log.txt").write_text("epoch 1\n")
    assert state({}) == ("failed", "error: NaN loss")
    assert state(None, dict(epochs=4)) == ("failed", "error: NaN loss")
    out.write_text("stopped by SIGTERM\n")
    assert state(None, dict(epochs=4))[0] == "stopped"
    (folder / "result.json").write_text('{"last": 71.5}')
    assert state({}) == ("finished", "last 71.50")


def test_nothing_was_begun(tmp_path, capsys):
    with ends(capsys, "small", tmp_path):
        tables.main(["status", "small", "--runs", str(tmp_path)])
    (tmp_path / "jobs").mkdir()
    for text in (
        "[1]",
        "{",
        '{"a": 3}',
        '{"a": {"epochs": "x"}}',
        '{"a": {"epochs": 1, "job": 3}}',
    ):
        (tmp_path / "jobs" / "small.json").write_text(text)
        with ends(capsys, tmp_path / "jobs" / "small.json"):
            tables.main(["status", "small", "--runs", str(tmp_path)])


def test_what_two_runs_remember_is_joined(tmp_path):
    tables_status.remember(tmp_path, "small", dict(a=dict(epochs=1), b=dict(epochs=2)))
    tables_status.remember(tmp_path, "small", dict(b=dict(epochs=2, job="7"), c=dict(epochs=3)))
    tables_status.remember(tmp_path, "small", dict(b=dict(epochs=2)))
    known = tables_status.remembered(tmp_path, "small")
    assert known == dict(a=dict(epochs=1), b=dict(epochs=2, job="7"), c=dict(epochs=3))


def test_squeue(monkeypatch):
    answers = []

    def squeue(command, **more):
        assert command[-1] == "7,9"
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return subprocess.CompletedProcess(command, *answer)

    monkeypatch.setattr(subprocess, "run", squeue)
    text = "7_0 RUNNING\n7_1 PENDING\n7_2 RUNNING\n9 CANCELLED\n"
    answers += [(0, text, ""), (1, "", "slurm_load_jobs error: Invalid job id specified\n")]
    answers += [(1, "", "Unable to contact slurm controller\n"), FileNotFoundError()]
    found = [tables_status.queue({"7_0", "7_1", "9"}) for _ in range(4)]
    assert found == [{"7_0": "RUNNING", "7_1": "PENDING"}, {}, None, None]


# --- submitit's local executor --------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The table as `--launcher local` trains it, without interruption."""
    root = tmp_path_factory.mktemp("local")
    tables.main(["run", *SMALL, "--runs", str(root), "--launcher", "local"])
    return root


@pytest.mark.soak
def test_local_jobs_one_warned_and_one_killed_give_the_undisturbed_table(
    undisturbed, tmp_path, monkeypatch
):
    pytest.importorskip("submitit", reason="submitit is not installed: pip install submitit")
    monkeypatch.setattr(tables_slurm, "CLUSTER", "local")
    monkeypatch.setattr(tables_status, "queue", lambda jobs: {})
    submitted, submit = [], tables_slurm.submit
    monkeypatch.setattr(tables_slurm, "submit", lambda *args: submitted.extend(submit(*args)))
    argv = ["run", *SMALL, "--runs", str(tmp_path), "--launcher", "slurm", "--cpus", "1"]
    tables.main(argv)
    assert len(submitted) == 3  # the teacher, for which the others wait, and two seeds
    home = tmp_path / HOME
    wait(lambda: (home / "base-resnet20-1" / "log.txt").exists())
    teacher, warned, killed = submitted
    for job, name in ((warned, "st-1"), (killed, "st-2")):
        wait(lambda: (home / "resnet20-resnet8" / name / "log.txt").exists() or finished(job))
        if job is warned:
            # the signal that SLURM sends before the time of a job ends
            os.kill(children(job._process.pid)[0], signal.SIGUSR2)
        else:
            kill_all(job._process.pid)
    wait(lambda: all(finished(job) for job in submitted), what=lambda: str(states(tmp_path)))
    assert "Requeued job" in warned.paths.stdout.read_text()
    found = states(tmp_path)
    assert found["resnet20-resnet8/dml-1"] == "finished"
    assert found["resnet20-resnet8/st-2"] != "finished"
    tables.main(argv)  # the unfinished trainings
    wait(lambda: set(states(tmp_path).values()) == {"finished"}, what=lambda: str(states(tmp_path)))
    same(undisturbed, tmp_path, bytewise=False)


def finished(job) -> bool:
    return job._process.poll() is not None


def children(pid: int) -> list[int]:
    done = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True)
    return [int(line) for line in done.stdout.split()]


def kill_all(first: int) -> None:
    """Send SIGKILL to a process and all its descendants."""
    found = [first]
    for pid in found:
        found += children(pid)
    for pid in found:
        os.kill(pid, signal.SIGKILL)


# --- a real SLURM ---------------------------------------------------------------------------------


@pytest.fixture
def cluster(monkeypatch):
    """A SLURM cluster on this machine: one node with two CPUs."""
    pytest.importorskip("submitit", reason="submitit is not installed: pip install submitit")
    if not shutil.which("sbatch"):
        pytest.skip("SLURM is not installed: apt-get install slurm-wlm munge")
    folder = tempfile.mkdtemp(prefix="slurm")  # the path of a socket must be short
    done = subprocess.run(
        ["tests/slurm/start.sh", folder], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        shutil.rmtree(folder, ignore_errors=True)
        pytest.skip(f"SLURM cannot be started here: {' '.join(done.stdout.split())[-300:]}")
    monkeypatch.setenv("SLURM_CONF", f"{folder}/slurm.conf")
    yield
    subprocess.run(["tests/slurm/stop.sh", folder], cwd=ROOT)
    time.sleep(1)
    shutil.rmtree(folder, ignore_errors=True)


def slurm(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def kill_job(runs: Path, job: str) -> None:
    """Kill the processes of a job directly, since SLURM would warn them first."""
    command = ["pgrep", "-f", f"submitit.core._submit {runs}"]
    number = f"SLURM_ARRAY_TASK_ID={job.partition('_')[2]}"
    for pid in subprocess.run(command, capture_output=True, text=True).stdout.split():
        process = Path("/proc") / pid
        task = b"srun" not in (process / "cmdline").read_bytes()
        if task and number.encode() in (process / "environ").read_bytes().split(b"\0"):
            kill_all(int(pid))


def restarts(job: str) -> int:
    words = slurm("scontrol", "show", "job", job).split()
    return int(next(word for word in words if word.startswith("Restarts=")).partition("=")[2])


@pytest.mark.soak
def test_slurm_one_preempted_one_out_of_time_one_killed_give_the_undisturbed_table(
    cluster, undisturbed, tmp_path, capsys
):
    argv = ["run", *SMALL, "--runs", str(tmp_path), "--launcher", "slurm", "--time", "30"]
    began = time.monotonic()

    def note(text: str) -> None:
        with capsys.disabled():  # pytest -s shows them
            print(f"{time.monotonic() - began:5.0f} s  {text}")

    def job_of(name: str) -> str:
        known = tables_status.remembered(tmp_path, "small")
        return next(about["job"] for folder, about in known.items() if folder.endswith(name))

    home = tmp_path / HOME
    tables.main([*argv, "--cpus", "1"])
    assert "submitted 1 job: " in capsys.readouterr().out
    tables.main([*argv, "--cpus", "1"])
    assert "7 trainings are already in the queue" in capsys.readouterr().out
    teacher, one, two = (job_of(name) for name in ("base-resnet20-1", "/st-1", "/st-2"))
    wait(lambda: states(tmp_path)["digits-12px-8ep/base-resnet20-1"] == "running")
    note("the teacher is running, its students are queued: " + str(states(tmp_path)))
    wait(lambda: (home / "base-resnet20-1" / "metrics.csv").exists())
    slurm("sbatch", "--partition=urgent", "--ntasks=2", "--output=/dev/null", "--wrap=sleep 2")
    wait(lambda: restarts(teacher) == 1)
    note("the teacher was preempted: " + str(tables_status.status(tmp_path, "small")))
    said = b"".join(path.read_bytes() for path in tmp_path.glob("kdzoo/**/*.out"))
    assert b"stopped by SIGTERM" in said
    wait(lambda: (home / "resnet20-resnet8" / "st-1" / "log.txt").exists())
    assert (home / "base-resnet20-1" / "result.json").exists()
    note("its students are running: " + str(tables_status.status(tmp_path, "small")))
    tables.main(["show", "small", "--runs", str(tmp_path)])
    wait(lambda: (home / "resnet20-resnet8" / "st-1" / "metrics.csv").exists())
    slurm("scancel", "--signal=USR2", one)  # as SLURM does before the end of a job's time
    note(f"job {one} was warned that its time ends")
    wait(lambda: (home / "resnet20-resnet8" / "st-2" / "metrics.csv").exists())
    kill_job(tmp_path, two)
    note(f"job {two} was killed")
    wait(lambda: restarts(one) == 1)
    wait(
        lambda: (
            "running" not in states(tmp_path).values()
            and not tables_status.in_queue(tmp_path, "small")
        ),
        what=lambda: str(states(tmp_path)),
    )
    found = states(tmp_path)
    note(str(tables_status.status(tmp_path, "small")))
    assert found["resnet20-resnet8/dml-1"] == "finished"
    assert found["resnet20-resnet8/dml-2"] == "failed"
    tables.main([*argv, "--cpus", "2"])
    wait(lambda: set(states(tmp_path).values()) == {"finished"}, what=lambda: str(states(tmp_path)))
    note(tables_status.status(tmp_path, "small")[-1])
    same(undisturbed, tmp_path)


@pytest.mark.soak
def test_slurm_refuses(cluster, tmp_path, capsys):
    argv = ["run", *SMALL, "--runs", str(tmp_path), "--launcher", "slurm", "--partition", "none"]
    with pytest.raises(SystemExit) as stop:
        tables.main(argv)
    err = capsys.readouterr().err
    assert stop.value.code == 2
    assert one_line(err, "--launcher", "partition").startswith("error: ")
