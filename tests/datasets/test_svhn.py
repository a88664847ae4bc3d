"""SVHN as it is published: MATLAB files with X (32, 32, 3, N) and y (N, 1), where 10 means the digit 0."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from test_download import Source, serving
from torchvision.datasets import SVHN

import datasets
from datasets import DataError

FILES = {"train": "train_32x32.mat", "test": "test_32x32.mat"}
DIGITS = {"train": [1, 10, 9, 3, 10], "test": [10, 2]}
PAGE = "http://ufldl.stanford.edu/housenumbers/"


def put(root: Path, part: str, first: int) -> None:
    """Numbered images: red is the number, green the row of a pixel, blue its column."""
    digits = DIGITS[part]
    images = np.zeros((32, 32, 3, len(digits)), np.uint8)
    images[:, :, 0] = np.arange(first, first + len(digits))
    images[:, :, 1] = np.arange(32)[:, None, None]
    images[:, :, 2] = np.arange(32)[:, None]
    labels = np.array(digits, np.uint8)[:, None]
    scipy.io.savemat(root / FILES[part], {"X": images, "y": labels}, do_compression=True)


@pytest.fixture
def svhn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Synthetic files, with their MD5 sums in place of the published ones."""
    root = tmp_path / "data"
    root.mkdir()
    for first, (part, name) in enumerate(FILES.items()):
        put(root, part, 100 * first)
        digits = hashlib.md5((root / name).read_bytes(), usedforsecurity=False).hexdigest()
        monkeypatch.setitem(SVHN.split_list, part, [f"{PAGE}{name}", name, digits])
    return root


@pytest.fixture
def source(svhn: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Source]:
    """A local server of the synthetic files."""
    monkeypatch.setenv("no_proxy", "*")
    with serving(**{name: (svhn / name).read_bytes() for name in FILES.values()}) as source:
        for part, (_, name, digits) in [(part, SVHN.split_list[part]) for part in FILES]:
            monkeypatch.setitem(SVHN.split_list, part, [source.url + name, name, digits])
        yield source


def check(images: datasets.ImageSet | None, first: int, labels: list[int]) -> None:
    assert images is not None and images.labels is not None
    assert images.labels.dtype == np.int64 and images.labels.tolist() == labels
    assert images.classes == tuple("0123456789") and images.names is None
    pixels = images.images
    assert isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8 and pixels.flags.c_contiguous
    assert pixels.shape == (len(labels), 32, 32, 3)
    assert (pixels[..., 0] == np.arange(first, first + len(labels))[:, None, None]).all()
    assert (pixels[..., 1] == np.arange(32)[:, None]).all()
    assert (pixels[..., 2] == np.arange(32)).all()


def refusal(root: Path | None, *, download: bool = False) -> str:
    with pytest.raises(DataError) as refused:
        datasets.load("svhn", root, download=download)
    text = str(refused.value)
    assert "\n" not in text
    return text


def test_images_are_upright_and_ten_is_zero(svhn: Path) -> None:
    splits = datasets.load("SVHN", svhn)
    check(splits.train, 0, [1, 0, 9, 3, 0])
    check(splits.test, 100, [0, 2])
    assert splits.notes == () and splits.skipped == ()


@pytest.mark.parametrize("name", FILES.values())
@pytest.mark.parametrize("damage", ["missing", "short", "altered", "empty"])
def test_missing_or_damaged_files_are_refused(damage: str, name: str, svhn: Path) -> None:
    path = svhn / name
    content = path.read_bytes()
    damaged = {"short": content[:-1], "altered": content[:150] + b"?" + content[151:], "empty": b""}
    path.unlink()
    if damage in damaged:
        path.write_bytes(damaged[damage])
    text = refusal(svhn)
    assert text.startswith(f"{svhn}: ") and "--download" in text and PAGE in text
    assert all(file in text for file in FILES.values())
    assert damage == "missing" or path.read_bytes() == damaged[damage]


def test_missing_root_is_refused_with_the_expected_files(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "none", tmp_path / "file"):
        text = refusal(root)
        assert str(root) in text and "--data-root" in text and PAGE in text
        assert all(file in text for file in FILES.values())


@pytest.mark.parametrize("download", [False, True])
def test_unset_root_is_refused_with_the_option(download: bool) -> None:
    assert "--data-root" in refusal(None, download=download)


def test_published_addresses_and_checksums_are_used() -> None:
    assert SVHN.split_list["train"] == [PAGE + FILES["train"], FILES["train"], "e26dedcc434d2e4c54c9b2d4a06d8373"]
    assert SVHN.split_list["test"] == [PAGE + FILES["test"], FILES["test"], "eb5a983be6a315427106f1b164d9cef3"]


def test_both_files_are_fetched_once(source: Source, tmp_path: Path) -> None:
    for _ in range(2):
        splits = datasets.load("svhn", tmp_path / "new", download=True)
        check(splits.train, 0, [1, 0, 9, 3, 0])
        check(splits.test, 100, [0, 2])
    assert source.asked == [(name, None) for name in FILES.values()]


def test_only_the_missing_file_is_fetched(source: Source, svhn: Path) -> None:
    (svhn / FILES["test"]).unlink()
    check(datasets.load("svhn", svhn, download=True).test, 100, [0, 2])
    assert source.asked == [(FILES["test"], None)]


def test_damaged_file_is_named_and_not_overwritten(source: Source, svhn: Path) -> None:
    (svhn / FILES["test"]).write_bytes(b"half")
    assert refusal(svhn, download=True).startswith(f"{svhn / FILES['test']}: ")
    assert (svhn / FILES["test"]).read_bytes() == b"half" and source.asked == []
