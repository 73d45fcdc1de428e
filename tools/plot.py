"""Draw figures of runs and networks, as PNG files.

    python tools/plot.py curves runs/base runs/st runs/at --metric test_top1 --out curves.png
    python tools/plot.py tsne runs/*/model_best.pth.tar --out tsne.png
    python tools/plot.py correlation --t_model teacher.pth runs/at/model_best.pth.tar --out corr.png
    python tools/plot.py attention runs/at/model_best.pth.tar --images 3,17,42 --out attention.png
    python tools/plot.py boxes runs/det/model_best.pth.tar --images 3,17 --out boxes.png

A RUN is a run directory. A MODEL is a checkpoint: one of this repository, a .safetensors file, or a
public one. Network, dataset and normalisation are read from the checkpoints. If they differ, the
first checkpoint with a dataset decides.
"""

import argparse
import csv
import io
import math
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import dataset  # noqa: E402
import network  # noqa: E402
import utils  # noqa: E402
from engine import cli, console, foreign, published, stream  # noqa: E402
from engine.checkpoint import Weights, find_weights  # noqa: E402
from engine.find_taps import ensure_taps  # noqa: E402
from engine.run import read_metrics  # noqa: E402
from tools.eval import build  # noqa: E402
from utils import UserError  # noqa: E402
from engine.run import import_matplotlib  # noqa: E402

STYLE = {
    "font.size": 10,
    "axes.titlesize": 10,
    "figure.titlesize": 12,
    "savefig.dpi": 110,
    "grid.alpha": 0.3,
}
WORDS = dict(  # columns of metrics.csv
    ce="training cross-entropy",
    kd="distillation loss, unweighted",
    lr="learning rate",
    train_top1="training top-1 (%)",
    test_loss="test cross-entropy",
    test_top1="test top-1 (%)",
    test_top5="test top-5 (%)",
    val_loss="validation cross-entropy",
    val_top1="validation top-1 (%)",
    val_top5="validation top-5 (%)",
)
OF_A_RUN = ("checkpoint.pth.tar", "model_best.pth.tar")  # labelled with the name of their folder
BATCH = 100
MANY = 20  # largest number of classes whose names are written at an axis
LEGEND = 100  # largest number of names in a legend


# --- helpers of all figures -----------------------------------------------------------------------


def colors(count: int) -> np.ndarray:
    """`count` different RGB colours, (count, 3)."""
    from matplotlib import colormaps

    if count <= 10:
        return np.array(colormaps["tab10"].colors[:count])
    return colormaps["turbo"](np.linspace(0, 1, count))[:, :3]


def panels(head: str, titles: list[str], width: float, height: float, columns=3, legend=()):
    """(figure, axes): one axis of width x height inches per title, in rows; next to them a legend
    with the names in `legend` and their colours."""
    from matplotlib.figure import Figure  # not pyplot: no window system, no global state
    from matplotlib.lines import Line2D

    columns = min(columns, len(titles))
    rows = math.ceil(len(titles) / columns)
    legend = legend if len(legend) <= LEGEND else ()
    high = rows * height + 0.5
    beside = math.ceil(len(legend) / int(4.4 * high))  # columns of names
    over = columns * width
    wide = over + beside * (0.6 + 0.085 * max(map(len, legend), default=0))
    figure = Figure(figsize=(wide, high), layout="constrained")
    figure.suptitle(textwrap.fill(head, int(10 * over)), x=over / wide / 2)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[len(titles) :]:
        axis.axis("off")
    for axis, title in zip(axes, titles):
        axis.set_title("\n".join(textwrap.fill(x, int(10 * width)) for x in title.split("\n")))
    if legend:
        dots = [Line2D([], [], color=c, marker="o", linestyle="") for c in colors(len(legend))]
        figure.legend(dots, legend, loc="outside right upper", ncols=beside, frameon=False)
    return figure, axes[: len(titles)]


def short(paths: list[str]) -> list[str]:
    """Labels of runs and checkpoints: the names of their folders, or the paths if names repeat."""
    full = [Path(path).absolute() for path in paths]
    found = [path.parent.name if path.name in OF_A_RUN else path.name for path in full]
    return found if len(set(found)) == len(found) else paths


def titled(paths: list[str], found: list[Weights]) -> list[str]:
    """The labels of `short` with the names of the networks."""
    kinds = [foreign.file_name(weights.name) for weights in found]
    return [f"{name} ({kind})" for name, kind in zip(short(paths), kinds)]


def load(args: argparse.Namespace, t_model: str | None = None, t_name: str | None = None):
    """(weights, networks, test images, (device, precision)) of args.what; the teacher `t_model` is
    the last one."""
    given = args.net_name or [None]
    given = given * len(args.what) if len(given) == 1 else given
    if len(given) != len(args.what):
        raise UserError(
            f"--net_name: expected 1 or {len(args.what)} names, one per MODEL, got {len(given)}"
        )
    found = [find_weights(*pair, "net_name", "MODEL") for pair in zip(given, args.what)]
    if t_model:
        found.append(find_weights(t_name, t_model, "t_name", "t_model"))
    knows = {}
    for weights in reversed(found):
        knows |= weights.meta
    recipe = argparse.Namespace(**vars(args))
    cli.resolve_data(recipe, knows, published.PROTOCOLS["kdzoo"])
    device = utils.select_device(args.device, args.cuda)
    precision = utils.precision(device, args.amp)
    data = cli.load_data(recipe)
    nets = []
    for weights in found:
        net = build(weights, data, "cpu")
        ensure_taps(net, weights.name, data.test.num_class, data.test.size)
        nets.append(net.eval().to(device))
    return found, nets, data.test, (device, precision)


def pick(images: dataset.Images | dataset.Files, index: np.ndarray):
    """The images with these indices."""
    part = "items" if isinstance(images, dataset.Files) else "pixels"
    kept = {key: getattr(images, key)[index] for key in (part, "labels")}
    return replace(images, **kept)


@torch.no_grad()
def look(
    net: nn.Module, name: str, images, where: tuple[torch.device, utils.Precision], tap: str
) -> list[Tensor]:
    """The logits of all images, then the features of the tap 'feat' or 'stages' ('out': only the
    logits), in float32 on the CPU."""
    device, precision = where
    tapped, parts = network.Tapped(net, (tap,)), []
    for img, *_ in stream.test_batches(images.to(device), BATCH):
        with precision.autocast():
            seen = tapped(img)
        more = dict(out=[], feat=[seen.feat], stages=seen.stages)[tap]
        parts.append([x.float().cpu() for x in (seen.out, *more)])
    parts = [torch.cat(part) for part in zip(*parts)]
    if not all(part.isfinite().all() for part in parts):
        raise UserError(f"{name}: its output has NaN or infinite values; use another checkpoint")
    return parts


# --- the figures ----------------------------------------------------------------------------------


def rows_of(folder: str) -> list[dict]:
    """The epochs of a run."""
    try:
        if not Path(folder).is_dir():
            raise UserError(f"{folder}: run directory not found")
        if not (Path(folder) / "metrics.csv").is_file():
            raise UserError(
                f"{folder} has no metrics.csv; give a run directory with at least one epoch"
            )
        return read_metrics(folder)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{folder[:200]} cannot be read ({error.strerror})") from error
    except (ValueError, TypeError, csv.Error) as error:
        reason = utils.first_line(error)
        raise UserError(f"{folder}/metrics.csv is damaged or cut short ({reason})") from error


def curves(args: argparse.Namespace):
    """Metrics of several runs over the epochs: one panel per metric, one line per run."""
    from matplotlib.ticker import MaxNLocator

    runs, legend = [rows_of(folder) for folder in args.what], args.labels or short(args.what)
    numbers = {k: v for rows in runs for row in rows for k, v in row.items() if v != str(v)}
    scores = [x for x in ("test_top1", "val_top1") if x in numbers]  # the metric that chooses best
    metrics = args.metric or ["ce", *scores]
    for metric in metrics:
        utils.named(numbers, metric, "metric")
    titles = [WORDS.get(metric, metric) for metric in metrics]
    figure, axes = panels("Training, epoch by epoch", titles, 4.4, 3.4, legend=legend)
    for metric, axis in zip(metrics, axes):
        for rows, name, color in zip(runs, legend, colors(len(runs))):
            points = [(i, row[metric]) for i, row in enumerate(rows, 1) if metric in row]
            axis.plot(*zip(*points or [(math.nan,) * 2]), ".-", color=color, label=name)
        axis.set(xlabel="epoch, all phases", ylabel=metric)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid()
    return figure


def tsne(args: argparse.Namespace):
    """t-SNE of the pooled features of test images, coloured by class: one panel per network."""
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        raise UserError("scikit-learn is not installed; run pip install scikit-learn") from None

    found, nets, images, where = load(args)
    legend, titles = images.classes, args.labels or titled(args.what, found)
    order = np.random.default_rng(args.seed).permutation(len(images))[: args.images]
    images = pick(images, order)
    head = f"t-SNE of the pooled features of {len(order)} test images, coloured by class"
    figure, axes = panels(head, titles, 4, 4, legend=legend)
    color = colors(len(legend))[images.labels.numpy()]
    perplexity = min(30, (len(order) - 1) / 3)
    for net, title, axis in zip(nets, titles, axes):
        _, feat = look(net, title, images, where, "feat")
        try:
            places = TSNE(perplexity=perplexity, random_state=args.seed).fit_transform(feat.numpy())
        except ValueError as error:  # for example only one image or one feature
            reason = utils.first_line(error)
            raise UserError(f"{title}: t-SNE failed ({reason}); give more --images") from error
        axis.scatter(*places.T, c=color, s=7, linewidths=0)
        axis.set(xlabel="t-SNE 1", ylabel="t-SNE 2", xticks=[], yticks=[])
    return figure


def correlations(logits: Tensor) -> np.ndarray:
    """Correlation matrix (K, K) of logits (N, K). A constant logit has the correlation 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.nan_to_num(np.corrcoef(logits.double().numpy(), rowvar=False))


def correlation(args: argparse.Namespace):
    """Correlation matrix of the student's logits minus the teacher's: one heat map per student."""
    found, nets, images, where = load(args, args.t_model, args.t_name)
    titles = args.labels or titled(args.what, found[:-1])
    *seen, teacher = (
        correlations(look(net, weights.path, images, where, "out")[0])
        for net, weights in zip(nets, found)
    )
    off = [matrix - teacher for matrix in seen]
    limit = max(np.abs(matrix).max() for matrix in off) or 1.0
    titles = [
        f"{title}\nmean absolute difference {np.abs(matrix).mean():.4f}"
        for title, matrix in zip(titles, off)
    ]
    head = (
        f"Correlation of the classes' logits over {len(images)} test images: "
        f"student minus teacher, {titled([args.t_model], found[-1:])[0]}"
    )
    figure, axes = panels(head, titles, 4.2, 4.2)
    for axis, matrix in zip(axes, off):
        shown = axis.imshow(matrix, cmap="RdBu_r", vmin=-limit, vmax=limit)
        axis.set(xlabel="class", ylabel="class")
        if len(matrix) <= MANY:
            axis.set_xticks(range(len(matrix)), images.classes, rotation=90)
            axis.set_yticks(range(len(matrix)), images.classes)
    figure.colorbar(shown, ax=axes, label="difference of the correlations", shrink=0.7)
    return figure


def attention_maps(fm: Tensor, size: int) -> Tensor:
    """Mean over channels of the squared feature maps (B, C, H, W), resized to (B, size, size)."""
    fm = fm.square().mean(1, keepdim=True)
    return F.interpolate(fm, size=(size, size), mode="bilinear")[:, 0]


def attention(args: argparse.Namespace):
    """Attention maps of the stages on test images: one row per image and network."""
    found, nets, images, where = load(args)
    check_places(args, len(images))
    images, titles = pick(images, np.array(args.images)), args.labels or titled(args.what, found)
    seen = [look(net, name, images, where, "stages") for net, name in zip(nets, titles)]
    img, target, _ = next(stream.test_batches(images, len(images)))
    mean, std = (torch.tensor(x) for x in (images.mean, images.std))
    pixels = (img.permute(0, 2, 3, 1) * std + mean).clamp(0, 1).numpy()
    columns = max(map(len, seen))  # the stages, and the image instead of the logits
    heads = ["image", *(f"stage {i}" for i in range(1, columns))]
    heads += [""] * (columns * (len(images) * len(nets) - 1))
    head = (
        "Attention maps: mean over channels of the squared activation, each from its smallest "
        "(blue) to its largest (red) value"
    )
    aside = 0.08 * max(map(len, titles))  # inches, for the text on the left of the rows
    figure, axes = panels(head, heads, 1.5 + aside / columns, 1.75, columns)
    for axis in axes:
        axis.set(xticks=[], yticks=[], frame_on=False)
    rows = zip(*[iter(axes)] * columns)
    for i, number in enumerate(args.images):
        for name, (logits, *maps) in zip(titles, seen):
            first, *others = next(rows)
            first.imshow(pixels[i])
            chance = logits[i].softmax(0).max()
            said, is_a = images.classes[logits[i].argmax()], images.classes[target[i]]
            text = f"image {number}: {is_a}\n{name}\npredicted: {said}, {chance:.0%}"
            first.set_ylabel(text, rotation=0, ha="right", va="center")
            for axis, fm in zip(others, maps):
                axis.imshow(pixels[i].mean(2), cmap="gray", vmin=0, vmax=1)
                over = attention_maps(fm[i : i + 1], images.size)[0].numpy()
                axis.imshow(over, cmap="jet", alpha=0.5)
                axis.set_xlabel(f"{fm.shape[2]} x {fm.shape[3]}", fontsize=8)
    return figure


def check_places(args: argparse.Namespace, count: int) -> None:
    """Raise UserError if --images has the number of an image that does not exist."""
    for i in args.images:
        if i >= count:
            raise UserError(f"--images: expected int from 0 to {count - 1}, got {i}")


def boxes(args: argparse.Namespace):
    """Boxes in validation images: the annotations, and the detections of each detector."""
    from detection import coco, train_det

    device = utils.select_device(args.device, args.cuda)
    precision = utils.precision(device, args.amp)
    found = [train_det.find(None, path, "s") for path in args.what]
    data = coco.load(args.img_root or found[0].meta.get("img_root", train_det.FOLDER)).val
    check_places(args, len(data))
    names = data.categories
    titles = args.labels or [f"{n} ({f.name})" for n, f in zip(short(args.what), found)]
    columns = 1 + len(found)
    head = f"Annotated boxes, and those found with a score of at least {args.score:g}"
    heads = ["annotated", *titles] + [""] * (columns * (len(args.images) - 1))
    figure, axes = panels(head, heads, 2.6, 2.7, columns)
    color = dict(zip(names, colors(len(names))))

    def draw(axis, boxes, labels, scores):
        for (x1, y1, x2, y2), label, score in zip(boxes.tolist(), labels.tolist(), scores):
            paint = color.get(label, "grey")  # grey: the label is not a category
            axis.plot([x1, x2, x2, x1, x1], [y1, y1, y2, y2, y1], color=paint, linewidth=1.5)
            text = names.get(label, f"{label}") + score
            axis.text(x1, y1, text, fontsize=7, color="white", backgroundcolor=paint)

    nets = [f.build(f.meta["num_class"], f.view, 0).to(device).eval() for f in found]
    rows = zip(*[iter(axes)] * columns)
    for i, row in zip(args.images, rows):
        img, target = data[i]
        for axis in row:
            axis.imshow(img.permute(1, 2, 0).numpy())
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(f"image {data.ids[i]}")
        draw(row[0], target["boxes"], target["labels"], [""] * len(target["labels"]))
        for axis, net in zip(row[1:], nets):
            with torch.no_grad(), precision.autocast():
                (out,) = net([img.to(device) / 255])
            out = {key: x.cpu()[out["scores"].cpu() >= args.score] for key, x in out.items()}
            draw(axis, out["boxes"], out["labels"], [f" {x:.2f}" for x in out["scores"]])
    return figure


COMMANDS = dict(curves=curves, tsne=tsne, correlation=correlation, attention=attention, boxes=boxes)


def parse(argv: list[str]) -> argparse.Namespace:
    first = cli.Parser(prog="plot.py", description=__doc__)
    first.add_argument("command", choices=COMMANDS, help="COMMAND --help lists its flags")
    command = first.parse_args(argv[:1]).command
    parser = cli.Parser(prog=f"plot.py {command}", description=COMMANDS[command].__doc__)
    parser.set_defaults(command=command, flip=None)  # only training images are flipped
    add = parser.add_argument
    what = "RUN" if command == "curves" else "MODEL"
    kinds = dict(RUN="run directory", MODEL="checkpoint or .safetensors file")
    add("what", nargs="+", type=cli.filled, metavar=what, help=kinds[what])
    add("--out", type=cli.filled, required=True, metavar="FILE.png", help="the file to write")
    add("--force", action="store_true", help="overwrite an existing file")
    names = dict(nargs="+", type=cli.filled, metavar="NAME")
    add("--labels", **names, help=f"one label per {what} (default: names of their folders)")
    if command == "curves":
        text = "columns of metrics.csv (default: ce test_top1; ce val_top1 with a validation set)"
        add("--metric", nargs="+", help=text)
    elif command == "tsne":
        few = cli.number(int, 5)
        text = "number of random test images (default 2000)"
        add("--images", type=few, default=2000, metavar="N", help=text)
        seed = cli.number(int, 0, 2**32 - 1)
        add("--seed", type=seed, default=2, metavar="N", help="random seed (default 2)")
    elif command == "correlation":
        teacher = "the teacher's checkpoint"
        add("--t_model", type=cli.filled, required=True, metavar="FILE", help=teacher)
        add(
            "--t_name",
            type=cli.filled,
            metavar="NAME",
            help="network of the teacher, if the checkpoint does not name it",
        )
    else:
        several = cli.comma(cli.number(int, 0))
        text = f"indices of {'validation' if command == 'boxes' else 'test'} images, from 0"
        add("--images", type=several, required=True, metavar="N,N", help=text)
    if command == "boxes":
        add(
            "--score",
            type=cli.number(float, 0, 1),
            default=0.5,
            metavar="X",
            help="draw detections with at least this score (default 0.5)",
        )
        text = "folder of the COCO data (default: that of the checkpoint)"
        add("--img_root", type=cli.filled, metavar="DIR", help=text)
        cli.add_device_flags(parser)
    elif command != "curves":
        text = "network, if a checkpoint does not name it: one name for all, or one per MODEL"
        add("--net_name", **names, help=text)
        cli.add_data_flags(parser)
        cli.add_device_flags(parser)
    args = parser.parse_args(argv[1:])
    if args.labels and len(args.labels) != len(args.what):
        raise UserError(
            f"--labels: expected {len(args.what)} labels, one per {what}, got {len(args.labels)}"
        )
    return args


@console.command
def main(argv: list[str] | None = None):
    args = parse(sys.argv[1:] if argv is None else list(argv))
    out = Path(args.out)
    if out.suffix != ".png":
        raise UserError(f"--out {out}: expected a name that ends in .png")
    cli.writable_file(out, args.force)
    matplotlib = import_matplotlib()
    if matplotlib is None:
        raise UserError("matplotlib is not installed; run pip install matplotlib")
    with matplotlib.rc_context(STYLE):
        figure, png = COMMANDS[args.command](args), io.BytesIO()
        try:
            figure.savefig(png, format="png")
            out.write_bytes(png.getvalue())
        except (OSError, ValueError) as error:  # ValueError: too many pixels
            reason = utils.first_line(error)
            raise UserError(f"--out {out} cannot be written ({reason})") from error
    print(out)
    return figure


if __name__ == "__main__":
    main()
