"""Datasets in COCO's format, with boxes and masks: reading, checking, batches, and COCO's metrics.

    data = load("./datasets/coco")
    for imgs, targets in train_batches(data.train, 8, seed=2, start=0, stop=90000): ...
    figures = evaluate(detect, data.val)

Annotations are checked when they are loaded, images are read when they are needed. Batch k of a
training depends only on (seed, k), for any number of workers and processes: to resume after step k,
k is enough. Labels are the category ids of the file; 0 is the background.
"""

import hashlib
import io
import json
import math
import os
import reprlib
from collections import Counter
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import dataset
import utils
from engine import stream
from utils import UserError

BORDER = 1.0  # pixels that a box may be outside its image (COCO rounds boxes); it is clipped
THIN = 0.01  # pixels: boxes of at most this width or height are left out
LAYOUT = "expected train2017/*.jpg, val2017/*.jpg and annotations/instances_{train,val}2017.json"
NAMES = "AP AP50 AP75 APs APm APl AR1 AR10 AR100 ARs ARm ARl".split()  # in pycocotools' order

CHECKS = {
    "an int": lambda x: type(x) is int and abs(x) < 2**53,
    "an int > 0": lambda x: type(x) is int and 0 < x < 2**53,
    "an int > 0 (0 is the background)": lambda x: type(x) is int and 0 < x < 2**53,
    "a string": lambda x: isinstance(x, str),
    "four finite numbers": lambda x: _numbers(x) and len(x) == 4,
    "0 or 1": lambda x: x in (0, 1),
    "a number >= 0": lambda x: _numbers([x]) and x >= 0,
}
WHOLE, POSITIVE, CLASS, NAME, FOUR, FLAG, AREA = CHECKS
FIELDS = dict(  # fields of a record, and the check of each
    images=dict(id=WHOLE, file_name=NAME, width=POSITIVE, height=POSITIVE),
    categories=dict(id=CLASS, name=NAME),
    annotations=dict(
        id=WHOLE, image_id=WHOLE, category_id=WHOLE, bbox=FOUR, iscrowd=FLAG, area=AREA
    ),
)
OPTIONAL = "iscrowd", "area"
ONE = dict(images="image", categories="category", annotations="annotation")


def _numbers(value) -> bool:
    """Whether `value` is a list of finite numbers."""
    return isinstance(value, list) and all(type(x) in (int, float) and abs(x) < 1e9 for x in value)


class Coco:
    """One split. `coco[i]` reads image i, uint8 (3, H, W), and its target, a dict: boxes, float32
    (N, 4), corners x1, y1, x2, y2 in pixels, inside the image; labels, int64 (N,), category ids;
    with `masks`: masks, uint8 (N, H, W). N may be 0. Targets have no crowds.

    ids: image ids, in the order of the file; categories: {id: name}, sorted by id; with_boxes:
    indices of images with a target that is not empty; left_out: number of boxes without a size.
    Raises UserError, one line, if a file is missing or an annotation is wrong. Reading an image
    raises it if the image cannot be decoded or has another size than its record.
    """

    def __init__(self, root: str | Path, split: str, masks: bool = False):
        self.folder = Path(root) / split
        self.file = Path(root) / "annotations" / f"instances_{split}.json"
        self.masks = masks
        if masks:
            _pycocotools()
        try:
            if self.file.exists() and not self.file.is_file():  # reading a pipe might never end
                raise UserError(f"{self.file} is not a regular file; {LAYOUT}")
            content, there = json.loads(self.file.read_bytes()), set(os.listdir(self.folder))
        except OSError as error:
            raise UserError(f"{error.filename}: {error.strerror}; {LAYOUT}") from error
        except (ValueError, RecursionError) as error:
            reason = utils.first_line(error)
            raise UserError(f"{self.file} is not valid JSON ({reason}); replace it") from error
        images, categories, rows = (_records(content, kind, self.file) for kind in FIELDS)

        missing = [image for image in images if image["file_name"] not in there]
        if missing:
            path = self.folder / missing[0]["file_name"]
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise self._error("images", missing[0], f"file {str(path)!r} not found{more}")
        self.ids = [image["id"] for image in images]
        self.files = np.array([os.fsencode(image["file_name"]) for image in images], bytes)
        self.sizes = np.array([(x["width"], x["height"]) for x in images], int).reshape(-1, 2)
        self.categories = dict(sorted((x["id"], x["name"]) for x in categories))
        self._keep(rows)

    def _error(self, kind: str, row: dict, what: str) -> UserError:
        return UserError(f"{self.file}: {ONE[kind]} {row['id']}: {what}")

    def _keep(self, rows: list[dict]) -> None:
        """Check the annotations and store them as arrays, sorted by image: `boxes` (x, y, width,
        height, as in the file), `labels`, `areas`, `crowds`. Image i has those from bounds[i] up to
        bounds[i + 1].
        """
        place = {id: i for i, id in enumerate(self.ids)}
        for row in rows:
            for key, known in (("image", place), ("category", self.categories)):
                if row[f"{key}_id"] not in known:
                    what = f"{key} {row[f'{key}_id']} not found"
                    raise self._error("annotations", row, what)
        rows = sorted(rows, key=lambda row: place[row["image_id"]])
        owner = np.array([place[row["image_id"]] for row in rows], int)
        boxes = np.array([row["bbox"] for row in rows], float).reshape(-1, 4)
        size, low, high = self.sizes[owner], boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
        outside = (low < -BORDER) | (high > size + BORDER)
        for wrong, what in (
            (boxes[:, 2:] < 0, "has a negative width or height"),
            (outside, "is outside the image, {}x{} pixels"),
        ):
            if wrong.any():
                k = int(wrong.any(1).argmax())
                what = f"its bbox {rows[k]['bbox']} {what.format(*size[k])}"
                raise self._error("annotations", rows[k], what)
        corners = np.hstack([low.clip(0, size), high.clip(0, size)])
        keep = (corners[:, 2:] - corners[:, :2] > THIN).all(1)
        self.left_out, rows = int((~keep).sum()), [row for row, kept in zip(rows, keep) if kept]
        self.boxes, self.corners, owner = boxes[keep], corners[keep], owner[keep]
        self.labels = np.array([row["category_id"] for row in rows], int)
        self.crowds = np.array([row.get("iscrowd", 0) for row in rows], bool)
        areas = [row.get("area", row["bbox"][2] * row["bbox"][3]) for row in rows]
        self.areas = np.array(areas, float)
        self.bounds = np.searchsorted(owner, np.arange(len(self.ids) + 1))
        self.with_boxes = np.unique(owner[~self.crowds])
        if not len(self.with_boxes):
            raise UserError(f"{self.file}: no image has a box; expected at least one")
        if self.masks:  # as bytes: Python objects would be copied into the memory of every worker
            for row, i in zip(rows, owner):
                fault = _fault(row.get("segmentation"), *self.sizes[i].tolist())
                if fault:
                    raise self._error("annotations", row, f"its segmentation: {fault}")
            texts = [json.dumps(row["segmentation"]).encode() for row in rows]
            self.ends = np.cumsum([0, *map(len, texts)])
            self.texts = np.frombuffer(b"".join(texts), np.uint8)

    def __len__(self) -> int:
        return len(self.ids)

    def identity(self) -> dict:
        """The number of images, and a sha256 of the annotations and of names and sizes of the image
        files."""
        try:
            digest = hashlib.sha256(self.file.read_bytes())
            for name in self.files:
                size = os.stat(os.path.join(os.fsencode(self.folder), name)).st_size
                digest.update(b"%s\0%d\0" % (name, size))
        except OSError as error:
            raise UserError(f"{error.filename}: {error.strerror}") from error
        return dict(images=len(self), sha256=digest.hexdigest())

    def __getitem__(self, i: int) -> tuple[Tensor, dict[str, Tensor]]:
        from torchvision.transforms.v2.functional import pil_to_tensor

        path = os.path.join(self.folder, os.fsdecode(self.files[i]))
        img, size = pil_to_tensor(dataset.open_image(path)), tuple(self.sizes[i].tolist())
        height, width = img.shape[1:]
        if size != (width, height):
            one, two = (f"{w}x{h}" for w, h in ((width, height), size))
            raise UserError(
                f"{path} has {one} pixels, but {self.file.name} has {two}; replace the image or "
                "its record"
            )
        rows = np.arange(self.bounds[i], self.bounds[i + 1])
        rows = rows[~self.crowds[rows]]
        boxes = torch.from_numpy(self.corners[rows]).float()
        target = dict(boxes=boxes, labels=torch.from_numpy(self.labels[rows]))
        if self.masks:
            masks = [_pycocotools().mask.decode(self.rle(k, i)) for k in rows]
            target["masks"] = torch.from_numpy(np.stack(masks)) if masks else img[:0].clone()
        return img, target

    def rle(self, k: int, i: int) -> dict:
        """The mask of annotation k, which belongs to image i, in pycocotools' encoding."""
        mask, (width, height) = _pycocotools().mask, self.sizes[i].tolist()
        shape = json.loads(self.texts[self.ends[k] : self.ends[k + 1]].tobytes())
        if isinstance(shape, list):
            return mask.merge(mask.frPyObjects(shape, height, width))
        plain = isinstance(shape["counts"], list)
        return mask.frPyObjects(shape, height, width) if plain else shape


def _records(content, kind: str, file: Path) -> list[dict]:
    """The records of `kind` in a file. Raises UserError if a field is wrong or an id repeats."""
    rows = content.get(kind) if isinstance(content, dict) else None
    if not isinstance(rows, list) or not (rows or kind == "annotations"):
        raise UserError(f"{file}: {kind!r} not found or empty; expected a list of records")
    for row in rows:
        if not isinstance(row, dict):
            raise UserError(f"{file}: {kind}: expected an object, got {reprlib.repr(row)}")
        for key, what in FIELDS[kind].items():
            if key not in row and key in OPTIONAL:
                continue
            if key not in row or not CHECKS[what](row[key]):
                value = reprlib.repr(row[key]) if key in row else "no value"
                where = f"{file}: {ONE[kind]} {reprlib.repr(row.get('id'))}"
                raise UserError(f"{where}: {key}: expected {what}, got {value}")
    for id, times in Counter(row["id"] for row in rows).most_common(1):
        if times > 1:
            raise UserError(f"{file}: {ONE[kind]} {id}: expected a unique id, got {times} of them")
    return rows


def _fault(shape, width: int, height: int) -> str | None:
    """The error in a segmentation (polygons or run lengths), or None."""
    if isinstance(shape, list):
        near = 2 * (width + height)  # pycocotools allocates memory for every pixel of an edge
        good = (
            _numbers(x) and len(x) in range(6, 10**6, 2) and max(map(abs, x)) < near for x in shape
        )
        return None if shape and all(good) else "expected lists of three or more points x, y"
    if not isinstance(shape, dict) or shape.get("size") != [height, width]:
        return f"expected polygons, or run lengths of size {[height, width]}"
    counts = shape.get("counts")
    good = isinstance(counts, str) and counts or _numbers(counts) and sum(counts) == height * width
    if isinstance(counts, list):
        good = good and all(type(x) is int and x >= 0 for x in counts)
    return None if good else "the run lengths do not add up to the number of pixels"


def _pycocotools():
    try:
        import pycocotools.coco
        import pycocotools.cocoeval
        import pycocotools.mask
    except ImportError as error:
        raise UserError("pycocotools is not installed; run pip install pycocotools") from error
    return pycocotools


@dataclass
class Data:
    """A dataset: its name, its splits, and notes for the log. num_class: 1 + the largest category
    id, as torchvision's detectors need it."""

    name: str
    train: Coco
    val: Coco
    num_class: int
    notes: list[str] = field(default_factory=list)

    def identity(self) -> dict:
        return dict(train=self.train.identity(), val=self.val.identity())


def load(root: str | Path, masks: bool = False) -> Data:
    """COCO 2017, or a dataset with the same layout, from the folder `root`. masks: with the masks
    of the objects. Raises UserError like `Coco`, and if the splits have different categories."""
    train, val = (Coco(root, split, masks) for split in ("train2017", "val2017"))
    odd = train.categories.items() ^ val.categories.items()
    if odd:
        some = dataset.some([f"{id} ({name})" for id, name in sorted(odd)])
        raise UserError(
            f"{train.file} and {val.file.name} need the same categories; only one file has {some}"
        )
    notes = [
        f"{split.folder.name}: {len(split)} images, {len(split.with_boxes)} of them with boxes, "
        f"{len(split.labels)} boxes, {split.crowds.sum()} of them crowds; {split.left_out} boxes "
        "without a size left out"
        for split in (train, val)
    ]
    return Data(Path(root).resolve().name, train, val, 1 + max(train.categories), notes)


# --- batches -------------------------------------------------------------------------------------


@dataclass
class Reader:
    """Reads a batch in a worker. From (image, whether mirrored) pairs it gives the pixels as one
    uint8 tensor, the shapes, and boxes and labels; or an error message if an image cannot be read.
    It is one tensor, since each tensor needs a file descriptor on its way to the main process."""

    data: Coco

    def __getitem__(self, batch: list[tuple[int, bool]]) -> tuple | str:
        try:
            samples = [_mirrored(*self.data[i]) if flip else self.data[i] for i, flip in batch]
        except UserError as error:
            return str(error)
        pixels = [x for img, target in samples for x in (img, target.get("masks")) if x is not None]
        rest = [{key: target[key].numpy() for key in ("boxes", "labels")} for _, target in samples]
        return torch.cat([x.flatten() for x in pixels]), [x.shape for x in pixels], rest


def _mirrored(img: Tensor, target: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    x1, y1, x2, y2 = target["boxes"].unbind(1)
    width = img.shape[2]
    target = dict(target, boxes=torch.stack([width - x2, y1, width - x1, y2], 1))
    if "masks" in target:
        target["masks"] = target["masks"].flip(2)
    return img.flip(2), target


def _as_it_is(batch):
    return batch


def _read(data: Coco, batches, count: int, workers: int, device):
    """Yield (imgs, targets) of `batches`. count: the number of batches."""
    device = torch.device(device)
    workers = min(workers, count) if count > 1 else 0
    for found in stream.loader_of(Reader(data), batches, workers, device, collate_fn=_as_it_is):
        if isinstance(found, str):
            raise UserError(found)
        flat, shapes, rest = found
        parts = flat.to(device, non_blocking=True).split([math.prod(shape) for shape in shapes])
        parts = [part.view(shape) for part, shape in zip(parts, shapes)]
        targets = [{key: torch.from_numpy(x).to(device) for key, x in row.items()} for row in rest]
        if data.masks:
            for target, masks in zip(targets, parts[1::2]):
                target["masks"] = masks
        yield [img.float().div_(255) for img in parts[:: 1 + data.masks]], targets


def _draws(images: np.ndarray, seed: int, place: int):
    """Yield (image, whether mirrored) without end, from position `place`. Every pass over the
    images has another order."""
    number, place = divmod(place, len(images))
    while True:
        generator = dataset.generator_of(seed, number)
        order = torch.randperm(len(images), generator=generator).numpy()
        flip = torch.randint(0, 2, (len(images),), generator=generator).bool()
        yield from zip(images[order[place:]].tolist(), flip[place:].tolist())
        number, place = number + 1, 0


def check_shares(batch_size: int, world: int) -> None:
    """Raise UserError if a batch cannot be split equally over `world` processes."""
    if batch_size < 1 or batch_size % world:
        raise UserError(
            f"--batch_size: expected a multiple of {world}, the number of processes, got "
            f"{batch_size}"
        )


def train_batches(
    data: Coco,
    batch_size: int,
    seed: int,
    start: int,
    stop: int,
    share: tuple[int, int] = (0, 1),
    workers: int = 0,
    device="cpu",
    empty: bool = False,
):
    """Yield (imgs, targets) of the steps start + 1 to stop of the training. Each batch of
    `batch_size` images is split over the processes; `share` (rank, world) chooses the part.

    imgs: list of float32 (3, H, W) in 0..1; targets: list of dicts as in `Coco`; both on `device`,
    each image mirrored with probability 0.5. It passes over the images with boxes (`empty`: over
    all images); a batch may contain images of two passes, so all batches have the same size.
    workers: number of processes that read images. Raises UserError if the batch cannot be split
    equally.
    """
    rank, world = share
    check_shares(batch_size, world)
    images = np.arange(len(data)) if empty else data.with_boxes
    draws, each = _draws(images, seed, start * batch_size), batch_size // world
    batches = (
        list(islice(draws, batch_size))[rank * each : (rank + 1) * each] for _ in range(start, stop)
    )
    yield from _read(data, batches, stop - start, workers, device)


def val_batches(data: Coco, batch_size: int, share=(0, 1), workers: int = 0, device="cpu"):
    """Yield (imgs, targets, image_ids) in order, not mirrored. share: (rank, world), every world-th
    batch. The last batch may be smaller."""
    bounds = dataset.parts_of(len(data), batch_size)[share[0] :: share[1]]
    batches = ([(i, False) for i in range(*bound)] for bound in bounds)
    read = _read(data, batches, len(bounds), workers, device)
    for bound, (imgs, targets) in zip(bounds, read):
        yield imgs, targets, data.ids[slice(*bound)]


# --- metrics -------------------------------------------------------------------------------------


class Evaluation:
    """COCO's twelve metrics, computed by pycocotools over all images of `data`. An image that was
    not added counts as one without detections. Raises UserError without pycocotools."""

    def __init__(self, data: Coco):
        self.data, self.found, self.tools = data, {}, _pycocotools()

    def add(self, image_ids: list[int], outputs: list[dict[str, Tensor]]) -> None:
        """Add outputs of a torchvision detector: boxes (N, 4), corners in pixels; labels (N,);
        scores (N,); masks (N, 1, H, W) or (N, H, W) in 0..1, if the dataset has masks."""
        for id, output in zip(image_ids, outputs, strict=True):
            boxes, scores = (output[x].detach().cpu().double() for x in ("boxes", "scores"))
            labels, rles = output["labels"].cpu(), None
            if self.data.masks and "masks" in output:
                masks = (output["masks"].detach() > 0.5).flatten(0, -3).byte().cpu().numpy()
                rles = [self.tools.mask.encode(np.asfortranarray(mask)) for mask in masks]
            self.found[id] = boxes.reshape(-1, 4), labels, scores, rles

    def result(self) -> dict[str, float]:
        """The metrics NAMES in percent, over the outputs of all ranks; if an output has masks, also
        mask_AP and so on. A metric is left out if it does not exist, for example if no object has
        that size.
        """
        found, figures = {}, {}
        for part in utils.all_gather(self.found):
            found |= part
        if utils.rank() == 0:
            figures = self._measured(found, masks=False)
            if any(rles is not None for *_, rles in found.values()):
                masks = self._measured(found, masks=True)
                figures |= {f"mask_{name}": value for name, value in masks.items()}
        return utils.all_gather(figures)[0]

    def _measured(self, found: dict[int, tuple], masks: bool) -> dict[str, float]:
        with redirect_stdout(io.StringIO()):
            both = self._objects(masks), self._detections(found, masks)
            measure = self.tools.cocoeval.COCOeval(*map(self._coco, both), ("bbox", "segm")[masks])
            measure.evaluate()
            measure.accumulate()
            measure.summarize()
        pairs = zip(NAMES, measure.stats.tolist())
        return {name: 100 * value for name, value in pairs if value >= 0}

    def _coco(self, rows: list[dict]):
        """A pycocotools COCO object. Ids start at 1, since pycocotools ignores objects of id 0."""
        data, coco = self.data, self.tools.coco.COCO()
        images = zip(data.ids, data.sizes.tolist())
        coco.dataset = dict(
            images=[dict(id=id, width=width, height=height) for id, (width, height) in images],
            categories=[dict(id=id, name=name) for id, name in data.categories.items()],
            annotations=[dict(row, id=i) for i, row in enumerate(rows, 1)],
        )
        coco.createIndex()
        return coco

    def _objects(self, masks: bool) -> list[dict]:
        data, rows = self.data, []
        for i, id in enumerate(data.ids):
            of = slice(data.bounds[i], data.bounds[i + 1])
            columns = dict(category_id=data.labels, bbox=data.boxes, area=data.areas)
            columns |= dict(iscrowd=data.crowds)
            columns = {key: x[of].tolist() for key, x in columns.items()}
            if masks:
                columns["segmentation"] = [data.rle(k, i) for k in range(of.start, of.stop)]
            rows += _rows(id, columns)
        return rows

    def _detections(self, found: dict[int, tuple], masks: bool) -> list[dict]:
        rows = []
        for id, (boxes, labels, scores, rles) in found.items():
            size = boxes[:, 2:] - boxes[:, :2]
            boxes = torch.cat([boxes[:, :2], size], 1)
            columns = dict(category_id=labels, score=scores, bbox=boxes, area=size.prod(1))
            columns |= dict(iscrowd=torch.zeros_like(labels))
            columns = {key: x.tolist() for key, x in columns.items()}
            if masks:
                columns |= dict(
                    segmentation=rles, area=[int(self.tools.mask.area(x)) for x in rles]
                )
            rows += _rows(id, columns)
        return rows


def _rows(image_id: int, columns: dict[str, list]) -> list[dict]:
    return [dict(zip(columns, row), image_id=image_id) for row in zip(*columns.values())]


@torch.no_grad()
def evaluate(
    detect, data: Coco, batch_size: int = 1, workers: int = 0, device="cpu"
) -> dict[str, float]:
    """The metrics of `detect(imgs) -> outputs` on `data`. The outputs are like torchvision's, see
    `Evaluation.add`. Each rank evaluates a part of the batches."""
    evaluation = Evaluation(data)
    for imgs, _, image_ids in val_batches(data, batch_size, utils.share(), workers, device):
        evaluation.add(image_ids, detect(imgs))
    return evaluation.result()
