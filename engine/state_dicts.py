"""State dicts: the one in a checkpoint, whatever wrapped it, whose weights it holds, and how it is
loaded."""

import functools
import re
from contextlib import suppress

import torch
from torch import Tensor, nn

from dataset import CLASSES
from engine.foreign import build
from network import NETWORKS
from utils import UserError, shown


def plain_dict(x: dict) -> dict:
    """The dict alone: one that was unpickled may have attributes over its methods."""
    return dict(dict.items(x))


WRAPPERS = ("snet", "net", "net2", "model", "state_dict")  # what the weights are called
AVERAGES = ("ema", "model_ema", "state_dict_ema", "ema_state_dict", "ema_model")
STRIPPED = ("module.", "_orig_mod.")  # of DataParallel and torch.compile


def read_weights(
    checkpoint: dict, path: str = "the checkpoint", key: str | None = None, flag: str | None = None
) -> dict[str, Tensor]:
    """The state dict inside a checkpoint, whatever wrapped it, with this file's key names.

    Understood: our own files, raw state dicts, `{'snet' | 'net' | 'net2' | 'model' | 'state_dict':
    ...}` or any other single dict of tensors, the prefixes of DataParallel and torch.compile, and
    KD-Zoo's names (`res1..3`, `ds`). key: the entry to take instead, also one with dots
    (`ema.module`) or the first part of the weights' own names; the value of `--{flag}`. Raises
    UserError where there are no tensors, no such entry, or several networks and no key.
    """
    checkpoint = _keyed(checkpoint, path, key, flag) if key else _chosen(checkpoint, path, flag)
    state = {k: v for k, v in checkpoint.items() if isinstance(k, str) and torch.is_tensor(v)}
    if not state:
        found = [shown(key) for key in checkpoint][:10]
        raise UserError(f"{path} holds no weights, only {', '.join(found) or 'nothing at all'}")
    state = {key: Tensor.detach(x) for key, x in state.items()}  # without attributes of a file's
    odd = [key for key, x in state.items() if x.is_nested or not _stored(x)]
    if odd:
        raise UserError(
            f"{path}: {len(odd)} entries are nested, or larger than what is stored ({few(odd)})"
        )
    while True:
        prefix = next((p for p in STRIPPED if all(key.startswith(p) for key in state)), None)
        if prefix is None:
            break
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    if any(key.startswith("res1.") for key in state):  # KD-Zoo
        state = {
            re.sub(r"^res(\d)", r"layer\1", key).replace(".ds.", ".downsample."): value
            for key, value in state.items()
        }
    return state


def _chosen(checkpoint: dict, path: str, flag: str | None) -> dict:
    """The dict of a checkpoint that holds the weights. Raises UserError if several may."""
    for _ in range(4):  # one in another
        checkpoint = plain_dict(checkpoint)
        inner = next((checkpoint[k] for k in WRAPPERS if isinstance(checkpoint.get(k), dict)), None)
        if inner is None:
            dicts = {k: v for k, v in checkpoint.items() if isinstance(k, str) and _holds(v)}
            dicts = {k: v for k, v in dicts.items() if k not in AVERAGES} or dicts
            if len(dicts) > 1:
                raise UserError(
                    f"{path} holds the weights of several networks ({few(list(dicts))}): "
                    + _choose(flag)
                )
            inner = next(iter(dicts.values()), None)
        if inner is None:
            break
        checkpoint = inner
    return plain_dict(checkpoint)


def _keyed(checkpoint: dict, path: str, key: str, flag: str | None) -> dict:
    """What a checkpoint has under `key`. Raises UserError if that is nothing with tensors."""
    found, rest = plain_dict(checkpoint), key
    while rest and isinstance(found, dict):
        found = plain_dict(found)
        heads = [k for k in found if isinstance(k, str) and f"{rest}.".startswith(f"{k}.")]
        head = max(heads, key=len, default=None)
        if head is None:
            break
        found, rest = found[head], rest[len(head) + 1 :]
    if not rest and _holds(found):
        return _chosen(found, path, flag)
    with suppress(UserError):
        flat = _chosen(checkpoint, path, flag)
        under = {
            k[len(key) + 1 :]: x
            for k, x in flat.items()
            if isinstance(k, str) and k.startswith(f"{key}.") and torch.is_tensor(x)
        }
        if under:
            return under
    names = [k for k, v in plain_dict(checkpoint).items() if isinstance(k, str) and _holds(v)]
    there = f"there are {few(names, 10)}" if names else "it has no such entries"
    raise UserError(f"--{flag} {key}: {path} has no weights under this name: {there}")


def _holds(value, depth: int = 3) -> bool:
    """Whether a dict holds tensors by name, or one in it does."""
    if not isinstance(value, dict):
        return False
    inside = [x for key, x in dict.items(value) if isinstance(key, str)]
    if any(torch.is_tensor(x) and x.dim() > 1 for x in inside):  # a state, a metric has fewer
        return True
    return depth > 0 and any(_holds(x, depth - 1) for x in inside)


def average_beside(checkpoint: dict) -> str | None:
    """The entry of a checkpoint that holds an average of the weights (EMA), and is not taken."""
    averages = [key for key in AVERAGES if _holds(checkpoint.get(key))]
    others = any(_holds(x) for key, x in checkpoint.items() if key not in AVERAGES)
    return averages[0] if averages and others else None


def _choose(flag: str | None) -> str:
    return f"choose one with --{flag}" if flag else "save only the one to use"


def inner_states(state: dict[str, Tensor], least: int) -> dict[str, dict[str, Tensor]]:
    """{beginning of keys, up to a dot: the entries that have it, without it}, where there are at
    least `least`."""
    found = {}
    for key, x in state.items():
        parts = key.split(".", 6)
        for i in range(1, len(parts)):
            found.setdefault(".".join(parts[:i]) + ".", {})[".".join(parts[i:])] = x
    return {prefix: inner for prefix, inner in found.items() if len(inner) >= least}


def _the_one(prefixes: list[str], path: str, flag: str | None) -> str | None:
    """Of the places in a file where a whole network is, the one to take. Raises UserError if
    there are several."""
    plain = [p for p in prefixes if not any("ema" in part for part in p.split("."))] or prefixes
    if len(plain) > 1:
        names = few([p.removesuffix(".") for p in plain])
        raise UserError(f"{path} holds several networks ({names}): {_choose(flag)}")
    return plain[0] if plain else None


def _left_out(state: dict[str, Tensor], prefix: str, path: str) -> list[str]:
    rest = [key for key in state if not key.startswith(prefix)]
    if not rest:
        return []
    return [f"{path}: the network is {prefix}*; {len(rest)} other entries are ignored: {few(rest)}"]


def fitted(
    state: dict[str, Tensor], own: dict[str, Tensor], path: str, flag: str | None
) -> tuple[dict[str, Tensor], list[str]]:
    """`state` with the key names of a network, whose state dict is `own`: below the prefix, if any,
    under which all of the network is, and nothing else. Returns notes on what is left out, too."""
    wanted = set(_shapes(own))
    if set(_shapes(state)) == wanted:
        return state, []
    inner = inner_states(state, len(wanted) // 2)
    whole = [prefix for prefix, x in inner.items() if set(_shapes(x)) == wanted]
    shapes = _shapes(own)
    alike = [prefix for prefix in whole if _shapes(inner[prefix]) == shapes]
    prefix = _the_one(alike or whole, path, flag)
    if prefix:
        return inner[prefix], _left_out(state, prefix, path)
    # none is whole: the one that has most of it, for the message
    nearest = max(inner.values(), key=lambda x: len(wanted & set(x)), default=state)
    return (nearest if len(wanted & set(nearest)) > len(wanted & set(state)) else state), []


def _stored(x: Tensor) -> bool:
    """Whether a tensor has its values in memory: one number can stand for any number of them."""
    if x.layout != torch.strided or x.is_meta:
        return True  # refused when it is loaded
    size = x.numel() * x.element_size()
    return size <= 2**24 or size <= x.untyped_storage().nbytes()


def identify(state: dict[str, Tensor]) -> tuple[str, int] | None:
    """(name, num_class) of the network whose keys and shapes `state` has, or None."""
    weights = [value for key, value in state.items() if key.endswith("weight") and value.ndim == 2]
    if not weights:
        return None
    num_class = weights[-1].shape[0]  # the classifier is the last matrix
    if not CLASSES[0] <= num_class <= CLASSES[1]:
        return None
    shapes = _shapes(state)
    return next(((n, num_class) for n in NETWORKS if shapes == _shapes_of(n, num_class)), None)


def identify_inside(
    state: dict[str, Tensor], path: str, flag: str | None
) -> tuple[tuple[str, int] | None, dict[str, Tensor], list[str]]:
    """What `identify` says of the whole or of the one network inside, its entries, and notes on
    what is left out."""
    fits = identify(state)
    if fits:
        return fits, state, []
    inner = inner_states(state, 10)
    found = {prefix: identify(x) for prefix, x in inner.items()}
    prefix = _the_one([p for p, fits in found.items() if fits], path, flag)
    if prefix is None:
        return None, state, []
    return found[prefix], inner[prefix], _left_out(state, prefix, path)


def _shapes_of(name: str, num_class: int) -> dict[str, tuple[int, ...]]:
    shapes = _shapes_with_marks(name).items()
    return {k: tuple(num_class if n == MARK else n for n in shape) for k, shape in shapes}


MARK = 99991  # no width of any network: stands for the number of classes


@functools.cache
def _shapes_with_marks(name: str) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return _shapes(build(name, MARK).state_dict())


def _shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shapes that tell networks apart; files older than torch 0.4.1 have none of the
    counters."""
    return {
        key: tuple(value.shape)
        for key, value in state.items()
        if not key.endswith("num_batches_tracked")
    }


def load_weights(
    net: nn.Module, state: dict[str, Tensor], path: str, name: str, flag: str | None = None
) -> list[str]:
    """Load `state` into `net`, wholly or not at all. Returns notes on entries that are left out.

    What precedes all keys of the network is taken away, and entries next to it are left out, where
    the rest is the whole network and nothing else. flag: that chooses between several. Raises
    UserError naming what does not fit, and the network that would.
    """
    own = net.state_dict()
    whole, (state, notes) = state, fitted(state, own, path, flag)
    # see _shapes; nothing reads the counters
    counters = {key: own[key] for key in own if key.endswith("num_batches_tracked")}
    state = counters | state
    missing = [key for key in own if key not in state]
    extra = [key for key in state if key not in own]
    both = [key for key in own if key in state]
    shape = [key for key in both if own[key].shape != state[key].shape]
    kind = [key for key in both if key not in shape and not _like(state[key], own[key])]
    reasons = {
        "missing": missing,
        "unknown": extra,
        "of another shape": shape,
        "of another type": kind,
    }
    wrong = [f"{len(keys)} {what} ({few(keys)})" for what, keys in reasons.items() if keys]
    if wrong:
        fits = identify(state) or identify(whole)
        hint = f"; the file fits {fits[0]} with {fits[1]} classes" if fits else ""
        raise UserError(f"{path} is not a {name}: entries {', '.join(wrong)}{hint}")
    net.load_state_dict(state)
    return notes


def check_weights(net: nn.Module, path: str) -> None:
    """Raises UserError if weights that were loaded from `path`, to train with, are not
    finite."""
    spoilt = [key for key, x in net.state_dict().items() if not x.isfinite().all()]
    if spoilt:
        raise UserError(f"{path}: {len(spoilt)} entries are not finite ({few(spoilt)})")


def _like(x: Tensor, own: Tensor) -> bool:
    """Whether `x` is an ordinary tensor that can stand for `own`."""
    plain = x.layout == torch.strided and not (x.is_meta or x.is_quantized or x.is_complex())
    return plain and (x.is_floating_point() or not own.is_floating_point())


def few(keys: list[str], most: int = 3) -> str:
    return ", ".join(map(shown, keys[:most])) + (", ..." if len(keys) > most else "")
