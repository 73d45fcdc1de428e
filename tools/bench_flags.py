"""Flags that several commands of bench.py have."""

import argparse

import utils
from engine import cli
from utils import UserError


def some(names):
    """An argparse type: 'all', or some of `names`, joined by commas."""

    def parse(text: str) -> tuple[str, ...]:
        if text == "all":
            return tuple(names)
        try:
            for name in text.split(","):
                utils.named(dict.fromkeys(names), name, "mode")
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        return tuple(text.split(","))

    return parse


def add_numbers(parser: cli.Parser, **flags) -> None:
    """Integer flags: minimum, default, help."""
    for flag, (least, default, text) in flags.items():
        parser.add_argument(
            f"--{flag}",
            type=cli.number(int, least),
            default=default,
            metavar="N",
            help=f"{text}(default {default})",
        )


def add_rounds(parser: cli.Parser) -> None:
    """The flags that all commands have."""
    add_numbers(parser, rounds=(1, 7, ""))
    add, cuda = parser.add_argument, cli.number(int, 0, 1)
    add("--cuda", type=cuda, metavar="0|1", help="0: CPU (default: GPU if available)")
    add("--threads", type=cli.number(int, 1), metavar="N", help="on the CPU (default: torch's)")
    add("--json", metavar="FILE", help="the figures, as JSON; '-': to stdout")


def add_amp(parser: cli.Parser) -> None:
    """The precision, as the training scripts have it."""
    parser.add_argument(
        "--amp", choices=utils.AMP, default="auto", help="as in training (default auto)"
    )


def add_networks(parser: cli.Parser) -> None:
    """The flags of `step` and `epoch`."""
    for side in ("student", "teacher"):
        parser.add_argument(
            f"--{side}", default="resnet20", metavar="NAME", help="(default resnet20)"
        )
    numbers = dict(batch_size=(2, 128, ""), num_class=(2, 100, ""))
    numbers["samples"] = (8, 50_000, "random training images of 32 pixels ")
    add_numbers(parser, **numbers)
    steps = cli.number(int, 1)
    parser.add_argument("--steps", type=steps, metavar="N", help="a round (default 5, CUDA 50)")
    add_rounds(parser)
    add_amp(parser)
