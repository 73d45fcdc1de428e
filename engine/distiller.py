"""The two networks, hooked for what the methods compare, and the criteria between them."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

import network
import utils
from engine import distributed, foreign, stream
from engine.adapter import Adapter, align, count_macs
from engine.ensemble import OfEach, OfEnsemble, Teachers, nets_of, with_strong
from engine.settings import Settings
from kd_losses import LABELS_ALONE, Inputs, Phase
from kd_losses.lskd import standardise
from utils import UserError


@dataclass
class Batch:
    """img (B, 3, H, W), target (B,), index (B,): the samples' places in the training set; strong: a
    second, strongly augmented view of the images, or None; epoch, epochs: 0-dim tensors on the
    device, the epoch from 1 and the number of epochs, both in the protocol's number; teacher: the
    teacher's features of each micro-batch, where several students share its forward pass (of
    several teachers a tuple); labelled: 0-dim, the share of its images that have labels, None if
    all the training images have."""

    img: Tensor
    target: Tensor
    index: Tensor
    strong: Tensor | None = None
    epoch: Tensor | None = None
    epochs: Tensor | None = None
    teacher: tuple = ()
    labelled: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """What has an entry for each sample."""
        names = ("img", "target", "index", "strong")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def micro_batches(self, count: int) -> Iterator[tuple["Batch", float]]:
        """Yield the batch in `count` parts, each with its share of the samples."""
        tensors = self.tensors()
        for k, (parts, share) in enumerate(utils.micro_batches(count, *tensors.values())):
            teacher = self.teacher[k : k + 1]
            yield replace(self, **dict(zip(tensors, parts)), teacher=teacher), share

    def features(self, tapped: network.Tapped | Teachers):
        """The features of a network, with those of the second view; of several teachers a
        tuple."""
        x = tapped(self.img)
        return x if self.strong is None else with_strong(x, tapped(self.strong))

    def teacher_features(self, tapped: network.Tapped | Teachers):
        """The teacher's features of a micro-batch: those that are there already, or `tapped`'s."""
        return self.teacher[0] if self.teacher else self.features(tapped)


class Criterion(nn.Module):
    """One method: its adapter, its loss and the stages that it compares.

    Called with the features of both networks and a batch, it returns the unweighted loss, a scalar.
    gather: compare the images of all processes. standardise: standardise the logits first.
    teacher: the number of its teacher, from 1, where there are several.
    """

    def __init__(self, settings: Settings, stage_ids: list[int], s, t, train, t_stage_ids=None):
        """stage_ids: places in the lists of both features; t_stage_ids: in the teacher's, where
        these differ."""
        super().__init__()
        self.settings, self.mode, self.stage_ids = settings, settings.mode, stage_ids
        self.t_stage_ids = stage_ids if t_stage_ids is None else t_stage_ids
        self.gather = self.standardise = False
        self.teacher = None
        s, t = _select(s, self.stage_ids), _select(t, self.t_stage_ids)
        self.adapter = Adapter(settings.adapter, settings.inputs.reads, s, t)
        s, t = self.adapter.eval()(s, t)
        try:
            self.loss = settings.method.build(s, t, train, dict(settings.flags))
        except (ValueError, RuntimeError, MemoryError) as error:  # too large for the memory
            raise UserError(f"--kd_mode {self.mode}: {utils.first_line(error)}") from error

    @property
    def parts(self) -> list["Criterion"]:
        return [self]

    @property
    def label(self) -> str:
        """Its name in the log."""
        return self.mode if self.teacher is None else f"{self.mode}, teacher {self.teacher}"

    def forward(self, s, t, batch: Batch, inputs: Inputs | None = None) -> Tensor:
        """inputs: what the loss is fed, None for the method's own."""
        inputs = inputs or self.settings.inputs
        t = _select(t, self.t_stage_ids)
        if s is not None:
            s, t = self.adapter(_select(s, self.stage_ids), t)
        if self.gather:
            s, t = _gathered(s), _gathered(t)
        if self.standardise:
            s, t = _standardised(s), _standardised(t)
        flags = {name: self.settings.flags[name] for name in inputs.flags}
        value = inputs.feed(self.loss, s, t, batch, **flags)
        if inputs.per_stage:
            value = sum(value) / (len(value) if self.settings.reduce == "mean" else 1)
        return value


def _select(x: network.Features, stage_ids: list[int]) -> network.Features:
    """The features with the compared stages alone."""
    lists = dict(stages=x.stages, preacts=x.preacts, numbers=x.numbers)
    return replace(x, **{k: [v[i] for i in stage_ids] for k, v in lists.items() if v})


def _gathered(x: network.Features) -> network.Features:
    """Features of the images of all processes, for losses that compare images with each other."""
    kinds = ("out", "stem", "stages", "preacts", "last", "feat")
    strong = x.strong and _gathered(x.strong)
    return replace(
        x, strong=strong, **{kind: distributed.gather(getattr(x, kind)) for kind in kinds}
    )


def _standardised(x: network.Features) -> network.Features:
    return replace(x, out=standardise(x.out), strong=x.strong and _standardised(x.strong))


class Distiller:
    """Student and teacher, and a criterion for each method.

    student, teacher: network.Tapped; of several teachers `ensemble.Teachers`; of a student without
    a method, which learns from the labels alone, the teacher is None. criteria: {name of the loss
    in metrics.csv: Criterion}: 'kd', or of several methods 'kd_MODE'; with several teachers an
    `ensemble.OfEnsemble` or `OfEach`. added: the criteria as one module, what the methods add.
    deployed: the network that is evaluated and saved, the student unless a method deploys its
    projector with it.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module | None, settings: list[Settings], train
    ):
        """teacher: several are an `ensemble.Ensemble`; settings: of each method; train: the
        training set."""
        methods = [x.method for x in settings]
        roles = {m.teacher for m in methods} or {"none"}
        self.teacher_role = next(
            role for role in ("trained", "grad", "frozen", "none") if role in roles
        )
        self.image_grad = any(m.teacher == "grad" for m in methods)
        self.lambda_ce, self.phases = 1.0, LABELS_ALONE
        if settings:
            self.lambda_ce = settings[0].lambda_ce
            self.phases = next(x.phases for x in settings if x.method.teacher == self.teacher_role)
        labelled = int((train.labels >= 0).sum())
        self.labels = "all" if labelled == len(train) else "some" if labelled else "none"
        self.two_views = any(m.two_views for m in methods)
        self.batch_teacher_bn = any(x.teacher_bn == "batch" for x in settings)
        trainable = {name for x in settings for phase in x.phases for name in phase.trainable}
        if "backbone" in trainable and "feat" not in student.taps:
            raise UserError(
                f"the student has no separate classifier: {student.taps['lacks']['feat']}"
            )
        reads = {kind for x in settings for inputs in _all_inputs(x) for kind in inputs.reads}
        if any(m.deploys_projector for m in methods):
            reads.add("feat")
            if "feat" in student.taps:
                foreign.behead(student)
        nets = nets_of(teacher)
        stages = [[align(student, net, x.stages) for x in settings] for net in nets]
        unions = [sorted({i for ids in own for i in ids}) for own in stages]
        self.student = network.Tapped(student, sorted(reads), sorted(set().union(*unions)))
        tapped = [network.Tapped(net, sorted(reads), own) for net, own in zip(nets, unions)]
        self.teacher = Teachers(tapped, teacher.kind) if len(nets) > 1 else next(iter(tapped), None)
        trial = torch.zeros(2, 3, train.size, train.size)
        with torch.no_grad():
            for net in self.networks:
                net.eval()
            s, t = self.student(trial), teacher and self.teacher(trial)
            names = ["kd"] if len(settings) == 1 else [f"kd_{x.mode}" for x in settings]
            self.criteria = {
                name: self._criterion(x, ids, s, t, train)
                for name, x, *ids in zip(names, settings, *stages)
            }
        self.added = nn.ModuleList(part for x in self.criteria.values() for part in x.parts)
        self.deployed, self.projector_spec = student, None
        for criterion in self.added:
            if criterion.settings.method.deploys_projector:
                self.projector_spec = criterion.loss.spec
                self.deployed = foreign.Reusing(
                    student, criterion.loss, copy.deepcopy(t.classifier)
                )
        self.precomputing = [  # with hooks of their own, before any compilation
            (criterion, network.Tapped(teacher, criterion.settings.method.precompute.reads))
            for criterion in self.added
            if criterion.settings.method.precompute
        ]
        self.feature_path = _feature_path(student, trial) if "features" in trainable else None
        self.epoch, self.epochs = torch.tensor(1.0), torch.tensor(240.0)
        self._clock = None

    def _criterion(self, settings: Settings, stages: list[tuple[int, ...]], s, t, train):
        """The criterion of a method, with all teachers. stages: that are compared with each; s, t:
        features of a trial pass."""

        def make(t, stages):
            s_ids, t_ids = ([x.numbers.index(i) for i in stages] for x in (s, t))
            return Criterion(settings, s_ids, s, t, train, t_ids)

        if not isinstance(t, tuple):
            return make(t, stages[0])
        if all(inputs.reads_logits_alone for inputs in _all_inputs(settings)):
            return OfEnsemble(lambda t: make(t, ()), self.teacher.net, t)
        parts = [make(*pair) for pair in zip(t, stages)]
        for k, part in enumerate(parts, 1):
            part.teacher = k
        return OfEach(parts)

    @property
    def teachers(self) -> list[nn.Module]:
        return nets_of(self.teacher and self.teacher.net)

    @property
    def networks(self) -> list[nn.Module]:
        """The student and, if there are any, the teachers."""
        return [self.student.net, *self.teachers]

    # --- what runs in a step ---

    def teacher_runs(self, phase: Phase, weights: dict[str, float]) -> bool:
        return phase.teacher_learns or any(weights.values())

    @property
    def teacher_is_constant(self) -> bool:
        """Whether several students can use the teacher: it is not trained, and its batch norms use
        their running statistics."""
        return self.teacher_role in ("frozen", "grad") and not self.batch_teacher_bn

    def teacher_has_grad(self, phase: Phase) -> bool:
        return phase.teacher_learns or self.teacher_role == "grad"

    def student_runs(self, phase: Phase) -> bool:
        """Whether a step needs the student: an adapter may fit the teacher's maps to its."""
        adapts = any(criterion.adapter.notes for criterion in self.added)
        return phase.ce or phase.student_learns or adapts

    def logits_to_label(self, phase: Phase, s, t) -> list[Tensor]:
        """The logits that the cross-entropy of a phase compares with the labels, the student's
        first. None of a student that has the teacher's classifier instead of its own, and none
        where no training image has a label."""
        if self.labels == "none":
            return []
        own = (phase.ce or phase.student_learns) and self.deployed is self.student.net
        learning = [s] * own + [t] * phase.teacher_learns
        return [x.out for x in learning] + [x.strong.out for x in learning if x.strong]

    def set_epoch(self, epoch: int, epochs: int) -> None:
        """Tell the losses the epoch, in the protocol's number."""
        if (epoch, epochs) != self._clock:
            self._clock = epoch, epochs
            self.epoch.fill_(epoch), self.epochs.fill_(epochs)

    def batch(self, img: Tensor, target: Tensor, index: Tensor, strong=None) -> Batch:
        batch = Batch(img, target, index, strong, self.epoch, self.epochs)
        if self.labels == "some":
            batch.labelled = distributed.mean((target >= 0).float().mean())
        return batch

    # --- what trains in a phase ---

    def set_trainable(self, phase: Phase) -> list[nn.Parameter]:
        """Put exactly what `phase` trains in training mode, with gradients. Returns its
        parameters."""
        student = self.student.net
        teacher = self.teacher and self.teacher.net
        modules = (*self.networks, self.added)
        for module in modules:
            module.eval().requires_grad_(False)
        for name in phase.trainable:
            head, _, inner = name.partition(".")
            if name == "features":
                _train_only(student, self.feature_path)
                continue
            named = dict(student=student, backbone=student, teacher=teacher, kd=self.added)
            for part in self.added if inner else [named[head]]:
                module = part.loss.get_submodule(inner) if inner else part
                module.train().requires_grad_(True)
            if name == "backbone":
                classifier = student.get_submodule(student.taps["feat"].removesuffix(":in"))
                classifier.eval().requires_grad_(False)
        if self.batch_teacher_bn and not phase.teacher_learns:
            for net in self.teachers:
                _use_batch_statistics(net)
        return [p for module in modules for p in module.parameters() if p.requires_grad]

    def param_groups(self, phase: Phase) -> list[dict]:
        """What the optimizer of a phase takes: parameters with and without weight decay."""
        params = self.set_trainable(phase)
        no_decay = {
            id(p)
            for criterion in self.added
            if criterion.settings.method.no_decay
            for p in criterion.parameters()
        }
        groups = [
            dict(params=[p for p in params if id(p) not in no_decay]),
            dict(params=[p for p in params if id(p) in no_decay], weight_decay=0.0),
        ]
        return [group for group in groups if group["params"]]

    # --- before the training ---

    def check_losses(self, train) -> int:
        """Call every criterion on two training images, so that what does not fit is said before
        anything is written. Returns the multiply-adds per image of the layers that the methods
        add."""
        img, target, index = next(stream.test_batches(train, 2, workers=0))
        batch = self.batch(
            img.requires_grad_(self.image_grad), target, index, img if self.two_views else None
        )
        macs = 0
        for phase in self.phases if self.teacher else ():
            with torch.set_grad_enabled(self.image_grad):
                s, t = (batch.features(x) for x in (self.student, self.teacher))
                self.added.eval()
                for criterion in self.criteria.values() if phase.kd else []:
                    added = self._check(criterion, phase, s, t, batch)
                    macs += added // 2 if phase.inputs is None else 0
        return macs

    def _check(self, criterion, phase: Phase, s, t, batch: Batch) -> int:
        weight = criterion.settings.lambda_kd

        def call():
            loss = criterion(s, t, batch, phase.inputs)
            if not (weight * loss).isfinite().all():
                raise ValueError(
                    f"its loss for two training images is {loss.item():g}, its weight {weight:g}: "
                    "change the method's flags"
                )
            if self.image_grad:  # the criteria share the networks' graphs
                loss.backward(retain_graph=True)

        try:
            return count_macs(self.added, call)
        except (ValueError, RuntimeError, ArithmeticError, MemoryError) as error:
            reason = utils.first_line(error)
            if "not have been used in the graph" in reason:
                reason = (
                    "it differentiates in a map, and one of the networks gives tokens or channels "
                    "last, from which the map is only derived"
                )
            raise UserError(f"--kd_mode {criterion.mode}: {reason}") from error

    def precompute(self, images, log: Callable[[str], None]) -> None:
        """Let the methods that need it see all the training images once; `log` what they return."""
        for criterion, teacher in self.precomputing:
            inputs, settings = criterion.settings.method.precompute, criterion.settings
            flags = {name: settings.flags[name] for name in inputs.flags}
            batches = stream.test_batches(images, 100)
            try:
                found = inputs.feed(criterion.loss, teacher, batches, images.labels, **flags)
            except (ValueError, RuntimeError, MemoryError) as error:
                raise UserError(f"--kd_mode {settings.mode}: {utils.first_line(error)}") from error
            log(f"{settings.mode}: {found}")

    def compile(self) -> str:
        """torch.compile both networks, where the methods allow it. Returns what to log."""
        if self.image_grad:
            return "not compiled: torch.compile does not support second derivatives"
        for net in self.networks:
            net.compile()  # in place: hooks and the state dict's keys stay
        return "the networks are compiled at their first step"

    def to(self, device: torch.device) -> None:
        for module in (*self.networks, self.deployed, self.added):
            module.to(device, memory_format=torch.channels_last)
        self.epoch, self.epochs = self.epoch.to(device), self.epochs.to(device)

    def deployed_name(self, student_name: str) -> str:
        """What `foreign.build` calls the network that is saved."""
        if self.projector_spec is None:
            return student_name
        return foreign.reusing_name(student_name, self.projector_spec)


def _all_inputs(settings: Settings) -> list[Inputs]:
    return [settings.inputs, *(phase.inputs for phase in settings.phases if phase.inputs)]


def _feature_path(net: nn.Module, img: Tensor) -> set[nn.Parameter]:
    """The parameters on which the network's deepest stage depends. What comes after it, such as the
    classifier, is not among them."""
    tapped, state = network.Tapped(net.eval(), ("stages",)), net.training
    requires_grad = [p.requires_grad for p in net.parameters()]
    net.requires_grad_(True)
    with torch.enable_grad():
        deepest = tapped(img.to(next(net.parameters()))).stages[-1].sum()
        grads = torch.autograd.grad(deepest, list(net.parameters()), allow_unused=True)
    for p, before in zip(net.parameters(), requires_grad):
        p.requires_grad_(before)
    net.train(state)
    return {p for p, grad in zip(net.parameters(), grads) if grad is not None}


def _train_only(net: nn.Module, parameters: set[nn.Parameter]) -> None:
    """Training mode and gradients for the modules that own these parameters, and for no others."""
    for module in net.modules():
        module.training = any(p in parameters for p in module.parameters(recurse=False))
    for p in net.parameters():
        p.requires_grad_(p in parameters)


def _use_batch_statistics(net: nn.Module) -> None:
    """Training mode, in which batch norms use the statistics of the batch. The running statistics
    do not change, and are used in eval mode as before."""
    net.train()
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.track_running_stats = False
