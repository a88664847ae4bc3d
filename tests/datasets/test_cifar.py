"""CIFAR as it is published: pickles of Python 2, with one row of 3 x 32 x 32 values for each image."""

from __future__ import annotations

import hashlib
import io
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torchvision.datasets.cifar as published
from test_download import Source, serving

import datasets
from datasets import DataError
from datasets.download import LOCK

BATCHES = [f"data_batch_{number}" for number in range(1, 6)]


def python2_pickle(value: Any) -> bytes:
    """Pickles with protocol 2 as cPickle of Python 2 did, including byte strings and NumPy arrays."""
    out = io.BytesIO()
    out.write(b"\x80\x02")

    def text(value: bytes) -> None:
        out.write(b"U" + bytes([len(value)]) if len(value) < 256 else b"T" + len(value).to_bytes(4, "little"))
        out.write(value)

    def write(value: Any) -> None:
        if isinstance(value, bytes):
            text(value)
        elif isinstance(value, int):
            out.write(b"J" + value.to_bytes(4, "little", signed=True))
        elif isinstance(value, list):
            out.write(b"](")
            for entry in value:
                write(entry)
            out.write(b"e")
        elif isinstance(value, dict):
            out.write(b"}(")
            for key, entry in value.items():
                write(key)
                write(entry)
            out.write(b"u")
        else:
            assert isinstance(value, np.ndarray) and value.dtype == np.uint8
            out.write(b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n")
            write(0)
            out.write(b"\x85")
            text(b"b")
            out.write(b"tR(")
            write(1)
            write(value.shape[0])
            write(value.shape[1])
            out.write(b"\x86cnumpy\ndtype\n(")
            text(b"u1")
            write(0)
            write(1)
            out.write(b"tR(")
            write(3)
            text(b"|")
            out.write(b"NNN")
            write(-1)
            write(-1)
            write(0)
            out.write(b"tb\x89")
            text(value.tobytes())
            out.write(b"tb")

    write(value)
    out.write(b".")
    return out.getvalue()


def rows(first: int, count: int) -> np.ndarray:
    """Numbered images: red is the number, green the row of a pixel, blue its column."""
    image = np.zeros((count, 3, 32, 32), np.uint8)
    image[:, 0] = np.arange(first, first + count)[:, None, None]
    image[:, 1] = np.arange(32)[:, None]
    image[:, 2] = np.arange(32)
    return image.reshape(count, 3072)


@pytest.fixture
def any_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accepts every existing file: synthetic files do not have the published MD5 sums."""
    monkeypatch.setattr(published, "check_integrity", lambda path, md5=None: Path(path).is_file())


@pytest.fixture
def cifar10(tmp_path: Path, any_sum: None) -> Path:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for number, name in enumerate([*BATCHES, "test_batch"]):
        content = {
            b"batch_label": b"batch",
            b"labels": [(2 * number + i) % 10 for i in range(2)],
            b"data": rows(2 * number, 2),
            b"filenames": [b"a.png", b"b.png"],
        }
        (folder / name).write_bytes(python2_pickle(content))
    names = b"airplane automobile bird cat deer dog frog horse ship truck".split()
    (folder / "batches.meta").write_bytes(python2_pickle({b"label_names": names, b"num_vis": 3072}))
    return tmp_path


@pytest.fixture
def cifar100(tmp_path: Path, any_sum: None) -> Path:
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for name, first, count in (("train", 0, 4), ("test", 4, 2)):
        content = {
            b"filenames": [b"x.png"] * count,
            b"batch_label": b"batch",
            b"fine_labels": [99 - first - i for i in range(count)],
            b"coarse_labels": [0] * count,
            b"data": rows(first, count),
        }
        (folder / name).write_bytes(python2_pickle(content))
    meta = {b"fine_label_names": [b"fine%d" % i for i in range(100)], b"coarse_label_names": [b"coarse"] * 20}
    (folder / "meta").write_bytes(python2_pickle(meta))
    return tmp_path


def check(images: datasets.ImageSet | None, numbers: list[int], labels: list[int]) -> None:
    assert images is not None and images.labels is not None
    assert len(images) == len(numbers) and images.labels.dtype == np.int64
    assert images.labels.tolist() == labels
    for image, number in zip(images.images, numbers, strict=True):
        assert image.shape == (32, 32, 3) and image.dtype == np.uint8
        assert (image[..., 0] == number).all()
        assert (image[..., 1] == np.arange(32)[:, None]).all()
        assert (image[..., 2] == np.arange(32)).all()


def test_cifar10_joins_its_five_batches_in_order(cifar10: Path) -> None:
    splits = datasets.load("CIFAR10", cifar10)
    check(splits.train, list(range(10)), list(range(10)))
    check(splits.test, [10, 11], [0, 1])
    assert splits.train.classes[:2] == ("airplane", "automobile") and len(splits.train.classes) == 10
    assert splits.skipped == ()


def test_cifar100_has_the_fine_labels(cifar100: Path) -> None:
    splits = datasets.load("cifar100", cifar100)
    check(splits.train, [0, 1, 2, 3], [99, 98, 97, 96])
    check(splits.test, [4, 5], [95, 94])
    assert splits.train.classes == tuple(f"fine{number}" for number in range(100))


FOLDERS = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}


@pytest.mark.parametrize("name", FOLDERS)
def test_missing_files_are_named_with_their_source(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for root in (tmp_path, tmp_path / "none", tmp_path / "file"):
        with pytest.raises(DataError) as refused:
            datasets.load(name, root)
        text = str(refused.value)
        assert str(root) in text and FOLDERS[name] in text and "\n" not in text
        assert f"cifar-{name.removeprefix('cifar')}-python.tar.gz" in text
        assert "https://www.cs.toronto.edu/~kriz/cifar.html" in text and "--data-root" in text


@pytest.mark.parametrize("name", FOLDERS)
def test_missing_root_is_refused_with_the_option(name: str) -> None:
    with pytest.raises(DataError, match=f"--data-root.*{FOLDERS[name]}"):
        datasets.load(name, None)


@pytest.mark.parametrize("missing", [*BATCHES, "test_batch", "batches.meta"])
def test_missing_file_is_refused(missing: str, cifar10: Path) -> None:
    (cifar10 / "cifar-10-batches-py" / missing).unlink()
    with pytest.raises(DataError, match="is incomplete"):
        datasets.load("cifar10", cifar10)


def test_files_with_a_wrong_checksum_are_refused(cifar10: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with pytest.raises(DataError, match="is incomplete"):
        datasets.load("cifar10", cifar10)


@pytest.mark.parametrize(
    ("name", "means", "stds"),
    [
        ("cifar10", (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
        ("cifar100", (0.5071, 0.4866, 0.4409), (0.2009, 0.1984, 0.2023)),
    ],
)
def test_normalisation_uses_published_means_and_deviations(
    name: str, means: tuple[float, ...], stds: tuple[float, ...]
) -> None:
    source = datasets.DATASETS[name]
    assert (source.means, source.stds) == (means, stds)


@pytest.fixture(params=FOLDERS)
def fetched(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Source]]:
    """A data set and a local server of its synthetic archive. Nothing is unpacked yet."""
    name: str = request.param
    root: Path = request.getfixturevalue(name)
    monkeypatch.undo()  # MD5 sums are checked again
    monkeypatch.setenv("no_proxy", "*")
    folder = root / FOLDERS[name]
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as file:
        file.add(folder, folder.name)
    archive = f"cifar-{name.removeprefix('cifar')}-python.tar.gz"
    source = getattr(published, name.upper())
    for part in ("train_list", "test_list"):
        files = [[file, md5((folder / file).read_bytes())] for file, _ in getattr(source, part)]
        monkeypatch.setattr(source, part, files)
    monkeypatch.setattr(source, "meta", source.meta | {"md5": md5((folder / source.meta["filename"]).read_bytes())})
    monkeypatch.setattr(source, "tgz_md5", md5(out.getvalue()))
    shutil.rmtree(folder)
    with serving(**{archive: out.getvalue()}) as server:
        monkeypatch.setattr(source, "url", server.url + archive)
        yield name, server


def md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


EXPECTED: dict[str, Any] = {
    "cifar10": [(list(range(10)), list(range(10))), ([10, 11], [0, 1])],
    "cifar100": [([0, 1, 2, 3], [99, 98, 97, 96]), ([4, 5], [95, 94])],
}


def test_archive_is_downloaded_once_unpacked_and_read(fetched: tuple[str, Source], tmp_path: Path) -> None:
    name, source = fetched
    for _ in range(2):
        splits = datasets.load(name, tmp_path, download=True)
        check(splits.train, *EXPECTED[name][0])
        check(splits.test, *EXPECTED[name][1])
    check(datasets.load(name, tmp_path).train, *EXPECTED[name][0])
    assert source.asked == [(next(iter(source.files)), None)]
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != LOCK) == sorted(
        [FOLDERS[name], *source.files]
    )


def test_archive_copied_by_hand_is_unpacked_without_network(fetched: tuple[str, Source], tmp_path: Path) -> None:
    name, source = fetched
    for archive, content in source.files.items():
        (tmp_path / archive).write_bytes(content)
    check(datasets.load(name, tmp_path, download=True).train, *EXPECTED[name][0])
    assert source.asked == []


def test_truncated_archive_is_refused_with_its_name(fetched: tuple[str, Source], tmp_path: Path) -> None:
    name, source = fetched
    ((archive, content),) = source.files.items()
    (tmp_path / archive).write_bytes(content[:-1])
    with pytest.raises(DataError) as refused:
        datasets.load(name, tmp_path, download=True)
    assert str(refused.value).startswith(f"{tmp_path / archive}: is incomplete or altered")
    assert (tmp_path / archive).read_bytes() == content[:-1] and {path.name for path in tmp_path.iterdir()} <= {
        archive,
        LOCK,
    }


def test_incomplete_folder_is_refused_without_a_download(fetched: tuple[str, Source], tmp_path: Path) -> None:
    name, source = fetched
    (tmp_path / FOLDERS[name]).mkdir()
    with pytest.raises(DataError, match="is incomplete; move it away"):
        datasets.load(name, tmp_path, download=True)
    assert source.asked == [] and list(tmp_path.iterdir()) == [tmp_path / FOLDERS[name]]


@pytest.mark.parametrize("name", FOLDERS)
def test_download_without_root_is_refused_with_the_option(name: str) -> None:
    with pytest.raises(DataError, match="--data-root"):
        datasets.load(name, None, download=True)
