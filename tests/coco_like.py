"""Images with boxes, in COCO's format: small pictures pasted, at many sizes, on drawn backgrounds.

python tests/coco_like.py datasets/coco_like --images datasets/cifar10_jpeg --classes 10
"""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

SIDES = (10, 31), (33, 95), (97, 192)  # of a small, a medium and a large object, for COCO's figures
OFTEN = 0.4, 0.4, 0.2
OVERLAP = 0.3  # intersection over union of two boxes stays below
EMPTY = 12  # one in as many images has no object
BICUBIC = Image.Resampling.BICUBIC


def draw(
    out: str | Path,
    train: int,
    val: int,
    size: int,
    seed: int,
    images: str | Path | None = None,
    classes: int = 3,
) -> None:
    """Write `train` and `val` images, with sides of `size` to 1.5 * `size` pixels, and their boxes.

    `images`: a folder whose train/CLASS/* are pasted, else scikit-learn's digits; those of the
    first `classes` classes, every fifth in val alone. Category ids are 1, 3, 7, 13, 21...
    """
    out = Path(out)
    pictures = (_files(Path(images), classes) if images else _digits(classes)).items()
    (out / "annotations").mkdir(parents=True, exist_ok=True)
    for number, (split, count) in enumerate((("train2017", train), ("val2017", val))):
        rng = np.random.default_rng([seed, number])
        chosen = [  # of the fifths, four or one
            [x for i, x in enumerate(mine) if (i % 5 == 4) == (split == "val2017")]
            for _, mine in pictures
        ]
        content = dict(info=dict(description="drawn"), images=[], annotations=[])
        content["categories"] = [dict(id=_id(k), name=name) for k, (name, _) in enumerate(pictures)]
        (out / split).mkdir(exist_ok=True)
        for i in range(count):
            width, height = (int(x) for x in rng.integers(size, 1.5 * size, 2, endpoint=True))
            image = background(rng, width, height)
            id = 100000 * number + i + 1
            boxes = [] if i % EMPTY == 5 else places(rng, width, height)
            for x, y, w, h in boxes:
                k = int(rng.integers(len(chosen)))
                picture = chosen[k][rng.integers(len(chosen[k]))]
                picture = Image.open(picture).convert("RGB") if images else picture
                image.paste(picture.resize((w, h), BICUBIC), (x, y))
                content["annotations"].append(
                    dict(
                        id=len(content["annotations"]) + 1,
                        image_id=id,
                        category_id=_id(k),
                        bbox=[x, y, w, h],
                        area=w * h,
                        iscrowd=0,
                        segmentation=[[x, y, x + w, y, x + w, y + h, x, y + h]],
                    )
                )
            name = f"{id:012d}.jpg"
            image.save(out / split / name, quality=95)
            content["images"].append(dict(id=id, file_name=name, width=width, height=height))
        path = out / "annotations" / f"instances_{split}.json"
        path.write_text(json.dumps(content))


def _id(k: int) -> int:
    return k * k + k + 1


def _files(folder: Path, classes: int) -> dict[str, list[Path]]:
    folders = sorted(path for path in (folder / "train").iterdir() if path.is_dir())[:classes]
    return {path.name: sorted(path.iterdir()) for path in folders}


def _digits(classes: int) -> dict[str, list[Image.Image]]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = np.round(digits.images * (255 / 16)).astype(np.uint8)
    return {
        str(k): [Image.fromarray(x).convert("RGB") for x in grey[digits.target == k]]
        for k in range(classes)
    }


def background(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Smooth noise, stripes or a gradient, between two colours."""
    y, x = np.mgrid[:height, :width] / max(width, height)
    angle = rng.uniform(0, np.pi)
    along = x * np.cos(angle) + y * np.sin(angle)
    kind = rng.integers(3)
    if kind == 0:
        noise = Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8))
        amount = np.asarray(noise.resize((width, height), BICUBIC)) / 255
    elif kind == 1:
        amount = 0.5 + 0.5 * np.sin(along * rng.uniform(20, 80))
    else:
        amount = (along - along.min()) / (along.max() - along.min())
    one, two = rng.integers(0, 256, (2, 3))
    return Image.fromarray((one + amount[..., None] * (two - one)).astype(np.uint8))


def places(rng: np.random.Generator, width: int, height: int) -> list[tuple[int, int, int, int]]:
    """Boxes x, y, w, h of one to four objects, the larger first: those that follow cover little."""
    boxes, wanted = [], rng.integers(1, 5)
    for _ in range(50):
        low, high = SIDES[rng.choice(3, p=OFTEN)]
        side = rng.uniform(low, high)
        long = np.sqrt(rng.uniform(0.7, 1.4))
        w, h = (int(np.clip(round(x), 8, None)) for x in (side * long, side / long))
        if w < width and h < height and len(boxes) < wanted:
            box = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1)), w, h
            if all(iou(box, other) < OVERLAP for other in boxes):
                boxes.append(box)
    return sorted(boxes, key=lambda box: -box[2] * box[3])


def iou(one: tuple, two: tuple) -> float:
    """Of two boxes x, y, w, h: the share of both that is common to both."""
    sides = [min(one[i] + one[i + 2], two[i] + two[i + 2]) - max(one[i], two[i]) for i in (0, 1)]
    common = max(sides[0], 0) * max(sides[1], 0)
    return common / (one[2] * one[3] + two[2] * two[3] - common)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--train", type=int, default=200, help="images")
    parser.add_argument("--val", type=int, default=80, help="images")
    parser.add_argument("--size", type=int, default=128, help="shortest side, in pixels")
    parser.add_argument("--images", type=Path, help="with train/CLASS/* (default: digits)")
    parser.add_argument("--classes", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    draw(args.out, args.train, args.val, args.size, args.seed, args.images, args.classes)
    print(f"{args.out}: {args.train} + {args.val} images")


if __name__ == "__main__":
    main()
