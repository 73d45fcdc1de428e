"""The examples run, and what the notebook shows is what it printed."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import page_commands
import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "examples/quickstart.ipynb"


def outputs(notebook: dict) -> str:
    """The text that the cells printed."""
    shown = (out for cell in cells(notebook) for out in cell["outputs"])
    return "".join("".join(out.get("text", "")) for out in shown)


def cells(notebook: dict) -> list[dict]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def table(text: str) -> dict[str, float]:
    """{run: last accuracy} of the table at the end of the notebook."""
    rows = text.split(f"{'run':<10} {'last':>7} {'best':>7}")[1].splitlines()
    return {row.split()[0]: float(row.split()[1]) for row in rows if row.strip()}


def test_the_loop_runs_with_two_copied_files(tmp_path):
    for name in ("examples/own_loop.py", "kd_losses/at.py", "kd_losses/dkd.py"):
        shutil.copy(ROOT / name, tmp_path)
    done = subprocess.run(
        [sys.executable, "own_loop.py"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = re.findall(r"^(\w+) +loss ([\d.]+)  test accuracy ([\d.]+) %$", done.stdout, re.M)
    assert [name for name, *_ in found] == ["teacher", "baseline", "distilled"]
    assert all(float(loss) < 3 and float(accuracy) > 50 for _, loss, accuracy in found)


def test_the_notebook_was_executed_in_order():
    text = NOTEBOOK.read_text(encoding="utf-8")
    notebook = json.loads(text)
    counts = [cell["execution_count"] for cell in cells(notebook)]
    assert counts == list(range(1, len(counts) + 1)) and len(counts) >= 8
    kinds = [out["output_type"] for cell in cells(notebook) for out in cell["outputs"]]
    figures = [
        out for cell in cells(notebook) for out in cell["outputs"] if "image/png" in str(out)
    ]
    assert "error" not in kinds and len(figures) == 2
    assert not re.search(r"/(home|root|tmp|work|usr)/", text)
    assert len(text) < 600_000
    assert set(table(outputs(notebook))) == {"teacher", "none", "st", "at", "dkd"}


@pytest.mark.slow
def test_the_notebook_executes(tmp_path, monkeypatch):
    pytest.importorskip("nbclient")
    monkeypatch.syspath_prepend(ROOT / "examples")
    import execute

    folder = page_commands.workplace(tmp_path)
    execute.execute(tmp_path / "out.ipynb", folder)
    notebook = json.loads((tmp_path / "out.ipynb").read_text(encoding="utf-8"))
    found = table(outputs(notebook))
    assert all(accuracy > 80 for accuracy in found.values()), found
