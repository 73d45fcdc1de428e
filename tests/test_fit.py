"""Images that are not square."""

import numpy as np
import pytest
import torch
from messages import ends
from pictures import epoch, raw
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import pil_to_tensor

import train_base
from engine import stream
from engine.checkpoint import read_checkpoint
from tools import eval as eval_tool


@pytest.fixture
def wide(tmp_path):
    """Images of 240 x 120 pixels, whose left half is dark."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for label, name in enumerate(("cat", "dog")):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(2):
                pixels = rng.integers(100 + 50 * label, 256, (120, 240, 3), dtype=np.uint8)
                pixels[:, :60] = 0
                Image.fromarray(pixels).save(tmp_path / split / name / f"{i}.png")
    return tmp_path


def load(root, size, **flags):
    return stream.load("imagefolder", root, ((0.5,) * 3, (0.25,) * 3), size, **flags)


def test_resident(wide):
    crop, squash = load(wide, 24), load(wide, 24, fit="squash")
    assert torch.equal(crop.train.pixels, load(wide, 24, fit="crop").train.pixels)
    image = Image.open(wide / "train" / "cat" / "0.png")
    whole = np.asarray(image.resize((24, 24), Image.Resampling.BILINEAR))
    assert (squash.train.pixels[0].numpy() == whole).all() and not whole[:, :5].any()
    assert crop.train.pixels[0][:, :5].float().mean() > 50, "the dark edge is cut off"
    assert any("8 of 8 images are not square: the middle is cropped" in x for x in crop.notes)
    assert any("8 of 8 images are not square: they are squashed" in x for x in squash.notes)
    assert crop.identity() == squash.identity()


def test_square_ones_are_not_mentioned(tmp_path):
    from pictures import folder

    data = load(folder(tmp_path, (20, 20)), 12)
    assert not any("square" in x for x in data.notes)


def test_streamed(wide):
    data = load(wide, 112, fit="squash")
    assert any("squashed" in x for x in data.notes) and any("Resize" in x for x in data.notes)
    picture = pil_to_tensor(Image.open(wide / "test" / "cat" / "0.png").convert("RGB"))
    expected = v2.Resize((112, 112))(picture).permute(1, 2, 0)
    img, *_ = next(stream.test_batches(data.test, 4))
    assert torch.equal(raw(data.test, img)[0], expected)
    (steps,) = [x.transforms for x in [stream.transform(data.train, train=True)]]
    assert [type(x).__name__ for x in steps][:2] == ["Resize", "RandomResizedCrop"]
    assert steps[0].size == [128, 128] and len(epoch(data.train, 4)) == 1
    crop = load(wide, 112)
    assert any("the middle is cropped" in x for x in crop.notes)
    img, *_ = next(stream.test_batches(crop.test, 4))
    expected = v2.Compose([v2.Resize(128), v2.CenterCrop(112)])(picture).permute(1, 2, 0)
    assert torch.equal(raw(crop.test, img)[0], expected)


@pytest.mark.slow
def test_a_checkpoint_remembers_it(wide, tmp_path, capsys):
    argv = ["--net_name", "resnet8", "--data_name", "imagefolder", "--img_root", str(wide)]
    argv += ["--img_size", "24", "--cuda", "0", "--epochs", "1", "--batch_size", "2"]
    found = train_base.main([*argv, "--fit", "squash", "--save_root", str(tmp_path / "runs")])
    best = f"{found['dir']}/model_best.pth.tar"
    assert read_checkpoint(best)["meta"]["fit"] == "squash"
    capsys.readouterr()
    eval_tool.main([best, "--cuda", "0"])
    assert f"{found['last']:.2f}" in capsys.readouterr().out
    with ends(capsys, "--fit", "crop", "squash"):
        eval_tool.main([best, "--cuda", "0", "--fit", "crop"])
    train_base.main([*argv, "--save_root", str(tmp_path / "plain"), "--note", "r"])
    assert "fit" not in read_checkpoint(tmp_path / "plain" / "r" / "model_best.pth.tar")["meta"]
