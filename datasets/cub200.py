"""CUB-200-2011: 11,788 photographs of 200 species of birds, 5,994 for training and 5,794 for testing.

Wah et al., "The Caltech-UCSD Birds-200-2011 Dataset", 2011. Read as its archive unpacks: ``CUB_200_2011/`` with
images/ and lists of lines "number value": images.txt (image, file), image_class_labels.txt (image, class),
classes.txt (class, name), train_test_split.txt (image, 1 for training), bounding_boxes.txt (image; left, top,
width and height in pixels).
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from datasets.download import Archive, provide
from datasets.files import Classes, Reader, joined, listed, open_root
from datasets.images import DataError, ImageSet, Request, Splits

FOLDER = "CUB_200_2011"
PAGE = "https://data.caltech.edu/records/65de6-vp158"
ARCHIVE = Archive(  # checksum as TensorFlow Datasets 4.9.10 records them
    f"{PAGE}/files/CUB_200_2011.tgz",
    "sha256:0c685df5597a8b24909f6a7c9db6d11e008733779a671760afef78feb49bf081",
    unpacks_to=FOLDER,
)
EXPECTED = f"{FOLDER}/ with images.txt and images/"
GET = f"pass --download to fetch it, or unpack {ARCHIVE.name} ({PAGE}) there"
REMEDY = f"unpack {ARCHIVE.name} ({PAGE}) again"


def load(request: Request) -> Splits:
    """Loads the published training and test split, cropped to the bounding boxes if requested.

    Raises:
        DataError: lists or images are missing or inconsistent.
    """
    if request.download:
        provide(request, [ARCHIVE])
    root = open_root(request, EXPECTED, GET)
    home = root if (root / "images.txt").is_file() else root / FOLDER
    if not (home / "images.txt").is_file():
        raise DataError(f"{root}: does not contain {EXPECTED}; {GET}")
    files, names = _lines(home, "images.txt"), _lines(home, "classes.txt")
    labels, training = _lines(home, "image_class_labels.txt", files), _lines(home, "train_test_split.txt", files)
    boxes = _lines(home, "bounding_boxes.txt", files) if request.boxes else None
    if unclear := [image for image in files if training[image] not in ("0", "1")]:
        raise DataError(f"{home / 'train_test_split.txt'}: has neither 0 nor 1 for image {unclear[0]}; {REMEDY}")
    numbers = {number: i for i, number in enumerate(names)}
    if unknown := sorted(set(labels.values()) - set(numbers)):
        raise DataError(
            f"{home}: image_class_labels.txt has class {unknown[0]}, which is missing in classes.txt; {REMEDY}"
        )
    reader = Reader(home, request)

    def read(part: str, flag: str) -> ImageSet:
        chosen = [image for image in files if training[image] == flag]
        inventory = listed(home, joined("images", [files[image] for image in chosen]), "images.txt", REMEDY)
        classes = Classes(tuple(names.values()), np.array([numbers[labels[image]] for image in chosen], np.int64))
        cuts = None if boxes is None else np.array([_corners(boxes[image], home) for image in chosen])
        return reader.read(part, inventory, classes=classes, boxes=cuts)

    return reader.splits(read("training", "1"), read("test", "0"))


def _lines(home: Path, name: str, images: dict[str, str] | None = None) -> dict[str, str]:
    """The values of a list, by number. Raises DataError if one of ``images`` is missing."""
    try:
        lines = map(str.strip, (home / name).read_text(encoding="utf-8").splitlines())
        found = dict(line.split(maxsplit=1) for line in lines if line)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not a list of lines 'number value'"
        raise DataError(f"{home / name}: cannot be read: {reason}; {REMEDY}") from None
    if missing := [image for image in images or {} if image not in found]:
        raise DataError(f"{home / name}: has no line for image {missing[0]}, which images.txt lists; {REMEDY}")
    return found


def _corners(line: str, home: Path) -> np.ndarray:
    """Parses "left top width height" to left, top, right, bottom (4,), rounded outwards to whole pixels."""
    try:
        left, top, width, height = map(float, line.split())
        corners = math.floor(left), math.floor(top), math.ceil(left + width), math.ceil(top + height)
        return np.array(corners, np.int64)
    except (ValueError, OverflowError):
        raise DataError(
            f"{home / 'bounding_boxes.txt'}: {line!r} is not a box 'left top width height'; {REMEDY}"
        ) from None
