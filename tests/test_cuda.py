"""What only a GPU can show: a step without a host sync, and the step as a CUDA graph."""

from argparse import Namespace

import pytest
import torch
import toys

import train_kd
import utils
from engine.cuda_graph import CapturedStep
from engine import foreign
from kd_losses import METHODS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
GRAPHED = [mode for mode, row in METHODS.items() if row.capturable]
RECIPE = Namespace(lr=0.01, momentum=0.9, weight_decay=1e-4, nesterov=1)


@pytest.fixture(autouse=True)
def one_choice_of_kernels(monkeypatch):
    """Both ways compute with the same kernels, and in full float32."""
    select_device = utils.select_device

    def deterministic(*args):
        found = select_device(*args)
        torch.backends.cudnn.benchmark = False
        return found

    monkeypatch.setattr(utils, "select_device", deterministic)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def steps(mode, step, amp, count=8):
    """The losses and final weights of a few steps, the last on a smaller batch."""
    device = utils.select_device("cuda")
    precision = utils.precision(device, amp)
    torch.manual_seed(0)
    nets = [foreign.build(name, 5).requires_grad_(False) for name in ("resnet8", "resnet14")]
    images = toys.images(size=16)
    distiller = toys.distiller(mode, *nets, images)
    distiller.to(device)
    phase = distiller.phases[0]
    optimizer = utils.sgd(distiller.set_trainable(phase), RECIPE, phase.nesterov)
    torch.manual_seed(1)
    losses = []
    for i in range(count):
        n = 4 if i == count - 1 else toys.BATCH
        batch = toys.batch(n, dtype=torch.float32, size=16, strong=distiller.two_views)
        batch = distiller.batch(*(x.to(device) for x in batch.tensors().values()))
        terms = step(distiller, phase, optimizer, batch, toys.weights(distiller, 1e-3), precision)
        losses.append({name: value.clone() for name, value in terms.items()})
    return losses, [p.detach().clone() for p in optimizer.param_groups[0]["params"]]


@pytest.mark.parametrize("mode", GRAPHED)
def test_a_captured_step_is_the_step(mode):
    plain, weights = steps(mode, train_kd.train_step, "off")
    replayed, others = steps(mode, CapturedStep(train_kd.train_step), "off")
    random = mode == "crd"  # draws its negatives
    for one, other in zip(plain, replayed):
        for name in one:
            assert other[name].isfinite()
            if not random:
                torch.testing.assert_close(one[name], other[name], rtol=1e-2, atol=1e-3)
    if not random:
        for one, other in zip(weights, others):
            torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("mode", GRAPHED)
def test_no_host_sync_in_a_step(mode):
    def strict(*args):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return train_kd.train_step(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    steps(mode, strict, "bf16", count=3)
