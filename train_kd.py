"""Distil a teacher into a student with one of the methods of kd_losses, or several.

    python train_kd.py --kd_mode=at --t_model=runs/base-c10/model_best.pth.tar \\
                       --s_init=runs/base-c10-s/initial_r20.pth.tar
    python train_kd.py --kd_mode st+at --lambda_kd 0.9,1000 --t_model ... --s_name resnet20
    python train_kd.py --kd_mode none,at,dkd --dkd.beta 6 --t_model ... --s_name resnet20

A `+` joins several terms for one student. A comma separates several students, which are trained
side by side with one forward pass of the teacher; `none` is a student without a teacher.
Network, dataset and classes are read from the checkpoints. `--kd_mode MODE --help` lists the flags
of a method and their defaults.
"""

import sys
from contextlib import ExitStack
from copy import copy
from pathlib import Path

import utils  # before torch: how its threads wait
import torch
import torch.nn.functional as F
from torch import Tensor

import dataset
from engine import cli, console, distributed, foreign, kd_cli, pair, stream, teachers
from engine.checkpoint import Weights, find_weights
from engine.cuda_graph import check_cuda_graph, choose_step
from engine.distiller import Batch, Distiller
from engine.ensemble import Ensemble, nets_of
from engine.find_taps import check_trainable
from engine.run import Run
from engine.schedule import loss_weights, schedule
from engine.settings import Settings
from engine.student import Student, check_checkpoint, state
from engine.summary import recorded_settings, summary
from engine.testing import evaluate, final_tests
from engine.unlabeled import label_terms, of_the_labelled
from engine.together import Group, SharedTeacher, check_together, same_images, shared_data
from kd_losses import METHODS, Phase
from utils import UserError

# --- a step and an epoch --------------------------------------------------------------------------


def train_step(
    distiller: Distiller,
    phase: Phase,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    weights: dict[str, float],
    precision: utils.Precision,
    accumulation_steps: int = 1,
) -> dict[str, Tensor]:
    """One optimizer step on

        loss = lambda_ce * CE(student) + sum over methods of weights[method] * KD(student, teacher)

    Only the terms of the phase are computed, and no method of weight 0. If both networks are
    trained, or with two views, CE is the sum over them. Returns {name: 0-dim tensor on the device}:
    the unweighted terms and the training accuracy.
    """
    optimizer.zero_grad(set_to_none=True)
    means = {}
    for micro, share in batch.micro_batches(accumulation_steps):
        if distiller.image_grad:
            micro.img.requires_grad_()
        s = t = None
        with precision.autocast():
            if distiller.teacher_runs(phase, weights):  # first: the student reuses its memory
                with torch.set_grad_enabled(distiller.teacher_has_grad(phase)):
                    t = micro.teacher_features(distiller.teacher)
            if distiller.student_runs(phase):
                s = micro.features(distiller.student)
            terms = {
                name: criterion(s, t, micro, phase.inputs)
                for name, criterion in distiller.criteria.items()
                if weights[name]
            }
        weighted = [(weights[name], kd) for name, kd in terms.items()]
        logits = distiller.logits_to_label(phase, s, t)
        if logits:
            with torch.set_grad_enabled(phase.ce):
                if micro.labelled is None:
                    ce = [F.cross_entropy(float32(out), micro.target) for out in logits]
                    known = dict(ce=ce[0], train_top1=utils.top1(s.out.detach(), micro.target))
                else:  # only over the labelled images
                    ce, known = label_terms([float32(out) for out in logits], micro)
            weighted += [(distiller.lambda_ce, x) for x in ce if phase.ce]
            terms = {"ce": known.pop("ce"), **terms, **known}
        loss = utils.weighted_sum(weighted)
        precision.backward(loss if share == 1 else share * loss)
        for name, value in terms.items():
            value = value.detach() if share == 1 else share * value.detach()
            means[name] = means[name] + value if name in means else value
    distributed.average_gradients(optimizer)
    precision.step(optimizer)
    return means


def train_epoch(students: list[Student], group: Group, teacher: SharedTeacher | None) -> None:
    """One epoch of the students on the same batches: train, evaluate, record, save.

    teacher: the teacher pass that they share; None if each student has its own.
    """
    for student in students:
        with group.alone(student):
            student.begin_epoch()
    students = group.active(students)
    if not students:
        return
    data, cfg = students[0].data, students[0].cfg
    first = min(student.done for student in students)
    batches = stream.train_batches(
        data.train,
        cfg.batch_size,
        cfg.seed,
        students[0].row,
        padding=cfg.padding,
        skip=first,
        share=utils.share(),
        two_views=any(student.distiller.two_views for student in students),
    )
    if teacher:
        teacher.begin_epoch(data.train, cfg.batch_size, cfg.seed, students[0].row)
    for i, tensors in enumerate(batches, first + 1):
        if teacher:
            teacher.next_batch(i)
        students = group.active(students)
        if not students:
            break
        for student in students:
            if i > student.done:
                with group.alone(student):
                    train_batch(student, i, tensors, teacher)
    for student in group.active(students):
        with group.alone(student):
            end_epoch(student, len(students))


def train_batch(student: Student, i: int, tensors, teacher: SharedTeacher | None) -> None:
    """Step `i` of the epoch. tensors: img, target, index, and a second view if it is used."""
    run, distiller, phase, cfg = student.run, student.distiller, student.phase, student.cfg
    done = (student.epoch - 1 + (i - 1) / student.steps) / student.epochs
    student.weights = weights = loss_weights(distiller, phase, done, cfg)
    batch = distiller.batch(*tensors[: 4 if distiller.two_views else 3])
    if teacher and distiller.teacher_runs(phase, weights):
        batch = teacher.batch(distiller, batch, cfg.accumulate)
    terms = student.step(
        distiller, phase, student.optimizer, batch, weights, student.precision, cfg.accumulate
    )
    student.meter.add(terms, len(batch.img))
    if i % cfg.print_freq == 0:
        now = of_the_labelled(student.meter.read())
        run.check_finite(now, f"{student.where}, step {i}")
        warn_of_imbalance(run, distiller, phase, weights, now)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in now.items())
        run.log(f"  {student.where} step {i:4d}  {shown}  {student.meter.speed:.0f} img/s")
    if run.due():
        run.pause(lambda: state(student), student.meter, i, f"{student.where}, step {i}")


def end_epoch(student: Student, sharing: int) -> None:
    """Evaluate, record, save. sharing: the number of students that share the epoch's time."""
    run, distiller, phase, data = student.run, student.distiller, student.phase, student.data
    now, speed = of_the_labelled(student.meter.read()), student.meter.speed
    run.check_finite(now, student.where)
    warn_of_imbalance(run, distiller, phase, student.weights, now)

    saved = state(student)
    row = dict(phase=phase.name, epoch=student.epoch, lr=student.lr, **now)
    if phase.student_learns:
        row |= evaluate(distiller.deployed, data, data.selection, student.precision)
    if phase.teacher_learns:
        peer = evaluate(distiller.teacher.net, data, data.selection, student.precision)
        row |= {f"peer_{name}": value for name, value in peer.items()}
        for i, score in ((1, peer), (2, row)):  # KD-Zoo's names
            saved |= {f"prec{i}@{k}": score[f"{data.selection}_top{k}"] for k in (1, 5)}
    run.epoch(row, speed, saved, keep_best="student" in phase.trainable, sharing=sharing)


def float32(x: Tensor) -> Tensor:
    """Half precision as float32; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def warn_of_imbalance(run, distiller: Distiller, phase: Phase, weights: dict, now: dict) -> None:
    """Warn if a method's loss is so large that the cross-entropy has no effect."""
    ce = distiller.lambda_ce * now.get("ce", 0.0)
    for name, weight in weights.items():
        if phase.ce and weight * now.get(name, 0.0) > 1000 * ce > 0:
            run.warn(f"{name} times its weight is more than 1000 times the cross-entropy")


# --- a command: one student or several ------------------------------------------------------------


@console.command
def main(argv: list[str] | None = None) -> dict:
    """Returns the result of the run, or {student: result} for several students."""
    argv = sys.argv[1:] if argv is None else list(argv)
    commands = kd_cli.command_lines(argv)
    group = Group(list(commands))
    students = []
    for name in sorted(commands, key=lambda name: name == kd_cli.NONE):  # the baseline last
        students.append(plan(commands[name], group, students))
    check_together(students)
    if students[0].cfg.dry_run:
        for student in students:
            lines = [*student.lines, f"nothing trained, nothing written: {student.run.dir}"]
            console.say(*(group.label(student.name) + line for line in lines))
        return None
    for student in students:
        student.distiller.to(student.precision.device)
    data = students[0].data.to(students[0].precision.device)
    teacher = SharedTeacher.of(students, data)
    results = {}
    with ExitStack() as runs:
        for student in students:
            student.data = data
            start(student, runs, [x for x in commands if group.several])
        for student in students:
            with group.alone(student):
                prepare(student, group)
        while left := [x for x in group.active(students) if not x.finished]:
            row = min(student.row for student in left)
            train_epoch([x for x in left if x.row == row], group, teacher)
        for student in group.active(students):
            with group.alone(student):
                results[student.name] = finish(student)
    group.close()
    return results if group.several else results[students[0].name]


def plan(argv: list[str], group: Group, others: list[Student]) -> Student:
    """Build and check a student from its command line. Nothing is written.

    others: the students before it in the same command, whose data and teacher it can share.
    """
    args = kd_cli.parse(argv, __doc__)
    modes = kd_cli.modes_of(args.kd_mode)
    found_t, found_s = find_networks(args, modes, group)
    same_images(args, others)
    cfg = kd_cli.resolve(args, found_s.name, pair.known_data(args, found_t, found_s))
    device = utils.select_device(args.device, args.cuda, ranks=True)
    precision = utils.precision(device, args.amp)
    check_flags(args, modes, device)
    names = [foreign.file_name(found.name) for found in (found_t, found_s) if found]
    note = args.note or "-".join([args.kd_mode, foreign.file_name(cfg.data_name), *names])
    if group.several and not (Path(cfg.save_root) / note).exists():
        cfg.resume = False  # it had not started when the others were stopped
    command, label = ["train_kd.py", *argv], group.label(args.kd_mode)
    run = Run(cfg, note, command, label=label, signals=group.signals)
    data = shared_data(args, cfg, others)
    chosen = choose_settings(args, found_t, found_s, data, cfg)
    distiller = build(args, chosen, found_t, found_s, data, cfg, others)
    phases = schedule(distiller.phases, cfg)
    # read from the files once, not by each student
    images = group.once("images", data.identity)
    teacher_file = group.once(("file", args.t_model), lambda: teachers.fingerprint(found_t))
    run.learns_from(images, teacher_file, data.selection)
    macs = distiller.check_losses(data.train)
    for criterion in distiller.added:
        criterion.gather = args.gather and utils.world() > 1
        criterion.standardise = args.logit_stand
    where = utils.describe_device(device, precision)
    lines = summary(where, distiller, data, cfg, phases, found_t, found_s, macs)
    if run.saved:
        check_checkpoint(run, distiller, phases, data, cfg, precision)
    found = found_t, found_s
    return Student(args.kd_mode, run, distiller, data, cfg, precision, phases, found, lines)


def start(student: Student, runs: ExitStack, together: list[str]) -> None:
    """Start the run directory. together: the names of several students."""
    run, distiller, cfg = student.run, student.distiller, student.cfg
    found_t, found_s = student.found
    notes = recorded_settings(distiller)
    if found_t:
        notes["teacher"] = teachers.record(found_t, run.sources["teacher"])
    if together:
        notes["together"] = together
    network = distiller.deployed_name(found_s.name)
    meta = dict(network=network, **cli.describe_data(cfg, student.data))
    where = utils.describe_device(student.precision.device, student.precision)
    runs.enter_context(run.start(where, meta, notes))
    for line in student.lines:
        run.log(line)


def find_networks(args, modes: list[str], group: Group):
    """Teacher and student (checkpoint.Weights or teachers.SeveralWeights) from flags and
    checkpoints. Without a method there is no teacher."""

    def find(*what):
        return copy(group.once(what, lambda: find_weights(*what)))

    trained = any(METHODS[mode].teacher == "trained" for mode in modes)
    found_t = None
    if modes and args.t_model is None and not trained and not args.t_pretrained:
        raise UserError(
            "--t_model FILE is required: the teacher's checkpoint, as train_base.py writes it"
        )
    named = teachers.named_by(args, modes) if modes else []
    if args.t_model or args.t_name or args.t_pretrained:
        how = Weights, args.t_key, "t_key"
        found = [
            find(name, file, "t_name", "t_model", args.t_pretrained, taps, *how)
            for name, file, taps in named
        ]
        found_t = teachers.together(found, args.ensemble)
    found_s = find(
        *(args.s_name, args.s_init, "s_name", "s_init", args.s_pretrained, args.s_taps),
        *(Weights, args.s_key, "s_key"),
    )
    if modes and found_t is None:
        found_t = Weights(found_s.name, taps=args.t_taps)
    return found_t, found_s


def check_flags(args, modes: list[str], device: torch.device) -> None:
    """Raise UserError for flags that the methods or the device do not support."""
    for mode in modes:
        method = METHODS[mode]
        if args.logit_stand and not method.inputs.logits_only:
            raise UserError(f"--logit_stand: {mode} does not only compare logits")
        if args.gather and not method.relational:
            raise UserError(f"--gather: {mode} does not compare the images of a batch")
        if args.unlabeled and method.reads_labels:
            raise UserError(
                f"--unlabeled: {mode} reads the labels in its loss; st, at and others do not"
            )
    check_cuda_graph(args, device, {mode: METHODS[mode].capturable for mode in modes})


def choose_settings(args, found_t, found_s, data, cfg) -> list[Settings]:
    """The settings of each method. Also sets the taps that a protocol has for the networks."""
    processes = 1 if args.gather else utils.world()
    micro_batch = cfg.batch_size // cfg.accumulate // processes
    num_class = data.train.num_class
    names = {found.name for found in teachers.each(found_t)}
    teacher = names.pop() if len(names) == 1 else ""  # different teachers are not a pair of a table
    chosen = kd_cli.settings_of(args, teacher, found_s.name, num_class, micro_batch)
    chosen = list(chosen.values())
    for found in (*teachers.each(found_t), found_s):
        published = [x.taps[found.name] for x in chosen if found.name in x.taps]
        found.taps = found.taps or next(iter(published), None)
    return chosen


def build(args, chosen: list[Settings], found_t, found_s, data, cfg, others) -> Distiller:
    """The distiller: networks, criteria, adapters. others: students with the same teacher."""
    num_class, size = data.train.num_class, data.train.size
    pair.match_outputs(args, found_t, found_s, data)
    teacher = shared_teacher(chosen, found_t, others, size)
    if found_t and teacher is None:
        # a second network that is trained has another seed: two equal networks would stay equal
        teacher = found_t.build(num_class, cfg.seed + 1, size)
    student = found_s.build(num_class, cfg.seed, size)
    batch_norms = any(x.teacher_bn == "batch" for x in chosen)
    pair.check_images(args, found_t, found_s, teacher, student, data, batch_norms)
    trained = any(x.method.teacher == "trained" for x in chosen)
    for found, net in ((found_s, student), (found_t, teacher))[: 1 + trained]:
        found.say(check_trainable(net.requires_grad_(True), found.name, num_class, size))
        net.requires_grad_(False)
    if trained and utils.equal_states(student, teacher):
        raise UserError(
            "both networks start from the same weights and would stay equal: change the initial "
            "weights of one"
        )
    distiller = Distiller(student, teacher, chosen, data.train)
    if distiller.two_views and isinstance(data.train, dataset.Files):
        raise UserError(
            f"--kd_mode {args.kd_mode}: needs a second view, which works with images of up to "
            f"{dataset.RESIDENT} pixels on the device, but not with images read from files"
        )
    if distiller.labels == "none" and distiller.lambda_ce and any(p.ce for p in distiller.phases):
        raise UserError("--unlabeled: no training image has a label; give --lambda_ce 0")
    has_kd = any(x.lambda_kd for x in chosen)
    for phase in distiller.phases:
        if not (phase.ce and distiller.lambda_ce) and not (phase.kd and (has_kd or phase.weight)):
            raise UserError(f"--lambda_kd, --lambda_ce: with 0, phase {phase.name} has no loss")
    return distiller


def shared_teacher(chosen: list[Settings], found_t, others: list[Student], size: int):
    """The teacher of another student if this student can share it, else None."""
    changed = any(x.method.teacher == "trained" or x.teacher_bn == "batch" for x in chosen)
    for other in others if found_t and not changed else ():
        pairs = list(zip(teachers.each(found_t), teachers.each(other.found[0])))
        same = pairs and all(mine.taps == theirs.taps for mine, theirs in pairs)
        if same and other.distiller.teacher_is_constant:
            nets = other.distiller.teachers
            for (mine, theirs), net in zip(pairs, nets):
                pair.take_over(mine, theirs, net, size)
            return Ensemble(nets, found_t.kind) if len(nets) > 1 else nets[0]
    return None


def prepare(student: Student, group: Group) -> None:
    """Done once before the first step: compile, precompute, evaluate the teacher, seed."""
    run, distiller, cfg, data = student.run, student.distiller, student.cfg, student.data
    if cfg.compile:
        run.log(distiller.compile())
    if not run.saved:
        distiller.precompute(data.train, run.log)
    constant = distiller.teacher_role not in ("trained", "none")
    nets = teachers.to_evaluate(distiller.teacher.net, student.found[0]) if constant else []
    split = data.selection
    for name, net in nets:
        scores = group.once(
            (name, *nets_of(net)), lambda net=net: evaluate(net, data, split, student.precision)
        )
        score = scores[f"{split}_top1"]
        run.log(f"{name} {split}_top1 {score:.2f}")
        if utils.by_chance(score, len(data.splits[split]), data.train.num_class):
            run.warn(f"the {name} is no better than chance on the {split} images")
    found_s = student.found[1]
    if found_s.epoch and not run.saved:
        run.warn(
            f"--s_init {found_s.path} is already trained, for {found_s.epoch} epoch(s): students "
            "usually start from initial weights"
        )
    own = student.name if distiller.added else ""  # the baseline draws as train_base.py does
    utils.seed_everything(cfg.seed + 1_000_003 * utils.rank(), own)
    distributed.broadcast_parameters(*distiller.networks, distiller.added)
    student.step = choose_step(train_step, cfg, student.precision.device, run.log, distiller.added)


def finish(student: Student) -> dict:
    """Evaluate the networks and return the result of the run."""
    distiller = student.distiller
    nets = dict(snet=distiller.deployed)
    if any(phase.teacher_learns for phase, _ in student.phases):
        nets["net1"] = distiller.teacher.net
    return student.run.finish(final_tests(student.run, nets, student.data, student.precision))


if __name__ == "__main__":
    main()
