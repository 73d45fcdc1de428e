"""Other people's networks: where their feature maps are found, and what is said where they are
not."""

import textwrap

import pytest
import torch
import torch.nn.functional as F
import torchvision
from messages import ends, names, one_line, refused
from torch import nn

from conftest import tiers

import network
import train_base
import train_kd
from engine import foreign
from engine.find_taps import ensure_taps


def img(size, n=2):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(5))


def taps(net, size=32, num_class=10, stages=None):
    """The taps found in `net`, and the lines printed about them."""
    lines = ensure_taps(net, type(net).__name__, num_class, size, stages)
    return net.taps, lines


class Reused(nn.Module):
    """One in-place ReLU for everything, and pooling as a function."""

    def __init__(self, num_class=10):
        super().__init__()
        widths = (3, 8, 12, 16)
        self.convs = nn.ModuleList(
            nn.Conv2d(*pair, 3, padding=1) for pair in zip(widths, widths[1:])
        )
        self.bns = nn.ModuleList(nn.BatchNorm2d(width) for width in widths[1:])
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(16, num_class)

    def forward(self, x):
        self.sums = []  # before the activation, computed in addition to the hooks
        for i, (conv, bn) in enumerate(zip(self.convs, self.bns)):
            x = bn(conv(x if i == 0 else F.max_pool2d(x, 2)))
            self.sums.append(x.clone())
            x = self.relu(x)
        return self.head(x.mean((2, 3)))


def test_in_place_relu_used_three_times():
    net = Reused()
    found, lines = taps(net)
    assert found["stem"] == "relu#1" and found["stages"] == ["relu#2", "relu#3"]
    assert found["preacts"] == ["relu#2:in", "relu#3:in"]
    assert found["feat"] == "head:in" and found["norms"] == ["bns.1", "bns.2"]
    assert "1 in-place activations made out of place" in lines[0] and not net.relu.inplace
    assert any("relu#2" in line and "12x16x16" in line for line in lines)
    s = network.Tapped(net, ("stem", "stages", "preacts", "feat"))(img(32))
    for caught, before in zip(s.preacts, net.sums[1:], strict=True):
        assert torch.equal(caught, before) and (before < 0).any()
    for before, after in zip([net.sums[0], *s.preacts], [s.stem, *s.stages], strict=True):
        assert torch.equal(before.relu(), after)
    assert torch.equal(s.feat, s.stages[-1].mean((2, 3)))
    assert [fm.shape[2] for fm in s.stages] == [16, 8]
    again = network.Tapped(net, ("stages",))
    for _ in range(2):  # calls are counted again in each forward pass
        assert torch.equal(again(img(32)).stages[0], s.stages[0])


def test_the_dry_pass_changes_nothing():
    net = Reused().train()
    net.bns[1].eval()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    torch.manual_seed(3)
    taps(net)
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(1)), "torch's generator stays as it is"
    assert net.training and not net.bns[1].training and net.bns[0].training
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


@pytest.mark.parametrize(
    "name, size, stem, stages, preacts",
    [
        (
            "resnet18",
            64,
            "relu",
            {"layer1": (64, 16), "layer2": (128, 8), "layer3": (256, 4), "layer4": (512, 2)},
            [f"layer{i}.1.relu#2:in" for i in (1, 2, 3, 4)],
        ),
        (
            "mobilenet_v2",
            32,
            "features.0",
            {
                "features.1": (16, 16),
                "features.3": (24, 8),
                "features.6": (32, 4),
                "features.13": (96, 2),
                "features.18": (1280, 1),
            },
            ["features.1", "features.3", "features.6", "features.13", "features.18.2:in"],
        ),
        (
            "squeezenet1_1",
            64,
            "features.1",
            {"features.4": (128, 15), "features.7": (256, 7), "features.12": (512, 3)},
            None,
        ),
        (
            "swin_t",
            64,
            "features.0.0",
            {
                "features.1": (96, 16),
                "features.3": (192, 8),
                "features.5": (384, 4),
                "permute": (768, 2),
            },
            ["features.1", "features.3", "features.5", "permute"],
        ),
    ],
)
def test_networks_of_torchvision(name, size, stem, stages, preacts):
    net = foreign.build(f"torchvision/{name}", 10, size).eval()
    found, lines = taps(net, size)
    assert found["stem"] == stem and found["stages"] == list(stages)
    assert found.get("preacts") == preacts
    text = "\n".join(lines)
    kinds = ["stem", "stages", *(["preacts"] if preacts else [])]
    with torch.no_grad():
        s = network.Tapped(net, kinds)(img(size))
    for (path, (width, side)), fm in zip(stages.items(), s.stages, strict=True):
        assert fm.shape == (2, width, side, side)
        assert f"{width}x{side}x{side}" in text and path in text
    if preacts:
        for path, before, after in zip(preacts, s.preacts, s.stages, strict=True):
            assert before.shape == after.shape and (before < 0).any()
            if path.endswith(".relu#2:in"):
                assert torch.equal(before.relu(), after)


@pytest.mark.slow
@pytest.mark.parametrize("name", torchvision.models.list_models(module=torchvision.models))
def test_every_network_of_torchvision(name):
    """Stages shrink, every tap gives a map, none is overwritten."""
    size = 224 if name.startswith(("vit", "maxvit", "swin")) else 128
    if name.startswith(("vit_h", "regnet_y_128gf", "vit_l")):
        pytest.skip("larger than this machine's patience; its smaller sisters are in")
    net = foreign.build(f"torchvision/{name}", 10, size).eval()
    found, _ = taps(net, size)
    kinds = [kind for kind in ("stem", "stages", "preacts", "feat") if found.get(kind)]
    with torch.no_grad():
        s = network.Tapped(net, kinds)(img(size))
    sides = [fm.shape[2] for fm in s.stages]
    assert len(sides) >= 2 and sides == sorted(sides, reverse=True)
    assert all(fm.ndim == 4 and fm.shape[2] == fm.shape[3] for fm in [s.stem, *s.stages])
    if "feat" in found:
        assert s.feat.ndim == 2
    else:
        assert name.startswith("squeezenet")


def small_vit(num_class=10, size=32, layers=6):
    return torchvision.models.VisionTransformer(
        image_size=size,
        patch_size=8,
        num_layers=layers,
        num_heads=2,
        hidden_dim=16,
        mlp_dim=32,
        num_classes=num_class,
    )


@pytest.mark.parametrize("layers, blocks", [(6, (1, 2, 4, 5)), (8, (1, 3, 5, 7)), (2, (0, 1))])
def test_tokens_of_a_transformer_become_maps(layers, blocks):
    net = small_vit(layers=layers).eval()
    found, _ = taps(net)
    assert found["stages"] == [f"encoder.layers.encoder_layer_{i}" for i in blocks]
    assert found["stem"] == "conv_proj"
    with refused("VisionTransformer"):
        network.Tapped(net, ("preacts",))
    with torch.no_grad():
        s = network.Tapped(net, ("stem", "stages", "feat"))(img(32))
        tokens = net.encoder.dropout(
            torch.cat([net.class_token.expand(2, -1, -1), net._process_input(img(32))], 1)
            + net.encoder.pos_embedding
        )
        for layer in net.encoder.layers[: blocks[0] + 1]:
            tokens = layer(tokens)
    assert all(fm.shape == (2, 16, 4, 4) for fm in s.stages) and s.feat.shape == (2, 16)
    # the class token stands before those of the image, which run row by row
    expected = tokens[:, 1:].transpose(1, 2).reshape(2, 16, 4, 4)
    torch.testing.assert_close(s.stages[0], expected)


def test_registers_are_dropped():
    """Eight tokens before a grid of two by two: no square of its own tells where the image
    begins."""

    class Registers(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches = nn.Conv2d(3, 4, 16, 16)
            self.blocks = nn.Sequential(*[nn.Sequential(nn.LayerNorm(4)) for _ in range(2)])
            self.head = nn.Linear(4, 10)

        def forward(self, x):
            x = self.patches(x).flatten(2).transpose(1, 2)
            x = self.blocks(torch.cat([torch.full((len(x), 5, 4), 9.0), x], 1))
            return self.head(x[:, 0])

    net = Registers()
    found, _ = taps(net)
    s = network.Tapped(net, ("stages",))(img(32))
    assert s.stages[0].shape == (2, 4, 2, 2) and found["layout"]["blocks.0"] == (5, 2)


def test_timm():
    pytest.importorskip("timm")
    net = foreign.build("timm/vit_tiny_patch16_224", 10, 32)
    found, _ = taps(net)
    assert found["stages"] == ["blocks.2", "blocks.5", "blocks.8", "blocks.11"]
    net = foreign.build("timm/resnet10t", 10, 64)
    found, _ = taps(net, 64)
    assert found["stages"] == [f"layer{i}" for i in (1, 2, 3, 4)]
    with refused("resnet10x", "resnet10t"):
        foreign.build("timm/resnet10x", 10)


def test_without_timm(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with refused("pip install timm"):
        foreign.build("timm/resnet10t", 10)


# --- taps by hand ---------------------------------------------------------------------------------


def test_stages_named_by_hand():
    net = foreign.build("torchvision/resnet18", 10, 32)
    stages = ("layer1.0", "layer2.0.conv2", "layer4.0.relu#1", "layer4")
    found, lines = taps(net, stages=stages)
    assert found["stages"] == list(stages) and all(
        any(stage in line for line in lines) for stage in stages
    )
    assert found["preacts"] == [
        "layer1.0.relu#2:in",
        "layer2.0.conv2",
        "layer4.0.relu#1:in",
        "layer4.1.relu#2:in",
    ]


def test_hand_named_taps_of_our_own_networks():
    net = network.build("resnet20", 10)
    stem, feat = net.taps["stem"], net.taps["feat"]
    found, _ = taps(net, stages=("layer1.0", "layer2", "layer3.1.relu2:in"))
    assert found["stem"] == stem and found["feat"] == feat
    assert found["preacts"] == ["layer1.0.relu2:in", "layer2.2.relu2:in", "layer3.1.relu2:in"]


@pytest.mark.parametrize(
    "stages, name",
    [
        (("layer9",), "layer9"),
        (("layer1", "fc"), "fc"),
        (("layer1#2",), "layer1#2"),
        (("layer1#x",), "layer1#x"),
        (("layer1:out",), "layer1:out"),
        (("layer2.0.bn2",), "layer2.0.bn2"),  # changed in place later: the block's sum
    ],
)
def test_wrong_taps(stages, name):
    net = foreign.build("torchvision/resnet18", 10, 32)
    with refused(name):
        taps(net, stages=stages)


# --- what does not work ---------------------------------------------------------------------------


class Functional(nn.Module):
    """ReLU as a function: no hook sees what lies before it."""

    def __init__(self, num_class=10):
        super().__init__()
        self.one, self.two = (
            nn.Sequential(nn.Conv2d(3, 8, 3, 2)),
            nn.Sequential(nn.Conv2d(8, 8, 3, 2)),
        )
        self.a, self.b = nn.Identity(), nn.Identity()
        self.head = nn.Linear(8, num_class)

    def forward(self, x):
        x = self.a(F.relu(self.one(x)))
        return self.head(self.b(F.relu(self.two(x))).mean((2, 3)))


def test_a_functional_relu_has_no_before():
    net = Functional()
    found, lines = taps(net)
    assert found["stages"] == ["a", "b"] and "preacts" not in found
    assert any(names(line, "preacts") for line in lines)
    network.Tapped(net, ("stages", "feat"))
    with refused("Functional"):
        network.Tapped(net, ("preacts",))


@pytest.mark.parametrize(
    "net, named",
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)), ["Sequential"]),
        (nn.Sequential(nn.Flatten(), nn.Linear(3072, 7)), ["Sequential", (2, 7)]),
        (nn.Sequential(nn.Flatten(), nn.Linear(48, 10)), ["Sequential", 32]),
        (nn.LSTM(32, 4), ["LSTM", 32]),
    ],
)
def test_what_is_no_network_for_images(net, named):
    with refused(*named):
        taps(net)


# --- functions in files ---------------------------------------------------------------------------

NET = """
    import torch.nn as nn
    import torchvision

    def build(num_class):
        relu = nn.ReLU(inplace=True)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), relu,
            nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), relu,
            nn.MaxPool2d(2), nn.Conv2d(16, 24, 3, padding=1), nn.BatchNorm2d(24), relu,
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, num_class),
        )

    def vit(num_class):
        return torchvision.models.VisionTransformer(16, 4, 4, 2, 16, 32, num_classes=num_class)

    def fails(num_class):
        raise OSError("no such weights\\nand more")

    def nothing(num_class):
        return "a network"
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("nets") / "my_net.py"
    path.write_text(textwrap.dedent(NET))
    return path


@pytest.mark.parametrize(
    "name, named",
    [
        ("{dir}/none.py:build", "{dir}/none.py"),
        ("{file}:bild", "{file} bild build"),
        ("{file}:fails", "{file} fails OSError"),
        ("{file}:nothing", "{file} nothing str"),
        ("{dir}/broken.py:build", "{dir}/broken.py SyntaxError"),
        ("torchvision/resnet19", "torchvision resnet19 resnet18"),
        ("torchvision/", "torchvision/"),
        ("torchvision/fasterrcnn_resnet50_fpn", "torchvision fasterrcnn_resnet50_fpn"),
        ("resnet21", "resnet21 resnet20"),
    ],
)
def test_names_without_a_network(file, name, named):
    (file.parent / "broken.py").write_text("def build(:\n")
    places = dict(dir=file.parent, file=file)
    with refused(*named.format(**places).split()):
        foreign.build(name.format(**places), 10)


def test_file_names():
    assert foreign.file_name("resnet20") == "resnet20"
    assert foreign.file_name("torchvision/resnet18") == "torchvision-resnet18"
    assert foreign.file_name("/a/b.c/my_net.py:build") == "my_net-build"
    assert foreign.file_name("my_net.py:build") == "my_net-build"
    assert foreign.file_name("hf/google/vit-base-patch16-224") == "hf-vit-base-patch16-224"
    assert foreign.file_name("hf//a/b/vit/") == "hf-vit"


# --- weights of a library -------------------------------------------------------------------------


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """'Downloaded' weights of torchvision's squeezenet1_1 and mobilenet_v3_small."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    for name in ("squeezenet1_1", "mobilenet_v3_small"):
        torch.manual_seed(1)
        net = torchvision.models.get_model(name, weights=None)
        weights = torchvision.models.get_model_weights(name).DEFAULT
        # the name's hash is checked on download alone
        torch.save(net.state_dict(), folder / weights.url.rpartition("/")[2])
    return folder


@pytest.mark.parametrize("name", ["squeezenet1_1", "mobilenet_v3_small"])
def test_pretrained_weights_with_a_classifier_of_our_own(cached, name):
    torch.manual_seed(1)
    original = torchvision.models.get_model(name, weights=None).state_dict()
    whole = foreign.build(f"torchvision/{name}", 1000, 64, pretrained=True).state_dict()
    assert all(torch.equal(value, whole[key]) for key, value in original.items())
    torch.manual_seed(0)
    net = foreign.build(f"torchvision/{name}", 10, 64, pretrained=True)
    state = net.state_dict()
    new = [key for key, value in original.items() if value.shape != state[key].shape]
    assert len(new) == 2 and all(
        torch.equal(value, state[key]) for key, value in original.items() if key not in new
    )
    weight, bias = (state[key] for key in new)
    assert weight.std().item() == pytest.approx(0.01, rel=0.1) and not bias.any()
    assert net.eval()(img(64)).shape == (2, 10)


def test_pretrained_weights_that_cannot_be_had(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def offline(*args, **kwargs):
        raise OSError("<urlopen error [Errno -2] Name or service not known>")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with refused("resnet18", tmp_path / "hub" / "checkpoints"):
        foreign.build("torchvision/resnet18", 10, 64, pretrained=True)
    with refused("resnet20"):
        foreign.build("resnet20", 10, 32, pretrained=True)


@pytest.mark.parametrize(
    "script, flags, file",
    [
        (train_base, "--pretrained --net_name", "mobilenet_v2-b0353104.pth"),
        (train_kd, "--s_pretrained --t_name resnet8 --s_name", "mobilenet_v2-b0353104.pth"),
        (train_kd, "--t_pretrained --s_name resnet8 --t_name", "resnet50-0676ba61.pth"),
    ],
)
def test_offline_a_script_says_one_line(script, flags, file, tmp_path, monkeypatch, capfd):
    """The file asked for is torchvision's first one, as in the tables; its second ones are
    better."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    wanted = []

    def offline(url, *args, **kwargs):
        wanted.append(url.rpartition("/")[2])
        raise OSError("no route to host\nsecond line")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    name = file.rpartition("-")[0]
    argv = [*flags.split(), f"torchvision/{name}", "--save_root", str(tmp_path / "runs"), *DATA]
    with pytest.raises(SystemExit) as stop:
        script.main([*argv, *["--kd_mode", "dml"] * (script is train_kd)])
    *others, line = capfd.readouterr().err.splitlines()
    assert all(other.startswith("Downloading: ") for other in others), "torch's own"
    assert wanted == [file] and stop.value.code == 2 and not (tmp_path / "runs").exists()
    one_line(line, name, "no route to host", tmp_path / "cache/hub/checkpoints")


# --- through the scripts --------------------------------------------------------------------------

QUICK = ["--cuda", "0", "--amp", "off", "--epochs", "1", "--batch_size", "216"]
DATA = ["--data_name", "digits", "--img_size", "16", *QUICK]


@pytest.fixture(scope="module")
def teachers(file, tmp_path_factory):
    """{name: checkpoint} of a network and a small transformer of somebody's file, one epoch old."""
    root = tmp_path_factory.mktemp("runs")
    for function in ("build", "vit"):
        name = f"{file}:{function}"
        train_base.main(["--net_name", name, "--save_root", str(root), "--note", function, *DATA])
    return {f: root / f / "model_best.pth.tar" for f in ("build", "vit")}


def distil(argv, capsys):
    train_kd.main([*argv, *QUICK])
    return capsys.readouterr().out


@pytest.mark.parametrize("mode", tiers(["at", "ofd", "crd", "reviewkd"]))
def test_a_network_of_ones_own(teachers, file, mode, tmp_path, capsys):
    out = distil(
        ["--kd_mode", mode, "--t_model", str(teachers["build"]), "--t_name", f"{file}:build"]
        + ["--s_name", "torchvision/shufflenet_v2_x0_5" if mode == "at" else "resnet8"]
        + ["--save_root", str(tmp_path)],
        capsys,
    )
    assert "stage 1" in out and "kd " in out
    (folder,) = tmp_path.iterdir()
    assert folder.name.startswith(f"{mode}-digits-my_net-build-")
    assert (folder / "model_best.pth.tar").exists()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["st", "at"])
def test_a_transformer_teaches(teachers, file, mode, tmp_path, capsys):
    out = distil(
        ["--kd_mode", mode, "--t_model", str(teachers["vit"]), "--t_name", f"{file}:vit"]
        + ["--s_name", "resnet8", "--save_root", str(tmp_path)],
        capsys,
    )
    assert "encoder.layers.encoder_layer_3" in out and "16x4x4" in out


@pytest.mark.parametrize(
    "argv, named",
    [
        (
            ["--kd_mode", "ofd", "--t_name", "{file}:vit", "--s_name", "resnet8"],
            "VisionTransformer",
        ),
        (["--kd_mode", "lwm", "--t_name", "{file}:vit", "--s_name", "resnet8"], "--kd_mode lwm"),
        (["--kd_mode", "at", "--s_name", "resnet8"], "--t_name {file}:vit"),
        (
            ["--kd_mode", "at", "--t_name", "{file}:vit", "--s_name", "resnet8", "--t_taps", "fc"],
            "fc",
        ),
        (
            ["--kd_mode", "at", "--t_name", "{file}:vit", "--s_name", "resnet8", "--t_pretrained"],
            "--t_model {teacher}",
        ),
        (["--kd_mode", "at", "--t_name", "{file}:build", "--s_name", "resnet8"], "{teacher}"),
    ],
)
def test_one_line_for_what_does_not_fit(teachers, file, argv, named, tmp_path, capsys):
    filled = [str(x).format(file=file) for x in argv]
    teacher, runs = str(teachers["vit"]), str(tmp_path / "runs")
    with ends(capsys, *named.format(file=file, teacher=teacher).split()):
        train_kd.main([*filled, "--t_model", teacher, "--save_root", runs, *QUICK])
    assert not (tmp_path / "runs").exists()
