"""Commands of the pages: every flag that they give is there."""

import shlex
from pathlib import Path

import pytest

import train_base
from engine import kd_cli
from tools import eval as evaluation
from tools import export

PAGE = Path(__file__).parent.parent / "docs" / "bring_your_own.md"
PARSERS = {
    "train_kd.py": lambda argv: kd_cli.parse(argv, ""),
    "train_base.py": train_base.parse,
    "tools/eval.py": evaluation.parse,
    "tools/export.py": export.parse,
}
COMMANDS = [
    line.strip().removeprefix("python ")
    for line in PAGE.read_text(encoding="utf-8").splitlines()
    if line.startswith("    python ")
]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_can_be_parsed(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "classes.txt").write_text("tabby\ngolden retriever\nred fox\n")
    script, *argv = shlex.split(command)
    PARSERS[script](argv)


def test_there_are_commands():
    assert len(COMMANDS) > 8 and {shlex.split(x)[0] for x in COMMANDS} == set(PARSERS)
