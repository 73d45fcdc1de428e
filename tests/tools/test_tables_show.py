import csv
import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from finished_runs import finished_run, record, show

from kd_losses import METHODS
from tools import tables, tables_plan, tables_runs, tables_show

ROOT = Path(__file__).parents[2]


@pytest.fixture
def finished(tmp_path):
    """Make the folder of a finished run of resnet20 -> resnet8 in the table `small`."""
    return partial(finished_run, tmp_path)


def test_runs_with_a_validation_set_are_marked_and_in_a_separate_mean(finished, tmp_path, capsys):
    finished("st-1", last=60.0)
    chosen = dict(last=40.0, best=42.0, seconds=3.0, chosen_on="val", val_best=50.0)
    finished("st-2", result=json.dumps(chosen))
    show(tmp_path, "--out", str(tmp_path))
    out = capsys.readouterr().out
    assert "| st | 60.00 | 61.00 | 1 |" in out and "| st | 40.00 | 42.00 | 1 |" in out
    assert "digits-2ep (best chosen on a validation set)" in out
    show(tmp_path, "--out", str(tmp_path))
    assert capsys.readouterr().out == out, "from the file of records"
    records = [record(setting=f"cifar10-200ep{x}") for x in ("", tables_runs.VALIDATED)]
    rows = tables_show.summarise("kdzoo-r20-r20", records)
    rows = [row for row in rows if row["seeds"] and row["mode"] == "at"]
    assert [row["difference"] != "" for row in rows] == [True, False]


# --- published figures ----------------------------------------------------------------------------


def test_the_newer_methods_have_their_budget(tmp_path, capsys):
    """Rows without a mode here, or with a network that is not available, are shown but not run."""
    rows = {r["method"]: r for r in tables_plan.figures_of("sota") if r["student"] == "resnet8x4"}
    spend = {method for method, row in rows.items() if row["budget"]}
    assert spend == set(tables_plan.BUDGET) and rows["MLKD"]["budget"].startswith(
        "480 epochs, 2 views"
    )
    shown = "NORM", "DKD+LS", "SDD (StreamLined's rerun)"
    assert not any(rows[method]["mode"] for method in shown)
    run = tables_plan.rows_of("sota", "cifar100", None, None)
    assert {mode for *_, mode in run} < {"baseline", *METHODS}
    assert "ShuffleNetV2_1.5" not in {s for _, s, _ in run}
    tables.main(["show", "sota", "--runs", str(tmp_path)])
    out = capsys.readouterr().out
    assert "| MLKD | 77.08 | best | 480 epochs, 2 views" in out
    assert "| SimKD | 78.08 | unknown | deploys projector" in out
    assert "resnet32x4 -> ShuffleNetV2_1.5" in out


@pytest.mark.slow
@pytest.mark.parametrize("name", tables_plan.TABLES)
def test_show_prints_every_published_figure(name, tmp_path, capsys):
    figures = tables_plan.figures_of(name)
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


# --- our figures next to them ---------------------------------------------------------------------


def test_means_deviations_and_differences():
    records = [record(), record(seed=2, last=93.0, best=93.5, precision="fp32")]
    records += [record(mode="baseline", teacher="", last=91.0, best=92.0)]
    rows = tables_show.summarise("kdzoo-r20-r20", records)
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
    row = next(r for r in tables_show.summarise("crd", [what]) if r["seeds"])
    assert (row["published"], row["reported"], row["difference"]) == ("70.66", "last", -0.66)


def test_a_source_that_does_not_say_its_epoch_is_compared_with_none():
    setting = dict(protocol="crd", setting="cifar100-240ep", data="cifar100", epochs=240)
    what = record(**setting, teacher="resnet32x4", student="resnet8x4", mode="simkd", last=78.0)
    row = next(r for r in tables_show.summarise("sota", [what]) if r["seeds"])
    assert (row["published"], row["reported"], row["difference"]) == ("78.08", "unknown", "")


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
    rows = tables_show.summarise("kdzoo-r20-r20", [record(), record(**other, last=50.0)])
    ours = [row for row in rows if row["mode"] == "at" and row["seeds"]]
    assert sorted((row["seeds"], row["last_mean"]) for row in ours) == [(1, 50.0), (1, 92.0)]
    compared = [row["setting"] for row in ours if row["published"]]
    assert other["setting"] in compared or compared == ["cifar10-200ep"]
    if "epochs" in other:
        assert "not a published setting" in tables_show.markdown("kdzoo-r20-r20", rows)


@pytest.mark.parametrize("where, epochs", [("cifar10-64px-200ep", 200), ("cifar10-100ep", 100)])
def test_another_setting_hides_no_published_figure(where, epochs):
    """And the published block has no runs with another setting."""
    rows = tables_show.summarise("kdzoo-r20-r20", [record(setting=where, epochs=epochs)])
    home = [row for row in rows if (row["setting"], row["data"]) == ("published", "cifar10")]
    assert len(home) == 21 and not any(row["seeds"] for row in home)


def test_epochs_of_one_setting_are_not_in_one_mean():
    records = [record(), record(seed=2, epochs=100, last=50.0)]
    rows = [r for r in tables_show.summarise("kdzoo-r20-r20", records) if r["seeds"]]
    assert sorted((row["epochs"], row["last_mean"]) for row in rows) == [(100, 50.0), (200, 92.0)]


def test_a_table_of_one_row_is_shown(finished, tmp_path, capsys):
    finished("base-resnet8-1", last=40.0)
    show(tmp_path, "--out", str(tmp_path / "out"))
    assert "| baseline | 40.00 | 41.00 | 1 |" in capsys.readouterr().out
    assert (tmp_path / "out" / "small.png").stat().st_size > 5_000


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["nonsense", "module://nonsense", "TkAgg", ""])
def test_a_window_system_that_is_not_there(backend, tmp_path):
    code = "import sys, engine.run as run; sys.exit(not run.import_matplotlib())"
    env = dict(os.environ, MPLBACKEND=backend)
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env).returncode == 0


# --- pages ----------------------------------------------------------------------------------------


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
    """The committed tables and those in README.md are generated."""
    there = ROOT / "results" / "tables"
    shutil.copy(there / f"{name}.runs.csv", tmp_path)
    page = tmp_path / "page.md"
    shutil.copy(ROOT / "README.md", page)
    runs = ["--runs", str(tmp_path / "none")]
    tables.main(["show", name, *runs, "--out", str(tmp_path), "--into", str(page)])
    for file in (f"{name}.md", f"{name}.csv", f"{name}.runs.csv"):
        assert (tmp_path / file).read_text() == (there / file).read_text()
    assert page.read_text() == (ROOT / "README.md").read_text()


def test_a_page_keeps_its_line_ends(finished, tmp_path, capsys):
    finished()
    page = tmp_path / "page.md"
    marks = "<!-- tables.py show small -->\r\n<!-- end of the table -->"
    page.write_bytes(f"\ufeffa\r\n{marks}\r\nb\r\n".encode())
    show(tmp_path, "--into", str(page))
    data = page.read_bytes()
    assert data.startswith(b"\xef\xbb\xbfa\r\n<!--") and data.endswith(b"-->\r\nb\r\n")
    assert b"| st | 50.00" in data
