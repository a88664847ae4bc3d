"""Any folder of images.

DIR/train/<class>/*  DIR/test/<class>/*   labelled (``val`` serves as ``test``)
DIR/train/*          DIR/test/*           without labels
DIR/**/*             (no train folder)    without labels, every image below DIR
"""

from __future__ import annotations

from pathlib import Path

from datasets.files import Reader, below, class_folders, open_root, renumber
from datasets.images import DataError, Request, Splits, formats
from datasets.inventory import Inventory

EXPECTED = "train/<class>/ and test/<class>/ with images, or images without class folders"


def load(request: Request) -> Splits:
    """Images of a folder, as the layouts above.

    Raises:
        DataError: the folder is missing, has no images or another layout, or images are unreadable and the request
            is strict.
    """
    root = open_root(request, EXPECTED, "any images will do")
    reader = Reader(root, request)
    if not (root / "train").is_dir():
        if any((root / name).is_dir() for name in ("test", "val")):
            raise DataError(f"{root}: holds a test folder but no train folder; put training images in {root / 'train'}")
        reader.notes.append(f"{root} has no train folder: all images below it are used, without labels")
        found = below(root, ".")
        _some(root, found)
        return reader.splits(reader.read("training", found), None)
    found = below(root, "train")
    classes = class_folders(root, "train", found)
    _some(root, found)
    split = next((name for name in ("test", "val") if (root / name).is_dir()), None)
    if split is None:
        return reader.splits(reader.read("training", found, classes=classes), None)
    tests = below(root, split)
    test_classes = class_folders(root, split, tests)
    if classes and test_classes:
        test_classes = renumber(test_classes, classes.names, root)
    train = reader.read("training", found, classes=classes)
    return reader.splits(train, reader.read("test", tests, classes=test_classes if classes else None))


def _some(root: Path, found: Inventory) -> None:
    if not found.names:
        left = "; ".join(f"{name} is left out ({why})" for name, why in list(found.reasons.items())[:1])
        raise DataError(
            f"{root}: no image found; it should hold {EXPECTED}, as {', '.join(formats())} files{left and '; ' + left}"
        )
