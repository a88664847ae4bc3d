"""The tables and pictures of who resembles whom, read back and held against plain loops."""

from __future__ import annotations

import csv
import io
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import oracles
from datasets import ImageSet
from lib.errors import UsageError
from lib.method.discovery import discover
from lib.method.neighbourhoods import Neighbourhoods
from lib.reporting import retrieval
from lib.reporting.retrieval import (
    LINE,
    NEVER,
    TILE,
    became_anchor,
    describe,
    draw,
    query,
    save_neighbourhoods,
)
from patches import blocks_of

many = settings(max_examples=40, deadline=None)
seeds = st.integers(0, 2**32 - 1)
ODD = [
    "a,b.png",
    'say "x".png',
    "new\nline.png",
    "cr\r.png",
    "b/\udcff raw.png",
    "=1+1.png",
    "é 狗.png",
    " ",
    "x" * 200,
]


def images_of(
    images: Sequence[np.ndarray],
    names: Sequence[str] | None = None,
    labels: np.ndarray | None = None,
    classes: tuple[str, ...] = (),
) -> ImageSet:
    return ImageSet(images, labels, classes, names)


def dummies(samples: int, **known: Any) -> ImageSet:
    return ImageSet([np.zeros((2, 2, 3), np.uint8)] * samples, **known)


def written(
    path: Path, memory: np.ndarray, size: int, rounds: list[int], train: ImageSet, block: int = 2**20
) -> list[list[str]]:
    bank = torch.from_numpy(memory)
    with blocks_of(block):
        save_neighbourhoods(path, embeddings=bank, temperature=0.2, size=size, rounds=torch.tensor(rounds), train=train)
    return list(csv.reader(io.StringIO(path.read_bytes().decode("utf-8"), newline=""), strict=True))


# The table of all.


@many
@given(st.integers(1, 12), st.integers(2, 5), seeds, st.integers(1, 15), st.integers(1, 60))
def test_table_equals_plain_loops(
    tmp_path_factory: pytest.TempPathFactory, samples: int, low_dim: int, seed: int, size: int, block: int
) -> None:
    memory = oracles.rows("random", samples, low_dim, seed)
    rounds = [number % 4 - 1 for number in range(samples)]
    path = tmp_path_factory.mktemp("table") / "out.csv"
    header, *lines = written(path, memory, size, rounds, dummies(samples), block)
    near = min(size, samples - 1)
    columns = [f"{what}_{number}" for number in range(1, near + 1) for what in ("neighbour", "similarity")]
    assert header == ["index", "entropy", "round", *columns]
    assert [line[0] for line in lines] == [str(sample) for sample in range(samples)]
    for sample, (_, entropy, round, *found) in enumerate(lines):
        assert float(entropy) == pytest.approx(oracles.entropy(memory[sample], memory, 0.2), abs=1e-6)
        assert round == ("" if rounds[sample] == -1 else str(rounds[sample]))
        nearest = oracles.neighbours(memory, sample, size)
        assert [int(cell) for cell in found[::2]] == nearest
        similar = [oracles.dot(memory[sample], memory[j]) for j in nearest]
        assert [float(cell) for cell in found[1::2]] == pytest.approx(similar, abs=1e-6)


@pytest.mark.parametrize(
    ("samples", "size", "message"), [(3, 1, "3 images, 1 neighbour"), (1200, 2, "1,200 images, 2 neighbours")]
)
def test_the_log_counts_images_and_neighbours(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    samples: int,
    size: int,
    message: str,
) -> None:
    monkeypatch.setattr(logging.getLogger("and"), "propagate", True)
    caplog.set_level(logging.INFO, "and")
    path = tmp_path / "out.csv"
    written(path, oracles.rows("random", samples, 4, 0), size, [NEVER] * samples, dummies(samples))
    assert caplog.messages == [f"neighbourhoods: {path} ({message} each; {path.stat().st_size:,} bytes)"]


def test_file_and_class_names_of_any_script_are_shown(tmp_path: Path) -> None:
    labels = np.array([2, 0, 1, 1, 0, 2, 2, 0, 1])
    classes = ("=cmd", "b,é", 'c"\n')
    train = dummies(9, names=ODD, labels=labels, classes=classes)
    memory = oracles.rows("random", 9, 4, seed=1)
    header, *lines = written(tmp_path / "out.csv", memory, 2, [NEVER] * 9, train)
    assert header[:5] == ["index", "file", "class", "entropy", "round"]
    escaped = {"=1+1.png": "'=1+1.png", "=cmd": "'=cmd"}  # no formulas to a spreadsheet
    assert [line[1] for line in lines] == [escaped.get(name, name.replace("\udcff", "\\udcff")) for name in ODD]
    assert [line[2] for line in lines] == [escaped.get(classes[label], classes[label]) for label in labels]
    assert all(len(line) == len(header) for line in lines)


def test_csv_follows_rfc_4180(tmp_path: Path) -> None:
    memory = np.array([[1.0, 0.0], [0.0, 1.0], [0.6, -0.8]])
    written(tmp_path / "out.csv", memory, 2, [1, 0, NEVER], dummies(3, names=["a", "b", 'c"']))
    first, *lines = (tmp_path / "out.csv").read_bytes().split(b"\r\n")
    assert first.startswith(b'"index","file","entropy"') and lines.pop() == b""
    assert lines[0].startswith(b'0,"a",') and lines[0].endswith(b",1,2,0.6,1,0.0")
    assert lines[1].startswith(b'1,"b",') and lines[1].endswith(b",0,0,0.0,2,-0.8")
    assert lines[2].startswith(b'2,"c""",') and lines[2].endswith(b',"",0,0.6,1,-0.8')


@pytest.mark.parametrize("kind", ["equal", "zero"])
def test_equal_and_zero_rows_have_neighbours(kind: str, tmp_path: Path) -> None:
    memory = oracles.rows("equal", 5, 3, seed=1) * (kind == "equal")
    _, *lines = written(tmp_path / "out.csv", memory, 9, [NEVER] * 5, dummies(5))
    for sample, (_, entropy, _, *found) in enumerate(lines):
        assert float(entropy) == pytest.approx(np.log(5), abs=1e-6)
        assert sorted([str(sample), *found[::2]]) == list("01234")
        assert {float(cell) for cell in found[1::2]} == {float(kind == "equal")}


def test_neighbours_equal_those_of_a_discovery(tmp_path: Path) -> None:
    """In float32, as in training."""
    memory = oracles.rows("duplicates", 40, 6, seed=1).astype(np.float32)
    _, *lines = written(tmp_path / "out.csv", memory, 1, [NEVER] * 40, dummies(40))
    found = discover(torch.from_numpy(memory), temperature=0.2, anchors=20, size=1)
    for anchor, near in zip(found.anchors.tolist(), found.neighbours[:, 0].tolist(), strict=True):
        assert int(lines[anchor][3]) == near


def test_failed_write_leaves_no_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(list[str]):
        def __getitem__(self, index: Any) -> Any:
            if index == 3:
                raise KeyboardInterrupt
            return super().__getitem__(index)

    memory = oracles.rows("random", 5, 3, seed=1)
    with pytest.raises(KeyboardInterrupt):
        written(tmp_path / "out.csv", memory, 1, [NEVER] * 5, dummies(5, names=Failing("abcde")))
    assert list(tmp_path.iterdir()) == []

    def full(descriptor: int) -> None:
        assert next(tmp_path.glob("out.csv.*.part")).stat().st_size > 100 and not (tmp_path / "out.csv").exists()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UsageError, match=r"out.csv: cannot be written: No space left on device; choose another path$"):
        written(tmp_path / "out.csv", memory, 1, [NEVER] * 5, dummies(5))
    assert list(tmp_path.iterdir()) == []


# Where it may go.


def test_check_accepts_a_valid_path_and_writes_nothing(tmp_path: Path) -> None:
    for name in ("out.csv", "OUT.CSV", "\udcff.csv"):
        retrieval.check(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("out.txt", r"--export-neighbourhoods .*out.txt: the file name must end in .csv$"),
        ("csv", r"must end in .csv$"),
        ("taken.csv", r"taken.csv: already exists; choose another name, or move the file away$"),
        ("link.csv", r"link.csv: already exists"),
        ("no/out.csv", r"the folder .*no does not exist; create it, or choose another folder$"),
        ("x" * 252 + ".csv", r"cannot be written: File name too long; choose another name$"),
        ("a\0b.csv", r"cannot be written: .*null"),
    ],
)
def test_invalid_path_is_refused_in_a_sentence(name: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "taken.csv").write_text("mine")
    (tmp_path / "link.csv").symlink_to("nowhere")
    with pytest.raises(UsageError, match=words):
        retrieval.check(tmp_path / name)
    assert (tmp_path / "taken.csv").read_text() == "mine"


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    memory = oracles.rows("random", 3, 3, seed=1)
    for name in ("out.csv", "out.png"):
        (tmp_path / name).write_text("mine")
    with pytest.raises(UsageError, match=r"out.csv: already exists"):
        written(tmp_path / "out.csv", memory, 1, [NEVER] * 3, dummies(3))
    with pytest.raises(UsageError, match=r"out.png: already exists"):
        retrieval.save_picture(tmp_path / "out.png", Image.new("RGB", (2, 2)))
    assert sorted(p.name for p in tmp_path.iterdir() if p.read_text() == "mine") == ["out.csv", "out.png"]


# The round of each anchor.


def found(anchors: list[int], samples: int) -> Neighbourhoods:
    others = [sample for sample in range(samples) if sample not in anchors]
    position = torch.tensor(oracles.positions(anchors, samples))
    near = torch.zeros(len(anchors), 1, dtype=torch.long)
    return Neighbourhoods(torch.tensor(anchors), torch.tensor(others), position, near, torch.zeros(samples))


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 1, 0, 2]])
def test_first_round_as_an_anchor_is_reported(order: list[int]) -> None:
    rounds = {0: [], 1: [4, 2], 2: [0, 2], 3: [1, 0, 4]}
    nothing = Neighbourhoods.none(6)
    given = [(round, found(rounds[round], 6) if rounds[round] else nothing) for round in order]
    assert became_anchor(iter(given), 6).tolist() == [2, 3, 1, NEVER, 1, NEVER]
    assert became_anchor([], 3).tolist() == [NEVER] * 3


def test_anchors_of_other_data_are_refused() -> None:
    with pytest.raises(UsageError, match=r"^round 2: its anchors are of 5 samples, not 6; choose the data .*$"):
        became_anchor([(1, found([1], 6)), (2, found([1], 5))], 6)


# Looking up.


@many
@given(st.integers(1, 9), st.integers(1, 12), st.integers(1, 15), seeds, st.integers(1, 60))
def test_most_similar_images_equal_the_oracle(queries: int, samples: int, k: int, seed: int, block: int) -> None:
    asked, memory = oracles.rows("random", queries, 4, seed), oracles.rows("random", samples, 4, seed + 1)
    with blocks_of(block):
        indices, similarities = query(torch.from_numpy(asked), torch.from_numpy(memory), k)
    assert indices.shape == similarities.shape == (queries, min(k, samples))
    for row in range(queries):
        values = [oracles.dot(asked[row], other) for other in memory]
        best = sorted(range(samples), key=lambda j: -values[j])[:k]
        assert indices[row].tolist() == best
        assert similarities[row].tolist() == pytest.approx([values[j] for j in best])


def test_results_need_no_gradient() -> None:
    embeddings = torch.eye(3, requires_grad=True)
    _, similarities = query(embeddings, torch.eye(3), 2)
    assert not similarities.requires_grad


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
    assert {len(line) for line in (header, rule, *lines)} == {len(rule)}  # columns stand under each other
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
    assert found[4][2] - found[0][2] > TILE + 40  # room for the lines of text


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
    assert abs((top + TILE / 2) - (top_of_it + high / 2)) <= 1  # in the middle


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
    assert width(longer) > TILE  # no room is wasted
    assert retrieval.shorten("0231.jpg", TILE) == "0231.jpg"
    assert retrieval.shorten(name, 1) == "…"


def test_letters_that_the_font_lacks_are_question_marks() -> None:
    lacking, marked = (
        drawn([flat(90)], [[0]], images_of([flat(0)], [name]), names=name[0]) for name in ("狗 é", "? é")
    )
    assert lacking.tobytes() == marked.tobytes()


def test_the_picture_is_written_as_png(tmp_path: Path) -> None:
    picture = drawn([flat(90)], [[0]], images_of([flat(0)]))
    retrieval.save_picture(tmp_path / "found.png", picture)
    with Image.open(tmp_path / "found.png") as read:
        assert read.format == "PNG" and read.mode == "RGB"
        assert read.tobytes() == picture.tobytes()
    assert [path.name for path in tmp_path.iterdir()] == ["found.png"]


def test_names_in_the_table_are_no_spreadsheet_formulas(tmp_path: Path) -> None:
    formulas = ["=1+1.png", "+a.png", "-a.png", "@a.png", "\ta.png", "\ra.png", "-inf", "+nan", "-1_0", "-5\n"]
    names = [*formulas, "a=b.png", "-5", "1e5", "+.5E-3", "inf", "ü日本", 'a,"b"', "line\nbreak"]
    bank = measure_rows(len(names))
    images = np.zeros((len(names), 2, 2, 3), np.uint8)
    train = images_of(images, names, np.arange(len(names)) % 2, ("=SUM(A1)", "plain"))
    path = tmp_path / "table.csv"
    rounds = torch.full((len(names),), retrieval.NEVER)
    retrieval.save_neighbourhoods(path, embeddings=bank, temperature=0.1, size=1, rounds=rounds, train=train)
    assert not path.read_bytes().startswith(b"\xef\xbb\xbf")
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    escaped = [row["file"] for row in rows]
    assert escaped == ["'" + name for name in formulas] + names[len(formulas) :]
    assert [row["class"] for row in rows[:2]] == ["'=SUM(A1)", "plain"]


def measure_rows(count: int) -> torch.Tensor:
    rows = torch.randn(count, 4, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.normalize(rows, dim=1)
