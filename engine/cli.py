"""Flags that the scripts share, and what they resolve to."""

import argparse
import difflib
import os
from dataclasses import replace
from pathlib import Path


from dataset import CLASSES, IMG_SIZE, SIZES
from engine.published import PROTOCOLS, Protocol, scaled
from engine import stream
import utils
from utils import UserError


DATA_NAMES = "cifar10, cifar100, digits, imagefolder or imagenet"


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, whose errors are UserErrors."""

    def __init__(self, **kwargs):
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str):
        raise UserError(message)

    def parse_args(self, argv=None, owner=lambda flag: None):
        """Strict: an unknown flag is an error that says which flag comes near, or whose it is
        (`owner(flag)`: a sentence, or None)."""
        args, rest = self.parse_known_args(argv)
        if rest:
            flag = rest[0].split("=")[0]
            known = [name for action in self._actions for name in action.option_strings]
            near = difflib.get_close_matches(flag, known, n=1)
            hint = owner(flag) or (f"did you mean {near[0]}?" if near else "see --help")
            raise UserError(f"unknown flag {flag}: {hint}")
        return args


def number(kind, low=None, high=None, open_low=False):
    """An argparse type: an int or a float in [low, high], or (low, high] with `open_low`; none so
    large that torch would overflow."""
    what = {int: "a whole number", float: "a number"}[kind]
    bounds = [] if low is None else [f"{'above' if open_low else 'of at least'} {low}"]
    bounds += [] if high is None else [f"at most {high}"]

    def parse(text: str):
        try:
            value = kind(text)
            fine = abs(value) <= (2**53 if kind is int else 1e30)  # not for nan
            fine = fine and (low is None or value > low or (value == low and not open_low))
            fine = fine and (high is None or value <= high)
        except (ValueError, OverflowError):
            fine = False
        if not fine:
            wanted = " ".join([what, " and ".join(bounds)]).strip()
            raise argparse.ArgumentTypeError(f"{wanted} is wanted, not {text!r}")
        return value

    return parse


def usable_folder(path: Path, flag: str, write: bool = True) -> None:
    """Raise UserError where `path` is no folder and could be none, or not be written into. Nothing is
    written."""
    try:
        for there in (path, *path.absolute().parents):
            if there.is_dir():
                break
            if there.exists() or there.is_symlink():
                raise UserError(f"{flag} {path}: {there} is a file, a folder is wanted")
    except OSError as error:
        raise UserError(f"{flag} {str(path)[:200]} cannot be used ({error.strerror})") from error
    if write and not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{flag} {path}: {there} is not writable")


def writable_file(path: Path, force: bool) -> None:
    """Raise UserError where there is no place for a new file, or without `force` one is there."""
    try:
        if path.is_dir() or not path.parent.is_dir():
            raise UserError(f"{path} cannot be written: it is a folder, or in none that is there")
        there = path.exists()
    except OSError as error:  # of a name too long
        raise UserError(f"{str(path)[:200]} cannot be written ({error.strerror})") from error
    if there and not force:
        raise UserError(f"{path} is there already: --force writes over it, --out FILE beside it")
    if not os.access(path if there else path.parent, os.W_OK):
        raise UserError(f"{path} cannot be written (no permission)")


def filled(text: str) -> str:
    """An argparse type: a name or path that is not empty and can be printed."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{text!r} is no UTF-8") from None
    if not text.strip() or "\0" in text:
        raise argparse.ArgumentTypeError(f"a name is wanted, not {text!r}")
    return text


def one_folder(text: str) -> str:
    """An argparse type: the name of one folder."""
    if Path(filled(text)).name != text or text == ".." or "\\" in text or not text.isprintable():
        raise argparse.ArgumentTypeError(
            f"the name of one folder is wanted, not {text!r}; --save_root says where it is"
        )
    return text


def comma(kind):
    """An argparse type: a tuple of `kind`s, written with commas."""

    def parse(text: str):
        return tuple(kind(part) for part in text.split(","))

    return parse


def add_common_flags(parser: Parser) -> None:
    """The flags of both scripts: KD-Zoo's names and meaning, and ours. A default of None stands for
    what the protocol, the dataset or the machine says."""
    add_data_flags(parser, training=True)
    add = parser.add_argument_group("training").add_argument
    add("--protocol", choices=PROTOCOLS, default="kdzoo", help="training recipe (default kdzoo)")
    add("--epochs", type=number(int, 1), metavar="N", help="all else scales with it")
    add_optimizer_flags(add)
    add(
        "--accumulate",
        type=number(int, 1),
        default=1,
        metavar="N",
        help="pieces in which a batch goes through, where it does not fit (default 1)",
    )
    add("--nesterov", type=number(int, 0, 1), metavar="0|1")
    add("--milestones", type=comma(number(int, 1)), metavar="E,E", help="lr falls after these")
    add(
        "--compile",
        action="store_true",
        help="torch.compile: minutes at first, then faster on GPUs",
    )
    add_machine_flags(parser)
    add_run_flags(parser)


def add_optimizer_flags(add) -> None:
    """The flags of the optimizer and of chance, by a group's `add_argument`."""
    add("--batch_size", type=number(int, 2), metavar="N")
    add("--lr", type=number(float, 0, open_low=True), metavar="X")
    add("--momentum", type=number(float, 0, 1), metavar="X")
    add("--weight_decay", type=number(float, 0), metavar="X")
    add(
        "--on_nan",
        choices=("stop", "skip"),
        default="stop",
        help="a loss that is no number stops the run (default), or its steps are left out",
    )
    add("--seed", type=number(int, 0, 2**32 - 1), default=2, metavar="N", help="(default 2)")


def add_run_flags(parser: Parser) -> None:
    """The flags of a run's folder."""
    add = parser.add_argument_group("run directory").add_argument
    add("--save_root", type=filled, default="./runs", metavar="DIR", help="(default ./runs)")
    add("--note", type=one_folder, metavar="NAME", help="name of the run's folder in save_root")
    add("--print_freq", type=number(int, 1), default=50, metavar="N", help="steps (default 50)")
    add("--tensorboard", action="store_true", help="write the epochs' metrics as events too")
    add("--resume", action="store_true", help="go on with the run that is in the folder")
    add(
        "--save_every",
        type=number(float, 0),
        metavar="MIN",
        help="a checkpoint inside an epoch too, after this many minutes",
    )
    add("--dry_run", action="store_true", help="check everything, say the recipe, train nothing")


def add_data_flags(parser: Parser, training: bool = False) -> None:
    """The flags that say which images."""
    add = parser.add_argument_group("data").add_argument
    add("--data_name", type=filled, metavar="NAME", help=DATA_NAMES)
    add("--img_root", type=filled, metavar="DIR", help="where the images are (default ./datasets)")
    add("--num_class", type=number(int, *CLASSES), metavar="N", help="checked against the dataset")
    add(
        "--img_size",
        type=number(int, *SIZES),
        metavar="N",
        help="NxN pixels; up to 96 kept on the device, above read batch by batch (imagenet: 224)",
    )
    if training:
        add("--flip", type=number(int, 0, 1), metavar="0|1", help="mirror training images or not")
    add(
        "--mean_std",
        type=mean_std,
        metavar="WHAT",
        help="normalisation: cifar10, cifar100, imagenet, measured, or six numbers M,M,M,S,S,S "
        "(default: the checkpoint's, else the protocol's for those three, else measured on the "
        "training images)",
    )


def add_machine_flags(parser: Parser) -> None:
    """The flags that say where and how it is computed."""
    add = parser.add_argument_group("machine").add_argument
    add("--cuda", type=number(int, 0, 1), metavar="0|1", help="0: CPU (default: what is there)")
    add(
        "--amp",
        choices=("auto", "bf16", "off"),
        default="auto",
        help="bfloat16 autocast; auto: where the hardware has it",
    )
    add(
        "--workers",
        type=number(int, 0, 1024),
        metavar="N",
        help="processes that read images above 96 pixels (default: one a CPU, at most 8)",
    )


def mean_std(text: str):
    """An argparse type: 'measured', a dataset with known constants, or six numbers."""
    if text in ("measured", "cifar10", "cifar100", "imagenet"):
        return text
    values = comma(number(float))(text)
    if len(values) != 6 or min(values[3:]) <= 0:
        raise argparse.ArgumentTypeError(
            "cifar10, cifar100, imagenet, measured or six numbers (the last three above 0), not "
            f"{text!r}"
        )
    if min(values[:3]) < 0 or max(values) > 1 or min(values[3:]) < 1e-3:
        raise argparse.ArgumentTypeError(f"pixels are scaled to 0..1, {text!r} is of another scale")
    return values[:3], values[3:]


def resolve(
    args: argparse.Namespace, net_name: str, knows: dict, batch_size: int | None = None
) -> argparse.Namespace:
    """The flags with everything filled in: from `knows` (the metadata of a checkpoint), then from
    `batch_size` (a method's own under the protocol), then from the protocol. The flags themselves
    stay as they were given."""
    recipe = argparse.Namespace(**vars(args))
    protocol = PROTOCOLS[args.protocol]
    protocol = replace(protocol, **protocol.networks.get(net_name, {}))
    resolve_data(recipe, knows, protocol)
    fill = dict(
        epochs=protocol.epochs,
        batch_size=batch_size or protocol.batch_size,
        momentum=protocol.momentum,
        weight_decay=protocol.weight_decay,
        nesterov=int(protocol.nesterov),
    )
    for flag, value in fill.items():
        if getattr(recipe, flag) is None:
            setattr(recipe, flag, value)
    if recipe.lr is None:
        factor = recipe.batch_size / protocol.batch_size if protocol.scales else 1
        recipe.lr = protocol.lr * factor
    recipe.warmup = scaled(protocol.warmup, recipe.epochs, protocol) if protocol.warmup else 0
    if recipe.nesterov and recipe.momentum == 0:
        raise UserError("--momentum 0 excludes Nesterov's: give --nesterov 0")
    if args.milestones is not None:
        pairs = zip((0, *args.milestones), (*args.milestones, recipe.epochs + 1))
        if any(one >= two for one, two in pairs):
            raise UserError(
                f"--milestones {','.join(map(str, args.milestones))}: each after the one before it, "
                f"and none after the last epoch, {recipe.epochs}"
            )
    if args.milestones is None:
        recipe.milestones = tuple(scaled(e, recipe.epochs, protocol) for e in protocol.milestones)
    recipe.padding = protocol.padding
    return recipe


def describe_recipe(recipe: argparse.Namespace, augmented: bool) -> str:
    """The optimiser of a resolved recipe, in a line. `augmented`: with the protocol's padding."""
    smoothing = getattr(recipe, "label_smoothing", None)
    return (
        f"protocol {recipe.protocol}: lr {recipe.lr:g}, falls after {recipe.milestones}, momentum "
        f"{recipe.momentum:g}{' (Nesterov)' if recipe.nesterov else ''}, weight decay "
        f"{recipe.weight_decay:g}, batch {recipe.batch_size}"
        + (f", warm-up {recipe.warmup}" if recipe.warmup else "")
        + (f", {recipe.accumulate} pieces a batch" if recipe.accumulate > 1 else "")
        + (f", label smoothing {smoothing:g}" if smoothing else "")
        + (f", {recipe.padding} padding" if augmented else "")
    )


def resolve_data(recipe: argparse.Namespace, knows: dict, protocol: Protocol) -> None:
    """Fill in, in place, what `add_data_flags` and --workers left open: from `knows`, then from
    `protocol`."""
    for flag in ("data_name", "num_class", "img_size"):
        given, known = getattr(recipe, flag), knows.get(flag)
        if given is not None and known is not None and given != known:
            raise UserError(f"--{flag} {given} contradicts the checkpoint, which says {known}")
        setattr(recipe, flag, known if given is None else given)
    if recipe.data_name is None:
        raise UserError(f"--data_name is needed: {DATA_NAMES}")
    if recipe.img_size is None:
        recipe.img_size = IMG_SIZE.get(recipe.data_name, protocol.img_size)
    if recipe.workers is None:
        recipe.workers = min(8, utils.cpus())
    recipe.img_root = recipe.img_root or knows.get("img_root") or "./datasets"
    constants = recipe.mean_std
    if constants is None and "mean" in knows:
        constants = tuple(knows["mean"]), tuple(knows["std"])
    elif constants != "measured" and not isinstance(constants, tuple):
        constants = protocol.constants.get(constants or recipe.data_name)
    recipe.mean_std = None if constants == "measured" else constants


def load_data(recipe: argparse.Namespace, batch_size: int | None = None):
    """The dataset of a resolved recipe. Raises UserError where --num_class contradicts it, or it is
    smaller than the `batch_size` that was given."""

    data = stream.load(
        recipe.data_name,
        recipe.img_root,
        recipe.mean_std,
        recipe.img_size,
        None if recipe.flip is None else bool(recipe.flip),
        recipe.workers,
    )
    if recipe.num_class not in (None, data.train.num_class):
        raise UserError(
            f"{recipe.num_class} classes are wanted (--num_class or the checkpoint), "
            f"{recipe.data_name} has {data.train.num_class}"
        )
    if batch_size is not None and batch_size > len(data.train):
        raise UserError(
            f"--batch_size {batch_size}: there are {len(data.train)} training images in {data.name}"
        )
    if utils.world() > 1 and min(recipe.batch_size, len(data.train)) < 2 * utils.world():
        raise UserError(
            f"--batch_size {recipe.batch_size}, {len(data.train)} training images: {utils.world()} "
            f"processes need two images each, {2 * utils.world()} in all"
        )
    return data


def describe_data(recipe: argparse.Namespace, data) -> dict:
    """What a checkpoint remembers of the data."""
    return dict(
        data_name=data.name,
        img_root=recipe.img_root,
        img_size=recipe.img_size,
        num_class=data.train.num_class,
        classes=list(data.train.classes),
        mean=list(data.train.mean),
        std=list(data.train.std),
    )
