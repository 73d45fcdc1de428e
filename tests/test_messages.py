"""The checks of messages can fail."""

import sys

import pytest
from messages import ends, names, one_line, refused

from utils import UserError


@pytest.mark.parametrize(
    "text, name, there",
    [
        ("--lr: 0 is too small", "--lr", True),
        ("--lr_decay: 0 is too small", "--lr", False),
        ("there is no a/b.pth", "b.pth", True),
        ("there is no a/bb.pth", "b.pth", False),
        ("it has resnet8x4", "resnet8", False),
        ("its bbox [1, 2] is wrong", "[1, 2]", True),
        ("nothing", "--lr", False),
    ],
)
def test_a_name_counts_as_a_whole(text, name, there):
    assert names(text, name) is there


@pytest.mark.parametrize("text", ["", "\n", "--lr is wrong\nmore", "it is wrong"])
def test_what_is_not_one_line_with_the_name_fails(text):
    with pytest.raises(AssertionError):
        one_line(text, "--lr")


def test_what_raises_something_else_or_nothing_fails():
    with refused("--lr") as said:
        raise UserError("--lr is wrong")
    assert said == ["--lr is wrong"]
    with pytest.raises(AssertionError), refused("--lr"):
        raise UserError("it is wrong")
    with pytest.raises(TypeError), refused("--lr"):
        raise TypeError("--lr is wrong")
    with pytest.raises(pytest.fail.Exception), refused("--lr"):
        pass


@pytest.mark.parametrize(
    "text, code", [("--lr is wrong", 1), ("it is wrong", 2), ("--lr is wrong\nmore", 2), ("", 2)]
)
def test_a_command_that_ends_otherwise_fails(text, code, capsys):
    with pytest.raises(AssertionError), ends(capsys, "--lr"):
        print(text, file=sys.stderr)
        sys.exit(code)
    with ends(capsys, "--lr"):
        print("--lr is wrong", file=sys.stderr)
        sys.exit(2)
