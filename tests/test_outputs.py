"""Networks that return more than logits: the logits are taken, and said; what is ambiguous is
refused."""

import json
import sys
from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
import torchvision
from conftest import tiers
from messages import ends, names, refused
from torch import Tensor, nn

import network
import train_base
import train_kd
from engine import foreign
from engine.checkpoint import Weights, find_weights
from engine.find_taps import check_trainable, dry_pass, ensure_taps
from engine.outputs import forward_logits, notes_of
from tools import eval as evaluation
from tools import export

QUICK = ["--cuda", "0", "--amp", "off", "--epochs", "1", "--batch_size", "648"]
DATA = ["--data_name", "digits", "--img_size", "12"]


@dataclass
class Answer:
    """As transformers has it: an object."""

    logits: Tensor
    hidden_states: tuple = ()


class ModelOutput(OrderedDict):
    """As transformers has it: a dict whose entries are attributes, too."""

    def __getattr__(self, name):
        return self[name]


Aux = namedtuple("Aux", "logits aux_logits")


class Net(nn.Module):
    """What it makes of logits and features is `give`; in training, of these `give_in_training`."""

    def __init__(self, give, give_in_training=None, num_class=10):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        self.deep = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1), nn.ReLU())
        self.fc = nn.Linear(12, num_class)
        self.give = [give, give_in_training or give]

    def logits(self, img):
        feat = self.deep(self.body(img)).mean((2, 3))
        return self.fc(feat), feat

    def forward(self, img):
        return self.give[self.training](*self.logits(img))


RETURNED = {
    "tuple": lambda out, feat: (out, feat),
    "list, features first": lambda out, feat: [feat, out],
    "tuple of one": lambda out, feat: (out,),
    "named tuple": lambda out, feat: Aux(out, 2 * out),
    "dict": lambda out, feat: dict(logits=out, aux=2 * out),
    "dict, out": lambda out, feat: dict(out=out, aux=2 * out),
    "dict, output": lambda out, feat: dict(output=out, features=feat),
    "dict, a name of its own": lambda out, feat: dict(scores=out, features=feat),
    "object": lambda out, feat: Answer(out, (feat, 2 * out)),
    "ModelOutput": lambda out, feat: ModelOutput(loss=None, logits=out, cls_logits=3 * out),
    "twice the same": lambda out, feat: (out, out),
}


@pytest.mark.parametrize("kind", RETURNED)
@pytest.mark.parametrize("training", [False, True])
def test_the_logits_are_taken(kind, training):
    """In every mode, and also where it is in training alone that there is more."""
    plain = (lambda out, feat: out) if training else None
    net = Net(plain or RETURNED[kind], RETURNED[kind])
    img = torch.randn(3, 3, 12, 12)
    keys, hooks = list(net.state_dict()), 0
    lines = ensure_taps(net, "mine", 10, 12)
    if not training:
        assert len(notes_of(net)) == 1 and not set(notes_of(net)) & set(lines)
        hooks = 1
    assert len(net._forward_hooks) == hooks
    notes = check_trainable(net, "mine", 10, 12)
    assert len(notes) == 1 and names(notes[0], "mine", "logits")
    assert ("in training" in notes[0]) == training
    for mode in (False, True):
        expected = net.train(mode).logits(img)[0]
        assert torch.equal(net(img), expected)
    assert list(net.state_dict()) == keys and len(net._forward_hooks) == 1
    s = network.Tapped(net.eval(), ("stages", "feat"))(img)
    assert torch.equal(s.out, net(img)) and torch.equal(net.fc(s.feat), s.out)


@pytest.mark.parametrize(
    "give, named",
    [
        (lambda out, feat: (out, 2 * out), ["tuple", "0", "1", "logits"]),
        (lambda out, feat: dict(a=out, b=2 * out), ["dict", "a", "b", "logits"]),
        (lambda out, feat: dict(out=out, output=2 * out), ["dict", "out", "output", "logits"]),
        (lambda out, feat: dict(features=feat), ["dict", "logits"]),
        (lambda out, feat: (feat, feat), ["tuple", "logits"]),
        (lambda out, feat: (), ["tuple", "logits"]),
        (lambda out, feat: None, ["NoneType", "logits"]),
        (lambda out, feat: "out", ["str", "logits"]),
        (lambda out, feat: Answer(feat), ["Answer", "logits"]),
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_what_is_ambiguous_is_one_line(give, named, training):
    net = Net((lambda out, feat: out) if training else give, give)
    with refused("mine", *named):
        dry_pass(net, "mine", 10, 12)
        check_trainable(net, "mine", 10, 12)
    with refused("mine", *named):
        forward_logits(net, "mine", 10, 12, training)


@pytest.mark.parametrize("name", ["resnet8", "torchvision/squeezenet1_1"])
def test_a_network_of_logits_gets_no_hook(name):
    """Nothing is done in a step for those who need none of this."""
    net = Weights(name).build(10, 0, 32)
    check_trainable(net.requires_grad_(True), name, 10, 32)
    assert not net._forward_hooks and not net._forward_pre_hooks and not notes_of(net)


def test_a_pass_on_trial_leaves_no_trace():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5))
    net = nn.Sequential(net, nn.Flatten(), nn.LazyLinear(10))
    net(torch.zeros(2, 3, 8, 8))
    net.eval()
    before = {key: x.clone() for key, x in net.state_dict().items()}
    drawn = torch.get_rng_state()
    forward_logits(net, "mine", 10, 8, training=True)
    torch.testing.assert_close(dict(net.state_dict()), before, rtol=0, atol=0)
    assert torch.equal(drawn, torch.get_rng_state()) and not net[0][1].training


FILE = """
import torch
import torchvision
from torch import nn

class Net(nn.Module):
    def __init__(self, num_class):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.deep = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(8, 12, 3), nn.ReLU())
        self.fc, self.aux = nn.Linear(12, num_class), nn.Linear(8, num_class)
    def forward(self, x):
        x = self.body(x)
        logits, aux = self.fc(self.deep(x).mean((2, 3))), self.aux(x.mean((2, 3)))
        return dict(logits=logits, aux=aux, features=x)
class InTraining(Net):
    def forward(self, x):
        out = super().forward(x)
        return (out["logits"], out["features"]) if self.training else out["logits"]
class WithTaps(Net):
    def __init__(self, num_class):
        super().__init__(num_class)
        self.taps = dict(stem="body", stages=["body", "deep"], preacts=["body.1", "deep.1"],
                         feat="fc:in")
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("nets") / "nets.py"
    path.write_text(FILE)
    return path


@pytest.mark.parametrize("kind", tiers(["Net", "InTraining", "WithTaps"]))
def test_through_the_scripts(kind, file, tmp_path, capsys):
    """Trained, as a teacher and as a student, evaluated and exported."""
    name, where = f"{file}:{kind}", ["--save_root", str(tmp_path)]
    train_base.main(["--net_name", name, *DATA, *QUICK, *where, "--note", "base"])
    assert "logits" in capsys.readouterr().out
    teacher = str(tmp_path / "base/model_best.pth.tar")
    both = ["--t_name", name, "--t_model", teacher, "--s_name", name, *QUICK, *where]
    for mode in ("st+at", "dml"):
        train_kd.main(["--kd_mode", mode, *both, "--note", mode])
        assert "is taken as the logits" in capsys.readouterr().out
    saved = str(tmp_path / "st+at/model_best.pth.tar")
    best = json.loads((tmp_path / "st+at/result.json").read_text())["best"]
    result = evaluation.main([saved, "--net", name, "--cuda", "0", "--amp", "off"])
    assert result["top1"] == pytest.approx(best, abs=1e-3)
    export.main([saved, "--net", name, "--format", "torch"])
    program = torch.export.load(tmp_path / "st+at/model_best.pt2").module()
    assert program(torch.zeros(3, 3, 12, 12)).shape == (3, 10)


@pytest.mark.slow
@pytest.mark.parametrize("name, size", [("googlenet", 64), ("inception_v3", 96)])
def test_auxiliary_classifiers_of_torchvision(name, size, tmp_path, monkeypatch):
    """A file that has them gives the network that has them; its logits alone are given, in training
    too."""
    if name == "inception_v3":
        size = 299
    whole = torchvision.models.get_model(
        name, weights=None, num_classes=7, aux_logits=True, init_weights=False
    )
    torch.save(whole.state_dict(), tmp_path / "x.pth")
    found = find_weights(f"torchvision/{name}", str(tmp_path / "x.pth"), "t_name", "t_model")
    net = found.load(7, size)
    torch.testing.assert_close(dict(net.state_dict()), dict(whole.state_dict()), rtol=0, atol=0)
    out = forward_logits(net, name, 7, size, training=True)
    assert out.shape == (2, 7) and names(notes_of(net)[0], name, "logits")
    assert torch.is_tensor(net.train()(torch.zeros(2, 3, size, size)))
    plain = foreign.build(f"torchvision/{name}", 7, size)
    assert not any("aux" in key.lower() for key in plain.state_dict())


# --- networks without a classifier ----------------------------------------------------------------

BACKBONES = """
import torch
from torch import nn

class Pooled(nn.Module):
    def __init__(self, num_class):
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.two = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(8, 12, 3), nn.ReLU())
        self.squeeze, self.norm = nn.Linear(12, 12), nn.LayerNorm(12)
    def forward(self, x):
        x = self.two(self.one(x))
        x = x * self.squeeze(x.mean((2, 3)))[:, :, None, None].sigmoid()
        return self.norm(x.mean((2, 3)))
class Map(Pooled):
    def forward(self, x):
        return dict(map=self.two(self.one(x)))
"""


@pytest.mark.parametrize("kind", tiers(["Pooled", "Map"], "Map"))
def test_a_backbone_teaches_features(kind, tmp_path, capsys):
    (tmp_path / "nets.py").write_text(BACKBONES)
    name, file = f"{tmp_path}/nets.py:{kind}", str(tmp_path / "x.pth")
    torch.save(foreign.build(name, 10).state_dict(), file)
    argv = ["--t_name", name, "--t_model", file, "--s_name", "resnet8", *DATA, *QUICK]
    argv += ["--save_root", str(tmp_path / "runs")]
    train_kd.main(["--kd_mode", "at", *argv])
    out = capsys.readouterr().out
    assert "teacher test_top1" not in out
    assert any(names(line, name, "logits", "feature maps") for line in out.splitlines())
    with ends(capsys, name, "logits"):
        train_kd.main(["--kd_mode", "st", *argv, "--note", "st"])
    if kind == "Pooled":  # whose output is what others feed their classifier
        train_kd.main(["--kd_mode", "rkd+pkt", *argv, "--note", "feat"])
        assert any(names(x, "feat", "norm", "12") for x in capsys.readouterr().out.splitlines())
    else:
        with ends(capsys, "Map", "pooled"):
            train_kd.main(["--kd_mode", "rkd", *argv, "--note", "feat"])


def test_a_library_s_backbone_has_no_classes():
    pytest.importorskip("timm")
    assert foreign.library_classes("timm/vit_small_patch14_dinov2") == (0, None)
    assert foreign.library_classes("timm/resnet18")[0] == 1000


# --- transformers ---------------------------------------------------------------------------------


def test_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with refused("hf/google/vit", "pip install transformers"):
        foreign.build("hf/google/vit", 10)


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """A folder as save_pretrained writes it."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=12,
        patch_size=4,
        num_labels=10,
        id2label={i: f"the {i}" for i in range(10)},
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("hf") / "vit"
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    return folder


def test_transformers(vit, tmp_path, capsys):
    name, where = f"hf/{vit}", ["--save_root", str(tmp_path)]
    own = foreign.build(name, 10, 12, pretrained=True).eval()
    img = torch.randn(2, 3, 12, 12)
    assert foreign.library_classes(name) == (10, [f"the {i}" for i in range(10)])
    lines = ensure_taps(own, name, 10, 12)
    assert torch.is_tensor(own(img)) and len(own.taps["stages"]) == 4, lines
    s = network.Tapped(own, ("stages", "feat"))(img)
    assert [tuple(x.shape) for x in s.stages] == [(2, 16, 3, 3)] * 4
    fresh = foreign.build(name, 7, 16)
    assert forward_logits(fresh, name, 7, 16).shape == (2, 7)

    small = ["--save_root", str(tmp_path), *DATA, *QUICK]
    train_kd.main(
        ["--kd_mode", "st+at", "--t_pretrained", "--t_name", name, "--s_name", name, *small]
        + ["--note", "pair"]
    )
    assert "logits" in capsys.readouterr().out
    (tmp_path / "classes.txt").write_text("\n".join(f"the {9 - i}" for i in range(10)))
    train_kd.main(
        ["--kd_mode", "st", "--t_pretrained", "--t_name", name, "--s_name", "resnet8", *small]
        + ["--t_classes", str(tmp_path / "classes.txt"), "--note", "mapped"]
    )
    args = json.loads((tmp_path / "mapped/args.json").read_text())
    assert args["teacher"]["outputs"] == list(range(10))[::-1]
    train_base.main(["--net_name", name, *DATA, *QUICK, *where, "--note", "base"])
    file = str(tmp_path / "base/model_best.pth.tar")
    evaluation.main([file, "--cuda", "0", "--net", name])


def test_a_backbone_of_transformers(tmp_path, capsys):
    """Whose classifier would be a fresh one."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=12,
        patch_size=4,
        num_labels=10,
    )
    transformers.Dinov2Model(config).save_pretrained(tmp_path / "dino")
    name = f"hf/{tmp_path / 'dino'}"
    argv = ["--t_pretrained", "--t_name", name, "--s_name", "resnet8", *DATA, *QUICK]
    argv += ["--save_root", str(tmp_path / "runs")]
    train_kd.main(["--kd_mode", "at+rkd", *argv])
    assert "alone" in capsys.readouterr().out
    with ends(capsys, "--t_pretrained", name, "0", "10", "st"):
        train_kd.main(["--kd_mode", "st", *argv, "--note", "st"])


@pytest.mark.parametrize("name", ["hf/nowhere/at/all", "hf/{tmp}"])
def test_no_such_model(name, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    name = name.format(tmp=tmp_path)
    for pretrained in (False, True):
        with refused(name):
            foreign.build(name, 10, 12, pretrained)
