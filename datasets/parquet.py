"""Images in Parquet files, as Hugging Face publishes data sets.

    ROOT/train-00000-of-00002.parquet, ...    or ROOT/data/train-*.parquet, or ROOT/train/*.parquet
    ROOT/test-*.parquet, ROOT/validation-*.parquet

Each row holds one image: a struct of ``bytes`` (an image file) and ``path`` (its name), and often a class: a number
whose name is in the schema's metadata under ``huggingface`` (ClassLabel), another number, or text.

Letters: N rows of a split.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from datasets import inventory, packed
from datasets.files import IN_MEMORY, Classes, Reader
from datasets.images import DataError, ImageSet, Request, Splits, formats

SPLITS = {"train": "train", "test": "test", "validation": "validation", "valid": "validation", "val": "validation"}
"""Word in the name of a shard or of one of its folders -> split."""
LABEL_COLUMNS = ("label", "labels", "fine_label")
"""Names of label columns; the first usable one is used."""
LABEL_TYPES = ("int", "uint", "string", "large_string", "bool", "dictionary<values=string")
"""How the names of valid types of a label column begin."""
BINARY = ("binary", "large_binary")
UNKNOWN = -1
"""Label of an image without a class, as in ClassLabel."""
ROWS = 64
"""Number of rows read at a time."""
EXPECTED = "train-*.parquet, and for evaluation test-*.parquet or validation-*.parquet"


@dataclass(frozen=True)
class Shard:
    """A Parquet file.

    Attributes:
        root, name: the data root, and the path below it.
        columns: types by name.
        features: metadata of the columns by Hugging Face's library, by name.
        rows: number of rows.
        size: size of the uncompressed content, in bytes.
    """

    root: Path
    name: str
    columns: dict[str, Any]
    features: dict[str, dict[str, Any]]
    rows: int
    size: int

    def values(self, column: str) -> list[Any]:
        """All values of a column."""
        with self._attempt(self._open) as file:
            return list(self._attempt(lambda: file.read(columns=[column]).column(0).to_pylist()))

    def paths(self, column: str) -> list[str | None]:
        """The ``path`` of each row's image."""
        if "path" not in _fields(self.columns[column]):
            return [None] * self.rows
        return [value and value["path"] for value in self.values(f"{column}.path")]

    def images(self, column: str) -> Iterator[bytes]:
        """The encoded images; empty where a row has none."""
        field = f"{column}.bytes" if _fields(self.columns[column]) else column
        # not whole row groups, which may not fit in memory
        with self._attempt(self._open) as file:
            batches = file.iter_batches(ROWS, columns=[field])
            while (batch := self._attempt(lambda: next(batches, None))) is not None:
                for value in batch.column(0).to_pylist():
                    yield (value["bytes"] if isinstance(value, dict) else value) or b""

    def _open(self) -> Any:
        return _pyarrow().ParquetFile(self.root / self.name, buffer_size=2**20)

    def _attempt(self, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except Exception as error:  # damaged files can cause any error
            raise _unreadable(self.root / self.name, error) from None


def load(request: Request) -> Splits:
    """Reads one shard, or a folder of them.

    Raises:
        DataError: pyarrow or the files are missing, the files contain no images, or their columns differ.
    """
    _pyarrow()
    root, names, notes = _layout(request)
    shards = {split: [_open(root, name) for name in found] for split, found in names.items()}
    first = shards["train"][0]
    image, label = _image_column(first, notes), _label_column(first, request.label_column, notes)
    for shard in chain.from_iterable(shards.values()):
        for column in (image, label):
            _check_same(shard, first, column)
    classes = _classes(shards, label) if label else {}
    tests = [split for split in ("test", "validation") if split in shards]
    labelled = [split for split in tests if split in classes and (classes[split].labels != UNKNOWN).any()]
    test = next(iter(labelled + tests), None)
    if tests and test != tests[0]:
        notes.append(f"{root}: the images of the test split have no labels: those of validation serve as test images")
    reader = Reader(root, request, notes)
    parts = [_read(reader, shards[split], split, image, classes.get(split)) for split in ("train", test) if split]
    return _without_unknown(reader.splits(parts[0], parts[1] if test else None))


def _layout(request: Request) -> tuple[Path, dict[str, list[str]], list[str]]:
    """The data root, the names of the shards of each split below it, and notes for the user."""
    root = request.root
    if root is None:
        raise DataError(f"data_root is not set: pass --data-root with a Parquet file, or a folder with {EXPECTED}")
    if root.is_file():
        return root.parent, {"train": [root.name]}, []
    if not root.is_dir():
        raise DataError(f"{root}: no such file or folder; --data-root should be a Parquet file or hold {EXPECTED}")
    below = sorted(path.relative_to(root) for path in root.rglob("*.parquet"))
    found: dict[str | None, list[str]] = {}
    for path in below:
        if not any(part.startswith(".") for part in path.parts):
            found.setdefault(_split_of(path), []).append(path.as_posix())
    if not found:
        raise DataError(f"{root}: holds no Parquet file; --data-root should be one or hold {EXPECTED}")
    rest = found.pop(None, [])
    if not found:
        notes = [f"{root}: no file is named as a split: all {len(rest)} of them are training images"]
        return root, _in_one_folder(root, {"train": rest}), notes
    if "train" not in found:
        raise DataError(f"{root}: holds {rest[0] if rest else next(iter(found.values()))[0]} but no train-*.parquet")
    splits = _in_one_folder(root, {split: names for split, names in found.items() if split})
    notes = [f"{root}: {name} is ignored: its name contains no split" for name in rest]
    return root, splits, notes + [note for names in splits.values() for note in _missing(root, names)]


def _split_of(path: Path) -> str | None:
    """The split in a shard's name, or else in the name of the nearest folder."""
    for part in reversed(path.parts):
        if word := re.search(rf"(?<![a-z])({'|'.join(SPLITS)})(?![a-z])", part.lower()):
            return SPLITS[word[1]]
    return None


def _in_one_folder(root: Path, splits: dict[str, list[str]]) -> dict[str, list[str]]:
    """Raises DataError if a split's shards are in several folders, which are usually several data sets."""
    for split, names in splits.items():
        folders = sorted({Path(name).parent.as_posix() for name in names})
        if len(folders) > 1:
            raise DataError(
                f"{root}: has {split} images in the folders {', '.join(folders[:5])}; pass one of them as --data-root"
            )
    return splits


def _missing(root: Path, names: Sequence[str]) -> list[str]:
    """A note if shards are missing, according to the names (``-00000-of-00002``)."""
    counts = {int(found[1]) for name in names if (found := re.search(r"-\d+-of-(\d+)", name))}
    if len(counts) == 1 and len(names) < max(counts):
        return [f"{root}: {len(names)} of {max(counts)} shards are there, such as {names[0]}: the others are not used"]
    return []


def _open(root: Path, name: str) -> Shard:
    """Reads the footer of a shard. Raises DataError if it is not a Parquet file."""
    try:
        with _pyarrow().ParquetFile(root / name) as file:
            schema, metadata = file.schema_arrow, file.metadata
            size = sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
            features = _features((schema.metadata or {}).get(b"huggingface", b""))
            return Shard(
                root, name, dict(zip(schema.names, schema.types, strict=True)), features, metadata.num_rows, size
            )
    except Exception as error:  # damaged files can cause any error
        raise _unreadable(root / name, error) from None


def _features(noted: bytes) -> dict[str, dict[str, Any]]:
    """The features that Hugging Face's library stores in the metadata; empty if there are none."""
    try:
        features: dict[str, Any] = json.loads(noted)["info"]["features"]
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (ValueError, TypeError, KeyError, AttributeError):
        return {}


def _unreadable(path: Path, error: Exception) -> DataError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return DataError(f"{path}: cannot be read as a Parquet file: {reason}; fetch it again, or move it away")


def _pyarrow() -> Any:
    try:
        return importlib.import_module("pyarrow.parquet")
    except Exception as error:  # broken installations can raise any error
        raise DataError(
            f"--dataset parquet needs the package pyarrow, which cannot be imported ({error}); run pip install -r "
            "requirements-parquet.txt"
        ) from None


def _fields(kind: Any) -> dict[str, str]:
    """The fields of a struct and their types; empty for other types."""
    return {field.name: str(field.type) for field in kind} if str(kind).startswith("struct<") else {}


def _image_column(shard: Shard, notes: list[str]) -> str:
    """The first column of images."""
    found = []
    for name, kind in shard.columns.items():
        noted = shard.features.get(name, {}).get("_type")  # Audio is a struct of bytes and path, too
        if (noted == "Image" and str(kind) in BINARY) or (
            noted in ("Image", None) and _fields(kind).get("bytes") in BINARY
        ):
            found.append(name)
    if not found:
        columns = ", ".join(f"{name} ({str(kind)[:40]})" for name, kind in list(shard.columns.items())[:10])
        raise DataError(
            f"{shard.root / shard.name}: no column holds images, which would be a struct of bytes and path; the "
            f"columns are {columns}; choose a data set that holds the image files themselves"
        )
    if len(found) > 1:
        notes.append(f"{shard.root}: of the columns of images, {', '.join(found)}, the first one is used")
    return found[0]


def _label_column(shard: Shard, name: str | None, notes: list[str]) -> str | None:
    """The column of the labels: the user's, or the first of ``LABEL_COLUMNS``, or the only ClassLabel."""
    if name is None:
        noted = [column for column in shard.columns if shard.features.get(column, {}).get("_type") == "ClassLabel"]
        there = [column for column in LABEL_COLUMNS if column in shard.columns]
        chosen = next((column for column in there if _is_label(shard, column)), noted[0] if len(noted) == 1 else None)
        if there and chosen is None:
            notes.append(
                f"{shard.root}: {there[0]} holds {shard.columns[there[0]]}, which cannot be a class: "
                "there are no labels"
            )
        return chosen
    where = f"--label-column {name}: {shard.root / shard.name}"
    if name not in shard.columns:
        near = get_close_matches(name, shard.columns, 1, 0)
        raise DataError(f"{where} has no such column; did you mean {near[0]}?")
    if not _is_label(shard, name):
        raise DataError(f"{where} holds {shard.columns[name]} there; labels are integers or text: name another column")
    return name


def _is_label(shard: Shard, column: str) -> bool:
    return str(shard.columns[column]).startswith(LABEL_TYPES)


def _check_same(shard: Shard, first: Shard, column: str | None) -> None:
    """Raises DataError unless a column that is used is the same in two shards."""
    if column is None:
        return
    kinds = [s.columns.get(column, "missing") for s in (shard, first)]
    names = [s.features.get(column, {}).get("names") for s in (shard, first)]
    if kinds[0] != kinds[1] or names[0] != names[1]:
        how = f"{kinds[0]} here and {kinds[1]} there" if kinds[0] != kinds[1] else "with other class names"
        raise DataError(
            f"{shard.root / shard.name}: its schema differs from that of {first.name}: the column {column} is {how}; "
            "move away the files that do not belong to the data set"
        )


def _classes(shards: dict[str, list[Shard]], column: str) -> dict[str, Classes]:
    """The class indices of each split; ``UNKNOWN`` for rows without a class.

    Raises:
        DataError: a ClassLabel has no name, or a class has no training images.
    """
    values = {split: [value for shard in found for value in shard.values(column)] for split, found in shards.items()}
    noted = shards["train"][0].features.get(column, {})
    is_class_label = noted.get("_type") == "ClassLabel" and bool(noted.get("names"))
    if is_class_label:
        names = tuple(map(str, noted["names"]))
        number: dict[Any, int] = {i: i for i in range(len(names))}
    else:
        known = sorted({value for value in values["train"] if value is not None})
        names, number = tuple(map(str, known)), {value: i for i, value in enumerate(known)}
    number = {**number, None: UNKNOWN, **({UNKNOWN: UNKNOWN} if is_class_label else {})}
    for split, found in values.items():
        if strange := [value for value in found if value not in number]:
            raise DataError(
                f"{shards[split][0].root}: the column {column} of the {split} split holds {strange[0]!r}, "
                + (
                    f"but there are names for {len(names)} classes only"
                    if is_class_label
                    else "a class without training images"
                )
                + "; correct the files, or name another --label-column"
            )
    return {
        split: Classes(names, np.array([number[value] for value in found], np.int64)) for split, found in values.items()
    }


def _read(reader: Reader, shards: list[Shard], split: str, image: str, classes: Classes | None) -> ImageSet:
    """The images of a split, decoded in memory or on access."""
    names = json.dumps([image, *(shard.name for shard in shards)])
    stats = [(reader.root / shard.name).stat() for shard in shards]
    states = json.dumps([names, *((found.st_size, found.st_mtime_ns) for found in stats)])
    fingerprint = hashlib.sha256(states.encode()).digest()
    try:
        place = inventory.cache_path(reader.root, f"parquet {names}", ".images")
    except RuntimeError as error:
        raise DataError(f"~/.cache: the images cannot be kept there: {error}; {packed.REMEDY}") from None
    count, size = (sum(getattr(shard, what) for shard in shards) for what in ("rows", "size"))
    content = packed.recall(place, count, fingerprint)
    if content is None:
        rows = chain.from_iterable(shard.images(image) for shard in shards)
        shown: Any = reader.request.progress(rows, f"reading {split} rows", count, "image")
        is_small = size <= IN_MEMORY
        content = (
            packed.in_memory(shown, place, fingerprint)
            if is_small
            else packed.pack(shown, count, size, place, fingerprint)
        )
    files = inventory.take(reader.root, f"parquet {' '.join(formats())} {names}", partial(_listing, shards, image))
    return reader.read(split, files, classes=classes, packed=content)


def _listing(shards: list[Shard], image: str) -> inventory.Listing:
    """Names of the rows: their paths if these are unique, and otherwise shard and row."""
    paths = [path for shard in shards for path in shard.paths(image)]
    rows = [f"{shard.name}#{row}" for shard in shards for row in range(shard.rows)]
    times = Counter(paths)
    names = [
        row if not path or times[path] > 1 else path.replace("\0", "") for path, row in zip(paths, rows, strict=True)
    ]
    return inventory.Listing(names, [shard.name for shard in shards])


def _without_unknown(splits: Splits) -> Splits:
    """If only some training images have labels, these become ``labelled``. Test images without labels are dropped."""
    notes, train, test, labelled = [*splits.notes], splits.train, splits.test, None
    if train.labels is not None and (unknown := int((train.labels == UNKNOWN).sum())):
        known = np.flatnonzero(train.labels != UNKNOWN)
        notes.append(f"{unknown} of {len(train)} training images have no label: the others are used for evaluation")
        labelled = train.take(known) if len(known) else None
        train = replace(train, labels=None, classes=())
    if test is not None and test.labels is not None and (unknown := int((test.labels == UNKNOWN).sum())):
        if unknown < len(test):
            notes.append(f"{unknown} of {len(test)} test images have no label and are ignored")
            test = test.take(np.flatnonzero(test.labels != UNKNOWN))
        else:
            test = replace(test, labels=None, classes=())
    return replace(splits, train=train, test=test, labelled=labelled, notes=tuple(notes))
