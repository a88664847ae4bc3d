"""Thumbnails, grids of them, and the image grid of the anchors of a discovery and their neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from lib.session.atomic_files import atomic_write

TILE = 48
"""Edge of a thumbnail, in pixels."""
EQUAL, OTHER, UNKNOWN = "#2a9d4e", "#d1342f", "#9a9a9a"
"""Frame colour of a neighbour: same class as the anchor, another class, or no labels."""


def draw(
    images: Sequence[np.ndarray],
    labels: np.ndarray | None,
    anchors: torch.Tensor,
    neighbours: torch.Tensor,
    *,
    rows: int = 8,
    columns: int = 6,
) -> Image.Image:
    """Anchors in order of entropy, evenly spaced from the lowest to the highest, read row by row.

    Each entry is an anchor and up to five of its neighbours, most similar first. A frame shows whether a neighbour has
    the anchor's label, if there are labels.

    Args:
        images: N arrays (H, W, 3) of uint8.
        labels: (N,) or None.
        anchors: (A,) sample indices, at least one.
        neighbours: (A, K) sample indices.
        rows, columns: maximum number of entries.
    """
    shown = min(neighbours.shape[1], 5)
    columns = max(1, columns // shown)
    picks = np.linspace(0, len(anchors) - 1, min(rows * columns, len(anchors))).round().astype(int)
    entries = []
    for pick in picks:
        anchor = int(anchors[pick])
        entry = [_framed(images[anchor], "white")]
        for neighbour in neighbours[pick, :shown].tolist():
            frame = UNKNOWN if labels is None else EQUAL if labels[anchor] == labels[neighbour] else OTHER
            entry.append(_framed(images[neighbour], frame))
        entries.append(grid(entry, len(entry), gap=(2, 2)))
    return grid(entries, min(columns, len(entries)), gap=(12, 6), margin=12)


def grid(
    pictures: Sequence[Image.Image], columns: int, *, gap: tuple[int, int] = (0, 0), margin: int = 0
) -> Image.Image:
    """Pictures of one size on white, read row by row.

    Args:
        pictures: at least one.
        columns: pictures in a row.
        gap: pixels to the right of each picture, and below it.
        margin: pixels to the left of all, and above.
    """
    width, height = pictures[0].width + gap[0], pictures[0].height + gap[1]
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (margin + columns * width, margin + rows * height), "white")
    for place, picture in enumerate(pictures):
        sheet.paste(picture, (margin + place % columns * width, margin + place // columns * height))
    return sheet


def _framed(image: np.ndarray, frame: str) -> Image.Image:
    return ImageOps.expand(tile(image, TILE), 2, frame)


def tile(image: np.ndarray, side: int) -> Image.Image:
    """The image (H, W, 3) of uint8 in a white square of ``side`` pixels, with its proportions unchanged.

    Images of at most half that size are magnified without smoothing.
    """
    method = Image.Resampling.NEAREST if max(image.shape[:2]) <= side // 2 else Image.Resampling.BICUBIC
    return ImageOps.pad(Image.fromarray(image), (side, side), method, color="white")


def save_anchors(
    path: Path, images: Sequence[np.ndarray], labels: np.ndarray | None, anchors: torch.Tensor, neighbours: torch.Tensor
) -> Image.Image | None:
    """Writes the image grid as PNG and returns it; without anchors or neighbours, writes nothing and returns None.

    Raises:
        OSError: the file cannot be written.
    """
    if not neighbours.numel():
        return None
    picture = draw(images, labels, anchors, neighbours)
    with atomic_write(path) as file:
        picture.save(file, "PNG")
    return picture


def thumbnails(images: Sequence[np.ndarray], index: Sequence[int]) -> np.ndarray:
    """Chosen images as (n, 3, TILE, TILE) of float32 in [0, 1], padded with white if they are not square."""
    stacked = np.stack([np.asarray(tile(images[i], TILE)) for i in index])  # (n, TILE, TILE, 3)
    shown: np.ndarray = np.divide(stacked.transpose(0, 3, 1, 2), 255, dtype=np.float32)
    return shown
