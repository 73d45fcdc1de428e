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

import functools
import importlib.util
import math
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils import SIZES, UserError, first_line, named, read_checkpoint, seed_everything

# --- what the families share ---------------------------------------------------------------------


def _conv_bn(in_channels: int, channels: int, kernel: int, stride=1, groups=1, bias=False):
    """A convolution that keeps the size (but for its stride), and the batch norm after it."""
    padding = kernel // 2
    conv = nn.Conv2d(in_channels, channels, kernel, stride, padding, groups=groups, bias=bias)
    return conv, nn.BatchNorm2d(channels)


def _number(block: nn.Module, *layers) -> None:
    """Give `block` conv1, bn1, conv2, bn2, ... from the arguments of `_conv_bn` for each pair."""
    for i, layer in enumerate(layers, 1):
        conv, bn = _conv_bn(*layer)
        block.add_module(f"conv{i}", conv)
        block.add_module(f"bn{i}", bn)


def _layer(block: nn.Module, i: int, x: Tensor) -> Tensor:
    """Convolution and batch norm number `i` of a `block` that `_number` made."""
    return getattr(block, f"bn{i}")(getattr(block, f"conv{i}")(x))


def _stage(block, in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    """`blocks` blocks, of which the first changes width and size."""
    first = block(in_channels, channels, stride)
    return nn.Sequential(first, *[block(channels, channels, 1) for _ in range(blocks - 1)])


def _pool(x: Tensor) -> Tensor:
    """The pooled feature (B, C) of a map, whatever its size."""
    return F.adaptive_avg_pool2d(x, 1).flatten(1)


def _shuffle(x: Tensor, groups: int) -> Tensor:
    """The channels of `groups` groups, taken from each in turn; a map stays channels_last."""
    x = x.permute(0, 2, 3, 1).unflatten(-1, (groups, -1))
    return x.transpose(-1, -2).flatten(-2).permute(0, 3, 1, 2)


def _init(net: nn.Module, linear_std: float | None = None) -> None:
    """Convolutions from N(0, 2 / fan-out), their biases 0; with `linear_std` the classifier from
    N(0, linear_std^2), its bias 0. The rest stays as torch makes it."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif linear_std is None or not isinstance(module, nn.Linear):
            continue
        else:
            nn.init.normal_(module.weight, std=linear_std)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


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
            self.downsample = nn.Sequential(*_conv_bn(in_channels, channels, 1, stride))
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
        self.layer1 = _stage(BasicBlock, stem, widths[0], blocks, stride=1)
        self.layer2 = _stage(BasicBlock, widths[0], widths[1], blocks, stride=2)
        self.layer3 = _stage(BasicBlock, widths[1], widths[2], blocks, stride=2)
        self.fc = nn.Linear(widths[2], num_class)
        self.taps = dict(
            stem="relu",
            stages=[f"layer{i}" for i in (1, 2, 3)],
            preacts=[f"layer{i}.{blocks - 1}.relu2:in" for i in (1, 2, 3)],
            feat="fc:in",
            norms=[f"layer{i}.{blocks - 1}.bn2" for i in (1, 2, 3)],
        )
        _init(self)

    def forward(self, img: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(img)))
        return self.fc(_pool(self.layer3(self.layer2(self.layer1(x)))))


# --- ResNet (He et al., CVPR 2016, table 1) with the stem of the CIFAR ResNets -------------------


class ResNetBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut, or with `bottleneck` 1x1, 3x3 and 1x1, of which the
    first two have a quarter of the `channels`."""

    def __init__(self, in_channels: int, channels: int, stride: int, bottleneck: bool):
        super().__init__()
        if bottleneck:
            mid = channels // 4
            layers = (in_channels, mid, 1), (mid, mid, 3, stride), (mid, channels, 1)
        else:
            layers = (in_channels, channels, 3, stride), (channels, channels, 3)
        _number(self, *layers)
        self.count = len(layers)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(*_conv_bn(in_channels, channels, 1, stride))
        self.relu = nn.ReLU()  # not in place: its input is the pre-activation

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.shortcut(x)
        for i in range(1, self.count):
            x = F.relu(_layer(self, i, x), inplace=True)
        return self.relu(_layer(self, self.count, x) + shortcut)


class ResNet(nn.Module):
    """ResNet-18 to -152 with a 3x3 stem of stride 1 and no max pool, in four stages of `blocks`.

    As the CRD benchmark and MDistiller have it for CIFAR; the keys are not torchvision's.
    """

    def __init__(self, blocks: tuple[int, int, int, int], bottleneck: bool, num_class: int):
        super().__init__()
        block = partial(ResNetBlock, bottleneck=bottleneck)
        widths = [64, *(width * (4 if bottleneck else 1) for width in (64, 128, 256, 512))]
        self.conv1, self.bn1 = _conv_bn(3, 64, 3)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _stage(block, widths[0], widths[1], blocks[0], stride=1)
        self.layer2 = _stage(block, widths[1], widths[2], blocks[1], stride=2)
        self.layer3 = _stage(block, widths[2], widths[3], blocks[2], stride=2)
        self.layer4 = _stage(block, widths[3], widths[4], blocks[3], stride=2)
        self.linear = nn.Linear(widths[4], num_class)
        last = [f"layer{i}.{n - 1}" for i, n in enumerate(blocks, 1)]
        self.taps = dict(
            stem="relu",
            stages=[f"layer{i}" for i in (1, 2, 3, 4)],
            preacts=[f"{path}.relu:in" for path in last],
            feat="linear:in",
            norms=[f"{path}.bn{3 if bottleneck else 2}" for path in last],
        )
        _init(self)

    def forward(self, img: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(img)))
        return self.linear(_pool(self.layer4(self.layer3(self.layer2(self.layer1(x))))))


# --- Wide ResNet (Zagoruyko, Komodakis, BMVC 2016) -----------------------------------------------


class WideBlock(nn.Module):
    """Batch norm and ReLU before each of two 3x3 convolutions, nothing after the sum.

    Where the width changes, the shortcut is a 1x1 convolution of the activated input.
    """

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU()  # not in place: a group's pre-activation is the next one's first bn1
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.convShortcut = None
        if in_channels != channels:
            self.convShortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = self.relu1(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(active)
        return self.conv2(self.relu2(self.bn2(self.conv1(active)))) + shortcut


class WideResNet(nn.Module):
    """WRN-`depth`-`width`: three groups of (depth - 4) / 6 blocks, `width` times as wide as the
    CIFAR ResNets.

    A stage is a group's raw sum, its pre-activation what the next batch norm makes of it: the first
    one of the next group, caught where it runs anyway.
    """

    def __init__(self, depth: int, width: int, num_class: int):
        super().__init__()
        if (depth - 4) % 6:
            raise ValueError(f"depth must be 6n + 4, not {depth}")
        blocks = (depth - 4) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.block1 = self._group(16, 16 * width, blocks, stride=1)
        self.block2 = self._group(16 * width, 32 * width, blocks, stride=2)
        self.block3 = self._group(32 * width, 64 * width, blocks, stride=2)
        self.bn1 = nn.BatchNorm2d(64 * width)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(64 * width, num_class)
        norms = ["block2.layer.0.bn1", "block3.layer.0.bn1", "bn1"]
        self.taps = dict(
            stem="conv1",
            stages=["block1", "block2", "block3"],
            preacts=norms,
            last="relu",
            feat="fc:in",
            norms=norms,
        )
        _init(self)
        nn.init.zeros_(self.fc.bias)

    @staticmethod
    def _group(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Module:
        group = nn.Sequential()
        group.add_module("layer", _stage(WideBlock, in_channels, channels, blocks, stride))
        return group

    def forward(self, img: Tensor) -> Tensor:
        x = self.block3(self.block2(self.block1(self.conv1(img))))
        return self.fc(_pool(self.relu(self.bn1(x))))


# --- VGG (Simonyan, Zisserman, ICLR 2015) with batch norm and a small head, as in the CRD benchmark


class VGG(nn.Module):
    """Five blocks of 3x3 convolutions, a max pool between them; `blocks`: convolutions in each.

    The first block is the stem, the others the stages, each before its pool. Images of 32 pixels or
    fewer are not pooled a fourth time: their last two stages are of one size.
    """

    def __init__(self, blocks: tuple[int, int, int, int, int], num_class: int):
        super().__init__()
        in_channels = 3
        for i, (count, channels) in enumerate(zip(blocks, (64, 128, 256, 512, 512))):
            layers = []
            for _ in range(count):
                layers += [*_conv_bn(in_channels, channels, 3, bias=True), nn.ReLU(inplace=True)]
                in_channels = channels
            layers[-1].inplace = False  # its input is the pre-activation
            self.add_module(f"block{i}", nn.Sequential(*layers))
        self.classifier = nn.Linear(in_channels, num_class)
        last = {i: 3 * blocks[i] - 1 for i in (1, 2, 3, 4)}  # the place of a block's last ReLU
        self.taps = dict(
            stem="block0",
            stages=[f"block{i}" for i in last],
            preacts=[f"block{i}.{place}:in" for i, place in last.items()],
            feat="classifier:in",
            norms=[f"block{i}.{place - 1}" for i, place in last.items()],
        )
        _init(self, linear_std=0.01)

    def forward(self, img: Tensor) -> Tensor:
        x = self.block1(F.max_pool2d(self.block0(img), 2))
        x = self.block2(F.max_pool2d(x, 2))
        x = self.block3(F.max_pool2d(x, 2))
        x = self.block4(F.max_pool2d(x, 2) if img.shape[-1] > 32 else x)
        return self.classifier(_pool(x))


# --- MobileNetV1 (Howard et al., 2017) for ImageNet, as in MDistiller ----------------------------


class MobileNetV1(nn.Module):
    """Thirteen depthwise separable convolutions after a stem of stride 2; 1/32 of the size is left.

    The stages end where the size is about to fall; the stem counts as the first convolution alone.
    """

    def __init__(self, num_class: int):
        super().__init__()
        widths = (32, 64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024)
        self.model = nn.Sequential(nn.Sequential(*_conv_bn(3, 32, 3, 2), nn.ReLU(inplace=True)))
        for i, (in_channels, channels) in enumerate(zip(widths, widths[1:]), 1):
            depthwise = _conv_bn(in_channels, in_channels, 3, 1 + (i in (2, 4, 6, 12)), in_channels)
            pointwise = _conv_bn(in_channels, channels, 1)
            # the last one not in place: its input is the pre-activation
            layers = *depthwise, nn.ReLU(inplace=True), *pointwise, nn.ReLU()
            self.model.append(nn.Sequential(*layers))
        self.fc = nn.Linear(1024, num_class)
        ends = (3, 5, 11, 13)
        self.taps = dict(
            stem="model.0",
            stages=[f"model.{i}" for i in ends],
            preacts=[f"model.{i}.5:in" for i in ends],
            feat="fc:in",
            norms=[f"model.{i}.4" for i in ends],
        )

    def forward(self, img: Tensor) -> Tensor:
        return self.fc(_pool(self.model(img)))


# --- MobileNetV2 (Sandler et al., CVPR 2018) at half width for CIFAR, as in the CRD benchmark ----


class InvertedBlock(nn.Module):
    """1x1 to `expand` times the width, 3x3 depthwise, 1x1 back without activation; where the shape
    stays, the input is added."""

    def __init__(self, in_channels: int, channels: int, stride: int, expand: int):
        super().__init__()
        mid = expand * in_channels
        self.conv = nn.Sequential(
            *_conv_bn(in_channels, mid, 1),
            nn.ReLU(inplace=True),
            *_conv_bn(mid, mid, 3, stride, groups=mid),
            nn.ReLU(inplace=True),
            *_conv_bn(mid, channels, 1),
        )
        self.adds = stride == 1 and in_channels == channels

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.adds else self.conv(x)


class MobileNetV2(nn.Module):
    """Half as wide as the paper's, but for the last convolution; 1/16 of the size is left.

    Four of the seven groups of blocks are stages, the last of each size. They end in a linear
    bottleneck: a stage is its own pre-activation.
    """

    GROUPS = (  # expansion, channels, blocks, stride
        (1, 8, 1, 1),
        (6, 12, 2, 1),
        (6, 16, 3, 2),
        (6, 32, 4, 2),
        (6, 48, 3, 1),
        (6, 80, 3, 2),
        (6, 160, 1, 1),
    )

    def __init__(self, num_class: int):
        super().__init__()
        self.conv1 = nn.Sequential(*_conv_bn(3, 16, 3, 2), nn.ReLU(inplace=True))
        self.blocks = nn.Sequential()
        in_channels = 16
        for expand, channels, blocks, stride in self.GROUPS:
            block = partial(InvertedBlock, expand=expand)
            self.blocks.append(_stage(block, in_channels, channels, blocks, stride))
            in_channels = channels
        self.conv2 = nn.Sequential(*_conv_bn(in_channels, 1280, 1), nn.ReLU(inplace=True))
        self.classifier = nn.Sequential(nn.Linear(1280, num_class))
        ends = (1, 2, 4, 6)
        stages = [f"blocks.{i}" for i in ends]
        self.taps = dict(
            stem="conv1",
            stages=stages,
            preacts=stages,
            last="conv2",
            feat="classifier.0:in",
            norms=[f"blocks.{i}.{self.GROUPS[i][2] - 1}.conv.7" for i in ends],
        )
        _init(self, linear_std=0.01)

    def forward(self, img: Tensor) -> Tensor:
        return self.classifier(_pool(self.conv2(self.blocks(self.conv1(img)))))


# --- ShuffleNet (Zhang et al., CVPR 2018) and V2 (Ma et al., ECCV 2018), as in the CRD benchmark --


class ShuffleV1Block(nn.Module):
    """Grouped 1x1, shuffle, 3x3 depthwise, grouped 1x1; the input is added, at stride 2 pooled and
    put beside the result.

    `groups`: of the 1x1 convolutions, but of the first not on the narrow stem.
    """

    def __init__(self, in_channels: int, channels: int, stride: int, groups: int = 3):
        super().__init__()
        made = channels - in_channels if stride == 2 else channels
        mid = made // 4
        self.stride, self.groups = stride, 1 if in_channels == 24 else groups
        _number(
            self,
            (in_channels, mid, 1, 1, self.groups),
            (mid, mid, 3, stride, mid),
            (mid, made, 1, 1, groups),
        )
        self.relu = nn.ReLU()  # not in place: its input is the pre-activation

    def forward(self, x: Tensor) -> Tensor:
        made = _shuffle(F.relu(_layer(self, 1, x), inplace=True), self.groups)
        made = _layer(self, 3, F.relu(_layer(self, 2, made), inplace=True))
        if self.stride == 1:
            return self.relu(made + x)
        return self.relu(torch.cat([made, F.avg_pool2d(x, 3, 2, padding=1)], dim=1))


class ShuffleV2Block(nn.Module):
    """One half of the channels passes, the other goes through 1x1, 3x3 depthwise and 1x1; then both
    are shuffled. At stride 2 each half is made of all channels, the first by 3x3 depthwise and 1x1.
    """

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        half = channels // 2
        self.stride = stride
        first = [(in_channels, in_channels, 3, 2, in_channels), (in_channels, half, 1)]
        seen = in_channels if stride == 2 else half
        second = [(seen, half, 1), (half, half, 3, stride, half), (half, half, 1)]
        _number(self, *(first if stride == 2 else []), *second)
        self.relu = nn.ReLU()  # not in place: its input is the pre-activation

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 2:
            first, second, i = _layer(self, 2, _layer(self, 1, x)), x, 3
        else:
            (first, second), i = x.chunk(2, dim=1), 1
        second = _layer(self, i + 1, F.relu(_layer(self, i, second), inplace=True))
        second = _layer(self, i + 2, second)
        # the half that passes is not negative: the ReLU leaves it as it is
        return _shuffle(self.relu(torch.cat([first, second], dim=1)), 2)


def _shuffle_taps(last: tuple[int, int, int]) -> dict:
    """Taps of a ShuffleNet whose stages have their last block at `last`. They have no `norms`: what
    meets at a pre-activation comes from several batch norms, or from none."""
    return dict(
        stem="relu",
        stages=[f"layer{i}" for i in (1, 2, 3)],
        preacts=[f"layer{i}.{n}.relu:in" for i, n in enumerate(last, 1)],
        feat="linear:in",
    )


class ShuffleV1(nn.Module):
    """ShuffleNet with three groups, a 1x1 stem of stride 1 and stages of 4, 8 and 4 blocks."""

    def __init__(self, num_class: int):
        super().__init__()
        self.conv1, self.bn1 = _conv_bn(3, 24, 1)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _stage(ShuffleV1Block, 24, 240, 4, stride=2)
        self.layer2 = _stage(ShuffleV1Block, 240, 480, 8, stride=2)
        self.layer3 = _stage(ShuffleV1Block, 480, 960, 4, stride=2)
        self.linear = nn.Linear(960, num_class)
        self.taps = _shuffle_taps((3, 7, 3))

    def forward(self, img: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(img)))
        return self.linear(_pool(self.layer3(self.layer2(self.layer1(x)))))


class ShuffleV2(nn.Module):
    """ShuffleNetV2 1x with a 1x1 stem of stride 1 and stages of 4, 8 and 4 blocks.

    A pre-activation has its channels in the order before the shuffle, a stage in the one after it.
    """

    def __init__(self, num_class: int):
        super().__init__()
        self.conv1, self.bn1 = _conv_bn(3, 24, 1)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _stage(ShuffleV2Block, 24, 116, 4, stride=2)
        self.layer2 = _stage(ShuffleV2Block, 116, 232, 8, stride=2)
        self.layer3 = _stage(ShuffleV2Block, 232, 464, 4, stride=2)
        self.conv2, self.bn2 = _conv_bn(464, 1024, 1)
        self.linear = nn.Linear(1024, num_class)
        self.relu2 = nn.ReLU()
        self.taps = _shuffle_taps((3, 7, 3)) | dict(last="relu2")

    def forward(self, img: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(img)))
        x = self.conv2(self.layer3(self.layer2(self.layer1(x))))
        return self.linear(_pool(self.relu2(self.bn2(x))))


# --- the table of networks: name -> (num_class -> network) ---------------------------------------


def _cifar(depth: int, widths=(16, 16, 32, 64)):
    return partial(CifarResNet, depth, widths)


X4 = (32, 64, 128, 256)

NETWORKS = {
    **{f"resnet{depth}": _cifar(depth) for depth in (8, 14, 20, 32, 44, 56, 110)},
    "resnet8x4": _cifar(8, X4),
    "resnet32x4": _cifar(32, X4),
    "ResNet18": partial(ResNet, (2, 2, 2, 2), False),
    "ResNet34": partial(ResNet, (3, 4, 6, 3), False),
    "ResNet50": partial(ResNet, (3, 4, 6, 3), True),
    "ResNet101": partial(ResNet, (3, 4, 23, 3), True),
    "ResNet152": partial(ResNet, (3, 8, 36, 3), True),
    **{f"wrn_{d}_{w}": partial(WideResNet, d, w) for d in (16, 40) for w in (1, 2)},
    "vgg8": partial(VGG, (1, 1, 1, 1, 1)),
    "vgg11": partial(VGG, (1, 1, 2, 2, 2)),
    "vgg13": partial(VGG, (2, 2, 2, 2, 2)),
    "vgg16": partial(VGG, (2, 2, 3, 3, 3)),
    "vgg19": partial(VGG, (2, 2, 4, 4, 4)),
    "MobileNetV1": MobileNetV1,
    "MobileNetV2": MobileNetV2,
    "ShuffleV1": ShuffleV1,
    "ShuffleV2": ShuffleV2,
}


def build(
    name: str, num_class: int, img_size: int | None = None, pretrained: bool = False
) -> nn.Module:
    """The network `name` with `num_class` outputs and fresh weights from torch's generator.

    `name`: one of NETWORKS, `torchvision/NAME`, `timm/NAME` or `path/to/file.py:function`, called as
    `function(num_class)`. `img_size`: for networks that must know it. `pretrained`: with the
    library's own weights; their classifier is replaced where it has another number of classes.
    Raises UserError where there is no such network, with the names that come near.
    """
    return constructor(name)(num_class, img_size, pretrained)


def constructor(name: str):
    """The function (num_class, img_size, pretrained) -> nn.Module behind a name; see `build`."""
    library, _, model = name.partition("/")
    if name.startswith("simkd:"):  # whatever network is in it
        return _of_simkd(name)
    if ".py:" in name:
        return _of_file(*name.rsplit(":", 1))
    if library in LIBRARIES and model:
        return LIBRARIES[library](model)
    own = named(NETWORKS, name, "network")

    def make(num_class, img_size, pretrained):
        if pretrained:
            raise UserError(
                f"{name} has no weights of its own: pretrained is for torchvision/NAME and timm/NAME"
            )
        return own(num_class)

    return make


def behead(net: nn.Module) -> None:
    """Take the classifier away, once: the network then returns its pooled features."""
    if not isinstance(net.get_submodule(classifier_of(net)), nn.Identity):
        net.set_submodule(classifier_of(net), nn.Identity())


class Reusing(nn.Module):
    """A network whose last map goes through a projector and another network's classifier (SimKD).

    net: it loses its own classifier; projector: with `predict(fm, classifier)`.
    """

    def __init__(self, net: nn.Module, projector: nn.Module, classifier: nn.Module):
        super().__init__()
        behead(net)
        self.net, self.projector, self.classifier = net, projector, classifier
        self.tapped = Tapped(net, ("last",))
        self.taps = dict(feat="classifier:in")
        for key in ("stem", "stages", "preacts"):  # its `last` is the projector's
            path = net.taps.get(key)
            if path:
                inside = [f"net.{x}" for x in path] if isinstance(path, list) else f"net.{path}"
                self.taps[key] = inside
        self.taps["last"] = "projector.projector"
        self.taps["layout"] = {f"net.{x}": how for x, how in net.taps.get("layout", {}).items()}

    def forward(self, img: Tensor) -> Tensor:
        return self.projector.predict(self.tapped(img).last, self.classifier)


def reusing_name(name: str, spec: tuple[int, ...]) -> str:
    """What `build` calls a Reusing of the network `name`, whose projector has the `spec`."""
    return ":".join(map(str, ("simkd", name, *spec)))


def _of_simkd(name: str):
    """simkd:NETWORK:S_DIM:T_DIM:FACTOR:HEIGHT:WIDTH, a Reusing."""
    from kd_losses.simkd import SimKD

    _, _, rest = name.partition(":")
    inner, *numbers = rest.rsplit(":", 5)
    if len(numbers) < 5 or not all(x.isdecimal() for x in numbers):
        raise UserError(f"no network {name!r}: simkd:NETWORK and five numbers are wanted")
    s_dim, t_dim, factor, *size = map(int, numbers)
    own = constructor(inner)

    def make(num_class, img_size, pretrained):
        net = own(num_class, img_size, pretrained)
        ensure_taps(net, inner, num_class, img_size)
        try:
            projector = SimKD(s_dim, t_dim, factor, tuple(size))
        except ValueError as error:
            raise UserError(f"{name}: {first_line(error)}") from error
        return Reusing(net, projector, nn.Linear(t_dim, num_class))

    return make


def file_name(name: str) -> str:
    """A network's name as a part of file names: torchvision-resnet18, my_net-build."""
    return re.sub(r"^(.*/)?([^/]+)\.py:", r"\2-", name).replace("/", "-")


# --- other people's networks ----------------------------------------------------------------------


def _of_torchvision(name: str):
    from torchvision import models

    named(dict.fromkeys(models.list_models(module=models)), name, "network of torchvision")
    # logits alone, in training too
    wishes = dict(aux_logits=False) if name in ("googlenet", "inception_v3") else {}

    def make(num_class, img_size, pretrained):
        if not pretrained:
            fresh = dict(init_weights=True) if wishes else {}
            if name.startswith("vit_") and img_size:
                fresh = dict(image_size=img_size)
            return models.get_model(name, weights=None, num_classes=num_class, **wishes, **fresh)
        known = models.get_model_weights(name)
        # the first ones: those of the published tables
        weights = getattr(known, "IMAGENET1K_V1", known.DEFAULT)
        net = downloaded(lambda: models.get_model(name, weights=weights, **wishes), name)
        if num_class != len(weights.meta["categories"]):
            _new_classifier(net, len(weights.meta["categories"]), num_class)
        return net

    return make


def _of_timm(name: str):
    try:
        import timm
    except ImportError:
        raise UserError(f"timm/{name} needs timm: pip install timm") from None
    known = timm.list_models() + timm.list_pretrained()
    known += [model.split(".")[0] for model in known]
    named(dict.fromkeys(known), name, "network of timm")

    def make(num_class, img_size, pretrained):
        def create(**wishes):
            return timm.create_model(name, pretrained=pretrained, num_classes=num_class, **wishes)

        try:
            return downloaded(lambda: create(img_size=img_size), name)
        except TypeError:  # most networks take any size and no such argument
            return downloaded(create, name)

    return make


LIBRARIES = {"torchvision": _of_torchvision, "timm": _of_timm}


def downloaded(create, name: str) -> nn.Module:
    """`create()`, which may fetch weights."""
    try:
        return create()
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"the weights of {name} cannot be had ({first_line(error)}): a network connection is "
            f"needed, or the file in {torch.hub.get_dir()}/checkpoints"
        ) from error


def _new_classifier(net: nn.Module, old_class: int, num_class: int) -> None:
    """Replace the last layer with `old_class` outputs: N(0, 0.01) and 0, as KnowledgeReview does."""
    name, old = [
        (name, module)
        for name, module in net.named_modules()
        if getattr(module, "out_features", getattr(module, "out_channels", None)) == old_class
    ][-1]
    if isinstance(old, nn.Linear):
        new = nn.Linear(old.in_features, num_class)
    else:
        new = nn.Conv2d(old.in_channels, num_class, old.kernel_size, old.stride, old.padding)
    nn.init.normal_(new.weight, std=0.01)
    nn.init.zeros_(new.bias)
    net.set_submodule(name, new)


def _of_file(path: str, function: str):
    file = Path(path)
    if not file.is_file():
        raise UserError(f"{path}: no such file (path/to/file.py:function names a network)")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever somebody's file does
        raise UserError(f"{path} cannot be imported ({_brief(error)})") from error
    functions = {key: f for key, f in vars(module).items() if callable(f) and key[0] != "_"}
    make = named(functions, function, f"function in {path} called")

    def call(num_class, img_size, pretrained):
        if pretrained:
            raise UserError(
                f"{path}:{function} loads its weights itself: pretrained is for libraries"
            )
        try:
            net = make(num_class)
        except Exception as error:
            raise UserError(f"{path}: {function}({num_class}) failed ({_brief(error)})") from error
        if not isinstance(net, nn.Module):
            raise UserError(f"{path}: {function} returns a {type(net).__name__}, not an nn.Module")
        return net

    return call


def _brief(error: Exception) -> str:
    kind, line = type(error).__name__, first_line(error)
    return kind if line == kind else f"{kind}: {line}"


# --- weights from a checkpoint -------------------------------------------------------------------


def read_weights(checkpoint: dict, path: str = "the checkpoint") -> dict[str, Tensor]:
    """The state dict inside a checkpoint, whatever wrapped it, with this file's key names.

    Understood: our own files, raw state dicts, `{'snet' | 'net' | 'net2' | 'model' | 'state_dict': ...}`
    or any other single dict of tensors, the prefixes of DataParallel and torch.compile, and KD-Zoo's
    names (`res1..3`, `ds`). Raises UserError where there are no tensors.
    """
    for key in ("snet", "net", "net2", "model", "state_dict"):
        if isinstance(checkpoint.get(key), dict):
            checkpoint = checkpoint[key]
            break
    else:
        dicts = [value for value in checkpoint.values() if _only_tensors(value)]
        if len(dicts) == 1:
            (checkpoint,) = dicts
    state = {k: v for k, v in checkpoint.items() if isinstance(k, str) and torch.is_tensor(v)}
    if not state:
        found = [str(key)[:50] for key in checkpoint][:10]
        raise UserError(f"{path} holds no weights, only: {', '.join(found) or 'nothing at all'}")
    for prefix in ("module.", "_orig_mod."):
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    if any(key.startswith("res1.") for key in state):  # KD-Zoo
        state = {
            re.sub(r"^res(\d)", r"layer\1", key).replace(".ds.", ".downsample."): value
            for key, value in state.items()
        }
    return state


def _only_tensors(value) -> bool:
    return isinstance(value, dict) and value != {} and all(map(torch.is_tensor, value.values()))


def identify(state: dict[str, Tensor]) -> tuple[str, int] | None:
    """(name, num_class) of the network whose keys and shapes `state` has, or None."""
    weights = [value for key, value in state.items() if key.endswith("weight") and value.ndim == 2]
    if not weights:
        return None
    num_class = weights[-1].shape[0]  # the classifier is the last matrix
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
    """The shapes that tell networks apart; files older than torch 0.4.1 have none of the counters."""
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
    wrong = [f"{len(keys)} {what} ({_few(keys)})" for what, keys in reasons.items() if keys]
    if wrong:
        fits = identify(state)
        hint = f"; the file fits {fits[0]} with {fits[1]} classes" if fits else ""
        raise UserError(f"{path} is not a {name}: entries {', '.join(wrong)}{hint}")
    net.load_state_dict(state)


def check_weights(net: nn.Module, path: str) -> None:
    """Raises UserError where weights that were loaded from `path`, to train with, are not finite."""
    spoilt = [key for key, x in net.state_dict().items() if not x.isfinite().all()]
    if spoilt:
        raise UserError(f"{path}: {len(spoilt)} entries are not finite ({_few(spoilt)})")


def _like(x: Tensor, own: Tensor) -> bool:
    """Whether `x` is an ordinary tensor that can stand for `own`."""
    plain = x.layout == torch.strided and not (x.is_meta or x.is_quantized or x.is_complex())
    return plain and (x.is_floating_point() or not own.is_floating_point())


def _few(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")


@dataclass
class Weights:
    """A network's name, its weights (None: fresh ones) and what its checkpoint knows of the data.

    pretrained: with its library's weights; taps: stages named by hand; epoch: how many it was trained
    for, as its file says; notes: lines about it; make: what `constructor` gives for the name. Raises
    UserError where there is no such network.
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
    """What a checkpoint of ours knows of network and data; {} of other files. Raises UserError where
    it is not what `utils.describe_data` writes."""
    meta = checkpoint.get("meta")
    if not isinstance(meta, dict):
        return {}
    least, most = SIZES

    def three(values) -> bool:
        fine = isinstance(values, (list, tuple)) and len(values) == 3
        return fine and all(isinstance(x, (int, float)) and math.isfinite(x) for x in values)

    tests = dict(
        network=lambda x: isinstance(x, str),
        data_name=lambda x: isinstance(x, str),
        img_root=lambda x: isinstance(x, str),
        num_class=lambda x: isinstance(x, int) and x > 1,
        img_size=lambda x: isinstance(x, int) and least <= x <= most,
        mean=lambda x: three(x) and meta.get("std") is not None,
        std=lambda x: three(x) and min(x) > 0,
    )
    for key, fits in tests.items():
        if meta.get(key) is not None and not fits(meta[key]):
            raise UserError(f"{path} is damaged: its {key} cannot be {str(meta[key])[:50]}")
    return {key: value for key, value in meta.items() if value is not None}


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
        raise UserError(f"{path} holds a network of your own: say so with --{flag} {known}")
    if known not in (None, name or known) and ".py:" not in name:
        raise UserError(f"--{flag} {name} contradicts {path}, which holds a {known}")
    epoch = checkpoint.get("epoch")
    epoch = epoch if isinstance(epoch, int) else 0
    return kind(name or known, state, meta, path, taps=taps, epoch=epoch)


# --- feature maps --------------------------------------------------------------------------------


@dataclass
class Features:
    """What one call of a tapped network gives; what was not asked for is None or empty.

    stem (B, C, H, W) | stages, preacts: lists of (B, C, H, W), shallow to deep | last (B, D, H, W):
    the map that is pooled, the last stage's unless a layer follows it | feat (B, D) |
    out: logits (B, K) | net: the bare network, for a method that calls it again | numbers: which
    stages the lists hold, counted from the deepest (-1) | strong: the same of the images' second view.
    """

    out: Tensor
    net: nn.Module
    stem: Tensor | None = None
    stages: list[Tensor] = field(default_factory=list)
    preacts: list[Tensor] = field(default_factory=list)
    last: Tensor | None = None
    feat: Tensor | None = None
    numbers: tuple[int, ...] = ()
    strong: "Features | None" = None

    @property
    def classifier(self) -> nn.Module:
        """The network's last linear layer."""
        return self.net.get_submodule(classifier_of(self.net))


class Tapped:
    """A network whose call returns `Features`: logits and the feature maps of `want`.

    `want`: any of 'stem', 'stages', 'preacts', 'last', 'feat'; `stages`: which of them, counted from the
    deepest (-1) backwards, None for all. The hooks are registered once and silent except inside a
    call of this object, so the bare network can be used, compiled or attacked at any time.
    Raises UserError where the network lacks what is wanted.
    """

    def __init__(self, net: nn.Module, want=(), stages: tuple[int, ...] | None = None):
        if not hasattr(net, "taps"):
            raise UserError(f"{type(net).__name__} does not say where its feature maps are (taps)")
        taps = dict(last=net.taps["stages"][-1]) | net.taps
        for kind in want:
            if kind != "out" and not taps.get(kind):
                reason = net.taps.get("lacks", {}).get(kind, f"it has no {kind}")
                raise UserError(f"{type(net).__name__} does not serve this method: {reason}")
        self.net = net
        self._caught = None
        count = len(net.taps["stages"])
        self.numbers = tuple(range(-count, 0)) if stages is None else tuple(stages)
        self._paths = {
            kind: [paths[i] for i in self.numbers] if isinstance(paths, list) else paths
            for kind, paths in taps.items()
            if kind in want
        }
        for kind in self._paths.values():
            for path in [kind] if isinstance(kind, str) else kind:
                self._hook(path)

    def _hook(self, path: str) -> None:
        name, number, end = split_tap(path)
        layout = self.net.taps.get("layout", {}).get(path)

        def catch(module, args, output):
            if self._caught is None:
                return
            self._calls[path] += 1
            if number in (None, self._calls[path]):
                x = args[0] if end == "in" else _first_tensor(output)
                self._caught[path] = x if layout is None else _as_map(x, layout)

        self.net.get_submodule(name).register_forward_hook(catch)

    def __call__(self, img: Tensor) -> Features:
        self._caught, self._calls = {}, Counter()
        caught = self._caught
        try:
            out = self.net(img)
        finally:
            self._caught = None
        maps = {
            kind: caught[path] if isinstance(path, str) else [caught[p] for p in path]
            for kind, path in self._paths.items()
        }
        return Features(out, self.net, numbers=self.numbers, **maps)


def classifier_of(net: nn.Module) -> str:
    """The path of the last linear layer, whose input the pooled features are."""
    return split_tap(net.taps["feat"])[0]


def split_tap(path: str) -> tuple[str, int | None, str]:
    """`module`, `module#2`, `module:in` -> (name of the module, which call of it or None, end)."""
    path, _, end = path.partition(":")
    name, _, number = path.partition("#")
    return name, int(number) if number else None, end


def _first_tensor(output):
    """A module's output, or the first of several."""
    if isinstance(output, (tuple, list)) and output:
        return output[0]
    return output


def _as_map(x: Tensor, layout) -> Tensor:
    """(B, C, H, W) of `layout` 'nhwc', or of tokens (B, N, C): (those before the image's, side)."""
    if layout == "nhwc":
        return x.permute(0, 3, 1, 2)
    before, side = layout
    return x[:, before:].transpose(1, 2).unflatten(2, (side, side))


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
            f"--stages {','.join(map(str, stages))}: from the shallowest to the deepest, each once"
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
            raise UserError(
                f"no regressor leads from {h_s}x{w_s} to {h_t}x{w_t}: --adapter channels+size"
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


def _shape(x: Tensor) -> str:
    return "x".join(str(n) for n in x.shape[1:])


# --- where the feature maps of an unknown network are ----------------------------------------------


@dataclass(eq=False)
class _Call:
    """One call of a module in the dry pass: what went in, what came out, what it called in turn."""

    path: str
    module: nn.Module
    x: Tensor | None
    x_version: int
    inner: list["_Call"] = field(default_factory=list)
    out: Tensor | None = None
    out_version: int = 0

    @property
    def leaf(self) -> bool:
        return not any(True for _ in self.module.children())


POOLING = (
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
    nn.LPPool2d,
    nn.FractionalMaxPool2d,
)
ACTIVATIONS = (
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.PReLU,
    nn.RReLU,
    nn.ELU,
    nn.SELU,
    nn.CELU,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.Softplus,
    nn.Hardswish,
    nn.Hardtanh,
    nn.Tanh,
    nn.Sigmoid,
)


def ensure_taps(
    net: nn.Module, name: str, num_class: int, img_size: int, stages: tuple[str, ...] | None = None
) -> list[str]:
    """Let `net` have `taps`: its own, or found by a dry pass. Returns what to print: a table of taps.

    `stages`: taps to use as stages, from the shallowest. The dry pass takes two images in eval mode.
    A stage is the last output at each size of the map, the blocks of a transformer four evenly
    spaced ones; before the activation is the input of the activation module whose output the stage
    is, or the stage itself where it has negative values. Raises UserError where nothing is found.
    """
    if hasattr(net, "taps") and stages is None:
        return []
    given = {key: net.taps[key] for key in ("stem", "feat") if key in getattr(net, "taps", {})}
    in_place = [m for m in net.modules() if getattr(m, "inplace", False)]
    for module in in_place:  # they would overwrite what the hooks catch
        module.inplace = False
    calls = dry_pass(net, name, num_class, img_size)
    found = _find(calls, name, net, stages)
    net.taps = found | given
    return _table(net, name, calls, len(in_place))


def dry_pass(net: nn.Module, name: str, num_class: int, img_size: int) -> list[_Call]:
    """Every call of a module of `net` on two images, in the order in which they ended, `net`'s own last.

    Raises UserError where `net` does not take such images or gives no logits (2, num_class).
    """
    ended, open_calls, times = [], [], Counter()
    root = _Call("", net, None, 0)

    def before(module, args, kwargs):
        x = next((x for x in (*args, *kwargs.values()) if torch.is_tensor(x)), None)
        times[names[module]] += 1
        path = f"{names[module]}#{times[names[module]]}"
        call = _Call(path, module, x, 0 if x is None else x._version)
        (open_calls[-1] if open_calls else root).inner.append(call)
        open_calls.append(call)

    def after(module, args, kwargs, output):
        call, x = open_calls.pop(), _first_tensor(output)
        if torch.is_tensor(x):
            call.out, call.out_version = x, x._version
        ended.append(call)

    names = {module: path for path, module in net.named_modules() if path}
    hooks = [m.register_forward_pre_hook(before, with_kwargs=True) for m in names]
    hooks += [m.register_forward_hook(after, with_kwargs=True) for m in names]
    modes = {module: module.training for module in net.modules()}
    # noise, since a network sees whether values are negative; torch's generator stays as it is
    img = torch.randn(2, 3, img_size, img_size, generator=torch.Generator().manual_seed(0))
    try:
        with torch.no_grad():
            out = net.eval()(img)
    except Exception as error:  # whatever somebody's network does
        raise UserError(
            f"{name} does not take {img_size}-pixel images ({_brief(error)}): try --img_size"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
    for call in ended:
        path, number = call.path.split("#")
        call.path = path if times[path] == 1 else f"{path}#{number}"
    if not torch.is_tensor(out) or out.shape != (2, num_class):
        what = tuple(out.shape) if torch.is_tensor(out) else type(out).__name__
        raise UserError(f"{name} gives {what} for two images, not logits of shape (2, {num_class})")
    root.out = out
    return [*ended, root]


def _find(calls: list[_Call], name: str, net: nn.Module, stages) -> dict:
    """The taps of a network whose calls these are; `calls[-1]` is its own."""
    linear = [
        call
        for call in calls
        if isinstance(call.module, nn.Linear) and call.x is not None and call.x.ndim == 2
    ]
    taps, lacks, layout, every_call = {}, {}, {}, calls
    if linear:
        taps["feat"] = f"{linear[-1].path}:in"
        calls = calls[: calls.index(linear[-1])] + calls[-1:]
    else:
        lacks["feat"] = "no linear layer ends it, so it has no pooled features"
        convs = [call for call in calls if isinstance(call.module, nn.Conv2d)]
        if convs and convs[-1].module.out_channels == calls[-1].out.shape[1]:  # it classifies
            calls = calls[: calls.index(convs[-1])] + calls[-1:]
    pooled = {id(call.out) for call in calls if isinstance(call.module, POOLING)}
    units = _units(calls[-1], pooled, {id(call) for call in calls})
    stem = _stem(units)
    if stages is None:
        picked = _by_size(units)
        if len(picked) > 1 and picked[0] is stem:
            picked = picked[1:]
        blocks = _blocks(calls) if len(picked) < 2 else []
        if blocks:
            count = min(4, len(blocks))
            picked = [blocks[math.ceil(len(blocks) * i / count) - 1] for i in range(1, count + 1)]
        if not picked:
            raise UserError(
                f"{name}: no feature maps were found: name modules with --s_taps, --t_taps"
            )
        ends = [(call.path, call, call.out, call.out_version) for call in picked]
    else:
        ends = [_named_end(path, every_call, name, net) for path in stages]
        order = [every_call.index(call) for path, call, *_ in ends if not path.endswith(":in")]
        if order != sorted(set(order)) or len(set(stages)) < len(stages):
            raise UserError(
                f"{name}: {','.join(stages)}: taps are named from the shallowest on, each once"
            )
    taps["stages"] = [path for path, *_ in ends]
    if stem is None:
        lacks["stem"] = "its first feature map was not found"
    else:
        taps["stem"] = stem.path
    side = next(
        (_side(c.out) for c in calls if isinstance(c.module, nn.Conv2d) and _side(c.out)), 0
    )
    preacts, norms = [], []
    for path, call, x, version in ends:
        if x._version != version:
            raise UserError(
                f"{name}: what {path} gives is changed in place later: tap another module"
            )
        layout[path] = _layout(x, side, name, path)
        preact = _before_activation(path, x, every_call)
        if x.ndim == 3:
            lacks["preacts"] = "a transformer's tokens have no activation to look in front of"
        elif preact is None:
            lacks["preacts"] = (
                f"no activation module gives its map at {path}, so what lies before is unknown: call "
                "nn.ReLU modules there, or name other stages with --s_taps, --t_taps"
            )
        else:
            layout[preact] = layout[path]
            preacts.append(preact)
            norms.append(_norm_before(preact, x, every_call))
    if "preacts" not in lacks:
        taps["preacts"] = preacts
        if all(norms):
            taps["norms"] = norms
    if "stem" in taps:
        layout[taps["stem"]] = _layout(stem.out, side, name, stem.path)
    layout = {path: how for path, how in layout.items() if how is not None}
    return taps | dict(lacks=lacks, layout=layout)


def _side(x: Tensor | None) -> int:
    """Height of a square map, (B, C, H, W) or (B, H, W, C); 0 where it is none."""
    if x is None or x.ndim != 4:
        return 0
    return x.shape[2] if x.shape[2] in (x.shape[3], x.shape[1]) else 0


def _units(call: _Call, pooled: set[int], known: set[int]) -> list[_Call]:
    """The calls inside `call` that are looked at whole: those that at most halve the map.

    What reduces it further, or ends in a pooling layer, is looked into. Not in it: what is no map or
    overwritten later, pooling, the one-pixel insides of squeeze-and-excitation, what lies behind the
    last linear layer and so is not in `known`.
    """
    units = []

    def look(call):
        for inner in call.inner:
            before, after = _side(inner.x), _side(inner.out)
            fine = after and inner.out._version == inner.out_version and id(inner.out) not in pooled
            # up to 3, since an unpadded stride of 2 makes 2 of 6
            if inner.inner and not (fine and before and before <= 3 * after):
                look(inner)
            elif fine and id(inner) in known:
                if max(before, after) > 1 or any(inner.x is unit.out for unit in units):
                    units.append(inner)

    look(call)
    return units


def _by_size(units: list[_Call]) -> list[_Call]:
    """The last of the units at each size, while the map shrinks; unpadded convolutions, which make
    it a little smaller, begin no new size."""
    last = {}  # by the side at which a size began
    for unit in units:
        side = _side(unit.out)
        began = min(last, default=math.inf)
        if side <= began:
            last[began if side > 0.75 * began else side] = unit
    return list(last.values())


def _stem(units: list[_Call]) -> _Call | None:
    """The first unit, with the normalisation and activation layers that follow it."""
    if not units:
        return None
    stem = units[0]
    for unit in units[1:]:
        extra = isinstance(unit.module, ACTIVATIONS) or "Norm" in type(unit.module).__name__
        extra = extra and not any(isinstance(m, nn.Conv2d) for m in unit.module.modules())
        if not (extra and unit.out.shape == stem.out.shape):
            break
        stem = unit
    return stem


def _blocks(calls: list[_Call]) -> list[_Call]:
    """The blocks of a transformer: the outermost group of like modules that give (B, N, C)."""
    groups = {}
    for call in calls:
        if call.out is not None and call.out.ndim == 3 and not call.leaf:
            groups.setdefault((call.path.rpartition(".")[0], type(call.module)), []).append(call)
    groups = [group for group in groups.values() if len(group) > 1]
    return min(groups, key=lambda g: (g[0].path.count("."), -len(g)), default=[])


def _named_end(path: str, calls: list[_Call], name: str, net: nn.Module):
    """(tap, call, tensor, its version there) of a tap that the user named."""
    modules = dict(net.named_modules())
    try:
        module, number, end = split_tap(path)
        if number is not None and number < 1 or end not in ("", "in"):
            raise ValueError
    except ValueError:
        raise UserError(
            f"{path}: a tap is MODULE, MODULE#2 (its second call) or MODULE:in"
        ) from None
    named(modules, module, f"module in {name} called")
    hits = [call for call in calls if call.path.split("#")[0] == module]
    if not hits or (number or 1) > len(hits):
        raise UserError(f"{name}: {path} is not a feature map: it is called {len(hits)} times")
    call = hits[-1 if number is None else number - 1]
    x, version = (call.x, call.x_version) if end else (call.out, call.out_version)
    if x is None or x.ndim not in (3, 4):
        shape = "nothing" if x is None else tuple(x.shape)
        raise UserError(f"{name}: {path} is not a feature map, it gives {shape}")
    return call.path + (":in" if end else ""), call, x, version


def _layout(x: Tensor, side: int, name: str, path: str):
    """How a tensor becomes a (B, C, H, W) map: None, 'nhwc' or (tokens before the image's, side)."""
    if x.ndim == 4:
        return None if x.shape[2] == x.shape[3] else "nhwc"
    tokens = x.shape[1]
    if not 0 < side * side <= tokens:
        side = math.isqrt(tokens)
    if side < 2:
        raise UserError(f"{name}: {path} gives {tuple(x.shape)}, which is no square of tokens")
    return tokens - side * side, side


def _before_activation(path: str, x: Tensor, calls: list[_Call]) -> str | None:
    """The tap before the activation whose output `x` is; `path` where `x` has had none."""
    for call in calls:
        if isinstance(call.module, ACTIVATIONS) and call.out is x and call.x is not None:
            return f"{call.path}:in" if call.x._version == call.x_version else None
    return path if (x < 0).any() else None


def _norm_before(preact: str, x: Tensor, calls: list[_Call]) -> str | None:
    """The batch norm of that width that runs last before the tap `preact`, with no layer between."""
    place = next(i for i, call in enumerate(calls) if call.path == preact.removesuffix(":in"))
    for call in reversed(calls[: place + 1]):
        if isinstance(call.module, nn.BatchNorm2d):
            fits = call.module.num_features == x.shape[1]
            return call.path.split("#")[0] if fits else None
        if isinstance(call.module, (nn.Conv2d, nn.Linear)):
            return None
    return None


def _table(net: nn.Module, name: str, calls: list[_Call], in_place: int) -> list[str]:
    """The taps of `net` in lines: what, where, channels x height x width."""
    caught = {}
    for call in calls[:-1]:
        caught[f"{call.path}:in"], caught[call.path] = call.x, call.out
        caught[call.path.split("#")[0]] = call.out

    def line(what, path):
        x, how = caught[path], net.taps["layout"].get(path)
        return f"  {what:<8} {path:<{width}} {_shape(x if how is None else _as_map(x, how))}"

    width = max(map(len, net.taps["stages"])) + 8

    lines = [f"{name}: feature maps found by a dry pass (stages: --s_taps, --t_taps)"]
    if in_place:
        lines[0] += f"; {in_place} in-place activations made out of place"
    taps = net.taps
    lines += [line("stem", taps["stem"])] if "stem" in taps else []
    preacts = taps.get("preacts") or [None] * len(taps["stages"])
    for i, (stage, preact) in enumerate(zip(taps["stages"], preacts), 1):
        lines.append(line(f"stage {i}", stage) + (f"  before: {preact}" if preact else ""))
    lines += [line("feat", taps["feat"])] if "feat" in taps else []
    return lines + [f"  without {kind}: {reason}" for kind, reason in taps["lacks"].items()]


# --- what a network costs ------------------------------------------------------------------------


def count_parameters(module: nn.Module) -> int:
    """Number of parameters, batch-norm scales and shifts included, buffers not."""
    return sum(p.numel() for p in module.parameters())


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
