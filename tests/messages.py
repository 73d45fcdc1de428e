"""What is asked of the message about a user's mistake: one line that names the flag, the file or
the value that is wrong. How the sentence is worded is free."""

import contextlib
import re
from collections.abc import Iterator

import pytest

from utils import UserError


def named(name: str, text: str) -> bool:
    """Whether a text has a name as a whole word: `--lr` is not named by `--lr_decay`. `abc*` is a
    word that begins with abc."""
    after = "" if name.endswith("*") else r"(?![\w-])"
    return re.search(r"(?<!\w)" + re.escape(name.removesuffix("*")) + after, text) is not None


def names(text: str, *wanted: object) -> bool:
    """Whether a text has each of these names."""
    return all(named(str(x), text) for x in wanted)


def one_line(text: str, *wanted: object) -> str:
    """Check that a message is one line and has each of these names; the line."""
    line = text.removesuffix("\n")
    assert line.strip() and len(line.splitlines()) == 1, f"not one line: {text!r}"
    missing = [str(x) for x in wanted if not names(line, x)]
    assert not missing, f"{missing} not named in {line!r}"
    return line


@contextlib.contextmanager
def refused(*wanted: object, error: type = UserError) -> Iterator[list[str]]:
    """The block raises `error` with such a message, which is in the list afterwards."""
    said = []
    with pytest.raises(error) as caught:
        yield said
    said.append(one_line(str(caught.value), *wanted))


@contextlib.contextmanager
def ends(capture: object, *wanted: object, code: int = 2) -> Iterator[list[str]]:
    """The block is a command that ends with this exit code, having said such a message alone.

    capture: pytest's capsys or capfd. The message is in the list afterwards.
    """
    said = []
    capture.readouterr()
    with pytest.raises(SystemExit) as stop:
        yield said
    err = capture.readouterr().err
    assert stop.value.code == code, err
    said.append(one_line(err, *wanted))
