"""ImageNet as its archives unpack, with validation images in class folders or in one flat folder."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import datasets
import synthetic
from datasets import DataError, ImageSet, Splits


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "imagenet"


def read(root: Path, **changes: Any) -> Splits:
    return datasets.load("imagenet", root, **changes)


def refusal(root: Path, **changes: Any) -> str:
    with pytest.raises(DataError) as refused:
        read(root, **changes)
    text = str(refused.value)
    assert "\n" not in text and (changes or str(root) in text)
    return text


def check(images: ImageSet | None, numbers: dict[str, int], part: str, classes: int = 3) -> None:
    """Checks that every image is present with its class."""
    assert images is not None and images.labels is not None and images.names is not None
    assert images.labels.dtype == np.int64
    assert images.classes == tuple(sorted(synthetic.WNIDS[:classes]))
    shown = {name: synthetic.number_of(image) for name, image in zip(images.names, images.images, strict=True)}
    assert shown == {name: number for name, number in numbers.items() if name.startswith(part)}
    for name, label in zip(images.names, images.labels, strict=True):
        assert images.classes[label] == synthetic.WNIDS[numbers[name] % classes]


def test_every_image_has_the_class_of_its_folder(root: Path) -> None:
    numbers = synthetic.imagenet(root)
    splits = read(root)
    check(splits.train, numbers, "train/")
    check(splits.test, numbers, "val/")
    assert splits.skipped == ()


@pytest.mark.parametrize("packed", [False, True])
def test_flat_validation_images_have_the_classes_of_the_devkit(packed: bool, root: Path) -> None:
    numbers = synthetic.imagenet(root, classes=5, per_class=2, val=3, flat=True)
    if packed:
        synthetic.pack_devkit(root)
    check(read(root).test, numbers, "val/", classes=5)


def test_flat_and_sorted_validation_images_are_equal(root: Path, tmp_path: Path) -> None:
    synthetic.imagenet(root, val=4, flat=True)
    synthetic.imagenet(tmp_path / "sorted", val=4)

    def by_place(splits: Splits) -> dict[str, tuple[int, bytes]]:
        test = splits.test
        assert test is not None and test.labels is not None and test.names is not None
        rows = zip(test.names, test.labels.tolist(), test.images, strict=True)
        return {Path(name).name: (label, image.tobytes()) for name, label, image in rows}

    assert by_place(read(root)) == by_place(read(tmp_path / "sorted"))


def test_ground_truth_is_in_order_of_image_numbers(root: Path) -> None:
    synthetic.imagenet(root, classes=5, per_class=1, val=0)
    truth = [3, 1, 2, 2, 5, 4, 1]
    synthetic.devkit(root, truth)
    for i in range(len(truth)):
        synthetic.save(root / "val" / f"ILSVRC2012_val_{i + 1:08d}.JPEG", i)
    test = read(root).test
    assert test is not None and test.labels is not None
    assert [test.classes[label] for label in test.labels] == [synthetic.WNIDS[i - 1] for i in truth]


def test_subset_of_flat_validation_images_keeps_its_classes(root: Path) -> None:
    numbers = synthetic.imagenet(root, val=4, flat=True)
    for place in (1, 2, 5, 9):
        name = f"val/ILSVRC2012_val_{place:08d}.JPEG"
        (root / name).unlink()
        del numbers[name]
    check(read(root).test, numbers, "val/")


def test_subset_of_imagenet_is_noted(root: Path) -> None:
    synthetic.imagenet(root)
    (note,) = read(root).notes
    assert str(root) in note and "12 training images of 3 classes" in note and "1281167 of 1000" in note


def test_complete_imagenet_has_no_note(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synthetic.imagenet(root)
    monkeypatch.setattr(datasets.imagenet, "IMAGES", 12)
    monkeypatch.setattr(datasets.imagenet, "CLASSES", 3)
    assert read(root).notes == ()


def test_without_validation_folder_there_is_no_test_split(root: Path) -> None:
    synthetic.imagenet(root, val=0)
    assert read(root).test is None


@pytest.mark.parametrize("inside", ["val", f"val/{synthetic.WNIDS[0]}"])
def test_validation_folder_without_images_is_refused(inside: str, root: Path) -> None:
    synthetic.imagenet(root, val=0)
    (root / inside).mkdir(parents=True)
    text = refusal(root)
    assert str(root / "val") in text and "no image" in text and "ILSVRC2012_img_val.tar" in text


@pytest.mark.parametrize("flat", [False, True])
def test_validation_class_without_training_images_is_refused(flat: bool, root: Path) -> None:
    synthetic.imagenet(root, flat=flat)
    for path in (root / "train" / synthetic.WNIDS[1]).iterdir():
        path.unlink()
    (root / "train" / synthetic.WNIDS[1]).rmdir()
    text = refusal(root)
    assert synthetic.WNIDS[1] in text and "missing in train" in text and synthetic.WNIDS[0] not in text


def test_both_class_folders_and_flat_images_are_refused(root: Path) -> None:
    synthetic.imagenet(root)
    synthetic.save(root / "val" / "ILSVRC2012_val_00000009.JPEG", 1)
    text = refusal(root)
    assert str(root / "val") in text and "ILSVRC2012_val_00000009.JPEG" in text


def test_flat_validation_images_need_the_devkit(root: Path) -> None:
    synthetic.imagenet(root, flat=True)
    synthetic.pack_devkit(root).unlink()
    text = refusal(root)
    assert f"{synthetic.DEVKIT}.tar.gz" in text and "https://image-net.org" in text and "val/<wnid>/" in text


@pytest.mark.parametrize(
    "name", ["ILSVRC2012_val_00000007.JPEG", "ILSVRC2012_val_00000000.JPEG", "holiday.jpg", "holiday_2.jpg"]
)
def test_flat_image_without_ground_truth_is_refused(name: str, root: Path) -> None:
    synthetic.imagenet(root, val=2, flat=True)
    synthetic.save(root / "val" / name, 5)
    text = refusal(root)
    assert str(root / "val" / name) in text and "ILSVRC2012_val_00000001.JPEG to 00000006" in text


def test_invalid_ground_truth_is_refused(root: Path) -> None:
    synthetic.imagenet(root, val=2, flat=True)
    truth = root / synthetic.DEVKIT / "data" / "ILSVRC2012_validation_ground_truth.txt"
    lines = truth.read_text().splitlines()
    truth.write_text("\n".join(lines[:4]))
    assert "ILSVRC2012_val_00000005.JPEG" in refusal(root)
    truth.write_text("\n".join([*lines[:3], "1999", *lines[4:]]))
    assert "ILSVRC2012_val_00000004.JPEG" in refusal(root)


@pytest.mark.parametrize("content", [b"one\ntwo\n", b"1.5\n", b"\xff\xfe\x00", b"1 2 x"])
def test_unreadable_ground_truth_is_refused(content: bytes, root: Path) -> None:
    synthetic.imagenet(root, flat=True)
    (root / synthetic.DEVKIT / "data" / "ILSVRC2012_validation_ground_truth.txt").write_bytes(content)
    assert f"{synthetic.DEVKIT} is damaged" in refusal(root)


@pytest.mark.parametrize("eighths", range(8))
def test_truncated_meta_file_is_refused(eighths: int, root: Path) -> None:
    synthetic.imagenet(root, per_class=1, flat=True)
    meta = root / synthetic.DEVKIT / "data" / "meta.mat"
    whole = meta.read_bytes()
    meta.write_bytes(whole[: len(whole) * eighths // 8])
    text = refusal(root)
    assert f"{synthetic.DEVKIT} is damaged" in text and "fetch it again" in text


@pytest.mark.parametrize("fraction", [0, 0.5, 0.8])
def test_truncated_devkit_archive_is_refused(fraction: float, root: Path) -> None:
    synthetic.imagenet(root, per_class=1, flat=True)
    archive = synthetic.pack_devkit(root)
    whole = archive.read_bytes()
    archive.write_bytes(whole[: int(len(whole) * fraction)])
    assert f"{synthetic.DEVKIT} is damaged" in refusal(root)


def test_devkit_archive_with_other_content_is_refused(root: Path) -> None:
    synthetic.imagenet(root, per_class=1, flat=True)
    archive = synthetic.pack_devkit(root)
    with tarfile.open(archive, "w:gz") as file:
        entry = tarfile.TarInfo("other/readme.txt")
        entry.size = 4
        file.addfile(entry, io.BytesIO(b"text"))
    text = refusal(root)
    assert f"{synthetic.DEVKIT} is damaged or not the published one" in text and "meta.mat" in text


def test_devkit_archive_with_dot_prefix_is_read(root: Path) -> None:
    numbers = synthetic.imagenet(root, flat=True)
    with tarfile.open(root / f"{synthetic.DEVKIT}.tar.gz", "w:gz") as file:
        file.add(root / synthetic.DEVKIT, f"./{synthetic.DEVKIT}")
    (root / synthetic.DEVKIT / "data" / "meta.mat").unlink()  # the folder is incomplete, the archive is not
    check(read(root).test, numbers, "val/")


def test_training_archives_not_unpacked_are_reported(root: Path) -> None:
    (root / "train").mkdir(parents=True)
    (root / "train" / "n01440764.tar").write_bytes(b"")
    text = refusal(root)
    assert "not unpacked" in text and "train/<wnid>/" in text


@pytest.mark.parametrize("inside", ["", "train", "train/n01440764"])
def test_root_without_training_images_is_refused(inside: str, root: Path) -> None:
    (root / inside).mkdir(parents=True)
    text = refusal(root)
    assert "train" in text and "train/<wnid>/*.JPEG" in text and "unpacked" not in text


def test_training_images_without_class_folders_are_refused(root: Path) -> None:
    synthetic.save(root / "train" / "1.JPEG", 1)
    assert "no class folders" in refusal(root)


def test_missing_root_is_refused_with_the_download_address(root: Path) -> None:
    assert "https://image-net.org" in refusal(root)


def test_refused_download_names_the_files_and_writes_nothing(root: Path) -> None:
    text = refusal(root, download=True)
    for name in ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"):
        assert name in text
    assert "--download" in text and "https://image-net.org" in text and not root.exists()


def test_unreadable_images_are_skipped_with_their_labels(root: Path) -> None:
    numbers = synthetic.imagenet(root, flat=True)
    bad = [name for name in numbers if numbers[name] in (1, 13)]
    for name in bad:
        (root / name).write_bytes(b"no image")
        del numbers[name]
    splits = read(root)
    check(splits.train, numbers, "train/")
    check(splits.test, numbers, "val/")
    assert sorted(name for name, _ in splits.skipped) == sorted(bad)
    assert all(name in refusal(root, strict=True) for name in bad)
