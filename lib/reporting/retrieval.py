"""Finds the training images that are most similar to given images, and shows them in a table and an image grid.

No file is overwritten. Letters: K nearest, Q queries.
"""

from __future__ import annotations

import unicodedata
from bisect import bisect_left
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from matplotlib.font_manager import findfont
from PIL import Image, ImageDraw, ImageFont

from datasets import ImageSet
from lib.reporting import plots
from lib.session import image_grid
from lib.session.atomic_files import new_files, printable
from lib.session.console import SUMMARY, logger, table

TILE, LINE, LETTERS = 128, 18, 12
"""Sizes in pixels: a tile (smaller images are magnified), the height of a line of text, and the font."""
COLUMNS = 10
"""Number of found images in a row; further ones follow in the rows below."""


def _class_of(train: ImageSet, sample: int) -> str:
    """The name of a sample's class; '' without labels."""
    return "" if train.labels is None else train.classes[int(train.labels[sample])]


def _short(value: float) -> float:
    """Rounds to the precision of float32, without negative zeros."""
    return round(value, 6) + 0.0


def describe(name: str, indices: torch.Tensor, similarities: torch.Tensor, train: ImageSet) -> str:
    """The table of one query: its name, then rank, file or index, class and similarity of the K found (K,)."""
    labelled = train.labels is not None
    rows = []
    for rank, (sample, value) in enumerate(zip(indices.tolist(), similarities.tolist(), strict=True), start=1):
        kind = [printable(_class_of(train, sample))] if labelled else []
        rows.append([rank, _called(sample, train), *kind, f"{_short(value):.4f}"])
    header = ["rank", "file" if train.names else "index", *(["class"] if labelled else []), "similarity"]
    return f"{printable(name)}\n{table(header, rows)}"


def _called(sample: int, train: ImageSet) -> str:
    return printable(train.names[sample]) if train.names else str(train.indices[sample])


def draw(
    queries: Sequence[tuple[str, np.ndarray]], indices: torch.Tensor, similarities: torch.Tensor, train: ImageSet
) -> Image.Image:
    """Draws a row for each query (name, image) and its K found images (Q, K), most similar first.

    Below each found image are its similarity, and its class or else its file or index.
    """
    gap, width, height = TILE // 12, TILE + TILE // 12, TILE + 2 * LINE + TILE // 12
    columns = min(COLUMNS, indices.shape[1])
    depth = LINE + gap + height * -(-indices.shape[1] // COLUMNS)  # height of a row
    picture = Image.new("RGB", (4 * gap + width * (1 + columns), gap + depth * len(queries)), "white")
    pen = ImageDraw.Draw(picture)

    def write(text: str, left: int, top: int, most: int) -> None:
        pen.text((left, top), shorten(drawable(text), most), fill="black", font=_font())

    for row, (name, image) in enumerate(queries):
        top = gap + row * depth
        write(name, gap, top, picture.width - 2 * gap)
        picture.paste(image_grid.tile(image, TILE), (gap, top + LINE))
        for place, (sample, value) in enumerate(zip(indices[row].tolist(), similarities[row].tolist(), strict=True)):
            below, column = divmod(place, COLUMNS)
            x, y = 4 * gap + width * (1 + column), top + LINE + height * below
            picture.paste(image_grid.tile(train.images[sample], TILE), (x, y))
            write(f"{_short(value):.3f}", x, y + TILE, TILE)
            write(_class_of(train, sample) or Path(_called(sample, train)).name, x, y + TILE + LINE, TILE)
    return picture


@cache
def _font() -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(findfont(plots.FONT), LETTERS)


def drawable(text: str) -> str:
    """The text on one line with its accents composed, and question marks for characters that the font lacks."""
    text = unicodedata.normalize("NFC", printable(text))
    return "".join(character if ord(character) in plots.letters() else "?" for character in text)


def shorten(text: str, most: float) -> str:
    """The text; if it is wider than ``most`` pixels, its middle is replaced by an ellipsis."""

    def without_middle(kept: int) -> str:
        return f"{text[: kept // 2]}…{text[len(text) - (kept - kept // 2) :]}"

    def is_too_wide(kept: int) -> bool:
        return _font().getlength(without_middle(kept)) > most

    if _font().getlength(text) <= most:
        return text
    return without_middle(max(0, bisect_left(range(len(text)), True, key=is_too_wide) - 1))


def save_picture(path: Path, picture: Image.Image) -> None:
    """Writes an image of ``draw`` as PNG. Raises UsageError if the file exists or cannot be written."""
    with new_files(path) as (file,):
        picture.save(file, format="PNG")
    logger().info("pictures: %s (%d x %d pixels)", path, *picture.size, extra=SUMMARY)
