import csv
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import train_base
import train_kd
import utils
from engine import cli, published
from kd_losses import METHODS
from tools import tables

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


def test_an_interrupted_run_goes_on_or_starts_afresh(fake, capsys):
    begun, bare = fake("a-1"), fake("b-1")
    for job in (begun, bare):
        job.folder.mkdir()
        (job.folder / "old").touch()
    (begun.folder / "checkpoint.pth.tar").touch()
    assert tables.work([begun, bare], [begun, bare], 1, 0) == []
    assert "went on" in capsys.readouterr().out
    assert (begun.folder / "old").exists() and not (bare.folder / "old").exists()


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
