"""A grid of thumbnails: anchors next to their neighbours."""

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
    """Draws anchors and their neighbours.

    Each entry is an anchor and up to five neighbours, most similar first. The entries are evenly spaced over the
    anchors in order of entropy, lowest first, row by row. With labels, a neighbour's frame shows whether it has
    the anchor's label.

    Args:
        images: N arrays (H, W, 3) of uint8.
        labels: (N,) or None.
        anchors: (A,) sample indices in order of entropy, A at least 1.
        neighbours: (A, K) sample indices.
        rows, columns: maximum number of rows, and of anchors with one neighbour each in a row.
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
        picture.paste(_tile(images[anchor], "white"), (left, top))
        for number, neighbour in enumerate(neighbours[pick, :shown].tolist()):
            frame = UNKNOWN if labels is None else EQUAL if labels[anchor] == labels[neighbour] else OTHER
            picture.paste(_tile(images[neighbour], frame), (left + (1 + number) * cell, top))
    return picture


def _tile(image: np.ndarray, frame: str) -> Image.Image:
    fitted = ImageOps.pad(Image.fromarray(image), (TILE, TILE), Image.Resampling.BICUBIC, color="white")
    return ImageOps.expand(fitted, 2, frame)


def save_anchors(
    path: Path, images: Sequence[np.ndarray], labels: np.ndarray | None, anchors: torch.Tensor, neighbours: torch.Tensor
) -> Image.Image | None:
    """Writes the grid as a PNG file and returns it. Without anchors or neighbours, writes nothing and returns None.

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
    """The images at ``index`` as float32 (n, 3, TILE, TILE) in [0, 1], padded to squares with white."""
    tiles = [ImageOps.pad(Image.fromarray(images[i]), (TILE, TILE), color="white") for i in index]
    stacked = np.stack([np.asarray(tile) for tile in tiles])  # (n, TILE, TILE, 3)
    shown: np.ndarray = np.divide(stacked.transpose(0, 3, 1, 2), 255, dtype=np.float32)
    return shown
