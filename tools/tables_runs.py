"""Records of finished runs: read from run directories, and kept in TABLE.runs.csv."""

import csv
import io
import os
import re
import reprlib
import sys
from pathlib import Path

from kd_losses import METHODS
from tools.tables_files import read_json, read_text, shown, write_csv
from tools.tables_plan import BASE
from utils import UserError

RECORD = "protocol setting data teacher student mode seed epochs last best seconds added precision"
VALIDATED = " (best chosen on a validation set)"  # a separate setting, never in the same mean
CHECKS = {
    "a name": lambda x: isinstance(x, str) and 0 < len(x) <= 200 and x.isprintable(),
    "a name or no value": lambda x: x == "" or CHECKS["a name"](x),
    "an int >= 0": lambda x: type(x) is int and 0 <= x <= 2**53,
    "an int >= 1": lambda x: type(x) is int and 1 <= x <= 2**53,
    "a number from 0 to 100": lambda x: type(x) in (int, float) and 0 <= x <= 100,
    "a number >= 0": lambda x: type(x) in (int, float) and 0 <= x <= 1e15,
}
NAME, NAME_OR_NOTHING, COUNT, AT_LEAST_1, PERCENT, NUMBER = CHECKS
FIELDS = dict.fromkeys(RECORD.split(), NAME) | dict(
    teacher=NAME_OR_NOTHING,
    seed=COUNT,
    epochs=AT_LEAST_1,
    last=PERCENT,
    best=PERCENT,
    seconds=NUMBER,
    added=COUNT,
)


def checked(key: str, value):
    """`value`, if it is valid for the field `key` of a record. Raises ValueError if not."""
    if not CHECKS[FIELDS[key]](value):
        raise ValueError(f"its {key} is {reprlib.repr(value)}, expected {FIELDS[key]}")
    return value


# --- folders of runs ------------------------------------------------------------------------------


def collect(runs: Path, protocol: str) -> list[dict]:
    """The records of all finished runs of a protocol; a run of mutual learning has two. A folder
    that cannot be read is left out, with a one-line warning."""
    records, homes = [], {}

    def left_out(folder, reason) -> None:
        print(f"warning: {shown(folder)} is left out: {reason}", file=sys.stderr, flush=True)

    def unreadable(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            left_out(error.filename, error.strerror)

    for folder in finished_runs(runs / protocol, unreadable):
        try:
            found = records_of(folder, runs / protocol)
            same = homes.get(_key(found[0]))
            if same:
                raise ValueError(f"it is a copy of {shown(same)}")
        except ValueError as error:
            left_out(folder, error)
            continue
        homes[_key(found[0])] = folder
        records += found
    return records


def finished_runs(home: Path, unreadable) -> list[Path]:
    """The folders with a result.json in the folders of all settings, which may be links."""
    found = []
    try:
        settings = sorted(entry.path for entry in os.scandir(home) if entry.is_dir())
    except OSError as error:
        unreadable(error)
        return []
    for where in settings:
        for folder, _, names in os.walk(where, onerror=unreadable):
            found += [Path(folder)] if "result.json" in names else []
    return sorted(found)


def records_of(folder: Path, home: Path) -> list[dict]:
    """The records of the run in a folder. Raises ValueError, one line, if the run is damaged or
    copied."""
    result, args = read_json(folder / "result.json"), read_json(folder / "args.json")

    def said(*keys: str):
        value = args
        for key in keys:
            if not isinstance(value, dict) or key not in value:
                raise ValueError(f"args.json has no {' '.join(keys)}")
            value = value[key]
        return value

    recipe, place = said("recipe"), folder.relative_to(home)
    mode, _, seed = folder.name.rpartition("-")
    base = mode.startswith("base-")
    if not re.fullmatch("[0-9]{1,10}", seed) or not (base or mode in METHODS):
        raise ValueError("its name is not METHOD-SEED or base-NETWORK-SEED")
    common = dict(
        protocol=home.name,
        setting=place.parts[0] + VALIDATED * (result.get("chosen_on") == "val"),
        data=said("recipe", "data_name"),
        teacher="",
        student=said("meta", "network"),
        mode=BASE,
        seed=int(seed),
        epochs=said("recipe", "epochs"),
        last=result.get("last"),
        best=result.get("best"),
        seconds=result.get("seconds"),
        added=args.get("added", 0),
        precision="bf16" if "bfloat16" in str(said("machine")) else "fp32",
    )
    if not base:
        # the trained network may be more than the student: simkd adds the teacher's classifier
        student = recipe.get("s_name") or common["student"]
        common |= dict(mode=mode, teacher=said("teacher", "network"), student=student)
    for key in RECORD.split():
        checked(key, common[key])
    if not base:
        checked("student", common["teacher"])
    # args.json names the run's original place; in a copied folder it differs
    says = dict(kd_mode=None if base else mode, protocol=home.name, seed=int(seed))
    for key, value in dict(says, note=folder.name).items():
        if value is not None and recipe.get(key, value) != value:
            raise ValueError(
                f"it may be a copy, since args.json has {key} {reprlib.repr(recipe[key])}"
            )
    root = recipe.get("save_root")
    inner = place.parent.parts
    if not inner:
        raise ValueError("it is not in the folder of a setting")
    if isinstance(root, str) and Path(root).parts[-len(inner) :] != inner:
        raise ValueError(f"it may be a copy, since args.json has save_root {reprlib.repr(root)}")
    common["seconds"] = round(common["seconds"])
    records = [common]
    if {"peer_last", "peer_best"} & set(result):
        peer = {key: checked(key, result.get(f"peer_{key}")) for key in ("last", "best")}
        records.append(common | peer | dict(mode=f"{mode}:net1"))
    return records


# --- the file of records --------------------------------------------------------------------------


def remembered(path: Path) -> tuple[list[str], list[dict]]:
    """(columns, records) of a .runs.csv. A file saved by a spreadsheet is accepted: with a byte
    order mark, semicolons or tabs, decimal commas, additional columns. Anything else raises
    UserError with the line number, since the records may exist nowhere else."""
    if not (path.exists() or path.is_symlink()):
        return RECORD.split(), []
    line = None
    try:
        text = read_text(path)
        head = text.split("\n", 1)[0]
        cut = max(",;\t", key=head.count)
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=cut, strict=True)
        columns, records = next(reader, []), []
        while columns and not columns[-1].strip():
            columns.pop()
        lacks = [key for key in RECORD.split() if key not in columns]
        if lacks:
            raise ValueError(f"column {', '.join(lacks)} not found")
        if len(set(columns)) < len(columns):
            raise ValueError("two columns have the same name")
        for row in reader:
            line = reader.line_num
            if not any(cell.strip() for cell in row):
                continue
            if any(cell.strip() for cell in row[len(columns) :]):
                raise ValueError(f"expected {len(columns)} cells, got {len(row)}")
            row = dict(zip(columns, row + [""] * len(columns)))
            records.append(row | {key: parsed(key, row[key], cut) for key in RECORD.split()})
    except (ValueError, csv.Error) as error:
        where = f"{shown(path)}{f', line {line}' if line else ''}"
        raise UserError(f"{where}: {error}; repair or remove the file") from error
    return columns, records


def parsed(key: str, cell: str, cut: str):
    """The value of a cell, with the type of its field. Raises ValueError."""
    kind, text = FIELDS[key], cell.strip()
    if kind in (NAME, NAME_OR_NOTHING):
        return checked(key, text)
    number = text.replace(",", ".") if cut == ";" else text
    if not re.fullmatch(r"[0-9]{1,15}(\.[0-9]{1,20})?(e[-+][0-9]{1,3})?", number):
        return checked(key, text)
    value = float(number)
    whole = number.isdigit() or kind in (COUNT, AT_LEAST_1) and value % 1 == 0
    return checked(key, int(value) if whole else value)


def merge(path: Path, records: list[dict]) -> list[dict]:
    """The records, and those in the file of runs that no longer exist. Writes all to the file."""
    columns, before = remembered(path)
    known = {_key(record): record for record in before}
    for record in records:
        known[_key(record)] = known.get(_key(record), {}) | record
    records = [known[key] for key in sorted(known)]
    if records:
        write_csv(path, records, columns)
    return records


def _key(record: dict) -> tuple:
    return tuple(record[k] for k in ("setting", "teacher", "student", "mode", "seed"))
