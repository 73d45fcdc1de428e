"""Every network of the tables, by name; where its feature maps are; hooks that catch them.

    net = build("resnet20", num_class=100)              # net(img) -> logits, and nothing else
    tapped = Tapped(net, want=("stages", "feat"))       # the same network, its feature maps caught
    s = tapped(img)                                     # s.stages, s.feat, s.out

Names follow the CRD benchmark (Tian et al., ICLR 2020), state-dict keys and shapes its public code,
so that public teachers load as they are; KD-Zoo's checkpoints are recognised and mapped.

A *tap* says where a feature is: the dotted path of a module for its output, `path:in` for its input.
Every network carries `net.taps`: `stem` (one path), `stages` and `preacts` (one path per stage, after
and before the stage's last ReLU), `feat` (the input of the classifier) and, where there are any,
`norms` (the last batch norm before each of `preacts`).
"""

import re
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils import UserError, named

# --- the CIFAR ResNets (He et al., CVPR 2016, section 4.2; x4: as in the CRD benchmark) ----------


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm around a shortcut, projected where the shape changes."""

    def __init__(self, in_channels: int, channels: int, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = None
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )
        self.relu2 = nn.ReLU()  # not in place: its input is the pre-activation that hooks catch

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu1(self.bn1(self.conv1(x)))
        return self.relu2(self.bn2(self.conv2(x)) + shortcut)


class CifarResNet(nn.Module):
    """ResNet for 32-pixel images: `depth` = 6n + 2 layers, three stages of n blocks.

    `widths`: channels of the stem and of the three stages. Any image of at least 4 pixels goes
    through: the head averages over what is left of the map.
    """

    def __init__(self, depth: int, widths: tuple[int, int, int, int], num_class: int):
        super().__init__()
        if (depth - 2) % 6:
            raise ValueError(f"depth must be 6n + 2, not {depth}")
        blocks = (depth - 2) // 6
        stem, *widths = widths
        self.conv1 = nn.Conv2d(3, stem, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = self._stage(stem, widths[0], blocks, stride=1)
        self.layer2 = self._stage(widths[0], widths[1], blocks, stride=2)
        self.layer3 = self._stage(widths[1], widths[2], blocks, stride=2)
        self.fc = nn.Linear(widths[2], num_class)
        self.taps = dict(
            stem="relu",
            stages=[f"layer{i}" for i in (1, 2, 3)],
            preacts=[f"layer{i}.{blocks - 1}.relu2:in" for i in (1, 2, 3)],
            feat="fc:in",
            norms=[f"layer{i}.{blocks - 1}.bn2" for i in (1, 2, 3)],
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
        first = BasicBlock(in_channels, channels, stride)
        return nn.Sequential(first, *[BasicBlock(channels, channels) for _ in range(blocks - 1)])

    def forward(self, img: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(img)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


def _resnet(depth: int, widths=(16, 16, 32, 64)):
    return lambda num_class: CifarResNet(depth, widths, num_class)


X4 = (32, 64, 128, 256)

NETWORKS = {
    **{f"resnet{depth}": _resnet(depth) for depth in (8, 14, 20, 32, 44, 56, 110)},
    "resnet8x4": _resnet(8, X4),
    "resnet32x4": _resnet(32, X4),
}


def build(name: str, num_class: int) -> nn.Module:
    """The network `name` with `num_class` outputs and fresh weights from torch's generator.

    Raises UserError where there is no such network, with the names that come near.
    """
    return named(NETWORKS, name, "network")(num_class)


# --- weights from a checkpoint -------------------------------------------------------------------


def read_weights(checkpoint: dict) -> dict[str, Tensor]:
    """The state dict inside a checkpoint, whatever wrapped it, with this file's key names.

    Understood: our own files, raw state dicts, `{'snet' | 'net' | 'net2' | 'model' | 'state_dict': ...}`,
    the `module.` prefix of DataParallel and KD-Zoo's names (`res1..3`, `ds`).
    """
    for key in ("snet", "net", "net2", "model", "state_dict"):
        if isinstance(checkpoint.get(key), dict):
            checkpoint = checkpoint[key]
            break
    state = {k.removeprefix("module."): v for k, v in checkpoint.items() if torch.is_tensor(v)}
    if any(key.startswith("res1.") for key in state):  # KD-Zoo
        state = {
            re.sub(r"^res(\d)", r"layer\1", key).replace(".ds.", ".downsample."): value
            for key, value in state.items()
        }
    return state


def identify(state: dict[str, Tensor]) -> tuple[str, int] | None:
    """(name, num_class) of the network whose keys and shapes `state` has, or None."""
    weights = [value for key, value in state.items() if key.endswith("weight") and value.ndim == 2]
    if not weights:
        return None
    num_class = weights[-1].shape[0]  # the classifier is the last matrix
    shapes = {key: value.shape for key, value in state.items()}
    for name in NETWORKS:
        with torch.device("meta"):
            net = build(name, num_class)
        if shapes == {key: value.shape for key, value in net.state_dict().items()}:
            return name, num_class
    return None


def load_weights(net: nn.Module, state: dict[str, Tensor], path: str, name: str) -> None:
    """Load `state` into `net`, wholly or not at all.

    Raises UserError naming what does not fit, and the network that would.
    """
    own = net.state_dict()
    missing = [key for key in own if key not in state]
    extra = [key for key in state if key not in own]
    shape = [key for key in own if key in state and own[key].shape != state[key].shape]
    wrong = [
        f"{len(keys)} {what} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for what, keys in (("missing", missing), ("unknown", extra), ("of another shape", shape))
        if keys
    ]
    if wrong:
        fits = identify(state)
        hint = f"; the file fits {fits[0]} with {fits[1]} classes" if fits else ""
        raise UserError(f"{path} is not a {name}: entries {', '.join(wrong)}{hint}")
    net.load_state_dict(state)


# --- feature maps --------------------------------------------------------------------------------


@dataclass
class Features:
    """What one call of a tapped network gives; what was not asked for is None or empty.

    stem (B, C, H, W) | stages, preacts: lists of (B, C, H, W), shallow to deep | feat (B, D) |
    out: logits (B, K) | net: the bare network, for a method that calls it again | numbers: which
    stages the lists hold, counted from the deepest (-1).
    """

    out: Tensor
    net: nn.Module
    stem: Tensor | None = None
    stages: list[Tensor] = field(default_factory=list)
    preacts: list[Tensor] = field(default_factory=list)
    feat: Tensor | None = None
    numbers: tuple[int, ...] = ()


class Tapped:
    """A network whose call returns `Features`: logits and the feature maps of `want`.

    `want`: any of 'stem', 'stages', 'preacts', 'feat'; `stages`: which of them, counted from the
    deepest (-1) backwards, None for all. The hooks are registered once and silent except inside a
    call of this object, so the bare network can be used, compiled or attacked at any time.
    """

    def __init__(self, net: nn.Module, want=(), stages: tuple[int, ...] | None = None):
        if not hasattr(net, "taps"):
            raise UserError(f"{type(net).__name__} does not say where its feature maps are (taps)")
        self.net = net
        self._caught = None
        count = len(net.taps["stages"])
        self.numbers = tuple(range(-count, 0)) if stages is None else tuple(stages)
        self._paths = {
            kind: [paths[i] for i in self.numbers] if isinstance(paths, list) else paths
            for kind, paths in net.taps.items()
            if kind in want
        }
        for kind in self._paths.values():
            for path in [kind] if isinstance(kind, str) else kind:
                self._hook(path)

    def _hook(self, path: str) -> None:
        name, _, end = path.partition(":")

        def catch(module, args, output):
            if self._caught is not None:
                self._caught[path] = args[0] if end == "in" else output

        self.net.get_submodule(name).register_forward_hook(catch)

    def __call__(self, img: Tensor) -> Features:
        self._caught = caught = {}
        try:
            out = self.net(img)
        finally:
            self._caught = None
        maps = {
            kind: caught[path] if isinstance(path, str) else [caught[p] for p in path]
            for kind, path in self._paths.items()
        }
        return Features(out, self.net, numbers=self.numbers, **maps)


def align(s_net: nn.Module, t_net: nn.Module, stages: tuple[int, ...] | None) -> tuple[int, ...]:
    """The stages to compare, counted from the deepest (-1), the same for both networks.

    `stages`: 1-based numbers in the student from the shallowest, or negative ones from the deepest;
    None: all that both have. Raises UserError for a stage that one of the networks lacks.
    """
    depth_s, depth_t = len(s_net.taps["stages"]), len(t_net.taps["stages"])
    common = min(depth_s, depth_t)
    if stages is None:
        return tuple(range(-common, 0))
    picked = tuple(i - depth_s - 1 if i > 0 else i for i in stages)
    for number, i in zip(stages, picked):
        if not -common <= i <= -1:
            raise UserError(
                f"--stages: no stage {number}: the student has {depth_s} and the teacher {depth_t}"
            )
    return picked


class Adapter(nn.Module):
    """Makes the student's features comparable with the teacher's where a method needs it.

    `needs`: '' nothing; 'size': the larger map of a pair is average-pooled to the smaller;
    'channels+size': also a learnable 1x1 convolution without bias + batch norm on the student's map
    (a linear layer for a vector) where the widths differ; 'regressor', 'regressor+relu': always the
    CRD benchmark's convolution of the student's map (see `Regressor`). `s`, `t`: features of a dry
    pass, for their shapes. `forward(s, t)` returns both, adapted.
    """

    def __init__(self, needs: str, want: tuple[str, ...], s: Features, t: Features):
        super().__init__()
        self.needs = needs
        self.want = [kind for kind in want if kind != "out"] if needs else []
        self.layers = nn.ModuleDict()
        self.notes = []
        for key, fm_s, fm_t in self._pairs(s, t):
            shapes = f"{_shape(fm_s)} -> {_shape(fm_t)}"
            if needs.startswith("regressor"):
                self.layers[key] = Regressor(fm_s.shape, fm_t.shape, relu=needs.endswith("relu"))
                self.notes.append(f"{key} {shapes}: learnable regressor of the student")
                continue
            if "channels" in needs and fm_s.shape[1] != fm_t.shape[1]:
                self.layers[key] = _project(fm_s, fm_t)
                self.notes.append(f"{key} {shapes}: learnable projection of the student")
            if fm_s.shape[2:] != fm_t.shape[2:]:
                self.notes.append(f"{key} {shapes}: the larger map is pooled")

    def _pairs(self, s: Features, t: Features):
        for kind in self.want:
            maps_s, maps_t = getattr(s, kind), getattr(t, kind)
            if torch.is_tensor(maps_s):
                yield kind, maps_s, maps_t
            else:
                for i, (fm_s, fm_t) in enumerate(zip(maps_s, maps_t)):
                    yield f"{kind}{i}", fm_s, fm_t

    def forward(self, s: Features, t: Features) -> tuple[Features, Features]:
        if not self.notes:
            return s, t
        new_s, new_t = {}, {}
        for kind in self.want:
            maps_s, maps_t = getattr(s, kind), getattr(t, kind)
            if torch.is_tensor(maps_s):
                new_s[kind], new_t[kind] = self._match(kind, maps_s, maps_t)
            else:
                pairs = [
                    self._match(f"{kind}{i}", *pair) for i, pair in enumerate(zip(maps_s, maps_t))
                ]
                new_s[kind], new_t[kind] = ([pair[side] for pair in pairs] for side in (0, 1))
        return replace(s, **new_s), replace(t, **new_t)

    def _match(self, key: str, fm_s: Tensor, fm_t: Tensor) -> tuple[Tensor, Tensor]:
        if "size" in self.needs and fm_s.shape[2:] != fm_t.shape[2:]:
            size = tuple(min(a, b) for a, b in zip(fm_s.shape[2:], fm_t.shape[2:]))
            fm_s, fm_t = (F.adaptive_avg_pool2d(fm, size) for fm in (fm_s, fm_t))
        if key in self.layers:
            fm_s = self.layers[key](fm_s)
        return fm_s, fm_t


class Regressor(nn.Module):
    """The CRD benchmark's way to a teacher's map: one convolution, batch norm, ReLU if `relu`.

    The convolution is 3x3 of stride 2 where the student's map is twice as high, a transposed 4x4 of
    stride 2 where it is half as high, else the valid one that leaves the teacher's size.
    """

    def __init__(self, shape_s: torch.Size, shape_t: torch.Size, relu: bool):
        super().__init__()
        (c_s, h_s, w_s), (c_t, h_t, w_t) = shape_s[1:], shape_t[1:]
        if (h_s, w_s) == (2 * h_t, 2 * w_t):
            self.conv = nn.Conv2d(c_s, c_t, 3, stride=2, padding=1)
        elif (2 * h_s, 2 * w_s) == (h_t, w_t):
            self.conv = nn.ConvTranspose2d(c_s, c_t, 4, stride=2, padding=1)
        elif h_s >= h_t and w_s >= w_t:
            self.conv = nn.Conv2d(c_s, c_t, (1 + h_s - h_t, 1 + w_s - w_t))
        else:
            raise UserError(f"no regressor leads from {h_s}x{w_s} to {h_t}x{w_t}: --adapter size")
        self.bn = nn.BatchNorm2d(c_t)
        self.relu = relu

    def forward(self, fm: Tensor) -> Tensor:
        fm = self.bn(self.conv(fm))
        return F.relu(fm) if self.relu else fm


def _project(fm_s: Tensor, fm_t: Tensor) -> nn.Module:
    if fm_s.ndim == 2:
        return nn.Linear(fm_s.shape[1], fm_t.shape[1])
    conv = nn.Conv2d(fm_s.shape[1], fm_t.shape[1], 1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(conv, nn.BatchNorm2d(fm_t.shape[1]))


def _shape(x: Tensor) -> str:
    return "x".join(str(n) for n in x.shape[1:])


# --- what a network costs ------------------------------------------------------------------------


def count_parameters(module: nn.Module) -> int:
    """Number of parameters, batch-norm scales and shifts included, buffers not."""
    return sum(p.numel() for p in module.parameters())


def count_macs(module: nn.Module, call) -> int:
    """Multiply-adds of the convolutions and linear layers of `module` during `call()`."""
    total = 0

    def add(layer, args, output):
        nonlocal total
        transposed = isinstance(layer, nn.ConvTranspose2d)
        positions = (args[0] if transposed else output).numel() // layer.weight.shape[0]
        total += positions * layer.weight.numel()

    kinds = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
    hooks = [m.register_forward_hook(add) for m in module.modules() if isinstance(m, kinds)]
    try:
        call()
    finally:
        for hook in hooks:
            hook.remove()
    return total
