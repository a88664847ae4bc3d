"""CIFAR-10 and CIFAR-100: 50,000 training and 10,000 test images of 32x32 pixels.

A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009. Read by torchvision, which
checks the files' MD5 sums.
"""

from __future__ import annotations

from functools import partial

import numpy as np
from torchvision import datasets as published

from datasets.download import Archive, provide
from datasets.files import open_root
from datasets.images import DataError, ImageSet, Request, Splits

PAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"


def _load(source: type[published.CIFAR10], request: Request) -> Splits:
    archive = Archive(source.url, f"md5:{source.tgz_md5}", unpacks_to=source.base_folder)
    if request.download:
        provide(request, [archive])
    remedy = f"use --download to fetch it, or unpack {archive.name} ({PAGE}) there"
    root = open_root(request, f"{source.base_folder}/", remedy)
    try:
        parts = [source(str(root), train=train) for train in (True, False)]
    except RuntimeError:
        there = root / source.base_folder
        state = "is incomplete; move it away, and" if there.exists() else "does not exist;"
        raise DataError(f"{there}: {state} {remedy}, or choose another --data-root") from None
    train, test = (ImageSet(p.data, np.asarray(p.targets, dtype=np.int64), tuple(p.classes)) for p in parts)
    return Splits(train, test)


cifar10 = partial(_load, published.CIFAR10)
cifar100 = partial(_load, published.CIFAR100)
