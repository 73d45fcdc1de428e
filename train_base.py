"""Train one network from scratch: a teacher, or the baseline row of a table.

    python train_base.py --net_name resnet110 --data_name cifar100 --note base-c100-r110

Writes into save_root/note, before its first step, the initial weights (`initial_r110.pth.tar`, what
`train_kd.py --s_init` starts from) and, while it trains, `checkpoint.pth.tar` and
`model_best.pth.tar`.
"""

import re
import sys

import utils  # before torch: how its threads wait
import torch
import torch.nn.functional as F

import dataset
import network
from engine import cli, console, distributed, foreign, published, stream
from engine.channels import check_channels, check_grey, make_one_channel
from engine.checkpoint import save_checkpoint
from engine.cuda_graph import check_cuda_graph, choose_step
from engine.find_taps import check_trainable, dry_pass
from engine.run import Run
from engine.testing import evaluate, final_tests


def parse(argv: list[str]):
    first = cli.Parser(add_help=False)
    first.add_argument("--protocol", choices=published.PROTOCOLS, default="kdzoo")
    first.add_argument("--net_name", default="")
    early, _ = first.parse_known_args(argv)  # which defaults --help shows
    protocol = published.PROTOCOLS[early.protocol]
    parser = cli.Parser(prog="train_base.py", description=__doc__)
    parser.add_argument(
        "--net_name",
        type=cli.filled,
        required=True,
        metavar="NAME",
        help="network: one of network.py, torchvision/NAME, timm/NAME, hf/NAME or "
        "path/to/file.py:function",
    )
    parser.add_argument(
        "--pretrained",
        action="store_true",
        help="start from the library's weights (torchvision/, timm/ and hf/NAME)",
    )
    parser.add_argument(
        "--label_smoothing",
        type=cli.number(float, 0, 1),
        metavar="X",
        help=f"label smoothing of the cross-entropy (default {protocol.label_smoothing})",
    )
    cli.add_common_flags(parser, cli.recipe_defaults(early.protocol, early.net_name))
    return parser.parse_args(argv)


def resolve(args):
    """The flags with everything filled in, from the protocol."""
    cfg = cli.resolve(args, args.net_name, {})
    if cfg.label_smoothing is None:
        cfg.label_smoothing = published.PROTOCOLS[cfg.protocol].label_smoothing
    return cfg


def short_name(net_name: str) -> str:
    """KD-Zoo's short form in file names: r20 for resnet20, other families in full."""
    return re.sub(r"^resnet(?=\d)", "r", foreign.file_name(net_name))


def train_step(net, optimizer, img, target, precision, label_smoothing=0.0, accumulation_steps=1):
    """One step of plain training. Returns the logits and the cross-entropy, still on the device."""
    outs, losses = [], []
    optimizer.zero_grad(set_to_none=True)
    for (x, y), share in utils.micro_batches(accumulation_steps, img, target):
        with precision.autocast():
            out = net(x)
        out = out.float()
        loss = share * F.cross_entropy(out, y, label_smoothing=label_smoothing)
        precision.backward(loss)
        outs.append(out.detach())
        losses.append(loss.detach())
    distributed.average_gradients(optimizer)
    precision.step(optimizer)
    return torch.cat(outs), torch.stack(losses).sum()


@console.command
def main(argv: list[str] | None = None) -> dict:
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parse(argv)
    make = foreign.constructor(args.net_name)
    cfg = resolve(args)
    device = utils.select_device(args.device, args.cuda, ranks=True)
    precision = utils.precision(device, args.amp)
    check_cuda_graph(cfg, device, {})
    note = (
        args.note or f"base-{foreign.file_name(cfg.data_name)}-{foreign.file_name(args.net_name)}"
    )
    run = Run(cfg, note, ["train_base.py", *argv])
    data = cli.load_data(cfg, args.batch_size)
    run.learns_from(data.identity(), selection=data.selection)
    utils.seed_everything(cfg.seed)
    net = make(data.train.num_class, data.train.size, args.pretrained)
    if args.channels == 1:
        make_one_channel(net, args.net_name)
    check_channels(net, args.net_name, args.channels)
    dry_pass(net, args.net_name, data.train.num_class, data.train.size)
    notes = check_trainable(net, args.net_name, data.train.num_class, data.train.size)
    notes += check_grey(net, args.net_name, data.train)
    meta = dict(network=args.net_name, **cli.describe_data(cfg, data))

    where = utils.describe_device(device, precision)
    lines = [
        f"{where}: {args.net_name}, {network.count_parameters(net):,} parameters",
        f"{data.name}: {cli.describe_images(data)}, {data.train.num_class} classes",
        *data.notes,
        *notes,
        cli.describe_recipe(cfg, dataset.padded(data.train)),
    ]
    if run.saved:
        with run.intact():  # or say so before anything is written
            epochs = [dict(epoch=epoch) for epoch in range(1, cfg.epochs + 1)]
            run.fits(epochs, len(dataset.batch_bounds(len(data.train), cfg.batch_size)))
            restore(run.saved, net, utils.sgd(net.parameters(), cfg), precision)
    if cfg.dry_run:
        return console.say(*lines, f"nothing trained, nothing written: {run.dir}")
    with run.start(where, meta):
        for line in lines:
            run.log(line)
        if not run.saved and utils.rank() == 0:
            initial = run.dir / f"initial_{short_name(args.net_name)}.pth.tar"
            start = {
                "net": net.state_dict(),
                "meta": meta,
                "epoch": 0,
                "prec@1": 0.0,
                "prec@5": 0.0,
            }
            save_checkpoint(start, initial)
        net.to(device, memory_format=torch.channels_last)
        if cfg.compile:
            net.compile()  # in place: the state dict keeps its keys
        data = data.to(device)
        optimizer = run.watch(utils.sgd(net.parameters(), cfg))
        if run.saved:
            restore(run.saved, net, optimizer, precision)
            run.saved = None
        distributed.broadcast_parameters(net)
        step = choose_step(train_step, cfg, device, run.log)
        for epoch in range(len(run.history) + 1, cfg.epochs + 1):
            train_epoch(run, step, precision, net, data, cfg, epoch, optimizer)
        return run.finish(final_tests(run, dict(net=net), data, precision))


def train_epoch(run, step, precision, net, data, cfg, epoch, optimizer):
    """One epoch: train, evaluate, record, save. step: `train_step`, or a captured one."""
    lr = utils.step_decay(cfg.lr, epoch, cfg.milestones, cfg.warmup)
    for group in optimizer.param_groups:
        group["lr"] = lr
    net.train()

    def state():
        distributed.average_batch_norms(net)
        weights = dict(net=net.state_dict(), meta=run.meta)
        return dict(weights=weights, optimizer=optimizer.state_dict(), **precision.state())

    meter, done = run.begin()
    batches = stream.train_batches(
        data.train,
        cfg.batch_size,
        cfg.seed,
        epoch,
        padding=cfg.padding,
        skip=done,
        share=utils.share(),
    )
    for i, (img, target, _) in enumerate(batches, done + 1):
        out, loss = step(
            net, optimizer, img, target, precision, cfg.label_smoothing, cfg.accumulate
        )
        meter.add(dict(ce=loss, train_top1=utils.top1(out, target)), len(target))
        if i % cfg.print_freq == 0:
            now = meter.read()
            run.check_finite(now, f"epoch {epoch}, step {i}")
            run.log(
                f"  epoch {epoch} step {i:4d}  ce {now['ce']:.4f}  "
                f"top1 {now['train_top1']:.2f}  {meter.speed:.0f} img/s"
            )
        if run.due():
            run.pause(state, meter, i, f"epoch {epoch}, step {i}")
    now = meter.read()
    run.check_finite(now, f"epoch {epoch}")
    speed, saved = meter.speed, state()
    row = dict(
        epoch=epoch,
        lr=lr,
        **now,
        **evaluate(net, data, data.selection, precision),
    )
    run.epoch(row, speed, saved)


def restore(saved: dict, net, optimizer, precision) -> None:
    """Put a checkpoint's state back."""
    net.load_state_dict(saved["net"])
    utils.load_optimizer(optimizer, saved["optimizer"])
    precision.load(saved)
    utils.set_rng_state(saved["rng"])


if __name__ == "__main__":
    main()
