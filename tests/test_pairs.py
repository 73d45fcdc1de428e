"""Every method between every pair of networks in the CRD benchmark's two tables of results: one
step of training in each of its phases."""

import copy
from argparse import Namespace
from functools import lru_cache

import pytest
import torch
import toys
from messages import refused
from torch import nn

import train_kd
import utils
from engine import foreign
from engine.published import settings_of
from engine.settings import settings
from kd_losses import METHODS

PAIRS = [
    ("wrn_40_2", "wrn_16_2"),
    ("wrn_40_2", "wrn_40_1"),
    ("resnet56", "resnet20"),
    ("resnet110", "resnet20"),
    ("resnet110", "resnet32"),
    ("resnet32x4", "resnet8x4"),
    ("vgg13", "vgg8"),
    # another family, so maps of other sizes and widths
    ("vgg13", "MobileNetV2"),
    ("ResNet50", "MobileNetV2"),
    ("ResNet50", "vgg8"),
    ("resnet32x4", "ShuffleV1"),
    ("resnet32x4", "ShuffleV2"),
    ("wrn_40_2", "ShuffleV1"),
]
QUICK = [("wrn_40_2", "wrn_40_1"), ("vgg13", "MobileNetV2")]
CASES = [
    pytest.param(*pair, mode, protocol, marks=[pytest.mark.soak] * (pair not in QUICK))
    for pair in PAIRS
    for mode in METHODS
    for protocol in ("kdzoo", "crd")
    if protocol == "kdzoo" or settings_of(mode, protocol)
]
RECIPE = Namespace(lr=0.05, momentum=0.9, weight_decay=0, nesterov=0)
FLOAT32 = utils.Precision()


@lru_cache(maxsize=1)
def pair(teacher, student):
    """Both networks; a test takes a copy, which is cheaper than new weights."""
    nets = [foreign.build(name, 10).requires_grad_(False) for name in (teacher, student)]
    for net in nets:
        # batch norms know these images: in eval mode a deep network that has seen none runs away
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None
        net.train()(torch.randn(32, 3, 32, 32))
    return nets


def make(teacher, student, mode, argv):
    """A rehearsed distiller between copies of the networks."""
    tnet, snet = copy.deepcopy(pair(teacher, student))
    train = toys.images(num_class=10, size=32)
    distiller = toys.distiller(mode, snet, tnet, train, argv)
    distiller.check_losses(train)
    return distiller


@pytest.mark.slow
@pytest.mark.parametrize("teacher, student, mode, protocol", CASES)
def test_a_step(teacher, student, mode, protocol):
    distiller = make(teacher, student, mode, ["--protocol", protocol])
    weight = settings(mode, protocol, "", "", 10).lambda_kd
    for phase in distiller.phases:
        # the method alone is to move something; bss has nothing to attack where no image is
        # classified rightly, and crld's teacher is sure of nothing, as here
        distiller.lambda_ce = float(not phase.kd or mode in ("bss", "crld"))
        learning = distiller.set_trainable(phase)
        parts = [
            list(x.parameters())
            for x in (distiller.student.net, distiller.teacher.net, distiller.added)
        ]
        parts = [part for part in parts if any(p.requires_grad for p in part)]
        before = [[p.detach().clone() for p in part] for part in parts]
        optimizer = utils.sgd(learning, RECIPE, phase.nesterov)
        batch = toys.batch(8, 10, torch.float32, 32, distiller.two_views)
        terms = train_kd.train_step(
            distiller, phase, optimizer, batch, toys.weights(distiller, weight, phase), FLOAT32
        )

        assert ("kd" in terms) == bool(phase.kd)
        assert all(term.isfinite() for term in terms.values())
        # without cross-entropy, what comes after the compared maps has nothing to learn from
        sure = (
            learning if phase.ce else [p for p in distiller.added.parameters() if p.requires_grad]
        )
        assert all(p.grad is not None for p in sure)
        grads = [p.grad for p in learning if p.grad is not None]
        assert grads and all(grad.isfinite().all() for grad in grads)
        for part, old in zip(parts, before):
            moved = any(not torch.equal(*both) for both in zip(part, old))
            # a temperature's step may be below what it can show
            assert moved or any(p.grad is not None and p.grad.any() for p in part)


@pytest.mark.parametrize(
    "teacher, student, mode, named, cure",
    [
        ("ShuffleV1", "ShuffleV2", "ofd", ["--kd_mode ofd"], "--margin batch"),
        ("resnet32x4", "MobileNetV2", "ab", ["8x8", "32x32"], "--adapter channels+size"),
        ("resnet32x4", "MobileNetV2", "fitnet", ["8x8", "32x32"], "--adapter channels+size"),
    ],
)
def test_what_the_crd_benchmark_leaves_undefined(teacher, student, mode, named, cure):
    """One line that names the way out, and the way out leads on. None of it is in its tables."""
    argv = ["--protocol", "crd"]
    with refused(*named, cure):
        make(teacher, student, mode, argv)
    make(teacher, student, mode, [*argv, *cure.split()])
