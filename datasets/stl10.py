"""STL-10: 5,000 labelled and 100,000 unlabelled training images and 8,000 test images of 96x96 pixels.

A. Coates, H. Lee and A. Y. Ng, "An Analysis of Single-Layer Networks in Unsupervised Feature Learning", AISTATS 2011.
Training uses all 105,000 images (torchvision's split ``train+unlabeled``), and evaluation the labelled ones against the
test images. Read as the archive unpacks: ``stl10_binary/`` with images of uint8 (N, 3, width, height), labels of uint8
from 1, and names of the classes. Names, addresses and MD5 sums are torchvision's.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torchvision.datasets import STL10
from torchvision.datasets.utils import check_integrity

from datasets.download import Archive, provide
from datasets.files import IN_MEMORY, open_root
from datasets.images import DataError, ImageSet, Request, Splits

PAGE = "https://cs.stanford.edu/~acoates/stl10/"
SHAPE = (3, 96, 96)
"""Of an image in the files: channels, columns, rows."""


class BinaryImages(Sequence[np.ndarray]):
    """Images that are read from files of uint8 (N, 3, width, height) on access.

    Args:
        paths: the files, in the order of their images.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths
        self.ends = np.cumsum([path.stat().st_size // int(np.prod(SHAPE)) for path in paths])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: Any) -> Any:
        index = range(len(self))[index]
        file = int(np.searchsorted(self.ends, index, side="right"))
        first = int(self.ends[file - 1]) if file else 0
        image = np.fromfile(self.paths[file], np.uint8, np.prod(SHAPE), offset=(index - first) * int(np.prod(SHAPE)))
        return np.ascontiguousarray(image.reshape(SHAPE).transpose(2, 1, 0))  # (H, W, 3)


def load(request: Request) -> Splits:
    """Loads 105,000 training images without labels, and the labelled ones among them and the test images with labels.

    Raises:
        DataError: files are missing or damaged.
    """
    archive = Archive(STL10.url, f"md5:{STL10.tgz_md5}", unpacks_to=STL10.base_folder)
    if request.download:
        provide(request, [archive])
    remedy = f"use --download to fetch it, or unpack {archive.name} ({PAGE}) there"
    root = open_root(request, f"{STL10.base_folder}/", remedy)
    folder = root / STL10.base_folder
    published = [*STL10.train_list, *STL10.test_list]
    shown: Any = request.progress(published, "verifying STL-10", len(published), "file")
    if not all(check_integrity(folder / name, md5) for name, md5 in shown):
        state = "is incomplete; move it away, and" if folder.exists() else "does not exist;"
        raise DataError(f"{folder}: {state} {remedy}, or choose another --data-root")
    (train, train_y, unlabelled), (test, test_y) = (
        [folder / name for name, _ in part] for part in (STL10.train_list, STL10.test_list)
    )
    classes = tuple((folder / STL10.class_names_file).read_text(encoding="utf-8").split())
    everything = _images(train, unlabelled)
    labelled, tests = (ImageSet(_images(x), _labels(y), classes) for x, y in ((train, train_y), (test, test_y)))
    notes = (f"{len(labelled)} of {len(everything)} training images have labels, which are used for evaluation only",)
    return Splits(ImageSet(everything), tests, labelled=labelled, notes=notes)


def _images(*paths: Path) -> Any:
    """The images of files as an array (N, H, W, 3), or read on access if they are too many."""
    if sum(path.stat().st_size for path in paths) > IN_MEMORY:
        return BinaryImages(paths)
    planes = np.concatenate([np.fromfile(path, np.uint8).reshape(-1, *SHAPE) for path in paths])
    return np.ascontiguousarray(planes.transpose(0, 3, 2, 1))


def _labels(path: Path) -> np.ndarray:
    return np.fromfile(path, np.uint8).astype(np.int64) - 1
