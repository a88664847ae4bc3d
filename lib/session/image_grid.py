"""An image grid of the anchors of a discovery and their neighbours."""

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
    count = min(rows * columns, len(anchors))
    picks = np.linspace(0, len(anchors) - 1, count).round().astype(int)
    columns = min(columns, count)
    gap, cell = 12, TILE + 6
    width = columns * (cell * (1 + shown) + gap) + gap
    height = -(-count // columns) * (cell + gap // 2) + gap
    picture = Image.new("RGB", (width, height), "white")
    for place, pick in enumerate(picks):
        anchor = int(anchors[pick])
        left = gap + (place % columns) * (cell * (1 + shown) + gap)
        top = gap + (place // columns) * (cell + gap // 2)
        picture.paste(_framed(images[anchor], "white"), (left, top))
        for number, neighbour in enumerate(neighbours[pick, :shown].tolist()):
            frame = UNKNOWN if labels is None else EQUAL if labels[anchor] == labels[neighbour] else OTHER
            picture.paste(_framed(images[neighbour], frame), (left + (1 + number) * cell, top))
    return picture


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
