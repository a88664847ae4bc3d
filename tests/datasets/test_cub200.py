"""CUB-200-2011 as its archive unpacks, with whole images and cropped to the boxes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import datasets
import synthetic
from datasets import DataError, ImageSet, Splits, files
from datasets.images import ImageFiles, read_rgb

LISTS = ["images", "classes", "image_class_labels", "train_test_split", "bounding_boxes"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    synthetic.cub200(tmp_path / "birds")
    return tmp_path / "birds"


def home(root: Path) -> Path:
    return root / "CUB_200_2011"


def read(root: Path, **changes: Any) -> Splits:
    return datasets.load("cub200", root, **changes)


def refusal(root: Path, **changes: Any) -> str:
    with pytest.raises(DataError) as refused:
        read(root, **changes)
    text = str(refused.value)
    assert "\n" not in text and len(text) > 20
    return text


def edit(root: Path, name: str, change: Callable[[list[str]], list[str]]) -> None:
    path = home(root) / f"{name}.txt"
    path.write_text("".join(f"{line}\n" for line in change(path.read_text().splitlines())))


def check(splits: Splits, train: list[int], test: list[int]) -> None:
    """Checks the picture numbers of both splits, in order, and their labels and names."""
    for images, numbers in ((splits.train, train), (splits.test, test)):
        assert images is not None and images.labels is not None and images.names is not None
        assert [synthetic.number_of(image) for image in images.images] == numbers
        assert images.labels.tolist() == [(number - 1) // 4 for number in numbers] and images.labels.dtype == np.int64
        assert images.classes == synthetic.SPECIES[:3]
        for number, name in zip(numbers, images.names, strict=True):
            assert name.startswith(f"images/{synthetic.SPECIES[(number - 1) // 4]}/") and f"_{number:04d}_" in name


ODD, EVEN = list(range(1, 13, 2)), list(range(2, 13, 2))


def test_images_labels_and_splits_follow_the_lists(root: Path) -> None:
    splits = read(root)
    check(splits, ODD, EVEN)
    assert splits.notes == () and splits.skipped == ()


def test_root_may_be_the_unpacked_folder(root: Path) -> None:
    check(read(home(root)), ODD, EVEN)


def test_images_not_in_the_lists_are_ignored(root: Path) -> None:
    synthetic.save(home(root) / "images" / synthetic.SPECIES[0] / "more.jpg", 40)
    check(read(root), ODD, EVEN)


def test_lists_may_be_in_any_order(root: Path) -> None:
    edit(root, "image_class_labels", lambda lines: lines[::-1])
    edit(root, "train_test_split", lambda lines: lines[5:] + lines[:5])
    edit(root, "bounding_boxes", lambda lines: lines[::-1])
    check(read(root, boxes=True), ODD, EVEN)


@pytest.mark.parametrize("name", LISTS)
def test_whitespace_and_line_endings_are_ignored(name: str, root: Path) -> None:
    path = home(root) / f"{name}.txt"
    lines = path.read_text().splitlines()
    path.write_bytes("".join(f"{line} \t\r\n \r\n\r\n" for line in lines).encode())
    splits = read(root, boxes=True)
    check(splits, ODD, EVEN)
    assert splits.train.images[0].shape == (26, 20, 3)


@pytest.mark.parametrize("name", LISTS)
def test_missing_list_is_refused_with_its_name(name: str, root: Path) -> None:
    (home(root) / f"{name}.txt").unlink()
    text = refusal(root, boxes=True)
    assert f"{name}.txt" in text and "CUB_200_2011.tgz" in text


def test_box_list_is_not_needed_without_boxes(root: Path) -> None:
    (home(root) / "bounding_boxes.txt").unlink()
    check(read(root), ODD, EVEN)


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("content", [b"1\n2\n", b"\xff\xfe\x00\x01", b"1 a\nx\n"])
def test_invalid_list_is_refused_with_its_name(name: str, content: bytes, root: Path) -> None:
    (home(root) / f"{name}.txt").write_bytes(content)
    text = refusal(root, boxes=True)
    assert str(home(root) / f"{name}.txt") in text and "number value" in text and "again" in text


@pytest.mark.parametrize("name", ["image_class_labels", "train_test_split", "bounding_boxes"])
def test_list_without_an_image_is_refused_with_the_number(name: str, root: Path) -> None:
    edit(root, name, lambda lines: lines[:6] + lines[7:])
    text = refusal(root, boxes=True)
    assert str(home(root) / f"{name}.txt") in text and "image 7," in text


@pytest.mark.parametrize("value", ["2", "train", "-1"])
def test_image_of_neither_split_is_refused(value: str, root: Path) -> None:
    edit(root, "train_test_split", lambda lines: [*lines[:4], f"5 {value}", *lines[5:]])
    text = refusal(root)
    assert str(home(root) / "train_test_split.txt") in text and "image 5" in text


def test_class_missing_from_the_class_list_is_refused(root: Path) -> None:
    edit(root, "classes", lambda lines: lines[:2])
    text = refusal(root)
    assert "class 3" in text and "classes.txt" in text


def test_lines_about_unlisted_images_are_ignored(root: Path) -> None:
    for name, line in (("image_class_labels", "99 1"), ("train_test_split", "99 1"), ("bounding_boxes", "99 nothing")):
        edit(root, name, lambda lines, line=line: [*lines, line])
    check(read(root, boxes=True), ODD, EVEN)


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_empty_list_of_images_is_refused(content: str, root: Path) -> None:
    (home(root) / "images.txt").write_text(content)
    assert "images.txt names no image" in refusal(root)


def test_missing_listed_images_are_counted(root: Path) -> None:
    train = list(read(root).train.names or [])
    (home(root) / train[2]).unlink()
    shutil.rmtree((home(root) / train[4]).parent)
    text = refusal(root)
    assert train[2] in text and "3 files" in text and "images.txt" in text and "unpack" in text


def test_impossible_file_name_counts_as_missing(root: Path) -> None:
    edit(root, "images", lambda lines: ["1 001.a\0b/c\0d.jpg", *lines[1:]])
    assert "1 files" in refusal(root)


@pytest.mark.parametrize("inside", [".", "CUB_200_2011", "CUB_200_2011/images"])
def test_root_without_lists_is_refused_with_what_is_expected(inside: str, tmp_path: Path) -> None:
    (tmp_path / "none" / inside).mkdir(parents=True)
    text = refusal(tmp_path / "none")
    assert str(tmp_path / "none") in text and "images.txt" in text and "--download" in text


def test_unreadable_images_are_skipped_with_labels_and_boxes(root: Path) -> None:
    names = [(read(root).train.names or [])[1], ((read(root).test or read(root).train).names or [])[5]]
    (home(root) / names[0]).write_bytes(b"no image")
    (home(root) / names[1]).write_bytes((home(root) / names[1]).read_bytes()[:900])
    for boxes in (False, True):
        splits = read(root, boxes=boxes)
        check(splits, [1, 5, 7, 9, 11], [2, 4, 6, 8, 10])
        assert [name for name, _ in splits.skipped] == names
        assert [image.shape[:2] == (26, 20) for image in splits.train.images] == [boxes] * 5
        assert all(name in refusal(root, strict=True, boxes=boxes) for name in names)


def crop_of(root: Path, box: synthetic.Box, number: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """The whole image on disk, and the loaded crop if its box is ``box``."""
    synthetic.cub200(root, boxes={number: box})
    train = read(root, boxes=True).train
    (place,) = (i for i, name in enumerate(train.names or []) if f"_{number:04d}_" in name)
    return read_rgb(home(root) / (train.names or [])[place]), train.images[place]


@pytest.mark.parametrize(
    ("box", "rows", "columns"),
    [
        ((10.0, 20.0, 30.0, 25.0), (20, 45), (10, 40)),
        ((0.0, 0.0, 61.0, 73.0), (0, 73), (0, 61)),
        ((10.9, 20.1, 30.0, 25.0), (20, 46), (10, 41)),
        ((10.5, 20.5, 0.2, 0.2), (20, 21), (10, 11)),
        ((60.0, 72.0, 1.0, 1.0), (72, 73), (60, 61)),
        ((-5.0, -3.5, 20.0, 10.0), (0, 7), (0, 15)),
        ((50.0, 60.0, 500.0, 500.0), (60, 73), (50, 61)),
        ((-1e15, -1e15, 2e15, 2e15), (0, 73), (0, 61)),
    ],
)
def test_box_is_rounded_outwards_and_clipped_to_the_image(
    box: synthetic.Box, rows: tuple[int, int], columns: tuple[int, int], root: Path
) -> None:
    whole, part = crop_of(root, box)
    assert whole.shape == (73, 61, 3)
    assert np.array_equal(part, whole[slice(*rows), slice(*columns)])


@pytest.mark.parametrize(
    "box", [(61, 0, 10, 10), (0, 73, 10, 10), (-20, 0, 20, 10), (5, 5, 0, 10), (5, 5, 10, 0), (9, 9, -5, 5)]
)
def test_box_without_pixels_is_refused_with_image_name(box: synthetic.Box, root: Path) -> None:
    synthetic.cub200(root, boxes={3: box})
    text = refusal(root, boxes=True)
    assert "Black_Footed_Albatross_0003_21.jpg" in text and "61 x 73" in text and "--bounding-boxes" in text
    check(read(root), ODD, EVEN)


@pytest.mark.parametrize("line", ["1 2 3", "1 2 3 4 5", "a b c d", "nan 1 2 3", "1 inf 2 3", "1 2 1e300 3"])
def test_invalid_box_line_is_refused(line: str, root: Path) -> None:
    edit(root, "bounding_boxes", lambda lines: [*lines[:3], f"4 {line}", *lines[4:]])
    text = refusal(root, boxes=True)
    assert str(home(root) / "bounding_boxes.txt") in text and repr(line) in text


def test_crops_from_memory_and_from_files_are_equal(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = read(root, boxes=True)
    monkeypatch.setattr(files, "IN_MEMORY", 0)
    large = read(root, boxes=True)

    def pixels(images: ImageSet | None) -> list[bytes]:
        assert images is not None
        return [image.tobytes() for image in images.images]

    assert isinstance(large.train.images, ImageFiles) and not isinstance(small.train.images, ImageFiles)
    assert pixels(large.train) == pixels(small.train) and pixels(large.test) == pixels(small.test)


def test_boxes_are_refused_for_a_data_set_without_boxes(tmp_path: Path) -> None:
    for name in ("imagenet", "folder", "svhn", "cifar10", "digits"):
        with pytest.raises(DataError, match=r"--bounding-boxes: .* has none.*cub200, dogs"):
            datasets.load(name, tmp_path, boxes=True)
