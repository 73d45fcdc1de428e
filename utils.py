"""What every script needs: errors, device, random state, optimizer, learning rate, meter,
evaluation."""

import argparse
import ctypes
import difflib
import errno
import os
import reprlib
import time
from contextlib import nullcontext, suppress

# Before torch is imported. A thread of libgomp that waits for work spins for milliseconds before it
# sleeps: processes that share cores then slow each other down ten times and more.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

# --- a user's mistake: one line, exit code 2 -----------------------------------------------------


class UserError(ValueError):
    """What is wrong and what to do, in one line for the person at the keyboard."""


def first_line(error: BaseException) -> str:
    """What an exception says, in a line that is not too long; its kind where it says nothing."""
    return shown((str(error).strip() or type(error).__name__).splitlines()[0], 300)


def out_of_memory(error: BaseException) -> bool:
    """Whether it is the memory that an exception is about."""
    if (
        isinstance(error, (MemoryError, torch.OutOfMemoryError))
        or getattr(error, "errno", None) == errno.ENOMEM
    ):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def printable(text: str) -> str:
    """`text`, escaped where a terminal would do something else than show it: names from files and
    folders may hold anything."""
    if text.isprintable():
        return text
    escaped = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return "".join(escaped)


def shown(value, most: int = 60) -> str:
    """A name or a value that was read from a file or folder, for a line: escaped, and cut to `most`
    characters."""
    try:
        text = value if isinstance(value, str) else reprlib.repr(value)
    except Exception:  # a number of too many digits, say
        text = f"a {type(value).__name__}"
    text = printable(text[: most + 1])
    return text if len(text) <= most else text[: most - 3] + "..."


def brief(error: BaseException) -> str:
    """The kind of an exception and its first line."""
    kind, line = type(error).__name__, first_line(error)
    return kind if line == kind else f"{kind}: {line}"


def named(table: dict, name: str, what: str):
    """`table[name]`, or a UserError with the similar names, or all of them."""
    if name in table:
        return table[name]
    near = difflib.get_close_matches(str(name), table, n=3)
    if near:
        hint = f"did you mean {' or '.join(near)}?"
    else:
        hint = f"expected one of {', '.join(table)}" if len(table) < 60 else "no similar name"
    raise UserError(f"unknown {what} {name!r}; {hint}")


def cpus() -> int:
    """CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# --- device, precision, randomness ---------------------------------------------------------------


DEVICES = ("auto", "cpu", "cuda", "cuda:N", "mps", "xpu")


AMP = ("auto", "bf16", "fp16", "off")


def accelerator() -> str | None:
    """The type of the accelerator that torch sees."""
    if not torch.accelerator.is_available():
        return None
    return torch.accelerator.current_accelerator().type


def select_device(
    device: str = "auto", cuda: int | None = None, ranks: bool = False
) -> torch.device:
    """The device of --device and --cuda (KD-Zoo's: 0 for the CPU, 1 for a CUDA device); 'auto': an
    accelerator if torch sees one. With `ranks`, of one of the processes that torchrun started.

    Raises UserError for a device that is not there.
    """
    if cuda is not None:
        wanted = "cuda" if cuda else "cpu"
        if device not in ("auto", wanted) and not device.startswith(f"{wanted}:"):
            raise UserError(f"--device {device} contradicts --cuda {cuda}")
        device = wanted if device == "auto" else device
    kind, _, number = device.partition(":")
    if kind == "auto":
        kind = accelerator() or "cpu"
    if kind not in ("cpu", "cuda", "mps", "xpu") or (number and kind in ("cpu", "mps")):
        raise UserError(f"unknown --device {device}: expected one of {', '.join(DEVICES)}")
    if kind not in ("cpu", accelerator()):
        flag = "--cuda 1" if cuda else f"--device {device}"
        raise UserError(
            f"{flag}: torch finds no {kind} device; leave the flag out to use the available device"
        )
    if number:
        if not number.isdecimal() or int(number) >= torch.accelerator.device_count():
            count = torch.accelerator.device_count()
            raise UserError(f"--device {device}: expected {kind}:0 to {kind}:{count - 1}")
        torch.accelerator.set_device_index(int(number))
    if ranks and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if number or kind == "mps":
            raise UserError(f"--device {device} does not work with several processes")
        if kind != "cpu":
            torch.accelerator.set_device_index(int(os.environ.get("LOCAL_RANK", 0)))
        join_ranks(kind)
    if kind == "cuda":
        torch.backends.cudnn.benchmark = True
    if kind == "cpu":
        _keep_freed_memory()
        return torch.device("cpu")
    if kind == "mps":
        return torch.device("mps")
    return torch.device(kind, torch.accelerator.current_device_index())


class Precision:
    """The precision of forward passes, and the steps of the optimizer that go with it.

    dtype: of autocast: torch.bfloat16, torch.float16, or None for float32. With float16 the loss is
    scaled (torch.amp.GradScaler), or small gradients would become 0; a step with infinite gradients
    is skipped, and the scale is halved.
    """

    def __init__(self, device: torch.device | str = "cpu", dtype: torch.dtype | None = None):
        self.device, self.dtype = torch.device(device), dtype
        self.device_type = self.device.type
        scaled = dtype is torch.float16
        self.scaler = torch.amp.GradScaler(self.device_type) if scaled else None

    def autocast(self):
        if self.dtype is None:
            return nullcontext()
        return torch.autocast(self.device_type, dtype=self.dtype)

    def backward(self, loss: Tensor) -> None:
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.scaler is None:
            optimizer.step()
        else:
            self.scaler.step(optimizer)
            self.scaler.update()

    def state(self) -> dict:
        """What a checkpoint keeps of the scaler: {} without one."""
        return {} if self.scaler is None else dict(scaler=self.scaler.state_dict())

    def load(self, saved: dict) -> None:
        """Restore what `state` gave. Raises ValueError if it was not saved."""
        if self.scaler is not None:
            if "scaler" not in saved:
                raise ValueError("the checkpoint has no loss scaler state")
            self.scaler.load_state_dict(saved["scaler"])

    def __str__(self) -> str:
        names = {
            torch.bfloat16: "bfloat16 autocast",
            torch.float16: "float16 autocast, scaled loss",
        }
        return names.get(self.dtype, "float32")


def precision(device: torch.device, amp: str = "auto") -> Precision:
    """The precision of --amp. 'auto': bfloat16 where the hardware has it; float16 with a scaled
    loss on other CUDA devices and XPUs; float32 elsewhere."""
    kinds = dict(bf16=torch.bfloat16, fp16=torch.float16, off=None)
    if amp != "auto":
        return Precision(device, kinds[amp])
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return Precision(device, torch.bfloat16 if native else torch.float16)
    if device.type == "xpu":
        native = torch.xpu.is_bf16_supported() if hasattr(torch.xpu, "is_bf16_supported") else True
        return Precision(device, torch.bfloat16 if native else torch.float16)
    if device.type == "cpu":
        tests = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # private in torch
        if any(getattr(torch.cpu, test, lambda: False)() for test in tests):
            return Precision(device, torch.bfloat16)
    return Precision(device)


def describe_device(device: torch.device, precision: Precision) -> str:
    """Where and how it is computed, for the log."""
    if device.type == "cpu":
        name = f"CPU, {torch.get_num_threads()} threads"
    elif device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = str(device)
    processes = f", {world()} processes" if world() > 1 else ""
    tf32 = ""
    if device.type == "cuda" and precision.dtype is None:
        tf32 = f", TF32 in convolutions {'on' if torch.backends.cudnn.allow_tf32 else 'off'}"
        tf32 += f", matrix products {torch.get_float32_matmul_precision()}"
    return f"{name}{processes}, {precision}{tf32}"


def _keep_freed_memory() -> None:
    """Let glibc keep for the next step what this one has freed: to give it back and have it cleared
    again costs up to a fifth of a step."""
    with suppress(OSError, AttributeError, TypeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 1 << 30) or mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD; the most of older ones
        mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


# --- several processes (torchrun), each with its share of every batch -----------------------------

_control = None  # a group for Python objects, on the CPU


def rank() -> int:
    return dist.get_rank() if world() > 1 else 0


def world() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def share() -> tuple[int, int]:
    """What `dataset` takes for this process's part."""
    return rank(), world()


def join_ranks(kind: str) -> None:
    """Under torchrun, meet the other processes. kind: the type of device."""
    global _control
    if world() == 1:
        dist.init_process_group(dict(cpu="gloo", cuda="nccl", xpu="xccl")[kind])
        _control = dist.new_group(backend="gloo")


def leave_ranks() -> None:
    global _control
    if world() > 1:
        dist.destroy_process_group()
        _control = None  # its threads end here, and not with the interpreter


def control_group():
    """The group of processes for small objects on the CPU."""
    return _control


def all_gather(value) -> list:
    """`value`, a small object, of every rank; no rank continues before all have arrived."""
    if world() == 1:
        return [value]
    values = [None] * world()
    dist.all_gather_object(values, value, group=_control)
    return values


def seed_everything(seed: int, name: str = "") -> None:
    """Seed torch (all devices) and numpy; with a name, with other numbers than under any other."""
    if name:
        mixed = np.random.SeedSequence([seed % 2**64, *name.encode()])
        seed = int(mixed.generate_state(1, np.uint64)[0] >> np.uint64(1))
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)


def rng_state() -> dict[str, Tensor]:
    """The states of torch's generators, as tensors."""
    state = dict(cpu=torch.get_rng_state())
    if kind := accelerator():
        state[kind] = torch.get_device_module(kind).get_rng_state()
    return state


def set_rng_state(state: dict[str, Tensor], exact: bool = False) -> None:
    """Continue where `rng_state()` was taken; with `exact`, by this process itself."""
    torch.set_rng_state(state["cpu"])
    kind = accelerator()
    if kind in state:
        torch.get_device_module(kind).set_rng_state(state[kind])
    # a later rank's own state is nowhere, and it must not draw what the first rank draws
    if rank() > 0 and not exact:
        torch.manual_seed(int(torch.randint(2**31, ())) + rank())


def sgd(parameters, cfg: argparse.Namespace, nesterov: bool | None = None) -> torch.optim.SGD:
    """A fresh optimizer of the cfg over `parameters`: tensors, or groups of them."""
    optimizer = torch.optim.SGD(
        parameters,
        lr=cfg.lr,
        momentum=cfg.momentum,
        weight_decay=cfg.weight_decay,
        nesterov=bool(cfg.nesterov) if nesterov is None else nesterov,
        fused=True,  # one kernel for all parameters, a sixth of the time on two CPU cores
    )
    optimizer.register_step_pre_hook(_start_momentum)
    return optimizer


def _start_momentum(optimizer: torch.optim.SGD, *args) -> None:
    """Momentum starts at zero. Left to itself, fused SGD fails where only some parameters have a
    momentum (those of a method whose weight was 0 until now have none), and leaves it uninitialised
    in a first step that a loss scaler skips."""
    if len(optimizer.state) == sum(len(group["params"]) for group in optimizer.param_groups):
        return  # all have theirs: nothing to look through in every step
    for group in optimizer.param_groups:
        for p in group["params"] if group["momentum"] else []:
            if p.grad is not None and "momentum_buffer" not in optimizer.state[p]:
                optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Load `state`. Raises ValueError if it belongs to other parameters or another recipe."""
    for own, group in zip(optimizer.param_groups, state["param_groups"]):
        for key in ("momentum", "dampening", "weight_decay", "nesterov", "maximize"):
            if group[key] != own[key]:
                raise ValueError(f"the optimizer's {key}: expected {own[key]}, got {group[key]}")
    optimizer.load_state_dict(state)
    for parameter, kept in optimizer.state.items():
        if any(torch.is_tensor(x) and x.shape not in ((), parameter.shape) for x in kept.values()):
            raise ValueError("the optimizer's state belongs to other parameters")


def load_state(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Load `state`. Raises ValueError if it has entries that are not finite, and the module has
    not."""
    for key, own in module.state_dict().items():
        if key in state and own.isfinite().all() and not state[key].isfinite().all():
            raise ValueError(f"{key} has entries that are not finite")
    module.load_state_dict(state)


def equal_states(a: nn.Module, b: nn.Module) -> bool:
    """Whether two networks have the same parameters and buffers."""
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def micro_batches(count: int, *tensors: Tensor):
    """Yield (parts, share): the tensors split into `count` parts, and the share of the samples that
    a part has. A part has at least two samples: batch norm and relational losses cannot use one."""
    n = len(tensors[0])
    count = max(1, min(count, n // 2))
    for parts in zip(*(x.tensor_split(count) for x in tensors)):
        yield parts, len(parts[0]) / n


def weighted_sum(pairs: list[tuple[float, Tensor]]) -> Tensor:
    """The sum of weight * value, without a kernel for 0 + x and 1 * x."""
    terms = [value if weight == 1 else weight * value for weight, value in pairs]
    return sum(terms[1:], start=terms[0])


def step_decay(lr: float, epoch: int, milestones: tuple[int, ...], warmup: int = 0) -> float:
    """The learning rate of `epoch` (from 1): it grows linearly to `lr` over the first `warmup`
    epochs, and is multiplied by 0.1 after each milestone."""
    grown = min(epoch / warmup, 1.0) if warmup else 1.0
    return lr * grown * 0.1 ** sum(epoch > milestone for milestone in milestones)


# --- meters and evaluation -----------------------------------------------------------------------


class Meter:
    """Means over the samples of an epoch, summed on the device and read only when asked for.

    finite: leave out values that are NaN or infinite, which reads from the device at every step.
    """

    def __init__(self, finite: bool = False):
        self.finite, self.began, self.loaded = finite, time.perf_counter(), 0
        self.sums, self.counts = {}, {}  # by the names that came together: a term may come later

    def add(self, values: dict[str, Tensor], n: int) -> None:
        """Add the means `values`, 0-dim tensors by name, over `n` samples."""
        names = tuple(values)
        total = n * torch.stack([value.detach().float() for value in values.values()])
        if self.finite and not total.isfinite().all():
            return
        self._add(names, total, n)

    def _add(self, names: tuple[str, ...], total: Tensor, n: int) -> None:
        if names in self.sums:  # loaded ones lie on the CPU
            total = self.sums[names].to(total.device) + total
        self.sums[names] = total
        self.counts[names] = self.counts.get(names, 0) + n

    def read(self) -> dict[str, float]:
        """The mean of each name over the samples for which it was added, on all ranks."""
        total, count = {}, {}
        for names, sums, n in self.state():
            for name, value in zip(names, sums.tolist()):
                total[name] = total.get(name, 0.0) + value
                count[name] = count.get(name, 0) + n
        return {name: total[name] / count[name] for name in total}

    def state(self) -> list:
        """What `load` takes: of all ranks together."""
        own = [(list(names), sums.cpu(), self.counts[names]) for names, sums in self.sums.items()]
        return [entry for part in all_gather(own) for entry in part] if world() > 1 else own

    def load(self, state: list) -> None:
        """Go on with what other meters had added; the first rank keeps it."""
        if rank() > 0:
            return
        for names, sums, n in state:
            self._add(tuple(names), sums, n)
        self.loaded = self.count

    @property
    def count(self) -> int:
        """Samples added."""
        return sum(self.counts.values())

    @property
    def speed(self) -> float:
        """Samples a second that all processes added since the meter was made."""
        return world() * (self.count - self.loaded) / (time.perf_counter() - self.began)


def by_chance(top1: float, n: int, num_class: int) -> bool:
    """Whether an accuracy (percent) on n images lies within three deviations of guessing."""
    chance = 1 / num_class
    return top1 / 100 <= chance + 3 * (chance * (1 - chance) / n) ** 0.5


def top1(out: Tensor, target: Tensor) -> Tensor:
    """Share of samples, in percent, whose largest logit is the target's: a 0-dim tensor."""
    return 100 * (out.argmax(1) == target).float().mean()


@torch.no_grad()
def evaluate(
    net: nn.Module, batches, precision: Precision, split: str = "test"
) -> dict[str, float]:
    """Cross-entropy, top-1 and top-5 accuracy (percent) of `net` over all `batches` of (img,
    target, index), of this process and of the others. split: what their names begin with."""
    net.eval()
    meter = Meter()
    for img, target, _ in batches:
        with precision.autocast():
            out = net(img)
        out = out.float()
        five = out.topk(min(5, out.shape[1]), dim=1).indices == target[:, None]
        values = dict(
            loss=F.cross_entropy(out, target),
            top1=top1(out, target),
            top5=100 * five.any(1).float().mean(),
        )
        meter.add({f"{split}_{name}": value for name, value in values.items()}, len(target))
    return meter.read()
