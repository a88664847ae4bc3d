"""Lists of image files: loaded in memory or read from disk, whole or cropped, and what is refused."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import synthetic
from datasets import DataError, ImageSet, files
from datasets.files import Classes, Reader, class_folders, joined, listed, open_root, renumber
from datasets.images import ImageFiles, Request, read_rgb
from datasets.inventory import Inventory, Names
from lib.data.augmentation import Augmentation
from lib.data.loader import Loader


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "root"


def reader(root: Path) -> Reader:
    return Reader(root, Request(root, strict=False, download=False, boxes=False, progress=lambda items, *_: items))


def put(root: Path, count: int = 4, size: tuple[int, int] | None = None) -> Inventory:
    """Saves and lists pictures from number 0."""
    names = joined("images", [f"{number}.png" for number in range(count)])
    for number, name in enumerate(names):
        synthetic.save(root / name, number, size)
    return listed(root, names, "list.txt", "restore it")


def refusal(work: Any, *arguments: Any, **named: Any) -> str:
    with pytest.raises(DataError) as refused:
        work(*arguments, **named)
    text = str(refused.value)
    assert "\n" not in text
    return text


def test_images_of_one_size_in_memory_are_one_array(root: Path) -> None:
    images: Any = reader(root).read("training", put(root, size=(31, 17))).images
    assert isinstance(images, np.ndarray) and images.shape == (4, 17, 31, 3) and images.dtype == np.uint8
    assert all(np.array_equal(images[number], synthetic.picture(number, (31, 17))) for number in range(4))


def test_images_of_many_sizes_in_memory_are_a_list(root: Path) -> None:
    images = reader(root).read("training", put(root)).images
    assert isinstance(images, list)
    assert all(np.array_equal(images[number], synthetic.picture(number)) for number in range(4))


def test_crops_of_one_size_are_one_array(root: Path) -> None:
    boxes = np.array([[i, 2 * i, i + 20, 2 * i + 10] for i in range(4)])
    images: Any = reader(root).read("training", put(root), boxes=boxes).images
    assert isinstance(images, np.ndarray) and images.shape == (4, 10, 20, 3)
    assert all(np.array_equal(images[i], synthetic.picture(i)[2 * i : 2 * i + 10, i : i + 20]) for i in range(4))


def test_crops_of_many_sizes_do_not_keep_whole_images(root: Path) -> None:
    images = reader(root).read("training", put(root, 2), boxes=np.array([[0, 0, 3, 4], [0, 0, 5, 6]])).images
    assert [image.shape for image in images] == [(4, 3, 3), (6, 5, 3)]
    assert all(image.base is None and image.flags["C_CONTIGUOUS"] for image in images)


@pytest.mark.parametrize("in_memory", [0, 2**30])
def test_unreadable_file_is_skipped_with_its_label_and_box(
    in_memory: int, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "IN_MEMORY", in_memory)
    found = put(root)
    (root / found.names[1]).write_bytes(b"no image")
    classes = Classes(("a", "b", "c", "d"), np.arange(4))
    boxes = np.array([[i, 0, i + 10, 10 + i] for i in range(4)])
    work = reader(root)
    images = work.read("training", found, classes=classes, boxes=boxes)
    assert images.labels is not None and images.labels.tolist() == [0, 2, 3] and images.classes == classes.names
    assert list(images.names or []) == [found.names[i] for i in (0, 2, 3)]
    for i, image in zip((0, 2, 3), images.images, strict=True):
        assert np.array_equal(image, synthetic.picture(i)[: 10 + i, i : i + 10])
    assert work.skipped == [(found.names[1], "not an image that Pillow can read")]


@pytest.mark.parametrize("in_memory", [0, 2**30])
def test_box_refers_to_stored_pixels_of_rotated_photograph(
    in_memory: int, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "IN_MEMORY", in_memory)
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    (root / "images").mkdir(parents=True)
    stored = synthetic.picture(3, (60, 20))
    Image.fromarray(stored).save(root / "images" / "turned.png", exif=exif)
    found = listed(root, joined("images", ["turned.png"]), "list.txt", "restore it")
    assert reader(root).read("training", found).images[0].shape == (60, 20, 3)
    cut = reader(root).read("training", found, boxes=np.array([[30, 5, 55, 15]])).images[0]
    assert np.array_equal(cut, stored[5:15, 30:55])


def test_box_outside_its_image_is_refused(root: Path) -> None:
    boxes = np.array([[0, 0, 1, 1], [-9, -9, 999, 999], [54, 3, 60, 9], [0, 0, 9, 9]])
    text = refusal(reader(root).read, "training", put(root), boxes=boxes)
    assert str(Path("images", "2.png")) in text and "[54, 3, 60, 9]" in text and "54 x 62" in text


def test_list_may_name_a_file_twice_and_in_any_order(root: Path) -> None:
    put(root)
    found = listed(root, joined("images", ["2.png", "0.png", "2.png"]), "list.txt", "restore it")
    assert [synthetic.number_of(image) for image in reader(root).read("training", found).images] == [2, 0, 2]


def test_missing_listed_files_are_counted(root: Path) -> None:
    put(root)
    names = joined("images", ["0.png", "9.png", "1.png", "8.png"])
    text = refusal(listed, root, names, "list.txt", "mend it so")
    assert "2 files" in text and names[1] in text and "list.txt" in text and "mend it so" in text
    assert "0.png" not in text and str(root) in text


def test_list_without_names_is_refused(root: Path) -> None:
    assert "list.txt names no image" in refusal(listed, root, [], "list.txt", "restore it")


def test_listed_folders_and_broken_links_are_skipped(root: Path) -> None:
    found = put(root, 4)
    for name in found.names[:2]:
        (root / name).unlink()
    (root / found.names[0]).mkdir()
    (root / found.names[1]).symlink_to(root / "nowhere")
    work = reader(root)
    again = listed(root, list(found.names), "list.txt", "restore it")
    assert len(work.read("training", again)) == 2
    assert [name for name, _ in work.skipped] == list(found.names[:2]) and all(reason for _, reason in work.skipped)


def test_published_names_use_the_path_separator_of_the_system() -> None:
    assert joined("images", ["a/b.jpg", "c.jpg"]) == [f"images{os.sep}a{os.sep}b.jpg", f"images{os.sep}c.jpg"]


def test_root_is_required_and_must_be_a_folder(tmp_path: Path) -> None:
    def request(root: Path | None) -> Request:
        return Request(root, strict=False, download=False, boxes=False, progress=lambda items, *_: items)

    for root, sign in ((None, "--data-root"), (tmp_path / "none", str(tmp_path / "none")), (Path(__file__), __file__)):
        text = refusal(open_root, request(root), "a list", "get it there")
        assert sign in text and "a list" in text and "get it there" in text
    assert open_root(request(tmp_path), "a list", "get it there") == tmp_path


def inventory_of(names: list[str], folders: list[str]) -> Inventory:
    return Inventory("train", Names(names), folders, None, {}, None)


def test_class_folders_are_numbered_even_if_empty() -> None:
    folders = ["train", "train/b", "train/b/deep", "train/a", "train/c"]
    classes = class_folders(Path(), "train", inventory_of(["train/b/deep/1.png", "train/a/2.png"], folders))
    assert classes is not None and classes.names == ("a", "b", "c") and classes.labels.tolist() == [1, 0]


def test_images_beside_class_folders_are_refused() -> None:
    assert class_folders(Path(), "train", inventory_of(["train/1.png"], ["train"])) is None
    found = inventory_of(["train/a/1.png", "train/2.png"], ["train", "train/a"])
    assert "2.png" in refusal(class_folders, Path(), "train", found)


def test_test_classes_have_the_numbers_of_the_training_classes() -> None:
    test = Classes(("b", "d"), np.array([1, 0, 1]))
    numbered = renumber(test, ("a", "b", "c", "d"), Path())
    assert numbered.names == ("a", "b", "c", "d") and numbered.labels.tolist() == [3, 1, 3]
    assert "d, e" in refusal(renumber, Classes(("e", "a", "d"), np.array([0])), ("a",), Path("root"))


class FirstPixel(Augmentation):
    """Uses the first pixel of an image in place of a crop."""

    def crop_on_worker(self, image: np.ndarray, draws: np.ndarray) -> np.ndarray:
        return image[:1, :1]

    def augment_on_device(self, images: torch.Tensor, draws: np.ndarray) -> torch.Tensor:
        return images[:, 0, 0]


@pytest.mark.parametrize("boxes", [None, np.array([[i, 2, i + 4, 9] for i in range(7)])])
def test_worker_processes_read_the_files(boxes: np.ndarray | None, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "IN_MEMORY", 0)
    large = reader(root).read("training", put(root, 7), boxes=boxes)
    assert isinstance(large.images, ImageFiles) and isinstance(large.names, Names)
    copy: ImageSet = pickle.loads(pickle.dumps(large))
    pixel = FirstPixel((1, 1), (1, 1), (0, 0, 0), (1, 1, 1))
    for images in (large.images, copy.images):
        loader = Loader(images, pixel, batch_size=3, workers=2, seed=0, device=torch.device("cpu"))
        seen = {int(i): rgb.tolist() for batch, indices in loader.epoch() for i, rgb in zip(indices, batch)}  # noqa: B905
        corner = [synthetic.picture(i)[(0, 0) if boxes is None else (2, i)].tolist() for i in range(7)]
        assert seen == dict(enumerate(corner))


def test_file_damaged_after_the_start_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "IN_MEMORY", 0)
    large = reader(root).read("training", put(root))
    path = root / "images" / "2.png"
    path.write_bytes(b"no image any more")
    text = refusal(large.images.__getitem__, 2)
    assert str(path) in text and "could be read at the start" in text
    assert synthetic.number_of(large.images[3]) == 3


def test_truncated_files_are_found_even_if_not_loaded(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "IN_MEMORY", 0)
    monkeypatch.setattr(files, "TOGETHER", 2)
    names = joined("images", [f"{i}.jpg" for i in range(9)])
    for i, name in enumerate(names):
        synthetic.save(root / name, i)
    for i in (0, 5, 8):
        whole = (root / names[i]).read_bytes()
        (root / names[i]).write_bytes(whole[: len(whole) * 3 // 4])
    work = reader(root)
    images = work.read("training", listed(root, names, "list.txt", "restore it"))
    assert [synthetic.number_of(image) for image in images.images] == [1, 2, 3, 4, 6, 7]
    assert [name for name, _ in work.skipped] == [names[i] for i in (0, 5, 8)]
    assert all("truncated" in reason for _, reason in work.skipped)


def test_progress_counts_files_for_any_batch_of_a_thread(root: Path) -> None:
    messages: list[tuple[str, int, str, int]] = []

    def count(items: Iterable[Any], what: str, total: int, unit: str) -> list[Any]:
        seen = list(items)
        messages.append((what, total, unit, len(seen)))
        return seen

    work = Reader(root, Request(root, strict=False, download=False, boxes=False, progress=count))
    work.read("training", put(root, 5))
    assert messages == [
        ("reading training images (headers)", 5, "file", 5),
        ("reading training images", 5, "file", 5),
    ]


def test_crop_of_a_file_equals_the_crop_of_the_whole_image(root: Path) -> None:
    put(root)
    names = joined("images", ["1.png", "3.png"])
    cuts = ImageFiles(root, Names(names), np.array([[0, 0, 9, 9], [5, 6, 15, 26]]))
    assert np.array_equal(cuts[1], read_rgb(root / names[1])[6:26, 5:15])
    assert np.array_equal(cuts[-1], cuts[1]) and len(cuts) == 2
