"""Grey images and networks of one channel."""

from pathlib import Path

import numpy as np
import pytest
import torch
from messages import ends, names
from mistakes import pictures
from PIL import Image
from torch import nn

import dataset
import train_base
import train_kd
from engine import foreign
from engine.channels import bare, channels_of, give_one_channel, is_grey, make_one_channel
from engine.checkpoint import read_checkpoint
from tools import eval as evaluation
from tools import export

FILE = """
import torch
from torch import nn

class Grey(nn.Module):
    def __init__(self, num_class):
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.two = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(8, 12, 3), nn.ReLU())
        self.fc = nn.Linear(12, num_class)
    def forward(self, x):
        assert x.shape[1] == 1
        return self.fc(self.two(self.one(x)).mean((2, 3)))
"""
QUICK = ["--cuda", "0", "--amp", "off", "--epochs", "1", "--batch_size", "8"]


@pytest.fixture(scope="module")
def grey(tmp_path_factory):
    """A network of one channel, and a folder of grey images, as PNG of one channel."""
    root = tmp_path_factory.mktemp("grey")
    (root / "nets.py").write_text(FILE)
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for label, name in enumerate(("cat", "dog")):
            (root / split / name).mkdir(parents=True)
            for i in range(8):
                pixels = rng.integers(100 * label, 100 + 100 * label, (12, 12), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


@pytest.mark.parametrize(
    "size",
    [[], pytest.param(["--img_size", "97", "--workers", "0"], marks=pytest.mark.slow)],
    ids=["as is", "97"],
)
def test_a_folder_of_grey_images(grey, size, tmp_path, capsys):
    """Trained, as teacher and as student next to networks of three channels, evaluated,
    exported."""
    name, where = f"{grey}/nets.py:Grey", ["--save_root", str(tmp_path)]
    data = ["--data_name", "imagefolder", "--img_root", str(grey), *size]
    train_base.main(["--net_name", name, *data, *QUICK, *where, "--note", "base"])
    out = capsys.readouterr().out
    assert any(names(x, name, "one") for x in out.splitlines())
    file = str(tmp_path / "base/model_best.pth.tar")
    teacher = ["--t_model", file, "--t_name", name]
    for student in ("resnet8", name):
        note = ["--note", student.rpartition(":")[2]]
        train_kd.main(["--kd_mode", "st+at", *teacher, "--s_name", student, *QUICK, *where, *note])
    assert "one channel" in capsys.readouterr().out
    found = evaluation.main([file, "--net", name, "--cuda", "0", "--workers", "0"])
    assert found["top1"] >= 0
    if not size:
        export.main([file, "--net", name, "--format", "torch", "--img_size", "12"])
        assert names(capsys.readouterr().out, "1, 12, 12")
        program = torch.export.load(tmp_path / "base/model_best.pt2").module()
        assert program(torch.zeros(3, 1, 12, 12)).shape == (3, 2)


def test_the_first_channel_is_what_is_seen(grey):
    net = foreign.build(f"{grey}/nets.py:Grey", 2, 12).eval()
    img = torch.randn(3, 1, 12, 12)
    seen = net(img.expand(-1, 3, -1, -1))
    assert channels_of(net) == 1 and torch.equal(seen, net(img))
    assert torch.equal(bare(net)(img), seen) and channels_of(net) == 1
    colour = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, groups=4))
    assert channels_of(give_one_channel(colour)) == 3 and not colour._forward_pre_hooks


@pytest.mark.slow
def test_networks_of_three_channels_made_of_one(grey, tmp_path, capsys):
    """They make the same of grey images as before; their files say it by the weights' shape, and a
    teacher of three channels teaches a student of one."""
    img = torch.randn(3, 1, 32, 32)
    for name in ("resnet8", "ShuffleV1", "torchvision/squeezenet1_1", "vgg8"):
        net = foreign.build(name, 10, 32).eval()
        before = net(img.expand(-1, 3, -1, -1))
        make_one_channel(net, name)
        torch.testing.assert_close(net(img.expand(-1, 3, -1, -1)), before)
        assert torch.equal(net(img), net(img.expand(-1, 3, -1, -1))) and channels_of(net) == 1
    where = ["--save_root", str(tmp_path), *QUICK]
    data = ["--data_name", "imagefolder", "--img_root", str(grey), "--channels", "1"]
    train_base.main(["--net_name", "resnet8", *data, *where, "--note", "one"])
    train_base.main(["--net_name", "resnet14", *data[:-2], *where, "--note", "three"])
    one, three = (str(tmp_path / x / "model_best.pth.tar") for x in ("one", "three"))
    assert read_checkpoint(one)["net"]["conv1.weight"].shape == (16, 1, 3, 3)
    assert evaluation.main([one, "--cuda", "0", "--amp", "off"])["top1"] >= 0
    start = str(tmp_path / "one/initial_r8.pth.tar")
    for mode, teacher, student in (
        ("st+at", three, ["--s_name", "resnet8", "--channels", "1"]),
        ("st+at", one, ["--s_name", "resnet8"]),
        ("simkd", one, ["--s_init", start]),
        ("dml", None, ["--s_name", "resnet8", *data]),
    ):
        note = f"{mode}-{Path(teacher or 'none').parent.name}"
        files = ["--t_model", teacher] * bool(teacher) + student
        train_kd.main(["--kd_mode", mode, *files, *where, "--note", note])
        file = str(tmp_path / note / "model_best.pth.tar")
        state = read_checkpoint(file)["snet"]
        first = next(x for key, x in state.items() if key.endswith("conv1.weight"))
        assert first.shape[1] == (3 if student == ["--s_name", "resnet8"] else 1)
        evaluation.main([file, "--cuda", "0"])
    with ends(capsys, "--channels", "3", "1"):
        train_kd.main(
            ["--kd_mode", "at", "--t_model", three, "--s_init", start, *where, *data[:-1], "3"]
        )


@pytest.mark.parametrize("size", [[], ["--img_size", "97", "--workers", "0"]], ids=["as is", "97"])
def test_colours_are_refused(grey, size, tmp_path, capsys):
    root, name = pictures(tmp_path / "img"), f"{grey}/nets.py:Grey"
    data = ["--data_name", "imagefolder", "--img_root", str(root), *size]
    with ends(capsys, name, "one", "three"):
        train_base.main(
            ["--net_name", name, *data, *QUICK[:-2], "--save_root", str(tmp_path / "r")]
        )
    assert not (tmp_path / "r").exists()


def test_one_pixel_of_colour():
    pixels = torch.zeros(9000, 5, 5, 3, dtype=torch.uint8)
    images = dataset.Images(pixels, torch.zeros(9000).long(), ["a", "b"], (0.5,) * 3, (0.5,) * 3)
    assert is_grey(images)
    pixels[-1, 4, 4, 2] = 1
    assert not is_grey(images)
