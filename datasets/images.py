"""The one type that training sees: images, labels or None, index.

An image is a uint8 array (H, W, 3), RGB, held in memory or decoded from its file when it is asked for.
"""

from __future__ import annotations

import os
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP", "AVIF")
"""What a file may be, whatever it is called. Pillow opens more, such as PostScript, which is a program, and runs."""

RAW_ENDINGS = (
    ".3fr", ".arw", ".cr2", ".cr3", ".crw", ".dcr", ".dng", ".erf", ".iiq", ".kdc", ".mos", ".mrw", ".nef", ".nrw",
    ".orf", ".pef", ".raf", ".raw", ".rw2", ".sr2", ".srf", ".srw", ".x3f",
)  # fmt: skip
"""Endings of camera raw files. Many are TIFF files whose first image is a thumbnail, which Pillow would return."""

HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
"""What bytes 8 to 12 of a HEIC file may be, after ``ftyp``."""

LARGE = 2**26
"""Pixels above which an image is decoded at half its height and width: 67 million, 8192 x 8192."""

STRIP = 2**20
"""Pixels that are converted at a time."""

Progress = Callable[[Iterable[Any], str, int, str], Iterable[Any]]
"""Shows how far an iteration has come; takes the items, what is being done, how many they are, and of what."""


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
        taken: (N,) where each image stands in the split that they were taken from; None: they are all of it.
    """

    images: Sequence[np.ndarray]
    labels: np.ndarray | None = None
    classes: tuple[str, ...] = ()
    names: Sequence[str] | None = None
    taken: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.images)

    @property
    def indices(self) -> np.ndarray:
        """(N,) of int64: where each image stands in the data set's split."""
        return np.arange(len(self), dtype=np.int64) if self.taken is None else self.taken

    @property
    def held(self) -> int:
        """Bytes of the decoded images that lie in memory."""
        if isinstance(self.images, np.ndarray):
            return self.images.nbytes
        return sum(image.nbytes for image in self.images) if isinstance(self.images, list) else 0

    def take(self, index: np.ndarray) -> ImageSet:
        """The images of the indices (n,), in that order."""
        return ImageSet(
            self.images[index] if isinstance(self.images, np.ndarray) else Chosen(self.images, index),
            None if self.labels is None else self.labels[index],
            self.classes,
            None if self.names is None else Chosen(self.names, index),
            self.indices[index],
        )


class Chosen(Sequence[Any]):
    """Some of the items of a sequence, which stay where they are.

    Args:
        items: the sequence.
        index: (n,) which of them, in order.
    """

    def __init__(self, items: Sequence[Any], index: np.ndarray) -> None:
        self._items = items
        self._index = index

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, place: Any) -> Any:
        return self._items[int(self._index[place])]


@dataclass(frozen=True)
class Splits:
    """What a source delivers: the splits, and sentences about them that the user should read.

    ``val``: training images held out to choose by, where the user asks for them.
    """

    train: ImageSet
    test: ImageSet | None = None
    val: ImageSet | None = None
    notes: tuple[str, ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()  # unreadable files and why


@dataclass(frozen=True)
class Request:
    """What the user asks of a source.

    Attributes:
        root: the folder it lies in, None where none was named.
        strict: refuse a folder with unreadable images instead of leaving them out.
        download: fetch what is not there.
        boxes: cut the images to their annotated boxes.
        progress: shows how far reading has come.
    """

    root: Path | None
    strict: bool
    download: bool
    boxes: bool
    progress: Progress


def fingerprint(split: ImageSet) -> str:
    """What tells a split from others, as far as names, classes and its first and last images do."""
    few = [*range(min(len(split), 8)), *range(max(8, len(split) - 8), len(split))]
    parts = [split.images[i].tobytes() for i in few]
    parts += [] if split.labels is None else [split.labels.tobytes()]
    total = 0
    for part in (*parts, *(os.fsencode(name) for name in split.names or ())):
        total = zlib.crc32(part, total)
    return f"{len(split)} of {len(split.classes)} classes, sum {total:08x}"


def hold_out(splits: Splits, fraction: float) -> Splits:
    """Moves a share of the training images to ``val``: of each class alike, always the same ones.

    Raises:
        DataError: the training images have no labels, or no class has images enough.
    """
    train = splits.train
    if train.labels is None:
        raise DataError("val_fraction: choosing by held-out images needs labels, and the training images have none")
    order = np.random.default_rng(0).permutation(len(train))  # of its own: the run's seed should not change the data
    of_class = [order[train.labels[order] == label] for label in np.unique(train.labels)]
    held = np.sort(np.concatenate([members[: round(len(members) * fraction)] for members in of_class]))
    rest = np.setdiff1d(np.arange(len(train)), held)
    if not len(held) or not len(rest):
        raise DataError(f"val_fraction: {fraction:g} of {len(train)} images leaves {len(held)} held out; set another")
    return replace(splits, train=train.take(rest), val=train.take(held))


class ImageFiles(Sequence[np.ndarray]):
    """Images that stay in their files until they are asked for.

    Args:
        root: the folder that the names start from.
        names: N file names.
        boxes: (N, 4) left, top, right and bottom in pixels, to cut each image to; None: whole images.
    """

    def __init__(self, root: Path, names: Sequence[str], boxes: np.ndarray | None = None) -> None:
        self.root = root
        self.names = names
        self.boxes = boxes

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: Any) -> Any:
        path = self.root / self.names[index]
        try:
            with quiet():
                image = read_rgb(path, upright=self.boxes is None)
        except UnreadableImageError as error:
            raise DataError(
                f"{path}: could be read at the start and cannot be now: {error}; mend it, or remove it and start again"
            ) from None
        return image if self.boxes is None else clip(image, self.boxes[index])


def clip(image: np.ndarray, box: np.ndarray) -> np.ndarray:
    """The part (h, w, 3) of an image (H, W, 3) inside a box of left, top, right and bottom pixels."""
    left, top, right, bottom = box
    return np.ascontiguousarray(image[top:bottom, left:right])


@contextmanager
def quiet() -> Iterator[None]:
    """Without the decoders' warnings, of large images and damaged metadata; for all threads, so not within one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class UnreadableImageError(Exception):
    """A file that is no image, or a damaged one; the message is the reason."""


@cache
def formats() -> tuple[str, ...]:
    """Those of ``FORMATS`` that this Pillow knows, and HEIF where the package pillow-heif is installed."""
    Image.init()
    found = tuple(name for name in FORMATS if name in Image.OPEN)
    try:
        import_module("pillow_heif").register_heif_opener()
    except Exception:  # not installed, or broken
        return found
    return (*found, "HEIF")


def read_rgb(path: Path, *, upright: bool = True) -> np.ndarray:
    """Decodes an image file of ``formats()`` to RGB.

    Pillow refuses those of more than 179 million pixels as decompression bombs, before it decodes any of them. 16-bit
    grey keeps its upper eight bits, transparency is dropped (as torchvision's loader does), of several frames the
    first is taken. An image of more than ``LARGE`` pixels is returned at half its height and width, rounded up: a JPEG
    file is decoded at that size, of others 2 x 2 pixels are averaged.

    Args:
        path: the file.
        upright: apply the orientation of EXIF; otherwise the pixels are as they are stored, and never halved, for
            bounding boxes that count them.

    Returns:
        uint8 array (H, W, 3).

    Raises:
        UnreadableImageError: with the reason.
    """
    with _reasons(path), _open(path) as image:
        width, height = image.size
        halved = upright and width * height > LARGE
        if halved:
            image.draft("RGB", (width // 2, height // 2))  # does nothing unless the file is a JPEG
        if upright:
            ImageOps.exif_transpose(image, in_place=True)
        return _pixels(image, 2 if halved and width * height == image.width * image.height else 1)


def check_whole(path: Path) -> None:
    """Whether ``read_rgb`` can decode a file, in less time and memory; UnreadableImageError with the reason if not."""
    with _reasons(path), _open(path) as image:
        image.draft("RGB", (1, 1))  # JPEG files are decoded at an eighth of their size
        image.load()
        _rgb(image.crop((0, 0, 1, 1)))


def read_picture(path: Path) -> np.ndarray:
    """One picture that the user names, as ``read_rgb`` gives it; DataError where it cannot be read."""
    if not path.is_file():
        raise DataError(f"{path}: is no file; name a picture")
    try:
        with quiet():
            return read_rgb(path)
    except UnreadableImageError as error:
        raise DataError(f"{path}: cannot be read as a picture: {error}; name another one") from None


def size_of(path: Path) -> tuple[int, int]:
    """(W, H) as the file's header says; UnreadableImageError with the reason where there is none."""
    with _reasons(path), _open(path) as image:
        width, height = image.size
        return width, height


def _open(path: Path) -> Image.Image:
    if path.exists() and not path.is_file():  # opening a named pipe blocks until it is written to
        raise UnreadableImageError("not a regular file")
    if path.suffix.lower() in RAW_ENDINGS:
        raise UnreadableImageError("camera raw files are not read; convert them to JPEG or TIFF")
    return Image.open(path, formats=formats())


@contextmanager
def _reasons(path: Path) -> Iterator[None]:
    """Turns what the decoders raise into an UnreadableImageError."""
    try:
        yield
    except UnreadableImageError:
        raise
    except Exception as error:  # damaged files make the decoders raise nearly anything
        raise UnreadableImageError(_reason(error, path)) from None


def _reason(error: Exception, path: Path) -> str:
    if isinstance(error, UnidentifiedImageError):
        start = b""
        with suppress(OSError), path.open("rb") as file:
            start = file.read(12)
        if start[4:8] == b"ftyp" and start[8:] in HEIF_BRANDS and "HEIF" not in formats():
            return "HEIC needs the package pillow-heif: pip install pillow-heif"
        return "not an image that Pillow knows"
    text = str(error).splitlines()[0] if str(error) else ""
    return text or type(error).__name__


def _pixels(image: Image.Image, reduce: int) -> np.ndarray:
    """The RGB pixels (H, W, 3) of an image, each the mean of ``reduce`` x ``reduce`` of them.

    In strips: a conversion as a whole takes three copies of the image beside the result.
    """
    image.load()
    rows = max(1, STRIP // image.width) * reduce
    result = np.empty((-(-image.height // reduce), -(-image.width // reduce), 3), np.uint8)
    for top in range(0, image.height, rows):
        bottom = min(top + rows, image.height)
        strip = image if rows >= image.height else image.crop((0, top, image.width, bottom))
        strip = _rgb(strip)
        result[top // reduce : -(-bottom // reduce)] = np.asarray(strip.reduce(reduce) if reduce > 1 else strip)
    return result


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise UnreadableImageError("floating-point pixels have no fixed range")
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion would clip at 255
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if "transparency" in image.info:  # of a palette: Pillow asks for this step in between
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")
