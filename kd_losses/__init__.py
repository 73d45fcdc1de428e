"""The table of methods: one row per --kd_mode.

A row says how the loss is built, what it compares, its weight, its flags with their defaults, what the
comparison needs of the two networks, its phases, the teacher's part and what a protocol changes. It
holds no state. To add a method: one file beside this one, one row here, its values in tests/data.
"""

from dataclasses import dataclass, field, replace
from typing import Callable

from torch import nn

from .at import AT
from .crd import CRD
from .dml import DML
from .fitnet import Hint
from .fsp import FSP
from .pkt import PKTCosSim
from .sobolev import Sobolev
from .st import SoftTarget
from .vid import VID

# --- what is compared: (kd, s, t, batch) -> a loss, or one per stage -------------------------------
# kd: the module that `build` made; s, t: the Features of student and teacher; batch: img, target, index


def wants(*kinds: str):
    """Name the features that a comparison reads: 'out', 'stem', 'stages', 'preacts', 'feat'."""

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


@wants("stem", "stages")
def pairs(kd, s, t, batch):
    fms_s, fms_t = [s.stem, *s.stages], [t.stem, *t.stages]
    return [kd(*maps) for maps in zip(fms_s, fms_s[1:], fms_t, fms_t[1:])]


@wants("out")
def input_gradient(kd, s, t, batch):
    return kd(s.out, t.out, batch.img, batch.target)


def one_each(kd, maps: list) -> list:
    """The loss of each map: a ModuleList has its own for each, another module serves all."""
    return list(kd) if isinstance(kd, nn.ModuleList) else [kd] * len(maps)


# --- how the loss is built: (s, t, train, **flags) -> nn.Module -----------------------------------
# s, t: Features of a dry pass, for their shapes; train: the training set, for its labels and size


def plain(loss):
    """`loss(**flags)`, whatever the networks."""
    return lambda s, t, train, **flags: loss(**flags)


def build_vid(s, t, train, sf, init_var):
    widths = [(fm_s.shape[1], fm_t.shape[1]) for fm_s, fm_t in zip(s.stages, t.stages)]
    return nn.ModuleList(VID(c_s, int(sf * c_t), c_t, init_var) for c_s, c_t in widths)


def build_crd(s, t, train, **flags):
    widths = s.feat.shape[1], t.feat.shape[1]
    return CRD(*widths, n_data=len(train), labels=train.labels, **flags)


# --- phases ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Phase:
    """A stretch of the training with its own loss, learners and optimizer.

    epochs: in the protocol's number of epochs, scaled with --epochs; None: --epochs itself.
    ce: whether cross-entropy is part of the loss; kd: True for the row's comparison, False for none,
    or another comparison. learns: of 'student', 'backbone' (the student without its classifier),
    'teacher', 'kd' (the method's and the adapter's parameters) or 'kd.NAME' (one module of the method).
    lr: None for the recipe's milestones, else ((share of the phase, factor of --lr), ...).
    nesterov: None for the recipe's.
    """

    name: str = "distil"
    epochs: int | None = None
    ce: bool = True
    kd: bool | Callable = True
    learns: tuple[str, ...] = ("student", "kd")
    lr: tuple[tuple[float, float], ...] | None = None
    nesterov: bool | None = None


ONE_PHASE = (Phase(),)
BOTH_LEARN = (Phase(learns=("student", "teacher", "kd")),)


def init_then_ce(epochs: int):
    """The method trains the backbone for `epochs`, then cross-entropy alone trains the student.

    As in KD-Zoo, but for two things: there weight decay acts on the idle classifier, and the momentum
    of the first phase is carried into the second.
    """
    init = Phase(
        name="init",
        epochs=epochs,
        ce=False,
        learns=("backbone", "kd"),
        lr=((0.6, 0.1), (0.2, 0.01), (0.2, 0.001)),
    )
    return (init, Phase(name="train", kd=False, learns=("student",)))


# --- the weight over the epochs: (epoch from 1, epochs) -> factor, both in the protocol's number ---


def constant(epoch: float, epochs: int) -> float:
    return 1.0


def up_to_ten_classes(few: float, many: float):
    """A weight that depends on the dataset: `few` up to 10 classes (CIFAR-10), else `many`."""
    return lambda num_class: few if num_class <= 10 else many


# --- the table -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """A row.

    needs: what must agree for the comparison: '' nothing, 'size' or 'channels+size'; an adapter
    supplies it. teacher: 'frozen', 'grad' (gradients flow through it to the image) or 'trained'.
    stages: which are compared, from the deepest (-1); None: all. reduce: over the stages.
    flags: a tuple lists the choices, the first being the default.
    protocols: fields of the row that a protocol changes; its `flags` are merged into the row's.
    """

    build: Callable
    compare: Callable
    lambda_kd: float | Callable[[int], float]
    flags: dict = field(default_factory=dict)
    needs: str = ""
    phases: tuple[Phase, ...] = ONE_PHASE
    teacher: str = "frozen"
    stages: tuple[int, ...] | None = None
    reduce: str = "mean"
    lambda_ce: float = 1.0
    ramp: Callable = constant
    protocols: dict = field(default_factory=dict)

    def under(self, protocol: str) -> "Method":
        """The row as `protocol` has it."""
        changes = dict(self.protocols.get(protocol, {}))
        changes["flags"] = {**self.flags, **changes.get("flags", {})}
        return replace(self, **changes)


CRD_FLAGS = dict(feat_dim=128, nce_n=16384, nce_t=0.1, nce_mom=0.5, mode=("exact", "relax"))

# fmt: off
METHODS = {
    # mode              build              compare         lambda_kd  flags
    "st":       Method(plain(SoftTarget),  logits,            0.1, dict(T=4.0), protocols=dict(crd=dict(lambda_ce=0.1, lambda_kd=0.9))),
    "at":       Method(plain(AT),          stages,         1000.0, dict(p=2.0), needs="size", protocols=dict(crd=dict(reduce="sum"))),
    "fitnet":   Method(plain(Hint),        stages,            0.1, needs="channels+size", stages=(-1,), protocols=dict(crd=dict(lambda_kd=100.0, stages=(2,)))),
    "pkt":      Method(plain(PKTCosSim),   feat,          10000.0, protocols=dict(crd=dict(lambda_kd=30000.0))),
    "vid":      Method(build_vid,          stages,            1.0, dict(sf=1.0, init_var=5.0), needs="size", protocols=dict(crd=dict(reduce="sum"))),
    "fsp":      Method(plain(FSP),         pairs,             1.0, needs="channels+size", phases=init_then_ce(50), protocols=dict(crd=dict(lambda_kd=50.0, reduce="sum", phases=init_then_ce(30)))),
    "sobolev":  Method(plain(Sobolev),     input_gradient,   20.0, teacher="grad"),
    "crd":      Method(build_crd,          contrast,     up_to_ten_classes(0.2, 0.8), CRD_FLAGS, protocols=dict(crd=dict(lambda_kd=0.8, flags=dict(nce_t=0.07)))),
    "dml":      Method(plain(DML),         mutual,            1.0, phases=BOTH_LEARN, teacher="trained"),
}
# fmt: on

FLAG_HELP = {
    "T": "temperature",
    "p": "exponent of the activations",
    "sf": "width of the regressor as a share of the teacher's channels",
    "init_var": "variance at the start",
    "feat_dim": "width of the embeddings",
    "nce_n": "negatives a sample",
    "nce_t": "temperature",
    "nce_mom": "momentum of the memory banks",
    "mode": "positives: the sample itself, or any of its class",
}
