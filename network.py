"""Every network of the tables, by name; where its feature maps are; hooks that catch them.

    net = build("resnet20", num_class=100)              # net(img) -> logits, and nothing else
    tapped = Tapped(net, want=("stages", "feat"))       # the same network, its feature maps caught
    s = tapped(img)                                     # s.stages, s.feat, s.out

Names follow the CRD benchmark (Tian et al., ICLR 2020), state-dict keys and shapes its public code,
so that public teachers load as they are; KD-Zoo's checkpoints are recognised and mapped.

A *tap* says where a feature is: the dotted path of a module for its output, `path:in` for its
input. Every network carries `net.taps`: `stem` (one path), `stages` and `preacts` (one path per
stage, after and before the stage's last ReLU), `feat` (the input of the classifier) and, where
there are any, `norms` (the last batch norm before each of `preacts`).
"""

from collections import Counter
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils import UserError, named

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
            raise ValueError(f"expected depth 6n + 2, got {depth}")
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
            raise ValueError(f"expected depth 6n + 4, got {depth}")
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
    concatenated with the result.

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


def build(name: str, num_class: int) -> nn.Module:
    """The network `name` of NETWORKS with `num_class` outputs and fresh weights from torch's
    generator.

    Raises UserError if there is no such network, with the similar names. Networks of
    other libraries and files: engine/foreign.py.
    """
    return named(NETWORKS, name, "network")(num_class)


# --- feature maps --------------------------------------------------------------------------------


@dataclass
class Features:
    """What one call of a tapped network gives; what was not asked for is None or empty.

    stem (B, C, H, W) | stages, preacts: lists of (B, C, H, W), shallow to deep | last (B, D, H, W):
    the map that is pooled, the last stage's unless a layer follows it | feat (B, D) |
    out: logits (B, K) | net: the bare network, for a method that calls it again | numbers: which
    stages the lists hold, counted from the deepest (-1) | strong: the same of the images' second
    view.
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

    `want`: any of 'stem', 'stages', 'preacts', 'last', 'feat'; `stages`: which of them, counted
    from the deepest (-1) backwards, None for all. The hooks are registered once and silent except
    inside a call of this object, so the bare network can be used, compiled or attacked at any time.
    Raises UserError if the network lacks one of them.
    """

    def __init__(self, net: nn.Module, want=(), stages: tuple[int, ...] | None = None):
        if not hasattr(net, "taps"):
            raise UserError(
                f"{type(net).__name__} has no attribute `taps` that names its feature maps"
            )
        taps = dict(last=net.taps["stages"][-1]) | net.taps
        for kind in want:
            if kind != "out" and not taps.get(kind):
                reason = net.taps.get("lacks", {}).get(kind, f"it has no {kind}")
                raise UserError(f"{type(net).__name__} does not work with this method: {reason}")
        self.net = net
        self._caught = None
        count = len(net.taps["stages"])
        self.numbers = tuple(range(-count, 0)) if stages is None else tuple(stages)
        self._paths = {
            kind: [paths[i] for i in self.numbers] if isinstance(paths, list) else paths
            for kind, paths in taps.items()
            if kind in want
        }
        self.kinds = frozenset(self._paths)
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
                x = args[0] if end == "in" else first_tensor(output)
                self._caught[path] = x if layout is None else as_map(x, layout)

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


def first_tensor(output):
    """A module's output, or the first of several."""
    if isinstance(output, dict) and output:
        return next(iter(output.values()))
    if isinstance(output, (tuple, list)) and output:
        return output[0]
    return output


def as_map(x: Tensor, layout) -> Tensor:
    """(B, C, H, W) of `layout` 'nhwc', or of tokens (B, N, C): (those before the image's, side)."""
    if layout == "nhwc":
        return x.permute(0, 3, 1, 2)
    before, side = layout
    return x[:, before:].transpose(1, 2).unflatten(2, (side, side))


# --- what a network costs ------------------------------------------------------------------------


def count_parameters(module: nn.Module) -> int:
    """Number of parameters, batch-norm scales and shifts included, buffers not."""
    return sum(p.numel() for p in module.parameters())
