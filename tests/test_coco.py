"""Reading datasets in COCO's format, errors in them, and batches."""

import math
import os
import sys

import coco_like
import pytest
import torch
from coco_files import LARGE, POLYGON, RUNS, SMALL, boxed, content, data, write
from messages import names, one_line, refused
from PIL import Image

from detection import coco

# pycocotools' decode triggers this warning of numpy
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


# --- reading --------------------------------------------------------------------------------------


def test_images_boxes_and_labels(tmp_path):
    annotations = [boxed(5, 2, 7, LARGE), boxed(4, 1, 1, SMALL), boxed(3, 2, 1, SMALL)]
    found = coco.load(write(tmp_path, content(annotations, n=3)))
    assert found.num_class == 8 and found.name == tmp_path.name
    assert found.train.categories == found.val.categories == {1: "cat", 7: "dog"}
    assert found.train.ids == [1, 2, 3] and len(found.train) == 3
    assert found.train.with_boxes.tolist() == [0, 1]
    img, target = found.train[1]
    assert img.dtype == torch.uint8 and img.shape == (3, 128, 160)
    assert img[:, :10, :20].min() == 255 and img[:, 10:].unique().tolist() == [20]
    assert target["boxes"].tolist() == [[10, 20, 110, 120], [3, 4, 23, 14]]
    assert target["labels"].tolist() == [7, 1] and target["labels"].dtype == torch.int64
    assert target["boxes"].dtype == torch.float32 and set(target) == {"boxes", "labels"}
    empty = found.train[2][1]
    assert empty["boxes"].shape == (0, 4) and empty["labels"].shape == (0,)


def test_grey_images_become_rgb(tmp_path):
    found = data(tmp_path, [boxed(1, 1, 1, SMALL)])
    Image.new("L", (160, 128), 9).save(tmp_path / "val2017" / "1.png")
    assert found[0][0].shape == (3, 128, 160) and found[0][0].unique().tolist() == [9]


def test_boxes_a_pixel_outside_are_clipped(tmp_path):
    boxes = [(-1, -0.5, 30, 30), (100.5, 60, 60.5, 69)]
    found = data(tmp_path, [boxed(i, 1, 1, box) for i, box in enumerate(boxes)])
    assert found[0][1]["boxes"].tolist() == [[0, 0, 29, 29.5], [100.5, 60, 160, 128]]


def test_boxes_of_no_size_are_left_out_and_counted(tmp_path):
    boxes = [(5, 5, 0, 10), (5, 5, 10, 0.0), (5, 128, 10, 1), SMALL]
    found = data(tmp_path, [boxed(i, 1, 1, box) for i, box in enumerate(boxes)])
    assert found[0][1]["boxes"].tolist() == [[3, 4, 23, 14]] and found.left_out == 3
    assert any(names(note, "3 boxes") for note in coco.load(tmp_path).notes)


def test_crowds_are_in_no_target(tmp_path):
    found = data(tmp_path, [boxed(1, 1, 1, SMALL), boxed(2, 2, 1, LARGE, iscrowd=1)])
    assert found[1][1]["boxes"].shape == (0, 4) and found.with_boxes.tolist() == [0]


def test_masks(tmp_path):
    annotations = [
        boxed(1, 1, 1, SMALL, segmentation=POLYGON),
        boxed(2, 1, 7, (0, 0, 2, 10), segmentation=RUNS),
        boxed(3, 1, 7, LARGE, iscrowd=1, segmentation=RUNS),
    ]
    found = data(tmp_path, annotations, masks=True)
    masks = found[0][1]["masks"]
    assert masks.dtype == torch.uint8 and masks.shape == (2, 128, 160)
    assert masks[0].sum() == 200 and masks[0, 4:14, 3:23].min() == 1
    assert masks[1].sum() == 20 and masks[1, :10, :2].min() == 1
    assert found[1][1]["masks"].shape == (0, 128, 160)


# --- errors ---------------------------------------------------------------------------------------


def change(key, value, kind="annotations"):
    return lambda found: found[kind][-1].update({key: value})


CASES = [  # the error, the names in the message in addition to the file, a function that makes it
    ("no images", ["images"], lambda x: x.pop("images")),
    ("no annotations", ["annotations"], lambda x: x.pop("annotations")),
    ("no categories", ["categories"], lambda x: x.pop("categories")),
    ("no image at all", ["images"], lambda x: x["images"].clear()),
    ("no box at all", [], lambda x: x["annotations"].clear()),
    ("only a crowd", [], lambda x: [a.update(iscrowd=1) for a in x["annotations"]]),
    ("no record", ["annotations", "x"], lambda x: x["annotations"].append("x")),
    ("image twice", [1], change("id", 1, "images")),
    ("annotation twice", [5], change("id", 5)),
    ("category twice", [7], change("id", 7, "categories")),
    ("no id", ["id", None], change("id", None)),
    ("no bbox", [6, "bbox"], lambda x: x["annotations"][-1].pop("bbox")),
    ("unknown image", [6, 99], change("image_id", 99)),
    ("unknown category", [6, 2], change("category_id", 2)),
    ("background", ["id", 0], change("id", 0, "categories")),
    ("category -1", ["id", -1], change("id", -1, "categories")),
    ("category 1.5", ["id", 1.5], change("id", 1.5, "categories")),
    ("category True", ["id", True], change("id", True, "categories")),
    ("three numbers", [6, "bbox", [1, 2, 3]], change("bbox", [1, 2, 3])),
    ("nan", [6, "bbox", "nan"], change("bbox", [1, 2, math.nan, 4])),
    ("infinite", [6, "bbox", "inf"], change("bbox", [1, 2, 3, math.inf])),
    ("huge", [6, "bbox"], change("bbox", [1, 2, 3, 10**400])),
    ("text", [6, "bbox"], change("bbox", [1, 2, 3, "4"])),
    ("negative width", [6, "bbox", [9, 9, -5, 5]], change("bbox", [9, 9, -5, 5])),
    ("negative height", [6, "bbox", [9, 9, 5, -0.5]], change("bbox", [9, 9, 5, -0.5])),
    ("left", [6, "bbox", [-2, 9, 9, 9]], change("bbox", [-2, 9, 9, 9])),
    ("above", [6, "bbox", [9, -1.1, 9, 9]], change("bbox", [9, -1.1, 9, 9])),
    ("right", [6, "bbox", [150, 9, 11.1, 9]], change("bbox", [150, 9, 11.1, 9])),
    ("below", [6, "bbox", [9, 120, 9, 9.1]], change("bbox", [9, 120, 9, 9.1])),
    ("iscrowd", [6, "iscrowd", 2], change("iscrowd", 2)),
    ("area", [6, "area", -1], change("area", -1)),
    ("width 0", [2, "width", 0], change("width", 0, "images")),
    ("height -3", [2, "height", -3], change("height", -3, "images")),
    ("file_name", [2, "file_name", 5], change("file_name", 5, "images")),
    ("no such image", [2, "gone.png"], change("file_name", "gone.png", "images")),
]


@pytest.mark.parametrize("names, how", [x[1:] for x in CASES], ids=[x[0] for x in CASES])
def test_bad_annotations(tmp_path, names, how):
    found = content([boxed(5, 1, 1, SMALL), boxed(6, 1, 1, LARGE)])
    write(tmp_path, found)
    coco.load(tmp_path)  # no error yet
    how(found)
    write(tmp_path, found, images=False)
    file = tmp_path / "annotations" / "instances_train2017.json"
    with refused(file) as said:
        coco.load(tmp_path)
    one_line(said[0].replace(str(file), ""), *names)


def half(path):
    path.write_text(path.read_text()[:-9])


def away(path):
    path.rename(path.with_name("x"))


TRAIN, VAL = (f"annotations/instances_{split}2017.json" for split in ("train", "val"))


@pytest.mark.parametrize(
    "name, how, named",
    [
        ("train2017", away, "train2017"),
        ("val2017", away, "val2017"),
        ("annotations", away, TRAIN),
        (VAL, lambda x: x.unlink(), VAL),
        (VAL, lambda x: (x.unlink(), os.mkfifo(x)), VAL),
        (VAL, half, VAL),
        (VAL, lambda x: x.write_bytes(b"\xff"), VAL),
        (VAL, lambda x: x.write_text("[]"), VAL),
    ],
)
def test_bad_folders(tmp_path, name, how, named):
    write(tmp_path, content([boxed(1, 1, 1, SMALL)]))
    coco.load(tmp_path)
    how(tmp_path / name)
    with refused(tmp_path / named):
        coco.load(tmp_path)


def test_images_that_are_missing(tmp_path):
    write(tmp_path, content([boxed(1, 1, 1, SMALL)], n=3))
    for name in "12":
        (tmp_path / "val2017" / f"{name}.png").unlink()
    with refused(tmp_path / "val2017" / "1.png"):
        coco.load(tmp_path)


@pytest.mark.parametrize("key, value", [("id", 9), ("name", "wolf")])
def test_the_splits_have_the_same_categories(tmp_path, key, value):
    train, val = (content([boxed(1, 1, 1, SMALL)]) for _ in range(2))
    val["categories"][0][key] = value
    with refused(7, "dog", value):
        coco.load(write(tmp_path, train, val))


def test_images_that_cannot_be_read(tmp_path):
    found = data(tmp_path, [boxed(1, 1, 1, SMALL), boxed(2, 2, 1, SMALL)])
    path = tmp_path / "val2017" / "1.png"
    path.write_bytes(path.read_bytes()[:60])
    Image.new("RGB", (128, 160)).save(tmp_path / "val2017" / "2.png")
    with refused(path):
        found[0]
    with refused(tmp_path / "val2017" / "2.png", "128x160", "160x128"):
        found[1]
    for workers in (0, 2):  # one line, without the traceback of a worker
        for batches in (
            coco.val_batches(found, 1, workers=workers),
            coco.train_batches(found, 1, 0, 0, 4, workers=workers),
        ):
            with refused() as said:
                list(batches)
            assert any(names(said[0], tmp_path / "val2017" / x) for x in ("1.png", "2.png"))


@pytest.mark.parametrize(
    "shape",
    [
        None,
        [],
        [[1, 2, 3, 4]],
        [[1, 2, 3, 4, 5, 6, 7]],
        [[1, 2, 3, 4, 5, 1e8]],
        [1, 2, 3, 4, 5, 6],
        dict(RUNS, size=[160, 128]),
        dict(RUNS, counts=[3, 4]),
        dict(RUNS, counts=[-1, 128 * 160 + 1]),
        dict(size=[128, 160]),
    ],
)
def test_bad_masks(tmp_path, shape):
    root = write(tmp_path, content([boxed(4, 1, 1, SMALL, segmentation=shape)]))
    coco.load(root)  # without masks, segmentations are not read
    file = root / "annotations" / "instances_train2017.json"
    with refused(file) as said:
        coco.load(root, masks=True)
    one_line(said[0].replace(str(file), ""), 4, "segmentation")


def test_pycocotools_is_missing(tmp_path, monkeypatch):
    found = data(tmp_path, [boxed(1, 1, 1, SMALL, segmentation=POLYGON)])
    monkeypatch.setitem(sys.modules, "pycocotools.coco", None)
    for needs in (lambda: coco.Evaluation(found), lambda: coco.load(tmp_path, masks=True)):
        with refused("pip install pycocotools"):
            needs()
    coco.load(tmp_path)


# --- batches --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """19 images to train on, 17 of them with boxes."""
    root = tmp_path_factory.mktemp("drawn")
    coco_like.draw(root, 19, 12, 40, seed=1)
    return coco.load(root, masks=True)


def train(drawn, batch_size=4, seed=3, start=0, stop=9, **more):
    return list(coco.train_batches(drawn.train, batch_size, seed, start, stop, **more))


def same(one, two):
    """Whether two lists of batches have equal values."""
    if isinstance(one, torch.Tensor):
        return one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, dict):
        return list(one) == list(two) and all(same(one[key], two[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(same, one, two))
    return one == two


def shown(drawn, batches):
    """(image, whether mirrored) of every image of the batches, identified by its pixels."""
    pixels = {}
    for i in range(len(drawn.train)):
        img, _ = drawn.train[i]
        pixels[img.numpy().tobytes()] = i, False
        pixels[img.flip(2).numpy().tobytes()] = i, True
    imgs = [img for imgs, _ in batches for img in imgs]
    assert all(img.dtype == torch.float32 and 0 <= img.min() <= img.max() <= 1 for img in imgs)
    return [pixels[(img * 255).round().byte().numpy().tobytes()] for img in imgs]


def test_passes_are_permutations_of_the_images_with_boxes(drawn):
    batches = train(drawn, stop=17)  # 68 images: four passes over 17
    assert (
        [len(imgs) for imgs, _ in batches] == [len(targets) for _, targets in batches] == [4] * 17
    )
    pairs = shown(drawn, batches)
    order = [i for i, _ in pairs]
    passes = [order[k : k + 17] for k in range(0, 68, 17)]
    assert all(sorted(x) == drawn.train.with_boxes.tolist() for x in passes)
    assert len(set(map(tuple, passes))) == 4 and len(drawn.train.with_boxes) == 17
    flips = [flip for _, flip in pairs]
    assert 20 < sum(flips) < 48 and flips[:17] != flips[17:34]
    for (i, flip), target in zip(pairs, [t for _, targets in batches for t in targets]):
        _, plain = drawn.train[i]
        assert torch.equal(target["labels"], plain["labels"])
        assert torch.equal(target["boxes"], plain["boxes"]) != flip


def test_images_without_boxes_too(drawn):
    batches = train(drawn, batch_size=19, stop=1, empty=True)
    assert sorted(i for i, _ in shown(drawn, batches)) == list(range(19))
    empty = [t for t in batches[0][1] if not len(t["labels"])]
    assert len(empty) == 2
    assert all(t["boxes"].shape == (0, 4) and t["masks"].shape[0] == 0 for t in empty)


def test_a_batch_is_a_function_of_seed_and_step(drawn):
    batches = train(drawn)
    assert same(batches, train(drawn)) and not same(batches, train(drawn, seed=4))
    for start in (1, 4, 5, 8, 9):  # step 5 begins in one pass and ends in the next
        assert same(batches[start:], train(drawn, start=start))
    torch.randn(5)
    before = torch.get_rng_state()
    assert same(batches, train(drawn)) and torch.equal(before, torch.get_rng_state())


def test_a_batch_larger_than_the_set(drawn):
    whole = train(drawn, batch_size=40, stop=2)
    parts = train(drawn, batch_size=10, stop=8)
    assert [len(imgs) for imgs, _ in whole] == [40, 40]
    joined = [sum((list(x) for x in column), []) for column in zip(*parts)]
    assert same(joined[0], whole[0][0] + whole[1][0]) and same(joined[1], whole[0][1] + whole[1][1])


def test_shares_make_up_the_batch(drawn):
    shares = [train(drawn, batch_size=6, share=(rank, 3)) for rank in range(3)]
    for whole, *parts in zip(train(drawn, batch_size=6), *shares, strict=True):
        assert [len(imgs) for imgs, _ in parts] == [2, 2, 2]
        assert same(whole, [sum(column, []) for column in zip(*parts)])
    with refused("--batch_size", 7, 3):
        train(drawn, batch_size=7, share=(0, 3))


def test_workers_give_the_same(drawn):
    assert same(train(drawn, stop=5), train(drawn, stop=5, workers=2))
    plain, workers = (list(coco.val_batches(drawn.val, 5, workers=n)) for n in (0, 2))
    assert same(plain, workers)


def test_val_batches_have_all_images_in_order(drawn):
    batches = list(coco.val_batches(drawn.val, 5))
    assert [len(ids) for _, _, ids in batches] == [5, 5, 2]
    assert [id for _, _, ids in batches for id in ids] == drawn.val.ids
    flat = [pair for imgs, targets, _ in batches for pair in zip(imgs, targets)]
    for i, (img, target) in enumerate(flat):
        pixels, plain = drawn.val[i]
        assert torch.equal((img * 255).round().byte(), pixels) and same(target, plain)
    shares = [list(coco.val_batches(drawn.val, 5, share=(rank, 2))) for rank in (0, 1)]
    assert same(shares[0] + shares[1], [batches[0], batches[2], batches[1]])


def test_the_mirror_image_moves_boxes_and_masks(tmp_path):
    """The white corner of 20x10 pixels is the object, its mask those pixels."""
    mask = [[0, 0, 20, 0, 20, 10, 0, 10]]
    found = data(tmp_path, [boxed(1, 1, 7, (0, 0, 20, 10), segmentation=mask)], 1, masks=True)
    seen = set()
    for (img,), (target,) in coco.train_batches(found, 1, 0, 0, 12):
        white = (img[0] == 1).nonzero()
        y1, x1, y2, x2 = *white.min(0).values.tolist(), *(white.max(0).values + 1).tolist()
        assert target["boxes"].tolist() == [[x1, y1, x2, y2]] and target["labels"].tolist() == [7]
        assert torch.equal(target["masks"][0] == 1, img[0] == 1)
        seen.add((x1, y1, x2, y2))
    assert seen == {(0, 0, 20, 10), (140, 0, 160, 10)}
