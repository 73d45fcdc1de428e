import csv

import numpy as np
import pytest
from PIL import Image

import train_base
from tools import scoreboard


@pytest.mark.slow
def test_scoreboard(tmp_path):
    """A baseline and two methods on a few images; done runs are not done again."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / "img" / split / name).mkdir(parents=True)
            for i in range(4):
                pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "img" / split / name / f"{i}.png")
    root = str(tmp_path / "img")
    argv = ["--data_name", "imagefolder", "--img_root", root, "--mean_std", "cifar10"]
    argv += ["--epochs", "1", "--net_name", "resnet14", "--note", "t", "--save_root", str(tmp_path)]
    teacher = train_base.main(argv)["dir"] + "/model_best.pth.tar"
    runs, out = tmp_path / "runs", tmp_path / "out"
    argv = ["--img_root", root, "--t_model", teacher, "--epochs", "2", "--modes", "st,fsp"]
    argv += ["--seeds", "2,3", "--runs", str(runs), "--out", str(out), "--batch_size", "4"]
    scoreboard.main(argv)
    with open(out / "scoreboard.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["mode"], row["seeds"]) for row in rows] == [
        ("baseline", "2"),
        ("st", "2"),
        ("fsp", "2"),
    ]
    assert (out / "scoreboard.png").stat().st_size > 10_000
    before = {path: path.stat().st_mtime for path in runs.rglob("*")}
    scoreboard.main(argv)
    assert {path: path.stat().st_mtime for path in runs.rglob("*")} == before
