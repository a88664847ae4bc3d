"""STL-10 as its archive unpacks: uint8 planes in column-major order, labels from 1, most images unlabelled."""

from __future__ import annotations

import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torchvision.datasets as published
from test_cifar import md5
from test_download import serving

import datasets
import synthetic
from datasets import DataError, stl10


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    synthetic.stl10(tmp_path, images=4, unlabelled=6)
    synthetic.accept(monkeypatch, tmp_path)
    return tmp_path


def numbers(images: datasets.ImageSet | None) -> list[int]:
    assert images is not None
    return [synthetic.number_of(image) for image in images.images]


def test_all_training_images_are_used_without_labels(root: Path) -> None:
    splits = datasets.load("STL10", root)
    assert numbers(splits.train) == list(range(10))
    assert splits.train.labels is None and splits.train.classes == ()


def test_labelled_and_test_images_have_their_labels(root: Path) -> None:
    splits = datasets.load("stl10", root)
    assert splits.labelled is not None and splits.test is not None
    assert numbers(splits.labelled) == [0, 1, 2, 3] and numbers(splits.test) == [10, 11]
    assert splits.labelled.labels is not None and splits.labelled.labels.tolist() == [0, 1, 2, 3]
    assert splits.test.labels is not None and splits.test.labels.tolist() == [0, 1]
    assert splits.labelled.classes == splits.test.classes and splits.test.classes[8] == "ship"


def test_images_equal_those_of_torchvision(root: Path) -> None:
    splits = datasets.load("stl10", root)
    for found, split in ((splits.train, "train+unlabeled"), (splits.labelled, "train"), (splits.test, "test")):
        assert found is not None
        expected = published.STL10(str(root), split=split)
        assert len(found) == len(expected)
        for image, (picture, label) in zip(found.images, expected, strict=True):
            assert np.array_equal(image, np.asarray(picture))
            assert found.labels is not None or label == -1 or split == "train+unlabeled"


def test_images_read_on_access_equal_those_in_memory(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = datasets.load("stl10", root).train.images
    monkeypatch.setattr(stl10, "IN_MEMORY", 6 * 96 * 96 * 3)
    splits = datasets.load("stl10", root)
    found = pickle.loads(pickle.dumps(splits.train.images))
    assert isinstance(found, stl10.BinaryImages) and isinstance(expected, np.ndarray)
    assert len(found) == 10 and splits.train.held == 0
    assert all(np.array_equal(found[i], expected[i]) for i in (7, 0, 3, 4, 9, -1))
    with pytest.raises(IndexError):
        found[10]


@pytest.mark.parametrize("name", ["train_X.bin", "unlabeled_X.bin", "test_y.bin"])
@pytest.mark.parametrize("damage", ["missing", "altered"])
def test_damaged_files_are_refused(root: Path, name: str, damage: str) -> None:
    path = root / "stl10_binary" / name
    content = path.read_bytes()
    path.unlink()
    if damage == "altered":
        path.write_bytes(content[:-1] + b"\xff")
    with pytest.raises(DataError, match=r"stl10_binary: is incomplete; .*--download.*stl10_binary\.tar\.gz"):
        datasets.load("stl10", root)


def test_root_without_images_is_refused_with_the_download(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"stl10_binary: does not exist; use --download"):
        datasets.load("stl10", tmp_path)
    with pytest.raises(DataError, match=r"--data-root"):
        datasets.load("stl10", None)


def test_archive_is_fetched_and_unpacked(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as file:
        file.add(root / "stl10_binary", "stl10_binary")
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(published.STL10, "tgz_md5", md5(out.getvalue()))
    with serving(**{"stl10_binary.tar.gz": out.getvalue()}) as server:
        monkeypatch.setattr(published.STL10, "url", server.url + "stl10_binary.tar.gz")
        assert len(datasets.load("stl10", tmp_path / "new", download=True).train) == 10
