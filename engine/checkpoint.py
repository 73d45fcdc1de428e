"""Checkpoints: written whole, read without running code, and whose weights are in them."""

import argparse
import functools
import hashlib
import io
import json
import os
import re
import shlex
import warnings
import zipfile
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from dataset import CLASSES, SIZES
from engine.cli import filled
from engine.find_taps import ensure_taps
from engine.foreign import build, constructor
from network import NETWORKS
from utils import UserError, first_line, seed_everything, shown


def save_checkpoint(state: dict, path: Path) -> None:
    """Write `state` so that `path` is always a whole file: written aside, flushed, renamed."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_file(path, buffer.getbuffer())


def read_checkpoint(path: str | Path) -> dict:
    """The dict in a checkpoint, on the CPU, read without running any code that it may hold.

    A `.safetensors` file gives {'net': tensors, 'meta': ...}. Raises UserError where the file is
    missing, damaged, holds code, or holds no dict.
    """
    path = Path(path)
    try:
        path.stat()
    except (OSError, ValueError) as error:
        known = isinstance(error, (FileNotFoundError, NotADirectoryError))
        raise UserError(f"{path}: no such checkpoint{'' if known else f' ({error})'}") from error
    if path.is_dir():
        raise UserError(f"{path} is a folder: name the checkpoint in it, like model_best.pth.tar")
    if not path.is_file():  # one that never ends, perhaps
        raise UserError(f"{path} is no file that could be read twice: give a copy of it")
    try:
        path.open("rb").close()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    _check_unpacked(path)
    try:
        # RepDistiller's *_last.pth keep their flags: a Namespace is a bag of values
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old file formats
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if zipfile.is_zipfile(path):  # torch does not look at the checksums
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged:
                raise ValueError(f"wrong checksum of {damaged}")
    except Exception as error:  # torch raises nearly anything on a broken or unsafe file
        unsafe = r"Unsupported (?:global|class|operand|operator)[^\n]*?([\w.]+\.\w+)"
        code = re.search(unsafe, str(error))
        if code:
            convert = (
                f"import torch; c = torch.load({str(path)!r}, map_location='cpu', "
                "weights_only=False); c = c if isinstance(c, dict) else c.state_dict(); "
                "torch.save({'net': c.get('model') or c.get('net') or c.get('state_dict') or c}, "
                f"{path.stem + '.converted.pth'!r})"
            )
            raise UserError(
                f"{path} holds more than tensors ({shown(code[1])}); reading it may run code. If "
                f"you trust it, convert it once: python -c {_quoted(convert)}"
            ) from error
        code = re.search(r"unsupported GLOBAL ([\w.]+) whose module \S+ is blocked", str(error))
        if code:
            raise UserError(
                f"{path} holds code ({shown(code[1])}) that no checkpoint needs; not read: do not "
                "trust it"
            ) from error
        reason = first_line(error).split(". ")[0]
        raise UserError(f"{path} is damaged, cut short, or not a checkpoint ({reason})") from error
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path}: holds a {type(checkpoint).__name__}, not a checkpoint's dict")
    return plain_dict(checkpoint)


def plain_dict(x: dict) -> dict:
    """The dict alone: one that was unpickled may have attributes over its methods."""
    return dict(dict.items(x))


def _quoted(code: str) -> str:
    """A word of a command line, in double quotes where that is enough."""
    return shlex.quote(code) if set(code) & set('"$`\\!') else f'"{code}"'


UNPACKED = 4  # times its size that a file may unpack to; torch does not compress


def _check_unpacked(path: Path) -> None:
    """Raise UserError where the records of a zip archive say that they unpack to far more than the
    file."""
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(record.file_size for record in archive.infolist())
    except Exception:  # no archive, or a broken one: said when it is read
        return
    if size > UNPACKED * path.stat().st_size:
        raise UserError(
            f"{path} is not read: its {path.stat().st_size:,} bytes unpack to {size:,}, which no "
            "checkpoint's do"
        )


def _read_safetensors(path: Path) -> dict:
    try:
        from safetensors import safe_open
    except ImportError:
        raise UserError(f"{path} needs safetensors: pip install safetensors") from None
    try:
        with safe_open(path, framework="pt") as file:
            net = {key: file.get_tensor(key) for key in file.keys()}
            meta = json.loads((file.metadata() or {}).get("meta", "null"))
    except Exception as error:  # SafetensorError, and what a crafted header leads to
        raise UserError(
            f"{path} is damaged, cut short, or not safetensors ({first_line(error)})"
        ) from error
    return dict(net=net, meta=meta)


def sha256(path: str | Path) -> str:
    """Fingerprint of a file."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def write_file(path: Path, data) -> None:
    """All of it or nothing, also when the machine stops: aside, to the disk, then in its place."""
    aside = path.with_name(path.name + ".tmp")
    try:
        with open(aside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        error.filename = error.filename or str(path)
        with suppress(OSError):
            aside.unlink()
        raise
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def to_cpu(x):
    """`x` with every tensor in it on the CPU."""
    if torch.is_tensor(x):
        return x.detach().cpu()
    if isinstance(x, dict):
        return {key: to_cpu(value) for key, value in x.items()}
    return type(x)(map(to_cpu, x)) if isinstance(x, (list, tuple)) else x


def read_weights(checkpoint: dict, path: str = "the checkpoint") -> dict[str, Tensor]:
    """The state dict inside a checkpoint, whatever wrapped it, with this file's key names.

    Understood: our own files, raw state dicts, `{'snet' | 'net' | 'net2' | 'model' | 'state_dict':
    ...}` or any other single dict of tensors, the prefixes of DataParallel and torch.compile, and
    KD-Zoo's names (`res1..3`, `ds`). Raises UserError where there are no tensors.
    """
    for key in ("snet", "net", "net2", "model", "state_dict"):
        if isinstance(checkpoint.get(key), dict):
            checkpoint = checkpoint[key]
            break
    else:
        dicts = [value for value in checkpoint.values() if _only_tensors(value)]
        if len(dicts) == 1:
            (checkpoint,) = dicts
    checkpoint = plain_dict(checkpoint)
    state = {k: v for k, v in checkpoint.items() if isinstance(k, str) and torch.is_tensor(v)}
    if not state:
        found = [shown(key) for key in checkpoint][:10]
        raise UserError(f"{path} holds no weights, only: {', '.join(found) or 'nothing at all'}")
    state = {key: Tensor.detach(x) for key, x in state.items()}  # without attributes of a file's
    odd = [key for key, x in state.items() if x.is_nested or not _stored(x)]
    if odd:
        raise UserError(
            f"{path}: {len(odd)} entries are nested, or larger than what is stored ({few(odd)})"
        )
    for prefix in ("module.", "_orig_mod."):
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    if any(key.startswith("res1.") for key in state):  # KD-Zoo
        state = {
            re.sub(r"^res(\d)", r"layer\1", key).replace(".ds.", ".downsample."): value
            for key, value in state.items()
        }
    return state


def _stored(x: Tensor) -> bool:
    """Whether a tensor has its values in memory: one number can stand for any number of them."""
    if x.layout != torch.strided or x.is_meta:
        return True  # refused when it is loaded
    size = x.numel() * x.element_size()
    return size <= 2**24 or size <= x.untyped_storage().nbytes()


def _only_tensors(value) -> bool:
    if not isinstance(value, dict):
        return False
    value = plain_dict(value)
    return value != {} and all(map(torch.is_tensor, value.values()))


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


def load_weights(net: nn.Module, state: dict[str, Tensor], path: str, name: str) -> None:
    """Load `state` into `net`, wholly or not at all.

    Raises UserError naming what does not fit, and the network that would.
    """
    own = net.state_dict()
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
        fits = identify(state)
        hint = f"; the file fits {fits[0]} with {fits[1]} classes" if fits else ""
        raise UserError(f"{path} is not a {name}: entries {', '.join(wrong)}{hint}")
    net.load_state_dict(state)


def check_weights(net: nn.Module, path: str) -> None:
    """Raises UserError where weights that were loaded from `path`, to train with, are not
    finite."""
    spoilt = [key for key, x in net.state_dict().items() if not x.isfinite().all()]
    if spoilt:
        raise UserError(f"{path}: {len(spoilt)} entries are not finite ({few(spoilt)})")


def _like(x: Tensor, own: Tensor) -> bool:
    """Whether `x` is an ordinary tensor that can stand for `own`."""
    plain = x.layout == torch.strided and not (x.is_meta or x.is_quantized or x.is_complex())
    return plain and (x.is_floating_point() or not own.is_floating_point())


def few(keys: list[str]) -> str:
    return ", ".join(map(shown, keys[:3])) + (", ..." if len(keys) > 3 else "")


@dataclass
class Weights:
    """A network's name, its weights (None: fresh ones) and what its checkpoint knows of the data.

    pretrained: with its library's weights; taps: stages named by hand; epoch: how many it was
    trained for, as its file says; notes: lines about it; make: what `constructor` gives for the
    name. Raises UserError where there is no such network.
    """

    name: str
    state: dict | None = None
    meta: dict = field(default_factory=dict)
    path: str | None = None
    pretrained: bool = False
    taps: tuple[str, ...] | None = None
    epoch: int = 0
    notes: list[str] = field(default_factory=list)

    def __post_init__(self):
        self.make = constructor(self.name)

    def load(self, num_class: int, img_size: int) -> nn.Module:
        """The network as it is, its weights loaded."""
        net = self.make(num_class, img_size, self.pretrained)
        if self.state is not None:
            load_weights(net, self.state, self.path, self.name)
        return net

    def build(self, num_class: int, seed: int, img_size: int) -> nn.Module:
        """The network, frozen, its weights loaded, its feature maps found."""
        seed_everything(seed)
        net = self.load(num_class, img_size).requires_grad_(False)
        if self.state is not None:
            check_weights(net, self.path)
        self.notes = ensure_taps(net, self.name, num_class, img_size, self.taps)
        return net

    def warnings(self, images) -> list[str]:
        """What to say where it was trained with another normalisation than that of `images`."""
        lines = []
        for key in ("mean", "std"):
            own, used = self.meta.get(key), list(getattr(images, key))
            if own not in (None, used):
                lines.append(
                    f"warning: {self.path} was trained with {key} {own}, these images are "
                    f"normalised with {used}"
                )
        return lines


def read_meta(checkpoint: dict, path: str) -> dict:
    """What a checkpoint of ours knows of network and data; {} of other files. Raises UserError
    where it is not what `utils.describe_data` writes."""
    meta = checkpoint.get("meta")
    if not isinstance(meta, dict):
        return {}
    meta = plain_dict(meta)
    low, high = SIZES
    check_meta(
        meta,
        path,
        network=_is_name,
        data_name=_is_name,
        img_root=_is_name,
        num_class=lambda x: type(x) is int and CLASSES[0] <= x <= CLASSES[1],
        img_size=lambda x: type(x) is int and low <= x <= high,
        mean=lambda x: _three(x) and meta.get("std") is not None,
        std=lambda x: _three(x) and min(x) > 0,
    )
    return {key: value for key, value in meta.items() if value is not None}


def check_meta(meta: dict, path: str, **tests) -> None:
    """Raises UserError where a value that is there does not pass the test of its name."""
    for key, fits in tests.items():
        if meta.get(key) is not None and not fits(meta[key]):
            raise UserError(f"{path} is damaged: its {key} cannot be {shown(meta[key])}")


def _is_name(x) -> bool:
    try:
        return isinstance(x, str) and len(x) < 4096 and bool(filled(x))
    except argparse.ArgumentTypeError:
        return False


def _three(values) -> bool:
    """Whether these are three numbers on the scale of pixels, 0 to 1."""
    fine = isinstance(values, (list, tuple)) and len(values) == 3
    return fine and all(type(x) in (int, float) and 0 <= x <= 1 for x in values)


def find_weights(
    name: str | None,
    path: str | None,
    flag: str,
    file_flag: str,
    pretrained=False,
    taps=None,
    kind: type = Weights,
):
    """The network that `--{flag} name` and the checkpoint at `path` agree on, as a `kind`.

    Raises UserError where they do not, or where neither says which network it is.
    """
    if path is None:
        if name is None:
            raise UserError(f"--{flag} or --{file_flag} is needed")
        return kind(name, pretrained=pretrained, taps=taps)
    if pretrained:
        raise UserError(f"--{file_flag} {path} has weights of its own: pretrained contradicts it")
    checkpoint = read_checkpoint(path)
    state, meta = read_weights(checkpoint, path), read_meta(checkpoint, path)
    if not meta:
        fits = identify(state)
        meta = dict(network=fits[0], num_class=fits[1]) if fits else {}
    known = meta.get("network")
    if name is None and known is None:
        raise UserError(f"{path} does not say which network it is: give --{flag}")
    if name is None and ".py:" in known:
        # a checkpoint must not choose which code is run
        own = shlex.quote(shown(known, 300))
        raise UserError(f"{path} holds a network of your own: say so with --{flag} {own}")
    if known not in (None, name or known) and ".py:" not in name:
        raise UserError(f"--{flag} {name} contradicts {path}, which holds a {shown(known)}")
    _check_simkd(name or known, state, path)
    epoch = checkpoint.get("epoch")
    epoch = epoch if type(epoch) is int and 0 <= epoch < 2**53 else 0
    return kind(name or known, state, meta, path, taps=taps, epoch=epoch)


def _check_simkd(name: str, state: dict[str, Tensor], path: str) -> None:
    """Raises UserError where the widths in a Reusing's name are not those of its weights: a name
    must not decide how much memory is taken."""
    if not name.startswith("simkd:"):
        return
    spec = name.rsplit(":", 5)[1:]
    shapes = [
        state[key].shape[:2] if key in state else ()
        for key in ("projector.projector.0.weight", "projector.projector.6.weight")
    ]
    wide = [list(shape) for shape in shapes]
    if all(x.isdecimal() and 0 < len(x) < 6 and int(x) for x in spec):
        s_dim, t_dim, factor = map(int, spec[:3])
        if wide == [[t_dim // factor, s_dim], [t_dim, t_dim // factor]]:
            return
    raise UserError(f"{path} is not a {shown(name)}: its projector has weights {wide}")
