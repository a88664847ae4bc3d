"""Folders of images: layouts, skipped files, and what is refused."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile, features

import datasets
from datasets import DataError, ImageSet, Splits, files, images
from datasets.images import ImageFiles


def put(root: Path, *names: str, shade: int = 100) -> None:
    """Saves images of 4 x 5 pixels. The first pixel of each holds its place in ``names``."""
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.full((4, 5, 3), shade, np.uint8)
        pixels[0, 0] = number
        Image.fromarray(pixels).save(path, format="PNG")


def read(root: Path | None, **changes: Any) -> Splits:
    return datasets.load("folder", root, **changes)


def refusal(root: Path | None, **changes: Any) -> str:
    with pytest.raises(DataError) as refused:
        read(root, **changes)
    text = str(refused.value)
    assert "\n" not in text and len(text) > 20
    return text


def by_name(images: ImageSet) -> dict[str, str]:
    """File name -> class name."""
    assert images.names is not None and images.labels is not None
    assert images.labels.dtype == np.int64
    return {name: images.classes[label] for name, label in zip(images.names, images.labels, strict=True)}


def without_labels(images: ImageSet | None) -> list[str]:
    assert images is not None and images.labels is None and images.classes == () and images.names is not None
    assert len(images) == len(images.names)
    return list(images.names)


@pytest.mark.parametrize("test_name", ["test", "val"])
def test_class_folders_give_the_labels(test_name: str, tmp_path: Path) -> None:
    put(tmp_path, "train/dog/1.png", "train/cat/1.png", "train/cat/2.png", "train/ape/x.png")
    put(tmp_path, f"{test_name}/cat/9.png", f"{test_name}/dog/8.png")
    splits = read(tmp_path)
    assert by_name(splits.train) == {
        "train/ape/x.png": "ape",
        "train/cat/1.png": "cat",
        "train/cat/2.png": "cat",
        "train/dog/1.png": "dog",
    }
    assert splits.test is not None
    assert by_name(splits.test) == {f"{test_name}/cat/9.png": "cat", f"{test_name}/dog/8.png": "dog"}
    assert splits.train.classes == splits.test.classes == ("ape", "cat", "dog")
    assert splits.notes == () and splits.skipped == ()


def test_images_match_their_names(tmp_path: Path) -> None:
    names = ["train/b/0.png", "train/a/1.png", "train/a/2.png"]
    put(tmp_path, *names)
    train = read(tmp_path).train
    assert train.names is not None
    assert {name: int(image[0, 0, 0]) for name, image in zip(train.names, train.images, strict=True)} == {
        name: number for number, name in enumerate(names)
    }
    assert all(image.shape == (4, 5, 3) and image.dtype == np.uint8 for image in train.images)
    assert all((image[1:] == 100).all() for image in train.images)


def test_test_folder_takes_precedence_over_val(tmp_path: Path) -> None:
    put(tmp_path, "train/a/1.png", "test/a/2.png", "val/a/3.png", "val/b/4.png")
    test = read(tmp_path).test
    assert test is not None and list(test.names or []) == ["test/a/2.png"]


def test_images_without_class_folders_have_no_labels(tmp_path: Path) -> None:
    put(tmp_path, "train/2.png", "train/1.png", "test/3.png")
    splits = read(tmp_path)
    assert without_labels(splits.train) == ["train/1.png", "train/2.png"]
    assert without_labels(splits.test) == ["test/3.png"]


@pytest.mark.parametrize("test_image", ["test/a/3.png", "test/3.png"])
def test_classes_in_only_one_split_give_no_test_labels(test_image: str, tmp_path: Path) -> None:
    put(tmp_path, "train/1.png" if test_image.count("/") == 2 else "train/a/1.png", test_image)
    assert without_labels(read(tmp_path).test) == [test_image]


def test_without_train_folder_all_images_are_used(tmp_path: Path) -> None:
    put(tmp_path, "1.png", "a/2.png", "a/b/c/3.png", "d/4.png")
    splits = read(tmp_path)
    assert sorted(without_labels(splits.train)) == ["1.png", "a/2.png", "a/b/c/3.png", "d/4.png"]
    assert splits.test is None
    (note,) = splits.notes
    assert str(tmp_path) in note and "train" in note


@pytest.mark.parametrize("name", ["test", "val"])
def test_test_folder_without_train_folder_is_refused(name: str, tmp_path: Path) -> None:
    put(tmp_path, f"{name}/a/1.png", "other/2.png")
    assert str(tmp_path / "train") in refusal(tmp_path)


def test_images_in_subfolders_belong_to_the_class_folder(tmp_path: Path) -> None:
    put(tmp_path, "train/cat/1.png", "train/cat/wild/2.png", "train/cat/wild/old/3.png", "train/dog/cat/4.png")
    assert by_name(read(tmp_path).train) == {
        "train/cat/1.png": "cat",
        "train/cat/wild/2.png": "cat",
        "train/cat/wild/old/3.png": "cat",
        "train/dog/cat/4.png": "dog",
    }


@pytest.mark.parametrize("split", ["train", "test"])
def test_images_beside_class_folders_are_refused(split: str, tmp_path: Path) -> None:
    put(tmp_path, "train/a/1.png", "test/a/1.png", f"{split}/stray.png")
    text = refusal(tmp_path)
    assert str(tmp_path / split) in text and "stray.png" in text and "both" in text


def test_test_class_without_training_images_is_refused(tmp_path: Path) -> None:
    put(tmp_path, "train/a/1.png", "train/b/1.png", "test/a/1.png", "test/zebra/1.png")
    assert "zebra" in refusal(tmp_path)


def test_class_without_test_images_keeps_its_number(tmp_path: Path) -> None:
    put(tmp_path, "train/a/1.png", "train/b/1.png", "train/c/1.png", "test/c/1.png")
    splits = read(tmp_path)
    assert splits.test is not None and splits.test.labels is not None
    assert splits.test.labels.tolist() == [2]


def test_without_test_folder_there_is_no_test_split(tmp_path: Path) -> None:
    put(tmp_path, "train/a/1.png")
    assert read(tmp_path).test is None


@pytest.mark.parametrize("inside", ["test", "test/a"])
def test_empty_test_folder_gives_no_test_split(inside: str, tmp_path: Path) -> None:
    put(tmp_path, "train/a/1.png")
    (tmp_path / inside).mkdir(parents=True)
    assert read(tmp_path).test is None


@pytest.mark.parametrize("inside", [".", "train", "train/a", "deep/deeper"])
def test_folder_without_images_is_refused(inside: str, tmp_path: Path) -> None:
    (tmp_path / inside).mkdir(parents=True, exist_ok=True)
    (tmp_path / inside / "notes.txt").write_text("no image")
    text = refusal(tmp_path)
    assert str(tmp_path) in text and "no image" in text and "train/<class>/" in text


def test_missing_or_invalid_root_is_refused(tmp_path: Path) -> None:
    assert str(tmp_path / "none") in refusal(tmp_path / "none")
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in refusal(tmp_path / "file")
    assert "--data-root" in refusal(None)


def test_hidden_files_and_folders_are_ignored(tmp_path: Path) -> None:
    put(tmp_path, "train/a/1.png", "train/a/.2.png", "train/.b/3.png", "train/__MACOSX/4.png", "train/a/._1.png")
    put(tmp_path, "train/.DS_Store.png", "train/a/.thumbs/5.png")
    splits = read(tmp_path)
    assert by_name(splits.train) == {"train/a/1.png": "a"}
    assert splits.train.classes == ("a",) and splits.skipped == ()


def test_hidden_files_are_ignored_without_a_train_folder(tmp_path: Path) -> None:
    put(tmp_path, "1.png", ".2.png", ".git/3.png", "a/.4.png", "__MACOSX/5.png")
    assert without_labels(read(tmp_path).train) == ["1.png"]


def test_file_extensions_ignore_case(tmp_path: Path) -> None:
    put(tmp_path, "train/a/1.PNG", "train/a/2.JpEg", "train/a/3.webp")
    (tmp_path / "train" / "a" / "notes.txt").write_text("no image")
    (tmp_path / "train" / "list.csv").write_text("no image")
    splits = read(tmp_path)
    assert (
        list(splits.train.names or []) == ["train/a/1.PNG", "train/a/2.JpEg", "train/a/3.webp"] and not splits.skipped
    )


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """Two good training images, one good test image, and four that cannot be read."""
    root = tmp_path / "damaged"
    put(root, "train/a/good.png", "train/b/good.png", "test/a/good.png")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    Image.fromarray(noise).save(root / "train" / "a" / "cut.jpg")
    whole = (root / "train" / "a" / "cut.jpg").read_bytes()
    (root / "train" / "a" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "train" / "a" / "empty.png").write_bytes(b"")
    (root / "train" / "b" / "alien.jpg").write_bytes(np.random.default_rng(1).bytes(500))
    (root / "test" / "a" / "text.png").write_text("no image")
    return root


BROKEN = ["test/a/text.png", "train/a/cut.jpg", "train/a/empty.png", "train/b/alien.jpg"]


@pytest.mark.parametrize("in_memory", [0, 2**30])
def test_unreadable_images_are_skipped_with_the_reason(
    in_memory: int, damaged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "IN_MEMORY", in_memory)
    splits = read(damaged)
    assert by_name(splits.train) == {"train/a/good.png": "a", "train/b/good.png": "b"}
    assert splits.test is not None and by_name(splits.test) == {"test/a/good.png": "a"}
    reasons = dict(splits.skipped)
    assert sorted(reasons) == BROKEN
    assert "truncated" in reasons["train/a/cut.jpg"]
    assert all("not an image" in reasons[name] for name in BROKEN if name != "train/a/cut.jpg")


@pytest.mark.parametrize("in_memory", [0, 2**30])
def test_strict_data_refuses_unreadable_images_by_name(
    in_memory: int, damaged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "IN_MEMORY", in_memory)
    text = refusal(damaged, strict=True)
    assert str(damaged) in text and "4 unreadable" in text and "--strict-data" in text
    assert all(name in text for name in BROKEN)


def test_strict_data_accepts_readable_images(tmp_path: Path) -> None:
    put(tmp_path, "train/a/1.png")
    assert len(read(tmp_path, strict=True).train) == 1


def test_split_without_readable_image_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train" / "a").mkdir(parents=True)
    (tmp_path / "train" / "a" / "bad.png").write_bytes(b"x")
    text = refusal(tmp_path)
    assert "bad.png" in text and "no training image could be read" in text


def test_without_readable_test_images_there_is_no_test_split(tmp_path: Path) -> None:
    put(tmp_path, "train/a/1.png")
    (tmp_path / "test" / "a").mkdir(parents=True)
    (tmp_path / "test" / "a" / "bad.png").write_bytes(b"x")
    splits = read(tmp_path)
    assert splits.test is None and [name for name, _ in splits.skipped] == ["test/a/bad.png"]


@pytest.fixture
def many(tmp_path: Path) -> Path:
    draw = np.random.default_rng(3)
    for split in ("train", "test"):
        for number in range(6):
            path = tmp_path / "many" / split / "ab"[number % 2] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            shape = (3 + number, 9 - number, 3)
            Image.fromarray(draw.integers(0, 256, shape).astype(np.uint8)).save(path)
    return tmp_path / "many"


def test_large_collections_stay_on_disk_with_equal_images(many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = read(many)
    assert not isinstance(small.train.images, ImageFiles)
    monkeypatch.setattr(files, "IN_MEMORY", 0)
    large = read(many)
    for one, other in ((small.train, large.train), (small.test, large.test)):
        assert one is not None and other is not None
        assert isinstance(other.images, ImageFiles)
        assert by_name(one) == by_name(other) and list(one.names or []) == list(other.names or [])
        assert len(one) == len(other) == 6
        for number in range(6):
            assert np.array_equal(one.images[number], other.images[number])


def test_split_is_in_memory_up_to_the_limit_only(many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = sum(3 * (3 + number) * (9 - number) for number in range(6))
    monkeypatch.setattr(files, "IN_MEMORY", pixels)
    assert not isinstance(read(many).train.images, ImageFiles)
    monkeypatch.setattr(files, "IN_MEMORY", pixels - 1)
    assert isinstance(read(many).train.images, ImageFiles)


def test_file_deleted_later_is_named(many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "IN_MEMORY", 0)
    train = read(many).train
    assert train.names is not None
    (many / train.names[2]).unlink()
    with pytest.raises(DataError) as refused:
        train.images[2]
    assert str(many / train.names[2]) in str(refused.value)
    assert train.images[1].dtype == np.uint8


def test_progress_counts_every_file_of_each_split(many: Path) -> None:
    messages: list[tuple[str, int, int]] = []

    def count(items: Iterable[Any], what: str, total: int, unit: str) -> list[Any]:
        listed = list(items)
        messages.append((what, total, len(listed)))
        return listed

    (many / "test" / "a" / "4.png").unlink()
    read(many, progress=count)
    assert {(total, seen) for what, total, seen in messages if "training" in what} == {(6, 6)}
    assert {(total, seen) for what, total, seen in messages if "test" in what} == {(5, 5)}


def test_data_set_name_ignores_case(many: Path) -> None:
    assert len(datasets.load("Folder", many).train) == 6
    with pytest.raises(KeyError):
        datasets.load("folders", many)


def test_folder_uses_the_normalisation_of_imagenet() -> None:
    source = datasets.DATASETS["folder"]
    assert (source.means, source.stds) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_linked_folders_are_read_and_cycles_are_not_followed(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    root = tmp_path / "root"
    for place in (elsewhere, root):
        place.mkdir()
        Image.new("RGB", (2, 2)).save(place / f"{place.name}.png")
    (root / "linked").symlink_to(elsewhere)
    (root / "round").symlink_to(root)
    splits = datasets.load("folder", root)
    assert sorted(splits.train.names or []) == [str(Path("linked", "elsewhere.png")), "root.png"]


@pytest.mark.parametrize("place", ["", "train", "train/a"])
def test_folder_without_read_permission_is_refused_with_its_name(place: str, tmp_path: Path) -> None:
    """Permissions do not stop tests that run as root, so the listing is made to fail."""
    (tmp_path / "train" / "a").mkdir(parents=True)
    Image.new("RGB", (2, 2)).save(tmp_path / "train" / "a" / "0.png")
    forbidden, scandir, is_dir, iterdir = tmp_path / place, os.scandir, Path.is_dir, Path.iterdir

    def refuse(path: Any) -> None:
        if Path(path) == forbidden:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with pytest.MonkeyPatch.context() as patch:  # undone before pytest removes the folder with these functions
        patch.setattr(os, "scandir", lambda path: refuse(path) or scandir(path))
        patch.setattr(Path, "iterdir", lambda path: refuse(path) or iterdir(path))
        patch.setattr(Path, "is_dir", lambda path: refuse(path.parent) or is_dir(path))
        with pytest.raises(DataError, match="Permission denied") as refused:
            datasets.load("folder", tmp_path)
    assert str(forbidden) in str(refused.value)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
@pytest.mark.parametrize("in_memory", [True, False])
def test_named_pipe_is_skipped(in_memory: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening a pipe would block forever."""
    monkeypatch.setattr(files, "IN_MEMORY", 2**30 if in_memory else 0)
    (tmp_path / "train" / "a").mkdir(parents=True)
    Image.new("RGB", (2, 2)).save(tmp_path / "train" / "a" / "0.png")
    os.mkfifo(tmp_path / "train" / "a" / "1.png")
    splits = datasets.load("folder", tmp_path)
    assert len(splits.train) == 1
    assert splits.skipped == (("train/a/1.png", "not a regular file"),)
    with pytest.raises(DataError, match="not a regular file"):
        datasets.load("folder", tmp_path, strict=True)


def encoded(kind: str) -> bytes:
    """An image of 16 x 16 pixels in one of Pillow's formats."""
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (200, 10, 10)).save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize("in_memory", [0, 2**30])
def test_images_are_read_whatever_their_file_extension(
    in_memory: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "IN_MEMORY", in_memory)
    kinds = {"a.jfif": "JPEG", "b.gif": "GIF", "c.jp2": "JPEG2000", "d.JPE": "JPEG", "e.dat": "PNG", "f": "WEBP"}
    kinds |= {"g.eps": "PNG", "h.tif.1": "TIFF"} | ({"i.avif": "AVIF"} if features.check("avif") else {})
    (tmp_path / "train" / "a").mkdir(parents=True)
    for name, kind in kinds.items():
        (tmp_path / "train" / "a" / name).write_bytes(encoded(kind))
    train = read(tmp_path, strict=True).train
    assert list(train.names or []) == [f"train/a/{name}" for name in sorted(kinds)]
    assert all(np.abs(image.astype(int) - (200, 10, 10)).max() < 20 for image in train.images)


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100)
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.fixture
def without_heif(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if pillow-heif were not installed."""
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # type: ignore[arg-type]  # importing it fails
    images.formats.cache_clear()
    yield
    images.formats.cache_clear()


@pytest.mark.usefixtures("without_heif")
@pytest.mark.parametrize("in_memory", [0, 2**30])
def test_unreadable_files_of_any_extension_are_reported(
    in_memory: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "IN_MEMORY", in_memory)
    put(tmp_path, "train/a/1.png")
    raw = encoded("TIFF")  # Pillow would read the thumbnail in a raw file
    contents = {"a/2.HEIC": HEIC, "a/3.heif": HEIC, "a/4.CR2": raw, "a/5.eps": POSTSCRIPT, "6.xyz": b"?", "a/7": b""}
    for name, content in contents.items():
        (tmp_path / "train" / name).write_bytes(content)
    splits = read(tmp_path)
    assert by_name(splits.train) == {"train/a/1.png": "a"}  # 6.xyz is next to the class folders but no image
    reasons = dict(splits.skipped)
    assert sorted(reasons) == sorted(f"train/{name}" for name in contents)
    assert all("pip install pillow-heif" in reasons[f"train/a/{name}"] for name in ("2.HEIC", "3.heif"))
    assert "raw" in reasons["train/a/4.CR2"]
    assert all("not an image" in reasons[f"train/{name}"] for name in ("a/5.eps", "6.xyz", "a/7"))
    assert "6 unreadable" in refusal(tmp_path, strict=True)


IGNORED = [
    "notes.TXT",
    "labels.json",
    "list.csv",
    "Thumbs.db",
    ".DS_Store",
    "README",
    "a.xmp",
    "all.tar.gz",
    ".hidden.heic",
]


def test_text_archive_and_system_files_are_ignored(tmp_path: Path) -> None:
    put(tmp_path, "train/a/1.png")
    for name in IGNORED:
        for folder in ("train", "train/a"):
            (tmp_path / folder / name).write_bytes(b"P3 this is no image")
    splits = read(tmp_path, strict=True)
    assert by_name(splits.train) == {"train/a/1.png": "a"} and splits.skipped == ()


def test_folder_without_images_names_an_unreadable_file(tmp_path: Path) -> None:
    (tmp_path / "movie.mov").write_bytes(b"?")
    text = refusal(tmp_path)
    assert "no image found" in text and "movie.mov" in text


def fake_pillow_heif() -> SimpleNamespace:
    """Replaces pillow-heif: registers an opener that reads every file as a green image."""

    class Green(ImageFile.ImageFile):
        format = "HEIF"

        def _open(self) -> None:
            self._size, self._mode = (16, 16), "RGB"

        def load(self) -> Any:
            self.im = Image.new("RGB", self.size, (0, 255, 0)).im
            return Image.Image.load(self)

    def register() -> None:
        Image.register_open("HEIF", Green, lambda start: start[4:12] == b"ftypheic")

    return SimpleNamespace(register_heif_opener=register)


@pytest.mark.usefixtures("without_heif")
def test_heic_files_are_read_if_pillow_heif_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, "train/a/1.png")
    (tmp_path / "train" / "a" / "2.heic").write_bytes(HEIC)
    assert len(read(tmp_path).train) == 1
    monkeypatch.setattr(Image, "OPEN", {**Image.OPEN})
    monkeypatch.setattr(Image, "ID", [*Image.ID])  # register_open appends to both
    monkeypatch.setitem(sys.modules, "pillow_heif", fake_pillow_heif())
    images.formats.cache_clear()
    train = read(tmp_path, strict=True).train
    assert (train.images[1] == (0, 255, 0)).all() and train.images[1].shape == (16, 16, 3)


def test_heic_files_written_by_pillow_heif_are_read(tmp_path: Path) -> None:
    pytest.importorskip("pillow_heif")
    put(tmp_path, "train/a/1.png")
    images.formats()
    Image.new("RGB", (64, 48), (200, 10, 10)).save(tmp_path / "train" / "a" / "2.heic", format="HEIF")
    train = read(tmp_path, strict=True).train
    assert train.images[1].shape == (48, 64, 3) and np.abs(train.images[1].astype(int) - (200, 10, 10)).max() < 10
