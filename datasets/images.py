"""The one type that training sees: images, labels or None, index.

An image is a uint8 array (H, W, 3), RGB, held in memory or decoded from its file when it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

Progress = Callable[[Iterable[Any], str, int], Iterable[Any]]
"""Shows how far an iteration has come; takes the items, what is being done, and how many they are."""


class DataError(Exception):
    """Data that cannot be used; the message is one sentence that names the place and the mend."""


@dataclass(frozen=True)
class ImageSet:
    """N images of one split.

    Attributes:
        images: N arrays (H, W, 3) of uint8, of one size or many.
        labels: classes (N,) of int64, or None where nobody said.
        classes: names of the classes, empty without labels.
        names: N file names relative to the data root, or None where images have none.
    """

    images: Sequence[np.ndarray]
    labels: np.ndarray | None = None
    classes: tuple[str, ...] = ()
    names: Sequence[str] | None = None

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class Splits:
    """What a source delivers: the two splits, and sentences about them that the user should read."""

    train: ImageSet
    test: ImageSet | None = None
    notes: tuple[str, ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()  # unreadable files and why


class ImageFiles(Sequence[np.ndarray]):
    """Images that stay in their files until they are asked for."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: Any) -> Any:
        try:
            return read_rgb(self.paths[index])
        except UnreadableImageError as error:
            raise DataError(f"{self.paths[index]}: could be read at the start and cannot be now: {error}") from None


class UnreadableImageError(Exception):
    """A file that is no image, or a damaged one; the message is the reason."""


def read_rgb(path: Path, *, smallest: bool = False) -> np.ndarray:
    """Decodes any image file to RGB.

    The orientation of EXIF is applied, 16-bit grey keeps its upper eight bits, transparency is dropped (as
    torchvision's loader does), of several frames the first is taken.

    Args:
        path: the file.
        smallest: JPEG files may be decoded at an eighth of their size, to check that they are whole.

    Returns:
        uint8 array (H, W, 3).

    Raises:
        UnreadableImageError: with the reason.
    """
    try:
        with Image.open(path) as image:
            if smallest:
                image.draft("RGB", (1, 1))
            return np.array(_rgb(ImageOps.exif_transpose(image)))
    except UnreadableImageError:
        raise
    except Exception as error:  # damaged files make the decoders raise nearly anything
        raise UnreadableImageError(_reason(error)) from None


def size_of(path: Path) -> tuple[int, int]:
    """(W, H) as the file's header says; UnreadableImageError with the reason where there is none."""
    try:
        with Image.open(path) as image:
            width, height = image.size
            return width, height
    except Exception as error:  # as in read_rgb
        raise UnreadableImageError(_reason(error)) from None


def _reason(error: Exception) -> str:
    if type(error).__name__ == "UnidentifiedImageError":
        return "not an image that Pillow knows"
    text = str(error).splitlines()[0] if str(error) else ""
    return text or type(error).__name__


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise UnreadableImageError("floating-point pixels have no fixed range")
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion would clip at 255
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if "transparency" in image.info:  # of a palette: Pillow asks for this step in between
        image = image.convert("RGBA")
    return image.convert("RGB")
