"""Reading and writing the small files of runs and tables, and inserting a table into a page. A file
that cannot be read gives a one-line error; a file is written completely or not at all."""

import csv
import io
import json
import reprlib
from pathlib import Path

from engine.checkpoint import write_file
from utils import UserError

FEW = 16_000_000  # bytes: largest size of a file of a run or table


def read_json(path: Path) -> dict:
    """The JSON object in a file. Raises ValueError, one line, if it cannot be read."""
    text = read_text(path)
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(f"{path.name} is damaged (nested too deeply)") from None
    except ValueError as error:
        raise ValueError(f"{path.name} is damaged or cut short ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path.name}: expected a JSON object, got {reprlib.repr(value)}")
    return value


def read_text(path: Path) -> str:
    """The text of a small file, with or without a byte order mark. Raises ValueError, one line."""
    try:
        if not path.is_file():  # reading a pipe might never end
            raise ValueError(f"{path.name} is missing, or not a regular file")
        if path.stat().st_size > FEW:
            raise ValueError(f"{path.name} is too large ({path.stat().st_size:,} bytes)")
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"{path.name} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path.name} is not UTF-8 text") from None


def shown(path: Path) -> str:
    """A path for a message: escaped if it cannot be printed, shortened if it is long."""
    text = str(path)
    text = text if text.isprintable() else ascii(text)[1:-1]
    return text if len(text) <= 300 else f"{text[:140]}...{text[-140:]}"


def write_csv(path: Path, rows: list[dict], columns: list[str] | None = None) -> None:
    """Write the rows with these columns (default: those of the first row)."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns or list(rows[0]), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write(path, text.getvalue())


def write(path: Path, text: str) -> None:
    """Write a file, completely or not at all."""
    try:
        write_file(path, text.encode())
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror})") from error


def split_page(path: Path, name: str) -> tuple[str, str]:
    """(the text of a page up to the first mark of the table, the text from its second mark)."""
    begin, end = f"<!-- tables.py show {name} -->", "<!-- end of the table -->"
    try:
        if not path.is_file():
            raise ValueError("file not found")
        before, rest = path.read_bytes().decode().split(begin)
        return before + begin, rest[rest.index(end) :]
    except (OSError, ValueError) as error:
        raise UserError(
            f"--into {shown(path)}: marks of the table not found; add the lines {begin} and {end}"
        ) from error


def insert(path: Path, name: str, text: str) -> None:
    """Put the table between its two marks in a page."""
    before, after = split_page(path, name)
    try:
        path.write_bytes(f"{before}\n{text}{after}".encode())
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror})") from error
