"""Finished runs of the tables, as folders and as records, and tables.py on them."""

import json
from pathlib import Path

from tools import tables, tables_runs

DIGITS = ["--data", "digits", "--img_size", "12", "--cuda", "0", "--epochs", "2"]
HEAD = tables_runs.RECORD.replace(" ", ",")
ROW = "kdzoo,digits-2ep,digits,resnet20,resnet8,at,1,2,70.5,71.0,3,0,fp32"


def record(**what) -> dict:
    """A record of one run of KD-Zoo's table, or of `what` it is instead."""
    common = dict(protocol="kdzoo", setting="cifar10-200ep", data="cifar10", teacher="resnet20")
    common |= dict(student="resnet20", mode="at", seed=1, epochs=200, last=92.0, best=93.0)
    return common | dict(seconds=10, added=0, precision="bf16") | what


def show(root: Path, *more) -> None:
    """`tables.py show small` of the runs under `root`/runs."""
    tables.main(["show", "small", "--runs", str(root / "runs"), *more])


def finished_run(root: Path, name="st-1", result=None, args=None, last=50.0) -> Path:
    """Make the folder of a finished run of resnet20 -> resnet8 in the table `small`, under
    `root`/runs. result, args: what its files hold instead."""
    home = root / "runs" / "kdzoo" / "digits-2ep"
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


def args_with(**changes) -> str:
    """The text of a run's args.json with other values."""
    recipe = dict(data_name="digits", epochs=2) | changes.pop("recipe", {})
    args = dict(recipe=recipe, meta=dict(network="resnet8"), machine="CPU")
    return json.dumps(args | dict(teacher=dict(network="resnet20")) | changes)
