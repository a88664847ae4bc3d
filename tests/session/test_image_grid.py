"""The image grid of anchors and neighbours, read back from its pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lib.session import image_grid

GREEN, RED, GREY, WHITE = (0x2A, 0x9D, 0x4E), (0xD1, 0x34, 0x2F), (0x9A, 0x9A, 0x9A), (255, 255, 255)


def colour(sample: int) -> tuple[int, int, int]:
    """A colour that encodes the sample and differs from all frame colours."""
    return (1 + 2 * (sample % 100), 3 + sample // 100, 250)


def flat(sample: int, height: int = 8, width: int = 8) -> np.ndarray:
    return np.full((height, width, 3), colour(sample), np.uint8)


def found(anchors: list[int], neighbours: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    width = len(neighbours[0]) if neighbours else 0
    return torch.tensor(anchors), torch.tensor(neighbours, dtype=torch.long).reshape(len(anchors), width)


def read(picture: Image.Image, size: int = 48) -> list[list[tuple[int, tuple[int, ...]]]]:
    """The rows of the grid: the sample and the frame colour of each image."""
    pixels = np.asarray(picture)
    assert pixels.ndim == 3 and pixels.shape[2] == 3
    inside = pixels[..., 2] == 250
    rows = []
    y = 0
    while y < len(pixels):
        if not inside[y].any():
            y += 1
            continue
        height = next(h for h in range(len(pixels)) if y + h == len(pixels) or not inside[y + h].any())
        assert height == size
        entries, x = [], 0
        while x < pixels.shape[1]:
            if not inside[y, x]:
                x += 1
                continue
            block = pixels[y : y + size, x : x + size]
            assert (block == pixels[y, x]).all()  # one image from edge to edge
            framed = pixels[y - 2 : y + size + 2, x - 2 : x + size + 2]
            sides = [framed[:2], framed[-2:], framed[:, :2], framed[:, -2:]]
            around = {tuple(map(int, pixel)) for side in sides for pixel in side.reshape(-1, 3)}
            assert len(around) == 1  # a frame of one colour on all sides
            red, green, _ = map(int, pixels[y, x])
            entries.append(((red - 1) // 2 + 100 * (green - 3), around.pop()))
            x += size
        rows.append(entries)
        y += size
    return rows


def in_order(picture: Image.Image) -> list[int]:
    return [sample for row in read(picture) for sample, _ in row]


def test_anchor_is_followed_by_neighbours_by_similarity() -> None:
    images = [flat(sample) for sample in range(100)]
    picture = image_grid.draw(images, None, *found([7, 3], [[5, 9, 1], [2, 7, 8]]))
    assert in_order(picture) == [7, 5, 9, 1, 3, 2, 7, 8]


def test_frame_colours_show_equal_other_and_unknown_labels() -> None:
    images = [flat(sample) for sample in range(100)]
    labels = np.zeros(100, np.int64)
    labels[[5, 7]] = 1
    neighbourhoods = found([7, 3], [[5, 9], [2, 7]])
    (row,) = read(image_grid.draw(images, labels, *neighbourhoods))
    assert row == [(7, WHITE), (5, GREEN), (9, RED), (3, WHITE), (2, GREEN), (7, RED)]
    (row,) = read(image_grid.draw(images, None, *neighbourhoods))
    assert row == [(7, WHITE), (5, GREY), (9, GREY), (3, WHITE), (2, GREY), (7, GREY)]


@pytest.mark.parametrize("k", [5, 6, 20])
def test_first_five_of_many_neighbours_are_shown(k: int) -> None:
    images = [flat(sample) for sample in range(100)]
    neighbours = [list(range(10, 10 + k)), list(range(50, 50 + k))]
    assert read(image_grid.draw(images, None, *found([1, 2], neighbours))) == [
        [(1, WHITE), *((sample, GREY) for sample in range(10, 15))],
        [(2, WHITE), *((sample, GREY) for sample in range(50, 55))],
    ]


@pytest.mark.parametrize("count", [1, 2, 5, 6, 7, 13, 47, 48])
def test_few_anchors_are_all_shown_in_order_of_entropy(count: int) -> None:
    images = [flat(sample) for sample in range(100)]
    anchors = [(37 * number) % 100 for number in range(count)]
    picture = image_grid.draw(images, None, *found(anchors, [[99 - anchor] for anchor in anchors]))
    assert in_order(picture) == [sample for anchor in anchors for sample in (anchor, 99 - anchor)]


def test_many_anchors_are_shown_in_order_of_entropy() -> None:
    images = [flat(sample) for sample in range(1000)]
    anchors = list(range(999, 499, -1))
    shown = in_order(image_grid.draw(images, None, *found(anchors, [[0]] * 500), rows=4, columns=5))[::2]
    places = [anchors.index(sample) for sample in shown]
    assert len(places) == 20 and places[0] == 0 and places[-1] == 499
    steps = np.diff(places)
    assert steps.min() >= 26 and steps.max() <= 27  # 499 places in 19 steps


def test_image_of_any_size_fills_its_tile() -> None:
    sizes = {1: (1, 1), 2: (8, 8), 3: (48, 48), 4: (500, 500), 5: (2000, 2000), 6: (33, 33)}
    images = [flat(sample, *sizes.get(sample, (8, 8))) for sample in range(100)]
    picture = image_grid.draw(images, None, *found([1, 3, 5], [[2], [4], [6]]))
    assert in_order(picture) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(("height", "width"), [(16, 8), (8, 16), (300, 100), (10, 400), (400, 10), (96, 4)])
def test_tile_keeps_the_aspect_ratio(height: int, width: int) -> None:
    images = [flat(0, height, width), flat(1)]
    picture = image_grid.draw(images, None, *found([0], [[1]]))
    pixels = np.asarray(picture)
    first = (pixels == colour(0)).all(axis=2)
    second = (pixels == colour(1)).all(axis=2)
    (top, bottom), (left, right) = ((at.min(), at.max() + 1) for at in np.nonzero(first))
    assert first[top:bottom, left:right].all()
    longer = max(height, width)
    assert abs((bottom - top) - max(1, 48 * height / longer)) <= 1
    assert abs((right - left) - max(1, 48 * width / longer)) <= 1
    (top2, bottom2), _ = ((at.min(), at.max() + 1) for at in np.nonzero(second))
    assert abs((top + bottom) - (top2 + bottom2)) <= 1  # centred at the same height as the neighbour
    around = pixels[top2:bottom2, 14:62][~first[top2:bottom2, 14:62]]
    assert (around == 255).all()


@pytest.mark.parametrize(("height", "width"), [(1000, 1), (1, 97), (1, 5000)])
def test_extremely_thin_image_does_not_affect_the_others(height: int, width: int) -> None:
    images = [flat(0, height, width), flat(1), flat(2)]
    picture = image_grid.draw(images, None, *found([0, 1], [[1], [2]]))
    assert in_order(picture) == [1, 1, 2]


def test_image_is_not_flipped_or_rotated() -> None:
    pattern = np.zeros((2, 2, 3), np.uint8)
    pattern[0, 0], pattern[0, 1], pattern[1, 0], pattern[1, 1] = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)
    image = np.kron(pattern, np.ones((24, 24, 1), np.uint8))
    pixels = np.asarray(image_grid.draw([image, flat(1)], None, *found([0], [[1]])))
    corner = {tuple(c): np.argwhere((pixels == c).all(axis=2)).mean(axis=0) for c in pattern.reshape(-1, 3)}
    assert corner[255, 0, 0][1] < corner[0, 255, 0][1] and corner[255, 0, 0][0] < corner[0, 0, 255][0]
    assert corner[255, 255, 0][1] > corner[0, 0, 255][1]


def test_image_grid_is_written_as_png(tmp_path: Path) -> None:
    images = [flat(sample) for sample in range(100)]
    neighbourhoods = found([7, 3], [[5], [2]])
    image_grid.save_anchors(tmp_path / "picture.png", images, None, *neighbourhoods)
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.format == "PNG"
        assert in_order(picture.convert("RGB")) == [7, 5, 3, 2]


def test_no_file_is_written_without_anchors_or_neighbours(tmp_path: Path) -> None:
    images = [flat(0)]
    image_grid.save_anchors(tmp_path / "picture.png", images, None, *found([], []))
    image_grid.save_anchors(tmp_path / "picture.png", images, None, *found([0], [[]]))
    assert list(tmp_path.iterdir()) == []
