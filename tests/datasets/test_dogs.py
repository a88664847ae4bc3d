"""Stanford Dogs as its archives unpack, with whole images and cropped to the boxes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io

import datasets
import synthetic
from datasets import DataError, Splits
from datasets.images import read_rgb


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    synthetic.dogs(tmp_path / "dogs")
    return tmp_path / "dogs"


def read(root: Path, **changes: Any) -> Splits:
    return datasets.load("dogs", root, **changes)


def refusal(root: Path, **changes: Any) -> str:
    with pytest.raises(DataError) as refused:
        read(root, **changes)
    text = str(refused.value)
    assert "\n" not in text and len(text) > 20
    return text


CLASSES = ("Chihuahua", "Japanese_spaniel", "Maltese_dog")
ODD, EVEN = list(range(1, 13, 2)), list(range(2, 13, 2))
THIRD = "n02085620-Chihuahua/n02085620_10076"


def check(splits: Splits, train: list[int], test: list[int]) -> None:
    """Checks the picture numbers of both splits, in order, and their labels and names."""
    for images, numbers in ((splits.train, train), (splits.test, test)):
        assert images is not None and images.labels is not None and images.names is not None
        assert [synthetic.number_of(image) for image in images.images] == numbers
        assert images.labels.tolist() == [(number - 1) // 4 for number in numbers] and images.labels.dtype == np.int64
        assert images.classes == CLASSES
        for number, name in zip(numbers, images.names, strict=True):
            assert name.startswith(f"Images/{synthetic.BREEDS[(number - 1) // 4]}/")
            assert name.endswith(f"_{10073 + number}.jpg")


def test_images_labels_and_splits_follow_the_lists(root: Path) -> None:
    splits = read(root)
    check(splits, ODD, EVEN)
    assert splits.notes == () and splits.skipped == ()


def test_lists_may_be_in_the_root(root: Path) -> None:
    for path in (root / "lists").iterdir():
        path.rename(root / path.name)
    check(read(root), ODD, EVEN)


def test_annotations_are_not_needed_without_boxes(root: Path) -> None:
    (root / "Annotation").rename(root / "elsewhere")
    check(read(root), ODD, EVEN)


def test_list_of_one_image_is_read(root: Path) -> None:
    synthetic.dogs_list(root / "lists" / "test_list.mat", [f"{THIRD}.jpg"], [1])
    check(read(root), ODD, [3])


def test_class_names_with_hyphens_follow_their_labels(root: Path) -> None:
    names = ["n02098105-soft-coated_wheaten_terrier/n02098105_1.jpg", "n02085620-Chihuahua/n02085620_10074.jpg"]
    synthetic.save(root / "Images" / names[0], 30)
    for name in ("train_list", "test_list"):
        synthetic.dogs_list(root / "lists" / f"{name}.mat", names, [7, 120])
    train = read(root).train
    assert train.classes == ("soft-coated_wheaten_terrier", "Chihuahua")
    assert train.labels is not None and train.labels.tolist() == [0, 1]
    assert [synthetic.number_of(image) for image in train.images] == [30, 1]


def test_label_of_two_breeds_is_refused(root: Path) -> None:
    names = [f"{synthetic.BREEDS[1]}/n02085782_10078.jpg", f"{synthetic.BREEDS[2]}/n02085936_10082.jpg"]
    synthetic.dogs_list(root / "lists" / "test_list.mat", names, [2, 2])
    text = refusal(root)
    assert "class 2" in text and "Japanese_spaniel" in text and "Maltese_dog" in text


@pytest.mark.parametrize("name", ["train_list.mat", "test_list.mat"])
@pytest.mark.parametrize("eighths", [0, 1, 4, 7])
def test_truncated_list_is_refused_with_its_name(name: str, eighths: int, root: Path) -> None:
    path = root / "lists" / name
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * eighths // 8])
    text = refusal(root)
    assert str(path) in text and "lists.tar" in text


def test_missing_test_list_is_refused_with_its_name(root: Path) -> None:
    (root / "lists" / "test_list.mat").unlink()
    assert str(root / "lists" / "test_list.mat") in refusal(root)


def test_list_that_does_not_match_its_labels_is_refused(root: Path) -> None:
    path = root / "lists" / "train_list.mat"
    synthetic.dogs_list(path, [f"{THIRD}.jpg"] * 3, [1, 1])
    assert "3 files and 2 labels" in refusal(root)
    scipy.io.savemat(path, {"X": np.zeros(3)})
    assert str(path) in refusal(root)


def test_missing_listed_images_are_counted(root: Path) -> None:
    train = list(read(root).train.names or [])
    (root / train[1]).unlink()
    (root / train[3]).unlink()
    text = refusal(root)
    assert train[1] in text and "2 files" in text and "train_list.mat" in text and "images.tar" in text


@pytest.mark.parametrize("missing", ["Images", "lists"])
def test_root_without_images_or_lists_is_refused(missing: str, root: Path) -> None:
    (root / missing).rename(root / "elsewhere")
    text = refusal(root)
    assert str(root) in text and "Images/<breed>/*.jpg" in text and "train_list.mat" in text and "--download" in text


def test_unreadable_images_are_skipped_with_their_labels(root: Path) -> None:
    path = root / "Images" / f"{THIRD}.jpg"
    path.write_bytes(path.read_bytes()[:500])
    splits = read(root, boxes=True)
    check(splits, [1, 5, 7, 9, 11], EVEN)
    assert [name for name, _ in splits.skipped] == [f"Images/{THIRD}.jpg"]
    assert f"Images/{THIRD}.jpg" in refusal(root, strict=True)


def crop_of(root: Path, boxes: list[tuple[int, int, int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """The third image, whole on disk, and the loaded crop if its dogs have these boxes."""
    synthetic.annotate(root, THIRD, boxes)
    train = read(root, boxes=True).train
    assert (train.names or [])[1] == f"Images/{THIRD}.jpg"
    return read_rgb(root / "Images" / f"{THIRD}.jpg"), train.images[1]


@pytest.mark.parametrize(
    ("boxes", "rows", "columns"),
    [
        ([(1, 1, 61, 73)], (0, 73), (0, 61)),
        ([(11, 21, 40, 45)], (20, 45), (10, 40)),
        ([(7, 9, 7, 9)], (8, 9), (6, 7)),
        ([(11, 21, 40, 45), (5, 30, 20, 60)], (20, 60), (4, 40)),
        ([(30, 3, 33, 9), (5, 30, 20, 60), (50, 40, 55, 44)], (2, 60), (4, 55)),
        ([(0, 0, 10, 10)], (0, 10), (0, 10)),
        ([(50, 60, 90, 99)], (59, 73), (49, 61)),
    ],
)
def test_box_coordinates_start_at_one_and_include_corners(
    boxes: list[tuple[int, int, int, int]], rows: tuple[int, int], columns: tuple[int, int], root: Path
) -> None:
    whole, part = crop_of(root, boxes)
    assert whole.shape == (73, 61, 3)
    assert np.array_equal(part, whole[slice(*rows), slice(*columns)])


def test_every_image_is_cropped_to_its_own_box(tmp_path: Path) -> None:
    boxes = {i: [(i, 2 * i, i + 9 + i, 2 * i + 9)] for i in range(1, 13)}
    synthetic.dogs(tmp_path, boxes=boxes)
    splits = read(tmp_path, boxes=True)
    check(splits, ODD, EVEN)
    for images in (splits.train, splits.test):
        assert images is not None
        for name, part in zip(images.names or [], images.images, strict=True):
            ((left, top, right, bottom),) = boxes[int(name[-9:-4]) - 10073]
            assert np.array_equal(part, read_rgb(tmp_path / name)[top - 1 : bottom, left - 1 : right])


def test_box_outside_its_image_is_refused_with_the_image_name(root: Path) -> None:
    synthetic.annotate(root, THIRD, [(62, 1, 70, 10)])
    text = refusal(root, boxes=True)
    assert f"{THIRD}.jpg" in text and "61 x 73" in text and "--bounding-boxes" in text


NO_BOX = "it holds no box"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", NO_BOX),
        ("<annotation><object><bndbox><xmin>3</xmin>", NO_BOX),
        ("<annotation></annotation>", NO_BOX),
        ("<annotation><object><bndbox><xmin>3</xmin></bndbox></object></annotation>", NO_BOX),
        ("no XML", NO_BOX),
        ("\x00\x01", NO_BOX),
        (None, "No such file"),
    ],
)
def test_unreadable_annotation_is_refused_with_its_path(content: str | None, reason: str, root: Path) -> None:
    path = root / "Annotation" / THIRD
    path.unlink() if content is None else path.write_text(content)
    text = refusal(root, boxes=True)
    assert str(path) in text and reason in text and "annotation.tar" in text
    check(read(root), ODD, EVEN)


@pytest.mark.parametrize("value", ["", "x", "1.5e", "nan", "9" * 30])
def test_invalid_box_coordinate_is_refused(value: str, root: Path) -> None:
    path = root / "Annotation" / THIRD
    path.write_text(path.read_text().replace("<xmax>25</xmax>", f"<xmax>{value}</xmax>"))
    assert str(path) in refusal(root, boxes=True)


def test_annotation_with_expanding_entities_is_refused(root: Path) -> None:
    levels = "".join(f'<!ENTITY e{n} "{f"&e{n - 1};" * 10}">' for n in range(1, 12))
    bomb = f'<!DOCTYPE a [<!ENTITY e0 "1234567890">{levels}]><annotation>&e11;</annotation>'
    (root / "Annotation" / THIRD).write_text(bomb)
    assert THIRD in refusal(root, boxes=True)  # expanded: 10 ** 12 characters
