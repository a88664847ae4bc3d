"""Encoded images in one block, in memory or in a file of the user's cache folder.

A Parquet file compresses many images together, so a single one cannot be read alone. The file written here allows that:
it holds the encoded images, then the end offset of each (int64, N), then a fingerprint of their source. It is opened
for each image, like an image file, so that worker processes share nothing but its path.

Letters: N images.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import numpy as np

from datasets.images import DataError

REMEDY = "set XDG_CACHE_HOME to a folder on another disk"


@dataclass(frozen=True)
class Packed(Sequence[bytes]):
    """N encoded images.

    Attributes:
        content: their bytes, or the file that contains them.
        ends: (N,) end offset of each.
        place: the file that ``on_disk`` writes.
        fingerprint: identifies the source of the images; a file with another one is replaced.
    """

    content: bytes | Path
    ends: np.ndarray
    place: Path
    fingerprint: bytes

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: Any) -> Any:
        start, end = int(self.ends[index - 1]) if index else 0, int(self.ends[index])
        if isinstance(self.content, bytes):
            return self.content[start:end]
        with self.content.open("rb") as file:
            file.seek(start)
            return file.read(end - start)

    def on_disk(self) -> Packed:
        """The same images in the file. Raises DataError if it cannot be written."""
        if isinstance(self.content, Path):
            return self
        return pack(self, len(self), len(self.content), self.place, self.fingerprint)


def in_memory(images: Iterable[bytes], place: Path, fingerprint: bytes) -> Packed:
    """Holds the images in memory."""
    parts = list(images)
    return Packed(b"".join(parts), np.cumsum([len(part) for part in parts], dtype=np.int64), place, fingerprint)


def recall(place: Path, count: int, fingerprint: bytes) -> Packed | None:
    """The ``count`` images of a file that ``pack`` wrote; None if there is none, or it has another fingerprint."""
    try:
        with place.open("rb") as file:
            file.seek(-len(fingerprint) - 8 * count, os.SEEK_END)
            start = file.tell()
            ends = np.frombuffer(file.read(8 * count), np.int64)
            is_same = file.read() == fingerprint and (int(ends[-1]) if count else 0) == start
    except OSError:
        return None
    return Packed(place, ends, place, fingerprint) if is_same else None


def pack(images: Iterable[bytes], count: int, size: int, place: Path, fingerprint: bytes) -> Packed:
    """Writes the images to a file, unless another process has just done so.

    Args:
        images: encoded images.
        count: N.
        size: approximate total size in bytes, to check the free space first.
        place: the file.
        fingerprint: identifies the source of the images.

    Raises:
        DataError: the file cannot be written.
    """
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(place.with_suffix(".lock")):
            return recall(place, count, fingerprint) or _write(images, size, place, fingerprint)
    except OSError as error:
        raise DataError(
            f"{place.parent}: the images cannot be stored there: {error.strerror or error}; {REMEDY}"
        ) from None


def _write(images: Iterable[bytes], size: int, place: Path, fingerprint: bytes) -> Packed:
    free = shutil.disk_usage(place.parent).free
    if size > free:
        raise DataError(
            f"{place.parent}: {size / 1e9:.1f} GB of images must be stored there, and {free / 1e9:.1f} GB are free; "
            f"free some space, or {REMEDY}"
        )
    temporary = place.with_suffix(".part")  # one process at a time: the caller holds the lock
    lengths = []
    try:
        with temporary.open("wb") as file:
            for image in images:
                file.write(image)
                lengths.append(len(image))
            ends = np.cumsum(lengths, dtype=np.int64)
            file.write(ends.tobytes() + fingerprint)
        temporary.replace(place)
    finally:
        temporary.unlink(missing_ok=True)
    return Packed(place, ends, place, fingerprint)
