"""COCO's metrics of detections."""

import contextlib
import io
import pickle

import coco_like
import numpy as np
import pytest
import torch
from coco_files import LARGE, POLYGON, SMALL, boxed, data
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import utils
from detection import coco

# pycocotools' decode triggers this warning of numpy
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """19 images to train on, 17 of them with boxes."""
    root = tmp_path_factory.mktemp("drawn")
    coco_like.draw(root, 19, 12, 40, seed=1)
    return coco.load(root, masks=True)


def output(*rows):
    """The output of a detector, from rows of (x, y, width, height, label, score)."""
    rows = torch.tensor(rows, dtype=torch.float32).reshape(-1, 6)
    boxes = torch.cat([rows[:, :2], rows[:, :2] + rows[:, 2:4]], 1)
    return dict(boxes=boxes, labels=rows[:, 4].long(), scores=rows[:, 5])


def figures(found, *outputs):
    evaluation = coco.Evaluation(found)
    evaluation.add(found.ids, list(outputs))
    return evaluation.result()


TWO = [boxed(0, 1, 1, LARGE), boxed(1, 2, 1, LARGE)]  # an id of 0 is valid too
FOUND = (*LARGE, 1, 0.9)


def test_all_found(tmp_path, capsys):
    result = figures(data(tmp_path, TWO), output(FOUND), output(FOUND))
    assert result == pytest.approx({name: 100 for name in coco.NAMES if name[-1] not in "sm"})
    assert capsys.readouterr().out == ""


def test_one_of_two_found(tmp_path):
    """Precision is 1 at the 51 recalls 0, 0.01 ... 0.5, and 0 at the 50 above: AP 51/101."""
    result = figures(data(tmp_path, TWO), output(FOUND), output())
    assert [result[x] for x in ("AP", "AP50", "AP75")] == pytest.approx([100 * 51 / 101] * 3)
    assert result["AR1"] == result["AR100"] == pytest.approx(50)


def test_images_that_were_not_added_count_as_missed(tmp_path):
    evaluation = coco.Evaluation(data(tmp_path, TWO))
    assert evaluation.result()["AP"] == 0
    evaluation.add([2], [output(FOUND)])
    assert evaluation.result()["AP"] == pytest.approx(100 * 51 / 101)


@pytest.mark.parametrize("score, expected", [(0.95, 50), (0.5, 100)])
def test_one_too_many(tmp_path, score, expected):
    """With a higher score than the right one it halves the precision at every recall; with a lower
    score it has no effect."""
    wrong = (120, 5, 30, 30, 1, score)
    result = figures(data(tmp_path, TWO[:1]), output(FOUND, wrong), output())
    assert [result["AP"], result["AP50"]] == pytest.approx([expected] * 2) and result[
        "AR100"
    ] == 100


def test_a_second_detection_of_one_object_is_wrong(tmp_path):
    """Its score is between those of the two objects: precision 1 up to recall 0.5, then 2/3."""
    rows = output(FOUND, (*LARGE, 1, 0.8)), output((*LARGE, 1, 0.7))
    expected = 100 * (51 + 50 * 2 / 3) / 101
    assert figures(data(tmp_path, TWO), *rows)["AP"] == pytest.approx(expected)


def test_an_overlap_of_five_eighths(tmp_path):
    """IoU 0.625 counts at 0.5, 0.55 and 0.6, three of the ten thresholds."""
    x, y, w, h = LARGE
    part = output((x, y, w, 62.5, 1, 0.9))
    result = figures(data(tmp_path, TWO), part, part)
    assert [result["AP50"], result["AP75"]] == pytest.approx([100, 0])
    assert result["AP"] == pytest.approx(30) and result["AR100"] == pytest.approx(30)


def test_of_another_class(tmp_path):
    """Of another class of the file, or of a label that is not a class."""
    found = data(tmp_path, TWO)
    for label in (7, 3, 0):
        rows = output((*LARGE, label, 0.9))
        assert figures(found, rows, rows)["AP"] == 0


def test_the_mean_over_classes_and_the_sizes(tmp_path):
    """Class 1, small (200 square pixels), is found; class 7, large, is not; no object is medium."""
    found = data(tmp_path, [boxed(1, 1, 1, SMALL), boxed(2, 2, 7, LARGE)])
    result = figures(found, output((*SMALL, 1, 0.9)), output())
    expected = dict(AP=50, AP50=50, AP75=50, APs=100, APl=0, AR1=50, AR10=50, AR100=50)
    assert result == pytest.approx(expected | dict(ARs=100, ARl=0))


def test_the_file_s_areas_decide_on_the_size(tmp_path):
    found = data(tmp_path, [boxed(1, 1, 1, LARGE, area=2000.0)])
    assert "APm" in figures(found, output(FOUND), output())
    assert "APl" not in figures(found, output(FOUND), output())


def test_nothing_found(tmp_path):
    result = figures(data(tmp_path, TWO), output(), output())
    assert result == {name: 0 for name in coco.NAMES if name[-1] not in "sm"}


@pytest.mark.parametrize("iscrowd, expected", [(1, 100), (0, 100 * 51 / 101)])
def test_crowds_are_ignored(tmp_path, iscrowd, expected):
    """Detections inside a crowd are neither right nor wrong, and the crowd need not be found. With
    an ordinary object at that place (IoU 0.2) they are wrong: after the right one, AP 51/101.
    """
    crowd = (60, 4, 90, 100)
    found = data(tmp_path, [boxed(1, 1, 1, SMALL), boxed(2, 1, 1, crowd, iscrowd=iscrowd)])
    inside = [(70 + i, 10, 40, 45, 1, 0.5) for i in range(3)]
    result = figures(found, output((*SMALL, 1, 0.9), *inside), output())
    assert result["AP"] == pytest.approx(expected)


def test_inside_a_crowd_before_the_right_one(tmp_path):
    for crowd, expected in ((1, 100), (0, 50)):
        annotations = [boxed(1, 1, 1, SMALL), boxed(2, 1, 1 if crowd else 7, LARGE, iscrowd=crowd)]
        found = data(tmp_path, annotations)
        right = [(*LARGE, 7, 0.5)] * (not crowd)
        result = figures(
            found, output((20, 30, 40, 40, 1, 0.99), (*SMALL, 1, 0.9), *right), output()
        )
        assert result["AP"] == pytest.approx((expected + 100 * (not crowd)) / (2 - crowd))


def test_masks_have_separate_metrics(tmp_path):
    """The box is right; the mask covers the lower 6 of 10 rows: IoU 0.6, right at the thresholds
    0.5, 0.55 and 0.6."""
    found = data(tmp_path, [boxed(1, 1, 1, SMALL, segmentation=POLYGON)], masks=True)
    found_it = output((*SMALL, 1, 0.9))
    masks = torch.zeros(1, 1, 128, 160)
    masks[..., 4:14, 3:23] = 0.4
    masks[..., 8:14, 3:23] = 0.6
    for these in (masks, (masks > 0.5).byte()[:, 0]):
        result = figures(found, dict(found_it, masks=these), dict(output(), masks=masks[:0]))
        assert [result["AP"], result["mask_AP50"]] == pytest.approx([100] * 2)
        assert result["mask_AP75"] == 0
        assert result["mask_AP"] == pytest.approx(30) and len(result) == 2 * 8
    assert "mask_AP" not in figures(found, found_it, output())


def test_as_pycocotools_from_the_file(drawn, tmp_path):
    """All metrics of boxes and masks, for detections with every kind of error."""
    rng, evaluation, rows = np.random.default_rng(0), coco.Evaluation(drawn.val), []
    from pycocotools import mask

    for imgs, targets, ids in coco.val_batches(drawn.val, 4):
        outputs = []
        for img, target, id in zip(imgs, targets, ids):
            boxes = target["boxes"].repeat(3, 1)
            boxes = boxes + torch.from_numpy(rng.normal(0, 2, boxes.shape)).float()
            labels = target["labels"].repeat(3)
            labels[rng.random(len(labels)) < 0.2] = 1
            masks = target["masks"].repeat(3, 1, 1)
            masks = (
                torch.stack([m.roll(int(rng.integers(-3, 4)), 1) for m in masks])
                if len(masks)
                else masks
            )
            scores = torch.from_numpy(rng.random(len(labels))).float()
            outputs.append(dict(boxes=boxes, labels=labels, scores=scores, masks=masks[:, None]))
            for box, label, score, m in zip(boxes.double(), labels, scores, masks):
                x1, y1, x2, y2 = box.tolist()
                row = dict(image_id=id, category_id=int(label), score=float(score))
                shape = mask.encode(np.asfortranarray(m.numpy()))
                rows.append(
                    (dict(row, bbox=[x1, y1, x2 - x1, y2 - y1]), dict(row, segmentation=shape))
                )
        evaluation.add(ids, outputs)
    expected = {}
    with contextlib.redirect_stdout(io.StringIO()):
        for kind, prefix, these in zip(("bbox", "segm"), ("", "mask_"), zip(*rows)):
            truth = COCO(str(drawn.val.file))
            measure = COCOeval(truth, truth.loadRes(list(these)), kind)
            measure.evaluate(), measure.accumulate(), measure.summarize()
            expected |= dict(zip((prefix + x for x in coco.NAMES), 100 * measure.stats))
    expected = {name: value for name, value in expected.items() if value >= 0}
    result = evaluation.result()
    assert result == pytest.approx(expected, abs=1e-9)
    assert 5 < result["AP"] < 95 and 5 < result["mask_AP"] < 95 and result["APs"] != result["APm"]


def test_evaluate(drawn):
    """A perfect detector; it gets every image once, in order."""
    targets, sizes = iter([drawn.val[i][1] for i in range(len(drawn.val))]), []

    def detect(imgs):
        assert not torch.is_grad_enabled() and all(0 <= img.min() < img.max() <= 1 for img in imgs)
        sizes.append(len(imgs))
        return [dict(t, scores=torch.ones(len(t["labels"]))) for _, t in zip(imgs, targets)]

    result = coco.evaluate(detect, drawn.val, batch_size=5)
    assert sizes == [5, 5, 2]
    assert [result["AP"], result["mask_AP"]] == pytest.approx([100] * 2)


def test_ranks_are_merged(tmp_path, monkeypatch):
    """Two ranks evaluate two of four images each. Three images have the object; the first and the
    last get a wrong detection. The ranks exchange their detections as bytes."""
    found = data(tmp_path, [boxed(i, i, 1, LARGE) for i in (1, 2, 3)], n=4)

    def detect(imgs):
        greys = [round(float(img[0, -1, -1]) * 255) for img in imgs]
        wrong = (0, 0, 9, 9, 1, 0.95)
        return [output(FOUND, wrong) if grey in (10, 40) else output(FOUND) for grey in greys]

    alone, parts = coco.evaluate(detect, found), []
    for number in (0, 1):
        said = []
        monkeypatch.setattr(utils, "share", lambda: (number, 2))
        monkeypatch.setattr(utils, "all_gather", lambda value: said.append(value) or [value])
        assert coco.evaluate(detect, found) != alone
        assert list(said[0]) == found.ids[number::2]
        parts.append(pickle.dumps(said[0]))

    for number in (0, 1):
        answers = iter([list(map(pickle.loads, parts)), [alone, {}]])
        said = []
        monkeypatch.setattr(utils, "rank", lambda: number)
        monkeypatch.setattr(utils, "all_gather", lambda value: said.append(value) or next(answers))
        assert coco.Evaluation(found).result() == alone
        assert said[1] == (alone if number == 0 else {})
