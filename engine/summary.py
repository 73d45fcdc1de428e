"""What a run says of itself: in the log, in --dry_run and in args.json."""

import dataset
import network
from engine import cli, published
from engine.distiller import Criterion, Distiller
from engine.ensemble import OfEnsemble


def summary(
    where: str, distiller: Distiller, data, cfg, phases, found_t, found_s, macs
) -> list[str]:
    """The networks, the data and every resolved setting, as lines of the log."""
    names = f"{found_t.name} -> {found_s.name}" if found_t else f"{found_s.name} without a teacher"
    lines = [
        f"{where}: {names}, {data.name}, {data.train.num_class} classes",
        f"{cli.describe_images(data)}, "
        f"student from {found_s.path or ('library' if found_s.pretrained else 'random')} weights",
        *data.notes,
        *(found_t.notes if found_t else []),
        *found_s.notes,
        cli.describe_recipe(cfg, dataset.padded(data.train)),
    ]
    full = published.PROTOCOLS[cfg.protocol].epochs
    if cfg.epochs != full:
        lines.append(
            f"milestones, phases and warm-ups are scaled from {full} epochs to {cfg.epochs}"
        )
    lines.append("phases: " + ", ".join(f"{p.name} {epochs} epoch(s)" for p, epochs in phases))
    for criterion in distiller.added:
        mode, origin = criterion.mode, criterion.settings.origin
        parts = [
            f"{name} {value}" + (f" ({origin[name]})" if origin[name] != "default" else "")
            for name, value in _values(criterion, distiller).items()
        ]
        lines.append(f"{criterion.label}: " + ", ".join(parts))
        if cfg.protocol != "kdzoo" and not published.settings_of(mode, cfg.protocol):
            lines.append(
                f"protocol {cfg.protocol} has no settings for {mode}; using the method's defaults"
            )
        lines += [f"{criterion.label}: adapter, {note}" for note in criterion.adapter.notes]
    for criterion in distiller.criteria.values():
        if isinstance(criterion, OfEnsemble):
            count, kind = len(distiller.teachers), criterion.net.kind
            lines.append(f"{criterion.mode}: learns from the ensemble ({kind}) of {count} teachers")
    added = network.count_parameters(distiller.added)
    if distiller.deployed is not distiller.student.net:
        whole = network.count_parameters(distiller.deployed)
        name = distiller.deployed_name(found_s.name)
        lines.append(f"trained and evaluated: {name}, {whole:,} parameters")
    if added:
        lines.append(f"the method adds {added:,} parameters and {macs:,} multiply-adds per image")
    return lines + [line for x in (found_t, found_s) if x for line in x.warnings(data.train)]


def _values(criterion: Criterion, distiller: Distiller) -> dict:
    """{name: value} of what the method is run with."""
    settings = criterion.settings
    values = dict(lambda_kd=settings.lambda_kd, lambda_ce=distiller.lambda_ce)
    if settings.inputs.reads_stages:
        stages = [distiller.student.numbers[i] for i in criterion.stage_ids]
        values |= dict(stages=stages, reduce=settings.reduce)
    return values | settings.flags


def recorded_settings(distiller: Distiller) -> dict:
    """For args.json: the methods' values, where each comes from, and the parameters that they
    add."""
    methods = {x.label: _values(x, distiller) for x in distiller.added}
    origins = {
        x.label: {name: x.settings.origin[name] for name in methods[x.label]}
        for x in distiller.added
    }
    added = network.count_parameters(distiller.added)
    return dict(methods=methods, origins=origins, added=added)
