"""Plain English: phrases that readers had to read twice do not come back.

Pages, docstrings, comments, messages and help are read. The right column is what to write instead.
"""

import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BANNED = {
    r"(is|are|was|were) wanted": "expected ..., got ...",
    r"wants": "expects, needs, takes",
    r"whole numbers?": "int, integer",
    r"(is|are) none\b(?! of)": "not found, no ...",
    r"go(es)? on": "continue",
    r"(to )?be had": "not found, not available",
    r"(says|knows) nothing of": "has no ...",
    r"all else": "everything else",
    r"anew": "again",
    r"as ever": "as before",
    r"likewise": "also",
    r"a tenth": "0.1 times, multiplied by 0.1",
    r"at work": "running, current, unfinished",
    r"finds? out|found out": "detect",
    r"stands? in": "is in",
    r"beside": "next to, in addition to, at the same time as",
    r"serves?": "works with, is used for",
    r"one's own": "your own",
    r"mend(s|ed|ing)?": "repair, fix",
    r"hardly|whilst|thereof|lest": "a plain word",
    r"comes? near": "is similar to",
    r"is owed": "...",
}
PHRASES = re.compile(r"\b(" + "|".join(BANNED) + r")\b")
OURS = Path(__file__).name


def texts(path: Path):
    """(line number, text) of a page, or of the comments and strings of a Python file."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        yield from enumerate(text.splitlines(), 1)
        return
    kinds = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", -1)}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in kinds:
            for i, line in enumerate(token.string.splitlines()):
                yield token.start[0] + i, line


def files() -> list[Path]:
    found = []
    for pattern in ("*.py", "*.md", "*.sh", "Makefile", "*.toml"):
        for path in ROOT.rglob(pattern):
            parts = path.relative_to(ROOT).parts
            printed = parts[:2] == ("results", "gpu")  # as it was on that day
            left_out = parts[0][0] == "." or parts[0] in ("runs", "datasets") or path.name == OURS
            if not (printed or left_out):
                found.append(path)
    return sorted(found)


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_phrase_that_has_to_be_read_twice(path):
    found = [
        f"{path.relative_to(ROOT)}:{i}: {match.group()!r} in {line.strip()!r}"
        for i, line in texts(path)
        for match in PHRASES.finditer(line)
    ]
    assert not found, "\n".join(found)


def test_a_phrase_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("A whole number is wanted.\n")
    assert [m.group() for _, x in texts(page) for m in PHRASES.finditer(x)] == [
        "whole number",
        "is wanted",
    ]
