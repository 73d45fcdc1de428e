"""The table of methods: one row per --kd_mode.

A row says how the loss is built, what it compares, its weight, its flags with their defaults, what the
comparison needs of the two networks, its phases, the teacher's part and what a protocol changes. It
holds no state. To add a method: one file beside this one, one row here, its values in tests/data.
"""

import math
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Callable

import torch
from torch import nn

from .ab import AB
from .afd import AFD
from .at import AT
from .bss import BSS, BSSAttacker, select
from .catkd import CATKD
from .cc import CC, NeighbourCC
from .crd import CRD
from .crld import CRLD
from .ctkd import CTKD
from .dist import DIST
from .dkd import DKD
from .dml import DML
from .fitnet import Hint
from .fsp import FSP
from .ft import FT, Paraphraser, Translator
from .ickd import ICKD
from .irg import IRG
from .itrd import ITRD
from .kdsvd import KDSVD
from .logits import Logits
from .lskd import LSKD, standardise
from .lwm import LwM
from .mgd import MGD
from .mlkd import MLKD
from .nkd import NKD
from .nst import NST
from .ofa import OFA
from .ofd import OFD, bn_margin
from .pefd import PEFD
from .pkt import PKTCosSim
from .reviewkd import ReviewKD
from .rkd import RKD
from .rld import RLD
from .sdd import SDD
from .sdd import dkd as dkd_of_rows
from .sdd import kl as kl_of_rows
from .semckd import SemCKD
from .simkd import SimKD
from .sobolev import Sobolev
from .sp import SP
from .srrl import SRRL
from .st import SoftTarget
from .ttm import TTM
from .vid import VID
from .vkd import VKD
from .wkd_f import WKDF
from .wkd_l import WKDL, cka_cost
from .wsld import WSLD
from .wttm import WTTM

# --- what is compared: (kd, s, t, batch) -> a loss, or one per stage -------------------------------
# kd: the module that `build` made; s, t: the Features of student and teacher; batch: img, target, index


def wants(*kinds: str):
    """Name the features that a comparison reads: 'out', 'stem', 'stages', 'preacts', 'last', 'feat'."""

    def mark(compare):
        compare.wants = kinds
        return compare

    return mark


@wants("out")
def logits(kd, s, t, batch):
    return kd(s.out, t.out)


@wants("out")
def mutual(kd, s, t, batch):
    return kd(s.out, t.out) + kd(t.out, s.out)


@wants("feat")
def feat(kd, s, t, batch):
    return kd(s.feat, t.feat)


@wants("feat")
def contrast(kd, s, t, batch):
    return kd(s.feat, t.feat, batch.index)


@wants("stages")
def stages(kd, s, t, batch):
    return [k(fm_s, fm_t) for k, fm_s, fm_t in zip(one_each(kd, s.stages), s.stages, t.stages)]


@wants("stages")
def maps(kd, s, t, batch):
    return kd(s.stages, t.stages)


@wants("preacts")
def preacts(kd, s, t, batch):
    return [k(*fms) for k, *fms in zip(one_each(kd, s.preacts), s.preacts, t.preacts)]


@wants("preacts")
def preacts_summed(kd, s, t, batch):
    """A sum over C, H, W where the losses take a mean, and half the weight a stage further up."""
    losses, n = preacts(kd, s, t, batch), len(t.preacts)
    return [
        2.0 ** (i - n + 1) * fm_t[0].numel() * loss
        for i, (loss, fm_t) in enumerate(zip(losses, t.preacts))
    ]


@wants("stem", "stages")
def pairs(kd, s, t, batch):
    # a map stands in two pairs: promoted once
    fms_s, fms_t = (
        [fm.to(torch.promote_types(fm.dtype, torch.float32)) for fm in (x.stem, *x.stages)]
        for x in (s, t)
    )
    return [kd(*maps) for maps in zip(fms_s, fms_s[1:], fms_t, fms_t[1:])]


@wants("out")
def input_gradient(kd, s, t, batch):
    return kd(s.out, t.out, batch.img, batch.target)


@wants("out")
def with_target(kd, s, t, batch):
    return kd(s.out, t.out, batch.target)


@wants("out", "stages")
def class_activation(kd, s, t, batch):
    return kd(s.out, s.stages[0], t.out, t.stages[0], batch.target)


@wants("out", "stages", "feat")
def relation_graph(kd, s, t, batch):
    return kd([*s.stages, s.feat, s.out], [*t.stages, t.feat, t.out])


@wants("stages")
def reconstruction(kd, s, t, batch):
    return kd.paraphraser.reconstruction_loss(t.stages[0])


@wants("stages")
def factors(kd, s, t, batch):
    return kd.loss(kd.translator(s.stages[0]), kd.paraphraser.factor(t.stages[0]))


@wants("out")
def boundary(kd, s, t, batch):
    index, attack_class, valid = select(s.out, t.out, batch.target, kd.attack_size)
    index, attack_class = index[valid], attack_class[valid]
    if len(index) == 0:
        return s.out.new_zeros((), dtype=torch.promote_types(s.out.dtype, torch.float32))
    if len(index) == 1:  # batch norm on a map of one pixel needs two
        index, attack_class = index.repeat(2), attack_class.repeat(2)
    img = kd.attacker.attack(t.net, batch.img[index].detach(), batch.target[index], attack_class)
    # the student's batch norm sees the attacked images too, as in KD-Zoo
    return kd(s.net(img), t.net(img))


@wants("stages", "preacts", "feat")
def review(kd, s, t, batch):
    return kd(*reviewed(s, t, kd.s_preact, kd.pooled))


def reviewed(s, t, s_preact: bool, pooled: bool):
    """The student's maps after the activation or before it, the teacher's before; each side's pooled
    features after them, or not."""
    fms_s = s.preacts if s_preact else s.stages
    return [*fms_s, *[s.feat][:pooled]], [*t.preacts, *[t.feat][:pooled]]


@wants("last")
def last(kd, s, t, batch):
    return kd(s.last, t.last)


@wants("out")
def two_views(kd, s, t, batch):
    return kd(s.out, s.strong.out, t.out, t.strong.out)


@wants("out")
def at_its_epoch(kd, s, t, batch):
    return kd(s.out, t.out, kd.clock[0])


@wants("out")
def transport(kd, s, t, batch):
    """The weight of the transport alone fades, over the last three eighths, by a cosine."""
    return kd(s.out, t.out, batch.target, faded(kd.clock[0] / kd.clock[1]))


@wants("out")
def transport_on_imagenet(kd, s, t, batch):
    """The same, fading from the first epoch on."""
    return kd(s.out, t.out, batch.target, faded(kd.clock[0] / kd.clock[1], 0.0))


@wants("out", "last", "feat")
def teachers_logits(kd, s, t, batch):
    x = s.feat if kd.form == "pooled" else s.last
    return kd(x, t.feat, t.out, t.classifier)


@wants("last", "feat")
def class_maps(kd, s, t, batch):
    return kd(s.last, s.classifier.weight, t.last, t.classifier.weight)


@wants("last", "feat")
def regions(kd, s, t, batch):
    return kd(s.last, s.classifier, t.last, t.classifier, batch.target)


@wants("out", "stages", "feat")
def branches(kd, s, t, batch):
    return kd(s.stages, s.out, t.out, batch.target)


@wants("stages")
def whole_batches(kd, s, t, batch):
    """A last batch of another size, which the method is not made for, is left out."""
    if len(s.stages[0]) != kd.batch:
        return s.stages[0].new_zeros(())
    return kd(s.stages, t.stages)


LOGITS = (
    logits,
    mutual,
    with_target,
    two_views,
    at_its_epoch,
    transport,
    transport_on_imagenet,
)  # compare nothing else


def one_each(kd, maps: list) -> list:
    """The loss of each map: a ModuleList has its own for each, another module serves all."""
    return list(kd) if isinstance(kd, nn.ModuleList) else [kd] * len(maps)


# --- how the loss is built: (s, t, train, **flags) -> nn.Module -----------------------------------
# s, t: Features of a dry pass, for their shapes; train: the training set, for its labels and size


def plain(loss):
    """`loss(**flags)`, whatever the networks."""
    return lambda s, t, train, **flags: loss(**flags)


def build_ab(s, t, train, m):
    return AB(margin=m)


def build_vid(s, t, train, sf, init_var, eps, init):
    widths = [(fm_s.shape[1], fm_t.shape[1]) for fm_s, fm_t in zip(s.stages, t.stages)]
    losses = (VID(c_s, int(sf * c_t), c_t, init_var, eps) for c_s, c_t in widths)
    return initialised(nn.ModuleList(losses), init)


def initialised(layers: nn.Module, init: str) -> nn.Module:
    """`layers` as they are ('kaiming'), or with torch's own initialisation of convolutions ('torch')."""
    if init == "torch":
        for layer in layers.modules():
            if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
                layer.reset_parameters()
    return layers


def build_crd(s, t, train, **flags):
    widths = s.feat.shape[1], t.feat.shape[1]
    return CRD(*widths, n_data=len(train), labels=train.labels, **flags)


def build_cc(s, t, train, relation, gamma, P_order, feat_dim):
    if relation == "kernel":
        return CC(gamma, P_order)
    return NeighbourCC(s.feat.shape[1], t.feat.shape[1], feat_dim)


def build_ft(s, t, train, k, use_bn, factor, init):
    """use_bn: 'auto': up to 10 classes, as in KD-Zoo; 'translator': as in the CRD benchmark."""
    few = use_bn == "auto" and train.num_class <= 10
    c_s, c_t = s.stages[0].shape[1], t.stages[0].shape[1]
    kd = nn.Module()
    kd.loss = FT(factor)
    kd.paraphraser = Paraphraser(c_t, k, few or use_bn == "yes")
    kd.translator = Translator(c_s, c_t, k, few or use_bn in ("yes", "translator"))
    return initialised(kd, init)


def build_ofd(s, t, train, margin):
    names = t.net.taps.get("norms") if margin == "bn" else None
    if margin == "bn" and names is None:
        raise ValueError("the teacher has no batch norms before its activations: --margin batch")
    margins = [bn_margin(t.net.get_submodule(names[i])) if names else None for i in t.numbers]
    widths = [(fm_s.shape[1], fm_t.shape[1]) for fm_s, fm_t in zip(s.preacts, t.preacts)]
    return nn.ModuleList(OFD(*pair, m) for pair, m in zip(widths, margins))


def build_afd(s, t, train, att_f, attention):
    return nn.ModuleList(
        AFD(fm.shape[1], att_f, tuple(fm.shape[2:]) if attention == "paper" else None)
        for fm in t.stages
    )


def build_bss(s, t, train, T, attack_size):
    kd = BSS(T)
    kd.attacker, kd.attack_size = BSSAttacker(), attack_size
    return kd


def build_reviewkd(s, t, train, mid_channel, s_preact, pooled):
    s, t = ([fm.shape[1] for fm in fms] for fms in reviewed(s, t, s_preact, pooled))
    kd = ReviewKD(s, t, min(mid_channel, s[-1]))
    kd.s_preact, kd.pooled = s_preact, pooled
    return kd


def between(loss, kind: str):
    """`loss(width of the student, of the teacher, **flags)`, of 'feat' or 'last'."""

    def build(s, t, train, **flags):
        return loss(getattr(s, kind).shape[1], getattr(t, kind).shape[1], **flags)

    return build


def timed(kd: nn.Module) -> nn.Module:
    """A loss that knows the epoch, counted from 1, and the epochs, both in the protocol's number."""
    kd.register_buffer("clock", torch.tensor([1.0, 240.0]), persistent=False)
    return kd


def build_ctkd(s, t, train, **flags):
    return timed(CTKD(**flags))


def build_mlkd(s, t, train, base, form):
    return MLKD((2.0, 3.0, base, 5.0, 6.0), base, form)


def build_wkd_l(s, t, train, sharpen, measured, **flags):
    kd = timed(WKDL(torch.zeros(train.num_class, train.num_class), **flags))
    kd.sharpen, kd.measured = sharpen, measured
    return kd


@wants("last", "feat")
@torch.no_grad()
def class_distances(kd, teacher, batches, labels) -> str:
    """Measure how far apart the teacher sees the classes. `batches`: of the training images, in order.
    Returns what to log."""
    found = [_measured(kd.measured, teacher(img)) for img, *_ in batches]
    found, labels = torch.cat(found), labels.cpu()
    each = int(labels.bincount().min())
    if each < 2:
        raise ValueError("at least two training images of each class are needed")
    classes = [found[labels == k][:each] for k in range(int(labels.max()) + 1)]
    found = torch.stack([x.flatten(0, -2) for x in classes]).to(kd.cost.device)
    kd.cost.copy_(cka_cost(found, kd.sharpen))
    return f"distances of the classes from {each} training images each"


def _measured(what: str, t) -> torch.Tensor:
    """(B, positions, D) of a batch, on the CPU, where there is room for all."""
    if what == "positions":
        return t.last.flatten(2).transpose(1, 2).float().cpu()
    return (t.feat if what == "pooled" else t.out)[:, None].float().cpu()


def build_wkd_f(s, t, train, **flags):
    return WKDF(*(tuple(x.last.shape[1:]) for x in (s, t)), **flags)


def build_srrl(s, t, train, weight, project):
    s_dim = (s.feat if project == "vector" else s.last).shape[1]
    return SRRL(s_dim, t.feat.shape[1], weight, "pooled" if project == "vector" else "map")


def build_simkd(s, t, train, factor):
    (_, s_dim, *_), (_, t_dim, *t_size) = s.last.shape, t.last.shape
    kd = SimKD(s_dim, t_dim, factor, tuple(t_size))
    kd.spec = (s_dim, t_dim, factor, *t_size)  # with which the trained network is built again
    return kd


def build_itrd(s, t, train, lambda_corr, lambda_mutual, power):
    return ITRD(s.feat.shape[1], t.feat.shape[1], lambda_corr, lambda_mutual, power)


def build_sdd(s, t, train, inner, scales, w_comp, T, alpha, beta):
    inner = (
        partial(kl_of_rows, T=T)
        if inner == "kl"
        else partial(dkd_of_rows, alpha=alpha, beta=beta, T=T)
    )
    return SDD(inner, tuple(map(int, scales.split(","))), w_comp)


def build_semckd(s, t, train, soft, batch):
    return SemCKD(*([fm.shape[1] for fm in x.stages] for x in (s, t)), batch, soft)


def build_ofa(s, t, train, eps, T):
    shapes = [tuple(fm.shape[1:]) for fm in s.stages]
    return OFA(shapes, t.feat.shape[1], train.num_class, eps, T)


# --- phases ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Phase:
    """A stretch of the training with its own loss, learners and optimizer.

    epochs: in the protocol's number of epochs, scaled with --epochs; None: --epochs itself.
    ce: whether cross-entropy is part of the loss; kd: True for the row's comparison, False for none,
    or another comparison. weight: of the comparison; None: the method's. learns: of 'student',
    'backbone' (the student without its classifier), 'features' (what the student's deepest map depends
    on), 'teacher', 'kd' (the method's and the adapter's parameters) or 'kd.NAME' (one module of the
    method).
    lr: None for the recipe's milestones, else ((share of the phase, factor of --lr), ...).
    nesterov: None for the recipe's.
    """

    name: str = "distil"
    epochs: int | None = None
    ce: bool = True
    kd: bool | Callable = True
    weight: float | None = None
    learns: tuple[str, ...] = ("student", "kd")
    lr: tuple[tuple[float, float], ...] | None = None
    nesterov: bool | None = None

    @property
    def student_learns(self) -> bool:
        """Whether the student learns, as a whole or without its classifier."""
        return bool({"student", "backbone", "features"} & set(self.learns))


ONE_PHASE = (Phase(),)
BOTH_LEARN = (Phase(learns=("student", "teacher", "kd")),)


def init_then_ce(epochs: int, *lr: tuple[float, float], learns: str = "backbone"):
    """The method trains the backbone for `epochs`, then cross-entropy alone trains the student.

    As in KD-Zoo, but for two things: there weight decay acts on the idle classifier, and the momentum
    of the first phase is carried into the second.
    """
    init = Phase(name="init", epochs=epochs, ce=False, learns=(learns, "kd"), lr=lr)
    return (init, Phase(name="train", kd=False, learns=("student",)))


ZOO_INIT = init_then_ce(50, (0.6, 0.1), (0.2, 0.01), (0.2, 0.001))
CRD_INIT = init_then_ce(30, (1.0, 1.0), learns="features")


def paraphrase_first(lr: float):
    """The paraphraser learns to reconstruct the teacher's map, at `lr` times the rate; then it rests."""
    first = Phase(
        name="paraphrase",
        epochs=30,
        ce=False,
        kd=reconstruction,
        weight=1.0,
        learns=("kd.paraphraser",),
        lr=((1.0, lr),),
        nesterov=False,
    )
    return (first, Phase(learns=("student", "kd.translator")))


# --- the weight over the epochs: (epoch from 1, epochs) -> factor, both in the protocol's number ---


def constant(epoch: int, epochs: int) -> float:
    return 1.0


def warmup(length: int, first: int = 1):
    """Grows linearly to 1 over the first `length` epochs, the first of which counts as `first`."""
    return lambda epoch, epochs: min((epoch - 1 + first) / length, 1.0)


def late_and_fading(epoch: int, epochs: int) -> float:
    """0 for ten epochs, then falling linearly to 0 at 80 % of the training (KD-Zoo's BSS)."""
    return 0.0 if epoch <= 10 else max(1 - 1.25 * (epoch - 1) / epochs, 0.0)


FADES = 150 / 240  # share of the training after which a weight begins to fade (WKD)


def faded(done: torch.Tensor, start: float = FADES) -> torch.Tensor:
    """The factor when the share `done` of the training lies behind: 1 up to `start`, and then falling
    to 0 by a cosine."""
    return (1 + torch.cos(math.pi * ((done - start) / (1 - start)).clamp(0, 1))) / 2


def fading_from(start: float):
    return lambda epoch, epochs: faded(
        torch.tensor(epoch / epochs, dtype=torch.float64), start
    ).item()


def up_to_ten_classes(few: float, many: float):
    """A weight that depends on the dataset: `few` up to 10 classes (CIFAR-10), else `many`."""
    return lambda num_class: few if num_class <= 10 else many


# --- the table -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """A row.

    needs: what must agree for the comparison: '' nothing, 'size' or 'channels+size'; an adapter
    supplies it (network.Adapter, which has more of them). teacher: 'frozen', 'grad' (gradients flow
    through it to the image) or 'trained'.
    teacher_bn: the teacher's batch norms use the 'running' statistics, or those of the 'batch' (as in
    training mode; the running ones then rest).
    stages: which are compared, from the deepest (-1); None: all. reduce: over the stages.
    taps: {network: the modules whose maps are its stages}, where they are not the network's own.
    flags: a tuple lists the choices, the first being the default. batch_size: None for the protocol's.
    graph: whether a step never asks the device for a value, so that CUDA can capture it.
    relates: whether it compares the images of a batch with each other.
    strong: whether it wants a second, strongly augmented view. sized: whether it is built for one size
    of batches, its flag 'batch'. decay: whether weight decay acts on its own parameters. reuses: whether
    the trained network is the student with the method's projector and the teacher's classifier.
    prepare: (loss, tapped teacher, training batches, labels) -> a line, once before training.
    protocols: fields of the row that a protocol changes; its `flags` are merged into the row's.
    pairs: the same for a (teacher, student), or for a student with any teacher.
    """

    build: Callable
    compare: Callable
    lambda_kd: float | Callable[[int], float]
    flags: dict = field(default_factory=dict)
    needs: str = ""
    phases: tuple[Phase, ...] = ONE_PHASE
    teacher: str = "frozen"
    stages: tuple[int, ...] | None = None
    taps: dict[str, tuple[str, ...]] = field(default_factory=dict)
    reduce: str = "mean"
    lambda_ce: float = 1.0
    ramp: Callable = constant
    teacher_bn: str = "running"
    batch_size: int | None = None
    graph: bool = True
    relates: bool = False
    strong: bool = False
    sized: bool = False
    decay: bool = True
    reuses: bool = False
    prepare: Callable | None = None
    protocols: dict = field(default_factory=dict)
    pairs: dict = field(default_factory=dict)

    def under(self, protocol: str) -> "Method":
        """The row as `protocol` has it."""
        row = self.under(LIKE[protocol]) if protocol in LIKE else self
        return row._with(self.protocols.get(protocol, {}))

    def known_to(self, protocol: str) -> bool:
        """Whether `protocol` says anything of the method."""
        return protocol in self.protocols or (protocol in LIKE and self.known_to(LIKE[protocol]))

    def between(self, t_name: str, s_name: str) -> "Method":
        """The row as its protocol has it for these two networks."""
        return self._with(self.pairs.get((t_name, s_name)) or self.pairs.get(s_name, {}))

    def _with(self, changes: dict) -> "Method":
        """The row with other fields; of choices, theirs comes first."""
        flags = dict(self.flags)
        for flag, value in changes.get("flags", {}).items():
            old = flags[flag]
            flags[flag] = tuple(dict.fromkeys((value, *old))) if isinstance(old, tuple) else value
        return replace(self, **changes | dict(flags=flags))


# what a protocol does not say, another one does
LIKE = {
    "mdistiller-imagenet": "crd",
    "reviewkd-imagenet": "reviewkd",
    "knowledgereview": "reviewkd",
}
# MDistiller's, where it is not 8
DKD_BETA = {
    ("resnet56", "resnet20"): 2.0,
    ("resnet110", "resnet32"): 2.0,
    ("wrn_40_2", "wrn_16_2"): 6.0,
    ("wrn_40_2", "wrn_40_1"): 6.0,
    ("vgg13", "vgg8"): 6.0,
    ("vgg13", "MobileNetV2"): 6.0,
}
# of ReviewKD's scripts, where it is not 5
REVIEWKD_WEIGHT = {
    ("resnet56", "resnet20"): 0.6,
    ("resnet110", "resnet32"): 1.0,
    ("resnet32x4", "ShuffleV2"): 8.0,
}
DKD_PAIRS = dict(pairs={pair: dict(flags=dict(beta=beta)) for pair, beta in DKD_BETA.items()})
REVIEWKD_PAIRS = dict(
    lambda_kd=5.0, pairs={pair: dict(lambda_kd=x) for pair, x in REVIEWKD_WEIGHT.items()}
)
# on ImageNet, where nothing warms up: MDistiller's; ReviewKD's student before its activations
MOBILE = ("torchvision/resnet50", "MobileNetV1")
DKD_IMAGENET = dict(
    flags=dict(T=1.0, beta=0.5), ramp=constant, pairs={MOBILE: dict(flags=dict(beta=2.0))}
)
REVIEWKD_IMAGENET = dict(
    lambda_kd=1.0,
    teacher_bn="running",
    ramp=constant,
    flags=dict(mid_channel=512, s_preact=True),
    pairs={MOBILE: dict(lambda_kd=8.0, flags=dict(mid_channel=256))},
)
# KnowledgeReview's: of ResNets the last block but one is a level of its own, of MobileNetV2 the
# depthwise convolutions are the levels; no pooled features
REVIEWED = {
    f"torchvision/{name}": ("layer1", "layer2", "layer3", f"layer4.{blocks - 2}", "layer4")
    for blocks, names in (
        (2, ("resnet18",)),
        (3, ("resnet34", "resnet50", "resnet101", "resnet152")),
        (3, ("resnext50_32x4d", "resnext101_32x8d")),
    )
    for name in names
}
REVIEWED["torchvision/mobilenet_v2"] = (
    *(f"features.{i}.conv.1" for i in (3, 6, 13, 17)),
    "features.18",
)
# by teacher and student
KNOWLEDGEREVIEW_WEIGHT = {
    ("resnet50", "mobilenet_v2"): 7.0,
    ("resnet152", "mobilenet_v2"): 8.0,
    ("resnext101_32x8d", "mobilenet_v2"): 6.0,
    ("resnet50", "resnet18"): 10.0,
    ("resnet152", "resnet50"): 6.0,
    ("resnext101_32x8d", "resnet50"): 6.0,
}
KNOWLEDGEREVIEW = dict(
    ramp=constant,
    teacher_bn="running",
    flags=dict(s_preact=True, pooled=False),
    taps=REVIEWED,
    pairs={
        tuple(f"torchvision/{name}" for name in (t, s)): dict(
            lambda_kd=weight, flags=dict(mid_channel=256 if s == "mobilenet_v2" else 512)
        )
        for (t, s), weight in KNOWLEDGEREVIEW_WEIGHT.items()
    },
)
# RepDistiller trains the paraphraser at 0.01 for ResNets, at the student's rate for other students
OTHERS = ("vgg8", "vgg11", "vgg13", "vgg16", "vgg19", "MobileNetV2", "ShuffleV1", "ShuffleV2")
FT_PAIRS = {student: dict(phases=paraphrase_first(1.0)) for student in OTHERS}

# of the newer methods' authors, by pair
NETS = dict(
    r20="resnet20",
    r32="resnet32",
    r56="resnet56",
    r110="resnet110",
    r8x4="resnet8x4",
    r32x4="resnet32x4",
    r50="ResNet50",
    w162="wrn_16_2",
    w401="wrn_40_1",
    w402="wrn_40_2",
    v8="vgg8",
    v13="vgg13",
    mv2="MobileNetV2",
    s1="ShuffleV1",
    s2="ShuffleV2",
)


def pairs_of(**rows: dict) -> dict:
    """{(teacher, student): fields}, the pairs written like r56_r20."""
    return {tuple(NETS[x] for x in pair.split("_")): row for pair, row in rows.items()}


def _cat(weight: float, resolution: int = 2, normalize: bool = False) -> dict:
    return dict(lambda_kd=weight, flags=dict(resolution=resolution, normalize=normalize))


LSKD_PAIRS = pairs_of(
    v13_v8=dict(flags=dict(T=3.0)),
    r110_r20=dict(lambda_kd=12.0, flags=dict(T=4.0)),
    r50_mv2=dict(lambda_kd=1.0, flags=dict(T=3.0)),
    r32x4_w162=dict(flags=dict(T=3.0)),
    r32x4_w402=dict(flags=dict(T=3.0)),
)
LSKD_PAIRS["MobileNetV2"] = dict(flags=dict(T=3.0))  # of every other teacher
CATKD_PAIRS = pairs_of(
    r32x4_r8x4=_cat(15.0),
    w402_w162=_cat(12.0),
    w402_w401=_cat(1.5),
    r56_r20=_cat(0.7),
    r110_r32=_cat(1.8),
    v13_v8=_cat(4.5),
    v13_mv2=_cat(15.0, 2, True),
    r50_mv2=_cat(40.0, 2, True),
    w402_s1=_cat(80.0, 4, True),
    r32x4_s1=_cat(600.0, 4, True),
    r32x4_s2=_cat(600.0, 4, True),
)
ITRD_PAIRS = pairs_of(w402_w162=dict(flags=dict(lambda_mutual=1.0, power=1.01)))
WKD_L_PAIRS = pairs_of(w402_s1=dict(flags=dict(T=6.0, weight=200.0)))
WKD_F_PAIRS = pairs_of(w402_s1=dict(lambda_kd=0.3, flags=dict(ratio=3.0, grid=4)))
R34 = ("torchvision/resnet34", "torchvision/resnet18")
CATKD_IMAGENET = {R34: _cat(0.5, 4), MOBILE: _cat(10.0, 2, True)}
WKD_L_FLAGS = dict(
    T=8.0,
    weight=600.0,
    eps=0.05,
    iters=10,
    sharpen=1.0,
    measured=("positions", "pooled", "logits"),
)
WKD_L_IMAGENET = dict(
    batch_size=256,
    compare=transport_on_imagenet,
    flags=dict(T=2.0, weight=30.0, measured="pooled"),
    pairs={MOBILE: dict(flags=dict(weight=25.0, sharpen=2.0))},
)
WKD_F_IMAGENET = dict(
    lambda_kd=0.02,
    batch_size=256,
    ramp=fading_from(0.0),
    flags=dict(ratio=2.0, grid=4),
    pairs={MOBILE: dict(lambda_kd=0.005, ramp=fading_from(0.3))},
)
SDD_FLAGS = dict(
    inner=("kl", "dkd"),
    scales=("1,2,4", "1,2"),
    w_comp=2.0,
    T=4.0,
    alpha=1.0,
    beta=8.0,
)
CTKD_FLAGS = dict(t_start=1.0, t_end=20.0, loops=10.0)
IMAGENET = "mdistiller-imagenet"

CRD_FLAGS = dict(
    feat_dim=128,
    nce_n=16384,
    nce_t=0.1,
    nce_mom=0.5,
    mode=("exact", "relax"),
    bank=("device", "host"),
)
IRG_FLAGS = dict(w_irg_vert=0.1, w_irg_edge=5.0, w_irg_tran=5.0)
BOTH = "channels+size"
INIT = ("kaiming", "torch")

# fmt: off
METHODS = {
    # mode               build             compare       lambda_kd  flags
    "logits":   Method(plain(Logits),      logits,            0.1),
    "st":       Method(plain(SoftTarget),  logits,            0.1, dict(T=4.0), protocols={"crd": dict(lambda_ce=0.1, lambda_kd=0.9), "mdistiller-imagenet": dict(lambda_ce=0.5, lambda_kd=0.5, flags=dict(T=1.0))}),
    "at":       Method(plain(AT),          stages,         1000.0, dict(p=2.0, absolute=True), needs="size", protocols=dict(crd=dict(reduce="sum", flags=dict(absolute=False)))),
    "fitnet":   Method(plain(Hint),        stages,            0.1, needs=BOTH, stages=(-1,), protocols=dict(crd=dict(lambda_kd=100.0, stages=(2,), needs="regressor+relu"))),
    "nst":      Method(plain(NST),         stages,           10.0, dict(kernel=("poly", "linear", "gauss")), needs="size", stages=(-1,), protocols=dict(crd=dict(lambda_kd=50.0, stages=None, reduce="sum"))),
    "pkt":      Method(plain(PKTCosSim),   feat,          10000.0, dict(eps=1e-6), protocols=dict(crd=dict(lambda_kd=30000.0, flags=dict(eps=1e-7))), relates=True),
    "fsp":      Method(plain(FSP),         pairs,             1.0, needs=BOTH, phases=ZOO_INIT, protocols=dict(crd=dict(reduce="sum", phases=CRD_INIT))),
    "ft":       Method(build_ft,           factors,         200.0, dict(k=0.5, use_bn=("auto", "yes", "no", "translator"), factor=("channels", "spatial"), init=INIT), needs="size", stages=(-1,), phases=paraphrase_first(0.1), protocols=dict(crd=dict(phases=paraphrase_first(0.2), pairs=FT_PAIRS, needs="", flags=dict(use_bn="translator", factor="spatial", init="torch")))),
    "rkd":      Method(plain(RKD),         feat,              1.0, dict(w_dist=25.0, w_angle=50.0), relates=True),
    "ab":       Method(build_ab,           preacts,          10.0, dict(m=2.0), needs=BOTH, phases=ZOO_INIT, protocols=dict(crd=dict(compare=preacts_summed, lambda_kd=0.003, reduce="sum", flags=dict(m=1.0), needs="connector", phases=CRD_INIT))),
    "sp":       Method(plain(SP),          stages,         3000.0, protocols=dict(crd=dict(stages=(-1,))), relates=True),
    "sobolev":  Method(plain(Sobolev),     input_gradient,   20.0, teacher="grad"),
    "bss":      Method(build_bss,          boundary,          2.0, dict(T=3.0, attack_size=32), ramp=late_and_fading, graph=False),
    "cc":       Method(build_cc,           feat,            100.0, dict(relation=("kernel", "neighbours"), gamma=0.4, P_order=2, feat_dim=128), protocols=dict(crd=dict(lambda_kd=0.02, flags=dict(relation="neighbours"))), relates=True),
    "lwm":      Method(plain(LwM),         class_activation,  0.4, dict(cam=("gradient", "activation")), stages=(-2,), teacher="grad"),
    "irg":      Method(plain(IRG),         relation_graph,    1.0, IRG_FLAGS, stages=(-2, -1), relates=True),
    "vid":      Method(build_vid,          stages,            1.0, dict(sf=1.0, init_var=5.0, eps=1e-6, init=INIT), needs="size", protocols=dict(crd=dict(reduce="sum", flags=dict(eps=1e-5, init="torch")))),
    "ofd":      Method(build_ofd,          preacts,           0.5, dict(margin=("batch", "bn")), needs="size", protocols={"crd": dict(compare=preacts_summed, lambda_kd=0.001, reduce="sum", flags=dict(margin="bn"), teacher_bn="batch"), "mdistiller-imagenet": dict(lambda_kd=0.0001, batch_size=128)}),
    "afd":      Method(build_afd,          stages,          500.0, dict(att_f=1.0, attention=("se", "paper")), needs=BOTH),
    "crd":      Method(build_crd,          contrast,     up_to_ten_classes(0.2, 0.8), CRD_FLAGS, protocols={"crd": dict(lambda_kd=0.8, flags=dict(nce_t=0.07)), "mdistiller-imagenet": dict(batch_size=256)}),
    "dml":      Method(plain(DML),         mutual,            1.0, phases=BOTH_LEARN, teacher="trained"),
    "kdsvd":    Method(plain(KDSVD),       maps,              1.0, dict(k=1, unfold=("channels", "space")), needs="size", graph=False),
    "reviewkd": Method(build_reviewkd,     review,            1.0, dict(mid_channel=512, s_preact=False, pooled=True), ramp=warmup(20), protocols={"crd": REVIEWKD_PAIRS, "reviewkd": REVIEWKD_PAIRS | dict(ramp=warmup(20, first=0), teacher_bn="batch"), "knowledgereview": KNOWLEDGEREVIEW, "mdistiller-imagenet": REVIEWKD_IMAGENET | dict(batch_size=256), "reviewkd-imagenet": REVIEWKD_IMAGENET}),
    "dkd":      Method(plain(DKD),         with_target,       1.0, dict(alpha=1.0, beta=8.0, T=4.0), ramp=warmup(20), protocols={"crd": DKD_PAIRS, "mdistiller-imagenet": DKD_IMAGENET}),
    # since then
    "lskd":     Method(plain(LSKD),        logits,            9.0, dict(T=2.0), lambda_ce=0.1, protocols=dict(crd=dict(pairs=LSKD_PAIRS))),
    "dist":     Method(plain(DIST),        logits,            2.0, dict(beta=1.0, gamma=1.0, T=4.0), relates=True, protocols={IMAGENET: dict(flags=dict(T=1.0))}),
    "nkd":      Method(plain(NKD),         with_target,       1.0, dict(gamma=3.5, T=3.0), protocols={IMAGENET: dict(flags=dict(gamma=1.5, T=1.0))}),
    "ttm":      Method(plain(TTM),         logits,            4.5, dict(gamma=0.1), protocols=dict(crd=dict(lambda_kd=45.0))),
    "wttm":     Method(plain(WTTM),        logits,            0.5, dict(gamma=0.2), protocols=dict(crd=dict(lambda_kd=4.0))),
    "rld":      Method(plain(RLD),         with_target,       1.0, dict(alpha=1.0, beta=8.0, T=4.0, alpha_T=1.0), ramp=warmup(20), protocols={IMAGENET: dict(ramp=constant, flags=dict(beta=0.5, T=1.0), pairs={MOBILE: dict(flags=dict(beta=2.0))})}),
    "ctkd":     Method(build_ctkd,         at_its_epoch,      0.9, CTKD_FLAGS, lambda_ce=0.1, protocols={IMAGENET: dict(lambda_kd=1.0, lambda_ce=1.0, flags=dict(loops=5.0))}),
    "wsld":     Method(plain(partial(WSLD, 1.0)), with_target, 2.25, dict(T=4.0), protocols={IMAGENET: dict(lambda_kd=2.5, flags=dict(T=2.0))}),
    "srrl":     Method(build_srrl,         teachers_logits,   1.0, dict(weight=1.0, project=("map", "vector"))),
    "simkd":    Method(build_simkd,        last,              1.0, dict(factor=2), phases=(Phase(ce=False),), lambda_ce=0.0, reuses=True),
    "itrd":     Method(build_itrd,         feat,              1.0, dict(lambda_corr=2.0, lambda_mutual=0.05, power=1.5), relates=True, protocols=dict(crd=dict(pairs=ITRD_PAIRS))),
    "pefd":     Method(between(PEFD, "feat"), feat,          25.0, dict(n=3)),
    "vkd":      Method(between(VKD, "feat"), feat,           25.0, dict(map=("cayley", "matrix_exp", "householder")), decay=False),
    "ickd":     Method(between(ICKD, "last"), last,         2.5),
    "catkd":    Method(plain(CATKD),       class_maps,        1.5, dict(resolution=2, normalize=False), protocols={"crd": dict(pairs=CATKD_PAIRS), IMAGENET: dict(pairs=CATKD_IMAGENET)}),
    "mlkd":     Method(build_mlkd,         two_views,        0.09, dict(base=4.0, form=("released", "intended")), lambda_ce=0.1, strong=True, relates=True, protocols={"crd": dict(lambda_kd=0.9), IMAGENET: dict(lambda_kd=0.5, lambda_ce=0.5, flags=dict(base=1.0))}),
    "wkd_l":    Method(build_wkd_l,        transport,         1.0, WKD_L_FLAGS, prepare=class_distances, protocols={"crd": dict(pairs=WKD_L_PAIRS), IMAGENET: WKD_L_IMAGENET}),
    "wkd_f":    Method(build_wkd_f,        last,             0.08, dict(ratio=4.0, grid=1), ramp=fading_from(FADES), protocols={"crd": dict(pairs=WKD_F_PAIRS), IMAGENET: WKD_F_IMAGENET}),
    "sdd":      Method(build_sdd,          regions,           0.9, SDD_FLAGS, lambda_ce=0.1),
    "mgd":      Method(between(MGD, "last"), last,       0.0012, dict(lam=0.15), needs="size", protocols={IMAGENET: dict(lambda_kd=0.00007)}),
    "crld":     Method(plain(CRLD),        two_views,         1.0, dict(wv=2.0, cv=0.5, T=4.0, tau_w=0.9, tau_s=0.2), strong=True),
    "semckd":   Method(build_semckd,       whole_batches,    40.0, dict(soft=1.0), relates=True, sized=True, protocols=dict(crd=dict(lambda_kd=400.0))),
    "ofa":      Method(build_ofa,          branches,          1.0, dict(eps=1.0, T=1.0)),
}
# fmt: on

FLAG_HELP = {
    "T": "temperature",
    "p": "exponent of the activations",
    "absolute": "1: of their absolute value; 0: of the value as it is, as in the CRD benchmark",
    "kernel": "polynomial, linear or Gaussian",
    "k": "share of the channels in a factor (ft), number of singular vectors (kdsvd)",
    "use_bn": "batch norm in paraphraser and translator; auto: up to 10 classes",
    "w_dist": "weight of the distances",
    "w_angle": "weight of the angles",
    "m": "margin",
    "attack_size": "images attacked a batch",
    "factor": "compared channel by channel, or as a map of its mean squares (the CRD benchmark's)",
    "relation": "of all samples by a Gaussian kernel, or of neighbours in the batch (the CRD benchmark's)",
    "gamma": "of the Gaussian kernel",
    "P_order": "order of its Taylor expansion",
    "cam": "what is weighted by the gradient's mean: the gradient, or the activation (Grad-CAM)",
    "w_irg_vert": "weight of the vertices",
    "w_irg_edge": "weight of the edges",
    "w_irg_tran": "weight of the transformations",
    "sf": "width of the regressor as a share of the teacher's channels",
    "init_var": "variance at the start",
    "vid.eps": "least variance",
    "pkt.eps": "added to norms and probabilities",
    "init": "of its layers: kaiming as KD-Zoo, or torch's own as the CRD benchmark",
    "margin": "measured on each batch, or from the teacher's batch norms",
    "att_f": "width of the attention as a share of the channels",
    "attention": "squeeze-and-excitation as in KD-Zoo, or the paper's",
    "feat_dim": "width of the embeddings",
    "nce_n": "negatives a sample",
    "nce_t": "temperature",
    "nce_mom": "momentum of the memory banks",
    "mode": "positives: the sample itself, or any of its class",
    "bank": "where the memory banks lie: host for a device without room for them",
    "unfold": "rows of the unfolded map: channels and height, or positions",
    "mid_channel": "width of the fused maps, at most the student's last",
    "s_preact": "1: the student's maps before the activation",
    # of one method alone, where others have a flag of the name
    "dist.beta": "weight of the correlation within a sample",
    "dist.gamma": "weight of the correlation of a class over the batch",
    "nkd.gamma": "weight of the classes other than the target",
    "nkd.T": "their temperature",
    "ttm.gamma": "power of the teacher's probabilities, a temperature of 1 / gamma",
    "wttm.gamma": "power of the teacher's probabilities, a temperature of 1 / gamma",
    "rld.alpha": "weight of the confidence part",
    "rld.beta": "weight of the classes below the label",
    "rld.T": "temperature of the latter",
    "alpha_T": "temperature of the confidence part",
    "t_start": "least temperature",
    "t_end": "width of the range above it",
    "loops": "epochs until the temperature's gradient is fully reversed",
    "weight": "of the logits' term beside the features'",
    "project": "the student's map, pooled afterwards, or its pooled vector",
    "simkd.factor": "how much narrower the projector is inside",
    "lambda_corr": "weight of the correlation term",
    "lambda_mutual": "weight of the mutual term (authors' example: 1)",
    "power": "of the correlations (networks of one family: 1.01)",
    "n": "number of projectors",
    "map": "how the orthonormal matrix is parametrised",
    "resolution": "side of the pooled class activation maps",
    "normalize": "1: scale each map to length 1",
    "base": "temperature of plain distillation among the others",
    "form": "what the release executes, or what it was meant to",
    "wkd_l.weight": "of the transport beside the target's part",
    "eps": "smoothing of the transport",
    "iters": "Sinkhorn steps",
    "sharpen": "of the classes' distances, 0: as they are",
    "measured": "of the teacher, for the classes' distances: each position of its last map, ...",
    "ratio": "weight of the means beside the deviations",
    "grid": "cells a side, each with its own Gaussian",
    "inner": "loss on each region's logits",
    "scales": "regions a side",
    "w_comp": "weight of regions where the teacher contradicts itself",
    "lam": "share of the student's channels that are masked",
    "wv": "weight within a view",
    "cv": "weight across the views",
    "tau_w": "least confidence of the teacher on the weak view",
    "tau_s": "the same on the strong view",
    "soft": "temperature of the attention",
    "ofa.eps": "above 1 it raises the target's weight (ImageNet's ResNet18: 1.5)",
    "pooled": "0: without the pooled features, as KnowledgeReview",
    "alpha": "weight of the target class part",
    "beta": "weight of the other classes' part; under --protocol crd by the pair",
}
