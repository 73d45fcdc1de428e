"""An accelerator without one: tensors on torch's `meta` device, which has shapes and no values.

What would stop a GPU, or fail on it, fails here: see `Guard`.
"""

import contextlib
import traceback
from pathlib import Path

import torch
import toys
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine import foreign

ROOT = str(Path(__file__).parent.parent)
READS = {"_local_scalar_dense", "is_nonzero", "equal"}  # a value comes back to the CPU
UNKNOWN_SIZES = {"nonzero", "masked_select", "_unique2", "unique_dim", "bincount"}


class Illegal(AssertionError):
    """What a step on an accelerator must not do, and the line that does it."""


class Guard(TorchDispatchMode):
    """Raises Illegal where an operator reads a value back, gives a result whose size depends on
    values (a mask as an index), mixes devices, makes a tensor on the CPU, or draws from another
    device's generator. A 0-dim CPU tensor may be an operand: it is passed like a number.

    calls: what was called, with the Python numbers in the arguments.
    """

    def __init__(self, kind: str = "meta"):
        super().__init__()
        self.kind, self.calls = kind, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name, leaves = func.overloadpacket.__name__, tree_leaves((args, kwargs))
        self.calls.append((name, *(x for x in leaves if isinstance(x, (int, float)))))
        tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
        if name in READS:
            self.stop(f"{name} reads a value from the device")
        indices = args[1] if name.startswith(("index", "_index")) and len(args) > 1 else []
        masks = [x for x in tree_leaves(indices) if getattr(x, "dtype", None) is torch.bool]
        fills = "index_put" in name and args[2].numel() == 1  # x[mask] = 1.0 fills, without a count
        if name in UNKNOWN_SIZES or (masks and isinstance(indices, (list, tuple)) and not fills):
            self.stop(f"{name}: the result's size depends on values")
        for x in leaves:
            if isinstance(x, torch.Generator) and x.device.type != self.kind:
                self.stop(f"{name} draws from a generator on {x.device}")
        if any(x.device.type != self.kind and x.dim() for x in tensors):
            self.stop(f"{name} has an operand on the CPU")
        if torch.device(kwargs.get("device") or self.kind).type != self.kind:
            self.stop(f"{name} makes a tensor on the CPU")
        out = func(*args, **kwargs)
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.device.type != self.kind:
                self.stop(f"{name} makes a tensor on the CPU")
        return out

    def stop(self, what: str):
        own = [
            frame
            for frame in traceback.extract_stack()[:-2]
            if frame.filename.startswith(ROOT)
            and ".venv" not in frame.filename
            and Path(frame.filename).name != "on_meta.py"
        ]
        frame = own[-1]
        raise Illegal(f"{what} ({Path(frame.filename).name}:{frame.lineno}: {frame.line})")


@contextlib.contextmanager
def without_autocast(monkeypatch):
    """`meta` has no autocast; the losses switch it off, which is then nothing."""
    autocast, enabled = torch.autocast, torch.is_autocast_enabled

    def there(kind, *args, **kwargs):
        return contextlib.nullcontext() if kind == "meta" else autocast(kind, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "autocast", there)
        patch.setattr(
            torch, "is_autocast_enabled", lambda *kind: "meta" not in kind and enabled(*kind)
        )
        yield


def moved(make):
    """A function that moves a module's parameters and buffers; make(x): the tensor in x's place."""
    there = {}

    def one(x):
        if id(x) not in there:
            there[id(x)] = x, make(x)  # the original is kept: its id must stay its own
        return there[id(x)][1]

    def move(module: nn.Module):
        for part in module.modules():
            for name, p in part._parameters.items():
                if p is not None:
                    part._parameters[name] = nn.Parameter(one(p), p.requires_grad)
            for name, x in part._buffers.items():
                if x is not None:
                    part._buffers[name] = one(x)

    return move


def like_on(device: str):
    def make(x):
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)

    return make


def distiller_on(device: str, mode: str, *argv: str, make=None):
    """A distiller of `mode` between two ResNets, built on the CPU and moved to `device`."""
    nets = [foreign.build(name, 5).requires_grad_(False) for name in ("resnet8", "resnet14")]
    for net in nets:
        net.to(memory_format=torch.channels_last)
    found = toys.distiller(mode, *nets, toys.images(size=16), argv=[*argv])
    make = make or like_on(device)
    move, path = moved(make), found.feature_path or ()
    names = [name for name, p in nets[0].named_parameters() if p in path]
    for module in (*nets, found.deployed, found.added):
        move(module)
    if path:
        parameters = dict(nets[0].named_parameters())
        found.feature_path = {parameters[name] for name in names}
    found.epoch, found.epochs = make(found.epoch), make(found.epochs)
    return found


def batch_on(device: str, distiller, n: int = toys.BATCH):
    img = torch.empty(n, 3, 16, 16, device=device).contiguous(memory_format=torch.channels_last)
    target, index = (torch.zeros(n, dtype=torch.long, device=device) for _ in range(2))
    strong = [torch.empty_like(img)] if distiller.two_views else []
    return distiller.batch(img, target, index, *strong)
