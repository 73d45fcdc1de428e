"""Checkpoints of any shape: whoever wrapped the weights, they are found, whole or not at all."""

import copy
import time

import pytest
import torch
from messages import names, refused
from torch import nn

import network
from engine.checkpoint import find_weights, read_checkpoint

FILE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, num_class):
        super().__init__()
        self.model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.fc = nn.Linear(4, num_class)
    def forward(self, x):
        return self.fc(self.model(x).mean((2, 3)))
class Inner(nn.Module):
    def __init__(self, num_class):
        super().__init__()
        self.model = Net(num_class)
    def forward(self, x):
        return self.model(x)
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("nets") / "nets.py"
    path.write_text(FILE)
    return path


def under(prefix, state):
    return {prefix + key: x for key, x in state.items()}


def other(state):
    """The weights of another network of the same kind."""
    return {key: x + 1 for key, x in state.items()}


def averaged(state):
    """As torch.optim.swa_utils.AveragedModel has them."""
    return {"n_averaged": torch.tensor(7), **under("module.", state)}


OPTIMIZER = dict(state={0: dict(momentum_buffer=torch.ones(3, 3))}, param_groups=[dict(lr=0.1)])
LIGHTNING = {
    "epoch": 3,
    "pytorch-lightning_version": "2.4.0",
    "optimizer_states": [OPTIMIZER],
    "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.5)}},
    "hyper_parameters": {"lr": 0.1},
}
CRITERION = {"criterion.weight": torch.ones(10), "criterion.table": torch.ones(10, 4)}

# name: (state -> checkpoint, --t_key or None, what the notes must name)
SHAPES = {
    "Lightning, model.": (
        lambda s: LIGHTNING | dict(state_dict=under("model.", s) | CRITERION),
        None,
        ["criterion.weight"],
    ),
    "Lightning, net.": (lambda s: LIGHTNING | dict(state_dict=under("net.", s)), None, []),
    "Lightning, backbone.": (
        lambda s: LIGHTNING | dict(state_dict=CRITERION | under("backbone.", s)),
        None,
        ["criterion.weight"],
    ),
    "compiled, then DataParallel": (lambda s: under("_orig_mod.module.", s), None, []),
    "three prefixes": (lambda s: dict(model=under("module._orig_mod.model.", s)), None, []),
    "three in another order": (lambda s: under("model.module._orig_mod.", s), None, []),
    "AveragedModel": (averaged, None, ["n_averaged"]),
    "EMA next to": (
        lambda s: dict(model=s, model_ema=averaged(other(s)), optimizer=OPTIMIZER),
        None,
        ["model_ema", "--t_key"],
    ),
    "EMA taken": (
        lambda s: dict(model=other(s), model_ema=averaged(s), optimizer=OPTIMIZER),
        "model_ema",
        ["n_averaged"],
    ),
    "timm's EMA": (
        lambda s: dict(arch="x", state_dict=other(s), state_dict_ema=s, optimizer=OPTIMIZER),
        "state_dict_ema",
        [],
    ),
    "only an EMA": (lambda s: dict(ema=s, epoch=3, optimizer=OPTIMIZER), None, []),
    "student and teacher": (lambda s: dict(student=other(s), teacher=s, epoch=1), "teacher", []),
    "student and teacher, deeper": (
        lambda s: dict(run=1, model=dict(student=dict(state_dict=other(s)), teacher=dict(net=s))),
        "model.teacher",
        [],
    ),
    "student. and teacher. in one": (
        lambda s: LIGHTNING | dict(state_dict=under("student.", other(s)) | under("teacher.", s)),
        "teacher",
        [],
    ),
    "one in another": (lambda s: dict(epoch=1, model=dict(state_dict=s, epoch=2)), None, []),
    "with averages in one": (
        lambda s: dict(state_dict=under("model.", s) | under("ema_model.", other(s))),
        None,
        ["ema_model.*"],
    ),
}


@pytest.mark.parametrize("known", ["recognised", "own", "own in model."])
@pytest.mark.parametrize("shape", SHAPES)
def test_weights_of_any_shape(shape, known, file, tmp_path):
    wrap, key, noted = SHAPES[shape]
    name = {"own": f"{file}:Net", "own in model.": f"{file}:Inner"}.get(known)
    blank = find_weights(name or "resnet8", None, "t_name", "t_model")
    state = blank.load(10, 12).state_dict()
    state = {key: x.clone() for key, x in state.items()}
    torch.save(wrap(state), tmp_path / "x.pth")
    found = find_weights(
        name, str(tmp_path / "x.pth"), "t_name", "t_model", key=key, key_flag="t_key"
    )
    assert found.name == (name or "resnet8") and found.classes(10, 12)[0] == 10
    assert name is not None or found.meta["num_class"] == 10
    net = found.build(10, 0, 12)
    torch.testing.assert_close(dict(net.state_dict()), state, rtol=0, atol=0)
    assert all(any(names(line, x) for line in found.notes) for x in noted), found.notes
    about = [line for line in found.notes if "x.pth" in line]
    assert bool(about) == bool(noted)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spoil", ["missing", "more", "of another shape"])
def test_never_by_halves(shape, spoil, file, tmp_path):
    """What lacks an entry or has one too many is refused, and the message names this entry."""
    wrap, key, _ = SHAPES[shape]
    name = f"{file}:Net"
    net = find_weights(name, None, "t_name", "t_model").load(10, 12)
    state = {key: x.clone() for key, x in net.state_dict().items()}
    if spoil == "missing":
        del state["fc.bias"]
    elif spoil == "more":
        state["fc.more"] = torch.ones(2, 2)
    else:
        state["fc.bias"] = torch.ones(3)
    torch.save(wrap(state), tmp_path / "x.pth")
    before = copy.deepcopy(net.state_dict())
    with refused(tmp_path / "x.pth", "fc.more" if spoil == "more" else "fc.bias"):
        found = find_weights(name, str(tmp_path / "x.pth"), "t_name", "t_model", key=key)
        found.make = lambda *_: net
        found.build(10, 0, 12)
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("flat", [True, False])
def test_several_networks_are_not_guessed(alike, flat, tmp_path):
    one, two = (network.build(x, 10).state_dict() for x in ("resnet8", "resnet14"))
    both = dict(student=one, teacher=other(one) if alike else two)
    if flat:
        both = dict(state_dict={f"{k}.{key}": x for k, s in both.items() for key, x in s.items()})
    torch.save(both, tmp_path / "x.pth")
    file = str(tmp_path / "x.pth")
    with refused(file, "student", "teacher", "--t_key"):
        find_weights(None, file, "t_name", "t_model", key_flag="t_key")
    for key, state in dict(student=one, teacher=other(one) if alike else two).items():
        found = find_weights(None, file, "t_name", "t_model", key=key, key_flag="t_key")
        net = found.build(10, 0, 12)
        torch.testing.assert_close(dict(net.state_dict()), dict(state), rtol=0, atol=0)
    if not alike:  # the name tells, where only one fits
        found = find_weights("resnet14", file, "t_name", "t_model") if flat else None
        assert not flat or found.build(10, 0, 12)


def test_a_file_of_very_many_entries(tmp_path):
    """Is read in a time that grows with their number, not with its square."""
    x, state = torch.ones(1, 1), {}
    for i in range(200):
        state |= {f"a{i}.b.c.d.e.f.g.w{k}": x for k in range(3)}
    state |= {f"m.n{i}.weight": x for i in range(30_000)}
    torch.save(state, tmp_path / "x.pth")
    began = time.process_time()
    with refused("x.pth", "resnet8"):
        find_weights("resnet8", str(tmp_path / "x.pth"), "t_name", "t_model").build(10, 0, 12)
    with refused("x.pth", "t_name"):
        find_weights(None, str(tmp_path / "x.pth"), "t_name", "t_model")
    assert time.process_time() - began < 20


@pytest.mark.parametrize("key", ["techer", "epoch", "teacher.fcc", ".", "optimizer"])
def test_a_key_without_weights(key, tmp_path):
    state = network.build("resnet8", 10).state_dict()
    torch.save(dict(teacher=state, epoch=3, optimizer=OPTIMIZER), tmp_path / "x.pth")
    file = str(tmp_path / "x.pth")
    with refused("--t_key", key, file):
        find_weights("resnet8", file, "t_name", "t_model", key=key, key_flag="t_key").build(
            10, 0, 9
        )


def test_the_peer_of_mutual_learning_by_key(tmp_path):
    """Our own file of two networks names the student's alone."""
    one, two = (network.build(x, 10).state_dict() for x in ("resnet8", "resnet14"))
    meta = dict(network="resnet8", num_class=10)
    torch.save(dict(snet=one, net2=one, net1=two, meta=meta), tmp_path / "x.pth")
    found = find_weights(None, str(tmp_path / "x.pth"), "t_name", "t_model", key="net1")
    assert found.name == "resnet14" and found.build(10, 0, 12)


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, x):
        return self.fc(x)


def test_programs_are_refused_with_what_to_do(tmp_path):
    net, x = Plain().eval(), torch.zeros(2, 3)
    torch.jit.trace(net, x).save(str(tmp_path / "script.pt"))
    torch.export.save(torch.export.export(net, (x,)), tmp_path / "program.pt2")
    torch.export.save(torch.export.export(net, (x,)), tmp_path / "renamed.pth")
    (tmp_path / "graph.onnx").write_bytes(b"\x08\x08\x12\x07pytorch")
    (tmp_path / "renamed_too.pth").write_bytes(b"\x08\x08\x12\x07pytorch")
    for name, told in {
        "script.pt": ["TorchScript", "torch.jit.load*"],
        "program.pt2": ["torch.export", "torch.export.load*"],
        "renamed.pth": ["torch.export", "torch.export.load*"],
        "graph.onnx": ["ONNX"],
        "renamed_too.pth": ["ONNX"],
    }.items():
        with refused(tmp_path / name, *told) as said:
            read_checkpoint(tmp_path / name)
        if "python -c" in said[0]:
            code = said[0].partition('python -c "')[2].rstrip('"')
            exec(code.replace(f"{(tmp_path / name).stem}.con", f"{tmp_path / 'out'}.con"), {})
            state = read_checkpoint(tmp_path / "out.converted.pth")
            torch.testing.assert_close(state, dict(net.state_dict()))
