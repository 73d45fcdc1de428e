"""The drawn dataset of tests/coco_like.py."""

import coco_like
import numpy as np
import torch
from PIL import Image

from detection import coco


def test_drawn_boxes_are_where_the_objects_are(tmp_path, monkeypatch):
    """With black backgrounds and white objects, the boxes cover exactly the white pixels."""
    white = {name: [Image.new("RGB", (8, 8), "white")] * 5 for name in "abc"}
    monkeypatch.setattr(coco_like, "_digits", lambda classes: white)
    black = lambda rng, width, height: Image.new("RGB", (width, height))  # noqa: E731
    monkeypatch.setattr(coco_like, "background", black)
    coco_like.draw(tmp_path, 8, 4, 128, seed=2)
    found = coco.load(tmp_path)
    for i in range(8):
        img, target = found.train[i]
        expected = torch.zeros(img.shape[1:], dtype=torch.bool)
        for x1, y1, x2, y2 in target["boxes"].int().tolist():
            expected[y1:y2, x1:x2] = True
        assert ((img[0] > 127) != expected).float().mean() < 0.01
        assert (len(target["labels"]) == 0) == (i == 5)


def test_what_is_drawn(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        coco_like.draw(tmp_path / name, 24, 4, 128, seed)
    files = [sorted(x for x in (tmp_path / n).rglob("*") if x.is_file()) for n in "abc"]
    bytes_ = [[x.read_bytes() for x in these] for these in files]
    assert bytes_[0] == bytes_[1] and len(bytes_[0]) == 30
    assert all(one != two for one, two in zip(bytes_[0], bytes_[2]))
    found = coco.load(tmp_path / "a")
    assert list(found.train.categories) == [1, 3, 7] and found.num_class == 8
    assert set(found.train.labels) == {1, 3, 7}
    counts = np.diff(found.train.bounds)
    assert set(counts) == {0, 1, 2, 3, 4}
    area = found.train.areas
    assert (area < 32**2).any() and ((area > 32**2) & (area < 96**2)).any() and (area > 96**2).any()
    for i in range(24):
        boxes = found.train.boxes[found.train.bounds[i] : found.train.bounds[i + 1]]
        pairs = [(a, b) for k, a in enumerate(boxes) for b in boxes[:k]]
        assert all(coco_like.iou(a, b) < 0.3 for a, b in pairs)


def test_each_image_of_a_folder_is_in_only_one_split(tmp_path):
    """Each of five images has a different grey."""
    for label, name in enumerate(("cat", "dog")):
        (tmp_path / "in" / "train" / name).mkdir(parents=True)
        for i in range(5):
            grey = (100 * label + 20 * i,) * 3
            Image.new("RGB", (32, 32), grey).save(tmp_path / "in" / "train" / name / f"{i}.png")
    coco_like.draw(tmp_path / "out", 12, 12, 64, 1, images=tmp_path / "in", classes=2)
    found = coco.load(tmp_path / "out")
    assert found.train.categories == {1: "cat", 3: "dog"}
    for split, kinds in ((found.train, {0, 1, 2, 3}), (found.val, {4})):
        seen = set()
        for i in range(12):
            img, target = split[i]
            x1, y1, x2, y2 = (
                target["boxes"][-1].int().tolist() if len(target["labels"]) else [0] * 4
            )
            if x2:  # the image pasted last is not covered by others
                grey = img[:, y1:y2, x1:x2].float().median()
                seen.add(round(float(grey - 100 * (target["labels"][-1] == 3)) / 20))
        assert seen <= kinds and seen
