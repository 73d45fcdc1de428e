"""Flags that the scripts share, and what they resolve to."""

import argparse
import difflib
import os
from dataclasses import replace
from pathlib import Path


from dataset import CLASSES, IMG_SIZE, SIZES
from engine.published import PROTOCOLS, ROTATED, Protocol, scaled
from engine import stream
import utils
from utils import UserError


PADDINGS = {ROTATED: "rotated by up to 20 degrees"}
DATA_NAMES = "cifar10, cifar100, digits, imagefolder, imagenet, tiny-imagenet, wds or hf/NAME"


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, whose errors are UserErrors."""

    def __init__(self, **kwargs):
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str):
        raise UserError(message)

    def parse_args(self, argv=None, owner=lambda flag: None):
        """Strict: an unknown flag is an error that says which flag is similar, or whose it is
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
    bounds = [] if low is None else [f"{'>' if open_low else '>='} {low}"]
    bounds += [] if high is None else [f"<= {high}"]

    def parse(text: str):
        try:
            value = kind(text)
            fine = abs(value) <= (2**53 if kind is int else 1e30)  # not for nan
            fine = fine and (low is None or value > low or (value == low and not open_low))
            fine = fine and (high is None or value <= high)
        except (ValueError, OverflowError):
            fine = False
        if not fine:
            expected = " ".join([kind.__name__, " and ".join(bounds)]).strip()
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return value

    return parse


def usable_folder(path: Path, flag: str, write: bool = True) -> None:
    """Raise UserError if `path` is no folder and could be none, or not be written into. Nothing
    is written."""
    try:
        for there in (path, *path.absolute().parents):
            if there.is_dir():
                break
            if there.exists() or there.is_symlink():
                raise UserError(f"{flag} {path}: expected a folder, but {there} is a file")
    except OSError as error:
        raise UserError(f"{flag} {str(path)[:200]} cannot be used ({error.strerror})") from error
    if write and not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{flag} {path}: {there} is not writable")


def writable_file(path: Path, force: bool) -> None:
    """Raise UserError if there is no place for a new file, or without `force` one is there."""
    try:
        if path.is_dir() or not path.parent.is_dir():
            raise UserError(f"{path} cannot be written: it is a folder, or in none that is there")
        there = path.exists()
    except OSError as error:  # of a name too long
        raise UserError(f"{str(path)[:200]} cannot be written ({error.strerror})") from error
    if there and not force:
        raise UserError(
            f"{path} already exists; give --force to overwrite it, or --out FILE for another file"
        )
    if not os.access(path if there else path.parent, os.W_OK):
        raise UserError(f"{path} cannot be written (no permission)")


def count_or_share(text: str) -> int | float:
    """An argparse type: a number of images, or a share of them below 1."""
    try:
        return number(int, 1)(text)
    except argparse.ArgumentTypeError:
        try:
            share = number(float, 0, open_low=True)(text)
        except argparse.ArgumentTypeError:
            share = 1.0
        if share >= 1:
            raise argparse.ArgumentTypeError(
                f"expected int >= 1 or a share > 0 and < 1, got {text!r}"
            ) from None
        return share


def filled(text: str) -> str:
    """An argparse type: a name or path that is not empty and can be printed."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not UTF-8") from None
    if not text.strip() or "\0" in text:
        raise argparse.ArgumentTypeError(f"expected a name, got {text!r}")
    return text


def one_folder(text: str) -> str:
    """An argparse type: the name of one folder."""
    if Path(filled(text)).name != text or text == ".." or "\\" in text or not text.isprintable():
        raise argparse.ArgumentTypeError(
            f"expected the name of one folder, got {text!r}; --save_root says where it is"
        )
    return text


def wandb_project(text: str) -> str:
    """An argparse type: the name of a W&B project."""
    if len(filled(text)) > 128 or set(text) & set("/\\#?%:") or not text.isprintable():
        raise argparse.ArgumentTypeError(
            "expected the name of a W&B project, up to 128 characters without / \\ # ? % :, got "
            f"{text!r}"
        )
    return text


def class_lines(text: str) -> tuple[str, ...]:
    """An argparse type: the lines of a file that has one for each class of the dataset."""
    path = Path(filled(text))
    try:
        if not path.is_file():
            raise argparse.ArgumentTypeError(f"{text}: no such file")
        if path.stat().st_size > 2**25:
            raise argparse.ArgumentTypeError(f"{text}: too large for a list of classes")
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text[:200]}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise argparse.ArgumentTypeError(f"{text}: not UTF-8 text") from None
    lines = tuple(line.strip() for line in lines)
    while lines and not lines[-1]:
        lines = lines[:-1]
    for i, line in enumerate(lines, 1):
        if not line or len(line) > 300 or not line.isprintable():
            raise argparse.ArgumentTypeError(
                f"{text}, line {i}: expected the name or index of a class"
            )
    if not lines:
        raise argparse.ArgumentTypeError(f"{text}: expected at least one line")
    return lines


def comma(kind):
    """An argparse type: a tuple of `kind`s, written with commas."""

    def parse(text: str):
        return tuple(kind(part) for part in text.split(","))

    return parse


def add_common_flags(parser: Parser, defaults: dict) -> None:
    """The flags of both scripts: KD-Zoo's names and meaning, and ours. defaults: of the training
    recipe (`recipe_defaults`), for the help. A value of None stands for what the protocol, the
    dataset or the hardware says."""
    add_data_flags(parser, training=True)
    add = parser.add_argument_group("training").add_argument
    add(
        "--protocol",
        choices=PROTOCOLS,
        default="kdzoo",
        help="training recipe of a published table (default kdzoo)",
    )
    add(
        "--epochs",
        type=number(int, 1),
        metavar="N",
        help="number of epochs; milestones, phases and warm-ups scale with it "
        f"(default {defaults['epochs']})",
    )
    add_optimizer_flags(add, defaults)
    add(
        "--accumulate",
        type=number(int, 1),
        default=1,
        metavar="N",
        help="gradient accumulation steps: a batch is split into N micro-batches (default 1)",
    )
    add(
        "--nesterov",
        type=number(int, 0, 1),
        metavar="0|1",
        help=f"Nesterov momentum (default {defaults['nesterov']})",
    )
    add(
        "--milestones",
        type=comma(number(int, 1)),
        metavar="E,E",
        help="learning rate is multiplied by 0.1 after these epochs (default "
        f"{','.join(map(str, defaults['milestones']))}, scaled with --epochs)",
    )
    add(
        "--cuda_graph",
        type=number(int, 0, 1),
        nargs="?",
        const=1,
        metavar="0|1",
        help="capture the training step as a CUDA graph (default: on CUDA, if possible)",
    )
    add(
        "--compile",
        action="store_true",
        help="torch.compile both networks: slow to start, then faster on GPUs",
    )
    add_device_flags(parser)
    add_run_flags(parser)


def add_optimizer_flags(add, defaults: dict | None = None) -> None:
    """The flags of the optimizer and the seed, by a group's `add_argument`; defaults: for the
    help."""

    def default(name: str) -> str:
        return f" (default {defaults[name]:g})" if defaults else ""

    add(
        "--batch_size",
        type=number(int, 2),
        metavar="N",
        help="images per optimizer step, over all processes" + default("batch_size"),
    )
    add(
        "--lr",
        type=number(float, 0, open_low=True),
        metavar="X",
        help="initial learning rate" + default("lr"),
    )
    add(
        "--momentum",
        type=number(float, 0, 1),
        metavar="X",
        help="momentum of SGD" + default("momentum"),
    )
    add(
        "--weight_decay",
        type=number(float, 0),
        metavar="X",
        help="weight decay" + default("weight_decay"),
    )
    add(
        "--on_nan",
        choices=("stop", "skip"),
        default="stop",
        help="if a loss is NaN or infinite: stop the run, or skip the step (default stop)",
    )
    add(
        "--seed",
        type=number(int, 0, 2**32 - 1),
        default=2,
        metavar="N",
        help="random seed (default 2)",
    )


def add_run_flags(parser: Parser) -> None:
    """The flags of a run's folder."""
    add = parser.add_argument_group("run directory").add_argument
    add(
        "--save_root",
        type=filled,
        default="./runs",
        metavar="DIR",
        help="folder of all runs (default ./runs)",
    )
    add("--note", type=one_folder, metavar="NAME", help="name of the run directory in save_root")
    add(
        "--print_freq",
        type=number(int, 1),
        default=50,
        metavar="N",
        help="log every N steps (default 50)",
    )
    add(
        "--tensorboard",
        action="store_true",
        help="also write the metrics of each epoch for TensorBoard",
    )
    add(
        "--wandb",
        type=wandb_project,
        metavar="PROJECT",
        help="also send config, metrics and curves to this W&B project (WANDB_MODE=offline: "
        "only write them)",
    )
    add("--resume", action="store_true", help="continue the run in the run directory")
    add(
        "--save_every",
        type=number(float, 0),
        metavar="MIN",
        help="also save a checkpoint within an epoch, every MIN minutes",
    )
    add(
        "--dry_run",
        action="store_true",
        help="check everything and print the settings; train nothing",
    )


def add_data_flags(parser: Parser, training: bool = False) -> None:
    """The flags that say which images."""
    add = parser.add_argument_group("data").add_argument
    add(
        "--data_name",
        type=filled,
        metavar="NAME",
        help=f"{DATA_NAMES} (a folder of Parquet files, or a data set of the Hugging Face hub)",
    )
    add(
        "--img_root",
        type=filled,
        metavar="DIR",
        help="folder of the images, or shards: 'DIR/train-{0000..0127}.tar' (default ./datasets)",
    )
    add(
        "--num_class",
        type=number(int, *CLASSES),
        metavar="N",
        help="number of classes (must agree with the dataset)",
    )
    add(
        "--img_size",
        type=number(int, *SIZES),
        metavar="N",
        help="resize images to NxN pixels; up to 96 they stay on the device, larger ones are read "
        "batch by batch (imagenet: 224)",
    )
    add(
        "--fit",
        choices=("crop", "squash"),
        help="images that are not square: the middle is cropped, or the whole image is squashed "
        "(default crop)",
    )
    if training:
        add(
            "--flip",
            type=number(int, 0, 1),
            metavar="0|1",
            help="1: flip training images at random, 0: do not (default: by dataset)",
        )
        add(
            "--channels",
            type=int,
            choices=(1, 3),
            help="1: convert the trained network to one channel, for grey images (default: the "
            "channels "
            "of the network or its checkpoint)",
        )
        add(
            "--val",
            type=count_or_share,
            metavar="N",
            help="validation set: N training images, or a share such as 0.1, of every class, drawn "
            "by --seed; the best epoch is chosen on it (default: on the test set, or on the val "
            "folder if the images have both folders)",
        )
    add(
        "--mean_std",
        type=mean_std,
        metavar="WHAT",
        help="normalisation: cifar10, cifar100, imagenet, measured, or six numbers M,M,M,S,S,S "
        "(default: the checkpoint's, else the protocol's for those three, else measured on the "
        "training images)",
    )


def add_device_flags(parser: Parser) -> None:
    """The flags that say where and in which precision it is computed."""
    add = parser.add_argument_group("device").add_argument
    add(
        "--device",
        type=filled,
        default="auto",
        metavar="NAME",
        help="auto, cpu, cuda, cuda:N, mps or xpu (default auto: an accelerator if available)",
    )
    add(
        "--cuda",
        type=number(int, 0, 1),
        metavar="0|1",
        help="KD-Zoo's flag: 0 is --device cpu, 1 is --device cuda",
    )
    add(
        "--amp",
        choices=utils.AMP,
        default="auto",
        help="autocast: bfloat16, float16 with loss scaling, or off (default auto: bf16 if the "
        "hardware has it, else fp16 on a GPU)",
    )
    add(
        "--workers",
        type=number(int, 0, 1024),
        metavar="N",
        help="worker processes that read images above 96 pixels (default: one per CPU, at most 8)",
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
        raise argparse.ArgumentTypeError(f"expected values for pixels in 0..1, got {text!r}")
    return values[:3], values[3:]


def recipe_defaults(protocol: str, net_name: str, batch_size: int | None = None) -> dict:
    """The training recipe of a protocol for a network: epochs, batch_size, lr, ... batch_size: a
    method's own under this protocol."""
    recipe = PROTOCOLS[protocol]
    recipe = replace(recipe, **recipe.networks.get(net_name, {}))
    batch_size = batch_size or recipe.batch_size
    return dict(
        epochs=recipe.epochs,
        batch_size=batch_size,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=int(recipe.nesterov),
        lr=recipe.lr * (batch_size / recipe.batch_size if recipe.scales else 1),
        milestones=recipe.milestones,
    )


def resolve(
    args: argparse.Namespace, net_name: str, knows: dict, batch_size: int | None = None
) -> argparse.Namespace:
    """The flags with everything filled in: from `knows` (the metadata of a checkpoint), then from
    `batch_size` (a method's own under the protocol), then from the protocol. `args` itself is not
    changed."""
    cfg = argparse.Namespace(**vars(args))
    protocol = PROTOCOLS[args.protocol]
    resolve_data(cfg, knows, protocol)
    defaults = recipe_defaults(args.protocol, net_name, args.batch_size or batch_size)
    milestones = defaults.pop("milestones")
    for flag, value in defaults.items():
        if getattr(cfg, flag) is None:
            setattr(cfg, flag, value)
    cfg.warmup = scaled(protocol.warmup, cfg.epochs, protocol) if protocol.warmup else 0
    if cfg.nesterov and cfg.momentum == 0:
        raise UserError("--momentum 0 does not work with Nesterov momentum: give --nesterov 0")
    if args.milestones is not None:
        pairs = zip((0, *args.milestones), (*args.milestones, cfg.epochs + 1))
        if any(one >= two for one, two in pairs):
            raise UserError(
                f"--milestones {','.join(map(str, args.milestones))}: expected increasing epochs, "
                f"all <= --epochs {cfg.epochs}"
            )
    else:
        cfg.milestones = tuple(scaled(e, cfg.epochs, protocol) for e in milestones)
    cfg.padding = protocol.padding
    return cfg


def describe_recipe(cfg: argparse.Namespace, augmented: bool) -> str:
    """The optimiser of a resolved recipe, in a line. `augmented`: with the protocol's padding."""
    smoothing = getattr(cfg, "label_smoothing", None)
    return (
        f"protocol {cfg.protocol}: lr {cfg.lr:g}, falls after {cfg.milestones}, momentum "
        f"{cfg.momentum:g}{' (Nesterov)' if cfg.nesterov else ''}, weight decay "
        f"{cfg.weight_decay:g}, batch {cfg.batch_size}"
        + (f", warm-up {cfg.warmup}" if cfg.warmup else "")
        + (f", {cfg.accumulate} gradient accumulation steps" if cfg.accumulate > 1 else "")
        + (f", label smoothing {smoothing:g}" if smoothing else "")
        + (f", {PADDINGS.get(cfg.padding, f'{cfg.padding} padding')}" if augmented else "")
    )


def resolve_data(cfg: argparse.Namespace, knows: dict, protocol: Protocol) -> None:
    """Fill in, in place, what `add_data_flags` and --workers left open: from `knows`, then from
    `protocol`."""
    for flag in ("data_name", "num_class", "img_size", "fit"):
        given, known = getattr(cfg, flag), knows.get(flag)
        if given is not None and known is not None and given != known:
            raise UserError(f"--{flag} {given} contradicts the checkpoint, which has {known}")
        setattr(cfg, flag, known if given is None else given)
    if cfg.data_name is None:
        raise UserError(f"--data_name is required: {DATA_NAMES}")
    if cfg.img_size is None:
        cfg.img_size = IMG_SIZE.get(cfg.data_name, protocol.img_size)
    if cfg.workers is None:
        cfg.workers = min(8, utils.cpus())
    cfg.img_root = cfg.img_root or knows.get("img_root") or "./datasets"
    constants = cfg.mean_std
    if constants is None and "mean" in knows:
        constants = tuple(knows["mean"]), tuple(knows["std"])
    elif constants != "measured" and not isinstance(constants, tuple):
        constants = protocol.constants.get(constants or cfg.data_name)
    cfg.mean_std = None if constants == "measured" else constants


def load_data(cfg: argparse.Namespace, batch_size: int | None = None):
    """The dataset of a resolved cfg. Raises UserError if --num_class contradicts it, or it is
    smaller than the `batch_size` that was given."""

    data = stream.load(
        cfg.data_name,
        cfg.img_root,
        cfg.mean_std,
        cfg.img_size,
        None if cfg.flip is None else bool(cfg.flip),
        cfg.workers,
        fit=cfg.fit,
        val=getattr(cfg, "val", None),
        seed=getattr(cfg, "seed", 0),
        unlabeled=getattr(cfg, "unlabeled", None),
    )
    if cfg.num_class not in (None, data.train.num_class):
        raise UserError(
            f"expected {cfg.num_class} classes (--num_class or the checkpoint), "
            f"{cfg.data_name} has {data.train.num_class}"
        )
    if batch_size is not None and batch_size > len(data.train):
        raise UserError(
            f"--batch_size {batch_size}: there are {len(data.train)} training images in {data.name}"
        )
    if utils.world() > 1 and min(cfg.batch_size, len(data.train)) < 2 * utils.world():
        raise UserError(
            f"--batch_size {cfg.batch_size}, {len(data.train)} training images: {utils.world()} "
            f"processes need two images each, {2 * utils.world()} in all"
        )
    return data


def describe_images(data) -> str:
    """How many images there are, and of which size."""
    val = "" if data.val is None else f", {len(data.val)} validation"
    bare = int((data.train.labels < 0).sum())
    bare = f" ({bare} of them without labels)" if bare else ""
    return (
        f"{len(data.train)} training{bare}{val} and {len(data.test)} test images of "
        f"{data.train.size} pixels"
    )


def describe_data(cfg: argparse.Namespace, data) -> dict:
    """What a checkpoint remembers of the data."""
    return dict(
        data_name=data.name,
        img_root=cfg.img_root,
        img_size=cfg.img_size,
        num_class=data.train.num_class,
        classes=list(data.train.classes),
        mean=list(data.train.mean),
        std=list(data.train.std),
        **(dict(fit=cfg.fit) if cfg.fit else {}),
    )
