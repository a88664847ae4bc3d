"""UCI handwritten digits: 1,797 real 8x8 images of ten classes, included as ``digits.npz``.

E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository,
1998, https://doi.org/10.24432/C50P49, licensed CC BY 4.0. These are the images of its test part, with grey
values from 0 to 16. The 80/20 split is this project's: drawn once, stratified by class, kept in the file.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from datasets.images import ImageSet, Request, Splits

FILE = Path(__file__).with_name("digits.npz")


def load(request: Request) -> Splits:
    """1,437 training and 360 test images (8, 8, 3). The request is ignored."""
    with np.load(FILE, allow_pickle=False) as file:
        grey = np.round(file["images"] * (255 / 16)).astype(np.uint8)  # (N, 8, 8)
        labels, is_test = file["labels"].astype(np.int64), file["is_test"]
    images = np.repeat(grey[..., None], 3, axis=-1)  # (N, 8, 8, 3)
    classes = tuple("0123456789")
    train, test = (ImageSet(images[part], labels[part], classes) for part in (~is_test, is_test))
    return Splits(train, test)
