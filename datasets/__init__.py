"""Data sets by name, with the channel means and standard deviations used for normalisation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from datasets.images import DataError, ImageSet, Progress, Request, Splits, fingerprint, hold_out, read_picture, rgb_of

__all__ = [
    "DATASETS",
    "Colour",
    "DataError",
    "ImageSet",
    "Source",
    "Splits",
    "fingerprint",
    "hold_out",
    "load",
    "read_picture",
    "rgb_of",
]

Colour = tuple[float, float, float]
IMAGENET_MEANS, IMAGENET_STDS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Source:
    """A data set.

    Attributes:
        load: loads the splits.
        means, stds: channel means and standard deviations of RGB in [0, 1].
        published: whether ``--download`` can fetch it or explain how to get it.
        boxes: whether its images have annotated bounding boxes.
        columns: whether it reads the labels from a column that the user can name.
    """

    load: Callable[[Request], Splits]
    means: Colour
    stds: Colour
    published: bool = True
    boxes: bool = False
    columns: bool = False


def _lazy(module: str, name: str) -> Callable[[Request], Splits]:
    """``name`` of ``datasets/<module>.py``, imported on first use, as importing torchvision takes seconds."""

    def load_it(request: Request) -> Splits:
        splits: Splits = getattr(import_module(f"{__name__}.{module}"), name)(request)
        return splits

    return load_it


DATASETS = {
    "cifar10": Source(_lazy("cifar", "cifar10"), (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": Source(_lazy("cifar", "cifar100"), (0.5071, 0.4866, 0.4409), (0.2009, 0.1984, 0.2023)),
    "svhn": Source(_lazy("svhn", "load"), (0.4377, 0.4438, 0.4728), (0.1201, 0.1231, 0.1052)),
    "stl10": Source(_lazy("stl10", "load"), (0.4467, 0.4398, 0.4066), (0.2603, 0.2566, 0.2713)),
    "imagenet": Source(_lazy("imagenet", "load"), IMAGENET_MEANS, IMAGENET_STDS),
    "cub200": Source(_lazy("cub200", "load"), IMAGENET_MEANS, IMAGENET_STDS, boxes=True),
    "dogs": Source(_lazy("dogs", "load"), IMAGENET_MEANS, IMAGENET_STDS, boxes=True),
    "digits": Source(_lazy("digits", "load"), (0.3054, 0.3054, 0.3054), (0.3760, 0.3760, 0.3760), published=False),
    "folder": Source(_lazy("folder", "load"), IMAGENET_MEANS, IMAGENET_STDS, published=False),
    "parquet": Source(_lazy("parquet", "load"), IMAGENET_MEANS, IMAGENET_STDS, published=False, columns=True),
}


def load(
    name: str,
    root: Path | None,
    *,
    strict: bool = False,
    download: bool = False,
    boxes: bool = False,
    label_column: str | None = None,
    progress: Progress = lambda items, what, total, unit: items,
) -> Splits:
    """Loads the splits of a data set.

    Args:
        name: a key of ``DATASETS``, in any case.
        root: the folder that contains the data set; None for the digits.
        strict: raise DataError if an image is unreadable, instead of skipping it.
        download: download missing files.
        boxes: crop the images to their annotated bounding boxes.
        label_column: the column with the labels, for data sets in tables; None: it is found by its name.
        progress: shows a progress bar.

    Raises:
        DataError: the data are missing or cannot be used.
        KeyError: there is no such data set.
    """
    source = DATASETS[name.lower()]
    if download and not source.published:
        raise DataError(f"--download: there is nothing to download for the data set {name}; drop the flag")
    if boxes and not source.boxes:
        having = ", ".join(key for key, other in DATASETS.items() if other.boxes)
        raise DataError(f"--bounding-boxes: {name} has none; drop the flag, or set --dataset to one of {having}")
    if label_column and not source.columns:
        raise DataError(
            f"--label-column {label_column}: {name} is not in tables; drop the flag, or set --dataset parquet"
        )
    try:
        return source.load(Request(root, strict, download, boxes, progress, label_column))
    except OSError as error:
        raise DataError(
            f"{error.filename}: cannot be read: {error.strerror}; change its permissions, or move it away"
        ) from None
