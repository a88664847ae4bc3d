"""Any folder of images.

    DIR/train/<class>/*  DIR/test/<class>/*   labelled (``val`` serves as ``test``)
    DIR/train/*          DIR/test/*           without labels
    DIR/**/*             (no train folder)    without labels, every image below DIR

Every file is opened once at the start, so that what cannot be read is known before the memory bank is made.
Small collections stay in memory after that, large ones are decoded when they are needed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

from datasets.images import DataError, ImageFiles, ImageSet, Progress, Splits, UnreadableImageError, read_rgb, size_of

IN_MEMORY = 2**30
"""Bytes of decoded pixels up to which a split is held in memory."""

EXPECTED = "train/<class>/ and test/<class>/ with images, or images without class folders"


@dataclass(frozen=True)
class _Files:
    """The image files of one split before any is opened."""

    paths: list[Path]
    classes: tuple[str, ...] | None  # None: no class folders
    labels: list[int]


def load(root: Path | None, *, strict: bool, progress: Progress) -> Splits:
    """Images of a folder, as the layouts above.

    Args:
        root: the folder.
        strict: raise where a file cannot be read, instead of leaving it out.
        progress: shows how many files have been read.

    Raises:
        DataError: no such folder, one that may not be read, no image, a layout that is neither, or unreadable
            files with ``strict``.
    """
    try:
        return _load(root, strict=strict, progress=progress)
    except OSError as error:
        raise DataError(
            f"{error.filename}: this folder cannot be read: {error.strerror}; allow it, or move it away"
        ) from None


def _load(root: Path | None, *, strict: bool, progress: Progress) -> Splits:
    if root is None:
        raise DataError(f"data_root is not set: pass --data-root with a folder that holds {EXPECTED}")
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; pass --data-root with a folder that holds {EXPECTED}")
    skipped: list[tuple[str, str]] = []
    notes: list[str] = []
    read = partial(_read, root=root, progress=progress, skipped=skipped)
    if not (root / "train").is_dir():
        if any((root / name).is_dir() for name in ("test", "val")):
            raise DataError(f"{root}: holds a test folder but no train folder; put training images in {root / 'train'}")
        notes.append(f"{root} has no train folder: every image below it is taken, without labels")
        found, test_files = _Files(_images_below(root), None, []), None
    else:
        found = _list(root / "train")
        test_folder = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
        test_files = _list(test_folder) if test_folder else None
        if test_files and test_files.classes and found.classes:
            _same_classes(found.classes, test_files.classes, root)
    if not found.paths:
        raise DataError(f"{root}: no image found; it should hold {EXPECTED} (endings: {' '.join(IMG_EXTENSIONS)})")
    classes = found.classes
    train = read(found, classes, "reading training images")
    test = read(test_files, classes, "reading test images") if test_files and test_files.paths else None
    if strict and skipped:
        names = "; ".join(f"{name} ({why})" for name, why in skipped[:10])
        raise DataError(f"{root}: {len(skipped)} unreadable images: {names}; mend them, or drop --strict-data")
    if not len(train):
        raise DataError(f"{root}: none of {len(found.paths)} training images could be read, for instance {skipped[0]}")
    return Splits(train, test if test is not None and len(test) else None, tuple(notes), tuple(skipped))


def _same_classes(train: Sequence[str], test: Sequence[str], root: Path) -> None:
    unknown = sorted(set(test) - set(train))
    if unknown:
        names = ", ".join(unknown[:5])
        raise DataError(f"{root}: the test folder has classes that train lacks: {names}; rename or remove them")


def _visible(name: str) -> bool:
    return not name.startswith((".", "__MACOSX"))


def _is_image(name: str) -> bool:
    return _visible(name) and name.lower().endswith(IMG_EXTENSIONS)


def _raise(error: OSError) -> None:
    raise error


def _images_below(folder: Path) -> list[Path]:
    found: list[Path] = []
    for here, folders, files in os.walk(folder, followlinks=True, onerror=_raise):
        real = Path(here).resolve()  # a link to a folder above would go round for ever
        folders[:] = sorted(n for n in folders if _visible(n) and Path(here, n).resolve() not in (real, *real.parents))
        found += [Path(here, name) for name in sorted(files) if _is_image(name)]
    return found


def _list(folder: Path) -> _Files:
    """The files of one split: class folders, or images and no folders."""
    folders = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and _visible(entry.name))
    direct = [entry for entry in folder.iterdir() if entry.is_file() and _is_image(entry.name)]
    if folders and direct:
        raise DataError(
            f"{folder}: holds both class folders ({folders[0]}) and images beside them ({min(direct).name}); "
            "move the images into class folders, or the folders away"
        )
    if not folders:
        return _Files(sorted(direct), None, [])
    below = [_images_below(folder / name) for name in folders]
    labels = [label for label, paths in enumerate(below) for _ in paths]
    return _Files([path for paths in below for path in paths], tuple(folders), labels)


def _read(
    files: _Files,
    train_classes: tuple[str, ...] | None,
    what: str,
    *,
    root: Path,
    progress: Progress,
    skipped: list[tuple[str, str]],
) -> ImageSet:
    """Opens every file; keeps pixels while they fit, adds what cannot be read to ``skipped``."""
    sizes = _in_threads(size_of, files.paths, f"{what} (headers)", progress)
    in_memory = sum(3 * s[0] * s[1] for s in sizes if not isinstance(s, UnreadableImageError)) <= IN_MEMORY
    pixels = _in_threads(read_rgb if in_memory else _whole, files.paths, what, progress)
    good = [i for i, image in enumerate(pixels) if not isinstance(image, UnreadableImageError)]
    names = [str(path.relative_to(root)) for path in files.paths]
    skipped += [(names[i], str(image)) for i, image in enumerate(pixels) if isinstance(image, UnreadableImageError)]
    images = [pixels[i] for i in good] if in_memory else ImageFiles([files.paths[i] for i in good])
    labels: np.ndarray | None = None
    classes: tuple[str, ...] = ()
    if files.classes is not None and train_classes is not None:
        number = {name: i for i, name in enumerate(train_classes)}
        labels = np.array([number[files.classes[files.labels[i]]] for i in good], dtype=np.int64)
        classes = train_classes
    return ImageSet(images, labels, classes, [names[i] for i in good])


def _whole(path: Path) -> None:
    read_rgb(path, smallest=True)


def _in_threads(work: Callable[[Path], Any], paths: Sequence[Path], what: str, progress: Progress) -> list[Any]:
    """``work`` of every path in order; an UnreadableImageError takes the place of its result."""

    def attempt(path: Path) -> Any:
        try:
            return work(path)
        except UnreadableImageError as error:
            return error

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:  # Pillow decodes outside the interpreter's lock
        return list(progress(pool.map(attempt, paths), what, len(paths)))
