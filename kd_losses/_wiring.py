"""What the losses are fed and how they are built, two or three lines each. The rows of the table in
`__init__.py` name these functions.

Inputs: `(loss, s, t, batch)` -> a scalar, or a list of one per stage.
    loss: the module that was built; s, t: `network.Features` of student and teacher;
    batch: img (B, 3, H, W), target (B,), index (B,), and epoch, epochs (0-dim): the epoch from 1
    and the number of epochs, both in the protocol's number.
Builders: `(s, t, train, **flags)` -> nn.Module.
    s, t: Features of a trial pass, for their shapes; train: the training set, for its labels and
    size.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from .ab import AB
from .afd import AFD
from .bss import BSS, BSSAttacker, select
from .cc import CC, NeighbourCC
from .crd import CRD
from .ft import FT, Paraphraser, Translator
from .itrd import ITRD
from .mlkd import MLKD
from .ofa import OFA
from .ofd import OFD, bn_margin
from .reviewkd import ReviewKD
from .sdd import SDD
from .sdd import dkd as dkd_of_rows
from .sdd import kl as kl_of_rows
from .semckd import SemCKD
from .simkd import SimKD
from .srrl import SRRL
from .vid import VID
from .wkd_f import WKDF
from .wkd_l import WKDL, cka_cost
from .wsld import WSLD

# --- what a loss is fed ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Inputs:
    """What a loss is fed.

    feed: the function (loss, s, t, batch, **flags) -> a scalar, or a list of one per stage.
    reads: the features that it needs, of 'out', 'stem', 'stages', 'preacts', 'last' and 'feat'.
    flags: the method's flags that `feed` takes by name.
    per_stage: whether it returns a list. one_stage: whether it compares a single stage.
    logits_only: whether it compares logits and nothing else. classifier: whether it reads the
    networks' last layers. calls_nets: whether it calls the networks again.
    """

    feed: Callable
    reads: tuple[str, ...]
    flags: tuple[str, ...] = ()
    per_stage: bool = False
    one_stage: bool = False
    logits_only: bool = False
    classifier: bool = False
    calls_nets: bool = False

    @property
    def reads_logits_alone(self) -> bool:
        """Whether the logits are all that it reads of the networks' features."""
        return self.reads == ("out",)

    @property
    def reads_answers(self) -> bool:
        """Whether the teacher's classes have to be the dataset's: logits or classifier are read."""
        return "out" in self.reads or self.classifier

    @property
    def reads_labels(self) -> bool:
        return names_labels(self.feed)

    @property
    def reads_stages(self) -> bool:
        return bool({"stages", "preacts"} & set(self.reads))


def names_labels(function: Callable) -> bool:
    """Whether a function that feeds or builds a loss reads the labels: `batch.target`, or those of
    the training set."""
    code = function.__code__
    return bool({"target", "labels"} & {*code.co_names, *code.co_varnames})


def reads(*kinds: str, **fields):
    """A decorator: the function becomes an `Inputs` that reads these features."""
    return lambda feed: Inputs(feed, kinds, **fields)


@reads("out", logits_only=True)
def logits(loss, s, t, batch):
    return loss(s.out, t.out)


@reads("out", logits_only=True)
def mutual(loss, s, t, batch):
    return loss(s.out, t.out) + loss(t.out, s.out)


@reads("feat")
def feat(loss, s, t, batch):
    return loss(s.feat, t.feat)


@reads("feat")
def contrast(loss, s, t, batch):
    return loss(s.feat, t.feat, batch.index)


@reads("stages", per_stage=True)
def stages(loss, s, t, batch):
    return [k(fm_s, fm_t) for k, fm_s, fm_t in zip(one_each(loss, s.stages), s.stages, t.stages)]


@reads("stages")
def maps(loss, s, t, batch):
    return loss(s.stages, t.stages)


@reads("preacts", per_stage=True)
def preacts(loss, s, t, batch):
    return [k(*fms) for k, *fms in zip(one_each(loss, s.preacts), s.preacts, t.preacts)]


@reads("preacts", per_stage=True)
def preacts_summed(loss, s, t, batch):
    """A sum over C, H, W where the losses take a mean, and half the weight a stage further up."""
    losses, n = preacts.feed(loss, s, t, batch), len(t.preacts)
    return [
        2.0 ** (i - n + 1) * fm_t[0].numel() * value
        for i, (value, fm_t) in enumerate(zip(losses, t.preacts))
    ]


@reads("stem", "stages", per_stage=True)
def pairs(loss, s, t, batch):
    # a map is in two pairs: it is promoted once
    fms_s, fms_t = (
        [fm.to(torch.promote_types(fm.dtype, torch.float32)) for fm in (x.stem, *x.stages)]
        for x in (s, t)
    )
    return [loss(*maps) for maps in zip(fms_s, fms_s[1:], fms_t, fms_t[1:])]


@reads("out")
def input_gradient(loss, s, t, batch):
    return loss(s.out, t.out, batch.img, batch.target)


@reads("out", logits_only=True)
def with_target(loss, s, t, batch):
    return loss(s.out, t.out, batch.target)


@reads("out", "stages", one_stage=True)
def class_activation(loss, s, t, batch):
    return loss(s.out, s.stages[0], t.out, t.stages[0], batch.target)


@reads("out", "stages", "feat")
def relation_graph(loss, s, t, batch):
    return loss([*s.stages, s.feat, s.out], [*t.stages, t.feat, t.out])


@reads("stages", one_stage=True)
def reconstruction(loss, s, t, batch):
    return loss.paraphraser.reconstruction_loss(t.stages[0])


@reads("stages", one_stage=True)
def factors(loss, s, t, batch):
    return loss.distance(loss.translator(s.stages[0]), loss.paraphraser.factor(t.stages[0]))


@reads("out", flags=("attack_size",), calls_nets=True)
def boundary(loss, s, t, batch, attack_size):
    index, attack_class, valid = select(s.out, t.out, batch.target, attack_size)
    index, attack_class = index[valid], attack_class[valid]
    if len(index) == 0:
        return s.out.new_zeros((), dtype=torch.promote_types(s.out.dtype, torch.float32))
    if len(index) == 1:  # batch norm on a map of one pixel needs two
        index, attack_class = index.repeat(2), attack_class.repeat(2)
    img = BSSAttacker().attack(t.net, batch.img[index].detach(), batch.target[index], attack_class)
    # the student's batch norm sees the attacked images too, as in KD-Zoo
    return loss(s.net(img), t.net(img))


@reads("stages", "preacts", "feat", flags=("s_preact", "pooled"))
def review(loss, s, t, batch, s_preact, pooled):
    return loss(*reviewed(s, t, s_preact, pooled))


def reviewed(s, t, s_preact: bool, pooled: bool):
    """The student's maps after the activation or before it, the teacher's before; each side's
    pooled features after them, or not."""
    fms_s = s.preacts if s_preact else s.stages
    return [*fms_s, *[s.feat][:pooled]], [*t.preacts, *[t.feat][:pooled]]


@reads("last")
def last(loss, s, t, batch):
    return loss(s.last, t.last)


@reads("out", logits_only=True)
def two_views(loss, s, t, batch):
    return loss(s.out, s.strong.out, t.out, t.strong.out)


@reads("out", logits_only=True)
def at_its_epoch(loss, s, t, batch):
    return loss(s.out, t.out, batch.epoch)


@reads("out", logits_only=True)
def transport(loss, s, t, batch):
    """The weight of the transport alone fades, over the last three eighths, by a cosine."""
    return loss(s.out, t.out, batch.target, faded(batch.epoch / batch.epochs))


@reads("out", logits_only=True)
def transport_on_imagenet(loss, s, t, batch):
    """The same, fading from the first epoch on."""
    return loss(s.out, t.out, batch.target, faded(batch.epoch / batch.epochs, 0.0))


@reads("out", "last", "feat", classifier=True)
def teachers_logits(loss, s, t, batch):
    x = s.feat if loss.form == "pooled" else s.last
    return loss(x, t.feat, t.out, t.classifier)


@reads("last", "feat", classifier=True)
def class_maps(loss, s, t, batch):
    return loss(s.last, s.classifier.weight, t.last, t.classifier.weight)


@reads("last", "feat", classifier=True)
def regions(loss, s, t, batch):
    return loss(s.last, s.classifier, t.last, t.classifier, batch.target)


@reads("out", "stages", "feat")
def branches(loss, s, t, batch):
    return loss(s.stages, s.out, t.out, batch.target)


@reads("stages")
def whole_batches(loss, s, t, batch):
    """A last batch of another size, which the method is not made for, is left out."""
    if len(s.stages[0]) != loss.batch:
        return s.stages[0].new_zeros(())
    return loss(s.stages, t.stages)


FADES = 150 / 240  # share of the training after which a weight begins to fade (WKD)


def faded(done: Tensor, start: float = FADES) -> Tensor:
    """The factor when the share `done` of the training is over: 1 up to `start`, then falling to 0
    along a cosine."""
    return (1 + torch.cos(math.pi * ((done - start) / (1 - start)).clamp(0, 1))) / 2


def one_each(loss: nn.Module, maps: list) -> list:
    """The loss of each map. A ModuleList has one module per map."""
    return list(loss) if isinstance(loss, nn.ModuleList) else [loss] * len(maps)


# --- how a loss is built --------------------------------------------------------------------------


def build_ab(s, t, train, m):
    return AB(margin=m)


def build_vid(s, t, train, sf, init_var, eps, init):
    widths = [(fm_s.shape[1], fm_t.shape[1]) for fm_s, fm_t in zip(s.stages, t.stages)]
    losses = (VID(c_s, int(sf * c_t), c_t, init_var, eps) for c_s, c_t in widths)
    return initialised(nn.ModuleList(losses), init)


def initialised(layers: nn.Module, init: str) -> nn.Module:
    """`layers` as they are ('kaiming'), or with torch's own initialisation of convolutions
    ('torch')."""
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


class FactorTransfer(nn.Module):
    """What FT trains: the teacher's paraphraser and the student's translator."""

    def __init__(self, distance: FT, paraphraser: Paraphraser, translator: Translator):
        super().__init__()
        self.distance, self.paraphraser, self.translator = distance, paraphraser, translator


def build_ft(s, t, train, k, use_bn, factor, init):
    """use_bn: 'auto': up to 10 classes, as in KD-Zoo; 'translator': as in the CRD benchmark."""
    few = use_bn == "auto" and train.num_class <= 10
    c_s, c_t = s.stages[0].shape[1], t.stages[0].shape[1]
    paraphraser = Paraphraser(c_t, k, few or use_bn == "yes")
    translator = Translator(c_s, c_t, k, few or use_bn in ("yes", "translator"))
    return initialised(FactorTransfer(FT(factor), paraphraser, translator), init)


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
    return BSS(T)


def build_reviewkd(s, t, train, mid_channel, s_preact, pooled):
    s, t = ([fm.shape[1] for fm in fms] for fms in reviewed(s, t, s_preact, pooled))
    return ReviewKD(s, t, min(mid_channel, s[-1]))


def between(loss, kind: str):
    """`loss(width of the student, of the teacher, **flags)`, of 'feat' or 'last'."""

    def build(s, t, train, **flags):
        return loss(getattr(s, kind).shape[1], getattr(t, kind).shape[1], **flags)

    return build


def build_mlkd(s, t, train, base, form):
    return MLKD((2.0, 3.0, base, 5.0, 6.0), base, form)


def build_wkd_l(s, t, train, sharpen, measured, **flags):
    return WKDL(torch.zeros(train.num_class, train.num_class), **flags)


@reads("last", "feat", flags=("sharpen", "measured"))
@torch.no_grad()
def class_distances(loss, teacher, batches, labels, sharpen, measured) -> str:
    """Measure how far apart the teacher sees the classes. teacher: tapped; batches: of the training
    images, in order. Returns what to log."""
    found = [_measured(measured, teacher(img)) for img, *_ in batches]
    found, labels = torch.cat(found), labels.cpu()
    each = int(labels.bincount().min())
    if each < 2:
        raise ValueError("at least two training images of each class are needed")
    classes = [found[labels == k][:each] for k in range(int(labels.max()) + 1)]
    found = torch.stack([x.flatten(0, -2) for x in classes]).to(loss.cost.device)
    loss.cost.copy_(cka_cost(found, sharpen))
    return f"distances of the classes from {each} training images each"


def _measured(what: str, t) -> Tensor:
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
    return SimKD(s_dim, t_dim, factor, tuple(t_size))


def build_wsld(s, t, train, T):
    return WSLD(1.0, T)  # its alpha is --lambda_kd


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
