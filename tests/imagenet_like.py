"""A folder that looks like ImageNet's, made of small images: train/ and val/, JPEG files of 256
pixels.

python tests/imagenet_like.py datasets/cifar10_jpeg datasets/imagenet_like --train 64 --val 16
"""

import argparse
from pathlib import Path

from PIL import Image


def convert(source: Path, target: Path, count: int, size: int) -> int:
    """The first `count` images of every class of `source`, enlarged. Returns how many there are."""
    made = 0
    for folder in sorted(path for path in source.iterdir() if path.is_dir()):
        (target / folder.name).mkdir(parents=True, exist_ok=True)
        for path in sorted(folder.iterdir())[:count]:
            image = Image.open(path).convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
            image.save(target / folder.name / f"{path.stem}.JPEG", quality=90)
            made += 1
    return made


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="with train/CLASS/* and test/CLASS/*")
    parser.add_argument("target", type=Path)
    parser.add_argument("--train", type=int, default=64, help="images a class")
    parser.add_argument("--val", type=int, default=16, help="images a class")
    parser.add_argument("--size", type=int, default=256)
    args = parser.parse_args(argv)
    for old, new, count in (("train", "train", args.train), ("test", "val", args.val)):
        made = convert(args.source / old, args.target / new, count, args.size)
        print(f"{args.target / new}: {made} images of {args.size} pixels")


if __name__ == "__main__":
    main()
