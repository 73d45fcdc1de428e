"""The settings of a method in a run: one function resolves them, and keeps where each comes
from."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from engine.published import settings_of_pair
from kd_losses import METHODS, Inputs, Method, Phase
from utils import UserError, named

ADAPTERS = dict(
    none="", **{x: x for x in ("size", "channels+size", "regressor", "regressor+relu", "connector")}
)


@dataclass(frozen=True)
class Settings:
    """One method's settings. The fields are those of its row (`kd_losses.Method`); besides:

    adapter: what makes the student's maps fit the teacher's (engine/adapter.py); teacher_bn:
    whether the teacher's batch norms use 'running' statistics or those of the 'batch'; taps:
    {network: the modules whose maps are its stages}; flags: {flag of the method: value}; origin:
    {name of a value: where it comes from}: 'default', a protocol, a pair of networks, or 'flag'.
    """

    mode: str
    method: Method
    inputs: Inputs
    lambda_kd: float
    lambda_ce: float
    stages: tuple[int, ...] | None
    reduce: str
    adapter: str
    ramp: Callable[[int, int], float]
    phases: tuple[Phase, ...]
    teacher_bn: str
    taps: Mapping[str, tuple[str, ...]]
    flags: Mapping[str, float | int | bool | str]
    origin: Mapping[str, str]

    def __deepcopy__(self, memo) -> "Settings":
        return self  # nothing in it changes


def settings(
    mode: str,
    protocol: str,
    teacher: str,
    student: str,
    num_class: int,
    flags: Mapping = MappingProxyType({}),
    composed: bool = False,
    micro_batch: int | None = None,
) -> Settings:
    """Resolve the settings of `mode`: the row, then the protocol, then the pair of networks, then
    the user's flags.

    teacher, student: names of networks; num_class: for a weight that depends on it; flags: {name:
    value} of what was given for this method; composed: one of several methods, whose own balance
    with the cross-entropy then means nothing; micro_batch: images in a forward pass, for a method
    that is built for one batch size. Raises UserError for a flag that would have no effect.
    """
    method = named(METHODS, mode, "--kd_mode")
    values = dict(
        inputs=method.inputs,
        lambda_kd=method.lambda_kd,
        lambda_ce=method.lambda_ce,
        stages=method.stages,
        reduce=method.reduce,
        adapter=method.match,
        ramp=method.ramp,
        phases=method.phases,
        teacher_bn="running",
        taps={},
        batch_size=None,
        **{name: flag.default for name, flag in method.flags.items()},
    )
    origin = dict.fromkeys(values, "default")
    layers = [settings_of_pair(mode, protocol, teacher, student)]
    if composed:
        layers.append(dict(lambda_ce=(1.0, "several methods")))
    layers.append({name: (value, "flag") for name, value in flags.items()})
    for layer in layers:
        for name, (value, source) in layer.items():
            values[name], origin[name] = value, source
    if callable(values["lambda_kd"]):
        values["lambda_kd"] = values["lambda_kd"](num_class)
        origin["lambda_kd"] = f"{num_class} classes"
    _refuse_ignored(mode, method, values, flags)
    own = {name: values.pop(name) for name in method.flags}
    if method.fixed_batch:
        own["batch"], origin["batch"] = micro_batch, "batch size"
    del values["batch_size"]  # part of the training recipe: see `batch_size`
    return Settings(
        mode, method, **values, flags=MappingProxyType(own), origin=MappingProxyType(origin)
    )


def batch_size(modes: list[str], protocol: str) -> int | None:
    """The batch size that the protocol has for these methods, or None for its own."""
    found = [settings_of_pair(mode, protocol, "", "").get("batch_size") for mode in modes]
    return min((value for value, _ in filter(None, found)), default=None)


def uses(method: Method, inputs: Inputs, name: str) -> bool:
    """Whether --stages, --reduce, --adapter or --lambda_ce has an effect on a method."""
    if name == "stages":
        return inputs.reads_stages
    if name == "reduce":
        return inputs.per_stage
    if name == "adapter":
        return inputs.reads != ("out",)
    if name == "lambda_ce":
        return any(phase.ce for phase in method.phases)
    return True


def _refuse_ignored(mode: str, method: Method, values: dict, flags: Mapping) -> None:
    reasons = dict(
        stages="compares no stages",
        reduce="computes one loss for all stages",
        adapter="compares logits, which have no adapter",
        lambda_ce="has no cross-entropy",
    )
    for name in flags:
        if not uses(method, values["inputs"], name):
            raise UserError(f"--{name} has no effect: {mode} {reasons[name]}")
        only = method.flags[name].only if name in method.flags else None
        if only and values[only[0]] != only[1]:
            raise UserError(
                f"--{name} has no effect with --{only[0]} {values[only[0]]}: leave it out, or give "
                f"--{only[0]} {only[1]}"
            )
    if values["inputs"].one_stage and len(flags.get("stages", [0])) > 1:
        raise UserError(
            f"--stages {','.join(map(str, flags['stages']))}: {mode} compares one stage"
        )
