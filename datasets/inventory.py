"""Lists the image files of a folder with their sizes; cached for large folders.

Opening a million files takes minutes, so the result is cached in ``$XDG_CACHE_HOME/anchor-neighbourhoods`` or
``~/.cache``, never next to the images. The cache is valid while the modification times of all folders, and the
unreadable files, are unchanged. If a file is overwritten in place, this is only noticed when it is decoded.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from datasets.images import DataError

FORM = 1  # version of the cache file; files of other versions are ignored
SETTLED = 2 * 10**9
"""Nanoseconds after which a further change gives a folder a new modification time, on any file system."""
ABANDONED = 24 * 3600
"""Seconds after which a partial file is assumed to be left by a killed process."""


class Names(Sequence[str]):
    """Many strings in one buffer.

    Worker processes share it: a list of a million strings would be copied into each, page by page, as
    looking at a string changes its reference count.
    """

    def __init__(self, names: Iterable[str] = (), *, packed: np.ndarray | None = None) -> None:
        if packed is None:
            packed = np.frombuffer(b"".join(os.fsencode(name) + b"\0" for name in names), np.uint8)
        self.packed = packed  # each name is followed by a zero byte, which no file name contains
        self._ends = np.flatnonzero(packed == 0)

    def __len__(self) -> int:
        return len(self._ends)

    def __iter__(self) -> Iterator[str]:  # in bulk, for a million names
        return map(os.fsdecode, self.packed.tobytes().split(b"\0")[:-1])

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        start = self._ends[index - 1] + 1 if index else 0
        return os.fsdecode(self.packed[start : self._ends[index]].tobytes())


@dataclass(frozen=True)
class Listing:
    """Image files below a folder.

    Attributes:
        names: of the images, relative to the root.
        folders: the folders that were listed.
        reasons: other files that should be reported -> why they are skipped.
    """

    names: Sequence[str]
    folders: Sequence[str]
    reasons: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Inventory:
    """Image files of one split, with their sizes or the reasons why they cannot be read.

    Attributes:
        key: identifies this inventory among those of its root.
        names: N file names relative to the root.
        folders: the folders that were listed.
        sizes: (N, 2) width and height of int32, zeros if a file cannot be read; None: not opened yet.
        reasons: files that cannot be read or are skipped -> why.
        changed: (F,) modification time of each folder, in nanoseconds; None: too recent to be cached.
    """

    key: str
    names: Sequence[str]
    folders: Sequence[str]
    sizes: np.ndarray | None
    reasons: dict[str, str]
    changed: np.ndarray | None


def take(root: Path, key: str, listing: Callable[[], Listing]) -> Inventory:
    """The cached inventory if it is valid, or a new listing of files that are not opened yet.

    Args:
        root: the data root.
        key: identifies this inventory among those of its root.
        listing: lists the files.
    """
    if remembered := _recall(root, key):
        return remembered
    begun = time.time_ns()
    found = listing()
    changed = _times(root, found.folders)
    settled = changed is not None and bool((changed < begun - SETTLED).all())
    return Inventory(key, Names(found.names), found.folders, None, found.reasons, changed if settled else None)


def remember(root: Path, inventory: Inventory) -> None:
    """Atomically writes an inventory of opened files to the cache.

    Raises:
        DataError: it cannot be written; the caller can continue without it.
    """
    if inventory.changed is None:
        return
    assert inventory.sizes is not None
    try:
        place = cache_path(root, inventory.key, ".npz")
    except RuntimeError as error:
        raise DataError(f"~/.cache: the list of files cannot be stored there: {error}") from None
    bad = list(inventory.reasons)
    content: dict[str, Any] = {
        "form": np.array(FORM),
        "key": _full_key(root, inventory.key),
        "names": Names(inventory.names).packed,
        "folders": Names(inventory.folders).packed,
        "changed": inventory.changed,
        "sizes": inventory.sizes,
        "bad": Names(bad).packed,
        "reasons": Names(inventory.reasons[name].replace("\0", "") for name in bad).packed,
        "bad_states": _states(root, bad),
    }
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        for part in place.parent.glob(f"{place.stem}.*.part"):
            if time.time() - part.stat().st_mtime > ABANDONED:
                part.unlink(missing_ok=True)
        # a separate file for each process, as two may start at the same time
        with tempfile.NamedTemporaryFile(
            dir=place.parent, prefix=f"{place.stem}.", suffix=".part", delete=False
        ) as file:
            try:
                np.savez(file, **content)
                file.close()
                Path(file.name).replace(place)
            except BaseException:
                Path(file.name).unlink()
                raise
    except OSError as error:
        raise DataError(f"{place.parent}: the list of files cannot be stored there: {error.strerror}") from None


def _recall(root: Path, key: str) -> Inventory | None:
    """The cached inventory, or None if it is missing, damaged or outdated."""
    try:
        with cache_path(root, key, ".npz").open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            content = {name: file[name] for name in file.files}
        if content["form"] != FORM or not np.array_equal(content["key"], _full_key(root, key)):
            return None
        names, folders = Names(packed=content["names"]), Names(packed=content["folders"])
        bad, reasons = Names(packed=content["bad"]), Names(packed=content["reasons"])
        if content["sizes"].shape != (len(names), 2) or not np.array_equal(content["bad_states"], _states(root, bad)):
            return None
        changed = _times(root, folders)
        if changed is None or not np.array_equal(changed, content["changed"]):
            return None
        return Inventory(key, names, folders, content["sizes"], dict(zip(bad, reasons, strict=True)), changed)
    except Exception:  # no file, or a damaged one, for which the reader can raise any error
        return None


def cache_path(root: Path, key: str, ending: str) -> Path:
    """The file of the user's cache folder for a root and a key. Raises RuntimeError without a home folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    name = hashlib.sha256(_full_key(root, key).tobytes()).hexdigest()[:32]
    return Path(base, "anchor-neighbourhoods", name + ending)


def _full_key(root: Path, key: str) -> np.ndarray:
    return Names([str(root.resolve()), key]).packed


def _times(root: Path, folders: Sequence[str]) -> np.ndarray | None:
    """(F,) modification time of each folder, in nanoseconds; None if one is missing."""
    try:
        return np.array([(root / folder).stat().st_mtime_ns for folder in folders], np.int64)
    except OSError:
        return None


def _states(root: Path, names: Sequence[str]) -> np.ndarray:
    """(n, 2) modification time and size of each file; -1, -1 if it is missing."""
    states = np.full((len(names), 2), -1, np.int64)
    for row, name in zip(states, names, strict=True):
        try:
            found = (root / name).stat()
            row[:] = found.st_mtime_ns, found.st_size
        except OSError:
            continue
    return states
