"""SVHN, cropped digits: 73,257 training and 26,032 test images of 32x32 pixels.

Netzer et al., "Reading Digits in Natural Images with Unsupervised Feature Learning", 2011. Read by torchvision,
which checks the files' MD5 sums. Its 531,131 further training images are not used, as in the paper.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torchvision.datasets import SVHN

from datasets.download import Archive, provide
from datasets.files import open_root
from datasets.images import DataError, ImageSet, Request, Splits

PAGE = "http://ufldl.stanford.edu/housenumbers/"
PARTS = ("train", "test")


def load(request: Request) -> Splits:
    """Loads training and test images. Raises DataError if files are missing or damaged."""
    files = [Archive(url, f"md5:{md5}") for url, _, md5 in (SVHN.split_list[part] for part in PARTS)]
    expected = " and ".join(file.name for file in files)
    if request.download:
        provide(request, files)
    remedy = f"use --download to fetch missing files, or put them there ({PAGE})"
    root = open_root(request, expected, remedy)
    try:
        train, test = (_split(SVHN(str(root), split=part)) for part in PARTS)
    except RuntimeError:
        raise DataError(
            f"{root}: should contain {expected}, but one is missing, incomplete or altered; {remedy}"
        ) from None
    return Splits(train, test)


def _split(part: SVHN) -> ImageSet:
    images: Any = np.ascontiguousarray(part.data.transpose(0, 2, 3, 1))  # (N, 3, 32, 32) -> (N, 32, 32, 3)
    return ImageSet(images, part.labels.astype(np.int64), tuple("0123456789"))
