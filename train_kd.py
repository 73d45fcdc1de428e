"""Distil a teacher into a student with one of the methods of kd_losses, or several at once.

    python train_kd.py --kd_mode=at --t_model=runs/base-c10/model_best.pth.tar \\
                       --s_init=runs/base-c10-s/initial_r20.pth.tar
    python train_kd.py --kd_mode st+at --lambda_kd 0.9,1000 --t_model ... --s_name resnet20

What the checkpoints know (network, dataset, classes) need not be said again. `--kd_mode MODE --help`
lists the flags of a method.
"""

import copy
import sys
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dataset
import network
import utils
from engine import cli, console, distributed, foreign, published, stream
from engine.adapter import Adapter, align, count_macs
from engine.checkpoint import Weights, find_weights, sha256
from engine.find_taps import check_trainable
from engine.run import Run
from kd_losses import FLAG_HELP, LOGITS, METHODS, Method, Phase, standardise
from utils import UserError

ADAPTERS = dict(
    none="", **{x: x for x in ("size", "channels+size", "regressor", "regressor+relu", "connector")}
)

# --- flags: --kd_mode and --protocol first, then the flags of the method ---------------------------


def parse(argv: list[str], t_name: str = "", s_name: str = ""):
    """(flags, {mode: row}): the rows with what protocol, pair of networks and flags change in them."""
    first = cli.Parser(add_help=False)
    first.add_argument("--kd_mode", type=cli.filled)
    first.add_argument("--protocol", choices=published.PROTOCOLS, default="kdzoo")
    early, _ = first.parse_known_args(argv)
    modes = early.kd_mode.split("+") if early.kd_mode else []
    rows = {m: utils.named(METHODS, m, "--kd_mode").under(early.protocol) for m in modes}
    rows = {m: row.between(t_name, s_name) for m, row in rows.items()}
    if len(rows) < len(modes):
        raise UserError(f"--kd_mode {early.kd_mode}: a method twice")
    if len(rows) > 1:
        for mode, row in rows.items():
            if len(row.phases) > 1 or row.reuses:
                own = "a deployed network" if row.reuses else "phases"
                raise UserError(
                    f"--kd_mode {early.kd_mode}: {mode} has {own} of its own, use it alone"
                )

    parser = cli.Parser(prog="train_kd.py", description=__doc__)
    add = parser.add_argument_group("distillation").add_argument
    add(
        "--kd_mode",
        required=True,
        metavar="MODE",
        help="one of, or several joined by +: " + ", ".join(METHODS),
    )
    name = dict(type=cli.filled, metavar="NAME")
    file = dict(type=cli.filled, metavar="FILE")
    add("--t_model", "--net1_init", **file, help="the teacher's checkpoint")
    add(
        "--s_init",
        "--net2_init",
        **file,
        help="the student's first weights (default: fresh)",
    )
    add(
        "--t_name",
        "--net1_name",
        **name,
        help="teacher network, where FILE does not know it",
    )
    add("--s_name", "--net2_name", **name, help="student network, the same")
    for side, who in (("t", "teacher"), ("s", "student")):
        add(
            f"--{side}_pretrained",
            action="store_true",
            help=f"{who} with the weights of its library (torchvision/NAME, timm/NAME)",
        )
        add(
            f"--{side}_taps",
            type=cli.comma(cli.filled),
            metavar="M[,M]",
            help=f"modules that give the {who}'s maps, the shallowest first (default: found)",
        )
    add(
        "--cuda_graph",
        action="store_true",
        help="capture the whole step as a CUDA graph, for the methods that allow it",
    )
    add(
        "--gather",
        action="store_true",
        help="of several processes: compare the images of all, not each its own, where the method "
        "compares images with each other",
    )
    add(
        "--logit_stand",
        action="store_true",
        help="standardise the logits of both networks first (LSKD), where the method compares them alone",
    )
    weight = cli.number(float, 0)
    add("--lambda_kd", type=cli.comma(weight), metavar="X[,X]", help="weight of each method")
    add("--lambda_ce", type=weight, metavar="X", help="weight of the cross-entropy")
    add(
        "--stages",
        type=cli.comma(cli.number(int)),
        metavar="I[,I]",
        help="stages compared: 1 the shallowest, -1 the deepest",
    )
    add("--reduce", choices=("mean", "sum"), help="over the stages")
    add("--adapter", choices=ADAPTERS, help="how the student's maps are fitted to the teacher's")
    for mode, row in rows.items():
        group = parser.add_argument_group(f"--kd_mode {mode}")
        for flag, default in row.flags.items():
            if f"--{flag}" in parser._option_string_actions:
                continue  # two methods own it: it goes to both
            choices = default if isinstance(default, tuple) else None
            text = FLAG_HELP.get(f"{mode}.{flag}") or FLAG_HELP[flag]
            group.add_argument(
                f"--{flag}",
                type=None if choices else _flag_type(default),
                choices=choices,
                metavar=None if choices else "0|1" if isinstance(default, bool) else "X",
                help=f"{text} (default {choices[0] if choices else _plain(default)})",
            )
    cli.add_common_flags(parser)
    args = parser.parse_args(argv, owner=lambda flag: _owner(flag, rows))
    if args.lambda_kd and len(args.lambda_kd) != len(rows):
        raise UserError(
            f"--lambda_kd: {len(rows)} weight(s) wanted, one for each method of --kd_mode"
        )
    return args, {m: _override(row, args, i, len(rows)) for i, (m, row) in enumerate(rows.items())}


def resolve(args, rows: dict[str, Method], s_name: str, knows: dict):
    """`utils.resolve`, with the batch size that a protocol has for the method."""
    own = [row.batch_size for row in rows.values() if row.batch_size]
    return cli.resolve(args, s_name, knows, min(own, default=None))


def _plain(value):
    return int(value) if isinstance(value, bool) else value


def _flag_type(default):
    if isinstance(default, bool):
        return lambda text: bool(cli.number(int, 0, 1)(text))
    return cli.number(type(default), 0, 100_000 if isinstance(default, int) else 1e6)


def _owner(flag: str, rows: dict) -> str | None:
    owners = [mode for mode, row in METHODS.items() if flag.lstrip("-") in row.flags]
    if owners:
        return f"it belongs to --kd_mode {' or '.join(owners)}, not {'+'.join(rows)}"


def _override(row: Method, args, i: int, count: int) -> Method:
    flags = {k: v[0] if isinstance(v, tuple) else v for k, v in row.flags.items()}
    given = {flag: getattr(args, flag) for flag in flags if getattr(args, flag) is not None}
    changes = dict(flags={**flags, **given})
    if args.adapter is not None:
        changes["needs"] = ADAPTERS[args.adapter]
    if args.lambda_kd:
        changes["lambda_kd"] = args.lambda_kd[i]
    if args.lambda_ce is not None or count > 1:
        # several methods: each row's own balance with the cross-entropy has no meaning any more
        changes["lambda_ce"] = 1.0 if args.lambda_ce is None else args.lambda_ce
    for key in ("stages", "reduce"):
        if getattr(args, key) is not None:
            changes[key] = getattr(args, key)
    return replace(row, **changes)


def sized(rows: dict[str, Method], batch: int) -> dict[str, Method]:
    """The rows, those that are built for one size of batches with `batch`."""
    return {
        mode: replace(row, flags=row.flags | dict(batch=batch)) if row.sized else row
        for mode, row in rows.items()
    }


# --- the networks and what hangs between them ------------------------------------------------------


class Part(nn.Module):
    """One mode at work: its loss, its adapter and the stages it compares.

    Calling it with a comparison and the features of both networks gives the unweighted loss.
    """

    def __init__(self, mode: str, row: Method, picked: list[int], s, t, train):
        super().__init__()
        self.mode, self.row, self.picked = mode, row, picked
        self.gathers = self.standardises = False
        s, t = self._pick(s), self._pick(t)
        self.adapter = Adapter(row.needs, row.compare.wants, s, t)
        s, t = self.adapter.eval()(s, t)
        try:
            self.loss = row.build(s, t, train, **row.flags)
        except (ValueError, RuntimeError, MemoryError) as error:  # too large for the memory
            raise UserError(f"--kd_mode {mode}: {utils.first_line(error)}") from error

    def _pick(self, x):
        lists = dict(stages=x.stages, preacts=x.preacts, numbers=x.numbers)
        return replace(x, **{k: [v[i] for i in self.picked] for k, v in lists.items() if v})

    def comparison(self, phase: Phase):
        """What `phase` compares: its own, or the row's."""
        return phase.kd if callable(phase.kd) else self.row.compare

    def forward(self, compare, s, t, batch) -> Tensor:
        t = self._pick(t)
        if s is not None:
            s, t = self.adapter(self._pick(s), t)
        if self.gathers:
            s, t = gathered(s), gathered(t)
        if self.standardises:
            s, t = standardised(s), standardised(t)
        value = compare(self.loss, s, t, batch)
        if isinstance(value, list):
            value = sum(value) / (len(value) if self.row.reduce == "mean" else 1)
        return value


def feature_path(net: nn.Module, img: Tensor) -> set[nn.Parameter]:
    """The parameters on which the network's deepest stage depends: those of what lies behind it, such
    as the classifier, are left out."""
    tapped, state = network.Tapped(net.eval(), ("stages",)), net.training
    learns = [p.requires_grad for p in net.parameters()]
    net.requires_grad_(True)
    with torch.enable_grad():
        deepest = tapped(img.to(next(net.parameters()))).stages[-1].sum()
        grads = torch.autograd.grad(deepest, list(net.parameters()), allow_unused=True)
    for p, learnt in zip(net.parameters(), learns):
        p.requires_grad_(learnt)
    net.train(state)
    return {p for p, grad in zip(net.parameters(), grads) if grad is not None}


def train_only(net: nn.Module, parameters: set[nn.Parameter]) -> None:
    """Training mode and gradients for the modules that own these parameters, and for no others."""
    for module in net.modules():
        module.training = any(p in parameters for p in module.parameters(recurse=False))
    for p in net.parameters():
        p.requires_grad_(p in parameters)


def use_batch_statistics(net: nn.Module) -> None:
    """Training mode, in which batch norms use the statistics of the batch; the running ones rest, and
    serve in eval mode as ever."""
    net.train()
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.track_running_stats = False


def gathered(x):
    """Features of the images of all ranks, for losses that compare images with each other."""
    kinds = ("out", "stem", "stages", "preacts", "last", "feat")
    strong = x.strong and gathered(x.strong)
    return replace(
        x, strong=strong, **{kind: distributed.gather(getattr(x, kind)) for kind in kinds}
    )


def standardised(x):
    """Features with standardised logits."""
    return replace(x, out=standardise(x.out), strong=x.strong and standardised(x.strong))


@dataclass
class Batch:
    """img (B, 3, H, W), target (B,) and index (B,), the samples' places in the training set; strong: a
    second, strongly augmented view, where a method wants one."""

    img: Tensor
    target: Tensor
    index: Tensor
    strong: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        return {name: x for name, x in vars(self).items() if x is not None}

    def seen_by(self, tapped):
        """The features of a network, those of the second view with them."""
        x = tapped(self.img)
        return x if self.strong is None else replace(x, strong=tapped(self.strong))


class Distillation:
    """Both networks, hooked for what the modes compare, and the modes' parts between them.

    student, teacher: network.Tapped; kd: nn.ModuleList of Parts; role: the teacher's.
    """

    def __init__(self, snet: nn.Module, tnet: nn.Module, rows: dict[str, Method], train):
        role = [row.teacher for row in rows.values()]
        self.role = next(r for r in ("trained", "grad", "frozen") if r in role)
        self.image_grad = "grad" in role
        self.lambda_ce = next(iter(rows.values())).lambda_ce
        wants = {
            kind
            for row in rows.values()
            for compare in (row.compare, *(phase.kd for phase in row.phases))
            if callable(compare)
            for kind in compare.wants
        }
        stages = {mode: align(snet, tnet, row.stages) for mode, row in rows.items()}
        union = sorted({i for picked in stages.values() for i in picked})
        learns = {name for row in rows.values() for phase in row.phases for name in phase.learns}
        if "backbone" in learns and "feat" not in snet.taps:
            raise UserError(
                f"the student has no classifier to set apart: {snet.taps['lacks']['feat']}"
            )
        if any(row.reuses for row in rows.values()):
            wants.add("feat")
            if "feat" in snet.taps:
                foreign.behead(snet)
        self.student = network.Tapped(snet, sorted(wants), union)
        self.teacher = network.Tapped(tnet, sorted(wants), union)
        dry = torch.zeros(2, 3, train.size, train.size)
        with torch.no_grad():
            snet.eval(), tnet.eval()
            s, t = self.student(dry), self.teacher(dry)
            self.kd = nn.ModuleList(
                Part(mode, row, [union.index(i) for i in stages[mode]], s, t, train)
                for mode, row in rows.items()
            )
        self.deployed = snet
        for part in self.kd:
            if part.row.reuses:
                self.deployed = foreign.Reusing(snet, part.loss, copy.deepcopy(t.classifier))
        self.strong = any(row.strong for row in rows.values())
        self.timed = [part.loss for part in self.kd if hasattr(part.loss, "clock")]
        self.told = None
        self.prepares = [  # parts that look at all training images first
            (part, network.Tapped(tnet, part.row.prepare.wants))
            for part in self.kd
            if part.row.prepare
        ]
        self.teacher_bn = "batch" if any(row.teacher_bn == "batch" for row in rows.values()) else ""
        self.features = feature_path(snet, dry) if "features" in learns else None
        self.names = ["kd"] if len(rows) == 1 else [f"kd_{mode}" for mode in rows]
        self.phases = next((r.phases for r in rows.values() if r.teacher == self.role), None)

    def rehearse(self, train) -> int:
        """Call every comparison on two images, so that what does not fit is said before anything is
        written. Returns the multiply-adds an image that the parts' own layers cost."""
        img, target, index = next(stream.test_batches(train, 2, workers=0))
        batch = Batch(
            img.requires_grad_(self.image_grad), target, index, img if self.strong else None
        )
        macs = 0
        for phase in self.phases:
            with torch.set_grad_enabled(self.image_grad):
                s, t = batch.seen_by(self.student), batch.seen_by(self.teacher)
                for part in self.kd.eval() if phase.kd else []:
                    compare = part.comparison(phase)
                    try:

                        def call():
                            loss = part(compare, s, t, batch)
                            weight = part.row.lambda_kd
                            if not (loss if callable(weight) else weight * loss).isfinite().all():
                                raise ValueError(
                                    f"its loss for two training images is {loss.item():g}, its weight "
                                    f"{weight:g}: change the method's flags"
                                )
                            if self.image_grad:  # the parts share the networks' graphs
                                loss.backward(retain_graph=True)

                        added = count_macs(part, call)
                    except (ValueError, RuntimeError, ArithmeticError, MemoryError) as error:
                        reason = utils.first_line(error)
                        if "not have been used in the graph" in reason:
                            reason = (
                                "it differentiates in a map, and one of the networks gives tokens or "
                                "channels last, from which the map is only derived"
                            )
                        raise UserError(f"--kd_mode {part.mode}: {reason}") from error
                    macs += added // 2 if compare is part.row.compare else 0
        return macs

    def learners(self, phase: Phase) -> list[nn.Parameter]:
        """Let exactly what `phase` trains be in training mode and require gradients; its parameters."""
        snet, tnet = self.student.net, self.teacher.net
        for module in (snet, tnet, self.kd):
            module.eval().requires_grad_(False)
        for name in phase.learns:
            head, _, inner = name.partition(".")
            module = dict(student=snet, backbone=snet, teacher=tnet, kd=self.kd).get(head)
            if name == "features":
                train_only(snet, self.features)
                continue
            if inner:
                module = self.kd[0].loss.get_submodule(inner)
            module.train().requires_grad_(True)
            if name == "backbone":
                classifier = snet.get_submodule(snet.taps["feat"].removesuffix(":in"))
                classifier.eval().requires_grad_(False)
        if self.teacher_bn == "batch" and "teacher" not in phase.learns:
            use_batch_statistics(tnet)
        modules = (snet, tnet, self.kd)
        return [p for module in modules for p in module.parameters() if p.requires_grad]

    def name(self, s_name: str) -> str:
        """What `network.build` calls the network that is trained."""
        spec = [part.loss.spec for part in self.kd if part.row.reuses]
        return foreign.reusing_name(s_name, spec[0]) if spec else s_name

    def groups(self, phase: Phase) -> list[dict]:
        """`learners`, as the optimizer wants them: without weight decay where a method excludes it."""
        params = self.learners(phase)
        still = {id(p) for part in self.kd if not part.row.decay for p in part.parameters()}
        groups = [
            dict(params=[p for p in params if id(p) not in still]),
            dict(params=[p for p in params if id(p) in still], weight_decay=0.0),
        ]
        return [group for group in groups if group["params"]]

    def tell(self, place: int, total: int) -> None:
        """Tell the losses that want to know it the epoch, of `total` ones."""
        if (place, total) != self.told:
            self.told = place, total
            for loss in self.timed:
                loss.clock[0].fill_(place), loss.clock[1].fill_(total)

    def prepare(self, images, say) -> None:
        """Let the parts that want it look at all the training images once; `say` what they say."""
        for part, teacher in self.prepares:
            try:
                found = part.row.prepare(
                    part.loss, teacher, stream.test_batches(images, 100), images.labels
                )
            except (ValueError, RuntimeError, MemoryError) as error:
                raise UserError(f"--kd_mode {part.mode}: {utils.first_line(error)}") from error
            say(f"{part.mode}: {found}")

    def compile(self) -> str:
        """torch.compile both networks, where the method allows it. Returns what to log."""
        if self.image_grad:
            return "not compiled: the method needs second derivatives, which compiled code has not"
        for net in (self.student.net, self.teacher.net):
            net.compile()  # in place: hooks and the state dict's keys stay
        return "both networks are compiled at their first step"

    def to(self, device) -> None:
        for net in (self.student.net, self.teacher.net, self.deployed):
            net.to(device, memory_format=torch.channels_last)
        self.kd.to(device, memory_format=torch.channels_last)


# --- a step ----------------------------------------------------------------------------------------


def train_step(
    job: Distillation, phase: Phase, optimizer, batch: Batch, weights, machine, pieces: int = 1
) -> dict[str, Tensor]:
    """One step: loss = lambda_ce * CE + sum_i weights[i] * KD_i, for what the phase has of them.

    CE is summed over the networks that learn; a part of weight 0 is not computed. `pieces`: in how many
    the batch goes through, each with its own comparison. Returns {name: detached 0-dim tensor}, on the
    device; 'ce' is the student's.
    """
    optimizer.zero_grad(set_to_none=True)
    total = {}
    for piece, share in utils.pieces(pieces, *batch.tensors().values()):
        loss, terms = losses(job, phase, Batch(*piece), weights, machine)
        (loss if share == 1 else share * loss).backward()
        for name, value in terms.items():
            value = value.detach() if share == 1 else share * value.detach()
            total[name] = total[name] + value if name in total else value
    # what a loss owns has seen the images of all, where the networks have seen a share
    for p in [p for part in job.kd if part.gathers for p in part.loss.parameters()]:
        if p.grad is not None:
            p.grad /= utils.world()
    distributed.average_gradients(optimizer)
    optimizer.step()
    return total


def losses(job: Distillation, phase: Phase, batch: Batch, weights, machine):
    """(loss, {name: term}) of a batch."""
    s_learns = phase.ce or phase.student_learns
    t_learns = "teacher" in phase.learns
    t_graph = nullcontext() if t_learns or job.role == "grad" else torch.no_grad()
    # an adapter may fit the teacher's maps to the student's
    s_runs = s_learns or any(part.adapter.notes for part in job.kd)
    kd_runs = phase.kd and any(weights)
    if job.image_grad:
        batch.img.requires_grad_()
    s = t = None
    terms, loss = {}, 0.0
    with machine.autocast():
        if kd_runs or t_learns:  # first: the student then works in the memory it has left
            with t_graph:
                t = batch.seen_by(job.teacher)
        if s_runs:
            s = batch.seen_by(job.student)
        for name, weight, part in zip(job.names, weights, job.kd):
            if kd_runs and weight:
                compare = part.comparison(phase)
                terms[name] = part(compare, s, t, batch)
                # a rank has the gradient in its own images alone, and what is averaged is a sum
                loss = loss + weight * (utils.world() if part.gathers else 1) * terms[name]
    # a student that reuses the teacher's classifier has no logits of its own
    s_learns = s_learns and job.deployed is job.student.net
    learning = [x for x, learns in ((s, s_learns), (t, t_learns)) if learns]
    learning += [x.strong for x in learning if x.strong]
    if learning:
        with nullcontext() if phase.ce else torch.no_grad():
            ce = [F.cross_entropy(float32(x.out), batch.target) for x in learning]
        if phase.ce:
            loss = loss + job.lambda_ce * sum(ce)
        terms = {"ce": ce[0], **terms, "train_top1": utils.top1(s.out.detach(), batch.target)}
    return loss, terms


def float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Captured:
    """`train_step` as a CUDA graph: recorded once, then replayed on the batches that follow, without
    a kernel launch from Python.

    What a graph has fixed - phase, learning rate, weights, the batch's shape - decides when to record
    anew. The first steps of a phase, and a last batch of another size, go the ordinary way.
    """

    WARM = 3  # ordinary steps in which libraries choose kernels and the optimizer makes its state

    def __init__(self):
        self.phase, self.warm, self.key, self.graph = None, 0, None, None

    def __call__(self, job, phase: Phase, optimizer, batch: Batch, weights, machine, pieces=1):
        step = (job, phase, optimizer)
        key = optimizer.param_groups[0]["lr"], tuple(weights), batch.img.shape
        if phase is not self.phase:
            self.phase, self.warm, self.key, self.graph = phase, 0, None, None
        if self.warm < self.WARM or batch.img.shape != self.shape:
            if self.warm == 0:
                self.shape = batch.img.shape
            self.warm += 1
            return self._aside(lambda: train_step(*step, batch, weights, machine, pieces))
        if key != self.key:
            self.key, self.graph = key, torch.cuda.CUDAGraph()
            self.batch = Batch(**{name: x.clone() for name, x in batch.tensors().items()})
            with torch.cuda.graph(self.graph):
                self.terms = train_step(*step, self.batch, weights, machine, pieces)
        with torch.no_grad():  # the images may require gradients
            for name, value in batch.tensors().items():
                getattr(self.batch, name).copy_(value)
        self.graph.replay()
        return self.terms

    @staticmethod
    def _aside(run):
        """On a stream of its own, as what comes before a capture has to be."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            result = run()
        torch.cuda.current_stream().wait_stream(stream)
        return result


def planned(phases: tuple[Phase, ...], recipe) -> list[tuple[Phase, int]]:
    """The phases with their numbers of epochs."""
    protocol, total = published.PROTOCOLS[recipe.protocol], recipe.epochs
    return [(p, published.scaled(p.epochs, total, protocol) if p.epochs else total) for p in phases]


def learning_rate(phase: Phase, epoch: int, epochs: int, recipe) -> float:
    """The rate of `epoch` (from 1) of a phase of `epochs`."""
    if phase.lr is None:
        return utils.step_decay(recipe.lr, epoch, recipe.milestones, recipe.warmup)
    done, end = (epoch - 1) / epochs, 0.0
    for share, factor in phase.lr:
        end += share
        if done < end - 1e-9:
            break
    return recipe.lr * factor


def kd_weights(job: Distillation, phase: Phase, done: float, recipe) -> list[float]:
    """The weight of every part when the share `done` of the phase lies behind: the phase's own, or that
    of the method's row, epoch by epoch, its time scaled to the phase's. A warm-up of ten epochs in a
    hundred stays a tenth. The losses that want to know the epoch are told it."""
    total = published.PROTOCOLS[recipe.protocol].epochs
    place = int(done * total + 1e-6) + 1
    job.tell(place, total)
    if phase.weight is not None:
        return [phase.weight for _ in job.kd]
    return [part.row.lambda_kd * part.row.ramp(place, total) for part in job.kd]


# --- the job ---------------------------------------------------------------------------------------


@console.command
def main(argv: list[str] | None = None) -> dict:
    argv = sys.argv[1:] if argv is None else list(argv)
    args, rows = parse(argv)
    trained = any(row.teacher == "trained" for row in rows.values())
    if args.t_model is None and not trained and not args.t_pretrained:
        raise UserError("--t_model is needed: the teacher's checkpoint, as train_base.py writes it")
    found_t = None
    if args.t_model or args.t_name or args.t_pretrained:
        found_t = find_weights(
            args.t_name, args.t_model, "t_name", "t_model", args.t_pretrained, args.t_taps
        )
    found_s = find_weights(
        args.s_name, args.s_init, "s_name", "s_init", args.s_pretrained, args.s_taps
    )
    found_t = found_t or Weights(found_s.name, taps=args.t_taps)
    rows = parse(argv, found_t.name, found_s.name)[1]  # again, now that the pair is known
    for found in (found_t, found_s):
        own = [row.taps[found.name] for row in rows.values() if found.name in row.taps]
        found.taps = found.taps or next(iter(own), None)
    recipe = resolve(args, rows, found_s.name, found_t.meta or found_s.meta)
    machine = utils.machine(args.cuda, args.amp, ranks=True)
    for mode in [m for m, row in rows.items() if args.logit_stand and row.compare not in LOGITS]:
        raise UserError(f"--logit_stand: {mode} compares more than logits")
    ranks = 1 if args.gather else utils.world()
    rows = sized(rows, recipe.batch_size // recipe.accumulate // ranks)
    for mode in [m for m, row in rows.items() if args.gather and not row.relates]:
        raise UserError(f"--gather: {mode} compares no images of a batch with each other")
    if args.cuda_graph:
        if machine.device.type != "cuda":
            raise UserError("--cuda_graph needs a CUDA device, and this runs on the CPU")
        if utils.world() > 1:
            raise UserError("--cuda_graph is for one process")
        if args.on_nan == "skip":
            raise UserError("--cuda_graph excludes --on_nan skip, which looks at every step")
        for mode in [mode for mode, row in rows.items() if not row.graph]:
            raise UserError(f"--cuda_graph: {mode} reads values from the device in every step")
    names = [foreign.file_name(found.name) for found in (found_t, found_s)]
    note = args.note or "-".join([args.kd_mode, recipe.data_name, *names])
    run = Run(recipe, note, ["train_kd.py", *argv])
    data = cli.load_data(recipe, args.batch_size)
    num_class = data.train.num_class
    for found, flag in ((found_t, "t_model"), (found_s, "s_init")):
        known = found.meta.get("num_class", num_class)
        if known != num_class:
            raise UserError(f"--{flag} {found.path} has {known} classes, {data.name} {num_class}")

    # the seed of a second learner is another one, or two equal networks would stay equal for ever
    tnet = found_t.build(num_class, recipe.seed + 1, data.train.size)
    snet = found_s.build(num_class, recipe.seed, data.train.size)
    for found, net in ((found_s, snet), (found_t, tnet))[: 1 + trained]:
        check_trainable(net.requires_grad_(True), found.name, num_class, data.train.size)
        net.requires_grad_(False)
    if trained and _equal(snet, tnet):
        raise UserError(
            "both networks start from the same weights and would stay equal: change one"
        )
    for mode, row in rows.items():
        if callable(row.lambda_kd):
            rows[mode] = replace(row, lambda_kd=row.lambda_kd(num_class))
    job = Distillation(snet, tnet, rows, data.train)
    if job.strong and isinstance(data.train, dataset.Files):
        raise UserError(
            f"--kd_mode {args.kd_mode}: a second view is made of images up to {dataset.RESIDENT} "
            "pixels, or enlarged from such, not of files read one by one"
        )
    weighs = any(row.lambda_kd for row in rows.values())
    for phase in job.phases:
        if not (phase.ce and job.lambda_ce) and not (phase.kd and (weighs or phase.weight)):
            raise UserError(
                f"--lambda_kd, --lambda_ce: 0 leaves phase {phase.name} nothing to learn from"
            )
    phases = planned(job.phases, recipe)
    meta = dict(network=job.name(found_s.name), **cli.describe_data(recipe, data))
    methods = {
        mode: dict(
            lambda_kd=row.lambda_kd,
            lambda_ce=job.lambda_ce,
            **_staged(row, align(snet, tnet, row.stages)),
            **row.flags,
        )
        for mode, row in rows.items()
    }
    teacher = dict(path=found_t.path, sha256=sha256(found_t.path) if found_t.path else None)
    run.learns_from(data.identity(), teacher["sha256"])
    macs = job.rehearse(data.train)
    for part in job.kd:
        part.gathers = args.gather and utils.world() > 1
        part.standardises = args.logit_stand
    lines = announcement(machine, job, data, recipe, phases, methods, found_t, found_s, macs)
    if run.saved:
        with run.intact():
            rows = [dict(phase=p.name, epoch=i + 1) for p, n in phases for i in range(n)]
            run.fits(rows, len(dataset.batch_bounds(len(data.train), recipe.batch_size)))
            try_restore(run, job, phases, recipe)
    if recipe.dry_run:
        return console.say(*lines, f"nothing trained, nothing written: {run.dir}")

    job.to(machine.device)
    if recipe.cuda_graph and not all(x.is_cuda for x in job.kd.state_dict().values()):
        raise UserError("--cuda_graph: a part of the method lies on the CPU")
    teacher |= dict(network=found_t.name, pretrained=found_t.pretrained)
    added = network.count_parameters(job.kd)
    with run.start(machine, meta, dict(methods=methods, teacher=teacher, added=added)):
        for line in lines:
            run.log(line)
        data = data.to(machine.device)
        if recipe.compile:
            run.log(job.compile())
        if not run.saved:
            job.prepare(data.train, run.log)
        if not trained:
            score = evaluate(tnet, data.test, machine)
            run.log(f"teacher test_top1 {score['test_top1']:.2f}")
            if utils.by_chance(score["test_top1"], len(data.test), num_class):
                run.warn("the teacher is no better than chance on the test images")
        if found_s.epoch and not run.saved:
            run.warn(f"--s_init {found_s.path} is no start: trained for {found_s.epoch} epoch(s)")
        utils.seed_everything(recipe.seed + 1_000_003 * utils.rank())
        distributed.broadcast_parameters(snet, tnet, job.kd)

        step = Captured() if recipe.cuda_graph else train_step
        for phase, first, epochs in remaining(phases, len(run.history)):
            optimizer = run.watch(utils.sgd(job.groups(phase), recipe, phase.nesterov))
            if run.saved:
                restore(run, job, first, optimizer)
                run.saved = None
            for epoch in range(first, epochs + 1):
                train_epoch(run, machine, job, data, recipe, phase, epoch, epochs, optimizer, step)
        return run.finish()


def remaining(phases, done: int):
    """Yield (phase, its first epoch, its epochs) of what lies ahead when `done` epochs are done."""
    for phase, epochs in phases:
        if done < epochs:
            yield phase, done + 1, epochs
        done = max(done - epochs, 0)


def train_epoch(run, machine, job, data, recipe, phase, epoch, epochs, optimizer, step=train_step):
    """One epoch of a phase of `epochs`: train, evaluate, record, save."""
    lr = learning_rate(phase, epoch, epochs, recipe)
    for group in optimizer.param_groups:
        group["lr"] = lr
    job.learners(phase)  # evaluation has put the networks into eval mode
    snet, tnet = job.student.net, job.teacher.net

    def state():
        distributed.average_batch_norms(snet, tnet, job.kd)
        weights = dict(snet=job.deployed.state_dict(), meta=run.meta)
        if "teacher" in phase.learns:  # KD-Zoo's names for two networks that learn
            weights |= dict(net1=tnet.state_dict(), net2=weights["snet"])
        return dict(weights=weights, kd=job.kd.state_dict(), optimizer=optimizer.state_dict())

    where = f"{phase.name} epoch {epoch}"
    meter, done = run.begin()
    steps = len(dataset.batch_bounds(len(data.train), recipe.batch_size, utils.world()))
    number = len(run.history) + 1
    # of an epoch whose steps are all done
    weights = kd_weights(job, phase, (epoch - 1) / epochs, recipe)
    batches = stream.train_batches(
        data.train,
        recipe.batch_size,
        recipe.seed,
        number,
        padding=recipe.padding,
        skip=done,
        share=utils.share(),
        two_views=job.strong,
    )
    for i, batch in enumerate(batches, done + 1):
        weights = kd_weights(job, phase, (epoch - 1 + (i - 1) / steps) / epochs, recipe)
        terms = step(job, phase, optimizer, Batch(*batch), weights, machine, recipe.accumulate)
        meter.add(terms, len(batch[1]))
        if i % recipe.print_freq == 0:
            now = meter.read()
            run.check_finite(now, f"{where}, step {i}")
            balance(run, job, phase, weights, now)
            shown = "  ".join(f"{name} {value:.4g}" for name, value in now.items())
            run.log(f"  {where} step {i:4d}  {shown}  {meter.speed:.0f} img/s")
        if run.due():
            run.pause(state, meter, i, f"{where}, step {i}")
    now = meter.read()
    run.check_finite(now, where)
    balance(run, job, phase, weights, now)
    speed = meter.speed

    distributed.average_batch_norms(snet, tnet, job.kd)
    row = dict(phase=phase.name, epoch=epoch, lr=lr, **now)
    extra = {}
    if phase.student_learns:
        row |= evaluate(job.deployed, data.test, machine)
    if "teacher" in phase.learns:
        peer = evaluate(tnet, data.test, machine)
        row |= {f"peer_{name}": value for name, value in peer.items()}
        for i, score in ((1, peer), (2, row)):
            extra |= {f"prec{i}@1": score["test_top1"], f"prec{i}@5": score["test_top5"]}
    run.epoch(row, speed, state() | extra, keep_best="student" in phase.learns)


def evaluate(net: nn.Module, images, machine) -> dict[str, float]:
    batches = stream.test_batches(images, share=utils.share())
    return utils.evaluate(net, batches, machine)


def balance(run, job: Distillation, phase: Phase, weights: list[float], now: dict) -> None:
    """Warn where a method drowns the cross-entropy."""
    ce = job.lambda_ce * now.get("ce", 0.0)
    for name, weight in zip(job.names, weights):
        if phase.ce and weight * now.get(name, 0.0) > 1000 * ce > 0:
            run.warn(f"{name} times its weight is more than a thousand times the cross-entropy")


def restore(run, job: Distillation, first: int, optimizer) -> None:
    """Put the state of the run's checkpoint back; the optimizer's not where a phase begins, at its
    epoch `first` of 1 and none of its steps done."""
    saved = run.saved
    job.deployed.load_state_dict(saved["snet"])
    if "net1" in saved:
        job.teacher.net.load_state_dict(saved["net1"])
    utils.load_state(job.kd, saved["kd"])
    if first > 1 or run.inside:
        utils.load_optimizer(optimizer, saved["optimizer"])
    utils.set_rng_state(saved["rng"])


def try_restore(run, job: Distillation, phases, recipe) -> None:
    """Restore once for nothing, so that a damaged checkpoint is found before anything is written."""
    for phase, first, _ in remaining(phases, len(run.history)):
        return restore(run, job, first, utils.sgd(job.groups(phase), recipe, phase.nesterov))


def announcement(machine, job, data, recipe, phases, methods, found_t, found_s, macs) -> list[str]:
    """The resolved recipe, as lines of the log."""
    lines = [
        f"{machine}: {found_t.name} -> {found_s.name}, {data.name}, {data.train.num_class} classes",
        f"{len(data.train)} training and {len(data.test)} test images of {data.train.size} pixels, "
        f"student from {found_s.path or ('library' if found_s.pretrained else 'fresh')} weights",
        *data.notes,
        *found_t.notes,
        *found_s.notes,
        cli.describe_recipe(recipe, dataset.padded(data.train)),
    ]
    full = published.PROTOCOLS[recipe.protocol].epochs
    if recipe.epochs != full:
        lines.append(f"scaled from {full} epochs to {recipe.epochs}: milestones, phases, warm-ups")
    lines.append("phases: " + ", ".join(f"{p.name} {epochs} epoch(s)" for p, epochs in phases))
    for mode, what in methods.items():
        lines.append(f"{mode}: " + ", ".join(f"{key} {value}" for key, value in what.items()))
        if recipe.protocol != "kdzoo" and not METHODS[mode].known_to(recipe.protocol):
            lines.append(
                f"{mode}: {recipe.protocol} says nothing of it, its weight and flags are the row's"
            )
    for part in job.kd:
        lines += [f"{part.mode}: adapter, {note}" for note in part.adapter.notes]
    added = network.count_parameters(job.kd)
    if job.deployed is not job.student.net:
        whole = network.count_parameters(job.deployed)
        lines.append(f"trained and evaluated: {job.name(found_s.name)}, {whole:,} parameters")
    if added:
        lines.append(f"the method adds {added:,} parameters and {macs:,} multiply-adds an image")
    return lines + found_t.warnings(data.train) + found_s.warnings(data.train)


def _staged(row: Method, stages: tuple[int, ...]) -> dict:
    """What a row that compares stages says of them; nothing for the others."""
    if not {"stages", "preacts"} & set(row.compare.wants):
        return {}
    return dict(stages=list(stages), reduce=row.reduce)


def _equal(a: nn.Module, b: nn.Module) -> bool:
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


if __name__ == "__main__":
    main()
