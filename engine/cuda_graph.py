"""A training step as a CUDA graph: recorded once, replayed on the batches that follow, without a
kernel launch from Python. https://pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace

import torch
from torch import Tensor

import utils


def choose_step(
    step: Callable, cfg, device: torch.device, log: Callable[[str], None], criteria=()
) -> Callable:
    """`step`, captured as a CUDA graph where that is possible and --cuda_graph does not forbid it.
    criteria: the `distiller.Criterion`s that it calls."""
    if device.type != "cuda" or cfg.cuda_graph == 0:
        return step
    modes = {criterion.mode: criterion.settings.method.capturable for criterion in criteria}
    tensors = [x for criterion in criteria for x in criterion.state_dict().values()]
    reason = check_cuda_graph(cfg, device, modes, tensors)
    log(f"not captured as a CUDA graph: {reason}" if reason else "captured as a CUDA graph")
    return step if reason else CapturedStep(step)


def check_cuda_graph(cfg, device: torch.device, modes: dict[str, bool], tensors=()) -> str:
    """Why a step cannot be captured, or ''. Raises UserError if --cuda_graph asks for it all the
    same. modes: {method: whether its row says that it can be}; tensors: of the methods."""
    reason = _why_not(cfg, device, modes, tensors)
    if cfg.cuda_graph and reason:
        raise utils.UserError(f"--cuda_graph: {reason}")
    return reason


def _why_not(cfg, device: torch.device, modes: dict[str, bool], tensors) -> str:
    if device.type != "cuda":
        return "the device is not CUDA"
    if utils.world() > 1:
        return "CUDA graphs need a single process"
    if cfg.on_nan == "skip":
        return "--on_nan skip reads the loss in every step"
    for mode, capturable in modes.items():
        if not capturable:
            return f"{mode} reads values from the device in every step"
    if not all(x.is_cuda for x in tensors):
        return "the method keeps tensors on the CPU"
    return ""


class CapturedStep:
    """A training step, called with the same arguments, as a CUDA graph.

    The tensors among the arguments, and those in a dataclass or a list, are inputs: copied into the
    graph's own before a replay. Everything else is part of the graph: where it, a learning rate or
    an input's shape changes, the step is recorded again. The first steps of an optimizer, those
    after a weight has become 0 or is 0 no longer, and a last batch of another size are ordinary
    ones.

    A step may be captured that reads no value from the device, copies nothing from pageable memory,
    and draws random numbers from the device's default generator alone (tests/test_device.py).
    """

    # ordinary steps, in which libraries choose kernels and the optimizer makes its state
    WARM_UP = 3

    def __init__(self, step: Callable):
        self.step = step
        self.begun, self.steps, self.fixed, self.graph = None, 0, None, None

    def __call__(self, *args):
        inputs = [x for arg in args for x in _tensors(arg)]
        shapes = [x.shape for x in inputs]
        (optimizer,) = (x for x in args if isinstance(x, torch.optim.Optimizer))
        begun = optimizer, [_active(arg) for arg in args]
        if begun != self.begun:
            self.begun, self.steps, self.fixed, self.graph = begun, 0, None, None
            self.shapes = shapes
        if self.steps < self.WARM_UP or shapes != self.shapes:
            self.steps += 1
            return _on_a_side_stream(lambda: self.step(*args))
        rates = [group["lr"] for group in optimizer.param_groups]
        fixed = rates, [_fixed(arg) for arg in args]
        if fixed != self.fixed:
            self.fixed, self.graph = fixed, torch.cuda.CUDAGraph()
            own = [_copied(arg) for arg in args]
            self.inputs = [x for arg in own for x in _tensors(arg)]
            with torch.cuda.graph(self.graph):
                self.result = self.step(*own)
        with torch.no_grad():  # images may require gradients
            for own, x in zip(self.inputs, inputs):
                if own is not x:
                    own.copy_(x)
        self.graph.replay()
        return self.result


def _tensors(arg) -> list[Tensor]:
    """The tensors of an argument: itself, or those in a dataclass, a list or a tuple."""
    if isinstance(arg, Tensor):
        return [arg]
    if isinstance(arg, (list, tuple)):
        return [x for part in arg for x in _tensors(part)]
    if is_dataclass(arg):
        return [x for f in fields(arg) for x in _tensors(getattr(arg, f.name))]
    return []


def _copied(arg):
    """The argument with tensors of its own; 0-dim ones, which their owner fills in place, stay."""
    if isinstance(arg, Tensor):
        return arg.clone() if arg.dim() else arg
    if not _tensors(arg):
        return arg
    if isinstance(arg, (list, tuple)):
        return type(arg)(_copied(part) for part in arg)
    return replace(arg, **{f.name: _copied(getattr(arg, f.name)) for f in fields(arg)})


def _fixed(arg):
    """What is part of the graph of an argument."""
    if _tensors(arg):
        return None
    return dict(arg) if isinstance(arg, dict) else arg


def _active(arg):
    """Which weights are not 0."""
    return [bool(x) for x in arg.values()] if isinstance(arg, dict) else None


def _on_a_side_stream(run):
    """What comes before a capture has to run on a stream of its own."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        result = run()
    torch.cuda.current_stream().wait_stream(side)
    return result
