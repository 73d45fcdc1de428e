"""Two networks that know nothing of this repository, as somebody might bring them."""

import torchvision
from torch import nn


class Block(nn.Module):
    """Two convolutions around a shortcut; one in-place ReLU is called twice."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.shortcut = nn.Conv2d(c_in, c_out, 1, stride=2, bias=False)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return self.relu(out)


class MyNet(nn.Module):
    def __init__(self, num_class: int):
        super().__init__()
        widths = (16, 32, 64, 128)
        self.stem = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True)
        )
        self.body = nn.Sequential(*[Block(*pair) for pair in zip(widths, widths[1:])])
        self.classifier = nn.Linear(128, num_class)

    def forward(self, x):
        return self.classifier(self.body(self.stem(x)).mean((2, 3)))


def build(num_class: int) -> nn.Module:
    """304 thousand parameters for ten classes."""
    return MyNet(num_class)


def small_vit(num_class: int) -> nn.Module:
    """torchvision's vision transformer for 64-pixel images: 8 x 8 patches of 8 pixels, 6 blocks."""
    return torchvision.models.VisionTransformer(
        image_size=64,
        patch_size=8,
        num_layers=6,
        num_heads=4,
        hidden_dim=128,
        mlp_dim=256,
        num_classes=num_class,
    )
