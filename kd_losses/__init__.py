"""The table of methods: one row per --kd_mode.

    from kd_losses import METHODS
    METHODS["at"]                      # what AT is, what it is fed, its weight and its flags

A row says how the loss is built, what it is fed, its weight, its flags, what must agree between the
two networks, and its phases. It holds no state. What a published table sets is in
`engine/published.py`. To add a method: one file next to this one, one row here, one test file
(docs/contributing.md).
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from .at import AT
from .catkd import CATKD
from .crld import CRLD
from .ctkd import CTKD
from .dist import DIST
from .dkd import DKD
from .dml import DML
from .fitnet import Hint
from .fsp import FSP
from .ickd import ICKD
from .irg import IRG
from .kdsvd import KDSVD
from .logits import Logits
from .lskd import LSKD
from .lwm import LwM
from .mgd import MGD
from .nkd import NKD
from .nst import NST
from .pefd import PEFD
from .pkt import PKTCosSim
from .rkd import RKD
from .rld import RLD
from .sobolev import Sobolev
from .sp import SP
from .st import SoftTarget
from .ttm import TTM
from .vkd import VKD
from .wttm import WTTM

# what _wiring.py builds: not used here, so that every loss can be imported from the package
from .ab import AB as AB
from .afd import AFD as AFD
from .bss import BSS as BSS
from .cc import CC as CC, NeighbourCC as NeighbourCC
from .crd import CRD as CRD
from .ft import FT as FT, Paraphraser as Paraphraser, Translator as Translator
from .itrd import ITRD as ITRD
from .mlkd import MLKD as MLKD
from .ofa import OFA as OFA
from .ofd import OFD as OFD
from .reviewkd import ABF as ABF, ReviewKD as ReviewKD
from .sdd import SDD as SDD
from .semckd import SemCKD as SemCKD
from .simkd import SimKD as SimKD
from .srrl import SRRL as SRRL
from .vid import VID as VID
from .wkd_f import WKDF as WKDF
from .wkd_l import WKDL as WKDL
from .wsld import WSLD as WSLD

# after the loss files: `logits` is a file, too, and here it is what a loss is fed; the two names
# with `as` are for engine/published.py
from ._wiring import (
    FADES,
    Inputs,
    at_its_epoch,
    between,
    boundary,
    branches,
    build_ab,
    build_afd,
    build_bss,
    build_cc,
    build_crd,
    build_ft,
    build_itrd,
    build_mlkd,
    build_ofa,
    build_ofd,
    build_reviewkd,
    build_sdd,
    build_semckd,
    build_simkd,
    build_srrl,
    build_vid,
    build_wkd_f,
    build_wkd_l,
    build_wsld,
    class_activation,
    class_distances,
    class_maps,
    contrast,
    faded,
    factors,
    feat,
    input_gradient,
    last,
    logits,
    maps,
    mutual,
    names_labels,
    pairs,
    preacts,
    preacts_summed as preacts_summed,
    reconstruction,
    regions,
    relation_graph,
    review,
    stages,
    teachers_logits,
    transport,
    transport_on_imagenet as transport_on_imagenet,
    two_views,
    whole_batches,
    with_target,
)

# --- phases ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Phase:
    """A part of the training with its own loss, trainable modules and optimizer.

    epochs: in the protocol's number of epochs, scaled with --epochs; None: --epochs itself.
    ce: whether cross-entropy is part of the loss. kd: whether the method's loss is.
    inputs: what the method is fed in this phase; None: what its row says.
    weight: of the method's loss in this phase; None: lambda_kd.
    trainable: of 'student', 'backbone' (the student without its classifier), 'features' (what the
    student's deepest map depends on), 'teacher', 'kd' (the parameters of method and adapter) or
    'kd.NAME' (one module of the method).
    lr: None for the protocol's milestones, else ((share of the phase, factor of --lr), ...).
    nesterov: None for the protocol's.
    """

    name: str = "distil"
    epochs: int | None = None
    ce: bool = True
    kd: bool = True
    inputs: Inputs | None = None
    weight: float | None = None
    trainable: tuple[str, ...] = ("student", "kd")
    lr: tuple[tuple[float, float], ...] | None = None
    nesterov: bool | None = None

    @property
    def student_learns(self) -> bool:
        """Whether the student is trained, as a whole or without its classifier."""
        return bool({"student", "backbone", "features"} & set(self.trainable))

    @property
    def teacher_learns(self) -> bool:
        return "teacher" in self.trainable


ONE_PHASE = (Phase(),)
BOTH_LEARN = (Phase(trainable=("student", "teacher", "kd")),)
NO_CE = (Phase(ce=False),)
LABELS_ALONE = (Phase(name="train", kd=False, trainable=("student",)),)  # of no method


def init_then_ce(epochs: int, *lr: tuple[float, float], trainable: str = "backbone"):
    """The method trains the backbone for `epochs`, then cross-entropy alone trains the student.

    As in KD-Zoo, but for two things: there weight decay acts on the idle classifier, and the
    momentum of the first phase is carried into the second.
    """
    init = Phase(name="init", epochs=epochs, ce=False, trainable=(trainable, "kd"), lr=lr)
    return (init, Phase(name="train", kd=False, trainable=("student",)))


ZOO_INIT = init_then_ce(50, (0.6, 0.1), (0.2, 0.01), (0.2, 0.001))
CRD_INIT = init_then_ce(30, (1.0, 1.0), trainable="features")


def paraphrase_first(lr: float):
    """The paraphraser learns to reconstruct the teacher's map, with `lr` times the learning rate.
    After that it is frozen."""
    first = Phase(
        name="paraphrase",
        epochs=30,
        ce=False,
        inputs=reconstruction,
        weight=1.0,
        trainable=("kd.paraphraser",),
        lr=((1.0, lr),),
        nesterov=False,
    )
    return (first, Phase(trainable=("student", "kd.translator")))


# --- ramps: how the weight changes: (epoch from 1, epochs) -> factor, in the protocol's epochs ----


def constant(epoch: int, epochs: int) -> float:
    return 1.0


def warmup(length: int, first: int = 1):
    """Grows linearly to 1 over the first `length` epochs; the first epoch counts as `first`."""
    return lambda epoch, epochs: min((epoch - 1 + first) / length, 1.0)


def late_and_fading(epoch: int, epochs: int) -> float:
    """0 for ten epochs, then falls linearly to 0 at 80 % of the training (KD-Zoo's BSS)."""
    return 0.0 if epoch <= 10 else max(1 - 1.25 * (epoch - 1) / epochs, 0.0)


def fading_from(start: float):
    """1 until the share `start` of the training is over, then falls to 0 along a cosine."""
    return lambda epoch, epochs: faded(
        torch.tensor(epoch / epochs, dtype=torch.float64), start
    ).item()


def up_to_ten_classes(few: float, many: float):
    """A weight that depends on the dataset: `few` up to 10 classes (CIFAR-10), else `many`."""
    return lambda num_class: few if num_class <= 10 else many


# --- what a row is --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Flag:
    """A flag of a method: --NAME, an argument of the loss or of its builder.

    kind: float, int, bool (0 or 1) or str (one of `choices`).
    only: (another flag, its value) where this one has no effect otherwise.
    """

    default: float | int | bool | str
    help: str
    kind: type = float
    choices: tuple[str, ...] = ()
    only: tuple[str, str] | None = None


def choice(help: str, *choices: str) -> Flag:
    """A flag with choices, of which the first is the default."""
    return Flag(choices[0], help, str, choices)


@dataclass(frozen=True)
class Method:
    """A row.

    loss: the class, called with the flags; or a builder, a function (s, t, train, **flags) ->
    module.
    inputs: what the loss is fed. lambda_kd: its weight, or a function of the number of classes.
    match: what must agree between the compared maps: '', 'size' or 'channels+size'; an adapter
    makes it agree (engine/adapter.py).
    stages: which are compared, counted from the deepest (-1); None: all. reduce: over the stages.
    lambda_ce: the weight of the cross-entropy. ramp: the factor of lambda_kd in each epoch.
    teacher: 'frozen', 'grad' (gradients flow through it to the image) or 'trained'.
    relational: whether it compares the images of a batch with each other.
    two_views: whether it needs a second, strongly augmented view of each image.
    fixed_batch: whether it is built for one batch size, its flag 'batch'.
    no_decay: whether its own parameters have no weight decay.
    deploys_projector: whether the trained network is the student with the method's projector and
    the teacher's classifier.
    capturable: whether a step never reads a value from the device, so that CUDA can capture it.
    precompute: Inputs-like (loss, tapped teacher, training batches, labels, **flags) -> a line for
    the log; called once before the training.
    """

    loss: Callable
    inputs: Inputs
    lambda_kd: float | Callable[[int], float]
    flags: dict[str, Flag] = field(default_factory=dict)
    match: str = ""
    stages: tuple[int, ...] | None = None
    reduce: str = "mean"
    lambda_ce: float = 1.0
    ramp: Callable[[int, int], float] = constant
    phases: tuple[Phase, ...] = ONE_PHASE
    teacher: str = "frozen"
    relational: bool = False
    two_views: bool = False
    fixed_batch: bool = False
    no_decay: bool = False
    deploys_projector: bool = False
    capturable: bool = True
    precompute: Inputs | None = None

    @property
    def reads_classifier(self) -> bool:
        """Whether it reads or deploys the teacher's classifier."""
        return self.inputs.classifier or self.deploys_projector

    @property
    def reads_answers(self) -> bool:
        """Whether the teacher's classes have to be the dataset's: its logits or its classifier are
        read, or it learns from the labels itself."""
        fed = [self.inputs, self.precompute, *(phase.inputs for phase in self.phases)]
        reads = any(inputs.reads_answers for inputs in fed if inputs)
        return reads or self.deploys_projector or self.teacher == "trained"

    @property
    def reads_labels(self) -> bool:
        """Whether its loss reads the labels of the training images."""
        fed = [self.inputs, self.precompute, *(phase.inputs for phase in self.phases)]
        builder = [] if isinstance(self.loss, type) else [self.loss]
        return any(x.reads_labels for x in fed if x) or any(map(names_labels, builder))

    def build(self, s, t, train, flags: dict):
        """The loss module. s, t: Features of a trial pass; train: the training set."""
        if isinstance(self.loss, type):
            return self.loss(**flags)
        return self.loss(s, t, train, **flags)


# --- the flags of the methods that have several ---------------------------------------------------


def temperature(default: float) -> Flag:
    return Flag(default, "temperature")


INIT = choice("initialisation: kaiming as KD-Zoo, torch as the CRD benchmark", "kaiming", "torch")
AT_FLAGS = dict(
    p=Flag(2.0, "exponent of the activations"),
    absolute=Flag(True, "1: of |f|; 0: of f itself, as in the CRD benchmark", bool),
)
FT_FLAGS = dict(
    k=Flag(0.5, "channels of a factor, as a share of the teacher's"),
    use_bn=choice("batch norm in both; auto: up to 10 classes", "auto", "yes", "no", "translator"),
    factor=choice("compare channels, or their mean square (CRD benchmark)", "channels", "spatial"),
    init=INIT,
)
RKD_FLAGS = dict(
    w_dist=Flag(25.0, "weight of the distances"),
    w_angle=Flag(50.0, "weight of the angles"),
)
BSS_FLAGS = dict(T=temperature(3.0), attack_size=Flag(32, "images attacked per batch", int))
CC_FLAGS = dict(
    relation=choice("Gaussian kernel, or neighbours (CRD benchmark)", "kernel", "neighbours"),
    gamma=Flag(0.4, "gamma of the Gaussian kernel", only=("relation", "kernel")),
    P_order=Flag(2, "order of its Taylor expansion", int, only=("relation", "kernel")),
    feat_dim=Flag(128, "width of the embeddings", int, only=("relation", "neighbours")),
)
IRG_FLAGS = dict(
    w_irg_vert=Flag(0.1, "weight of the vertices"),
    w_irg_edge=Flag(5.0, "weight of the edges"),
    w_irg_tran=Flag(5.0, "weight of the transformations"),
)
VID_FLAGS = dict(
    sf=Flag(1.0, "width of the regressor, as a share of the teacher's channels"),
    init_var=Flag(5.0, "initial variance"),
    eps=Flag(1e-6, "minimum variance"),
    init=INIT,
)
AFD_FLAGS = dict(
    att_f=Flag(1.0, "width of the attention, as a share of the channels"),
    attention=choice("squeeze-and-excitation as in KD-Zoo, or the paper's", "se", "paper"),
)
CRD_FLAGS = dict(
    feat_dim=Flag(128, "width of the embeddings", int),
    nce_n=Flag(16384, "negatives per sample", int),
    nce_t=Flag(0.1, "temperature"),
    nce_mom=Flag(0.5, "momentum of the memory banks"),
    mode=choice("positives: the sample itself, or any of its class", "exact", "relax"),
    bank=choice("where the memory banks are stored", "device", "host"),
)
KDSVD_FLAGS = dict(
    k=Flag(1, "number of singular vectors", int),
    unfold=choice(
        "rows of the unfolded map: channels and height, or positions", "channels", "space"
    ),
)
REVIEWKD_FLAGS = dict(
    mid_channel=Flag(512, "width of the fused maps, at most the student's last", int),
    s_preact=Flag(False, "1: the student's maps before the activation", bool),
    pooled=Flag(True, "0: without the pooled features, as in KnowledgeReview", bool),
)
DKD_FLAGS = dict(
    alpha=Flag(1.0, "weight of the target class part"),
    beta=Flag(8.0, "weight of the non-target classes part"),
    T=temperature(4.0),
)
DIST_FLAGS = dict(
    beta=Flag(1.0, "weight of the correlation within a sample"),
    gamma=Flag(1.0, "weight of the correlation of a class over the batch"),
    T=temperature(4.0),
)
NKD_FLAGS = dict(
    gamma=Flag(3.5, "weight of the non-target classes"),
    T=Flag(3.0, "temperature of the non-target classes"),
)
POWER = "power of the teacher's probabilities (temperature 1 / gamma)"
TTM_FLAGS, WTTM_FLAGS = dict(gamma=Flag(0.1, POWER)), dict(gamma=Flag(0.2, POWER))
RLD_FLAGS = dict(
    alpha=Flag(1.0, "weight of the confidence part"),
    beta=Flag(8.0, "weight of the classes ranked below the label"),
    T=Flag(4.0, "temperature of the classes ranked below the label"),
    alpha_T=Flag(1.0, "temperature of the confidence part"),
)
CTKD_FLAGS = dict(
    t_start=Flag(1.0, "minimum temperature"),
    t_end=Flag(20.0, "width of the temperature range"),
    loops=Flag(10.0, "epochs until the temperature's gradient is fully reversed"),
)
SRRL_FLAGS = dict(
    weight=Flag(1.0, "weight of the logits term (the features term has weight 1)"),
    project=choice("project the map and pool it, or the pooled vector", "map", "vector"),
)
ITRD_FLAGS = dict(
    lambda_corr=Flag(2.0, "weight of the correlation term"),
    lambda_mutual=Flag(0.05, "weight of the mutual information term (authors' example: 1)"),
    power=Flag(1.5, "exponent of the correlations (networks of one family: 1.01)"),
)
OFD_FLAGS = dict(
    margin=choice("measured on each batch, or from the teacher's batch norms", "batch", "bn")
)
VKD_FLAGS = dict(
    map=choice("parametrisation of the orthonormal matrix", "cayley", "matrix_exp", "householder")
)
CATKD_FLAGS = dict(
    resolution=Flag(2, "height and width of the pooled class activation maps", int),
    normalize=Flag(False, "1: normalise each map to length 1", bool),
)
MLKD_FLAGS = dict(
    base=Flag(4.0, "temperature of the plain distillation term"),
    form=choice(
        "what the released code executes, or what it was meant to do", "released", "intended"
    ),
)
WKD_L_FLAGS = dict(
    T=temperature(8.0),
    weight=Flag(600.0, "weight of the transport term (the target term has weight 1)"),
    eps=Flag(0.05, "smoothing of the transport"),
    iters=Flag(10, "Sinkhorn iterations", int),
    sharpen=Flag(1.0, "sharpening of the class distances; 0: none"),
    measured=choice("what the class distances compare", "positions", "pooled", "logits"),
)
WKD_F_FLAGS = dict(
    ratio=Flag(4.0, "weight of the means (the deviations have weight 1)"),
    grid=Flag(1, "cells per side, each with its own Gaussian", int),
)
SDD_FLAGS = dict(
    inner=choice("loss on the logits of each region", "kl", "dkd"),
    scales=choice("regions per side", "1,2,4", "1,2"),
    w_comp=Flag(2.0, "weight of regions where the teacher contradicts itself"),
    T=temperature(4.0),
    alpha=Flag(1.0, "weight of the target class part", only=("inner", "dkd")),
    beta=Flag(8.0, "weight of the non-target classes part", only=("inner", "dkd")),
)
CRLD_FLAGS = dict(
    wv=Flag(2.0, "weight within a view"),
    cv=Flag(0.5, "weight across the views"),
    T=temperature(4.0),
    tau_w=Flag(0.9, "minimum confidence of the teacher on the weak view"),
    tau_s=Flag(0.2, "minimum confidence of the teacher on the strong view"),
)
OFA_FLAGS = dict(
    eps=Flag(1.0, "above 1: raises the weight of the target class (ImageNet's ResNet18: 1.5)"),
    T=temperature(1.0),
)
NST_FLAGS = dict(kernel=choice("kernel of the maximum mean discrepancy", "poly", "linear", "gauss"))
LWM_FLAGS = dict(
    cam=choice(
        "the gradient, or the activation weighted by it (Grad-CAM)", "gradient", "activation"
    )
)
SIMKD_FLAGS = dict(factor=Flag(2, "factor by which the projector is narrower inside", int))
SEMCKD_FLAGS = dict(soft=Flag(1.0, "temperature of the attention"))
PKT_FLAGS = dict(eps=Flag(1e-6, "added to norms and probabilities"))
MGD_FLAGS = dict(lam=Flag(0.15, "share of the student's channels that are masked"))

# --- the table ------------------------------------------------------------------------------------

BOTH = "channels+size"
CRD_WEIGHT = up_to_ten_classes(0.2, 0.8)
DEEPEST, TWO_DEEPEST = (-1,), (-2, -1)

METHODS = {
    # mode: loss, inputs, lambda_kd, flags, ...
    # KD-Zoo's
    "logits": Method(Logits, logits, 0.1),
    "st": Method(SoftTarget, logits, 0.1, dict(T=temperature(4.0))),
    "at": Method(AT, stages, 1000.0, AT_FLAGS, match="size"),
    "fitnet": Method(Hint, stages, 0.1, match=BOTH, stages=DEEPEST),
    "nst": Method(NST, stages, 10.0, NST_FLAGS, match="size", stages=DEEPEST),
    "pkt": Method(PKTCosSim, feat, 10000.0, PKT_FLAGS, relational=True),
    "fsp": Method(FSP, pairs, 1.0, match=BOTH, phases=ZOO_INIT),
    "ft": Method(build_ft, factors, 200.0, FT_FLAGS, "size", DEEPEST, phases=paraphrase_first(0.1)),
    "rkd": Method(RKD, feat, 1.0, RKD_FLAGS, relational=True),
    "ab": Method(build_ab, preacts, 10.0, dict(m=Flag(2.0, "margin")), BOTH, phases=ZOO_INIT),
    "sp": Method(SP, stages, 3000.0, relational=True),
    "sobolev": Method(Sobolev, input_gradient, 20.0, teacher="grad"),
    "bss": Method(build_bss, boundary, 2.0, BSS_FLAGS, ramp=late_and_fading, capturable=False),
    "cc": Method(build_cc, feat, 100.0, CC_FLAGS, relational=True),
    "lwm": Method(LwM, class_activation, 0.4, LWM_FLAGS, stages=(-2,), teacher="grad"),
    "irg": Method(IRG, relation_graph, 1.0, IRG_FLAGS, stages=TWO_DEEPEST, relational=True),
    "vid": Method(build_vid, stages, 1.0, VID_FLAGS, match="size"),
    "ofd": Method(build_ofd, preacts, 0.5, OFD_FLAGS, match="size"),
    "afd": Method(build_afd, stages, 500.0, AFD_FLAGS, match=BOTH),
    "crd": Method(build_crd, contrast, CRD_WEIGHT, CRD_FLAGS),
    "dml": Method(DML, mutual, 1.0, phases=BOTH_LEARN, teacher="trained"),
    "kdsvd": Method(KDSVD, maps, 1.0, KDSVD_FLAGS, match="size", capturable=False),
    "reviewkd": Method(build_reviewkd, review, 1.0, REVIEWKD_FLAGS, ramp=warmup(20)),
    "dkd": Method(DKD, with_target, 1.0, DKD_FLAGS, ramp=warmup(20)),
    # newer
    "lskd": Method(LSKD, logits, 9.0, dict(T=temperature(2.0)), lambda_ce=0.1),
    "dist": Method(DIST, logits, 2.0, DIST_FLAGS, relational=True),
    "nkd": Method(NKD, with_target, 1.0, NKD_FLAGS),
    "ttm": Method(TTM, logits, 4.5, TTM_FLAGS),
    "wttm": Method(WTTM, logits, 0.5, WTTM_FLAGS),
    "rld": Method(RLD, with_target, 1.0, RLD_FLAGS, ramp=warmup(20)),
    "ctkd": Method(CTKD, at_its_epoch, 0.9, CTKD_FLAGS, lambda_ce=0.1),
    "wsld": Method(build_wsld, with_target, 2.25, dict(T=temperature(4.0))),
    "srrl": Method(build_srrl, teachers_logits, 1.0, SRRL_FLAGS),
    "simkd": Method(
        build_simkd, last, 1.0, SIMKD_FLAGS, lambda_ce=0.0, phases=NO_CE, deploys_projector=True
    ),
    "itrd": Method(build_itrd, feat, 1.0, ITRD_FLAGS, relational=True),
    "pefd": Method(between(PEFD, "feat"), feat, 25.0, dict(n=Flag(3, "number of projectors", int))),
    "vkd": Method(between(VKD, "feat"), feat, 25.0, VKD_FLAGS, no_decay=True),
    "ickd": Method(between(ICKD, "last"), last, 2.5),
    "catkd": Method(CATKD, class_maps, 1.5, CATKD_FLAGS),
    "mlkd": Method(
        build_mlkd, two_views, 0.09, MLKD_FLAGS, lambda_ce=0.1, two_views=True, relational=True
    ),
    "wkd_l": Method(build_wkd_l, transport, 1.0, WKD_L_FLAGS, precompute=class_distances),
    "wkd_f": Method(build_wkd_f, last, 0.08, WKD_F_FLAGS, ramp=fading_from(FADES)),
    "sdd": Method(build_sdd, regions, 0.9, SDD_FLAGS, lambda_ce=0.1),
    "mgd": Method(between(MGD, "last"), last, 0.0012, MGD_FLAGS, match="size"),
    "crld": Method(CRLD, two_views, 1.0, CRLD_FLAGS, two_views=True),
    "semckd": Method(
        build_semckd, whole_batches, 40.0, SEMCKD_FLAGS, relational=True, fixed_batch=True
    ),
    "ofa": Method(build_ofa, branches, 1.0, OFA_FLAGS),
}
