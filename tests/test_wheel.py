"""`pip install .`: the package kd_losses alone, used from somebody else's code."""

import os
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from importlib import metadata
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]

# what another program does, from another folder: nothing of this repository is on its path
USE = """
import inspect, pathlib, pkgutil, sys
from importlib import import_module
sys.path.insert(0, sys.argv[1])
import torch
import torch.nn.functional
before = set(sys.modules)
import kd_losses
from kd_losses import DKD, METHODS
assert pathlib.Path(kd_losses.__file__).parent == pathlib.Path(sys.argv[1]) / "kd_losses"
found = []
for info in pkgutil.iter_modules(kd_losses.__path__):
    module = import_module(f"kd_losses.{info.name}")
    for name, value in vars(module).items():
        own = inspect.isclass(value) and value.__module__ == module.__name__
        if own and issubclass(value, torch.nn.Module) and "_" not in (name[0], info.name[0]):
            assert getattr(kd_losses, name) is value, f"from kd_losses import {name}"
            found.append(name)
loss = DKD(1.0, 8.0, 4.0)(torch.randn(4, 10), torch.randn(4, 10), torch.arange(4))
assert loss.isfinite()
others = {name.split(".")[0] for name in set(sys.modules) - before}
others -= {*sys.stdlib_module_names, "torch", "kd_losses"}
print(len(METHODS), len(found), sorted(others))
"""


def built(folder: Path) -> Path:
    """The wheel, built from a copy: a build leaves folders next to its sources."""
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    leave_out = shutil.ignore_patterns("__pycache__")
    for name in ("kd_losses", "engine", "tools"):  # the last two are to be left out
        shutil.copytree(ROOT / name, source / name, ignore=leave_out)
    for name in ("utils.py", "dataset.py", "network.py", "train_kd.py"):
        shutil.copy(ROOT / name, source)
    flags = ["--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    run([*PIP, "wheel", *flags, str(source)], folder)
    (wheel,) = folder.glob("*.whl")
    return wheel


def run(command: list[str], folder: Path) -> str:
    """What a command prints, run in another folder and without this repository on its path."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_losses_alone(tmp_path):
    try:
        version = metadata.version("setuptools")
    except metadata.PackageNotFoundError:
        version = "0 (none)"
    if int(version.split(".")[0]) < 77:
        pytest.skip(f"needs setuptools 77 or later to build, here is {version}")
    wheel = built(tmp_path)
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
        (about,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        text = Parser().parsestr(archive.read(about).decode())
    own = sorted(f"kd_losses/{path.name}" for path in (ROOT / "kd_losses").glob("*.py"))
    assert sorted(names) == own
    needs = [x.partition(">")[0] for x in text.get_all("Requires-Dist")]
    assert needs == ["torch"] and text["Name"] == "kd-losses"

    target = tmp_path / "empty"
    run([*PIP, "install", "--no-deps", "--no-index", "--target", str(target), str(wheel)], tmp_path)
    said = run([sys.executable, "-I", "-c", USE, str(target)], tmp_path).split(maxsplit=2)
    from kd_losses import METHODS

    assert int(said[0]) == len(METHODS) and int(said[1]) >= 40 and said[2].strip() == "[]", said
