"""The commands that pages show with their output: found, run in a folder of their own, compared.

    $ python train_base.py --net_name resnet8 --data_name digits --epochs 1
    ...
    last 45.60  best 45.60 (row 2, chosen on the test set)  6 s  runs/teacher

in a block of a page means: the command is run from the root of the repository, and its output has
these lines. `...` stands for any number of lines, and any number equals any other. A page's
commands are run in order, in one folder; what they write is there for the next ones.

    python tests/page_commands.py docs/evaluate.md      # write the page with today's output
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "    $ "


def blocks(text: str) -> list[tuple[str, list[str]]]:
    """[(command, the lines of output below it)] of a page."""
    found = []
    for line in text.replace("\\\n", "").splitlines():
        if line.startswith(PROMPT):
            found.append((line.removeprefix(PROMPT).split("  #")[0].strip(), []))
            inside = True
        elif found and inside and line.startswith("    "):
            found[-1][1].append(line[4:])
        else:
            inside = False
    return found


def workplace(folder: Path) -> Path:
    """A folder that has what the repository's root has, by links, and where runs may be written."""
    for path in ROOT.iterdir():
        if path.name not in ("runs", "datasets", "results", ".git"):
            (folder / path.name).symlink_to(path)
    (folder / "results").mkdir()
    shutil.copytree(ROOT / "results/tables", folder / "results/tables")  # commands write there
    return folder


def execute(command: str, folder: Path) -> subprocess.CompletedProcess:
    """Run a command in the folder. `python` is this Python."""
    words = re.sub(r"^python ", f"{sys.executable} ", command)
    env = os.environ | dict(CUDA_VISIBLE_DEVICES="", COLUMNS="100")
    return subprocess.run(
        ["bash", "-c", words], cwd=folder, env=env, capture_output=True, text=True, timeout=600
    )


def run(command: str, folder: Path) -> list[str]:
    """The lines that a command prints, as on a terminal."""
    done = execute(command, folder)
    return (done.stdout + done.stderr).rstrip("\n").split("\n")


def without_numbers(line: str) -> str:
    """The words of a line: every number is one, and of spaces it matters only if they are."""
    line = re.sub(r"\d[\d,]*(\.\d+)?(e[-+]\d+)?", "0", line)
    return " ".join(line.split())


def agree(shown: list[str], printed: list[str]) -> bool:
    """Whether the printed lines are the shown ones, `...` being any lines."""
    parts, printed = [[]], [without_numbers(x) for x in printed]
    for line in shown:
        if line.strip() == "...":
            parts.append([])
        else:
            parts[-1].append(without_numbers(line))
    pattern = [re.escape("\n".join(part) + "\n") if part else "" for part in parts]
    return re.fullmatch("(?:.*\n)*".join(pattern), "\n".join([*printed, ""])) is not None


def fill(shown: list[str], printed: list[str]) -> list[str]:
    """The shown lines as they were printed this time: their numbers are this run's."""
    if not agree(shown, printed):
        return printed
    found, at = [], 0
    for k, line in enumerate(shown):
        if line.strip() == "...":
            found.append(line)
            rest = shown[k + 1 :]
            if "..." not in [x.strip() for x in rest]:
                at = len(printed) - len(rest)  # what follows the last dots is the end
        else:
            while without_numbers(printed[at]) != without_numbers(line):
                at += 1
            found.append(printed[at])
            at += 1
    return found


def main(path: Path) -> None:
    """Write the page with the output that its commands print now, but where `...` says less."""
    text = path.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        workplace(Path(folder))
        for command, shown in blocks(text):
            lines = fill(shown, run(command, Path(folder)))
            old, new = (
                "\n".join([PROMPT + command, *("    " + x for x in part)])
                for part in (shown, lines)
            )
            assert text.count(old) == 1, f"{command}: not found as one line"
            text = text.replace(old, new)
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
