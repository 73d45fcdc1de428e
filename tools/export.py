"""Export the network of a checkpoint for other programs: safetensors, ONNX or torch.export.

    python tools/export.py runs/at-c10-r20/model_best.pth.tar --format onnx
    python tools/export.py runs/at-c10-r20/model_best.pth.tar --out student.safetensors

From a distilled checkpoint it exports the student, without adapters. The exported file is checked:
its logits must be equal to those of the checkpoint. Images must be normalised before they enter the
network. Mean and std are printed, and are in the metadata of the file ('meta', JSON), with classes
and image size. `train_kd.py --t_model` and `tools/eval.py` read .safetensors files.
"""

import argparse
import importlib
import inspect
import io
import json
import logging
import os
import re
import sys
import warnings
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import dataset  # noqa: E402
import network  # noqa: E402
from engine import cli, console  # noqa: E402
from engine.channels import bare, channels_of  # noqa: E402
from engine.checkpoint import Weights, find_weights  # noqa: E402
from engine.find_taps import dry_pass  # noqa: E402
from engine.outputs import notes_of  # noqa: E402
from utils import UserError  # noqa: E402

SUFFIXES = {"safetensors": ".safetensors", "onnx": ".onnx", "torch": ".pt2"}
NEEDS = {"safetensors": ["safetensors"], "onnx": ["onnx", "onnxscript"], "torch": []}
SIZES = dict(digits=32, cifar10=32, cifar100=32)  # image sizes, if a checkpoint has none
TOLERANCE = 1e-4


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(prog="export.py", description=__doc__)
    add = parser.add_argument
    checkpoint = dict(type=cli.filled, metavar="CHECKPOINT")
    add("checkpoint", **checkpoint, help="checkpoint or .safetensors file")
    add("--format", choices=SUFFIXES, help="file format (default: by the suffix of --out)")
    suffixes = ", ".join(SUFFIXES.values())
    add(
        "--out",
        type=cli.filled,
        metavar="FILE",
        help=f"file to write: {suffixes} (default: in the folder of CHECKPOINT)",
    )
    add("--force", action="store_true", help="overwrite an existing file")
    add(
        "--net",
        type=cli.filled,
        metavar="NAME",
        help="network, if the checkpoint does not name it",
    )
    add(
        "--key",
        type=cli.filled,
        metavar="KEY",
        help="entry of the checkpoint that holds the weights",
    )
    add(
        "--num_class",
        type=cli.number(int, *dataset.CLASSES),
        metavar="N",
        help="number of classes, if the checkpoint does not have it",
    )
    size = cli.number(int, 4, dataset.SIZES[1])
    add(
        "--img_size",
        type=size,
        metavar="N",
        help="image size, NxN pixels, if the checkpoint does not have it",
    )
    add(
        "--batch",
        type=cli.number(int, 1),
        metavar="N",
        help="for onnx and torch: fix the batch size to N images (default: any batch size)",
    )
    return parser.parse_args(argv)


def target(args: argparse.Namespace) -> tuple[str, Path]:
    """(format, file to write). Raises UserError if flags, file or packages do not fit."""
    kinds = {suffix: kind for kind, suffix in SUFFIXES.items()}
    if args.out is None:
        if args.format is None:
            raise UserError(
                f"--format is missing; give one of {', '.join(SUFFIXES)}, or --out FILE with a "
                "suffix"
            )
        path = Path(args.checkpoint)
        if not path.name:
            raise UserError(f"{path} is a folder; give the checkpoint file in it")
        stem = re.sub(r"(\.(pth|pt|tar|safetensors))+$", "", path.name)
        out = path.with_name(stem + SUFFIXES[args.format])
    else:
        out = Path(args.out)
    kind = kinds.get(out.suffix)
    if kind is None or args.format not in (None, kind):
        wanted = SUFFIXES[args.format] if args.format else ", ".join(kinds)
        raise UserError(f"--out {out}: expected a name that ends in {wanted}")
    if args.batch and kind == "safetensors":
        raise UserError(
            f"--batch {args.batch} has no effect: a .safetensors file has weights for any batch "
            "size; leave it out"
        )
    cli.writable_file(out, args.force)
    lacking = [name for name in NEEDS[kind] if not _installed(name)]
    if lacking:
        raise UserError(
            f"--format {kind} needs {' and '.join(lacking)}; run pip install {' '.join(lacking)}"
        )
    return kind, out


def _installed(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


def agreed(args: argparse.Namespace, found: Weights, flag: str) -> int:
    """The number that the flag or the checkpoint gives. Raises UserError if they differ, or if none
    gives it."""
    given, known = getattr(args, flag), found.meta.get(flag)
    if known is None and flag == "img_size":
        known = SIZES.get(found.meta.get("data_name"))
    if given is None and known is None:
        raise UserError(f"--{flag} is required, since {found.path} does not contain it")
    if None not in (given, known) and given != known:
        raise UserError(
            f"--{flag} {given} contradicts {found.path}, which has {known}; leave the flag out"
        )
    return known if given is None else given


def build(found: Weights, num_class: int, size: int) -> nn.Module:
    """The bare network with its weights, in eval mode."""
    net = found.load(num_class, size)
    dry_pass(net, found.name, num_class, size)
    return bare(net).eval().requires_grad_(False)


# --- formats: a function that makes the bytes of a file, and one that reads a file and returns a
# function from images to logits -------------------------------------------------------------------


def to_safetensors(net: nn.Module, meta: str, size: int, batch: int | None) -> bytes:
    from safetensors.torch import save

    # safetensors rejects tied weights, so each tensor is copied
    state = {
        key: x.clone(memory_format=torch.contiguous_format) for key, x in net.state_dict().items()
    }
    return save(state, dict(meta=meta))


def to_onnx(net: nn.Module, meta: str, size: int, batch: int | None) -> bytes:
    import onnx

    names = dict(input_names=["img"], output_names=["logits"])
    if inspect.signature(torch.onnx.export).parameters["dynamo"].default:
        # no dynamic_shapes here: the exported program already has them
        graph = torch.onnx.export(trace(net, size, batch), dynamo=True, verbose=False, **names)
        proto = graph.model_proto
    else:  # torch before 2.9: its dynamo exporter does not work with current onnxscript
        file, img = io.BytesIO(), torch.zeros(batch or 2, channels_of(net), size, size)
        axes = None if batch else {"img": {0: "batch"}, "logits": {0: "batch"}}
        torch.onnx.export(net, (img,), file, dynamo=False, dynamic_axes=axes, **names)
        proto = onnx.load_from_string(file.getvalue())
    onnx.helper.set_model_props(proto, dict(meta=meta))
    return proto.SerializeToString()


def to_torch(net: nn.Module, meta: str, size: int, batch: int | None) -> bytes:
    file = io.BytesIO()
    torch.export.save(trace(net, size, batch), file, extra_files=dict(meta=meta))
    return file.getvalue()


def trace(net: nn.Module, size: int, batch: int | None) -> torch.export.ExportedProgram:
    """`net` as a graph, for `batch` images; None: for any number of images."""
    # torch.export treats a batch of 1 as a constant
    img = torch.zeros(batch or 2, channels_of(net), size, size)
    shapes = None if batch else ({0: torch.export.Dim("batch")},)
    program = torch.export.export(net, (img,), dynamic_shapes=shapes, strict=False)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # it contains paths of this machine
    return program


def from_safetensors(path: Path, found: Weights, num_class: int, size: int):
    return build(find_weights(found.name, str(path), "net", "out"), num_class, size)


def from_onnx(path: Path, *_):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda img: torch.from_numpy(session.run(None, {"img": img.numpy()})[0])


def from_torch(path: Path, *_):
    return torch.export.load(path).module()


FORMATS = {
    "safetensors": (to_safetensors, from_safetensors),
    "onnx": (to_onnx, from_onnx),
    "torch": (to_torch, from_torch),
}


@contextmanager
def quiet():
    """Hide warnings and progress of the exporters in the block. Errors are still raised."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()) as text:
            warnings.simplefilter("ignore")
            with redirect_stderr(text):  # the exporter prints the graph there if it fails
                yield
    finally:
        logging.disable(before)


@torch.no_grad()
def difference(net: nn.Module, other, img: Tensor) -> float:
    """Largest difference between the logits of two networks, relative to the largest logit if that
    is above 1."""
    want, got = net(img), other(img)
    if want.shape != got.shape:
        return float("inf")
    return ((got - want).abs().max() / want.abs().max().clamp(min=1)).item()


@console.command
def main(argv: list[str] | None = None) -> dict:
    args = parse(argv)
    kind, out = target(args)
    what = args.net, args.checkpoint, "net", "CHECKPOINT"
    found = find_weights(*what, key=args.key, key_flag="key")
    num_class, size = agreed(args, found, "num_class"), agreed(args, found, "img_size")
    net = build(found, num_class, size)
    for line in [*found.notes, *notes_of(net)]:
        print(line)
    # without img_root, which is a path on this machine
    meta = {key: value for key, value in found.meta.items() if key != "img_root"}
    meta |= dict(network=found.name, num_class=num_class, img_size=size)
    write, read = FORMATS[kind]
    checked = kind != "onnx" or _installed("onnxruntime")
    aside = out.with_name(f"{os.getpid()}{out.suffix}")  # a short name: `out` may be the longest
    # not the batch size that the graph was made with, if it accepts any
    shape = args.batch or 5, channels_of(net), size, size
    img = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    try:
        with quiet():
            aside.write_bytes(write(net, json.dumps(meta), size, args.batch))
            off = difference(net, read(aside, found, num_class, size), img) if checked else None
        if checked and not off <= TOLERANCE:  # also true for nan
            raise UserError(
                f"{out} was not written: its logits differ from those of the checkpoint by "
                f"{off:.1e}, expected at most {TOLERANCE:g}; try another --format"
            )
        os.replace(aside, out)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror or error})") from error
    except Exception as error:  # exporters raise many kinds of errors
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        hint = "; give --batch N to fix the batch size" if "batch" in reason else ""
        raise UserError(f"{found.name} cannot be exported as {kind} ({reason}){hint}") from error
    finally:
        aside.unlink(missing_ok=True)
    parameters, size_kb = network.count_parameters(net), out.stat().st_size / 1000
    print(f"{out}: {found.name}, {num_class} classes, {parameters:,} parameters, {size_kb:,.0f} kB")
    if {"mean", "std"} <= set(meta):
        normal = f"pixels in 0..1, minus mean {meta['mean']}, divided by std {meta['std']}"
    else:
        normal = f"normalised as in training ({found.path} does not contain mean and std)"
    print(f"input: float32 ({args.batch or 'any number'}, {shape[1]}, {size}, {size}): {normal}")
    if checked:
        print(f"checked: the logits of {len(img)} random images differ by {off:.1e}")
    else:
        print("not checked, since onnxruntime is not installed; run pip install onnxruntime")
    return dict(path=str(out), difference=off)


if __name__ == "__main__":
    main()
