"""The built-in digits, compared with the publishers' description."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import datasets

CLASS_COUNTS = [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
"""Number of images of each digit in the test part of the UCI data."""

FIRST = """\
0 0 5 13 9 1 0 0
0 0 13 15 10 15 5 0
0 3 15 2 0 11 8 0
0 4 12 0 0 8 8 0
0 5 8 0 0 9 8 0
0 4 11 0 1 12 7 0
0 2 14 5 10 12 0 0
0 0 6 13 10 0 0 0"""
"""The first test image of the UCI data, a zero, in grey values from 0 to 16."""


@pytest.fixture(scope="module")
def splits() -> datasets.Splits:
    return datasets.load("digits", None)


def both(splits: datasets.Splits) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    train, test = splits.train, splits.test
    assert test is not None and train.labels is not None and test.labels is not None
    return np.asarray(train.images), train.labels, np.asarray(test.images), test.labels


def test_there_are_1437_training_and_360_test_images_of_8_by_8(splits: datasets.Splits) -> None:
    train, labels, test, test_labels = both(splits)
    assert train.shape == (1437, 8, 8, 3) and test.shape == (360, 8, 8, 3)
    assert labels.shape == (1437,) and test_labels.shape == (360,)
    assert train.dtype == test.dtype == np.uint8 and labels.dtype == test_labels.dtype == np.int64
    assert (len(splits.train), splits.train.classes) == (1437, tuple("0123456789"))


def test_no_image_is_in_both_parts(splits: datasets.Splits) -> None:
    train, _, test, _ = both(splits)
    assert len({image.tobytes() for image in (*train, *test)}) == 1797


def test_every_class_has_its_published_number_of_images(splits: datasets.Splits) -> None:
    _, labels, _, test_labels = both(splits)
    assert np.bincount(np.concatenate([labels, test_labels])).tolist() == CLASS_COUNTS


def test_split_is_stratified_up_to_one_image(splits: datasets.Splits) -> None:
    _, _, _, test_labels = both(splits)
    for count, of_class in zip(np.bincount(test_labels), CLASS_COUNTS, strict=True):
        assert abs(count - of_class * 360 / 1797) <= 1


def test_grey_values_are_scaled_to_0_255(splits: datasets.Splits) -> None:
    train, _, test, _ = both(splits)
    values = np.unique(np.concatenate([train.ravel(), test.ravel()]))
    assert values.tolist() == [round(level * 255 / 16) for level in range(17)]
    for images in (train, test):
        assert (images == images[..., :1]).all()


def test_first_published_image_is_present_and_labelled_zero(splits: datasets.Splits) -> None:
    first = np.array([[round(int(level) * 255 / 16) for level in row.split()] for row in FIRST.splitlines()])
    train, labels, test, test_labels = both(splits)
    pairs = zip((*train, *test), (*labels, *test_labels), strict=True)
    found = [label for image, label in pairs if (image[..., 0] == first).all()]
    assert found == [0]


def test_normalisation_is_that_of_the_training_images(splits: datasets.Splits) -> None:
    train, *_ = both(splits)
    source = datasets.DATASETS["digits"]
    for channel in range(3):
        shares = train[..., channel].astype(np.float64) / 255
        assert source.means[channel] == pytest.approx(shares.mean(), abs=1e-4)
        assert source.stds[channel] == pytest.approx(shares.std(), abs=1e-4)


def test_digits_are_the_same_every_time_and_need_no_root(tmp_path: Path) -> None:
    one, other = datasets.load("digits", None), datasets.load("DIGITS", tmp_path / "none", strict=True)
    assert np.array_equal(one.train.images, other.train.images)
    assert one.notes == one.skipped == ()
