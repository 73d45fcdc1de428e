"""Which stages are compared, and layers that make the student's maps fit the teacher's."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from network import Features
from utils import UserError


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
    if any(i >= j for i, j in zip(picked, picked[1:])):
        raise UserError(
            f"--stages {','.join(map(str, stages))}: expected stages from the shallowest to the "
            "deepest, each once"
        )
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
    CRD benchmark's convolution of the student's map (see `Regressor`); 'connector': the same where
    widths or sizes differ. `s`, `t`: features of a dry
    pass, for their shapes. `forward(s, t)` returns both, adapted.
    """

    def __init__(self, needs: str, want: tuple[str, ...], s: Features, t: Features):
        super().__init__()
        self.needs = needs
        self.want = [kind for kind in want if kind != "out"] if needs else []
        self.layers = nn.ModuleDict()
        self.notes = []
        for key, fm_s, fm_t in self._pairs(s, t):
            shapes = f"{shape_of(fm_s)} -> {shape_of(fm_t)}"
            if needs == "connector" and fm_s.shape[1:] == fm_t.shape[1:]:
                continue
            if needs.startswith(("regressor", "connector")):
                self.layers[key] = Regressor(fm_s.shape, fm_t.shape, relu=needs.endswith("relu"))
                self.notes.append(f"{key} {shapes}: learnable regressor on the student's map")
                continue
            if "channels" in needs and fm_s.shape[1] != fm_t.shape[1]:
                self.layers[key] = _project(fm_s, fm_t)
                self.notes.append(f"{key} {shapes}: learnable projection of the student's map")
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
            raise UserError(
                f"the regressor cannot map {h_s}x{w_s} to {h_t}x{w_t}; give --adapter channels+size"
            )
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


def shape_of(x: Tensor) -> str:
    return "x".join(str(n) for n in x.shape[1:])


def count_macs(module: nn.Module, call) -> int:
    """Multiply-adds of the convolutions and linear layers of `module` during `call()`."""
    total = 0

    def add(layer, args, output):
        nonlocal total
        if isinstance(layer, nn.MultiheadAttention):  # it calls its linear layers as functions
            width = layer.embed_dim
            total += width * sum(x.numel() for x in args[:3]) + args[0].numel() * width
            return
        transposed = isinstance(layer, nn.ConvTranspose2d)
        positions = (args[0] if transposed else output).numel() // layer.weight.shape[0]
        total += positions * layer.weight.numel()

    kinds = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear, nn.MultiheadAttention)
    hooks = [m.register_forward_hook(add) for m in module.modules() if isinstance(m, kinds)]
    try:
        call()
    finally:
        for hook in hooks:
            hook.remove()
    return total
