import csv
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import train_base
import train_kd
import utils
from engine import cli, published
from kd_losses import METHODS
from tools import tables
from engine import locks

ROOT = Path(__file__).parents[2]
DIGITS = ["--data", "digits", "--img_size", "12", "--cuda", "0", "--epochs", "2"]


# --- published.csv -----------------------------------------------------------------------------------


def figure(table, teacher, student, method, data="cifar100"):
    return [
        row["value"]
        for row in tables.figures_of(table)
        if [tables.short(row[side]) for side in tables.SIDES] == [teacher, student]
        and row["method"] == method
        and (row["data"], row["metric"]) == (data, "top1")
    ]


@pytest.mark.parametrize(
    "where, value",
    [
        (("kdzoo-r20-r20", "resnet20", "resnet20", "AT", "cifar10"), "92.89"),
        (("kdzoo-dml", "resnet110", "resnet20", "DML (net1)", "cifar10"), "94.45"),
        (("kdzoo-dml", "resnet110", "resnet20", "DML (net2)", "cifar10"), "92.92"),
        (("crd", "wrn_40_2", "wrn_16_2", "CRD"), "75.48"),
        (("crd", "wrn_40_2", "wrn_40_1", "FSP"), "N/A"),
        (("crd", "resnet32x4", "resnet8x4", "Teacher"), "79.42"),
        (("mdistiller", "resnet32x4", "ShuffleV2", "DKD"), "77.07"),  # MobileNet-V2 is a misprint
        (
            ("knowledgereview", "resnet50", "resnet18", "ReviewKD, weight 10"),
            "83.130",
        ),
        (("imagenet-r50-mv1", "resnet50", "MobileNetV1", "ReviewKD", "imagenet"), "72.56"),
        (("sota", "resnet32x4", "resnet8x4", "MLKD"), "77.08"),
        (("sota", "wrn_40_2", "ShuffleV1", "WKD-F"), "77.36"),
        (("sota", "ResNet50", "MobileNetV2", "ITRD"), "71.34"),
        (("sota", "resnet32x4", "wrn_40_2", "KD+LS"), "77.92"),
        (("sota", "vgg13", "vgg8", "ICKD-C without KD"), "73.42"),
        (("sota", "resnet32x4", "ShuffleNetV2_1.5", "SimKD, factor 8"), "78.96"),
    ],
)
def test_published_figures(where, value):
    assert figure(*where)[0] == value


def test_a_row_that_repeats_another_is_corrected_and_said():
    pair = "resnext101_32x8d", "mobilenet_v2", "ReviewKD, weight 6"
    assert figure("knowledgereview", *pair)[0] == "84.200"
    rows = tables.figures_of("knowledgereview")
    rows = [r for r in rows if (r["value"], tables.short(r["teacher"])) == ("84.520", pair[0])]
    assert rows and all("repeats" in row["note"] for row in rows)


def test_the_numbers_of_pairs():
    pairs = {
        name: len({row[:2] for row in tables.rows_of(name, "cifar100", None, None) if row[0]})
        for name in ("crd", "mdistiller", "knowledgereview", "sota")
    }
    assert pairs == dict(crd=13, mdistiller=11, knowledgereview=6, sota=17)


def test_the_newer_methods_say_what_they_spend(tmp_path, capsys):
    """And what has no mode, or a network that is not ours, is shown but not run."""
    rows = {r["method"]: r for r in tables.figures_of("sota") if r["student"] == "resnet8x4"}
    spend = {method for method, row in rows.items() if row["budget"]}
    assert spend == set(tables.BUDGET) and rows["MLKD"]["budget"].startswith("480 epochs, 2 views")
    shown = "NORM", "DKD+LS", "SDD (StreamLined's rerun)"
    assert not any(rows[method]["mode"] for method in shown)
    run = tables.rows_of("sota", "cifar100", None, None)
    assert {mode for *_, mode in run} < {"baseline", *METHODS}
    assert "ShuffleNetV2_1.5" not in {s for _, s, _ in run}
    tables.main(["show", "sota", "--runs", str(tmp_path)])
    out = capsys.readouterr().out
    assert "| MLKD | 77.08 | best | 480 epochs, 2 views" in out
    assert "| SimKD | 78.08 | unknown | deploys projector" in out
    assert "resnet32x4 -> ShuffleNetV2_1.5" in out


@pytest.mark.parametrize("name", tables.TABLES)
def test_show_prints_every_published_figure(name, tmp_path, capsys):
    figures = tables.figures_of(name)
    if not figures:
        with pytest.raises(SystemExit):
            tables.main(["show", name, "--runs", str(tmp_path)])
        assert "nothing to show" in capsys.readouterr().err
        return
    tables.main(["show", name, "--runs", str(tmp_path / "none"), "--out", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    with open(tmp_path / f"{name}.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for f in figures:
        assert any(f["value"] in line for line in lines if line.startswith("|")), f
        assert any(f["value"] == row["published"] or f["value"] in row["also"] for row in rows), f
    assert (tmp_path / f"{name}.png").stat().st_size > 5_000


# --- recipes -----------------------------------------------------------------------------------------


def dry(capsys, name, *flags) -> dict:
    """{folder: (recipe, command)} of `run --dry_run`."""
    tables.main(["run", name, "--dry_run", *flags])
    lines = capsys.readouterr().out.splitlines()
    commands = [line.split() for line in lines[1::2]]
    notes = [c[c.index("--save_root") + 1].split("/")[-1] + "/" + c[-1] for c in commands]
    return {n: (recipe, " ".join(c)) for n, recipe, c in zip(notes, lines[::2], commands)}


KDZOO = ["lr 0.1, falls after (100, 150)", "(Nesterov)", "weight decay 0.0001", "batch 128"]
CRD = [
    "240 epochs",
    "falls after (150, 180, 210), momentum 0.9,",
    "weight decay 0.0005",
    "batch 64",
]


@pytest.mark.parametrize(
    "table, row, parts",
    [
        ("kdzoo-r20-r20", "cifar10-200ep/base-resnet20-1", ["200 epochs", *KDZOO, "reflect"]),
        ("kdzoo-r20-r20", "resnet20-resnet20/st-1", ["lambda_kd 0.1, lambda_ce 1.0, T 4.0"]),
        ("kdzoo-r20-r20", "resnet20-resnet20/at-1", ["1000.0", "stages all, reduce mean"]),
        ("kdzoo-r20-r20", "resnet20-resnet20/crd-1", ["lambda_kd 0.2", "nce_t 0.1", "nce_n 16384"]),
        ("kdzoo-r20-r20", "resnet20-resnet20/sp-1", ["3000.0", "stages all, reduce mean"]),
        ("kdzoo-r20-r20", "resnet20-resnet20/fitnet-1", ["lambda_kd 0.1", "stages (-1,)"]),
        ("kdzoo-r20-r20", "resnet20-resnet20/fsp-1", ["phases init 50 + train 200"]),
        ("kdzoo-r20-r20", "resnet20-resnet20/ft-1", ["phases paraphrase 30 + distil 200"]),
        ("kdzoo-r20-r20", "resnet20-resnet20/bss-1", ["lambda_kd 2.0", "T 3.0", "attack_size 32"]),
        (
            "crd",
            "resnet32x4-resnet8x4/st-1",
            [*CRD, "lr 0.05", "lambda_kd 0.9, lambda_ce 0.1", "zero"],
        ),
        ("crd", "resnet32x4-ShuffleV1/st-1", [*CRD, "lr 0.01"]),
        ("crd", "vgg13-MobileNetV2/crd-1", [*CRD, "lr 0.01", "lambda_kd 0.8", "nce_t 0.07"]),
        ("crd", "resnet56-resnet20/sp-1", ["3000.0", "stages (-1,)"]),
        ("crd", "resnet56-resnet20/at-1", ["1000.0", "absolute False", "stages all, reduce sum"]),
        ("crd", "resnet56-resnet20/nst-1", ["lambda_kd 50.0", "stages all, reduce sum"]),
        ("crd", "resnet56-resnet20/fitnet-1", ["lambda_kd 100.0", "stages (2,)"]),
        ("crd", "resnet56-resnet20/pkt-1", ["lambda_kd 30000.0"]),
        (
            "crd",
            "resnet56-resnet20/cc-1",
            ["lambda_kd 0.02", "relation neighbours", "feat_dim 128"],
        ),
        ("crd", "resnet56-resnet20/ft-1", ["factor spatial", "paraphrase 30 + distil 240"]),
        ("crd", "resnet56-resnet20/ab-1", ["init 30 + train 240", "m 1.0", "reduce sum"]),
        ("mdistiller", "resnet56-resnet20/dkd-1", ["alpha 1.0, beta 2.0, T 4.0"]),
        ("mdistiller", "resnet32x4-resnet8x4/dkd-1", ["beta 8.0"]),
        ("mdistiller", "vgg13-MobileNetV2/dkd-1", ["lr 0.01", "beta 6.0"]),
        ("mdistiller", "ResNet50-MobileNetV2/dkd-1", ["beta 8.0"]),
        ("sota", "resnet32x4-resnet8x4/wkd_l-1", [*CRD, "weight 600.0", "measured positions"]),
        ("sota", "wrn_40_2-ShuffleV1/wkd_f-1", ["lambda_kd 0.3", "ratio 3.0, grid 4", "lr 0.01"]),
        ("sota", "resnet32x4-ShuffleV1/catkd-1", ["lambda_kd 600.0", "4, normalize True"]),
        (
            "reviewkd",
            "resnet56-resnet20/reviewkd-1",
            ["lambda_kd 0.6", "(151, 181, 211)", "batch 128"],
        ),
        ("reviewkd", "resnet32x4-ShuffleV2/reviewkd-1", ["lambda_kd 8.0", "lr 0.02", "(Nesterov)"]),
        ("reviewkd", "wrn_40_2-wrn_16_2/reviewkd-1", ["lambda_kd 5.0", "lr 0.1", "0.0005"]),
    ],
)
def test_recipes_as_published(table, row, parts, capsys):
    recipe, _ = dry(capsys, table)[row]
    for part in parts:
        assert part in recipe


IMAGENET = ["100 epochs", "falls after (30, 60, 90), momentum 0.9,", "weight decay 0.0001"]
KNOWLEDGE = ["100 epochs", "lr 0.05", "falls after (30, 60, 90)", "batch 128, warm-up 5"]


@pytest.mark.parametrize(
    "table, row, parts",
    [
        ("r34-r18", "st", [*IMAGENET, "lr 0.2", "batch 512", "kd 0.5, lambda_ce 0.5, T 1.0"]),
        ("r34-r18", "at", [*IMAGENET, "lr 0.2", "batch 512", "lambda_kd 1000.0", "p 2.0"]),
        ("r34-r18", "dkd", [*IMAGENET, "batch 512", "alpha 1.0, beta 0.5, T 1.0"]),
        ("r34-r18", "crd", [*IMAGENET, "lr 0.1", "batch 256", "lambda_kd 0.8", "nce_t 0.07"]),
        ("r34-r18", "reviewkd", ["lr 0.1", "batch 256", "lambda_kd 1.0", "512, s_preact True"]),
        ("r50-mv1", "st", [*IMAGENET, "lr 0.2", "batch 512", "kd 0.5, lambda_ce 0.5, T 1.0"]),
        ("r50-mv1", "dkd", [*IMAGENET, "lr 0.2", "batch 512", "beta 2.0, T 1.0"]),
        ("r50-mv1", "ofd", ["lr 0.05", "batch 128", "lambda_kd 0.0001", "margin bn", "reduce sum"]),
        ("r50-mv1", "crd", ["lr 0.1", "batch 256", "lambda_kd 0.8", "nce_t 0.07"]),
        ("r50-mv1", "reviewkd", ["lr 0.1", "batch 256", "lambda_kd 8.0", "mid_channel 256"]),
    ],
)
def test_imagenet_recipes(table, row, parts, capsys):
    teacher = "torchvision/resnet34" if table == "r34-r18" else "torchvision/resnet50"
    found = dry(capsys, f"imagenet-{table}", "--methods", row)
    ((recipe, command),) = found.values()
    assert f"--t_name {teacher}" in command and "--t_pretrained" in command
    assert "Nesterov" not in recipe and "warm-up" not in recipe
    for part in parts:
        assert part in recipe


@pytest.mark.parametrize(
    "row, parts",
    [
        ("base-resnet50-1", [*KNOWLEDGE, "label smoothing 0.1", "weight decay 0.0001"]),
        ("resnet50-mobilenet_v2/reviewkd-1", [*KNOWLEDGE, "lambda_kd 7.0", "weight decay 4e-05"]),
        ("resnet152-mobilenet_v2/reviewkd-1", ["lambda_kd 8.0", "weight decay 4e-05"]),
        ("resnext101_32x8d-mobilenet_v2/reviewkd-1", ["lambda_kd 6.0"]),
        ("resnet50-resnet18/reviewkd-1", ["lambda_kd 10.0", "weight decay 0.0001"]),
        ("resnet152-resnet50/reviewkd-1", ["lambda_kd 6.0"]),
        ("resnext101_32x8d-resnet50/reviewkd-1", ["lambda_kd 6.0"]),
    ],
)
def test_knowledgereview_s_recipes(row, parts, capsys):
    found = {
        key.removeprefix("cifar100-100ep/"): x for key, x in dry(capsys, "knowledgereview").items()
    }
    recipe, command = found[row]
    for part in parts:
        assert part in recipe
    assert ("label smoothing" in recipe) == row.startswith("base")
    assert "pretrained" in command and "Nesterov" not in recipe


def test_protocols_at_224_pixels():
    """ReviewKD's ImageNet scripts; the rule for the rate; sizes, constants, and no ramp of the loss."""
    argv = ["--kd_mode", "reviewkd", "--protocol", "reviewkd-imagenet", "--data_name", "imagenet"]
    args, rows = train_kd.parse(argv, "torchvision/resnet50", "MobileNetV1")
    recipe = train_kd.resolve(args, rows, "MobileNetV1", {})
    assert (recipe.lr, recipe.batch_size, recipe.epochs, recipe.img_size) == (0.1, 256, 100, 224)
    assert recipe.mean_std == published.IMAGENET
    row = rows["reviewkd"]
    assert (row.lambda_kd, row.flags["mid_channel"], row.ramp(1, 100)) == (8.0, 256, 1.0)
    _, rows = train_kd.parse(argv, "torchvision/resnet34", "torchvision/resnet18")
    assert (rows["reviewkd"].lambda_kd, rows["reviewkd"].flags["mid_channel"]) == (1.0, 512)
    # eight GPUs with 64 images each
    args, rows = train_kd.parse([*argv, "--batch_size", "512"], "x", "y")
    assert train_kd.resolve(args, rows, "y", {}).lr == pytest.approx(0.2)
    args, rows = train_kd.parse(["--kd_mode", "dkd", "--protocol", "mdistiller-imagenet"], "x", "y")
    assert rows["dkd"].ramp(1, 100) == 1.0
    argv = ["--net_name", "torchvision/resnet18", "--data_name", "cifar100"]
    recipe = train_base.resolve(train_base.parse([*argv, "--protocol", "knowledgereview"]))
    assert recipe.img_size == 224 and recipe.mean_std == ((0.45,) * 3, (0.225,) * 3)
    rates = [utils.step_decay(0.05, e, recipe.milestones, recipe.warmup) for e in (1, 5, 30, 31)]
    assert rates == pytest.approx([0.01, 0.05, 0.05, 0.005])


def test_crd_lacks_nesterov_and_teaches_from_the_last_epoch(capsys):
    recipe, command = dry(capsys, "crd")["resnet56-resnet20/st-1"]
    assert "Nesterov" not in recipe and "base-resnet56-1/checkpoint.pth.tar" in command
    _, command = dry(capsys, "kdzoo-r110-r20")["resnet110-resnet20/st-1"]
    assert "base-resnet110-1/model_best.pth.tar" in command


def test_ft_s_first_phase_at_the_rate_of_the_student(capsys):
    """RepDistiller: 0.01 for ResNets, the student's rate for others."""
    for student, lr in (("resnet8x4", 0.01), ("ShuffleV1", 0.01), ("vgg8", 0.05)):
        argv = ["--kd_mode", "ft", "--protocol", "crd", "--data_name", "cifar100"]
        args, rows = train_kd.parse(argv, "resnet32x4", student)
        recipe = cli.resolve(args, student, {})
        phase = rows["ft"].phases[0]
        assert train_kd.learning_rate(phase, 3, 30, recipe) == pytest.approx(lr)
        args, rows = train_kd.parse([*argv[:1], "ab", *argv[2:]], "resnet32x4", student)
        rate = train_kd.learning_rate(rows["ab"].phases[0], 29, 30, recipe)
        assert rate == recipe.lr  # constant there, where KD-Zoo's falls


def test_every_command_of_a_dry_run_is_one_that_the_scripts_take(capsys):
    for name, table in tables.TABLES.items():
        flags = [] if table.data else ["--data", "digits"]
        if table.protocol is None:
            continue
        for _, command in dry(capsys, name, *flags).values():
            script, *argv = command.split()[1:]
            (train_kd if script == "train_kd.py" else train_base).parse(argv)


def test_given_flags_beat_the_pair_s():
    argv = ["--kd_mode", "dkd", "--protocol", "crd", "--beta", "3"]
    assert train_kd.parse(argv, "vgg13", "vgg8")[1]["dkd"].flags["beta"] == 3
    argv = ["--kd_mode", "reviewkd", "--protocol", "crd", "--lambda_kd", "2"]
    assert train_kd.parse(argv, "resnet56", "resnet20")[1]["reviewkd"].lambda_kd == 2
    assert train_kd.parse(["--kd_mode", "dkd"], "vgg13", "vgg8")[1]["dkd"].flags["beta"] == 8


# --- running -----------------------------------------------------------------------------------------


def undated(path):
    """A table's rows without their times."""
    with open(path, encoding="utf-8") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def test_killed_and_started_again_equals_undisturbed(tmp_path):
    """Two methods, two seeds, two epochs from nothing, and the same with the whole of it killed."""
    argv = ["run", "small", *DIGITS, "--methods", "baseline,st", "--seeds", "2", "--jobs", "2"]
    tables.main([*argv, "--runs", str(tmp_path / "a"), "--out", str(tmp_path / "a")])
    rows = undated(tmp_path / "a" / "small.csv")
    found = [(row["mode"], row["seeds"], row["epochs"]) for row in rows]
    assert found == [("teacher", "1", "2"), ("baseline", "2", "2"), ("st", "2", "2")]
    assert rows[2]["setting"] == "digits-12px-2ep" and rows[2]["last_std"]

    command = [sys.executable, "tools/tables.py", *argv]
    command += ["--runs", str(tmp_path / "b"), "--out", str(tmp_path / "b")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    # in the midst of a student's training
    folder = tmp_path / "b" / "kdzoo" / "digits-12px-2ep" / "resnet20-resnet8"
    wait(lambda: list(folder.glob("*/checkpoint.pth.tar")) or process.poll() is not None)
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait(lambda: not running(tmp_path / "b"))  # its trainings end with it
    assert subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL).returncode == 0
    assert undated(tmp_path / "b" / "small.csv") == rows


def wait(until, seconds=600):
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end
        time.sleep(0.02)


def running(folder: Path) -> bool:
    return subprocess.run(["pgrep", "-f", f"train_.*{folder}"], capture_output=True).returncode == 0


@pytest.fixture
def fake(tmp_path):
    """Make Jobs whose script does what it is told: finish, fail, or be interrupted once."""
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
        "print('went on' if '--resume' in sys.argv else 'done')\n"
    )

    def make(name, what="finish", needs=None):
        folder = tmp_path / name
        needs = tmp_path / needs if needs else None
        return tables.Job(str(script), [str(folder), what], folder, 1, needs, "")

    return make


def test_a_failure_stops_what_depends_on_it_alone(fake, capsys):
    jobs = [fake("t-1", "fail"), fake("a-1", needs="t-1"), fake("b-1"), fake("c-1", needs="b-1")]
    failed = tables.work(jobs, jobs, 2, 0)
    out = capsys.readouterr().out
    assert [job.folder.name for job in failed] == ["t-1", "a-1"]
    assert "failed: error: it broke" in out and "a-1: not run, its teacher failed" in out
    assert jobs[2].finished and jobs[3].finished and "min left" in out


def test_a_run_of_another_command_is_left_alone(fake, capsys):
    job = fake("a-1")
    job.folder.mkdir()
    (job.folder / "args.json").write_text('{"command": "train_kd.py --other"}')
    assert tables.work([job], [job], 1, 0) == [job]
    assert "made by another command: train_kd.py --other" in capsys.readouterr().out
    assert [p.name for p in job.folder.iterdir()] == ["args.json"]


def test_an_interrupted_run_goes_on_and_nothing_is_removed(fake, capsys):
    begun, bare = fake("a-1"), fake("b-1")
    for job in (begun, bare):
        job.folder.mkdir()
        (job.folder / "old").touch()
    (begun.folder / "checkpoint.pth.tar").touch()
    assert tables.work([begun, bare], [begun, bare], 1, 0) == []
    assert "went on" in capsys.readouterr().out
    assert (begun.folder / "old").exists() and (bare.folder / "old").exists()


def test_two_runs_on_one_table_share_its_trainings(fake, capsys, monkeypatch):
    """Each is trained once; nothing of the other's is removed, in its first epoch neither."""
    monkeypatch.setattr(tables, "AGAIN", 0.05)
    jobs = [fake(f"{name}-1", "slow") for name in "abc"]
    failed = []
    other = threading.Thread(target=lambda: failed.extend(tables.work(jobs, jobs, 1, 0)))
    other.start()
    wait(lambda: (jobs[0].folder / "begun").exists(), 60)
    (jobs[0].folder / "mine").touch()
    failed += tables.work(jobs, jobs, 1, 0)
    other.join()
    assert failed == [] and all(job.finished for job in jobs)
    assert [(job.folder / "begun").read_text() for job in jobs] == 3 * ["begun\n"]
    assert (jobs[0].folder / "mine").exists()
    assert "a-1: waits for another process, which trains there" in capsys.readouterr().out
    assert not list(jobs[0].folder.parent.glob("*.out"))


def test_the_other_run_was_killed(fake, monkeypatch):
    """What its training holds it holds as long as it lives, not as long as the table."""
    monkeypatch.setattr(tables, "AGAIN", 0.05)
    job = fake("a-1", "slow")
    process, file = tables.start(job, 0, 1, 0)
    file.close()  # as a killed process does
    with pytest.raises(locks.Held):
        tables.start(job, 0, 1, 0)
    assert tables.work([job], [job], 1, 0) == [] and process.wait() == 0
    assert (job.folder / "begun").read_text() == "begun\n"


def test_a_training_that_no_table_began_is_waited_for(fake, capsys, monkeypatch):
    monkeypatch.setattr(tables, "AGAIN", 0.05)
    job = fake("a-1")
    job.folder.mkdir()
    lock = locks.hold(job.folder / ".lock")
    lock.write("process 7 on host\n")
    lock.flush()
    (job.folder / "checkpoint.pth.tar").touch()
    threading.Timer(1, lock.close).start()
    began = time.monotonic()
    assert tables.work([job], [job], 1, 0) == [] and time.monotonic() - began > 0.9
    assert "waits for process 7 on host, which trains there" in capsys.readouterr().out


def test_a_folder_of_others_is_left_alone(tmp_path, capsys):
    folder = tmp_path / "kdzoo" / "digits-12px-2ep" / "base-resnet8-1"
    folder.mkdir(parents=True)
    (folder / "mine.txt").write_text("mine")
    argv = ["run", "small", *DIGITS, "--methods", "baseline", "--runs", str(tmp_path)]
    with pytest.raises(SystemExit) as stop:
        tables.main(argv)
    assert stop.value.code == 2 and "there is no run in" in capsys.readouterr().out
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]


def test_no_locks_on_a_file_system(fake, monkeypatch, capsys):
    def refuse(*args):
        raise OSError(tables.utils.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    job = fake("a-1")
    assert tables.work([job], [job], 1, 0) == []
    assert "no locks in" in capsys.readouterr().out


def test_a_damaged_result_is_written_again(fake):
    job = fake("a-1")
    job.folder.mkdir()
    for text in ("", "[1]", "{"):
        (job.folder / "result.json").write_text(text)
        assert not job.finished and tables.time_left([job], [job], 1) == ""
    (job.folder / "args.json").write_text("[1]")
    assert tables.work([job], [job], 1, 0) == [] and job.finished


def test_the_place_of_the_images_may_change():
    made = "train_base.py --net_name a --img_root /old place/x --epochs 2 --workers 3 --resume"
    flags = dict(img_root="/old place/x", workers=3, cuda=None)
    argv = ["--net_name", "a", "--img_root", "/new", "--epochs", "2"]
    now = " ".join(["train_base.py", *argv])
    plain = tables.without_place(now, dict(zip(argv, argv[1:])))
    assert tables.without_place(made, flags) == plain == "train_base.py --net_name a --epochs 2"


# --- data --------------------------------------------------------------------------------------------


def pictures(root, color=0):
    for split in ("train", "test"):
        for name in ("a", "b"):
            (root / split / name).mkdir(parents=True)
            for i in range(2):
                image = Image.new("RGB", (6, 6), (color, i, 0))
                image.save(root / split / name / f"{color}-{i}.png")
    return root


def test_two_image_folders_of_one_name_are_two_data_sets(tmp_path):
    """And a folder that was moved is one."""
    one, other = pictures(tmp_path / "one" / "imgs"), pictures(tmp_path / "other" / "imgs", 9)

    def name(root):
        argv = ["run", "small", "--data", "imagefolder", "--img_root", str(root), "--epochs", "2"]
        return tables.setting(tables.parse(argv), tables.TABLES["small"])

    names = name(one), name(other)
    assert names[0] != names[1] and names[0].startswith("imgs-") and names[0].endswith("-2ep")
    moved = shutil.copytree(one, tmp_path / "moved" / "imgs")
    assert name(moved) == names[0]
    (moved / "train" / "a" / "more.png").write_bytes((one / "train/a/0-0.png").read_bytes())
    assert name(moved) not in names


def test_another_imagenet_is_refused(tmp_path):
    one, other = pictures(tmp_path / "one"), pictures(tmp_path / "other", 9)
    folder = tmp_path / "runs" / "base-x-1"
    folder.mkdir(parents=True)
    data = tables.dataset.folder_identity(one, tables.dataset.VALIDATED)
    (folder / "args.json").write_text(json.dumps(dict(sources=dict(data=data))))
    tables.same_images(tmp_path / "runs", str(one))
    with pytest.raises(utils.UserError, match="holds runs of other images than those in"):
        tables.same_images(tmp_path / "runs", str(other))


# --- showing -----------------------------------------------------------------------------------------


def record(**what):
    common = dict(protocol="kdzoo", setting="cifar10-200ep", data="cifar10", teacher="resnet20")
    common |= dict(student="resnet20", mode="at", seed=1, epochs=200, last=92.0, best=93.0)
    return common | dict(seconds=10, added=0, precision="bf16") | what


def test_means_deviations_and_differences():
    records = [record(), record(seed=2, last=93.0, best=93.5, precision="fp32")]
    records += [record(mode="baseline", teacher="", last=91.0, best=92.0)]
    rows = tables.summarise("kdzoo-r20-r20", records)
    ours = {row["mode"]: row for row in rows if row["setting"] == "cifar10-200ep"}
    at = ours["at"]
    assert (at["last_mean"], at["last_std"], at["best_mean"]) == (92.5, 0.71, 93.25)
    assert (at["published"], at["reported"], at["difference"]) == ("92.89", "best", 0.36)
    assert (at["seeds"], at["precision"]) == (2, "bf16+fp32")
    assert ours["baseline"]["difference"] == -0.37 and ours["baseline"]["last_std"] == ""
    assert ours["st"]["published"] == "93.12" and ours["st"]["seeds"] == ""  # not run


def test_the_last_epoch_is_compared_with_a_published_last_one():
    setting = dict(protocol="crd", setting="cifar100-240ep", data="cifar100", epochs=240)
    what = record(**setting, teacher="resnet56", mode="st", last=70.0, best=71.0)
    row = next(r for r in tables.summarise("crd", [what]) if r["seeds"])
    assert (row["published"], row["reported"], row["difference"]) == ("70.66", "last", -0.66)


def test_a_source_that_does_not_say_its_epoch_is_compared_with_none():
    setting = dict(protocol="crd", setting="cifar100-240ep", data="cifar100", epochs=240)
    what = record(**setting, teacher="resnet32x4", student="resnet8x4", mode="simkd", last=78.0)
    row = next(r for r in tables.summarise("sota", [what]) if r["seeds"])
    assert (row["published"], row["reported"], row["difference"]) == ("78.08", "unknown", "")


def test_a_student_with_parts_of_the_teacher_stands_in_its_pair(tmp_path):
    folder = tmp_path / "kdzoo" / "digits-1ep" / "resnet20-resnet8" / "simkd-1"
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(dict(last=1.0, best=2.0, seconds=3.0)))
    args = dict(
        recipe=dict(data_name="digits", epochs=1, s_name="resnet8"),
        meta=dict(network="simkd:resnet8:64:64:2:8:8"),
        teacher=dict(network="resnet20"),
        machine="CPU",
        added=13_568,
    )
    (folder / "args.json").write_text(json.dumps(args))
    (found,) = tables.collect(tmp_path, "kdzoo")
    assert [found[key] for key in ("teacher", "student", "mode", "added")] == [
        "resnet20",
        "resnet8",
        "simkd",
        13_568,
    ]


@pytest.mark.parametrize(
    "other",
    [
        dict(setting="cifar10-100ep", epochs=100),
        dict(setting="digits-200ep", data="digits"),
        dict(setting="cifar10-64px-200ep"),
        dict(setting="cifar10-200ep-off"),
    ],
)
def test_other_settings_are_apart(other):
    rows = tables.summarise("kdzoo-r20-r20", [record(), record(**other, last=50.0)])
    ours = [row for row in rows if row["mode"] == "at" and row["seeds"]]
    assert sorted((row["seeds"], row["last_mean"]) for row in ours) == [(1, 50.0), (1, 92.0)]
    compared = [row["setting"] for row in ours if row["published"]]
    assert other["setting"] in compared or compared == ["cifar10-200ep"]
    if "epochs" in other:
        assert "not a published setting" in tables.markdown("kdzoo-r20-r20", rows)


@pytest.mark.parametrize("where, epochs", [("cifar10-64px-200ep", 200), ("cifar10-100ep", 100)])
def test_another_setting_hides_no_published_figure(where, epochs):
    """Nor has what was run elsewhere a place in the published block."""
    rows = tables.summarise("kdzoo-r20-r20", [record(setting=where, epochs=epochs)])
    home = [row for row in rows if (row["setting"], row["data"]) == ("published", "cifar10")]
    assert len(home) == 21 and not any(row["seeds"] for row in home)


def test_records_outlive_their_runs(tmp_path):
    path = tmp_path / "x.csv"
    tables.merge(path, [record(), record(seed=2, last=93.0)])
    again = tables.merge(path, [record(last=94.0)])
    assert [(r["seed"], r["last"]) for r in again] == [(1, 94.0), (2, 93.0)]


def test_into_a_page(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- tables.py show kdzoo-dml -->\nold\n<!-- end of the table -->\nb\n")
    argv = ["show", "kdzoo-dml", "--runs", str(tmp_path), "--into", str(page)]
    tables.main(argv)
    once = page.read_text()
    assert "94.45" in once and "old" not in once
    assert once.startswith("a\n<!--") and once.endswith("<!-- end of the table -->\nb\n")
    tables.main(argv)
    assert page.read_text() == once


@pytest.mark.parametrize("name", [p.stem for p in sorted((ROOT / "results/tables").glob("*.md"))])
def test_what_the_page_shows_is_made_of_the_records(name, tmp_path, capsys):
    """Neither the committed tables nor the README's are typed."""
    there = ROOT / "results" / "tables"
    shutil.copy(there / f"{name}.runs.csv", tmp_path)
    page = tmp_path / "page.md"
    shutil.copy(ROOT / "README.md", page)
    runs = ["--runs", str(tmp_path / "none")]
    tables.main(["show", name, *runs, "--out", str(tmp_path), "--into", str(page)])
    for file in (f"{name}.md", f"{name}.csv", f"{name}.runs.csv"):
        assert (tmp_path / file).read_text() == (there / file).read_text()
    assert page.read_text() == (ROOT / "README.md").read_text()


# --- bad input ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv, says",
    [
        ([], "the following arguments are required"),
        (["show"], "the following arguments are required: TABLE"),
        (["run", "crdd"], "invalid choice: 'crdd'"),
        (["run", "crd", "--methods", "att"], "no method 'att': did you mean at"),
        (["run", "crd", "--pairs", "resnet56-resnet21"], "did you mean resnet56-resnet20"),
        (["run", "tiny-imagenet"], "cannot be run"),
        (["run", "small"], "--data is needed"),
        (["run", "small", "--data", "imagefolder"], "needs --img_root DIR"),
        (["run", "small", "--data", "digit"], "digit"),
        (["run", "small", "--data", "digits", "--seeds", "0"], "of at least 1"),
        (["run", "small", "--data", "digits", "--teacher", "nowhere"], "nowhere"),
        (["run", "small", "--data", "imagefolder", "--img_root", "nowhere"], "nowhere"),
        (["show", "crd", "--seeds", "2"], "unknown flag --seeds"),
        (["show", "crd", "--into", "nowhere.md"], "nowhere.md has no place"),
    ],
)
def test_bad_input_is_one_line(argv, says, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "start", lambda *args: pytest.fail("a training was started"))
    runs = ["--runs", str(tmp_path / "runs")] if argv[1:] else []
    with pytest.raises(SystemExit) as error:
        tables.main([*argv, *runs])
    lines = capsys.readouterr().err.strip().splitlines()
    assert error.value.code == 2 and len(lines) == 1 and says in lines[0]
    assert not (tmp_path / "runs").exists()


def test_a_teacher_that_is_another_network(tmp_path, capsys):
    argv = ["--net_name", "resnet14", "--data_name", "digits", "--epochs", "1", "--note", "t"]
    teacher = train_base.main([*argv, "--save_root", str(tmp_path)])["dir"] + "/model_best.pth.tar"
    capsys.readouterr()
    with pytest.raises(SystemExit):
        tables.main(["run", "small", *DIGITS, "--teacher", teacher])
    assert "is a resnet14, the table wants resnet20" in capsys.readouterr().err


# --- records that are damaged, copied or edited ------------------------------------------------------


@pytest.fixture
def finished(tmp_path):
    """Make the folder of a finished run of resnet20 -> resnet8 in the table `small`."""
    home = tmp_path / "runs" / "kdzoo" / "digits-2ep"

    def make(name="st-1", result=None, args=None, last=50.0):
        mode, seed = name.rsplit("-", 1)
        base = mode.startswith("base-")
        folder = home / (name if base else f"resnet20-resnet8/{name}")
        folder.mkdir(parents=True)
        recipe = dict(data_name="digits", epochs=2, note=name, seed=int(seed), protocol="kdzoo")
        recipe |= dict(save_root=str(folder.parent), s_name=None)
        recipe |= {} if base else dict(kd_mode=mode)
        content = dict(recipe=recipe, meta=dict(network="resnet8"), machine="CPU, float32", added=0)
        content |= {} if base else dict(teacher=dict(network="resnet20"))
        score = dict(last=last, best=last + 1, seconds=3.0)
        for file, own, text in (("result", score, result), ("args", content, args)):
            value = json.dumps(own) if text is None else text
            data = value if isinstance(value, bytes) else value.encode()
            (folder / f"{file}.json").write_bytes(data)
        return folder

    return make


def show(tmp_path, *more) -> None:
    tables.main(["show", "small", "--runs", str(tmp_path / "runs"), *more])


def args_with(**changes) -> str:
    recipe = dict(data_name="digits", epochs=2) | changes.pop("recipe", {})
    args = dict(recipe=recipe, meta=dict(network="resnet8"), machine="CPU")
    return json.dumps(args | dict(teacher=dict(network="resnet20")) | changes)


RESULTS = {
    "": "result.json is damaged or cut short",
    '{"last": 1': "result.json is damaged or cut short",
    "[1, 2]": "result.json holds no object but [1, 2]",
    "null": "result.json holds no object",
    "{}": "its last is None, a number from 0 to 100 is wanted",
    '{"last": "50", "best": 50, "seconds": 1}': "its last is '50'",
    '{"last": 50, "best": NaN, "seconds": 1}': "its best is nan",
    '{"last": 50, "best": 50, "seconds": Infinity}': "its seconds is inf",
    '{"last": 50, "best": 50, "seconds": -1}': "its seconds is -1",
    '{"last": true, "best": 50, "seconds": 1}': "its last is True",
    '{"last": [50], "best": 50, "seconds": 1}': "its last is [50]",
    '{"last": 50, "best": 50, "seconds": 1, "peer_last": 3}': "its best is None",
    "9" * 5000: "result.json",
    "[" * 100_000: "result.json is damaged (nested too deep)",
    b"\xff\xfe{\x00": "result.json is no UTF-8",
    b"\x00" * 100: "result.json is damaged",
}
ARGS = {
    "": "args.json is damaged or cut short",
    "[]": "args.json holds no object",
    "{}": "args.json does not say its recipe",
    '{"recipe": [1]}': "args.json does not say its recipe data_name",
    args_with(meta=3): "args.json does not say its meta network",
    args_with(meta=dict(network=["x"])): "its student is ['x'], a name is wanted",
    args_with(meta=dict(network="x" * 999)): "its student is 'xxx",
    args_with(meta=dict(network="a\nb")): "its student is 'a\\nb'",
    args_with(meta=dict(network="\ud800")): "its student is",
    args_with(teacher=None): "args.json does not say its teacher network",
    args_with(teacher=dict(network="")): "its student is '', a name is wanted",
    args_with(recipe=dict(epochs="2")): "its epochs is '2', a whole number of at least 1",
    args_with(recipe=dict(epochs=2.5)): "its epochs is 2.5",
    args_with(recipe=dict(epochs=0)): "its epochs is 0",
    args_with(recipe=dict(data_name=None)): "its data is None",
    args_with(recipe=dict(s_name=dict(a=1))): "its student is {'a': 1}",
    args_with(recipe=dict(seed=5)): "args.json says its seed is 5: a copy?",
    args_with(recipe=dict(kd_mode="at")): "args.json says its kd_mode is 'at': a copy?",
    args_with(recipe=dict(protocol="crd")): "args.json says its protocol is 'crd': a copy?",
    args_with(recipe=dict(note="st-2")): "args.json says its note is 'st-2': a copy?",
    args_with(recipe=dict(save_root="runs/other")): "its save_root is 'runs/other': a copy?",
    args_with(added="many"): "its added is 'many'",
}


@pytest.mark.parametrize(
    "file, text, says",
    [("result", *x) for x in RESULTS.items()] + [("args", *x) for x in ARGS.items()],
    ids=lambda x: ascii(x)[:40],
)
def test_a_bad_folder_is_named_and_left_out(file, text, says, finished, tmp_path, capsys):
    finished("st-2", last=60.0)
    bad = finished(**{file: text})
    show(tmp_path)
    out, err = capsys.readouterr()
    assert "| st | 60.00 | 61.00 | 1 |" in out
    assert err.count("\n") == 1 and len(err) < 1000
    assert err.startswith(f"warning: {bad} is left out: ") and says in err


def copied(folder, finished):
    shutil.copytree(folder, folder.with_name("st-9"))
    return "st-9 is left out: args.json says its seed is 1: a copy?"


def named_by_hand(folder, finished):
    folder.rename(folder.with_name("st-1 (copy)"))
    return "its name is not METHOD-SEED"


def aside(folder, finished):
    shutil.copytree(folder, folder.parent / "old" / "st-1")
    return "its save_root is"


def twice(folder, finished):
    other = folder.parents[1] / "resnet20-resnet8-2" / "st-1"
    shutil.copytree(folder, other)
    args = json.loads((folder / "args.json").read_text())
    args["recipe"]["save_root"] = str(other.parent)
    (other / "args.json").write_text(json.dumps(args))
    return "is a copy of"


def outside(folder, finished):
    shutil.copytree(folder, folder.parents[2] / "st-1")
    return "it is in no folder of a setting"


def without_args(folder, finished):
    (folder / "args.json").unlink()
    return "args.json is missing, or no file"


def a_pipe(folder, finished):
    (folder / "result.json").unlink()
    os.mkfifo(folder / "result.json")
    return "result.json is missing, or no file"


def too_large(folder, finished):
    os.truncate(folder / "result.json", tables.FEW + 1)
    return "result.json is too large"


def odd_name(folder, finished):
    home = folder.parents[1]
    shutil.copytree(home, home.with_name("digits\n\udce4|"))
    return "digits\\n\\udce4|/resnet20-resnet8/st-1 is left out"


@pytest.mark.parametrize(
    "change",
    [copied, named_by_hand, aside, twice, outside, without_args, a_pipe, too_large, odd_name],
)
def test_a_folder_that_was_moved_or_copied(change, finished, tmp_path, capsys):
    """It is named, the others are shown; a copy is not counted as another seed."""
    says = change(finished(), finished)
    finished("kdsvd-2", last=60.0)
    show(tmp_path)
    out, err = capsys.readouterr()
    assert err.startswith("warning: ") and err.count("\n") == 1
    assert says in err and "| kdsvd | 60.00 | 61.00 | 1 |" in out and "| 2 |" not in out


def test_a_byte_order_mark_is_none_of_our_business(finished, tmp_path, capsys):
    folder = finished()
    for name in ("result.json", "args.json"):
        (folder / name).write_bytes(b"\xef\xbb\xbf" + (folder / name).read_bytes())
    show(tmp_path)
    out, err = capsys.readouterr()
    assert "| st | 50.00 | 51.00 | 1 |" in out and err == ""


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read(finished, tmp_path, capsys):
    finished("st-2", last=60.0)
    folder = finished()
    folder.chmod(0)
    show(tmp_path)
    folder.chmod(0o700)
    out, err = capsys.readouterr()
    assert "| st | 60.00" in out and "Permission denied" in err


def test_an_unreadable_folder_is_said(finished, tmp_path, capsys, monkeypatch):
    finished("st-2", last=60.0)
    bad = finished("at-1")
    walk = os.walk

    def refuse(where, onerror):
        for found in walk(where):
            if str(bad) == found[0]:
                onerror(PermissionError(13, "Permission denied", found[0]))
            else:
                yield found

    monkeypatch.setattr(os, "walk", refuse)
    show(tmp_path)
    out, err = capsys.readouterr()
    assert "| st | 60.00" in out and err == f"warning: {bad} is left out: Permission denied\n"


def test_a_table_of_one_row_is_shown(finished, tmp_path, capsys):
    finished("base-resnet8-1", last=40.0)
    show(tmp_path, "--out", str(tmp_path / "out"))
    assert "| baseline | 40.00 | 41.00 | 1 |" in capsys.readouterr().out
    assert (tmp_path / "out" / "small.png").stat().st_size > 5_000


def test_epochs_of_one_setting_are_not_in_one_mean():
    records = [record(), record(seed=2, epochs=100, last=50.0)]
    rows = [r for r in tables.summarise("kdzoo-r20-r20", records) if r["seeds"]]
    assert sorted((row["epochs"], row["last_mean"]) for row in rows) == [(100, 50.0), (200, 92.0)]


# --- the remembered records, edited ------------------------------------------------------------------

HEAD = tables.RECORD.replace(" ", ",")
ROW = "kdzoo,digits-2ep,digits,resnet20,resnet8,at,1,2,70.5,71.0,3,0,fp32"


@pytest.mark.parametrize(
    "text, last",
    [
        (f"{HEAD}\n{ROW}\n", "70.5"),
        (f"\ufeff{HEAD}\r\n{ROW}\r\n", "70.5"),
        (
            f"{HEAD};comment\n{ROW};mine".replace(".", "*").replace(",", ";").replace("*", ","),
            "70.5",
        ),
        (f"{HEAD}\n{ROW}\n".replace(",", "\t"), "70.5"),
        (f"{HEAD},,\n{ROW},,\n,,,,\n\n", "70.5"),
        (f"{HEAD},comment\n{ROW}\n", "70.5"),
        (f"{HEAD}\n{ROW}\n".replace("70.5", "70"), "70"),
        (f"{HEAD}\n{ROW}\n".replace(",1,2,", ",1.0,2.0,"), "70.5"),
    ],
)
def test_records_that_a_spreadsheet_saved(text, last, finished, tmp_path, capsys):
    finished()
    out = tmp_path / "out"
    out.mkdir()
    path = out / "small.runs.csv"
    path.write_text(text, encoding="utf-8", newline="")
    show(tmp_path, "--out", str(out))
    shown, err = capsys.readouterr()
    assert f"| at | {float(last):.2f} | 71.00 | 1 |" in shown and "| st | 50.00" in shown
    assert err == ""
    extra = "comment" in text
    lines = path.read_text().splitlines()
    assert lines[0] == HEAD + ",comment" * extra and len(lines) == 3
    assert lines[1] == ROW.replace("70.5", last) + extra * ",mine" * ("mine" in text) + (
        "," if extra and "mine" not in text else ""
    )


@pytest.mark.parametrize(
    "text, says",
    [
        ("", "there is no column protocol, setting"),
        (f"{HEAD}\n{ROW}".replace("last,", ""), "there is no column last"),
        (f"{HEAD}\n{ROW}\n{ROW}".replace("70.5", "many"), "line 2: its last is 'many', a number"),
        (f"{HEAD}\n{ROW}".replace("70.5", "705"), "line 2: its last is 705"),
        (f"{HEAD}\n{ROW}".replace("70.5", "nan"), "line 2: its last is 'nan'"),
        (f"{HEAD}\n{ROW}".replace("70.5", ""), "line 2: its last is ''"),
        (f"{HEAD}\n{ROW}".replace(",1,2,", ",one,2,"), "line 2: its seed is 'one'"),
        (f"{HEAD}\n{ROW}".replace(",1,2,", ",1.5,2,"), "line 2: its seed is 1.5"),
        (f"{HEAD}\n{ROW}".replace(",1,2,", f",{'9' * 5000},2,"), "line 2: its seed is '999"),
        (f"{HEAD}\n{ROW}".replace("resnet8", ""), "line 2: its student is ''"),
        (f"{HEAD}\n{ROW}\n\nkdzoo,x\n", "line 4: its data is ''"),
        (f"{HEAD}\n{ROW},more\n", "line 2: 14 cells, 13 columns"),
        (f"{HEAD},last\n{ROW},3\n", "two columns have one name"),
        (f'{HEAD}\n"kdzoo,x', "unexpected end of data"),
        (f'{HEAD}\n{ROW}\n"{"x" * 200_000}"', "field larger than field limit"),
        (f"{HEAD}\n{ROW}".encode("utf-16"), "is no UTF-8"),
        (b"\xe4" + f"{HEAD}\n{ROW}".encode(), "is no UTF-8"),
    ],
    ids=lambda x: ascii(x)[-30:],
)
@pytest.mark.parametrize("command", ["show", "run"])
def test_records_that_cannot_be_read_are_left(command, text, says, tmp_path, capsys, monkeypatch):
    """One line, before anything is trained, and the file is as it was: what it remembers may be
    nowhere else."""
    monkeypatch.setattr(tables, "start", lambda *_: pytest.fail("a training was started"))
    monkeypatch.setattr(tables, "check", lambda _: None)
    path = tmp_path / "small.runs.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    before = path.read_bytes()
    more = [*DIGITS, "--methods", "baseline"] if command == "run" else []
    with pytest.raises(SystemExit) as stop:
        where = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path)]
        tables.main([command, "small", *where, *more])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and says in err and len(err) < 1000
    assert path.read_bytes() == before and sorted(tmp_path.iterdir()) == [path]


# --- places ------------------------------------------------------------------------------------------

LONG = "x" * 300


@pytest.mark.parametrize("command", ["show", "run"])
@pytest.mark.parametrize(
    "argv, says",
    [
        (["--out", "{file}"], "--out {file}: {file} is a file, a folder is wanted"),
        (["--out", "{file}/x"], "{file} is a file"),
        (["--out", "{link}"], "{link} is a file"),
        (["--out", "{tmp}/" + LONG], "File name too long"),
        (["--out", "a\0b"], "--out: a name is wanted"),
        (["--out", ""], "--out: a name is wanted"),
        (["--out", "/proc/none"], "cannot be written"),
        (["--out", "{taken}"], "small.md is a folder"),
        (["--runs", "{file}"], "--runs {file}: {file} is a file, a folder is wanted"),
        (["--runs", "{file}/x"], "{file} is a file"),
        (["--runs", "{tmp}/" + LONG], "File name too long"),
        (["--runs", "a\0b"], "--runs: a name is wanted"),
        (["--into", "{tmp}/none.md"], "none.md has no place for the table"),
        (["--into", "{file}"], "has no place for the table"),
        (["--into", "{tmp}"], "has no place for the table"),
        (["--into", "{latin}"], "has no place for the table"),
        (["--into", "{tmp}/" + LONG], "has no place for the table"),
        (["--into", "a\0b"], "--into: a name is wanted"),
    ],
)
def test_a_bad_place_is_found_before_anything_is_trained(
    command, argv, says, finished, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(tables, "start", lambda *_: pytest.fail("a training was started"))
    finished()
    names = dict(tmp=tmp_path, file=tmp_path / "file", link=tmp_path / "link")
    names |= dict(taken=tmp_path / "taken", latin=tmp_path / "latin.md")
    names["file"].write_text("mine")
    names["link"].symlink_to("gone")
    (names["taken"] / "small.md").mkdir(parents=True)
    names["latin"].write_bytes(b"\xe4 <!-- tables.py show small --> <!-- end of the table -->")
    before = sorted(tmp_path.rglob("*"))
    own = [] if "--runs" in argv else ["--runs", str(tmp_path / "runs")]
    more = [*DIGITS, "--methods", "baseline"] if command == "run" else []
    with pytest.raises(SystemExit) as stop:
        tables.main([command, "small", *own, *more, *(x.format(**names) for x in argv)])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and err.startswith("error: ")
    assert says.format(**names) in err and len(err) < 1000
    assert sorted(tmp_path.rglob("*")) == before and names["file"].read_text() == "mine"


def test_a_page_keeps_its_line_ends(finished, tmp_path, capsys):
    finished()
    page = tmp_path / "page.md"
    marks = "<!-- tables.py show small -->\r\n<!-- end of the table -->"
    page.write_bytes(f"\ufeffa\r\n{marks}\r\nb\r\n".encode())
    show(tmp_path, "--into", str(page))
    data = page.read_bytes()
    assert data.startswith(b"\xef\xbb\xbfa\r\n<!--") and data.endswith(b"-->\r\nb\r\n")
    assert b"| st | 50.00" in data


def test_a_full_disk_keeps_the_records(finished, tmp_path, capsys, monkeypatch):
    finished()
    path = tmp_path / "small.runs.csv"
    path.write_text(f"{HEAD}\n{ROW}\n")

    def full(number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SystemExit) as stop:
        show(tmp_path, "--out", str(tmp_path))
    assert stop.value.code == 2 and "No space left on device" in capsys.readouterr().err
    assert path.read_text() == f"{HEAD}\n{ROW}\n"


@pytest.mark.parametrize("backend", ["nonsense", "module://nonsense", "TkAgg", ""])
def test_a_window_system_that_is_not_there(backend, tmp_path):
    code = "import sys, engine.run as run; sys.exit(not run.import_matplotlib())"
    env = dict(os.environ, MPLBACKEND=backend)
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env).returncode == 0


# --- at random ---------------------------------------------------------------------------------------

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(0, 3)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["resnet8", "resnet20", "digits", "st", "CPU", "st-1", "10" * 200]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=6,
)
CELLS = st.text(max_size=6) | st.sampled_from(
    [*ROW.split(","), *HEAD.split(","), "70,5", "1e3", "1e999", "-1", "nan", '"', '""', "\r", "\n"]
)


@st.composite
def changed(draw, good: dict):
    """The bytes of an object with some of its values replaced or removed, then perhaps cut or flipped."""
    value = json.loads(json.dumps(good))
    for _ in range(draw(st.integers(0, 2))):
        part = value
        inner = [part, *(x for x in part.values() if isinstance(x, dict))]
        part = draw(st.sampled_from(inner))
        key = draw(st.sampled_from([*part, "more"]))
        part[key] = draw(VALUES)
        if draw(st.booleans()) and draw(st.booleans()):
            del part[key]
    return draw(spoilt(json.dumps(value).encode()))


@st.composite
def spoilt(draw, good: bytes):
    data = bytearray(good)
    if draw(st.integers(0, 2)) == 0:
        for _ in range(draw(st.integers(0, 3))):
            if data:
                data[draw(st.integers(0, len(data) - 1))] ^= draw(st.integers(1, 255))
        data = data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) else data
        data = draw(st.sampled_from([b"", b"\xef\xbb\xbf", b"\xff\xfe", b"\x00"])) + bytes(data)
    return bytes(data)


@st.composite
def sheets(draw):
    cut = draw(st.sampled_from([",", ";", "\t", "|"]))
    rows = [HEAD.split(","), *draw(st.lists(st.just(ROW.split(",")), min_size=1, max_size=3))]
    rows = [list(row) for row in rows]
    for _ in range(draw(st.integers(0, 2))):
        row = draw(st.sampled_from(rows))
        place = draw(st.integers(0, len(row)))
        row[place : place + draw(st.integers(0, 1))] = draw(st.lists(CELLS, max_size=2))
    end = draw(st.sampled_from(["\n", "\r\n", "\r"]))
    text = end.join(cut.join(row) for row in rows)
    return draw(spoilt(text.encode("utf-8", "surrogatepass")))


def test_random_files(finished, tmp_path, capsys, monkeypatch, request):
    """`show` never ends in a traceback, whatever the files hold that it reads: it shows, or it says what
    is wrong in a line. With --slow, 2000 of them."""
    finished("at-2", last=60.0)
    bad = finished()
    result, args = (json.loads((bad / f"{x}.json").read_text()) for x in ("result", "args"))
    out, shown = tmp_path / "out", []
    monkeypatch.setattr(tables, "draw", lambda *_: None)
    monkeypatch.setattr(os, "fsync", lambda _: None)

    @settings(
        max_examples=2000 if request.config.getoption("--slow") else 200,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(changed(result), changed(args), st.none() | sheets())
    def check(result, args, sheet):
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        (bad / "result.json").write_bytes(result)
        (bad / "args.json").write_bytes(args)
        path = out / "small.runs.csv"
        if sheet is not None:
            path.write_bytes(sheet)
        try:
            show(tmp_path, "--out", str(out))
        except SystemExit as stop:
            err = capsys.readouterr().err
            assert stop.code == 2 and sheet is not None and path.read_bytes() == sheet
            assert err.count("error: ") == 1
            return
        text, err = capsys.readouterr()
        assert "| at | 60.00 | 61.00 |" in text or sheet is not None
        assert err.count("\n") <= 1 and len(err) < 1000
        shown.append(err == "")
        tables.remembered(path)  # what it writes it can read

    check()
    assert 0.05 < sum(shown) / len(shown) < 0.95  # both kinds are there
