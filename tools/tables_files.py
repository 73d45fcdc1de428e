"""The files of runs and tables: small ones, read as a whole or refused in a line, and written as a
whole or not at all; and a table's place in a page."""

import csv
import io
import json
import reprlib
from pathlib import Path

from engine.checkpoint import write_file
from utils import UserError

FEW = 16_000_000  # bytes: no file of a run or table is larger


def read_json(path: Path) -> dict:
    """The object in a file. Raises ValueError, one line, if it has no object."""
    text = read_text(path)
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(f"{path.name} is damaged (nested too deep)") from None
    except ValueError as error:
        raise ValueError(f"{path.name} is damaged or cut short ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} holds no object but {reprlib.repr(value)}")
    return value


def read_text(path: Path) -> str:
    """The text of a small file, with or without a byte order mark. Raises ValueError, one line."""
    try:
        if not path.is_file():  # one that never ends, perhaps
            raise ValueError(f"{path.name} is missing, or no file")
        if path.stat().st_size > FEW:
            raise ValueError(f"{path.name} is too large ({path.stat().st_size:,} bytes)")
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"{path.name} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path.name} is no UTF-8") from None


def shown(path: Path) -> str:
    """A path in a line: escaped where it cannot be printed, and not endless."""
    text = str(path)
    text = text if text.isprintable() else ascii(text)[1:-1]
    return text if len(text) <= 300 else f"{text[:140]}...{text[-140:]}"


def write_csv(path: Path, rows: list[dict], columns: list[str] | None = None) -> None:
    """The rows, under `columns` or those of the first."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns or list(rows[0]), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write(path, text.getvalue())


def write(path: Path, text: str) -> None:
    """All of it or nothing."""
    try:
        write_file(path, text.encode())
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror})") from error


def split_page(path: Path, name: str) -> tuple[str, str]:
    """The text of a page up to the table's first mark, and from its last mark."""
    begin, end = f"<!-- tables.py show {name} -->", "<!-- end of the table -->"
    try:
        if not path.is_file():
            raise ValueError("no such file")
        before, rest = path.read_bytes().decode().split(begin)
        return before + begin, rest[rest.index(end) :]
    except (OSError, ValueError) as error:
        raise UserError(f"{shown(path)} has no place for the table: {begin} ... {end}") from error


def insert(path: Path, name: str, text: str) -> None:
    """Put the table between its two marks in a page."""
    before, after = split_page(path, name)
    try:
        path.write_bytes(f"{before}\n{text}{after}".encode())
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror})") from error
