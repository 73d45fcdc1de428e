"""Checkpoints at random: any bytes, cut, flipped, any objects. A value or one line comes of
them."""

import argparse
import contextlib
import functools
import json
import resource
import time
import warnings
from collections import OrderedDict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mistakes import META

import network
import train_base
from detection import train_det
from engine import cli
from engine.checkpoint import check_weights, find_weights
from utils import UserError

pytestmark = pytest.mark.slow


@pytest.fixture
def consume(tmp_path):
    """Read bytes as a checkpoint, as far as a network: a value or a UserError, soon, in little
    room."""
    args = train_base.parse(["--net_name", "resnet8"])
    detection, _ = train_det.parse(["--kd_mode", "none"])

    def read(data: bytes, name: str):
        path = tmp_path / name
        path.write_bytes(data)
        before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        for known in (None, "resnet8"):
            with contextlib.suppress(UserError):
                found = find_weights(known, str(path), "t_name", "t_model")
                recipe = cli.resolve(args, found.name, found.meta)
                if recipe.data_name in ("imagefolder", "imagenet"):
                    cli.load_data(recipe)
                check_weights(found.load(10, 12), found.path)
        with contextlib.suppress(UserError):
            found = train_det.find(None, str(path), "s")
            train_det.resolve(detection, found, None)
        assert time.process_time() - began < 5
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB
        assert sorted(tmp_path.iterdir()) == [path]
        path.unlink()

    return read


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The bytes of a small checkpoint in torch's two formats and as safetensors."""
    safe = pytest.importorskip("safetensors.torch")
    folder = tmp_path_factory.mktemp("small")
    net = {"conv1.weight": torch.ones(2, 3), "fc.weight": torch.ones(10, 4)}
    content = dict(net=net, meta=META, epoch=3, opt=argparse.Namespace(lr=0.1))
    torch.save(content, folder / "new.pth")
    torch.save(content, folder / "old.pth", _use_new_zipfile_serialization=False)
    safe.save_file(net, folder / "x.safetensors", {"meta": json.dumps(META)})
    return {path.name: path.read_bytes() for path in folder.iterdir()}


KINDS = ("new.pth", "old.pth", "x.safetensors")


def test_random_bytes(fuzz, consume):
    starts = (b"", b"PK\x03\x04", b"\x80\x02", b"\x80\x04\x95", (40).to_bytes(8, "little") + b"{")

    @fuzz(150)
    @given(st.sampled_from(starts), st.binary(max_size=200), st.sampled_from(KINDS))
    def check(start, data, name):
        consume(start + data, name)

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_truncations_and_flips(fuzz, consume, small, kind):
    data = small[kind]
    places = st.integers(0, len(data) - 1)
    early = st.integers(0, min(600, len(data) - 1))

    @fuzz(100)
    @given(
        st.lists(st.tuples(places | early, st.integers(1, 255)), max_size=4),
        st.none() | places,
    )
    def check(flips, end):
        changed = bytearray(data)
        for place, bits in flips:
            changed[place] ^= bits
        consume(bytes(changed[:end]), kind)

    check()


NAMES = ["net", "snet", "net2", "model", "state_dict", "meta", *META, "fc.weight", "module.fc.bias"]
TENSORS = st.builds(
    lambda shape, dtype: torch.zeros(shape).to(dtype),
    st.lists(st.integers(0, 12), max_size=3),
    st.sampled_from([torch.float32, torch.float16, torch.int64, torch.bool, torch.complex64]),
)
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["resnet8", "digits", "torchvision/resnet18", "x.py:f", *META.values()])
    | TENSORS
)
PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
KEYS = st.sampled_from(NAMES) | st.text(max_size=4) | st.integers(-3, 3) | st.none()


def test_random_objects(fuzz, consume, tmp_path_factory):
    path = tmp_path_factory.mktemp("objects") / "x.pth"
    nested = st.recursive(
        LEAVES,
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.tuples(inner, inner)
            | st.dictionaries(KEYS, inner, max_size=5)
        ),
        max_leaves=12,
    )
    wrapped = st.fixed_dictionaries(
        dict(net=st.dictionaries(KEYS, TENSORS, max_size=3)),
        optional=dict(
            meta=st.fixed_dictionaries({}, optional=dict.fromkeys(META, LEAVES)) | LEAVES
        ),
    )

    @fuzz(200)
    @given(nested | wrapped)
    def check(content):
        torch.save(content, path)
        consume(path.read_bytes(), "x.pth")

    check()


DETECTOR = dict(network="fasterrcnn_resnet18", min_size=[64], max_size=96, anchor=8, rois=16)
NASTY = st.sampled_from(
    [
        *(True, -1, 0, 1, 10, 2**31, 2**63, 2**64, 10**400, 0.0, 1e308, float("nan"), float("inf")),
        *(
            "",
            "\0",
            "\n",
            "\x1b[31m",
            "\ud800",
            "\udce9",
            "x" * 5000,
            "..",
            "/",
            "/dev/null",
            "a/b.py:f",
        ),
        *("simkd:" * 3000 + "resnet8" + ":1" * 15_000, "simkd:" * 60 + "resnet8" + ":1" * 300),
        *(
            "simkd:resnet8:64:99999:1:1:1",
            f"simkd:resnet8:{'9' * 5000}:1:1:1:1",
            "simkd::1:1:1:1:1",
        ),
        *(
            "timm/resnet18",
            "torchvision/",
            "imagefolder",
            "imagenet",
            "digits",
            "retinanet_resnet50",
        ),
        *([], [[]], {}, [0] * 3, [True] * 3, [10**400] * 3, [0.5, 0.5, "x"], [0.5, 0.5, None]),
        functools.reduce(lambda x, _: [x, x], range(12), 0),
        functools.reduce(lambda x, _: [x], range(900), 0),
        functools.reduce(lambda x, _: {"a": x}, range(900), 0),
    ]
)
DIMS = st.sampled_from([0, 1, 2, 3, 10, 16, 64, 2**20, 2**31, 2**62, 2**63, -1])


def shadowed(x: dict, name: str) -> dict:
    """The same, pickled with an attribute over one of its methods."""
    x = OrderedDict(x)
    setattr(x, name, 3)
    return x


def ripped(x, name: str):
    x = torch.nn.Parameter(x.detach().float(), requires_grad=False)
    setattr(x, name, 3)
    return x


def test_crafted_checkpoints(fuzz, consume, tmp_path_factory):
    """A whole file, of which this or that is something else."""
    path = tmp_path_factory.mktemp("crafted") / "x.pth"
    net = dict(network.build("resnet8", 10).state_dict())
    plain = ("get", "copy", "pop", "update")
    methods = ("detach", "isfinite", "numel", "is_floating_point", "untyped_storage", "copy_")
    small = st.lists(st.sampled_from([0, 1, 2, 10, 64]), max_size=3).map(torch.zeros)
    with warnings.catch_warnings(action="ignore"):
        nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
        quantized = torch.quantize_per_tensor(torch.ones(10), 0.1, 0, torch.qint8)
    tensor = st.one_of(
        small,
        st.builds(lambda n, x: torch.ones(1).expand(n, *x), st.just(10**9), st.just([10**4])),
        st.builds(lambda x, kind: x.to(kind), small, st.sampled_from(KINDS_OF_NUMBERS)),
        st.builds(ripped, small, st.sampled_from(methods)),
        st.just(nested),
        st.sampled_from([torch.ones(10).to_sparse(), torch.zeros(10, device="meta")]),
        st.just(quantized),
        st.just(torch.full((10,), float("nan"))),
    )
    keys = st.sampled_from(["fc.bias", "fc.weight", "conv1.weight", "projector.projector.0.weight"])
    state = st.dictionaries(keys | KEYS, tensor | NASTY, max_size=2).map(lambda x: net | x)
    value = NASTY | LEAVES
    meta = st.dictionaries(st.sampled_from([*META, *DETECTOR]), value, max_size=2)
    known = st.sampled_from([META, META | DETECTOR])
    content = st.builds(
        lambda state, known, meta, more, name: {
            name: state,
            "meta": known | meta,
            **{key: x for key, x in more.items() if key not in ("net", "meta")},
        },
        state | st.builds(shadowed, state, st.sampled_from(plain)),
        known,
        meta,
        st.dictionaries(st.sampled_from(["epoch", "net1", "snet", "x"]), value, max_size=2),
        st.sampled_from(["net", "model", "anything"]),
    )
    content |= st.builds(shadowed, content, st.sampled_from(plain))

    @fuzz(200)
    @given(content)
    def check(content):
        torch.save(content, path)
        consume(path.read_bytes(), "x.pth")

    check()


KINDS_OF_NUMBERS = [
    *(torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.int64, torch.uint16),
    *(torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2),
]


def test_crafted_safetensors(fuzz, consume):
    """A header of any entries over the bytes of a small file."""
    dtypes = "F32 F64 F16 BF16 I64 I32 U8 U16 U64 BOOL F8_E4M3 F8_E5M2 F8_E8M0 F4 C64 X".split()
    names = st.sampled_from(
        ["fc.weight", "fc.bias", "conv1.weight", "a", "", "\x1b[31m", "x" * 999]
    )
    place = st.integers(0, 64) | DIMS
    entry = st.fixed_dictionaries(
        dict(
            dtype=st.sampled_from(dtypes),
            shape=st.lists(DIMS, max_size=4),
            data_offsets=st.tuples(place, place),
        )
    )
    # one that is whole, so that some come through
    whole = st.sampled_from(dtypes).map(
        lambda kind: dict(dtype=kind, shape=[64 // size_of(kind)], data_offsets=(0, 64))
    )
    values = st.dictionaries(st.sampled_from([*META, *DETECTOR]), NASTY | PLAIN, max_size=3)
    text = st.builds(lambda known, x: json.dumps(known | x), st.sampled_from([{}, META]), values)
    text |= st.sampled_from(
        ["[" * 50_000, '{"a":' * 50_000, "9" * 5000, "NaN", "null", "\0", "[1]"]
    )
    meta = st.dictionaries(st.sampled_from(["meta", "format"]), text | NASTY, max_size=2)
    meta |= st.builds(lambda x: dict(meta=x), text)

    @fuzz(200)
    @given(
        st.dictionaries(names, entry, max_size=3) | st.builds(lambda n, x: {n: x}, names, whole),
        meta | NASTY,
        st.integers(-3, 3),
    )
    def check(entries, meta, off):
        try:
            header = json.dumps(dict(entries, __metadata__=meta)).encode()
        except ValueError:  # too many digits for Python
            header = b"{"
        consume((len(header) + off).to_bytes(8, "little") + header + bytes(64), "x.safetensors")

    check()


def size_of(kind: str) -> int:
    """Bytes of a number of safetensors' `kind`."""
    return int("".join(x for x in kind.split("_")[0] if x.isdigit()) or 8) // 8 or 1
