"""Retrieval of similar training images: as a table and drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from datasets import ImageSet
from lib.errors import UsageError
from lib.reporting import retrieval
from lib.reporting.retrieval import (
    LINE,
    TILE,
    describe,
    draw,
)


def images_of(
    images: Sequence[np.ndarray],
    names: Sequence[str] | None = None,
    labels: np.ndarray | None = None,
    classes: tuple[str, ...] = (),
) -> ImageSet:
    return ImageSet(images, labels, classes, names)


def dummies(samples: int, **known: Any) -> ImageSet:
    return ImageSet([np.zeros((2, 2, 3), np.uint8)] * samples, **known)


def test_existing_image_file_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "out.png").write_text("mine")
    with pytest.raises(UsageError, match=r"out.png: already exists"):
        retrieval.save_picture(tmp_path / "out.png", Image.new("RGB", (2, 2)))
    assert [p.read_text() for p in tmp_path.iterdir()] == ["mine"]


def test_table_shows_rank_file_class_and_similarity() -> None:
    indices, similarities = torch.tensor([2, 0, 1]), torch.tensor([0.98765, 0.5, -1e-9])
    names = ["a.png", "new\nline.png", "\udcff.png"]
    train = dummies(3, names=names, labels=np.array([1, 0, 0]), classes=("cat", "dog"))
    name, header, rule, *lines = describe("my\npicture.jpg", indices, similarities, train).split("\n")
    assert name == "my\\npicture.jpg"
    assert header.split() == ["rank", "file", "class", "similarity"]
    assert [line.split() for line in lines] == [
        ["1", "\\udcff.png", "cat", "0.9877"],
        ["2", "a.png", "dog", "0.5000"],
        ["3", "new\\nline.png", "cat", "0.0000"],
    ]
    assert {len(line) for line in (header, rule, *lines)} == {len(rule)}  # columns are aligned
    bare = describe("x", indices[:1], similarities[:1], dummies(3))
    assert bare.split("\n")[1:] == ["rank  index  similarity", "----  -----  ----------", "1         2      0.9877"]


# The picture. Each image has a colour of its own, with a blue that no letter has.


def flat(number: int, height: int = 8, width: int = 8) -> np.ndarray:
    return np.full((height, width, 3), (1 + 2 * number, 3, 250), np.uint8)


def boxes(picture: Image.Image) -> list[tuple[int, int, int, int, int]]:
    """Every single-coloured rectangle, row by row: number, left, top, width, height."""
    pixels = np.asarray(picture).astype(int)
    image = (pixels[..., 1] == 3) & (pixels[..., 2] == 250)
    result = []
    for y, x in np.argwhere(image):
        if (y and image[y - 1, x]) or (x and image[y, x - 1]):
            continue
        wide = int(np.argmin(np.append(image[y, x:], False)))
        high = int(np.argmin(np.append(image[y:, x], False)))
        assert (pixels[y : y + high, x : x + wide] == pixels[y, x]).all()
        result.append(((pixels[y, x, 0] - 1) // 2, int(x), int(y), wide, high))
    return result


def drawn(asked: list[np.ndarray], indices: list[list[int]], train: ImageSet, names: str = "qrstuv") -> Image.Image:
    queries = list(zip(names, asked, strict=False))
    chosen = torch.tensor(indices)
    return draw(queries, chosen, torch.linspace(1, -1, chosen.numel()).reshape(chosen.shape), train)


def test_each_query_has_a_row_of_tiles_by_similarity() -> None:
    train = images_of([flat(number) for number in range(20)])
    picture = drawn([flat(90), flat(91)], [[7, 3, 5], [4, 3, 19]], train)
    found = boxes(picture)
    assert [number for number, *_ in found] == [90, 7, 3, 5, 91, 4, 3, 19]
    assert {(wide, high) for *_, wide, high in found} == {(TILE, TILE)}
    assert len({top for _, _, top, *_ in found[:4]}) == len({top for _, _, top, *_ in found[4:]}) == 1
    lefts = [left for _, left, *_ in found]
    assert lefts[:4] == lefts[4:] == sorted(lefts[:4])
    assert lefts[1] - lefts[0] > lefts[2] - lefts[1] == lefts[3] - lefts[2] > TILE  # the query stands apart
    assert found[4][2] - found[0][2] > TILE + 40  # space for the lines of text


@pytest.mark.parametrize(("k", "lines"), [(1, [1]), (10, [10]), (11, [10, 1]), (25, [10, 10, 5])])
def test_more_than_ten_results_continue_below(k: int, lines: list[int]) -> None:
    train = images_of([flat(number) for number in range(30)])
    found = boxes(drawn([flat(90), flat(91)], [list(range(k))] * 2, train))
    assert [number for number, *_ in found] == [90, *range(k), 91, *range(k)]
    tops = [top for _, _, top, *_ in found]
    assert [tops.count(top) for top in sorted(set(tops))] == [lines[0] + 1, *lines[1:]] * 2


@pytest.mark.parametrize(
    ("height", "width"), [(8, 8), (16, 8), (32, 32), (375, 500), (500, 375), (96, 96), (1, 1), (50, 500)]
)
def test_image_fills_its_tile_and_keeps_its_proportions(height: int, width: int) -> None:
    picture = drawn([flat(0)], [[1]], images_of([flat(0), flat(1, height, width)]))
    (_, _, top, *_), (number, _, top_of_it, wide, high) = boxes(picture)
    assert number == 1 and max(wide, high) == TILE
    assert abs(wide / high - width / height) <= 0.06 * width / height
    assert abs((top + TILE / 2) - (top_of_it + high / 2)) <= 1  # centred


def test_pixels_of_small_images_stay_visible() -> None:
    image = np.random.default_rng(0).integers(0, 255, (8, 8, 3)).astype(np.uint8)
    pixels = np.asarray(drawn([flat(0)], [[0]], images_of([image])))
    _, left, top, *_ = boxes(drawn([flat(0)], [[0]], images_of([flat(1)])))[1]
    assert (pixels[top : top + TILE, left : left + TILE] == np.kron(image, np.ones((16, 16, 1), np.uint8))).all()


def test_extremely_thin_image_does_not_affect_the_others() -> None:
    train = images_of([flat(0), flat(1, 1, 5000), flat(2, 3000, 1), flat(3)])
    numbers = [number for number, *_, high in boxes(drawn([flat(90)], [[0, 1, 2, 3]], train)) if high == TILE]
    assert numbers[:2] == [90, 0] and numbers[-1] == 3


def strip(picture: Image.Image, place: int, line: int) -> bytes:
    """The pixels of a line of text under an image: 0 the similarity, 1 the class, file or index."""
    _, left, top, *_ = boxes(picture)[place]
    down = top + TILE + line * LINE
    return picture.crop((left, down, left + TILE, down + LINE)).tobytes()


def test_captions_show_similarity_and_class_or_file() -> None:
    images = [flat(0), flat(0)]
    text = {
        "class": images_of(images, ["f.png", "f.png"], np.array([0, 1]), ("cat", "dog")),
        "file": images_of(images, ["a/f.png", "b/g.png"]),
        "same": images_of(images, ["a/f.png", "b/f.png"]),
        "index": images_of(images),
    }
    pictures = {name: drawn([flat(90)], [[0, 1]], train) for name, train in text.items()}
    for name, picture in pictures.items():
        assert strip(picture, 1, 0) != strip(picture, 2, 0)  # 1.000 and -1.000
        assert (strip(picture, 1, 1) == strip(picture, 2, 1)) == (name == "same")
        assert len(set(strip(picture, 1, 0))) > 10 and len(set(strip(picture, 1, 1))) > 10  # letters
    assert len({strip(picture, 1, 1) for picture in pictures.values()}) == 3
    assert len({strip(picture, 1, 0) for picture in pictures.values()}) == 1


@pytest.mark.parametrize("name", ["x" * 300, "W" * 300, "\udcff\n狗" * 50, "", "é"])
def test_names_of_any_length_stay_within_their_tile(name: str) -> None:
    train = images_of([flat(0), flat(0)], [name, "b"])
    picture = draw([(name, flat(90))], torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.25]]), train)
    other = draw(
        [("q", flat(90))], torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.25]]), images_of(train.images, ["a", "b"])
    )
    assert picture.size == other.size and boxes(picture) == boxes(other)
    assert strip(picture, 2, 0) == strip(other, 2, 0) and strip(picture, 2, 1) == strip(other, 2, 1)
    assert (np.asarray(picture)[:, -2:] == 255).all()


@pytest.mark.parametrize("names", [("собака", "кошка"), ("été", "ete"), ("Ωμέγα", "?????"), ("łódź", "????")])
def test_letters_beyond_latin_1_are_drawn(names: tuple[str, str]) -> None:
    picture = drawn([flat(90)], [[0, 1]], images_of([flat(0)] * 2, names))
    assert strip(picture, 1, 1) != strip(picture, 2, 1)
    missing = drawn([flat(90)], [[0, 1]], images_of([flat(0)] * 2, ["狗" * len(name) for name in names]))
    assert strip(picture, 1, 1) != strip(missing, 1, 1)  # neither boxes nor question marks


def test_combining_accent_is_drawn_with_its_letter() -> None:
    composed, apart = (
        drawn([flat(90)], [[0]], images_of([flat(0)], [name])) for name in ("\u00e9t\u00e9", "e\u0301te\u0301")
    )
    assert composed.tobytes() == apart.tobytes()


@pytest.mark.parametrize("name", ["holiday-in-the-mountains-2019-0231.jpg", "W" * 60 + "1.png", "i" * 300 + "1.png"])
def test_long_name_is_shortened_in_the_middle(name: str) -> None:
    shortened = retrieval.shorten(name, TILE)
    start, end = shortened.split("…")
    assert name.startswith(start) and name.endswith(end) and len(end) - len(start) in (0, 1)
    width = retrieval._font().getlength
    assert width(shortened) <= TILE
    longer = (
        name[: len(end)] + "…" + name[-len(end) :]
        if len(start) < len(end)
        else name[: len(start)] + "…" + name[-len(end) - 1 :]
    )
    assert width(longer) > TILE  # shortened no more than necessary
    assert retrieval.shorten("0231.jpg", TILE) == "0231.jpg"
    assert retrieval.shorten(name, 1) == "…"


def test_letters_without_glyphs_become_question_marks() -> None:
    lacking, marked = (
        drawn([flat(90)], [[0]], images_of([flat(0)], [name]), names=name[0]) for name in ("狗 é", "? é")
    )
    assert lacking.tobytes() == marked.tobytes()


def test_image_grid_is_written_as_png(tmp_path: Path) -> None:
    picture = drawn([flat(90)], [[0]], images_of([flat(0)]))
    retrieval.save_picture(tmp_path / "found.png", picture)
    with Image.open(tmp_path / "found.png") as read:
        assert read.format == "PNG" and read.mode == "RGB"
        assert read.tobytes() == picture.tobytes()
    assert [path.name for path in tmp_path.iterdir()] == ["found.png"]
