"""Reads image files as image sets.

Every file is opened once before training, so that unreadable images are known before the memory bank is created.
Small data sets are kept in memory; images of large ones are decoded on access.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from datasets import inventory
from datasets.images import (
    RAW_ENDINGS,
    Chosen,
    DataError,
    Encoded,
    ImageFiles,
    ImageSet,
    Request,
    Splits,
    UnreadableImageError,
    check_whole,
    clip,
    formats,
    quiet,
    read_rgb,
    size_of,
)
from datasets.inventory import Inventory, Listing, Names
from datasets.packed import Packed

IN_MEMORY = 2**30
"""Maximum size of a split's decoded pixels, in bytes, for keeping it in memory."""

IMAGE_ENDINGS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".ppm", ".pgm", ".pbm", ".pnm", ".bmp", ".dib", ".tif", ".tiff",
    ".webp", ".gif", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".avif", ".heic", ".heif", *RAW_ENDINGS,
)  # fmt: skip
"""Endings of image files, in any case. A file with one of them that cannot be read is an unreadable image."""

OTHER_ENDINGS = (
    ".txt", ".md", ".rst", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".yaml", ".yml", ".toml", ".ini", ".cfg", ".html",
    ".htm", ".css", ".js", ".py", ".ipynb", ".sh", ".log", ".db", ".sqlite", ".lst", ".pdf", ".doc", ".docx", ".xls",
    ".xlsx", ".xmp", ".aae", ".npy", ".npz", ".mat", ".pkl", ".h5", ".hdf5", ".parquet", ".zip", ".tar", ".gz", ".tgz",
    ".bz2", ".xz", ".7z", ".rar", ".md5", ".sha256", ".lnk", ".url",
)  # fmt: skip
"""Endings of other files, in any case, which are ignored: text, tables, archives, system files."""
OTHER_NAMES = ("license", "readme")
"""As ``OTHER_ENDINGS``, whole names."""

TOGETHER = 64  # files per task: one future for each of a million files would use too much memory


@dataclass(frozen=True)
class Classes:
    """Class names of a split, and the class index of each file."""

    names: tuple[str, ...]
    labels: np.ndarray  # (N,) int64


@dataclass
class Reader:
    """Reads the splits of one data root, and collects notes and skipped files."""

    root: Path
    request: Request
    notes: list[str] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def read(
        self,
        part: str,
        files: Inventory,
        *,
        classes: Classes | None = None,
        boxes: np.ndarray | None = None,
        packed: Packed | None = None,
    ) -> ImageSet:
        """Opens the files that are not in the inventory cache, and returns the readable images.

        Args:
            part: name of the split for the progress bar.
            files: N files below the root.
            classes: classes of the files, or None without labels.
            boxes: int64 (N, 4), left, top, right and bottom in pixels, to crop each image to; None: whole images.
            packed: the N encoded images, if they are not files of those names.

        Raises:
            DataError: a box is outside its image, or the packed images cannot be kept.
        """
        names, sizes, reasons = files.names, files.sizes, files.reasons
        if sizes is None:
            headers = self._each(size_of, names, packed, f"reading {part} images (headers)")
            sizes = np.array([(0, 0) if _bad(size) else size for size in headers], np.int32).reshape(-1, 2)
        in_memory = 3 * int(sizes.astype(np.int64).prod(axis=1).sum()) <= IN_MEMORY
        pixels: list[Any] = []
        if in_memory or files.sizes is None:
            whole = partial(read_rgb, upright=boxes is None)
            pixels = self._each(whole if in_memory else check_whole, names, packed, f"reading {part} images")
            bad = [i for i, image in enumerate(pixels) if _bad(image)]
            sizes[bad], reasons = 0, {**reasons, **{names[i]: str(pixels[i]) for i in bad}}
        if files.sizes is None and not in_memory:
            self._remember(replace(files, sizes=sizes, reasons=reasons))
        self.skipped += reasons.items()
        good = np.flatnonzero(sizes[:, 0]).tolist()
        kept = names if len(good) == len(names) else Names(names[i] for i in good)
        boxes = None if boxes is None else _inside(boxes[good], sizes[good], kept)
        encoded = None if packed is None or in_memory else Chosen(packed.on_disk(), np.array(good, np.int64))
        return ImageSet(
            _together([pixels[i] for i in good], boxes) if in_memory else ImageFiles(self.root, kept, boxes, encoded),
            None if classes is None else classes.labels[good],
            () if classes is None else classes.names,
            kept,
        )

    def splits(self, train: ImageSet, test: ImageSet | None) -> Splits:
        """Both splits with the notes and skipped files.

        Raises:
            DataError: no training image could be read, or an image is unreadable and the request is strict.
        """
        if self.skipped and self.request.strict:
            names = "; ".join(f"{name} ({why})" for name, why in self.skipped[:10])
            raise DataError(
                f"{self.root}: {len(self.skipped)} unreadable images: {names}; "
                "repair or remove them, or drop --strict-data"
            )
        if not len(train):
            name, why = self.skipped[0]
            raise DataError(
                f"{self.root}: no training image could be read, for instance {name} ({why}); repair the files"
            )
        test = test if test is not None and len(test) else None
        return Splits(train, test, notes=tuple(self.notes), skipped=tuple(self.skipped))

    def _remember(self, files: Inventory) -> None:
        try:
            inventory.remember(self.root, files)
        except DataError as error:
            self.notes.append(f"{error}; the next start opens every file again")

    def _each(
        self, work: Callable[[Encoded], Any], names: Sequence[str], packed: Packed | None, what: str
    ) -> list[Any]:
        """``work`` of every image, in order; an UnreadableImageError is returned in place of the result."""

        def attempt(start: int) -> list[Any]:
            results: list[Any] = []
            for i, name in enumerate(names[start : start + TOGETHER], start=start):
                try:
                    results.append(work(self.root / name if packed is None else packed[i]))
                except UnreadableImageError as error:
                    results.append(error)
            return results

        # Pillow releases the GIL while decoding
        with quiet(), ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            results = chain.from_iterable(pool.map(attempt, range(0, len(names), TOGETHER)))
            return list(self.request.progress(results, what, len(names), "file"))


def open_root(request: Request, expected: str, remedy: str) -> Path:
    """The data root.

    Args:
        request: contains the root.
        expected: the expected content, for messages.
        remedy: how to get it, for messages.

    Raises:
        DataError: the root is not set, or is not a folder.
    """
    if request.root is None:
        raise DataError(f"data_root is not set: pass --data-root with a folder that holds {expected}; {remedy}")
    if not request.root.is_dir():
        raise DataError(f"{request.root}: no such folder; --data-root should name one that holds {expected}; {remedy}")
    return request.root


def below(root: Path, folder: str) -> Inventory:
    """All images below a folder of the root, sorted, without hidden files and circular links.

    Images are recognised by ``IMAGE_ENDINGS``, or by content. Files with ``OTHER_ENDINGS`` are ignored; all others are
    listed in ``reasons``.

    Raises:
        OSError: a folder cannot be read.
    """
    key = f"{folder} {' '.join(formats())}"  # supported formats depend on Pillow and pillow-heif
    return inventory.take(root, key, partial(_walk, root, folder))


def listed(root: Path, names: Sequence[str], source: str, remedy: str) -> Inventory:
    """The files of a list, all of which must exist.

    Args:
        root: the data root.
        names: relative to the root.
        source: name of the list, for messages.
        remedy: what to do if files are missing, for messages.

    Raises:
        DataError: files are missing, or the list is empty.
    """
    key = f"{source} {hashlib.sha256(Names(names).packed.tobytes()).hexdigest()}"
    return inventory.take(root, key, partial(_check_list, root, names, source, remedy))


def class_folders(root: Path, split: str, files: Inventory) -> Classes | None:
    """The classes of ``split/<class>/...``, or None without class folders.

    Raises:
        DataError: there are images both in class folders and next to them.
    """
    parts = [name.split(os.sep, 2) for name in files.folders]
    folders = sorted(part[1] for part in parts if len(part) == 2 and part[0] == split)
    direct = [name for name in files.names if name.count(os.sep) == 1]
    if folders and direct:
        raise DataError(
            f"{root / split}: holds both class folders ({folders[0]}) and images next to them "
            f"({Path(min(direct)).name}); move the images into class folders, or the folders away"
        )
    if not folders:
        return None
    number = {name: i for i, name in enumerate(folders)}
    labels = [number[name.split(os.sep, 2)[1]] for name in files.names]
    return Classes(tuple(folders), np.array(labels, np.int64))


def renumber(test: Classes, train: tuple[str, ...], root: Path) -> Classes:
    """The test classes with the class indices of the training images.

    Raises:
        DataError: a test class has no training images.
    """
    if unknown := sorted(set(test.names) - set(train)):
        names = ", ".join(unknown[:5])
        raise DataError(
            f"{root}: the test folder has classes that are missing in train: {names}; rename or remove them"
        )
    number = {name: i for i, name in enumerate(train)}
    return Classes(train, np.array([number[name] for name in test.names], np.int64)[test.labels])


def joined(folder: str, names: Sequence[str]) -> list[str]:
    """The names of a published list below a folder, with this system's path separator."""
    return [str(Path(folder, name)) for name in names]


def _walk(root: Path, folder: str) -> Listing:
    names: list[str] = []
    looked_into: list[str] = []
    reasons: dict[str, str] = {}
    for here, folders, files in os.walk(root / folder, followlinks=True, onerror=_raise):
        real = Path(here).resolve()  # a link to a parent folder would recurse forever
        folders[:] = sorted(n for n in folders if _visible(n) and Path(here, n).resolve() not in (real, *real.parents))
        inside = os.path.relpath(here, root)
        looked_into.append(inside)
        for file in sorted(files):
            name = file if inside == "." else f"{inside}{os.sep}{file}"
            if file.lower().endswith(IMAGE_ENDINGS) and _visible(file):
                names.append(name)
            elif _visible(file) and not file.lower().endswith(OTHER_ENDINGS) and file.lower() not in OTHER_NAMES:
                try:
                    with quiet():
                        size_of(root / name)
                    names.append(name)
                except UnreadableImageError as error:
                    reasons[name] = str(error)
    return Listing(names, looked_into, reasons)


def _check_list(root: Path, names: Sequence[str], source: str, remedy: str) -> Listing:
    if not names:
        raise DataError(f"{root}: {source} names no image; {remedy}")
    folders = sorted({os.path.dirname(name) for name in names})  # noqa: PTH120  # strings, a million of them
    there = {f"{folder}{os.sep}{entry}" for folder in folders for entry in _entries(root / folder)}
    if missing := [name for name in names if name not in there]:
        raise DataError(f"{root}: {source} names {len(missing)} files that are missing, first {missing[0]}; {remedy}")
    return Listing(names, folders)


def _entries(folder: Path) -> Iterator[str]:
    if folder.is_dir():
        yield from os.listdir(folder)  # noqa: PTH208  # strings, as above


def _visible(name: str) -> bool:
    return not name.startswith((".", "__MACOSX"))


def _raise(error: OSError) -> None:
    raise error


def _bad(result: Any) -> bool:
    return isinstance(result, UnreadableImageError)


def _inside(boxes: np.ndarray, sizes: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Boxes (N, 4) clipped to the image sizes (N, 2). Raises DataError if a box becomes empty."""
    cut: np.ndarray = np.clip(boxes, 0, np.tile(sizes, 2))
    empty = np.flatnonzero((cut[:, 2] <= cut[:, 0]) | (cut[:, 3] <= cut[:, 1]))
    if len(empty):
        raise DataError(
            f"{names[empty[0]]}: its bounding box {boxes[empty[0]].tolist()} (left, top, right, bottom) lies outside "
            f"the image of {' x '.join(map(str, sizes[empty[0]]))} pixels; correct the box, or drop --bounding-boxes"
        )
    return cut


def _together(images: list[np.ndarray], boxes: np.ndarray | None) -> Any:
    """Images in memory, as one array (N, H, W, 3) if all have the same size."""
    if boxes is not None:
        images = [clip(image, box) for image, box in zip(images, boxes, strict=True)]
    if len({image.shape for image in images}) != 1:
        return images
    result = np.empty((len(images), *images[0].shape), np.uint8)
    for i in range(len(images)):
        result[i] = images[i]
        images[i] = result[i]  # frees the original, so that memory never holds all images twice
    return result
