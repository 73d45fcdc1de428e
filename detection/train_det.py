"""Distil an object detector on COCO: with ReviewKD on the levels of the feature pyramid, with DKD
on the class logits of the regions, or with both.

    python detection/train_det.py --kd_mode none --s_name fasterrcnn_resnet101 --note r101
    python detection/train_det.py --kd_mode reviewkd --t_model runs/r101/model_best.pth.tar \\
                                  --s_name fasterrcnn_resnet18 --s_pretrained

The first command trains a teacher, or a baseline without a teacher. The detectors are those of
torchvision. Detector and image sizes are read from checkpoints. `--kd_mode MODE --help` also lists
the flags of a mode.
"""

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Callable

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import utils  # noqa: E402  before torch: it sets how torch's threads wait
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torchvision import models  # noqa: E402
from torchvision.models import detection as detectors  # noqa: E402
from torchvision.models.detection.anchor_utils import AnchorGenerator  # noqa: E402
from torchvision.models.detection.backbone_utils import (  # noqa: E402
    BackboneWithFPN,
    resnet_fpn_backbone,
)
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7  # noqa: E402
from torchvision.ops.misc import FrozenBatchNorm2d  # noqa: E402

from detection import coco  # noqa: E402
from engine import cli, console, distributed, foreign, published  # noqa: E402
from engine.checkpoint import (  # noqa: E402
    check_meta,
    check_weights,
    find_weights,
    load_weights,
    sha256,
)
from engine.run import Run  # noqa: E402
from kd_losses.dkd import DKD  # noqa: E402
from kd_losses.reviewkd import ReviewKD  # noqa: E402
from utils import UserError  # noqa: E402

# --- detectors ------------------------------------------------------------------------------------

KINDS = dict(
    fasterrcnn=detectors.FasterRCNN, maskrcnn=detectors.MaskRCNN, retinanet=detectors.RetinaNet
)
BACKBONES = ("resnet18", "resnet50", "resnet101", "mobilenet_v2")
DETECTORS = {f"{kind}_{name}": (kind, name) for kind in KINDS for name in BACKBONES}
del DETECTORS["retinanet_mobilenet_v2"]
# torchvision has COCO weights for these
TRAINED = ("fasterrcnn_resnet50", "maskrcnn_resnet50", "retinanet_resnet50")


FOLDER = "./datasets/coco"
# smallest and largest values of the fields of a View
SIDE, ANCHOR, ROIS = (32, 8192), (1, 1024), (2, 10_000)


@dataclass(frozen=True)
class View:
    """Image size and regions of a detector.

    min_size: lengths of the shorter side in pixels; training draws one per image, evaluation uses
    the last. max_size: maximum of the longer side. anchor: side of the smallest anchor, doubled
    from level to level. rois: regions per image on which the box head is trained.
    """

    min_size: tuple[int, ...] = (640, 672, 704, 736, 768, 800)
    max_size: int = 1333
    anchor: int = 32
    rois: int = 512


def build(
    name: str, num_class: int, view: View, weights: str = "fresh", norm: str = "batch"
) -> nn.Module:
    """A detector with five levels of 256 channels, at strides 4 to 64 (RetinaNet: 8 to 128).

    num_class: with the background, which is class 0. weights: 'fresh' (random), 'backbone'
    (torchvision's ImageNet weights; stem and first stage of a ResNet are not trained) or 'detector'
    (torchvision's COCO weights). norm: 'batch' or 'frozen' batch norms. Raises UserError if the
    weights are not available.
    """
    kind, backbone = utils.named(DETECTORS, name, "detector")
    sizes = dict(min_size=view.min_size, max_size=view.max_size)
    if weights == "detector":
        if name not in TRAINED:
            raise UserError(f"no COCO weights for {name}; torchvision has {', '.join(TRAINED)}")
        make = getattr(detectors, f"{name}_fpn")
        trained = dict(weights="COCO_V1", weights_backbone=None)
        return foreign.downloaded(lambda: make(**trained, **sizes), f"{name}_fpn")
    known = dict(weights="IMAGENET1K_V1" if weights == "backbone" else None)
    norm_layer = FrozenBatchNorm2d if norm == "frozen" else nn.BatchNorm2d
    one_stage = kind == "retinanet"
    if backbone == "mobilenet_v2":

        def pyramid():
            layers = models.mobilenet_v2(**known, norm_layer=norm_layer).features
            levels = {"3": "0", "6": "1", "13": "2", "17": "3"}
            return BackboneWithFPN(layers, levels, [24, 32, 96, 320], 256, LastLevelMaxPool())

    else:

        def pyramid():
            return resnet_fpn_backbone(
                backbone_name=backbone,
                **known,
                norm_layer=norm_layer,
                trainable_layers=3 if weights == "backbone" else 5,
                returned_layers=[2, 3, 4] if one_stage else [1, 2, 3, 4],
                extra_blocks=LastLevelP6P7(256, 256) if one_stage else None,
            )

    anchors = [view.anchor * 2**i for i in range(5)]
    if one_stage:
        anchors = [tuple(int(x * 2 ** (i / 3)) for i in range(3)) for x in anchors]
        own = dict(anchor_generator=AnchorGenerator(tuple(anchors), ((0.5, 1.0, 2.0),) * 5))
    else:
        anchors = tuple((x,) for x in anchors)
        own = dict(
            rpn_anchor_generator=AnchorGenerator(anchors, ((0.5, 1.0, 2.0),) * 5),
            rpn_post_nms_top_n_train=1000,  # the published value; torchvision's default is 2000
            box_batch_size_per_image=view.rois,
        )
    return KINDS[kind](foreign.downloaded(pyramid, backbone), num_class, **sizes, **own)


@dataclass
class Found:
    """Name, weights and metadata of a detector, like checkpoint.Weights for a classifier.
    pretrained: False, or the name of torchvision's weights, as in `build`."""

    name: str
    state: dict | None = None
    meta: dict = field(default_factory=dict)
    path: str | None = None
    pretrained: str | bool = False
    taps: None = None
    epoch: int = 0

    def __post_init__(self):
        utils.named(DETECTORS, self.name, "detector")
        check_meta(
            self.meta,
            self.path,
            min_size=lambda x: isinstance(x, (list, tuple)) and len(x) > 0 and _whole(x, SIDE),
            max_size=lambda x: _whole([x], SIDE),
            anchor=lambda x: _whole([x], ANCHOR),
            rois=lambda x: _whole([x], ROIS),
        )

    @property
    def weights(self) -> str:
        """The name of its initial weights, as in `build`."""
        return self.pretrained or "fresh"

    @property
    def norm(self) -> str:
        """The kind of its batch norms. In a checkpoint, frozen ones have no counters."""
        if self.state is None:
            return "batch" if self.weights == "fresh" else "frozen"
        counters = any(key.endswith("num_batches_tracked") for key in self.state)
        return "batch" if counters else "frozen"

    @property
    def num_class(self) -> int | None:
        """Number of classes with the background; None if it is not yet fixed."""
        return 91 if self.weights == "detector" else self.meta.get("num_class")

    @property
    def view(self) -> View:
        """The values of its checkpoint; missing ones have the published defaults."""
        known = {key: self.meta[key] for key in vars(View()) if key in self.meta}
        return View(**known)

    def build(self, num_class: int, view: View, seed: int) -> nn.Module:
        utils.seed_everything(seed)
        net = build(self.name, num_class, view, self.weights, self.norm)
        if self.state is not None:
            load_weights(net, self.state, self.path, self.name)
            check_weights(net, self.path)
        return net


def _whole(values, bounds: tuple[int, int]) -> bool:
    return all(type(x) is int and bounds[0] <= x <= bounds[1] for x in values)


def find(name: str | None, path: str | None, side: str, pretrained: str | bool = False) -> Found:
    """The detector given by --{side}_name, --t_model or --s_init, and --{side}_pretrained."""
    file_flag = "t_model" if side == "t" else "s_init"
    return find_weights(name, path, f"{side}_name", file_flag, pretrained, kind=Found)


# --- distillation ---------------------------------------------------------------------------------


def build_levels(s: list[Tensor], t: list[Tensor], mid_channel: int) -> nn.Module:
    return ReviewKD([x.shape[1] for x in s], [x.shape[1] for x in t], mid_channel)


def build_regions(s, t, **flags) -> nn.Module:
    return DKD(**flags)


@dataclass(frozen=True)
class Part:
    """A loss term. build: (levels of student, of teacher, **flags) -> loss; compare: (loss, Caught
    of student, of teacher) -> scalar; regions: whether it needs the box head."""

    build: Callable
    compare: Callable
    flags: dict
    regions: bool = False


PARTS = dict(
    reviewkd=Part(build_levels, lambda kd, s, t: kd(s.levels, t.levels), dict(mid_channel=256)),
    dkd=Part(
        build_regions,
        lambda kd, s, t: kd(s.logits, t.logits, s.labels),
        dict(alpha=1.0, beta=0.25, T=1.0),
        regions=True,
    ),
)
MODES = dict(none=(), reviewkd=("reviewkd",), dkd=("dkd",), reviewdkd=("reviewkd", "dkd"))
FLAG_HELP = dict(
    mid_channel="width of the fused levels",
    alpha="weight of the target-class term",
    beta="weight of the non-target-class term",
    T="temperature",
)
# published weight of ReviewKD by (teacher, student)
REVIEWKD_WEIGHT = {
    ("fasterrcnn_resnet101", "fasterrcnn_resnet18"): 1.2,
    ("maskrcnn_resnet101", "maskrcnn_resnet18"): 1.5,
    ("fasterrcnn_resnet101", "fasterrcnn_resnet50"): 1.0,
    ("maskrcnn_resnet101", "maskrcnn_resnet50"): 0.8,
    ("fasterrcnn_resnet50", "fasterrcnn_mobilenet_v2"): 2.0,
    ("maskrcnn_resnet50", "maskrcnn_mobilenet_v2"): 1.0,
    ("retinanet_resnet101", "retinanet_resnet50"): 1.0,
}
# detectron2's schedule of the published configurations, in iterations instead of epochs
COCO = published.Protocol(
    lr=0.01,
    networks={name: dict(lr=0.005) for name in DETECTORS if name.startswith("retinanet")},
    momentum=0.9,
    nesterov=False,
    weight_decay=1e-4,
    batch_size=8,
    scales=True,
    epochs=180_000,
    milestones=(120_000, 160_000),
    warmup=1000,
    padding="",
    constants={},
)


@dataclass
class Caught:
    """Intermediate results of a detector: the resized images and the levels of the pyramid; for the
    regions on which the box head is trained: the boxes of each image, class logits (N, C), and
    classes (N,), with 0 as the background."""

    images: object = None
    levels: list[Tensor] | None = None
    boxes: list[Tensor] | None = None
    logits: Tensor | None = None
    labels: Tensor | None = None


class Distiller:
    """Student, frozen teacher, the loss terms of a mode (`parts`), and hooks that catch the
    student's intermediate results. student, teacher: torchvision detectors (teacher: None without
    parts); kd: nn.ModuleDict of the losses.
    """

    def __init__(self, student, teacher, parts: dict[str, Part], weights: list[float]):
        self.student, self.teacher, self.parts = student, teacher, parts
        self.weights, self.caught, self.kd = dict(zip(parts, weights)), Caught(), nn.ModuleDict()
        if not parts:
            return
        teacher.eval().requires_grad_(False)
        for part in parts.values():
            if part.regions and not all(hasattr(net, "roi_heads") for net in (student, teacher)):
                raise UserError(
                    "--kd_mode: dkd needs a box head, and RetinaNet has none; use others"
                )
        s, t = self._levels()
        for name, part in parts.items():
            try:
                self.kd[name] = part.build(s, t, **part.flags)
            except (ValueError, RuntimeError) as error:
                raise UserError(f"--kd_mode {name}: {utils.first_line(error)}") from error
        self._hook()

    @torch.no_grad()
    def _levels(self) -> list[list[Tensor]]:
        """The levels of both for an image of 128 pixels. Raises UserError if their sizes differ."""
        x = torch.zeros(1, 3, 128, 128)
        both = [list(net.eval().backbone(x).values()) for net in (self.student, self.teacher)]
        sides = [[tuple(fm.shape[2:]) for fm in levels] for levels in both]
        if sides[0] != sides[1]:
            raise UserError(
                f"student and teacher need pyramids with levels of equal sizes, got {sides[0]} and "
                f"{sides[1]} for an image of 128 pixels; choose other detectors"
            )
        return both

    def _hook(self) -> None:
        def keep(**found):
            if self.student.training:
                self.caught = replace(self.caught, **found)

        net = self.student
        net.transform.register_forward_hook(lambda m, args, out: keep(images=out[0]))
        net.backbone.register_forward_hook(lambda m, args, out: keep(levels=[*out.values()]))
        if any(part.regions for part in self.parts.values()):
            heads = net.roi_heads
            heads.box_predictor.register_forward_hook(lambda m, args, out: keep(logits=out[0]))
            sample = heads.select_training_samples

            def select_training_samples(proposals, targets):
                found = sample(proposals, targets)
                keep(boxes=found[0], labels=torch.cat(found[2]))
                return found

            heads.select_training_samples = select_training_samples  # no hook gets the labels

    def set_trainable(self) -> list[nn.Parameter]:
        """Put student and losses into training mode. Returns the parameters that are trained."""
        self.student.train(), self.kd.train()
        params = [*self.student.parameters(), *self.kd.parameters()]
        return [p for p in params if p.requires_grad]

    @torch.no_grad()
    def teach(self, s: Caught) -> Caught:
        """The teacher's results for the images and regions of the student."""
        net = self.teacher
        x = renormalised(s.images, self.student.transform, net.transform)
        levels = net.backbone(x)
        logits = None
        if s.boxes is not None:
            heads = net.roi_heads
            regions = heads.box_roi_pool(levels, s.boxes, s.images.image_sizes)
            logits = heads.box_predictor(heads.box_head(regions))[0]
        return Caught(levels=list(levels.values()), logits=logits)

    def losses(self, imgs: list[Tensor], targets: list[dict]) -> dict[str, Tensor]:
        """{name: loss}: the losses of the detector and the loss terms of the mode, unweighted."""
        terms = self.student(imgs, targets)
        if self.parts:
            s, self.caught = self.caught, Caught()
            t = self.teach(s)
            for name, part in self.parts.items():
                terms[name] = part.compare(self.kd[name], s, t)
        return terms

    def to(self, device) -> None:
        for net in (self.student, self.teacher, self.kd):
            if net is not None:
                net.to(device, memory_format=torch.channels_last)


def renormalised(images, own, other) -> Tensor:
    """A batch made by the transform `own`, normalised like `other` does. The images are not resized
    again, since another size would be drawn. The padding of the images stays 0."""
    x = images.tensors
    if (own.image_mean, own.image_std) == (other.image_mean, other.image_std):
        return x
    mean, std, mean_t, std_t = (
        torch.tensor(v, dtype=x.dtype, device=x.device)[:, None, None]
        for v in (own.image_mean, own.image_std, other.image_mean, other.image_std)
    )
    inside = torch.zeros_like(x[:, :1])
    for mask, (h, w) in zip(inside, images.image_sizes):
        mask[:, :h, :w] = 1
    return inside * (x * std + mean - mean_t) / std_t


def train_step(distiller: Distiller, optimizer, imgs, targets, precision) -> dict[str, Tensor]:
    """One training step on the weighted sum of the losses. Returns {name: detached 0-dim tensor}
    on the device; 'loss' is the sum."""
    optimizer.zero_grad(set_to_none=True)
    with precision.autocast():
        terms = distiller.losses(imgs, targets)
    loss = sum(distiller.weights.get(name, 1.0) * value for name, value in terms.items())
    precision.backward(loss)
    distributed.average_gradients(optimizer)
    precision.step(optimizer)
    return {name: value.detach() for name, value in dict(loss=loss, **terms).items()}


# --- flags ----------------------------------------------------------------------------------------


def parse(argv: list[str]):
    first = cli.Parser(add_help=False)
    first.add_argument("--kd_mode", type=cli.filled)
    mode = first.parse_known_args(argv)[0].kd_mode
    parts = {} if mode is None else {p: PARTS[p] for p in utils.named(MODES, mode, "--kd_mode")}

    parser = cli.Parser(prog="detection/train_det.py", description=__doc__)
    add = parser.add_argument_group("distillation").add_argument
    add("--kd_mode", required=True, metavar="MODE", help="one of " + ", ".join(MODES))
    file, name = (dict(type=cli.filled, metavar=x) for x in ("FILE", "NAME"))
    add("--t_model", **file, help="checkpoint of the teacher")
    add("--t_name", **name, help="teacher: one of the names of --s_name")
    add("--t_pretrained", action="store_true", help="use torchvision's COCO weights as the teacher")
    add("--s_init", **file, help="initial weights of the student (default: random)")
    add("--s_name", **name, help=f"student: one of {', '.join(DETECTORS)}")
    text = "start from torchvision's ImageNet weights in the student's backbone"
    add("--s_pretrained", action="store_true", help=text)
    weight = cli.comma(cli.number(float, 0))
    add(
        "--lambda_kd",
        type=weight,
        metavar="X[,X]",
        help="weight of each loss term of the mode (default: the published ones, or 1)",
    )
    for part, row in parts.items():
        add = parser.add_argument_group(f"--kd_mode {part}").add_argument
        for flag, default in row.flags.items():
            kind = cli.number(type(default), 0, 1e6, open_low=flag in ("T", "mid_channel"))
            text = f"{FLAG_HELP[flag]} (default {default})"
            add(f"--{flag}", type=kind, default=default, metavar="X", help=text)
    add = parser.add_argument_group("data").add_argument
    add(
        "--img_root",
        type=cli.filled,
        metavar="DIR",
        help=f"folder with train2017, val2017 and annotations (default {FOLDER})",
    )
    size = cli.number(int, *SIDE)
    text = "shorter side of the images in pixels; one of several is drawn (default 640 to 800)"
    add("--min_size", type=cli.comma(size), metavar="N[,N]", help=text)
    add("--max_size", type=size, metavar="N", help="maximum of the longer side (default 1333)")
    text = "side of the smallest anchor in pixels (default 32)"
    add("--anchor", type=cli.number(int, *ANCHOR), metavar="N", help=text)
    text = "regions per image that train the box head (default 512)"
    add("--rois", type=cli.number(int, *ROIS), metavar="N", help=text)
    add = parser.add_argument_group("training").add_argument
    count = dict(type=cli.number(int, 1), metavar="N")
    text = "number of steps; milestones and warm-up scale with it (default 180000)"
    add("--iters", **count, help=text)
    text = "learning rate is multiplied by 0.1 after these steps"
    add("--milestones", type=cli.comma(count["type"]), metavar="I,I", help=text)
    add("--warmup", type=cli.number(int, 0), metavar="N", help="steps of learning rate warm-up")
    add("--eval_every", **count, help="evaluate every N steps (default: --iters / 10)")
    cli.add_optimizer_flags(add)
    cli.add_device_flags(parser)
    cli.add_run_flags(parser)
    args = parser.parse_args(argv, owner=lambda flag: _owner(flag, mode))
    if args.lambda_kd is not None and len(args.lambda_kd) != len(parts):
        raise UserError(
            f"--lambda_kd: expected {len(parts)} weight(s) for {mode}, got {len(args.lambda_kd)}"
        )
    if not parts and (args.t_model or args.t_name or args.t_pretrained):
        raise UserError("--kd_mode none has no teacher; leave out --t_... or choose another mode")
    flags = {p: {flag: getattr(args, flag) for flag in row.flags} for p, row in parts.items()}
    return args, {p: replace(row, flags=flags[p]) for p, row in parts.items()}


def _owner(flag: str, mode: str) -> str | None:
    owners = [part for part, row in PARTS.items() if flag.lstrip("-") in row.flags]
    if owners:
        return f"it belongs to {' and '.join(owners)}, not to --kd_mode {mode}"


def resolve(args, s: Found, t: Found | None):
    """The flags; missing values come from the checkpoints, then from the published schedule."""
    cfg = type(args)(**vars(args))
    plan = replace(COCO, **COCO.networks.get(s.name, {}))
    knows = (t.meta if t else {}) | s.meta
    for flag in ("min_size", "max_size", "anchor", "rois", "img_root"):
        if getattr(cfg, flag) is None:
            setattr(cfg, flag, knows.get(flag, getattr(View, flag, FOLDER)))
    cfg.min_size = tuple(cfg.min_size)
    if cfg.anchor != s.meta.get("anchor", cfg.anchor):
        raise UserError(f"--anchor {cfg.anchor} contradicts --s_init, which has {s.meta['anchor']}")
    if max(cfg.min_size) > cfg.max_size:
        raise UserError(f"--min_size {max(cfg.min_size)} is larger than --max_size {cfg.max_size}")
    fill = dict(
        iters=plan.epochs,
        batch_size=plan.batch_size,
        momentum=plan.momentum,
        weight_decay=plan.weight_decay,
        workers=min(8, utils.cpus()),
    )
    for flag, value in fill.items():
        if getattr(cfg, flag) is None:
            setattr(cfg, flag, value)
    if cfg.lr is None:
        cfg.lr = plan.lr * cfg.batch_size / plan.batch_size
    if cfg.milestones is None:
        cfg.milestones = tuple(published.scaled(i, cfg.iters, plan) for i in plan.milestones)
    if cfg.warmup is None:
        cfg.warmup = published.scaled(plan.warmup, cfg.iters, plan)
    if cfg.eval_every is None:
        cfg.eval_every = -(-cfg.iters // 10)
    cfg.nesterov = 0
    return cfg


# --- a run ----------------------------------------------------------------------------------------


@console.command
def main(argv: list[str] | None = None) -> dict:
    argv = sys.argv[1:] if argv is None else list(argv)
    args, parts = parse(argv)
    found_s = find(args.s_name, args.s_init, "s", args.s_pretrained and "backbone")
    found_t = None
    if parts:
        found_t = find(args.t_name, args.t_model, "t", args.t_pretrained and "detector")
        if found_t.state is None and not args.t_pretrained:
            raise UserError("no trained teacher; give --t_model FILE or --t_pretrained")
    cfg = resolve(args, found_s, found_t)
    device = utils.select_device(args.device, args.cuda, ranks=True)
    precision = utils.precision(device, args.amp)
    coco.check_shares(cfg.batch_size, utils.world())
    names = [found.name for found in (found_t, found_s) if found]
    note = args.note or "-".join([args.kd_mode, *names])
    run = Run(cfg, note, ["detection/train_det.py", *argv], loss="loss", score="AP")
    masks = found_s.name.startswith("maskrcnn")
    data = coco.load(cfg.img_root, masks=masks)
    coco.Evaluation(data.val)  # if pycocotools is missing, raises UserError before writing
    if cfg.batch_size > len(data.train.with_boxes):
        raise UserError(
            f"--batch_size: expected at most {len(data.train.with_boxes)}, the number of training "
            f"images with boxes in {data.name}, got {cfg.batch_size}"
        )
    view = View(*(getattr(cfg, key) for key in vars(View())))
    for found in filter(None, (found_s, found_t)):
        if found.num_class not in (None, data.num_class):
            raise UserError(
                f"{found.path or found.name} has {found.num_class} classes, but {data.name} has "
                f"{data.num_class} (with the background); give another checkpoint or --img_root"
            )
    teacher = None
    if found_t:
        own = replace(view, anchor=found_t.view.anchor)
        teacher = found_t.build(data.num_class, own, cfg.seed)
    student = found_s.build(data.num_class, view, cfg.seed)
    weight = dict(reviewkd=REVIEWKD_WEIGHT.get(tuple(names), 1.0))
    weights = cfg.lambda_kd or [weight.get(part, 1.0) for part in parts]
    distiller = Distiller(student, teacher, parts, weights)
    meta = dict(
        network=found_s.name,
        num_class=data.num_class,
        classes={str(key): name for key, name in data.train.categories.items()},
        img_root=cfg.img_root,
        **vars(view),
    )
    sha = sha256(found_t.path) if found_t and found_t.path else None
    run.learns_from(data.identity(), sha)
    where = utils.describe_device(device, precision)
    lines = summary(where, distiller, data, cfg, found_s, found_t)
    if run.saved:
        with run.intact():  # a damaged checkpoint is an error before anything is written
            stops = range(cfg.eval_every, cfg.iters + cfg.eval_every, cfg.eval_every)
            rows = [dict(step=min(stop, cfg.iters)) for stop in stops]
            run.fits(rows, cfg.eval_every)
            restore(run, distiller, utils.sgd(distiller.set_trainable(), cfg), precision)
    if cfg.dry_run:
        return console.say(*lines, f"nothing trained, nothing written: {run.dir}")

    distiller.to(device)
    notes = dict(
        parts={
            part: dict(lambda_kd=w, **parts[part].flags) for part, w in distiller.weights.items()
        }
    )
    if found_t:
        notes["teacher"] = dict(network=found_t.name, path=found_t.path, sha256=sha)
    with run.start(where, meta, notes):
        for line in lines:
            run.log(line)
        if teacher is not None and not run.saved:
            run.log(f"teacher AP {evaluate(teacher, data, cfg, device, precision)['AP']:.2f}")
        utils.seed_everything(cfg.seed + 1_000_003 * utils.rank())
        distributed.broadcast_parameters(student, distiller.kd)
        optimizer = run.watch(utils.sgd(distiller.set_trainable(), cfg))
        if run.saved:
            restore(run, distiller, optimizer, precision)
            run.saved = None
        for start in range(0, cfg.iters, cfg.eval_every)[len(run.history) :]:
            stop = min(start + cfg.eval_every, cfg.iters)
            train_stretch(run, device, precision, distiller, data, cfg, start, stop, optimizer)
        return run.finish()


def train_stretch(run, device, precision, distiller, data, cfg, start, stop, optimizer):
    """Train the steps after `start` up to `stop`, evaluate, write the metrics and save."""
    distiller.set_trainable()  # evaluation has put the student into eval mode

    def state():
        distributed.average_batch_norms(distiller.student, distiller.kd)
        weights = dict(snet=distiller.student.state_dict(), meta=run.meta)
        return dict(
            weights=weights,
            kd=distiller.kd.state_dict(),
            optimizer=optimizer.state_dict(),
            **precision.state(),
        )

    meter, done = run.begin()
    batches = coco.train_batches(
        data.train,
        cfg.batch_size,
        cfg.seed,
        start + done,
        stop,
        share=utils.share(),
        workers=cfg.workers,
        device=device,
    )
    for step, (imgs, targets) in enumerate(batches, start + done + 1):
        lr = utils.step_decay(cfg.lr, step, cfg.milestones, cfg.warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr
        meter.add(train_step(distiller, optimizer, imgs, targets, precision), len(imgs))
        if step % cfg.print_freq == 0:
            now = meter.read()
            run.check_finite(now, f"step {step}")
            shown = "  ".join(f"{name} {value:.4g}" for name, value in now.items())
            run.log(f"  step {step:6d}  {shown}  {meter.speed:.1f} img/s")
        if run.due():
            run.pause(state, meter, step - start, f"step {step}")
    now = meter.read()
    run.check_finite(now, f"step {stop}")
    speed = meter.speed
    lr = utils.step_decay(cfg.lr, stop, cfg.milestones, cfg.warmup)
    saved = state()
    row = dict(step=stop, lr=lr, **now, **evaluate(distiller.student, data, cfg, device, precision))
    run.epoch(row, speed, saved)


def evaluate(net, data, cfg, device, precision) -> dict[str, float]:
    """COCO's metrics of `net` on the validation images, in percent."""
    net.eval()

    def detect(imgs):
        with precision.autocast():
            return net(imgs)

    return coco.evaluate(detect, data.val, cfg.batch_size, cfg.workers, device)


def restore(run, distiller: Distiller, optimizer, precision) -> None:
    """Load the state in the checkpoint of the run."""
    saved = run.saved
    distiller.student.load_state_dict(saved["snet"])
    utils.load_state(distiller.kd, saved["kd"])
    utils.load_optimizer(optimizer, saved["optimizer"])
    precision.load(saved)
    utils.set_rng_state(saved["rng"])


def summary(where: str, distiller, data, cfg, found_s, found_t) -> list[str]:
    """The resolved recipe, as lines of the log."""
    start = found_s.path or dict(fresh="random", backbone="ImageNet backbone")[found_s.weights]
    learns = sum(p.numel() for p in distiller.set_trainable())
    lines = [
        f"{where}: {f'{found_t.name} -> ' if found_t else ''}{found_s.name}, {data.name}",
        f"{len(data.train)} training and {len(data.val)} validation images, "
        f"{len(data.train.categories)} categories, initial weights of the student: {start}, "
        f"{learns:,} trained parameters",
        f"lr {cfg.lr:g}, falls after {cfg.milestones}, warm-up {cfg.warmup}, momentum "
        f"{cfg.momentum:g}, weight decay {cfg.weight_decay:g}, batch {cfg.batch_size}, "
        f"{cfg.iters} steps",
        f"shorter side {cfg.min_size}, longer side at most {cfg.max_size}, smallest anchor "
        f"{cfg.anchor}, {cfg.rois} regions per image",
    ]
    if cfg.iters != COCO.epochs:
        lines.append(f"milestones and warm-up are scaled from {COCO.epochs} to {cfg.iters} steps")
    for name, weight in distiller.weights.items():
        flags = "".join(f", {key} {value}" for key, value in distiller.parts[name].flags.items())
        lines.append(f"{name}: lambda_kd {weight:g}{flags}")
    return lines + data.notes


if __name__ == "__main__":
    main()
