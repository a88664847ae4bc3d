"""Image sets: images with optional labels and names, in memory or decoded on access.

An image is a uint8 array (H, W, 3), RGB.
"""

from __future__ import annotations

import io
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
"""Accepted image formats, recognised by content. Pillow supports others that are unsafe, such as PostScript."""

RAW_ENDINGS = (
    ".3fr", ".arw", ".cr2", ".cr3", ".crw", ".dcr", ".dng", ".erf", ".iiq", ".kdc", ".mos", ".mrw", ".nef", ".nrw",
    ".orf", ".pef", ".raf", ".raw", ".rw2", ".sr2", ".srf", ".srw", ".x3f",
)  # fmt: skip
"""Endings of camera raw files. Many are TIFF files whose first image is a thumbnail, which Pillow would return."""

HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
"""Values of bytes 8 to 12 of a HEIC file, after ``ftyp``."""

LARGE = 2**26
"""Pixels above which an image is decoded at half its height and width: 67 million, 8192 x 8192."""

STRIP = 2**20
"""Number of pixels that are converted at a time."""

Encoded = Path | bytes
"""An image file, or the bytes of one."""

Progress = Callable[[Iterable[Any], str, int, str], Iterable[Any]]
"""Wraps an iterable in a progress bar: (items, description, total, unit) -> items."""


class DataError(Exception):
    """The data cannot be used. The message is one sentence for the user: what is wrong, where, and how to fix it."""


@dataclass(frozen=True)
class ImageSet:
    """N images of one split.

    Attributes:
        images: N arrays (H, W, 3) of uint8, of one size or many.
        labels: int64 (N,), or None without labels.
        classes: class names; empty without labels.
        names: N file names relative to the data root, or None if the images have none.
        taken: (N,) index of each image in the split that this is a subset of; None: not a subset.
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
        """int64 (N,): index of each image in the data set's split."""
        return np.arange(len(self), dtype=np.int64) if self.taken is None else self.taken

    @property
    def held(self) -> int:
        """Size of the decoded images in memory, in bytes."""
        if isinstance(self.images, np.ndarray):
            return self.images.nbytes
        return sum(image.nbytes for image in self.images) if isinstance(self.images, list) else 0

    def take(self, index: np.ndarray) -> ImageSet:
        """The subset of the images at ``index`` (n,), in that order."""
        return ImageSet(
            self.images[index] if isinstance(self.images, np.ndarray) else Chosen(self.images, index),
            None if self.labels is None else self.labels[index],
            self.classes,
            None if self.names is None else Chosen(self.names, index),
            self.indices[index],
        )


class Chosen(Sequence[Any]):
    """A view of some items of a sequence.

    Args:
        items: the sequence.
        index: (n,) indices of the items.
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
    """The splits of a data set, and notes for the user.

    ``val``: training images held out to select the best epoch (``--val-fraction``).
    ``labelled``: where only some training images have labels, ``train`` has none, and these are those images. kNN and
    the linear probe use them as training features.
    """

    train: ImageSet
    test: ImageSet | None = None
    val: ImageSet | None = None
    labelled: ImageSet | None = None
    notes: tuple[str, ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()  # unreadable files and why


@dataclass(frozen=True)
class Request:
    """Arguments of a data set's ``load``; see ``datasets.load``."""

    root: Path | None
    strict: bool
    download: bool
    boxes: bool
    progress: Progress
    label_column: str | None = None


def fingerprint(split: ImageSet) -> str:
    """Fingerprint of a split: number of images, labels, names, and the first and last eight images."""
    few = [*range(min(len(split), 8)), *range(max(8, len(split) - 8), len(split))]
    parts = [split.images[i].tobytes() for i in few]
    parts += [] if split.labels is None else [split.labels.tobytes()]
    total = 0
    for part in (*parts, *(os.fsencode(name) for name in split.names or ())):
        total = zlib.crc32(part, total)
    return f"{len(split)} of {len(split.classes)} classes, sum {total:08x}"


def hold_out(splits: Splits, fraction: float) -> Splits:
    """Moves a fraction of the training images of each class to ``val``. The selection is always the same.

    Raises:
        DataError: the training images have no labels, or no image or all images would be held out.
    """
    train = splits.train
    if train.labels is None:
        raise DataError("--val-fraction: needs labels, and the training images have none; set it to 0")
    order = np.random.default_rng(0).permutation(len(train))  # fixed: the seed of the run must not change the data
    of_class = [order[train.labels[order] == label] for label in np.unique(train.labels)]
    held = np.sort(np.concatenate([members[: round(len(members) * fraction)] for members in of_class]))
    rest = np.setdiff1d(np.arange(len(train)), held)
    if not len(held) or not len(rest):
        raise DataError(
            f"--val-fraction: {fraction:g} of {len(train)} images gives {len(held)} held-out images; set another value"
        )
    return replace(splits, train=train.take(rest), val=train.take(held))


class ImageFiles(Sequence[np.ndarray]):
    """Images that are decoded from their files on access.

    Args:
        root: the folder that the names are relative to.
        names: N file names.
        boxes: (N, 4) left, top, right and bottom in pixels, to crop each image to; None: whole images.
        encoded: N encoded images, which are decoded in place of files.
    """

    def __init__(
        self,
        root: Path,
        names: Sequence[str],
        boxes: np.ndarray | None = None,
        encoded: Sequence[bytes] | None = None,
    ) -> None:
        self.root = root
        self.names = names
        self.boxes = boxes
        self.encoded = encoded

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: Any) -> Any:
        path = self.root / self.names[index]
        try:
            with quiet():
                image = read_rgb(path if self.encoded is None else self.encoded[index], upright=self.boxes is None)
        except UnreadableImageError as error:
            raise DataError(
                f"{path}: could be read at the start of the run, but not now: {error}; repair or remove it, and restart"
            ) from None
        return image if self.boxes is None else clip(image, self.boxes[index])


def clip(image: np.ndarray, box: np.ndarray) -> np.ndarray:
    """The part (h, w, 3) of an image (H, W, 3) inside a box of left, top, right and bottom pixels."""
    left, top, right, bottom = box
    return np.ascontiguousarray(image[top:bottom, left:right])


@contextmanager
def quiet() -> Iterator[None]:
    """Suppresses the decoders' warnings about large images and damaged metadata. Affects all threads."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class UnreadableImageError(Exception):
    """A file is damaged or not an image. The message is the reason."""


@cache
def formats() -> tuple[str, ...]:
    """The ``FORMATS`` that the installed Pillow supports, and HEIF if pillow-heif is installed."""
    Image.init()
    found = tuple(name for name in FORMATS if name in Image.OPEN)
    try:
        import_module("pillow_heif").register_heif_opener()
    except Exception:  # not installed, or broken
        return found
    return (*found, "HEIF")


def read_rgb(source: Encoded, *, upright: bool = True) -> np.ndarray:
    """Decodes an image of ``formats()`` to RGB.

    Pillow refuses images of more than 179 million pixels as decompression bombs before decoding. 16-bit greyscale is
    reduced to its upper eight bits, transparency is dropped (as by torchvision's loader), and the first of several
    frames is used. An image of more than ``LARGE`` pixels is returned at half its height and width, rounded up: JPEG
    files are decoded at that size, and other formats averaged over 2 x 2 pixels.

    Args:
        source: the file, or its bytes.
        upright: apply the EXIF orientation. If False, the pixels are returned as stored and at full size, to match
            bounding boxes.

    Returns:
        uint8 array (H, W, 3).

    Raises:
        UnreadableImageError: the image cannot be decoded.
    """
    with _reasons(source), _open(source) as image:
        width, height = image.size
        halved = upright and width * height > LARGE
        if halved:
            image.draft("RGB", (width // 2, height // 2))  # does nothing unless the file is a JPEG
        if upright:
            ImageOps.exif_transpose(image, in_place=True)
        return _pixels(image, 2 if halved and width * height == image.width * image.height else 1)


def check_whole(source: Encoded) -> None:
    """Raises UnreadableImageError if ``read_rgb`` cannot decode an image; takes less time and memory."""
    with _reasons(source), _open(source) as image:
        image.draft("RGB", (1, 1))  # JPEG files are decoded at an eighth of their size
        image.load()
        _rgb(image.crop((0, 0, 1, 1)))


def read_picture(path: Path) -> np.ndarray:
    """``read_rgb`` of an image that the user names. Raises DataError if it cannot be read."""
    if not path.is_file():
        raise DataError(f"{path}: no such file; name an image file")
    try:
        with quiet():
            return read_rgb(path)
    except UnreadableImageError as error:
        raise DataError(f"{path}: cannot be read as an image: {error}; name another file") from None


def rgb_of(image: Image.Image) -> np.ndarray:
    """The pixels (H, W, 3) of an image that the user opened, upright, as ``read_rgb`` returns them at full size.

    Raises:
        DataError: they cannot be decoded.
    """
    name = getattr(image, "filename", "") or "the image"
    try:
        with quiet(), _reasons(Path(name)):
            return _pixels(ImageOps.exif_transpose(image), 1)
    except UnreadableImageError as error:
        raise DataError(f"{name}: cannot be read as an image: {error}; give another image") from None


def size_of(source: Encoded) -> tuple[int, int]:
    """(W, H) from the image's header. Raises UnreadableImageError if it cannot be read."""
    with _reasons(source), _open(source) as image:
        width, height = image.size
        return width, height


def _open(source: Encoded) -> Image.Image:
    if isinstance(source, bytes):
        if not source:
            raise UnreadableImageError("no bytes")
        return Image.open(io.BytesIO(source), formats=formats())
    path = source
    if path.exists() and not path.is_file():  # opening a named pipe blocks until it is written to
        raise UnreadableImageError("not a regular file")
    if path.suffix.lower() in RAW_ENDINGS:
        raise UnreadableImageError("camera raw files are not supported; convert them to JPEG or TIFF")
    return Image.open(path, formats=formats())


@contextmanager
def _reasons(source: Encoded) -> Iterator[None]:
    """Turns all errors of the decoders into UnreadableImageError."""
    try:
        yield
    except UnreadableImageError:
        raise
    except Exception as error:  # damaged files can cause any error
        raise UnreadableImageError(_reason(error, source)) from None


def _reason(error: Exception, source: Encoded) -> str:
    if isinstance(error, UnidentifiedImageError):
        start = source[:12] if isinstance(source, bytes) else b""
        if isinstance(source, Path):
            with suppress(OSError), source.open("rb") as file:
                start = file.read(12)
        if start[4:8] == b"ftyp" and start[8:] in HEIF_BRANDS and "HEIF" not in formats():
            return "HEIC needs the package pillow-heif: pip install pillow-heif"
        return "not an image that Pillow can read"
    text = str(error).splitlines()[0] if str(error) else ""
    return text or type(error).__name__


def _pixels(image: Image.Image, reduce: int) -> np.ndarray:
    """The RGB pixels (H, W, 3) of an image, averaged over ``reduce`` x ``reduce`` pixels.

    The image is converted in strips, as converting it at once would need three more copies in memory.
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
    if "transparency" in image.info:  # palette with transparency: avoids a warning of Pillow
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")
