"""Data sets in the form of the Hugging Face hub: Parquet files in a folder, or by name.

The columns are an image (bytes of a file) and a label (an integer or a string). The splits are
named in the file names or folders, as the hub does it: train-00000-of-00001.parquet.
"""

import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dataset import RESIDENT, is_large, open_image
from engine.folders import WAYS, odd_shapes, stack
from engine.shards import SEPARATOR
from utils import UserError, first_line, shown

ROWS = 500  # read at a time
LABELS = ("label", "labels", "fine_label", "target", "class")
IMAGES = ("image", "img", "images", "pixel_values", "picture")
SPLITS = dict(train="train", test="test", val="val", valid="val", validation="val", dev="val")


@dataclass
class Table:
    """A split. schema: of pyarrow. batches: names of columns -> its rows, ROWS at a time.
    arrow: the same rows in uncompressed files, as `datasets` caches them."""

    origin: str
    schema: object
    batches: Callable[[list[str]], Iterator]
    arrow: Callable[[], list[Path]]


def hub_reader(name: str, fit: str):
    """The reader (engine/folders.py) of `name`: a folder of Parquet files, or a data set of the
    hub."""

    def read(root: Path, img_size: int | None):
        tables = _folder(Path(name)) if Path(name).is_dir() else _hub(name)
        where = f"hf/{name}"
        if "train" not in tables or not {"test", "val"} & set(tables):
            raise UserError(f"{where}: expected train and test (or validation), got {some(tables)}")
        columns = _columns(tables["train"])
        values = {split: _values(table, columns[1]) for split, table in tables.items()}
        notes, splits = [], ["train", *(x for x in ("test", "val") if x in tables)]
        if "test" in splits and "val" in splits and not _labelled(values["test"]):
            splits.remove("test")
            notes.append(
                f"{where}: the test split has no labels; the validation split is used as the test "
                "set"
            )
        if len(splits) > 2:
            notes.append(f"the best epoch is chosen on the validation split of {where}")
        classes, numbers = _classes(tables["train"].schema, columns[1], values, splits, where)
        small = is_large(img_size) and all(_all_small(tables[x], columns[0]) for x in splits)
        if is_large(img_size) and not small:
            parts, sources = [], []
            for split in splits:
                digest = hashlib.sha256(np.asarray(numbers[split], np.int64))
                items = _places(tables[split], columns[0], digest)
                parts.append((items, numbers[split]))
                sources.append(digest.hexdigest())
            notes.append(f"images that are not square: {WAYS[fit]} (--fit {fit})")
            return *parts, classes, dict(flip=True, sources=sources, fit=fit), notes
        parts, sources, odd, side = [], [], 0, None if small else img_size
        for split in splits:
            digest = hashlib.sha256(np.asarray(numbers[split], np.int64))
            images = _images(tables[split], columns[0], digest)
            items, found = stack(images, len(numbers[split]), side, f"{where} {split}", fit)
            odd += found
            parts.append((items, numbers[split]))
            sources.append(digest.hexdigest())
            if items.shape[1] != parts[0][0].shape[1]:
                raise UserError(
                    f"{where}: train images have {parts[0][0].shape[1]} pixels, {split} images "
                    f"{items.shape[1]}: give --img_size"
                )
        notes += odd_shapes(odd, sum(len(labels) for _, labels in parts), fit)
        options = dict(flip=True, sources=sources)
        options |= dict(autoaugment=True) if small else {}
        return *parts, classes, options, notes

    return read


def some(names) -> str:
    return ", ".join(map(shown, sorted(names))) or "no split"


# --- where the tables are -------------------------------------------------------------------------


def _folder(folder: Path) -> dict[str, Table]:
    """{split: table} of the Parquet files in a folder and the folders in it."""
    try:
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError(f"hf/{folder} needs pyarrow: pip install pyarrow") from None
    files = {}
    for path in sorted(folder.rglob("*.parquet")):
        split = _split_of(path, folder)
        if split is None:
            raise UserError(f"{path}: expected train, test or validation in the file name")
        files.setdefault(split, []).append(path)
    if not files:
        raise UserError(f"{folder}: no Parquet files (*.parquet) found")

    def opened(path: Path):
        try:
            return pq.ParquetFile(path)
        except Exception as error:  # of pyarrow, nearly anything
            raise UserError(f"{path}: not a readable Parquet file ({first_line(error)})") from error

    def table(paths: list[Path]) -> Table:
        def batches(columns):
            for path in paths:
                file = opened(path)
                lacks = [x for x in columns if x not in file.schema_arrow.names]
                if lacks:
                    raise UserError(f"{path}: column {some(lacks)} not found")
                try:
                    yield from file.iter_batches(ROWS, columns=columns)
                except (OSError, ValueError, RuntimeError) as error:
                    raise UserError(f"{path} is damaged ({first_line(error)})") from error

        def arrow():
            datasets, files = _datasets(folder), dict(train=list(map(str, paths)))
            try:
                found = datasets.load_dataset("parquet", data_files=files, split="train")
            except Exception as error:  # of a damaged file, or a disk without room for the copy
                raise UserError(
                    f"{paths[0]}: datasets cannot read it ({first_line(error)})"
                ) from error
            return [Path(x["filename"]) for x in found.cache_files]

        return Table(str(paths[0]), opened(paths[0]).schema_arrow, batches, arrow)

    return {split: table(paths) for split, paths in files.items()}


def _split_of(path: Path, folder: Path) -> str | None:
    """The split that the name of a file, or of a folder above it, begins with."""
    names = path.relative_to(folder).parts[::-1]
    for name in names:
        word = re.match(r"[a-z]+", name.lower())
        if word and word.group() in SPLITS:
            return SPLITS[word.group()]
    return None


def _hub(name: str) -> dict[str, Table]:
    """{split: table} of a data set of the hub, which `datasets` downloads."""
    datasets = _datasets(name)
    try:
        found = datasets.load_dataset(name)
    except Exception as error:  # of the network, of an unknown name, of a data set's own code
        raise UserError(
            f"hf/{name} was not found ({first_line(error)}): expected a folder of Parquet files, "
            "or the name of a data set on huggingface.co"
        ) from error

    def table(split) -> Table:
        def batches(columns):
            return split.select_columns(columns).with_format("arrow").iter(ROWS)

        def arrow():
            return [Path(x["filename"]) for x in split.cache_files]

        return Table(f"hf/{name}", split.features.arrow_schema, batches, arrow)

    return {SPLITS[x]: table(found[x]) for x in found if x in SPLITS}


def _datasets(name):
    """The library `datasets`, which keeps uncompressed copies in its cache ($HF_HOME)."""
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"hf/{name}: a data set of the hub, and images above {RESIDENT} pixels in Parquet "
            "files, need datasets: pip install datasets"
        ) from None
    datasets.disable_progress_bars()
    return datasets


# --- what is in them ------------------------------------------------------------------------------


def _columns(table: Table) -> tuple[str, str]:
    """The names of the columns with images and labels."""
    names = list(table.schema.names)
    image = [x for x in IMAGES if x in names]
    image += [x for x in names if str(table.schema.field(x).type).startswith("struct<bytes")]
    label = [x for x in LABELS if x in names]
    if not image or not label:
        lacks = "images" if not image else f"labels ({', '.join(LABELS)})"
        raise UserError(f"{table.origin}: no column with {lacks}: it has {some(names)}")
    return image[0], label[0]


def _values(table: Table, column: str) -> list:
    return [x for batch in table.batches([column]) for x in batch.column(column).to_pylist()]


def _labelled(values: list) -> bool:
    """Whether there is a label; the hub's sign for none is -1."""
    return any(x is not None and x != -1 for x in values)


def _classes(schema, column: str, values: dict, splits: list[str], where: str):
    """(class names, {split: the classes' numbers}): by the names that the table's metadata has, or
    the values themselves in order."""
    present = {x for split in splits for x in values[split]}
    if not all(isinstance(x, str) or type(x) is int and x >= 0 for x in present):
        odd = next(x for x in present if not (isinstance(x, str) or type(x) is int and x >= 0))
        raise UserError(f"{where}: column {column}: {shown(odd)} is not a class")
    if len({type(x) for x in present}) > 1:
        raise UserError(f"{where}: column {column} has numbers and strings")
    names = _names(schema, column)
    if names and all(type(x) is int and x < len(names) for x in present):
        return names, {split: values[split] for split in splits}
    order = {value: i for i, value in enumerate(sorted(present))}
    numbers = {split: [order[x] for x in values[split]] for split in splits}
    return [str(x) for x in order], numbers


def _names(schema, column: str) -> list[str] | None:
    """The class names in the metadata that `datasets` writes."""
    try:
        about = json.loads((schema.metadata or {})[b"huggingface"])
        names = about["info"]["features"][column]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    if isinstance(names, dict):  # {"0": name, ...}, of older ones
        names = list(names.values())
    fine = isinstance(names, list) and all(isinstance(x, str) and x.isprintable() for x in names)
    return names if fine and len(set(names)) == len(names) > 0 else None


def _bytes(table: Table, column: str) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of every image."""
    row = 0
    for batch in table.batches([column]):
        for x in batch.column(column).to_pylist():
            name = f"{table.origin}, image {row}"
            row += 1
            data = x.get("bytes") if isinstance(x, dict) else x
            if not isinstance(data, bytes):
                raise UserError(f"{name}: column {column} has no bytes of an image file")
            yield name, data


def _images(table: Table, column: str, digest) -> Iterator:
    for name, data in _bytes(table, column):
        digest.update(data)
        yield name, open_image(name, data)


def _places(table: Table, column: str, digest) -> np.ndarray:
    """Where each image's bytes are in the uncompressed files (FILE, offset, size, as in shards), so
    that worker processes read them one by one. `digest` gets their sizes."""
    import pyarrow as pa

    items = []
    for path in table.arrow():
        with pa.memory_map(str(path)) as file:
            start = file.read_buffer(file.size()).address
            file.seek(0)
            for batch in pa.ipc.open_stream(file):
                data = batch.column(column)
                data = data.field("bytes") if pa.types.is_struct(data.type) else data
                if data.null_count or not _is_binary(data.type):
                    what = f"column {column} has no bytes of an image file"
                    raise UserError(f"{table.origin}: an image has none: {what}")
                _, offsets, values = data.buffers()
                wide = np.int64 if pa.types.is_large_binary(data.type) else np.int32
                bounds = np.frombuffer(offsets, wide)[data.offset : data.offset + len(data) + 1]
                places = bounds.astype(np.int64) + (values.address - start)
                digest.update(np.diff(places))
                for first, end in zip(places[:-1].tolist(), places[1:].tolist()):
                    item = SEPARATOR.join((str(path), str(first), str(end - first)))
                    items.append(os.fsencode(item))
    return np.array(items)


def _is_binary(kind) -> bool:
    import pyarrow as pa

    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _all_small(table: Table, column: str) -> bool:
    """Whether all are square and small enough to be kept and enlarged."""
    from PIL import Image

    def is_small(data: bytes) -> bool:
        try:
            with Image.open(io.BytesIO(data)) as image:
                return image.width == image.height <= RESIDENT
        except Exception:  # PIL raises nearly anything on a broken file
            return False

    return all(is_small(data) for _, data in _bytes(table, column))
