"""ImageNet (ILSVRC2012): 1,281,167 training and 50,000 validation images of 1,000 classes.

Russakovsky et al., "ImageNet Large Scale Visual Recognition Challenge", 2015. Read as its archives unpack:

    ROOT/train/<wnid>/*.JPEG
    ROOT/val/<wnid>/*.JPEG                                  or, flat as published, with the devkit:
    ROOT/val/ILSVRC2012_val_00000001.JPEG ...
    ROOT/ILSVRC2012_devkit_t12/  or  ROOT/ILSVRC2012_devkit_t12.tar.gz

Classes are sorted WordNet identifiers, as usual. A subset of the classes is accepted, with a note in the log.
"""

from __future__ import annotations

import io
import os
import re
import tarfile
from pathlib import Path

import numpy as np
import scipy.io

from datasets.files import Classes, Reader, below, class_folders, open_root, renumber
from datasets.images import DataError, Request, Splits
from datasets.inventory import Inventory

EXPECTED = "train/<wnid>/*.JPEG and val/ (ILSVRC2012)"
PAGE = "https://image-net.org/download-images.php"
DEVKIT = "ILSVRC2012_devkit_t12"
META, TRUTH = f"{DEVKIT}/data/meta.mat", f"{DEVKIT}/data/ILSVRC2012_validation_ground_truth.txt"
REMEDY = (
    f"get ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and {DEVKIT}.tar.gz from {PAGE} and unpack them as "
    "configs/imagenet-resnet18.yaml says"
)
IMAGES, CLASSES = 1_281_167, 1000


def load(request: Request) -> Splits:
    """Loads the training images, and the validation images as test images if ``val`` exists.

    Raises:
        DataError: the folders are not as above, the classes of train and val do not match, or a download is requested,
            which needs an account.
    """
    if request.download:
        raise DataError(
            "--download: ImageNet's images are available to registered users only; "
            f"{REMEDY}, and run without --download"
        )
    root = open_root(request, EXPECTED, REMEDY)
    reader = Reader(root, request)
    if not (root / "train").is_dir():
        raise DataError(f"{root}: has no train folder; it should hold {EXPECTED}; {REMEDY}")
    found = below(root, "train")
    classes = class_folders(root, "train", found)
    if classes is None or not found.names:
        packed = (
            " (its .tar archives, one for each class, are not unpacked)" if any((root / "train").glob("*.tar")) else ""
        )
        raise DataError(f"{root}: train holds no class folders with images{packed}; it should hold {EXPECTED}")
    if len(found.names) != IMAGES or len(classes.names) != CLASSES:
        reader.notes.append(
            f"{root}: {len(found.names)} training images of {len(classes.names)} classes, where ILSVRC2012 has "
            f"{IMAGES} of {CLASSES}: figures are not comparable with published ones"
        )
    if not (root / "val").is_dir():
        return reader.splits(reader.read("training", found, classes=classes), None)
    tests = below(root, "val")
    if not tests.names:
        raise DataError(f"{root / 'val'}: holds no image; unpack ILSVRC2012_img_val.tar there, or remove the folder")
    test_classes = class_folders(root, "val", tests) or _by_devkit(root, tests)
    test_classes = renumber(test_classes, classes.names, root)
    train = reader.read("training", found, classes=classes)
    return reader.splits(train, reader.read("validation", tests, classes=test_classes))


def _by_devkit(root: Path, files: Inventory) -> Classes:
    """The classes of a flat validation folder: line i of the devkit's list is the class of image number i."""
    try:
        contents = _devkit(root)
        truth = [int(line) for line in contents[TRUTH].decode().split()]
        synsets = scipy.io.loadmat(io.BytesIO(contents[META]), squeeze_me=True)["synsets"]
        wnids = {int(i): str(w) for i, w in zip(synsets["ILSVRC2012_ID"], synsets["WNID"], strict=True)}
    except DataError:
        raise
    except Exception as error:  # damaged files can cause any error
        raise DataError(
            f"{root}: {DEVKIT} is damaged or not the published one ({' '.join(str(error).split())}); "
            f"fetch it again from {PAGE}"
        ) from None
    of_image: list[str] = []
    for name in files.names:
        number = re.fullmatch(r"ILSVRC2012_val_(\d+)\.\w+", Path(name).name)
        line = int(number[1]) if number else 0
        if not 1 <= line <= len(truth) or truth[line - 1] not in wnids:
            raise DataError(
                f"{root / name}: {TRUTH} has no class for it; the flat val folder should hold "
                f"ILSVRC2012_val_00000001.JPEG to {len(truth):08d}, and nothing else"
            )
        of_image.append(wnids[truth[line - 1]])
    names, labels = np.unique(np.array(of_image, dtype=str), return_inverse=True)
    return Classes(tuple(names.tolist()), labels.astype(np.int64))


def _devkit(root: Path) -> dict[str, bytes]:
    """Content of the two devkit files with the validation labels, by name."""
    if all((root / name).is_file() for name in (META, TRUTH)):
        return {name: (root / name).read_bytes() for name in (META, TRUTH)}
    archive = root / f"{DEVKIT}.tar.gz"
    if not archive.is_file():
        raise DataError(
            f"{root}: val has no class folders, and the devkit with its classes is missing; put "
            f"{archive.name} ({PAGE}) into {root}, or sort the images into val/<wnid>/"
        )
    with tarfile.open(archive) as file:
        members = {os.path.normpath(m.name): m for m in file if m.isfile()}
        return {name: file.extractfile(members[name]).read() for name in (META, TRUTH)}  # type: ignore[union-attr]
