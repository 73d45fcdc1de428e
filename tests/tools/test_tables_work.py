import csv
import errno
import fcntl
import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from finished_runs import DIGITS
from messages import names

from engine import locks
from tools import tables, tables_plan, tables_work

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def undated(path):
    """A table's rows without their times."""
    with open(path, encoding="utf-8") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def test_killed_and_started_again_equals_undisturbed(tmp_path):
    """Two methods, two seeds, two epochs: undisturbed, and killed and started again."""
    argv = ["run", "small", *DIGITS, "--methods", "baseline,st", "--seeds", "2", "--jobs", "2"]
    tables.main([*argv, "--runs", str(tmp_path / "a"), "--out", str(tmp_path / "a")])
    rows = undated(tmp_path / "a" / "small.csv")
    found = [(row["mode"], row["seeds"], row["epochs"]) for row in rows]
    assert found == [("teacher", "1", "2"), ("baseline", "2", "2"), ("st", "2", "2")]
    assert rows[2]["setting"] == "digits-12px-2ep" and rows[2]["last_std"]

    command = [sys.executable, "tools/tables.py", *argv]
    command += ["--runs", str(tmp_path / "b"), "--out", str(tmp_path / "b")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    # during the training of a student
    folder = tmp_path / "b" / "kdzoo" / "digits-12px-2ep" / "resnet20-resnet8"
    wait(lambda: list(folder.glob("*/checkpoint.pth.tar")) or process.poll() is not None)
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait(lambda: not running(tmp_path / "b"))  # its trainings end too
    assert subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL).returncode == 0
    assert undated(tmp_path / "b" / "small.csv") == rows


METHODS = "baseline,st,at,dml,crd"


def test_together_and_apart_give_one_table(tmp_path, capsys):
    argv = ["run", "small", *DIGITS, "--methods", METHODS, "--seeds", "2"]
    rows = []
    for way in ("--apart", "--together"):
        root = str(tmp_path / way)
        tables.main([*argv, way, "--runs", root, "--out", root])
        assert f"{len(METHODS.split(',')) * 2 + 1} trainings, 0 of them" in capsys.readouterr().out
        rows.append(undated(tmp_path / way / "small.csv"))
    assert rows[0] == rows[1] and len(rows[0]) == 7
    home = tmp_path / "--together" / "kdzoo" / "digits-12px-2ep"
    beside = json.loads((home / "resnet20-resnet8" / "at-2" / "args.json").read_text())["together"]
    assert beside == ["none", "st", "at", "crd"]
    apart = tmp_path / "--apart" / "kdzoo" / "digits-12px-2ep"
    for metrics in apart.glob("resnet20-resnet8/*/metrics.csv"):
        assert metrics.read_bytes() == (home / metrics.relative_to(apart)).read_bytes()
    base = json.loads((home / "base-resnet8-2" / "args.json").read_text())
    assert base["command"].startswith("train_kd.py --kd_mode none")
    tables.main([*argv, "--apart", "--runs", str(tmp_path / "--together")])
    assert "11 trainings, 11 of them finished" in capsys.readouterr().out


def test_killed_together_and_started_again(tmp_path):
    """The trainings of a pair and seed continue together, or in separate processes."""
    argv = ["run", "small", *DIGITS, "--methods", "baseline,st,at", "--epochs", "3"]
    tables.main([*argv, "--runs", str(tmp_path / "a"), "--out", str(tmp_path / "a")])
    rows = undated(tmp_path / "a" / "small.csv")
    for way in ("--together", "--apart"):
        root = str(tmp_path / way)
        command = [sys.executable, "tools/tables.py", *argv, "--runs", root, "--out", root]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        folder = tmp_path / way / "kdzoo" / "digits-12px-3ep" / "resnet20-resnet8"
        wait(lambda: list(folder.glob("*/checkpoint.pth.tar")) or process.poll() is not None)
        process.send_signal(signal.SIGKILL)
        process.wait()
        wait(lambda: not running(tmp_path / way))
        assert subprocess.run([*command, way], cwd=ROOT, stdout=subprocess.DEVNULL).returncode == 0
        assert undated(tmp_path / way / "small.csv") == rows


def test_the_others_continue_if_a_folder_has_other_files(tmp_path, capsys):
    folder = tmp_path / "kdzoo" / "digits-12px-2ep" / "resnet20-resnet8" / "at-1"
    folder.mkdir(parents=True)
    (folder / "mine.txt").write_text("mine")
    argv = ["run", "small", *DIGITS, "--methods", "st,at,dkd", "--runs", str(tmp_path)]
    with pytest.raises(SystemExit) as stop:
        tables.main(argv)
    out = capsys.readouterr().out
    assert stop.value.code == 2 and any(names(x, folder, "failed") for x in out.splitlines())
    assert not (folder / "result.json").exists()
    assert all((folder.parent / f"{mode}-1" / "result.json").exists() for mode in ("st", "dkd"))


def wait(until, seconds=600):
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end
        time.sleep(0.02)


def running(folder: Path) -> bool:
    return subprocess.run(["pgrep", "-f", f"train_.*{folder}"], capture_output=True).returncode == 0


@pytest.fixture
def fake(tmp_path):
    """Make Jobs whose script finishes, fails or is slow, as its argument says."""
    script = tmp_path / "script.py"
    script.write_text(
        "import json, pathlib, sys\n"
        "folder, what = pathlib.Path(sys.argv[1]), sys.argv[2]\n"
        "folder.mkdir(exist_ok='--resume' in sys.argv)\n"
        "command = ' '.join(sys.argv[:3])\n"
        "(folder / 'args.json').write_text(json.dumps(dict(command=command)))\n"
        "print('begun', file=open(folder / 'begun', 'a'))\n"
        "if what == 'slow': import time; time.sleep(1)\n"
        "if what == 'fail': sys.exit('error: it broke')\n"
        "(folder / 'result.json').write_text(json.dumps(dict(seconds=1.0)))\n"
        "print('resumed' if '--resume' in sys.argv else 'done')\n"
    )

    def make(name, what="finish", needs=None):
        folder = tmp_path / name
        needs = tmp_path / needs if needs else None
        return tables_plan.Job(str(script), [str(folder), what], folder, 1, needs, "")

    return make


def test_a_failure_stops_only_the_jobs_that_need_it(fake, capsys):
    jobs = [fake("t-1", "fail"), fake("a-1", needs="t-1"), fake("b-1"), fake("c-1", needs="b-1")]
    failed = tables_work.work(jobs, jobs, 2, 0)
    out = capsys.readouterr().out
    assert [job.folder.name for job in failed] == ["t-1", "a-1"]
    assert "error: it broke" in out and any(
        str(jobs[1].folder) in line and "teacher" in line for line in out.splitlines()
    )
    assert jobs[2].finished and jobs[3].finished and "min left" in out


def test_a_run_of_another_command_is_left_alone(fake, capsys):
    job = fake("a-1")
    job.folder.mkdir()
    (job.folder / "args.json").write_text('{"command": "train_kd.py --other"}')
    assert tables_work.work([job], [job], 1, 0) == [job]
    (line,) = capsys.readouterr().out.splitlines()
    assert names(line, job.folder, "train_kd.py --other", "--runs")
    assert [p.name for p in job.folder.iterdir()] == ["args.json"]


def test_an_interrupted_run_is_resumed_and_nothing_is_removed(fake, capsys):
    begun, bare = fake("a-1"), fake("b-1")
    for job in (begun, bare):
        job.folder.mkdir()
        (job.folder / "old").touch()
    (begun.folder / "checkpoint.pth.tar").touch()
    assert tables_work.work([begun, bare], [begun, bare], 1, 0) == []
    assert "resumed" in capsys.readouterr().out
    assert (begun.folder / "old").exists() and (bare.folder / "old").exists()


def test_two_runs_on_one_table_share_its_trainings(fake, capsys, monkeypatch):
    """Each is trained once. No file of the other run is removed, not even in its first epoch."""
    monkeypatch.setattr(tables_work, "AGAIN", 0.05)
    jobs = [fake(f"{name}-1", "slow") for name in "abc"]
    failed = []
    other = threading.Thread(target=lambda: failed.extend(tables_work.work(jobs, jobs, 1, 0)))
    other.start()
    wait(lambda: (jobs[0].folder / "begun").exists(), 60)
    (jobs[0].folder / "mine").touch()
    failed += tables_work.work(jobs, jobs, 1, 0)
    other.join()
    assert failed == [] and all(job.finished for job in jobs)
    assert [(job.folder / "begun").read_text() for job in jobs] == 3 * ["begun\n"]
    assert (jobs[0].folder / "mine").exists()
    out = capsys.readouterr().out
    assert any(names(x, jobs[0].folder, "another process") for x in out.splitlines())
    assert not list(jobs[0].folder.parent.glob("*.out"))


def test_the_other_run_was_killed(fake, monkeypatch):
    """A training keeps its lock as long as it runs, even if its `run` was killed."""
    monkeypatch.setattr(tables_work, "AGAIN", 0.05)
    job = fake("a-1", "slow")
    file = tables_work.claim(job)
    process = tables_work.launch([job], [file], 0, 1, 0)
    file.close()  # as a killed process does
    with pytest.raises(locks.Held):
        tables_work.claim(job)
    assert tables_work.work([job], [job], 1, 0) == [] and process.wait() == 0
    assert (job.folder / "begun").read_text() == "begun\n"


def test_a_training_that_no_table_began_is_waited_for(fake, capsys, monkeypatch):
    monkeypatch.setattr(tables_work, "AGAIN", 0.05)
    job = fake("a-1")
    job.folder.mkdir()
    lock = locks.hold(job.folder / ".lock")
    lock.write("process 7 on host\n")
    lock.flush()
    (job.folder / "checkpoint.pth.tar").touch()
    threading.Timer(1, lock.close).start()
    began = time.monotonic()
    assert tables_work.work([job], [job], 1, 0) == [] and time.monotonic() - began > 0.9
    out = capsys.readouterr().out
    assert any(names(x, job.folder, "process 7 on host") for x in out.splitlines())


def test_a_folder_of_others_is_left_alone(tmp_path, capsys):
    folder = tmp_path / "kdzoo" / "digits-12px-2ep" / "base-resnet8-1"
    folder.mkdir(parents=True)
    (folder / "mine.txt").write_text("mine")
    argv = ["run", "small", *DIGITS, "--methods", "baseline", "--runs", str(tmp_path)]
    with pytest.raises(SystemExit) as stop:
        tables.main(argv)
    out = capsys.readouterr().out
    assert stop.value.code == 2 and any(names(x, folder, "failed") for x in out.splitlines())
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]


def test_no_locks_on_a_file_system(fake, monkeypatch, capsys):
    def refuse(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    job = fake("a-1")
    assert tables_work.work([job], [job], 1, 0) == []
    out = capsys.readouterr().out
    assert any(
        x.startswith("warning: ") and names(x, job.folder.parent, "locks") for x in out.splitlines()
    )


def test_a_damaged_result_is_written_again(fake):
    job = fake("a-1")
    job.folder.mkdir()
    for text in ("", "[1]", "{"):
        (job.folder / "result.json").write_text(text)
        assert not job.finished and tables_work.time_left([job], [job], 1) == ""
    (job.folder / "args.json").write_text("[1]")
    assert tables_work.work([job], [job], 1, 0) == [] and job.finished


def test_the_place_of_the_images_may_change():
    made = "train_base.py --net_name a --img_root /old place/x --epochs 2 --workers 3 --resume"
    flags = dict(img_root="/old place/x", workers=3, cuda=None)
    argv = ["--net_name", "a", "--img_root", "/new", "--epochs", "2"]
    now = " ".join(["train_base.py", *argv])
    plain = tables_work.without_place(now, dict(zip(argv, argv[1:])))
    assert (
        tables_work.without_place(made, flags) == plain == "train_base.py --net_name a --epochs 2"
    )
