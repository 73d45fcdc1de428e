"""Tiny-ImageNet in its own folders, and MDistiller's recipe for it."""

import shutil

import numpy as np
import pytest
import torch
import toys
import torchvision.transforms.v2.functional as tv
from messages import ends
from pictures import epoch, raw
from PIL import Image

import dataset
import train_base
import utils
from engine import stream
from engine.augment import Rotation
from engine.published import PROTOCOLS, ROTATED
from tools import tables

WNIDS = ["n01443537", "n01629819", "n02084071"]
WORDS = ["goldfish, Carassius auratus", "European fire salamander", "goldfish, a second one"]


@pytest.fixture
def tiny(tmp_path):
    """The archive, with three classes, three images each."""
    home, rng = tmp_path / "data" / "tiny-imagenet-200", np.random.default_rng(0)

    def save(path, label):
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 100, (64, 64, 3), dtype=np.uint8) + 70 * label
        Image.fromarray(pixels.astype(np.uint8)).save(path, "JPEG")

    lines = []
    for label, wnid in enumerate(WNIDS):
        for i in range(3):
            save(home / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", label)
        (home / "train" / wnid / f"{wnid}_boxes.txt").write_text(f"{wnid}_0.JPEG\t0\t0\t9\t9\n")
        for i in range(2):
            name = f"val_{7 - 2 * label - i}.JPEG"
            save(home / "val" / "images" / name, label)
            lines.append(f"{name}\t{wnid}\t0\t32\t44\t62\n")
    (home / "val" / "val_annotations.txt").write_text("".join(lines))
    (home / "test" / "images").mkdir(parents=True)
    save(home / "test" / "images" / "test_0.JPEG", 0)
    words = [f"{a}\t{b}\n" for a, b in zip([*WNIDS, "n09999999"], [*WORDS, "another"])]
    (home / "words.txt").write_text("".join(words))
    return tmp_path / "data"


def test_its_own_folders(tiny):
    data = stream.load("tiny-imagenet", tiny)
    assert data.train.pixels.shape == (9, 64, 64, 3) and len(data.test) == 6
    assert data.train.labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    assert data.test.labels.tolist() == [2, 2, 1, 1, 0, 0], "by the annotations"
    assert data.train.classes == [
        "goldfish (n01443537)",
        "European fire salamander",
        "goldfish (n02084071)",
    ]
    assert data.selection == "test" and not any("ignored" in x for x in data.notes)
    inside = stream.load("tiny-imagenet", tiny / "tiny-imagenet-200", img_size=32)
    assert inside.train.pixels.shape[1] == 32
    assert stream.load("tiny-imagenet", tiny, val=3).selection == "val"


def test_a_sorted_val_folder_and_no_words(tiny):
    home = tiny / "tiny-imagenet-200"
    before = stream.load("tiny-imagenet", tiny)
    for line in (home / "val" / "val_annotations.txt").read_text().splitlines():
        name, wnid = line.split("\t")[:2]
        (home / "val" / wnid).mkdir(exist_ok=True)
        (home / "val" / "images" / name).rename(home / "val" / wnid / name)
    shutil.rmtree(home / "val" / "images")
    (home / "val" / "val_annotations.txt").unlink()
    (home / "words.txt").unlink()
    data = stream.load("tiny-imagenet", tiny)
    assert data.train.classes == WNIDS and len(data.test) == 6
    for label in range(3):
        one, two = (x.pixels[x.labels == label].sum() for x in (before.test, data.test))
        assert one == two


def spoil(home, how):
    lines = home / "val" / "val_annotations.txt"
    if how == "no val":
        shutil.rmtree(home / "val")
    elif how == "wnid":
        lines.write_text(lines.read_text().replace("n01629819", "n07777777"))
    elif how == "lacks":
        lines.write_text("\n".join(lines.read_text().splitlines()[1:]))
    elif how == "more":
        (home / "val" / "images" / "val_7.JPEG").unlink()
    elif how == "no annotations":
        lines.unlink()
    elif how == "no text":
        lines.write_bytes(b"\xff\xfe\x00")
    elif how == "image":
        (home / "val" / "images" / "val_7.JPEG").write_bytes(b"none")


TOLD = {
    "no val": "tiny-imagenet-200",
    "wnid": "n07777777",
    "lacks": "val_7.JPEG",
    "more": "val_7.JPEG",
    "no annotations": "val_annotations.txt",
    "no text": "val_annotations.txt",
    "image": "val_7.JPEG",
}


@pytest.mark.parametrize("how", TOLD)
def test_one_line(how, tiny, capsys):
    spoil(tiny / "tiny-imagenet-200", how)
    argv = ["--net_name", "resnet8", "--data_name", "tiny-imagenet", "--img_root", str(tiny)]
    with pytest.raises(SystemExit) as stop:
        train_base.main([*argv, "--cuda", "0", "--save_root", str(tiny / "runs")])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and TOLD[how] in err
    assert not (tiny / "runs").exists()


# --- the recipe -----------------------------------------------------------------------------------


def test_a_rotation_is_torchvision_s():
    pixels, bounds = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8), [(0, 3), (3, 8)]
    rotation = Rotation(8, 16, torch.Generator().manual_seed(3), bounds, "cpu")
    angles = (torch.rand(8, generator=torch.Generator().manual_seed(3)) * 2 - 1) * 20
    found = torch.cat([rotation(k, pixels[a:b]) for k, (a, b) in enumerate(bounds)])
    by_hand = torch.stack([tv.rotate(x, a.item()) for x, a in zip(pixels, angles)])
    assert (found == by_hand).float().mean() > 0.999 and angles.abs().max() > 5


def test_images_are_rotated_and_mirrored_but_not_cropped():
    data = toys.images(n=12, size=16)
    data.pixels[:] = 200
    data.pixels[:, 7:9, 7:9] = 50
    plain = epoch(data, padding=ROTATED)
    assert len(plain) == 3
    for img, _, index in plain:
        for picture in raw(data, img):
            assert (picture[7:9, 7:9] == 50).all(), "the middle stays"
    again = epoch(data, padding=ROTATED, skip=1)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(plain[1:], again))
    edges = torch.cat([raw(data, img)[:, 0, 0] for img, *_ in plain])
    assert (edges == 0).any(), "black where nothing is"


def test_the_recipe(tiny, tmp_path, capsys):
    argv = ["--net_name", "resnet8", "--data_name", "tiny-imagenet", "--img_root", str(tiny)]
    argv += ["--protocol", "mdistiller-tiny-imagenet", "--cuda", "0", "--batch_size", "4"]
    train_base.main([*argv, "--epochs", "1", "--save_root", str(tmp_path / "runs"), "--note", "r"])
    out = capsys.readouterr().out
    assert "rotated by up to 20 degrees" in out and "padding" not in out
    recipe = PROTOCOLS["mdistiller-tiny-imagenet"]
    assert (recipe.lr, recipe.batch_size, recipe.milestones) == (0.2, 256, (60, 120, 160))


def test_the_cache_has_no_such_views(teacher, tmp_path, capsys):
    import train_kd

    argv = ["--kd_mode", "st", "--t_model", teacher, "--s_name", "resnet8", "--cuda", "0"]
    argv += ["--protocol", "mdistiller-tiny-imagenet", "--epochs", "1", "--note", "r"]
    argv += ["--teacher_cache", str(tmp_path / "cache"), "--save_root", str(tmp_path)]
    with ends(capsys, "--teacher_cache"):
        train_kd.main(argv)


def test_the_table_has_its_recipe(tmp_path, capsys):
    argv = ["run", "tiny-imagenet", "--dry_run", "--runs", str(tmp_path), "--cuda", "0"]
    tables.main(argv)
    out = capsys.readouterr().out
    assert "--protocol mdistiller-tiny-imagenet" in out and "--kd_mode st" in out
    assert "lambda_kd 0.9, lambda_ce 0.1, T 4.0" in out and "ShuffleV2" in out
    assert "MobileNetV2" not in out, "which is another network there"
    tables.main(["show", "tiny-imagenet", "--runs", str(tmp_path)])
    assert "58.35" in capsys.readouterr().out


def test_no_other_dataset_is_misnamed():
    with pytest.raises(utils.UserError, match="tiny-imagenet"):
        stream.load("tiny-imagenets")
    assert "tiny-imagenet" not in dataset.DATASETS
