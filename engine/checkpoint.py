"""Checkpoints: written whole, read without running code, and whose weights are in them."""

import argparse
import hashlib
import io
import json
import os
import re
import shlex
import warnings
import zipfile
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from dataset import CLASSES, SIZES
from engine.channels import make_one_channel, one_channel_in
from engine.cli import filled
from engine.find_taps import ensure_taps
from engine.foreign import constructor, library_classes
from engine.outputs import Outputs, forward_logits, notes_of, select_outputs
from engine.state_dicts import (
    average_beside,
    check_weights,
    fitted,
    identify,
    identify_inside,
    load_weights,
    plain_dict,
    read_weights,
)
from network import NETWORKS
from utils import UserError, first_line, seed_everything, shown


def save_checkpoint(state: dict, path: Path) -> None:
    """Write `state` so that `path` is always a whole file: written aside, flushed, renamed."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_file(path, buffer.getbuffer())


def read_checkpoint(path: str | Path) -> dict:
    """The dict in a checkpoint, on the CPU, read without running any code that it may hold.

    A `.safetensors` file gives {'net': tensors, 'meta': ...}. Raises UserError if the file is
    missing, damaged, holds code, or holds no dict.
    """
    path = Path(path)
    try:
        path.stat()
    except (OSError, ValueError) as error:
        known = isinstance(error, (FileNotFoundError, NotADirectoryError))
        raise UserError(f"{path}: no such checkpoint{'' if known else f' ({error})'}") from error
    if path.is_dir():
        raise UserError(
            f"{path} is a folder; give the checkpoint in it, such as model_best.pth.tar"
        )
    if not path.is_file():  # one that never ends, perhaps
        raise UserError(f"{path} is no file that could be read twice: give a copy of it")
    try:
        path.open("rb").close()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    _check_kind(path)
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


def _quoted(code: str) -> str:
    """A word of a command line, in double quotes where that is enough."""
    return shlex.quote(code) if set(code) & set('"$`\\!') else f'"{code}"'


PROGRAMS = {  # what a zip archive of this kind has in it: (its kind, what reads it)
    "constants.pkl": ("TorchScript", "torch.jit.load"),
    "archive_format": ("torch.export", "torch.export.load"),
    "serialized_exported_program.json": ("torch.export", "torch.export.load"),
}


def _check_kind(path: Path) -> None:
    """Raise UserError for a program: TorchScript, torch.export's or ONNX."""
    with open(path, "rb") as file:
        head = file.read(3)
    if path.suffix == ".onnx" or (head[:1] == b"\x08" and head[2:] == b"\x12"):
        raise UserError(
            f"{path} is an ONNX graph, in which weights do not keep their names: give the "
            "checkpoint that it was exported from"
        )
    names = set()
    if head[:2] == b"PK":
        with suppress(Exception), zipfile.ZipFile(path) as archive:  # broken: said when it is read
            names = {part for x in archive.namelist() for part in (x, x.partition("/")[2])}
    found = [kind for mark, kind in PROGRAMS.items() if mark in names]
    scripted = any(name.startswith("code/") for name in names)
    if found and (scripted or found[0][0] != "TorchScript"):
        save = f"import torch; torch.save({found[0][1]}({str(path)!r}).state_dict"
        save += "()" if found[0][0] == "TorchScript" else ""
        save += f", {path.stem + '.converted.pth'!r})"
        raise UserError(
            f"{path} is a program ({found[0][0]}), and reading it may run code. If you trust it, "
            f"take its weights out once: python -c {_quoted(save)}"
        )


UNPACKED = 4  # times its size that a file may unpack to; torch does not compress


def _check_unpacked(path: Path) -> None:
    """Raise UserError if the records of a zip archive say that they unpack to far more than the
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


AUXILIARY = re.compile(r"(.*\.)?(aux[12]|AuxLogits)\.")  # classifiers for training alone


@dataclass
class Weights:
    """A network's name, its weights (None: fresh ones) and what its checkpoint knows of the data.

    pretrained: with its library's weights; taps: stages named by hand; epoch: how many it was
    trained for, as its file says; notes: lines about it; key_flag: the flag that chooses among the
    networks of a file; outputs: which of its outputs are the dataset's classes, None: all;
    channels: of the images that a network without a file takes, None: as it is made; make: what
    `constructor` gives for the name. Raises UserError if there is no such network.
    """

    name: str
    state: dict | None = None
    meta: dict = field(default_factory=dict)
    path: str | None = None
    pretrained: bool = False
    taps: tuple[str, ...] | None = None
    epoch: int = 0
    notes: list[str] = field(default_factory=list)
    key_flag: str | None = None
    outputs: Outputs | None = None
    channels: int | None = None

    def __post_init__(self):
        auxiliary = any(AUXILIARY.match(key) for key in self.state or {})
        self.make = constructor(self.name, auxiliary)

    def classes(self, num_class: int, img_size: int) -> tuple[int, list[str] | None]:
        """How many classes its weights know, and their names, where that is known; `num_class` of
        fresh weights."""
        if self.state is None:
            count, names = library_classes(self.name) if self.pretrained else (None, None)
            return num_class if count is None else count, names
        names = self.meta.get("classes")
        names = names if isinstance(names, (list, tuple)) else None
        if names or "num_class" in self.meta:
            return self.meta.get("num_class") or len(names), names and list(names)
        own = self.make(num_class, img_size, False).state_dict()
        state, _ = fitted(self.state, own, self.path, self.key_flag)
        counts = {
            len(state[key])
            for key, x in own.items()
            if x.ndim and len(x) == num_class and key in state and state[key].ndim == x.ndim
            if state[key].shape != x.shape and state[key].shape[1:] == x.shape[1:]
        }
        return (counts.pop() if len(counts) == 1 else num_class), None

    def load(self, num_class: int, img_size: int) -> nn.Module:
        """The network as it is, its weights loaded, its outputs those of `outputs`."""
        outputs = self.outputs or Outputs(num_class)
        net = self.make(outputs.count, img_size, self.pretrained)
        lines = []
        if self.channels == 1 if self.state is None else one_channel_in(self.state, net):
            make_one_channel(net, self.name)
        if self.state is not None:
            lines = load_weights(net, self.state, self.path, self.name, self.key_flag)
        if outputs.index is not None:
            where = outputs.index, outputs.count, img_size
            select_outputs(net, self.name, *where, outputs.in_classifier)
        self.say(lines, [outputs.note] * bool(outputs.note))
        return net

    def say(self, *lines: list[str]) -> None:
        """Add what is not yet among the notes."""
        new = [line for part in lines for line in part if line not in self.notes]
        self.notes = [*self.notes, *new]  # copies have their own

    def build(self, num_class: int, seed: int, img_size: int) -> nn.Module:
        """The network, frozen, its weights loaded, its feature maps found."""
        seed_everything(seed)
        net = self.load(num_class, img_size).requires_grad_(False)
        if self.state is not None:
            check_weights(net, self.path)
        count = self.outputs.shown if self.outputs else num_class
        if self.outputs and not self.outputs.needed and self.name not in NETWORKS:
            try:
                forward_logits(net, self.name, count, img_size)
            except UserError:  # a backbone: or the dry pass says what is wrong
                count, self.outputs = None, replace(self.outputs, answers=False)
                self.say([f"{self.name} has no logits; only its feature maps are used"])
        self.say(ensure_taps(net, self.name, count, img_size, self.taps), notes_of(net))
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
        classes=lambda x: isinstance(x, dict) or _are_names(x, meta.get("num_class")),  # detectors
        img_size=lambda x: type(x) is int and low <= x <= high,
        mean=lambda x: _three(x) and meta.get("std") is not None,
        std=lambda x: _three(x) and min(x) > 0,
        fit=lambda x: x in ("crop", "squash"),
    )
    return {key: value for key, value in meta.items() if value is not None}


def check_meta(meta: dict, path: str, **tests) -> None:
    """Raises UserError if a value that is there does not pass the test of its name."""
    for key, fits in tests.items():
        if meta.get(key) is not None and not fits(meta[key]):
            raise UserError(f"{path} is damaged: its {key} cannot be {shown(meta[key])}")


def _is_name(x) -> bool:
    try:
        return isinstance(x, str) and len(x) < 4096 and bool(filled(x))
    except argparse.ArgumentTypeError:
        return False


def _are_names(x, num_class: int | None) -> bool:
    """Whether these are the names of so many classes: a folder's may hold anything."""
    fine = isinstance(x, (list, tuple)) and num_class in (None, len(x))
    return fine and all(type(name) is str for name in x)


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
    key: str | None = None,
    key_flag: str | None = None,
):
    """The network that `--{flag} name` and the checkpoint at `path` agree on, as a `kind`.

    key: of `--{key_flag}`, the entry of the file that holds the weights. Raises UserError if
    they do not agree, or where neither says which network it is.
    """
    if path is None:
        if name is None:
            raise UserError(f"--{flag} or --{file_flag} is needed")
        if key is not None:
            raise UserError(
                f"--{key_flag} {key}: expected an entry of a checkpoint, but no checkpoint is given"
            )
        return kind(name, pretrained=pretrained, taps=taps)
    if pretrained:
        raise UserError(
            f"--{file_flag} {path} already gives the weights; leave out the pretrained flag"
        )
    checkpoint = read_checkpoint(path)
    state = read_weights(checkpoint, path, key, key_flag)
    meta, notes = read_meta(checkpoint, path), []
    if not meta and name is None:
        fits, state, notes = identify_inside(state, path, key_flag)
        meta = dict(network=fits[0], num_class=fits[1]) if fits else {}
    elif not meta:
        fits = identify(state)
        meta = dict(network=fits[0], num_class=fits[1]) if fits else {}
    elif key:  # whose network the file may not name
        fits = identify(state)
        meta |= dict(network=fits[0] if fits else None)
    average = None if key else average_beside(checkpoint)
    if average:
        takes = f": --{key_flag} {average} takes it" if key_flag else ""
        line = f"{path} also holds {average}, an average of the weights, which is not taken{takes}"
        notes = [line, *notes]
    known = meta.get("network")
    if name is None and known is None:
        raise UserError(f"{path} does not say which network it holds; give --{flag}")
    if name is None and ".py:" in known:
        # a checkpoint must not choose which code is run
        own = shlex.quote(shown(known, 300))
        raise UserError(f"{path} holds a network from your own file; give --{flag} {own}")
    if known not in (None, name or known) and ".py:" not in name:
        raise UserError(f"--{flag} {name} contradicts {path}, which holds a {shown(known)}")
    _check_simkd(name or known, state, path)
    epoch = checkpoint.get("epoch")
    epoch = epoch if type(epoch) is int and 0 <= epoch < 2**53 else 0
    found = kind(name or known, state, meta, path, taps=taps, epoch=epoch)
    found.notes, found.key_flag = notes, key_flag
    return found


def _check_simkd(name: str, state: dict[str, Tensor], path: str) -> None:
    """Raises UserError if the widths in a Reusing's name are not those of its weights: a name
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
