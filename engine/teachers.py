"""One teacher or several, as the flags name them: their files, and what is said of them."""

import os
from argparse import Namespace
from dataclasses import dataclass

from torch import nn

from engine.checkpoint import Weights, sha256
from engine.ensemble import Ensemble, nets_of
from kd_losses import METHODS
from utils import UserError, shown


@dataclass
class SeveralWeights:
    """What is known of several teachers before they are built, like `checkpoint.Weights` of one.

    kind: of their ensemble.
    """

    members: list[Weights]
    kind: str

    @property
    def name(self) -> str:
        return ",".join(found.name for found in self.members)

    @property
    def notes(self) -> list[str]:
        """The notes of each teacher, those that are said of all once."""
        return list(dict.fromkeys(line for found in self.members for line in found.notes))

    def warnings(self, images) -> list[str]:
        return [line for found in self.members for line in found.warnings(images)]

    def build(self, num_class: int, seed: int, img_size: int) -> Ensemble:
        return Ensemble([x.build(num_class, seed, img_size) for x in self.members], self.kind)


def together(found: list[Weights], kind: str | None) -> Weights | SeveralWeights:
    """A teacher, or several. kind: --ensemble."""
    return found[0] if len(found) == 1 else SeveralWeights(found, kind or "probs")


def each(found: Weights | SeveralWeights | None) -> list[Weights]:
    """The teachers one by one."""
    if found is None:
        return []
    return found.members if isinstance(found, SeveralWeights) else [found]


# --- the flags ------------------------------------------------------------------------------------


def named_by(args: Namespace, modes: list[str]) -> list[tuple]:
    """(--t_name, --t_model, --t_taps) of each teacher. Raises UserError if they are not as many,
    the methods cannot have several, or --ensemble has no effect."""
    files, names = args.t_model, args.t_name
    several = files if files or not args.t_pretrained else names
    count = several.count(",") + 1 if several else 1
    if count == 1:
        if args.ensemble:
            raise UserError(
                f"--ensemble {args.ensemble} has no effect with one teacher: give several, "
                "--t_model FILE,FILE"
            )
        return [(names, files, args.t_taps)]
    if files:
        _check_files(files)
    files = _parts(files, "--t_model", count)
    _check_modes(args, modes)
    names = _parts(names, "--t_name", count)
    taps = args.t_taps and _parts(",".join(args.t_taps), "--t_taps", count, "+")
    taps = [None if part is None else tuple(part.split(",")) for part in taps or [None] * count]
    return list(zip(names, files, taps))


def _check_files(files: str) -> None:
    """Raise UserError if the name of one file has a comma, or a file is given twice."""
    if os.path.exists(files):
        raise UserError(
            f"--t_model {files}: a comma separates several teachers, so the name of a file cannot "
            "have one: rename the file"
        )
    given = files.split(",")
    twice = [file for i, file in enumerate(given) if file and file in given[:i]]
    if twice:
        raise UserError(f"--t_model: {shown(twice[0])} is given twice")


def _parts(text: str | None, flag: str, count: int, mark: str = ",") -> list[str | None]:
    """The value of a flag for each teacher; None for all where the flag is not given."""
    if text is None:
        return [None] * count
    parts = text.split(mark)
    if len(parts) != count or not all(part.strip(" ,") for part in parts):
        raise UserError(
            f"{flag} {shown(text)}: there are {count} teachers, so expected {count} values "
            f"separated by {mark!r}"
        )
    return parts


def _check_modes(args: Namespace, modes: list[str]) -> None:
    for mode in modes:
        method, why = METHODS[mode], ""
        if method.teacher == "trained":
            why = "it trains its teacher"
        elif method.deploys_projector:
            why = "it deploys the classifier of its teacher"
        elif method.precompute:
            why = "it measures its teacher before the training"
        elif method.inputs.calls_nets and args.ensemble == "confidence":
            why = "--ensemble confidence needs labels, and it calls the teacher on other images"
            raise UserError(f"--kd_mode {mode}: {why}")
        if why:
            raise UserError(f"--t_model: --kd_mode {mode} supports only one teacher, because {why}")
    if args.ensemble == "confidence" and args.unlabeled:
        raise UserError("--unlabeled: --ensemble confidence reads the labels: give probs or logits")
    if args.ensemble and not any(takes_ensemble(mode) for mode in modes):
        raise UserError(
            f"--ensemble {args.ensemble} has no effect: --kd_mode {'+'.join(modes)} reads feature "
            "maps, and its loss is summed over the teachers"
        )


def takes_ensemble(mode: str) -> bool:
    """Whether a method learns from the logits of an ensemble; others sum over the teachers."""
    return METHODS[mode].inputs.reads_logits_alone


# --- what their checkpoints know of the data ------------------------------------------------------


def agreed(known: list[tuple[str, dict]], args: Namespace) -> dict:
    """What several checkpoints know of the data, of the first that knows it. known: (name of the
    file, what it knows). Raises UserError if they contradict each other and no flag decides."""
    for key in ("data_name", "img_root", "img_size"):
        says = {path: meta[key] for path, meta in known if key in meta}
        first = next(iter(says), None)
        for path, value in says.items():
            if value != says[first] and getattr(args, key) is None:
                raise UserError(
                    f"{first} says {key} {shown(says[first])}, {path} says {shown(value)}: give "
                    f"--{key}"
                )
    return {key: value for _, meta in reversed(known) for key, value in meta.items()}


# --- what a run says of them ----------------------------------------------------------------------


def fingerprint(found: Weights | SeveralWeights | None) -> str | list[str | None] | None:
    """The sha256 of the teacher's file; of several teachers a list."""
    prints = [sha256(x.path) if x.path else None for x in each(found)]
    return prints if len(prints) > 1 else next(iter(prints), None)


def record(found: Weights | SeveralWeights, prints) -> dict:
    """For args.json. prints: their `fingerprint`."""
    if isinstance(found, SeveralWeights):
        members = [record(*pair) for pair in zip(found.members, prints)]
        return dict(network=found.name, ensemble=found.kind, members=members)
    return dict(
        path=found.path,
        sha256=prints,
        network=found.name,
        pretrained=found.pretrained,
        outputs=found.outputs.index,
    )


def to_evaluate(net: nn.Module, found: Weights | SeveralWeights) -> list[tuple[str, nn.Module]]:
    """(what to call it, network) of the teachers and of their ensemble, where their accuracy on the
    dataset has a meaning."""
    nets, members = nets_of(net), each(found)
    rows = [
        ("teacher" if len(nets) == 1 else f"teacher {k} ({x.name})", one)
        for k, (one, x) in enumerate(zip(nets, members), 1)
        if x.outputs is None or x.outputs.answers
    ]
    if len(nets) > 1 and len(rows) == len(nets):
        kind = net.kind_without_labels
        why = "" if kind == net.kind else f", since {net.kind} needs labels"
        rows.append((f"ensemble of the teachers ({kind}{why})", net))
    return rows
