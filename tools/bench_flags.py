"""Flags that several commands of bench.py share."""

import argparse

import utils
from engine import cli
from utils import UserError

MODES_HELP = "methods, separated by commas, or 'all' (default all)"


def some(names):
    """An argparse type: 'all', or some of `names`, separated by commas. Gives a tuple."""

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
    """Add integer flags, each given as (minimum, default, help)."""
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
    add_numbers(parser, rounds=(1, 7, "rounds; the median over the rounds is shown "))
    add, cuda = parser.add_argument, cli.number(int, 0, 1)
    add("--cuda", type=cuda, metavar="0|1", help="0: CPU, 1: GPU (default: GPU if available)")
    threads = "number of CPU threads (default: torch's choice)"
    add("--threads", type=cli.number(int, 1), metavar="N", help=threads)
    add("--json", metavar="FILE", help="also write the figures as JSON; '-': to stdout")


def add_amp(parser: cli.Parser) -> None:
    """The flag of the precision, with the choices of the training scripts."""
    parser.add_argument(
        "--amp", choices=utils.AMP, default="auto", help="autocast, as in training (default auto)"
    )


def add_steps(parser: cli.Parser) -> None:
    """The number of steps in a round."""
    steps = cli.number(int, 1)
    text = "steps per round (default: 5, on CUDA 50)"
    parser.add_argument("--steps", type=steps, metavar="N", help=text)


def add_networks(parser: cli.Parser) -> None:
    """The flags of `step` and `epoch`."""
    for side in ("student", "teacher"):
        parser.add_argument(
            f"--{side}", default="resnet20", metavar="NAME", help=f"{side} (default resnet20)"
        )
    numbers = dict(batch_size=(2, 128, "batch size "), num_class=(2, 100, "number of classes "))
    numbers["samples"] = (8, 50_000, "number of random training images of 32x32 pixels ")
    add_numbers(parser, **numbers)
    add_steps(parser)
    add_rounds(parser)
    add_amp(parser)
