"""Evaluate a checkpoint on the test images: accuracy, loss, size, speed, agreement with a teacher.

    python tools/eval.py runs/at/model_best.pth.tar --teacher runs/base/model_best.pth.tar
    python tools/eval.py runs/t1/model_best.pth.tar runs/t2/model_best.pth.tar --ensemble probs

Top-1, top-5 and loss are equal to those of the training, since function, images and precision are
the same. Network, dataset and normalisation are read from the checkpoint.
"""

import argparse
import json
import math
import sys
import time
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import utils  # noqa: E402  before torch: it sets how torch's threads wait
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import network  # noqa: E402
from engine import cli, console, published, stream  # noqa: E402
from engine.adapter import count_macs  # noqa: E402
from engine.channels import check_grey  # noqa: E402
from engine.checkpoint import (  # noqa: E402
    Weights,
    find_weights,
    identify,
    read_checkpoint,
    read_meta,
    read_weights,
)
from engine.ensemble import KINDS, Ensemble, nets_of  # noqa: E402
from engine.find_taps import dry_pass  # noqa: E402
from engine.outputs import match_classes, notes_of  # noqa: E402
from engine.teachers import agreed  # noqa: E402
from utils import UserError  # noqa: E402

SECONDS = 1.0  # total time of the measured forward passes


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(prog="eval.py", description=__doc__)
    add = parser.add_argument
    add(
        "checkpoint",
        metavar="CHECKPOINT",
        nargs="+",
        help="checkpoint or .safetensors file; several are evaluated as an ensemble",
    )
    add(
        "--ensemble",
        choices=KINDS,
        help="for several checkpoints: mean of their probabilities or of their logits",
    )
    add(
        "--net",
        metavar="NAME[,NAME]",
        help="network, if the checkpoint does not name it; one name per checkpoint",
    )
    add(
        "--which",
        choices=("student", "peer"),
        default="student",
        help="which network of a dml checkpoint (default student)",
    )
    add(
        "--key",
        type=cli.filled,
        metavar="KEY",
        help="entry of the checkpoint that holds the weights",
    )
    classes = dict(type=cli.class_lines, metavar="FILE")
    add(
        "--classes",
        **classes,
        help="text file that maps the outputs to the dataset's classes: one line per class, with "
        "the name or index of the network's class",
    )
    add(
        "--teacher",
        metavar="CHECKPOINT",
        help="also compare with this teacher: print how often both predict the same class",
    )
    add("--t_key", type=cli.filled, metavar="KEY", help="like --key, for the teacher")
    add("--t_classes", **classes, help="like --classes, for the teacher")
    add("--teacher_net", metavar="NAME", help="like --net, for the teacher")
    batch = "batch size (default: as in training)"
    add("--batch_size", type=cli.number(int, 1), metavar="N", help=batch)
    add("--json", action="store_true", help="print the result as one JSON object")
    cli.add_data_flags(parser)
    cli.add_device_flags(parser)
    parser.set_defaults(flip=None)  # only training images are flipped
    args = parser.parse_args(argv)
    for flag in ("teacher_net", "t_key", "t_classes"):
        if getattr(args, flag) and not args.teacher:
            raise UserError(f"--{flag} has no effect without --teacher CHECKPOINT; give both")
    if args.key and args.which == "peer":
        raise UserError(f"--key {args.key}: --which peer already chooses the entry; give only one")
    check_ensemble(args, len(args.checkpoint))
    return args


def check_ensemble(args: argparse.Namespace, count: int) -> None:
    """Raise UserError for flags that do not fit the number of checkpoints."""
    if count == 1 and args.ensemble:
        raise UserError(
            f"--ensemble {args.ensemble} has no effect with one checkpoint; leave it out or give "
            "several"
        )
    if count > 1 and not args.ensemble:
        raise UserError(f"{count} checkpoints given; add --ensemble probs or --ensemble logits")
    if args.ensemble == "confidence":
        raise UserError(
            "--ensemble confidence: not for evaluation, since it weights the logits by the labels; "
            "give probs or logits"
        )
    if count > 1 and args.which == "peer":
        raise UserError(f"--which peer: expected one checkpoint, got {count}")
    names = args.net.split(",") if args.net else []
    if count > 1 and args.net and (len(names) != count or not all(names)):
        raise UserError(f"--net {args.net}: expected {count} names, one per checkpoint")


def find_peer(name: str | None, path: str) -> Weights:
    """The second network of a checkpoint of mutual learning. The file names only the student."""
    checkpoint = read_checkpoint(path)
    if not isinstance(checkpoint.get("net1"), dict):
        raise UserError(
            f"--which peer: {path} has only one network; peers are in checkpoints of mutual "
            "learning"
        )
    state = read_weights(checkpoint["net1"], path)
    meta = read_meta(checkpoint, path)
    name = name or (identify(state) or [None])[0]
    if name is None:
        raise UserError(f"{path} does not say which network the peer is; give --net NAME")
    return Weights(name, state, meta, path)


def build(
    found: Weights, data, device, classes: tuple[str, ...] | None = None, flag: str = ""
) -> nn.Module:
    """The network with its weights, as training evaluates it. classes: the lines of `--{flag}`.
    Raises UserError if they do not fit."""
    num_class, size = data.train.num_class, data.train.size
    found.outputs = match_classes(
        *(found, data.train.classes, data.name, size, ""),
        *(classes, f"--{flag}", "its predictions are compared with the labels"),
        advice=f"--{flag} FILE maps its outputs to the dataset's classes" if flag else "",
    )
    net = found.load(num_class, size)
    dry_pass(net, found.name, num_class, size)
    found.say(notes_of(net), check_grey(net, found.name, data.test))
    for line in [*found.notes, *found.warnings(data.train)]:
        print(line, file=sys.stderr)
    return net.to(device, memory_format=torch.channels_last)


def scores(net, teacher, images, precision, batch_size) -> tuple[dict, Tensor]:
    """(result of `utils.evaluate` for `net`, the first batch). With a teacher the result also has
    its agreement with `net`; for an ensemble also the top-1 accuracy of each member."""
    first, answers, divergence = [], [], []
    members = nets_of(net) if isinstance(net, Ensemble) else []
    chosen = [[] for _ in members]

    def look(net, args, out):
        if not first:
            first.append(args[0])
        if teacher is not None:
            s, t = out.float(), teacher(args[0]).float()
            answers.append(torch.stack([s.argmax(1), t.argmax(1)]))
            kl = F.kl_div(s.log_softmax(1), t.log_softmax(1), reduction="sum", log_target=True)
            divergence.append(kl)

    def note(classes):
        return lambda net, args, out: classes.append(out.argmax(1))

    hooks = [x.register_forward_hook(note(own)) for x, own in zip(members, chosen)]
    hooks.append(net.register_forward_hook(look))
    score = utils.evaluate(net, stream.test_batches(images, batch_size), precision)
    for hook in hooks:
        hook.remove()
    result = {key: score[f"test_{key}"] for key in ("top1", "top5", "loss")}
    if members:
        right = [torch.cat(own) == images.labels for own in chosen]
        result["members_top1"] = [100 * x.double().mean().item() for x in right]
    if teacher is not None:
        s, t = torch.cat(answers, 1)
        result["agreement"] = 100 * (s == t).double().mean().item()
        result["teacher_top1"] = 100 * (t == images.labels).double().mean().item()
        result["kl"] = torch.stack(divergence).sum().item() / len(images)
    return result, first[0]


@torch.no_grad()
def speed(net: nn.Module, img: Tensor, device: torch.device, precision: utils.Precision) -> float:
    """Images per second of only the forward pass, on a batch that is on the device. The median of
    the passes in SECONDS, at least three, after two warm-up passes."""
    times = []
    while len(times) < 5 or sum(times[2:]) < SECONDS:
        began = time.perf_counter()
        with precision.autocast():
            net(img)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return len(img) / median(times[2:])


def known(args: argparse.Namespace, meta: dict, classes: tuple[str, ...] | None) -> dict:
    """The entries of `meta` about the data, without those that the flags replace: only if the
    classes are mapped (`classes`) may a flag contradict the checkpoint. The number of classes is
    left out, since `match_classes` compares it."""
    free = {"data_name", "img_size"} if classes else set()
    contradicted = {k for k in free if getattr(args, k) not in (None, meta.get(k))}
    gone = {"num_class", *contradicted, *(["img_root"] if "data_name" in contradicted else [])}
    return {key: value for key, value in meta.items() if key not in gone}


def measure(args: argparse.Namespace) -> dict:
    """All results for the checkpoint, with floats as in metrics.csv."""
    files, names = args.checkpoint, [args.net]
    if len(files) > 1:
        names = args.net.split(",") if args.net else [None] * len(files)
    if args.which == "peer":
        found = [find_peer(args.net, files[0])]
    else:
        how = dict(key=args.key, key_flag="key")
        found = [find_weights(*x, "net", "CHECKPOINT", **how) for x in zip(names, files)]
    teacher = None
    knows = agreed([(x.path, known(args, x.meta, args.classes)) for x in found], args)
    if args.teacher:
        what = args.teacher_net, args.teacher, "teacher_net", "teacher"
        teacher = find_weights(*what, key=args.t_key, key_flag="t_key")
        knows = {**known(args, teacher.meta, args.t_classes), **knows}
    recipe = argparse.Namespace(**vars(args))
    cli.resolve_data(recipe, knows, published.PROTOCOLS["kdzoo"])
    device = utils.select_device(args.device, args.cuda)
    precision = utils.precision(device, args.amp)
    data = cli.load_data(recipe)
    nets = [build(x, data, device, args.classes, "classes") for x in found]
    net = Ensemble(nets, args.ensemble) if args.ensemble else nets[0]
    tnet = build(teacher, data, device, args.t_classes, "t_classes").eval() if teacher else None
    images = data.test.to(device)
    score, img = scores(net, tnet, images, precision, args.batch_size)
    with torch.no_grad():
        macs = count_macs(net, lambda: net(img[:1]))
    result = dict(
        checkpoint=" ".join(files),
        network=",".join(x.name for x in found),
        parameters=network.count_parameters(net),
        macs=macs,
        data_name=data.name,
        test_images=len(images),
        img_size=images.size,
        num_class=images.num_class,
        mean=list(images.mean),
        std=list(images.std),
        machine=utils.describe_device(device, precision),
        **score,
        img_per_s=speed(net, img, device, precision),
        batch_size=len(img),
    )
    if teacher:
        result |= dict(teacher=args.teacher, teacher_network=teacher.name)
    if args.ensemble:
        result["ensemble"] = args.ensemble
        result["members_top1"] = [float(f"{x:.6g}") for x in score["members_top1"]]
    return {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in result.items()}


def lines(r: dict) -> list[str]:
    """The result as aligned lines."""
    rows = dict(
        checkpoint=r["checkpoint"],
        network=f"{r['network']}, {r['parameters']:,} parameters, "
        f"{r['macs']:,} multiply-adds per image",
        data=f"{r['data_name']}, {r['test_images']} test images of {r['img_size']} pixels, "
        f"{r['num_class']} classes",
        normalised=f"mean {r['mean']}, std {r['std']}",
        machine=r["machine"],
    )
    rows |= {"top-1": f"{r['top1']:.2f} %", "top-5": f"{r['top5']:.2f} %", "loss": r["loss"]}
    rows["speed"] = (
        f"{r['img_per_s']:,.0f} img/s, only forward passes, batches of {r['batch_size']}"
    )
    if "ensemble" in r:
        each = ", ".join(f"{x:.2f} %" for x in r["members_top1"])
        rows["ensemble"] = f"{r['ensemble']}; top-1 of each member: {each}"
    if "teacher" in r:
        rows["teacher"] = f"{r['teacher']}, {r['teacher_network']}, top-1 {r['teacher_top1']:.2f} %"
        rows["agreement"] = f"{r['agreement']:.2f} % of the images: same class as the teacher"
        rows["KL"] = f"{r['kl']:g}, KL(teacher || student), mean over images"
    return [f"{name:<11} {text}" for name, text in rows.items()]


@console.command
def main(argv: list[str] | None = None) -> dict:
    args = parse(argv)
    with redirect_stdout(sys.stderr) if args.json else nullcontext():
        result = measure(args)
    if args.json:
        odd = {k: None for k, v in result.items() if isinstance(v, float) and not math.isfinite(v)}
        print(json.dumps(result | odd))  # JSON has no nan
    else:
        print(*lines(result), sep="\n")
    return result


if __name__ == "__main__":
    main()
