"""Small stand-ins: a network with taps, a training set, and a distillation between two of them."""

import torch
import torch.nn.functional as F
from torch import nn

import dataset
from engine import kd_cli
from engine.distiller import Batch, Distiller

BATCH = 8
SMALL = dict(nce_n="16", feat_dim="8")  # flags of crd that keep a toy small


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


def parse(argv, teacher="", student="", num_class=10, batch=None):
    """(flags, {mode: Settings}) of a command line of train_kd.py."""
    args = kd_cli.parse(argv, "")
    return args, kd_cli.settings_of(args, teacher, student, num_class, args.batch_size or batch)


def cfg(args, student):
    """The flags with everything filled in."""
    return kd_cli.resolve(args, student, {})


def distiller(mode, student=None, teacher=None, train=None, argv=()):
    """A Distiller of `mode` between toys."""
    flags = small_flags(mode)
    train = train or images()
    argv = ["--kd_mode", mode, "--t_model", "x", *flags, *argv]
    _, chosen = parse(argv, num_class=train.num_class, batch=BATCH)
    return Distiller(student or Toy(), teacher or Toy(), list(chosen.values()), train)


def weights(distiller, weight=1.0, phase=None):
    """The same weight for every method; 0 in a phase without their losses."""
    return dict.fromkeys(distiller.criteria, weight if phase is None or phase.kd else 0.0)


def small_flags(modes):
    """crd's flags; `--crd.NAME` next to other methods, which may have a flag of the name."""
    if "crd" not in modes.split("+"):
        return []
    lead = "--crd." if "+" in modes else "--"
    return [x for name, value in SMALL.items() for x in (lead + name, value)]


def batch(n=BATCH, num_class=5, dtype=torch.float64, size=8, strong=False):
    img = torch.randn(n, 3, size, size, dtype=dtype)
    second = img + 0.1 if strong else None
    clock = torch.tensor(1.0), torch.tensor(240.0)
    return Batch(img, torch.arange(n) % num_class, torch.arange(n), second, *clock)
