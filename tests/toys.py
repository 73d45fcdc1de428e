"""Small stand-ins: a network with taps, a training set, and a distillation between two of them."""

import torch
import torch.nn.functional as F
from torch import nn

import dataset
import train_kd

BATCH = 8
SMALL = {"--nce_n": "16", "--feat_dim": "8"}  # flags that keep a toy a toy, where a method has them


class Mark(nn.Module):
    """What a test makes of a stage's map, within the graph; the next layer takes it back."""

    f = staticmethod(lambda x: x)

    def forward(self, x):
        return self.f(x)


class Toy(nn.Module):
    """A stem and three stages of one convolution each, on 8-pixel images."""

    def __init__(self, widths=(4, 4, 8, 8), num_class=5, last=2):
        super().__init__()
        stem, a, b, c = widths
        self.conv0, self.relu0 = nn.Conv2d(3, stem, 3, padding=1), nn.ReLU()
        self.conv1, self.relu1 = nn.Conv2d(stem, a, 3, padding=1), nn.ReLU()
        self.conv2, self.relu2 = nn.Conv2d(a, b, 3, stride=2, padding=1), nn.ReLU()
        self.conv3, self.relu3 = nn.Conv2d(b, c, 3, stride=4 // last, padding=1), nn.ReLU()
        self.mark1, self.mark2, self.mark3 = Mark(), Mark(), Mark()
        self.fc = nn.Linear(c, num_class)
        self.taps = dict(
            stem="relu0",
            stages=["mark1", "mark2", "mark3"],
            preacts=["relu1:in", "relu2:in", "relu3:in"],
            feat="fc:in",
        )

    def forward(self, img):
        img = self.relu0(self.conv0(img))
        for i in (1, 2, 3):
            img = getattr(self, f"relu{i}")(getattr(self, f"conv{i}")(img))
            img = getattr(self, f"mark{i}")(img).to(self.conv0.weight.dtype)
        return self.fc(F.adaptive_avg_pool2d(img, 1).flatten(1))


def images(n=20, num_class=5, size=8):
    pixels = torch.randint(0, 256, (n, size, size, 3), dtype=torch.uint8)
    names = [str(i) for i in range(num_class)]
    return dataset.Images(pixels, torch.arange(n) % num_class, names, (0.5,) * 3, (0.25,) * 3)


def job(mode, student=None, teacher=None, train=None, argv=()):
    """A train_kd.Distillation of `mode` between toys."""
    flags = [x for m in mode.split("+") for x in _small(m)]
    args, rows = train_kd.parse(["--kd_mode", mode, "--t_model", "x", *flags, *argv])
    rows = train_kd.sized(rows, args.batch_size or BATCH)
    return train_kd.Distillation(student or Toy(), teacher or Toy(), rows, train or images())


def _small(mode):
    flags = train_kd.METHODS[mode].flags
    return [x for flag, value in SMALL.items() if flag[2:] in flags for x in (flag, value)]


def batch(n=BATCH, num_class=5, dtype=torch.float64, size=8, strong=False):
    img = torch.randn(n, 3, size, size, dtype=dtype)
    second = img + 0.1 if strong else None
    return train_kd.Batch(img, torch.arange(n) % num_class, torch.arange(n), second)
