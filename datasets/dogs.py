"""Stanford Dogs: 20,580 photographs of 120 breeds, 12,000 for training and 8,580 for testing.

Khosla et al., "Novel Dataset for Fine-Grained Image Categorization", 2011. Read as its archives unpack:

    ROOT/Images/<breed>/*.jpg
    ROOT/lists/train_list.mat, test_list.mat   file_list (files below Images) and labels (from 1), by image
    ROOT/Annotation/<breed>/*                  the dogs' boxes, as XML of PASCAL VOC

A photograph with several dogs is one image. With bounding boxes, it is cropped to the smallest box around all dogs.
"""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import scipy.io

from datasets.download import Archive, provide
from datasets.files import Classes, Reader, joined, listed, open_root
from datasets.images import DataError, ImageSet, Request, Splits

PAGE = "http://vision.stanford.edu/aditya86/ImageNetDogs/"
ARCHIVES = [  # checksums as TensorFlow Datasets 4.9.10 records them
    Archive(
        f"{PAGE}lists.tar",
        "sha256:34b47cacd9a98b5d150e084f24d29391c084c55272295ec65c85651bc35f4d6c",
        unpacks_to="lists",
    ),
    Archive(
        f"{PAGE}annotation.tar",
        "sha256:662ed36f707be6b195c2fda392d8e153e83af28cedc8e2134a649f198def30fd",
        unpacks_to="Annotation",
    ),
    Archive(
        f"{PAGE}images.tar",
        "sha256:a443fc2f9a851aa1a7b8e4fa4af94b8459fce2c9f5a2f4dd4669cf9673a4ec58",
        unpacks_to="Images",
    ),
]
EXPECTED = "Images/<breed>/*.jpg and lists/train_list.mat"
GET = f"pass --download to fetch them, or unpack images.tar, annotation.tar and, into lists/, lists.tar ({PAGE}) there"
REMEDY = f"unpack lists.tar, images.tar and, for boxes, annotation.tar ({PAGE}) again"


def load(request: Request) -> Splits:
    """Loads the published training and test split, cropped to the bounding boxes if requested.

    Raises:
        DataError: lists, images or boxes are missing or inconsistent.
    """
    if request.download:
        provide(request, ARCHIVES)
    root = open_root(request, EXPECTED, GET)
    lists = next((p for p in (root / "lists", root) if (p / "train_list.mat").is_file()), None)  # the archive has none
    if lists is None or not (root / "Images").is_dir():
        raise DataError(f"{root}: does not contain {EXPECTED}; {GET}")
    tables = {name: _table(lists / name) for name in ("train_list.mat", "test_list.mat")}
    breeds: dict[int, str] = {}
    for names, labels in tables.values():
        for name, label in zip(names, labels, strict=True):
            breed = name.split("/")[0].split("-", 1)[-1]  # n02085620-Chihuahua
            if breeds.setdefault(label, breed) != breed:
                raise DataError(f"{lists}: class {label} is {breeds[label]} and {breed}; {REMEDY}")
    order = {label: i for i, label in enumerate(sorted(breeds))}
    reader = Reader(root, request)

    def read(part: str, table: str) -> ImageSet:
        names, labels = tables[table]
        inventory = listed(root, joined("Images", names), table, REMEDY)
        classes = Classes(tuple(breeds[label] for label in order), np.array([order[n] for n in labels], np.int64))
        boxes = np.array([_box(root, name) for name in names]) if request.boxes else None
        return reader.read(part, inventory, classes=classes, boxes=boxes)

    return reader.splits(read("training", "train_list.mat"), read("test", "test_list.mat"))


def _table(path: Path) -> tuple[list[str], list[int]]:
    """Files below Images and their labels."""
    try:
        content = scipy.io.loadmat(path, squeeze_me=True)
        names = [str(name) for name in np.atleast_1d(content["file_list"])]
        labels = [int(label) for label in np.atleast_1d(content["labels"])]
        if len(names) != len(labels):
            raise ValueError(f"{len(names)} files and {len(labels)} labels")
    except Exception as error:  # damaged files can cause any error
        raise DataError(f"{path}: cannot be read: {' '.join(str(error).split())}; {REMEDY}") from None
    return names, labels


def _box(root: Path, name: str) -> np.ndarray:
    """Left, top, right and bottom (4,) around all dogs of an image; VOC counts pixels from 1, corners included."""
    path = root / "Annotation" / name.rsplit(".", 1)[0]
    try:
        boxes = ElementTree.parse(path).getroot().findall("object/bndbox")
        corners = [[int(box.findtext(tag, "")) for tag in ("xmin", "ymin", "xmax", "ymax")] for box in boxes]
        left, top, right, bottom = np.array(corners, np.int64).T
    except (OSError, ElementTree.ParseError, ValueError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or "it holds no box of whole numbers"
        raise DataError(f"{path}: cannot be read: {reason}; {REMEDY}, or drop --bounding-boxes") from None
    return np.array([left.min() - 1, top.min() - 1, right.max(), bottom.max()])
