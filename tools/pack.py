"""Pack a folder of images into shards: tar files in the format of WebDataset.

    python tools/pack.py datasets/imagenet shards --data_name imagenet --max_side 256
    python train_kd.py --data_name wds --img_root 'shards/train-{0000..0127}.tar' ...

Reading a few large files is faster than reading a million small ones. --max_side also makes the
images smaller, so they are read and decoded faster. The images keep the order of the folder, so
training on shards without --max_side gives the same numbers as training on the folder.
"""

import argparse
import io
import itertools
import os
import sys
import tarfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import dataset  # noqa: E402
import utils  # noqa: E402
from engine import cli, console, stream  # noqa: E402
from utils import UserError  # noqa: E402

UNIT = ((0.0,) * 3, (1.0,) * 3)  # given mean and std, so that stream.load does not measure them


def packed(path: bytes, max_side: int | None, quality: int) -> tuple[str, bytes]:
    """(suffix, bytes) of an image: the file unchanged, or a JPEG whose shorter side has `max_side`
    pixels if the image is larger."""
    name = os.fsdecode(path)
    suffix = os.path.splitext(name)[1].lower()
    image = dataset.open_image(name)  # raises UserError if the image cannot be read
    if max_side is None or min(image.size) <= max_side:
        return suffix, Path(name).read_bytes()
    from PIL import Image

    scale = max_side / min(image.size)
    size = [max(max_side, round(side * scale)) for side in image.size]
    file = io.BytesIO()
    image.resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=quality)
    return ".jpg", file.getvalue()


def write_split(
    images: dataset.Files,
    out: Path,
    split: str,
    per_shard: int,
    max_side,
    quality: int,
    workers: int,
) -> list[Path]:
    """Write the shards of a split into the folder `out`. Returns their paths."""
    make = partial(packed, max_side=max_side, quality=quality)
    count = -(-len(images) // per_shard)
    width = max(4, len(str(count - 1)))
    shards, number = [], 0
    labels = images.labels.tolist()
    with ProcessPoolExecutor(workers) if workers > 1 else _InProcess() as pool:
        samples = pool.map(make, images.items, chunksize=16)
        for shard in range(count):
            path = out / f"{split}-{shard:0{width}}.tar"
            with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
                for suffix, data in itertools.islice(samples, per_shard):
                    _add(archive, f"{number:09}{suffix}", data)
                    _add(archive, f"{number:09}.cls", str(labels[number]).encode())
                    number += 1
            shards.append(path)
    return shards


class _InProcess:
    """Like a process pool, but runs everything in this process."""

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        pass

    def map(self, make, items, chunksize: int):
        return map(make, items)


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # no time or owner: equal images give equal files
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def parse(argv: list[str]) -> argparse.Namespace:
    parser = cli.Parser(prog="pack.py", description=__doc__)
    add = parser.add_argument
    add(
        "root",
        type=cli.filled,
        metavar="DIR",
        help="folder with train/<class>/* and test/<class>/*",
    )
    add("out", type=cli.filled, metavar="OUT", help="a new folder for the shards")
    add(
        "--data_name",
        choices=("imagefolder", "imagenet"),
        default="imagefolder",
        help="layout of DIR; imagenet: the test images are in val (default imagefolder)",
    )
    add(
        "--max_side",
        type=cli.number(int, *dataset.SIZES),
        metavar="N",
        help="shrink images so that their shorter side is N pixels (default: no change)",
    )
    add(
        "--quality",
        type=cli.number(int, 1, 100),
        metavar="Q",
        help="JPEG quality of the images that --max_side shrinks (default 92)",
    )
    add(
        "--per_shard",
        type=cli.number(int, 1),
        default=10_000,
        metavar="N",
        help="images per shard (default 10000)",
    )
    workers = "number of processes (default: one per CPU)"
    add("--workers", type=cli.number(int, 0, 1024), metavar="N", help=workers)
    args = parser.parse_args(argv)
    if args.quality and not args.max_side:
        raise UserError(f"--quality {args.quality} has no effect without --max_side N; give both")
    return args


@console.command
def main(argv: list[str] | None = None) -> None:
    """Write the shards of both splits, and classes.txt."""
    args = parse(sys.argv[1:] if argv is None else list(argv))
    out = Path(args.out)
    cli.usable_folder(out, "OUT")
    if out.exists() and any(out.iterdir()):
        raise UserError(f"OUT {out}: the folder is not empty; give a new folder")
    data = stream.load(args.data_name, args.root, UNIT, dataset.RESIDENT + 1)
    if not isinstance(data.train, dataset.Files):
        raise UserError(
            f"{args.root}: nothing to pack, since images of up to {dataset.RESIDENT} pixels are "
            "kept on the device; train on the folder"
        )
    if any("\n" in name for name in data.train.classes):
        raise UserError(f"{args.root}: the name of a class has a line break; rename its folder")
    out.mkdir(parents=True, exist_ok=True)
    (out / "classes.txt").write_bytes(os.fsencode("".join(f"{x}\n" for x in data.train.classes)))
    workers = utils.cpus() if args.workers is None else args.workers
    for split, images in (("train", data.train), ("test", data.test)):
        paths = write_split(
            images, out, split, args.per_shard, args.max_side, args.quality or 92, workers
        )
        size = sum(path.stat().st_size for path in paths)
        console.say(f"{split}: {len(images)} images in {len(paths)} shards, {size / 1e6:,.1f} MB")
        if split == "train":
            first, last = (path.stem.removeprefix("train-") for path in (paths[0], paths[-1]))
            name = f"train-{{{first}..{last}}}.tar" if len(paths) > 1 else paths[0].name
    console.say(f"--data_name wds --img_root '{out / name}'")


if __name__ == "__main__":
    main()
