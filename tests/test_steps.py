"""Whole training steps of the public code, as its own `main()` takes them, next to ours.

tests/data/steps holds what RepDistiller computes with the arguments of its scripts, in float64, on
three fixed batches: the summed loss, the gradients of the first step, all state after three steps
of SGD, and what the optimizer holds. Weights and batches come from formulas. Tensors are compared
by their length and an inner product (`checksum`).
"""

import functools
import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import toys
from fill import fill

import train_kd
import utils
from engine import foreign, schedule
from engine.distiller import Batch, Distiller

DATA = Path(__file__).parent / "data" / "steps"
PAIRS = [("resnet20", "resnet8"), ("vgg13", "MobileNetV2")]
MODES = dict(  # RepDistiller's name -> ours
    kd="st",
    hint="fitnet",
    attention="at",
    similarity="sp",
    correlation="cc",
    vid="vid",
    rkd="rkd",
    pkt="pkt",
    abound="ab",
    factor="ft",
    fsp="fsp",
    nst="nst",
    crd="crd",
    kdsvd="kdsvd",
)
FLAGS = dict(crd=["--nce_n", "48"], kdsvd=["--unfold", "space"])
N_DATA, NUM_CLASS = 400, 100
# the place of a method's own modules in RepDistiller's list -> in ours
OWN = dict(
    hint={"1.": "0.adapter.layers.stages0."},
    correlation={"1.linear.": "0.loss.embed_s.", "2.linear.": "0.loss.embed_t."},
    vid={f"4.{i}.": f"0.loss.{i}." for i in range(4)},
    abound={f"1.connectors.{i}.": f"0.adapter.layers.preacts{i}." for i in range(4)},
    factor={"1.": "0.loss.translator.", "2.": "0.loss.paraphraser."},
    crd={
        "1.linear.": "0.loss.embed_s.",
        "2.linear.": "0.loss.embed_t.",
        "6.contrast.memory_v1": "0.loss.memory_s",
        "6.contrast.memory_v2": "0.loss.memory_t",
    },
)
FIRST = dict(factor={"1.": "0.loss.paraphraser."})
# The translator's convolutions have a bias before batch norm there: it changes nothing but the mean
# that the batch norm keeps.
IDLE = tuple(f"1.encoder.{i}" for i in ("0.bias", "3.bias", "6.bias"))
SHIFTED = tuple(f"1.encoder.{i}.running_mean" for i in (1, 4, 7))
RTOL = 1e-6
# MobileNetV2 in training mode on 16 images makes of a difference in the last digit, such as that of
# a norm that is safe at zero, a larger one step by step: (losses, entries)
CHAOTIC = dict(
    attention=(1e-4, 1e-2),
    similarity=(1e-6, 3e-4),
    rkd=(1e-6, 1e-3),
    pkt=(1e-5, 1e-2),
    nst=(1e-6, 3e-3),
    factor=(1e-6, 3e-4),
    abound=(1e-6, 3e-4),
)


@functools.cache
def recorded(pair: tuple[str, str]) -> dict:
    with gzip.open(DATA / f"{'_'.join(pair)}.json.gz") as file:
        return json.load(file)


QUICK = ["kd", "attention", "crd", "factor", "abound"]  # by the names of the public code


def cases():
    for pair in PAIRS:
        for name, found in recorded(pair).items():
            for phase in ("init", "main"):
                if phase in found:
                    slow = [pytest.mark.slow] * (pair != PAIRS[0] or name not in QUICK)
                    label = f"{'-'.join(pair)}-{name}-{phase}"
                    yield pytest.param(pair, name, phase, id=label, marks=slow)


def batch_of(step: int):
    """The batch of a step, and for crd the places of the positive and of 48 negatives."""
    n = 16 * 3 * 32 * 32
    img = 1.5 * np.sin(0.37 * (step + 1) + 12.9898 * np.arange(n) ** 1.03)
    i = np.arange(16)
    target, index = (7 * i + 3 * step) % NUM_CLASS, (37 * i + 11 * step) % N_DATA
    negatives = (index[:, None] + 1 + 8 * np.arange(48)[None] + 5 * step) % N_DATA
    places = np.concatenate([index[:, None], negatives], 1)
    img = torch.from_numpy(img.reshape(16, 3, 32, 32))
    batch = Batch(img, torch.from_numpy(target), torch.from_numpy(index))
    return batch, torch.from_numpy(places)


def checksum(key: str, value: torch.Tensor) -> np.ndarray:
    value = value.detach().double().numpy().ravel()
    probe = np.sin(0.7 + 1.618 * np.arange(value.size) + 0.01 * len(key))
    return np.array([np.sqrt((value**2).sum()), value @ probe])


def names(name: str, phase: str, state: dict) -> dict[str, str]:
    """RepDistiller's name of each entry of our method's own modules."""
    found = {}
    places = (FIRST if phase == "init" and name in FIRST else OWN).get(name, {})
    for theirs, ours in places.items():
        for key in state:
            if key.startswith(ours) and not key.endswith("num_batches_tracked"):
                rest = key.removeprefix(ours)
                found[theirs + rest.replace("alpha", "log_scale")] = key
    return found


def set_weights(net: torch.nn.Module, prefix: str) -> None:
    net.double()
    state = {
        key: torch.as_tensor(fill(prefix + key, tuple(x.shape)))
        for key, x in net.state_dict().items()
    }
    net.load_state_dict(state)


def start(pair, name: str, phase_name: str):
    """The distiller with the recorded weights, its phase, and the cfg."""
    mode = MODES[name]
    argv = ["--kd_mode", mode, "--t_model", "x", "--protocol", "crd", "--data_name", "cifar100"]
    args, chosen = toys.parse([*argv, *FLAGS.get(mode, [])], *pair, NUM_CLASS)
    cfg = toys.cfg(args, pair[1])
    t, s = (foreign.build(x, NUM_CLASS) for x in pair)
    distiller = Distiller(s, t, [chosen[mode]], toys.images(N_DATA, NUM_CLASS, 32))
    set_weights(t, "")
    set_weights(s, "student.")
    own = distiller.added.double().state_dict()
    lead = "init." if phase_name == "init" else ""
    for theirs, ours in names(name, phase_name, own).items():
        value = torch.as_tensor(fill(f"{name}.{lead}{theirs}", tuple(own[ours].shape)))
        own[ours].copy_(value)
    distiller.added.load_state_dict(own)
    phase = distiller.phases[0 if phase_name == "init" or len(distiller.phases) == 1 else 1]
    return distiller, phase, cfg


def total(distiller, phase, weights, terms: dict) -> torch.Tensor:
    """The loss that a step minimises, of its terms; the cross-entropy is the student's alone."""
    ce = distiller.lambda_ce * terms["ce"] if phase.ce else 0.0
    return ce + sum(w * terms[name] for name, w in weights.items() if name in terms)


@pytest.mark.parametrize("pair, name, phase_name", list(cases()))
def test_a_whole_step_is_the_public_codes(pair, name, phase_name):
    expected = recorded(pair)[name][phase_name]
    distiller, phase, cfg = start(pair, name, phase_name)
    planned = dict(schedule.schedule(distiller.phases, cfg))
    optimizer = utils.sgd(distiller.param_groups(phase), cfg, phase.nesterov)
    for group in optimizer.param_groups:
        group["lr"] = schedule.learning_rate(phase, 1, planned[phase], cfg)
        for key in ("lr", "momentum", "weight_decay", "nesterov"):
            assert group[key] == pytest.approx(expected[key]), key
    own = distiller.added.state_dict()
    theirs = names(name, phase_name, own)
    held = sum(len(group["params"]) for group in optimizer.param_groups)
    assert held == expected["held"] - uncounted(distiller, name, phase_name)

    precision = utils.Precision()
    losses, grads = [], None
    for step in range(3):
        batch, places = batch_of(step)
        if name == "crd":
            at = {int(i): row for i, row in zip(batch.index, places)}
            crd = distiller.added[0].loss
            crd.draw = lambda idx: torch.stack([at[int(i)] for i in idx])  # noqa: B023
        weights = schedule.loss_weights(distiller, phase, 0.0, cfg)
        terms = train_kd.train_step(distiller, phase, optimizer, batch, weights, precision)
        losses.append(total(distiller, phase, weights, terms).item())
        if step == 0:
            grads = {f"0.{k}": p.grad for k, p in distiller.student.net.named_parameters()}
            params = dict(distiller.added.named_parameters())
            grads |= {t: params[o].grad for t, o in theirs.items() if o in params}
            grads = {k: checksum(k, g) for k, g in grads.items() if g is not None}
    rtol, entries = CHAOTIC.get(name, (RTOL, RTOL)) if "MobileNetV2" in pair else (RTOL, RTOL)
    np.testing.assert_allclose(losses, expected["losses"], rtol=rtol)

    state = {f"0.{k}": x for k, x in distiller.student.net.state_dict().items()}
    own = distiller.added.state_dict()
    state |= {t: own[o] for t, o in theirs.items()}
    after = {k: checksum(k, x) for k, x in state.items()}
    # what is left over from the phase before, in modules that rest in the phase `main`
    rests = dict(abound=("1.",), factor=("2.",)).get(name, ()) if phase_name == "main" else ()
    learns = {k: x for k, x in expected["grads"].items() if not k.startswith(rests)}
    if phase_name == "init":  # the classifier, and what else is not on the maps' way, rests
        net = distiller.student.net
        rest = {f"0.{k}" for k, p in net.named_parameters() if not p.requires_grad}
        learns = {k: x for k, x in learns.items() if k not in rest}
    compare(grads, {k: x for k, x in learns.items() if known(k)}, entries)
    rests = ("1.",) if (name, phase_name) == ("abound", "main") else ()
    kept = {k: x for k, x in expected["after3"].items() if not k.startswith(rests) and known(k)}
    compare(after, kept, entries)


def known(key: str) -> bool:
    """Whether an entry is one of ours: there the embeddings of crd have two names."""
    return not key.startswith(IDLE + SHIFTED + ("6.embed", "6.contrast.params"))


def uncounted(distiller, name: str, phase_name: str) -> int:
    """How many tensors the public optimizer holds that ours does not: under a second name, or
    without an effect."""
    student = [p for p in distiller.student.net.parameters() if p.requires_grad]
    if phase_name == "init":
        return len(student) if name in ("abound", "fsp") else 0
    return dict(crd=4, factor=len(IDLE)).get(name, 0)


def compare(found: dict, expected: dict, rtol: float) -> None:
    """Same entries, same checksums, relative to the entry, or to a thousandth of the largest
    one."""
    scale = max(x[0] for x in expected.values())
    assert not expected.keys() - found.keys()
    for key, value in expected.items():
        atol = rtol * max(value[0], 1e-3 * scale)
        np.testing.assert_allclose(found[key], value, rtol=0, atol=atol, err_msg=key)
