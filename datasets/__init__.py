"""Data sets by name, with the channel means and deviations that training normalises by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from datasets import cifar, digits, folder
from datasets.images import DataError, ImageSet, Progress, Splits

__all__ = ["DATASETS", "DataError", "ImageSet", "Source", "Splits", "load"]

Colour = tuple[float, float, float]
IMAGENET_MEANS, IMAGENET_STDS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Source:
    """Where images come from, and their channel statistics on RGB in [0, 1]."""

    load: Callable[..., Splits]
    means: Colour
    stds: Colour


DATASETS = {
    "cifar10": Source(cifar.cifar10, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": Source(cifar.cifar100, (0.5071, 0.4866, 0.4409), (0.2009, 0.1984, 0.2023)),
    "digits": Source(digits.load, (0.3054, 0.3054, 0.3054), (0.3760, 0.3760, 0.3760)),
    "folder": Source(folder.load, IMAGENET_MEANS, IMAGENET_STDS),
}


def load(
    name: str, root: Path | None, *, strict: bool = False, progress: Progress = lambda items, what, total: items
) -> Splits:
    """The splits of a data set.

    Args:
        name: a key of ``DATASETS``, in any case; KeyError otherwise.
        root: the folder it lies in, None for the embedded digits.
        strict: refuse a folder with unreadable images instead of leaving them out.
        progress: shows how far reading has come.

    Raises:
        DataError: the data are not there or not usable.
    """
    return DATASETS[name.lower()].load(root, strict=strict, progress=progress)
