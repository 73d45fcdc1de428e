"""Distil a teacher into a student with one of the methods of kd_losses, or several at once.

    python train_kd.py --kd_mode=at --t_model=runs/base-c10/model_best.pth.tar \\
                       --s_init=runs/base-c10-s/initial_r20.pth.tar
    python train_kd.py --kd_mode st+at --lambda_kd 0.9,1000 --t_model ... --s_name resnet20

Network, dataset and classes are read from the checkpoints. `--kd_mode MODE --help` lists the flags
of a method and their defaults.
"""

import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import dataset
import utils
from engine import cli, console, distributed, foreign, kd_cli, pair, stream
from engine.checkpoint import Weights, find_weights, sha256
from engine.cuda_graph import check_cuda_graph, choose_step
from engine.distiller import Batch, Distiller
from engine.find_taps import check_trainable
from engine.run import Run
from engine.schedule import learning_rate, loss_weights, remaining_phases, schedule
from engine.settings import Settings
from engine.summary import recorded_settings, summary
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

    for what the phase has of these; a method of weight 0 is not computed. Where both networks are
    trained, or see two views, CE is the sum over these. Returns {name: 0-dim tensor on the device}:
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
                    t = micro.features(distiller.teacher)
            if distiller.student_runs(phase):
                s = micro.features(distiller.student)
            terms = {
                name: criterion(s, t, micro, phase.inputs)
                for name, criterion in distiller.criteria.items()
                if weights[name]
            }
        loss = sum(weights[name] * kd for name, kd in terms.items())
        logits = distiller.logits_to_label(phase, s, t)
        if logits:
            with torch.set_grad_enabled(phase.ce):
                ce = [F.cross_entropy(float32(out), micro.target) for out in logits]
            if phase.ce:
                loss = loss + distiller.lambda_ce * sum(ce)
            top1 = utils.top1(s.out.detach(), micro.target)
            terms = {"ce": ce[0], **terms, "train_top1": top1}
        precision.backward(loss if share == 1 else share * loss)
        for name, value in terms.items():
            value = value.detach() if share == 1 else share * value.detach()
            means[name] = means[name] + value if name in means else value
    distributed.average_gradients(optimizer)
    precision.step(optimizer)
    return means


def train_epoch(training: "Training", phase: Phase, epoch: int, epochs: int, optimizer) -> None:
    """One epoch of a phase of `epochs`: train, evaluate, record, save."""
    run, distiller, data, cfg = training.run, training.distiller, training.data, training.cfg
    lr = learning_rate(phase, epoch, epochs, cfg)
    for group in optimizer.param_groups:
        group["lr"] = lr
    distiller.set_trainable(phase)  # evaluation has put the networks into eval mode
    where = f"{phase.name} epoch {epoch}"
    meter, done = run.begin()
    steps = len(dataset.batch_bounds(len(data.train), cfg.batch_size, utils.world()))
    batches = stream.train_batches(
        data.train,
        cfg.batch_size,
        cfg.seed,
        len(run.history) + 1,
        padding=cfg.padding,
        skip=done,
        share=utils.share(),
        two_views=distiller.two_views,
    )
    weights = loss_weights(distiller, phase, (epoch - 1) / epochs, cfg)
    for i, tensors in enumerate(batches, done + 1):
        batch = distiller.batch(*tensors)
        weights = loss_weights(distiller, phase, (epoch - 1 + (i - 1) / steps) / epochs, cfg)
        terms = training.step(
            distiller, phase, optimizer, batch, weights, training.precision, cfg.accumulate
        )
        meter.add(terms, len(batch.img))
        if i % cfg.print_freq == 0:
            now = meter.read()
            run.check_finite(now, f"{where}, step {i}")
            warn_of_imbalance(run, distiller, phase, weights, now)
            shown = "  ".join(f"{name} {value:.4g}" for name, value in now.items())
            run.log(f"  {where} step {i:4d}  {shown}  {meter.speed:.0f} img/s")
        if run.due():
            run.pause(lambda: state(training, phase, optimizer), meter, i, f"{where}, step {i}")
    now, speed = meter.read(), meter.speed
    run.check_finite(now, where)
    warn_of_imbalance(run, distiller, phase, weights, now)

    saved = state(training, phase, optimizer)
    row = dict(phase=phase.name, epoch=epoch, lr=lr, **now)
    if phase.student_learns:
        row |= evaluate(distiller.deployed, data.test, training.precision)
    if phase.teacher_learns:
        peer = evaluate(distiller.teacher.net, data.test, training.precision)
        row |= {f"peer_{name}": value for name, value in peer.items()}
        for i, score in ((1, peer), (2, row)):  # KD-Zoo's names
            saved |= {f"prec{i}@1": score["test_top1"], f"prec{i}@5": score["test_top5"]}
    run.epoch(row, speed, saved, keep_best="student" in phase.trainable)


def float32(x: Tensor) -> Tensor:
    """Half precision as float32; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def evaluate(net: torch.nn.Module, images, precision: utils.Precision) -> dict[str, float]:
    batches = stream.test_batches(images, share=utils.share())
    return utils.evaluate(net, batches, precision)


def warn_of_imbalance(run, distiller: Distiller, phase: Phase, weights: dict, now: dict) -> None:
    """Warn where a method's loss is so large that the cross-entropy means nothing."""
    ce = distiller.lambda_ce * now.get("ce", 0.0)
    for name, weight in weights.items():
        if phase.ce and weight * now.get(name, 0.0) > 1000 * ce > 0:
            run.warn(f"{name} times its weight is more than 1000 times the cross-entropy")


# --- save and resume ------------------------------------------------------------------------------


def state(training: "Training", phase: Phase, optimizer) -> dict:
    """What a checkpoint holds besides what `Run` adds."""
    distiller = training.distiller
    student, teacher = distiller.student.net, distiller.teacher.net
    distributed.average_batch_norms(student, teacher, distiller.added)
    weights = dict(snet=distiller.deployed.state_dict(), meta=training.run.meta)
    if phase.teacher_learns:  # KD-Zoo's names for two networks that learn
        weights |= dict(net1=teacher.state_dict(), net2=weights["snet"])
    return dict(
        weights=weights,
        kd=distiller.added.state_dict(),
        optimizer=optimizer.state_dict(),
        **training.precision.state(),
    )


def restore(run: Run, distiller: Distiller, first: int, optimizer, precision) -> None:
    """Load the run's checkpoint. Where a phase begins, at its epoch `first` = 1 and before any of
    its steps, the optimizer is a new one."""
    saved = run.saved
    distiller.deployed.load_state_dict(saved["snet"])
    if "net1" in saved:
        distiller.teacher.net.load_state_dict(saved["net1"])
    utils.load_state(distiller.added, saved["kd"])
    if first > 1 or run.inside:
        utils.load_optimizer(optimizer, saved["optimizer"])
    precision.load(saved)
    utils.set_rng_state(saved["rng"])


def check_checkpoint(run: Run, distiller: Distiller, phases, data, cfg, precision) -> None:
    """Restore once on trial, so that a damaged checkpoint is found before anything is written."""
    with run.intact():
        rows = [dict(phase=p.name, epoch=i + 1) for p, epochs in phases for i in range(epochs)]
        run.fits(rows, len(dataset.batch_bounds(len(data.train), cfg.batch_size)))
        for phase, first, _ in remaining_phases(phases, len(run.history)):
            optimizer = utils.sgd(distiller.param_groups(phase), cfg, phase.nesterov)
            return restore(run, distiller, first, optimizer, precision)


# --- a run ----------------------------------------------------------------------------------------


@dataclass
class Training:
    """What the epochs of a run share."""

    run: Run
    distiller: Distiller
    data: dataset.Data
    cfg: Namespace
    precision: utils.Precision
    step: Callable[..., dict[str, Tensor]]


@console.command
def main(argv: list[str] | None = None) -> dict:
    argv = sys.argv[1:] if argv is None else list(argv)
    args = kd_cli.parse(argv, __doc__)
    modes = kd_cli.modes_of(args.kd_mode)
    found_t, found_s = find_networks(args, modes)
    cfg = kd_cli.resolve(args, found_s.name, pair.known_data(args, found_t, found_s))
    device = utils.select_device(args.device, args.cuda, ranks=True)
    precision = utils.precision(device, args.amp)
    check_flags(args, modes, device)
    names = [foreign.file_name(found.name) for found in (found_t, found_s)]
    run = Run(
        cfg, args.note or "-".join([args.kd_mode, cfg.data_name, *names]), ["train_kd.py", *argv]
    )
    data = cli.load_data(cfg, args.batch_size)
    chosen = choose_settings(args, found_t, found_s, data, cfg)
    distiller = build(args, chosen, found_t, found_s, data, cfg)
    phases = schedule(distiller.phases, cfg)
    meta = dict(network=distiller.deployed_name(found_s.name), **cli.describe_data(cfg, data))
    teacher_file = sha256(found_t.path) if found_t.path else None
    run.learns_from(data.identity(), teacher_file)
    macs = distiller.check_losses(data.train)
    for criterion in distiller.added:
        criterion.gather = args.gather and utils.world() > 1
        criterion.standardise = args.logit_stand
    where = utils.describe_device(device, precision)
    lines = summary(where, distiller, data, cfg, phases, found_t, found_s, macs)
    if run.saved:
        check_checkpoint(run, distiller, phases, data, cfg, precision)
    if cfg.dry_run:
        return console.say(*lines, f"nothing trained, nothing written: {run.dir}")

    distiller.to(device)
    notes = recorded_settings(distiller)
    notes["teacher"] = dict(
        path=found_t.path,
        sha256=teacher_file,
        network=found_t.name,
        pretrained=found_t.pretrained,
        outputs=found_t.outputs.index,
    )
    with run.start(where, meta, notes):
        for line in lines:
            run.log(line)
        data = data.to(device)
        prepare(run, distiller, data, cfg, precision, found_s, pair.has_answers(found_t))
        step = choose_step(train_step, cfg, device, run.log, distiller.added)
        training = Training(run, distiller, data, cfg, precision, step)
        for phase, first, epochs in remaining_phases(phases, len(run.history)):
            groups = distiller.param_groups(phase)
            optimizer = run.watch(utils.sgd(groups, cfg, phase.nesterov))
            if run.saved:
                restore(run, distiller, first, optimizer, precision)
                run.saved = None
            for epoch in range(first, epochs + 1):
                train_epoch(training, phase, epoch, epochs, optimizer)
        return run.finish()


def find_networks(args, modes: list[str]) -> tuple[Weights, Weights]:
    """Teacher and student, as flags and checkpoints name them."""
    trained = any(METHODS[mode].teacher == "trained" for mode in modes)
    if args.t_model is None and not trained and not args.t_pretrained:
        raise UserError("--t_model is needed: the teacher's checkpoint, as train_base.py writes it")
    found_t = None
    if args.t_model or args.t_name or args.t_pretrained:
        found_t = find_weights(
            *(args.t_name, args.t_model, "t_name", "t_model", args.t_pretrained, args.t_taps),
            *(Weights, args.t_key, "t_key"),
        )
    found_s = find_weights(
        *(args.s_name, args.s_init, "s_name", "s_init", args.s_pretrained, args.s_taps),
        *(Weights, args.s_key, "s_key"),
    )
    return found_t or Weights(found_s.name, taps=args.t_taps), found_s


def check_flags(args, modes: list[str], device: torch.device) -> None:
    """Raise UserError for flags that the methods or the device do not allow."""
    for mode in modes:
        method = METHODS[mode]
        if args.logit_stand and not method.inputs.logits_only:
            raise UserError(f"--logit_stand: {mode} compares more than logits")
        if args.gather and not method.relational:
            raise UserError(f"--gather: {mode} does not compare the images of a batch")
    check_cuda_graph(args, device, {mode: METHODS[mode].capturable for mode in modes})


def choose_settings(args, found_t, found_s, data, cfg) -> list[Settings]:
    """The settings of each method; and the taps that a protocol has for these networks."""
    processes = 1 if args.gather else utils.world()
    micro_batch = cfg.batch_size // cfg.accumulate // processes
    num_class = data.train.num_class
    chosen = kd_cli.settings_of(args, found_t.name, found_s.name, num_class, micro_batch)
    chosen = list(chosen.values())
    for found in (found_t, found_s):
        published = [x.taps[found.name] for x in chosen if found.name in x.taps]
        found.taps = found.taps or next(iter(published), None)
    return chosen


def build(args, chosen: list[Settings], found_t, found_s, data, cfg) -> Distiller:
    """Both networks and what is between them."""
    num_class, size = data.train.num_class, data.train.size
    pair.match_outputs(args, found_t, found_s, data)
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
            "both networks start from the same weights and would stay equal: change one"
        )
    distiller = Distiller(student, teacher, chosen, data.train)
    if distiller.two_views and isinstance(data.train, dataset.Files):
        raise UserError(
            f"--kd_mode {args.kd_mode}: a second view is made of images up to {dataset.RESIDENT} "
            "pixels, or enlarged from such, not of files read one by one"
        )
    has_kd = any(x.lambda_kd for x in chosen)
    for phase in distiller.phases:
        if not (phase.ce and distiller.lambda_ce) and not (phase.kd and (has_kd or phase.weight)):
            raise UserError(f"--lambda_kd, --lambda_ce: with 0, phase {phase.name} has no loss")
    return distiller


def prepare(run: Run, distiller: Distiller, data, cfg, precision, found_s, answers=True) -> None:
    """What happens once before the first step. answers: whether the teacher has the dataset's
    classes."""
    student, teacher = distiller.student.net, distiller.teacher.net
    if cfg.compile:
        run.log(distiller.compile())
    if not run.saved:
        distiller.precompute(data.train, run.log)
    if distiller.teacher_role != "trained" and answers:
        score = evaluate(teacher, data.test, precision)["test_top1"]
        run.log(f"teacher test_top1 {score:.2f}")
        if utils.by_chance(score, len(data.test), data.train.num_class):
            run.warn("the teacher is no better than chance on the test images")
    if found_s.epoch and not run.saved:
        run.warn(
            f"--s_init {found_s.path} is already trained, for {found_s.epoch} epoch(s): students "
            "usually start from initial weights"
        )
    utils.seed_everything(cfg.seed + 1_000_003 * utils.rank())
    distributed.broadcast_parameters(student, teacher, distiller.added)


if __name__ == "__main__":
    main()
