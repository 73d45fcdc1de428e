"""Annotation files and images laid out as COCO's, for tests."""

import json

import numpy as np
from PIL import Image

from detection import coco

SMALL, LARGE = (3, 4, 20, 10), (10, 20, 100, 100)  # x, y, width, height
POLYGON = [[3, 4, 23, 4, 23, 14, 3, 14]]  # SMALL
RUNS = dict(size=[128, 160], counts=[0, 10, 118, 10, 128 * 160 - 138])  # columns 0, 1; rows 0 to 9


def boxed(id, image, category, box, **more):
    return dict(id=id, image_id=image, category_id=category, bbox=list(box), **more)


def content(annotations, n=2, width=160, height=128):
    images = [dict(id=i, file_name=f"{i}.png", width=width, height=height) for i in range(1, n + 1)]
    categories = [dict(id=id, name=name) for id, name in ((7, "dog"), (1, "cat"))]
    return dict(images=images, categories=categories, annotations=annotations)


def write(root, train, val=None, images=True):
    """Lay it out as COCO's; image i is of grey 10 * i, its upper left corner white."""
    (root / "annotations").mkdir(exist_ok=True)
    for split, found in (("train2017", train), ("val2017", val or train)):
        (root / split).mkdir(exist_ok=True)
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(found))
        for image in found["images"] if images else ():
            pixels = np.full((image["height"], image["width"], 3), 10 * image["id"], np.uint8)
            pixels[:10, :20] = 255
            Image.fromarray(pixels).save(root / split / image["file_name"])
    return root


def data(root, annotations, n=2, masks=False):
    return coco.Coco(write(root, content(annotations, n)), "val2017", masks)
