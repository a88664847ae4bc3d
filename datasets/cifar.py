"""CIFAR-10 and CIFAR-100: 50,000 training and 10,000 test images of 32x32 pixels.

A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009. Read by torchvision, which
checks the files' MD5 sums.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
from torchvision import datasets as published

from datasets.images import DataError, ImageSet, Progress, Splits

PAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"


def _load(source: type[published.CIFAR10], root: Path | None, *, strict: bool, progress: Progress) -> Splits:
    if root is None:
        raise DataError(f"data_root is not set: pass --data-root with the folder that holds {source.base_folder}/")
    try:
        parts = [source(str(root), train=train) for train in (True, False)]
    except RuntimeError:
        raise DataError(
            f"{root}: no whole {source.__name__} there: looked for {root / source.base_folder}/ with the files of "
            f"{source.filename}; unpack that archive from {PAGE} into {root}, or pass another --data-root"
        ) from None
    train, test = (ImageSet(p.data, np.asarray(p.targets, dtype=np.int64), tuple(p.classes)) for p in parts)
    return Splits(train, test)


cifar10 = partial(_load, published.CIFAR10)
cifar100 = partial(_load, published.CIFAR100)
