"""Commands of the pages: each script is there, and each flag that they give."""

import re
import shlex
from pathlib import Path

import pytest

import train_base
from detection import train_det
from engine import kd_cli
from tools import bench, export, gpu_check, pack, plot, tables
from tools import eval as evaluation
from utils import UserError

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PARSERS = {
    "train_kd.py": lambda argv: [
        kd_cli.parse(own, "") for own in kd_cli.command_lines(argv).values()
    ],
    "train_base.py": train_base.parse,
    "detection/train_det.py": train_det.parse,
    "tools/eval.py": evaluation.parse,
    "tools/export.py": export.parse,
    "tools/plot.py": plot.parse,
    "tools/tables.py": tables.parse,
    "tools/bench.py": bench.parse,
    "tools/gpu_check.py": gpu_check.parse,
    "tools/pack.py": pack.parse,
}
ALONE = {"tools/demo.py"}


def commands(page: Path) -> list[str]:
    """The indented lines of a page that start a script, comments left out."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    found = re.findall(r"^    (?:python|torchrun(?: --\w+ \S+)*) (\S+\.py.*)$", text, re.M)
    return [re.sub(r"\s+# .*", "", line).strip() for line in found]


CASES = [(page.name, line) for page in PAGES for line in commands(page)]


@pytest.mark.parametrize("page, command", CASES, ids=[f"{p}: {c[:60]}" for p, c in CASES])
def test_a_command_can_be_parsed(page, command, tmp_path, monkeypatch):
    script, *argv = shlex.split(command)
    assert (ROOT / script).exists()
    if script in ALONE:
        return
    monkeypatch.chdir(tmp_path)
    (tmp_path / "classes.txt").write_text("tabby\ngolden retriever\nred fox\n")
    shortened = "..." in argv
    argv = without_dots(argv)
    if shortened and "--kd_mode" not in command and script.startswith("train_kd"):
        argv = ["--kd_mode", "at", *argv]
    try:
        PARSERS[script](argv)
    except SystemExit as stop:
        assert {"-h", "--help"} & set(argv) and stop.code == 0
    except UserError as error:  # what the dots stand for
        assert shortened and "required" in str(error), error


def without_dots(argv: list[str]) -> list[str]:
    """`...` is a flag's value, or stands for more flags."""
    return [
        x
        for before, x in zip(["", *argv], argv)
        if x != "..." or (before.startswith("--") and "=" not in before)
    ]


def test_there_are_commands():
    scripts = {shlex.split(command)[0] for _, command in CASES}
    assert len(CASES) > 45 and scripts <= set(PARSERS) | ALONE
    assert {"train_kd.py", "train_base.py", "tools/tables.py", "detection/train_det.py"} <= scripts
