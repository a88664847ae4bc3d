"""Parquet files as Hugging Face publishes image data sets: layouts, labels, names, damage, access to single images."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import sys
from collections import namedtuple
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import datasets
import synthetic
from datasets import DataError, ImageSet, Splits, files, packed, parquet

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

IMAGE = {"image": {"_type": "Image"}}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "anchor-neighbourhoods"


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every split is too large for the memory."""
    for module in (files, parquet):
        monkeypatch.setattr(module, "IN_MEMORY", 0)


def encoded(number: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(synthetic.picture(number, (9, 7))).save(file, "PNG")
    return file.getvalue()


def class_label(*names: str) -> dict[str, Any]:
    return {"label": {"_type": "ClassLabel", "names": list(names)}}


def put(
    path: Path,
    numbers: Sequence[int],
    *,
    features: dict[str, Any] | None = None,
    group: int = 3,
    **columns: Any,
) -> Path:
    """Writes a file with the pictures of ``numbers`` in the column ``image``, and other columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"bytes": encoded(number), "path": f"{number}.png"} for number in numbers]
    save(path, {"image": rows, **columns}, features, group)
    return path


def save(path: Path, columns: dict[str, Any], features: dict[str, Any] | None = None, group: int = 3) -> None:
    table = pa.table(columns)
    if features is not None:
        noted = json.dumps({"info": {"features": {**IMAGE, **features}}})
        table = table.replace_schema_metadata({"huggingface": noted})
    pq.write_table(table, path, row_group_size=group)


def read(root: Path | None, **changes: Any) -> Splits:
    return datasets.load("parquet", root, **changes)


def numbers(images: ImageSet | None) -> list[int]:
    assert images is not None
    return [synthetic.number_of(image) for image in images.images]


def classes(images: ImageSet | None) -> list[str]:
    assert images is not None and images.labels is not None and images.labels.dtype == np.int64
    return [images.classes[label] for label in images.labels]


def refusal(root: Path | None, **changes: Any) -> str:
    with pytest.raises(DataError) as refused:
        read(root, **changes)
    text = str(refused.value)
    assert "\n" not in text and len(text) > 20
    return text


# layouts


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train-00000-of-00001.parquet", "test-00000-of-00001.parquet"),
        ("data/train-00000-of-00001-0123456789abcdef.parquet", "data/validation-00000-of-00001.parquet"),
        ("default/train/0000.parquet", "default/test/0000.parquet"),
        ("train/0000.parquet", "val/0000.parquet"),
    ],
)
def test_split_is_in_the_name_of_the_file_or_its_folder(tmp_path: Path, train: str, test: str) -> None:
    put(tmp_path / train, range(5), features=class_label("cat", "dog"), label=[0, 1, 1, 0, 1])
    put(tmp_path / test, [5, 6], features=class_label("cat", "dog"), label=[1, 0])
    splits = read(tmp_path)
    assert numbers(splits.train) == [0, 1, 2, 3, 4] and classes(splits.train) == ["cat", "dog", "dog", "cat", "dog"]
    assert numbers(splits.test) == [5, 6] and classes(splits.test) == ["dog", "cat"]
    assert splits.notes == () and splits.skipped == () and splits.labelled is None


def test_shards_follow_one_another_and_missing_ones_are_noted(tmp_path: Path) -> None:
    put(tmp_path / "train-00001-of-00003.parquet", [3, 4])
    put(tmp_path / "train-00000-of-00003.parquet", [0, 1, 2])
    splits = read(tmp_path)
    assert numbers(splits.train) == [0, 1, 2, 3, 4] and splits.test is None
    assert splits.train.labels is None and splits.train.classes == ()
    (note,) = splits.notes
    assert "2 of 3 shards" in note


def test_one_file_holds_training_images(tmp_path: Path) -> None:
    path = put(tmp_path / "test-00000-of-00001.parquet", range(4))
    put(tmp_path / "train-00000-of-00001.parquet", range(9))
    splits = read(path)
    assert numbers(splits.train) == [0, 1, 2, 3] and splits.test is None


def test_files_without_a_split_are_training_images(tmp_path: Path) -> None:
    put(tmp_path / "b.parquet", [2])
    put(tmp_path / "a.parquet", [0, 1])
    splits = read(tmp_path)
    assert numbers(splits.train) == [0, 1, 2]
    assert "no file is named as a split" in splits.notes[0]


def test_files_without_a_split_name_are_skipped_with_a_note(tmp_path: Path) -> None:
    put(tmp_path / "train-00000-of-00001.parquet", [0, 1])
    save(tmp_path / "words.parquet", {"a": [1]})
    put(tmp_path / ".cache" / "train.parquet", [5])
    splits = read(tmp_path)
    assert numbers(splits.train) == [0, 1]
    assert splits.notes == (f"{tmp_path}: words.parquet is ignored: its name contains no split",)


def test_validation_serves_as_test_if_test_has_no_labels(tmp_path: Path) -> None:
    for split, pictures, label in (("train", [0, 1], [0, 1]), ("test", [2], [-1]), ("validation", [3], [1])):
        put(tmp_path / f"{split}.parquet", pictures, features=class_label("cat", "dog"), label=label)
    splits = read(tmp_path)
    assert numbers(splits.test) == [3] and "validation" in splits.notes[0]
    (tmp_path / "validation.parquet").unlink()
    test = read(tmp_path).test
    assert numbers(test) == [2] and test is not None and test.labels is None


# columns


def test_images_are_found_by_type_or_metadata(tmp_path: Path) -> None:
    rows = [encoded(number) for number in range(3)]
    sound = [{"bytes": b"RIFF", "path": "a.wav"}] * 3
    features = {"sound": {"_type": "Audio"}, "picture": {"_type": "Image"}, "words": [{"_type": "Value"}]}
    save(tmp_path / "a.parquet", {"sound": sound, "words": ["x"] * 3, "picture": rows}, features)
    assert numbers(read(tmp_path / "a.parquet").train) == [0, 1, 2]
    both = [{"bytes": row, "path": None} for row in rows]
    save(tmp_path / "b.parquet", {"first": both, "second": both[::-1]})
    splits = read(tmp_path / "b.parquet")
    assert numbers(splits.train) == [0, 1, 2] and "first, second" in splits.notes[0]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (pa.array([7, 3, 7], pa.int32()), ["7", "3", "7"]),
        (pa.array([-1, 1, 1], pa.int8()), ["-1", "1", "1"]),
        (pa.array(["b", "a", ""]), ["b", "a", ""]),
        (pa.array(["b", "a", "b"]).dictionary_encode(), ["b", "a", "b"]),
        (pa.array([True, False, True]), ["True", "False", "True"]),
        (pa.array([10, 9, 10], pa.uint64()), ["10", "9", "10"]),
    ],
)
def test_integers_and_strings_are_classes(tmp_path: Path, values: Any, expected: list[str]) -> None:
    train = read(put(tmp_path / "a.parquet", range(3), label=values)).train
    assert classes(train) == expected
    assert len(train.classes) == len(set(expected))
    assert list(train.classes) == [str(value) for value in sorted(set(values.to_pylist()))]


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"labels": [0, 1]}, ["0", "1"]),
        ({"coarse_label": [0, 0], "fine_label": [0, 1]}, ["0", "1"]),
        ({"labels": [5, 5], "label": [0, 1]}, ["0", "1"]),
        ({"label": [0.5, 1.5], "fine_label": ["x", "y"]}, ["x", "y"]),
    ],
)
def test_labels_are_found_by_their_usual_names(tmp_path: Path, columns: dict[str, Any], expected: list[str]) -> None:
    assert classes(read(put(tmp_path / "a.parquet", [0, 1], **columns)).train) == expected


def test_labels_are_found_by_the_only_class_label(tmp_path: Path) -> None:
    features = {"breed": {"_type": "ClassLabel", "names": ["pug", "poodle"]}}
    assert classes(read(put(tmp_path / "a.parquet", [0, 1], features=features, breed=[1, 0])).train) == [
        "poodle",
        "pug",
    ]
    splits = read(put(tmp_path / "b.parquet", [0, 1], label=[0.5, 1.5], size=[1, 2]))
    assert splits.train.labels is None and "label holds double, which cannot be a class: there" in splits.notes[0]


def test_label_column_option_selects_the_column(tmp_path: Path) -> None:
    path = put(tmp_path / "a.parquet", [0, 1], label=[0, 0], coarse_label=["x", "y"])
    assert classes(read(path, label_column="coarse_label").train) == ["x", "y"]


@pytest.mark.parametrize("unknown", [None, -1])
def test_labelled_part_of_training_images_is_used_to_evaluate(tmp_path: Path, unknown: int | None) -> None:
    names = class_label("cat", "dog")
    put(tmp_path / "train.parquet", range(5), features=names, label=[0, unknown, 1, unknown, 1])
    put(tmp_path / "test.parquet", [5, 6], features=names, label=[unknown, 1])
    splits = read(tmp_path)
    assert numbers(splits.train) == [0, 1, 2, 3, 4] and splits.train.labels is None
    assert numbers(splits.labelled) == [0, 2, 4] and classes(splits.labelled) == ["cat", "dog", "dog"]
    assert numbers(splits.test) == [6] and classes(splits.test) == ["dog"]
    assert len(splits.notes) == 2


def test_unique_paths_are_image_names(tmp_path: Path) -> None:
    paths = ["a/x.png", "y.png", "same.png", None, "same.png", ""]
    rows = [{"bytes": encoded(i), "path": path} for i, path in enumerate(paths)]
    (tmp_path / "data").mkdir()
    for number in (0, 1):
        save(tmp_path / f"data/train-{number:05d}-of-00002.parquet", {"image": rows[3 * number :][:3]})
    shards = "data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"
    assert list(read(tmp_path).train.names or []) == [
        "a/x.png", "y.png", f"{shards[0]}#2", f"{shards[1]}#0", f"{shards[1]}#1", f"{shards[1]}#2",
    ]  # fmt: skip


# damaged images


@pytest.mark.parametrize("where", ["in memory", "on access"])
def test_damaged_images_are_skipped_and_named(tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if where == "on access":
        for module in (files, parquet):
            monkeypatch.setattr(module, "IN_MEMORY", 0)
    rows: list[Any] = [{"bytes": encoded(i), "path": f"{i}.png"} for i in range(6)]
    rows[1]["bytes"] = rows[1]["bytes"][:-30]
    rows[2]["bytes"] = b"no image"
    rows[3]["bytes"] = None
    rows[4] = None
    save(tmp_path / "train.parquet", {"image": rows, "label": [0, 1, 2, 3, 4, 5]})
    for _ in range(2):  # the second start reads the cache
        splits = read(tmp_path)
        assert numbers(splits.train) == [0, 5] and classes(splits.train) == ["0", "5"]
        assert list(splits.train.names or []) == ["0.png", "5.png"]
        assert dict(splits.skipped).keys() == {"1.png", "2.png", "3.png", "train.parquet#4"}
        assert dict(splits.skipped)["3.png"] == "no bytes"
    assert "4 unreadable images" in refusal(tmp_path, strict=True)


def test_file_with_only_damaged_images_is_refused(tmp_path: Path) -> None:
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    save(tmp_path / "train.parquet", {"image": pa.array([{"path": "/far/away.png"}], kind)})
    assert "no training image could be read, for instance /far/away.png (no bytes)" in refusal(tmp_path)


# images that are decoded on access


def test_images_on_access_equal_those_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    put(tmp_path / "train-00000-of-00002.parquet", range(7), group=2)
    put(tmp_path / "train-00001-of-00002.parquet", range(7, 12), group=100)
    expected = read(tmp_path).train.images
    assert isinstance(expected, np.ndarray) and not cache.exists()
    monkeypatch.setattr(files, "IN_MEMORY", 0)
    for limit in (2**30, 0):  # the encoded images fit in memory, or do not
        monkeypatch.setattr(parquet, "IN_MEMORY", limit)
        train = read(tmp_path).train
        found = pickle.loads(pickle.dumps(train.images))
        assert train.held == 0 and len(found) == 12
        assert all(np.array_equal(found[i], expected[i]) for i in np.random.default_rng(0).permutation(12))
        for path in cache.glob("*.images"):
            path.unlink()


class Numbers(torch.utils.data.Dataset[int]):
    def __init__(self, images: Sequence[np.ndarray]) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> int:
        return synthetic.number_of(self.images[index])


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_read_images_in_any_order(tmp_path: Path, large: None, method: str) -> None:
    images = read(put(tmp_path / "a.parquet", range(20), group=6)).train.images
    order = np.random.default_rng(1).permutation(20).tolist()
    context = {"multiprocessing_context": method, "num_workers": 2}
    batches = DataLoader(Numbers(images), batch_size=3, sampler=order, **context)  # type: ignore[arg-type]
    assert torch.cat(list(batches)).tolist() == order


def test_later_starts_read_the_cached_copy(
    tmp_path: Path, large: None, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    path = put(tmp_path / "train.parquet", range(5))
    before = path.stat()
    os.utime(path, (before.st_atime - 60, before.st_mtime - 60))  # unchanged for a minute
    assert numbers(read(tmp_path).train) == [0, 1, 2, 3, 4]
    with monkeypatch.context() as patch:
        patch.setattr(parquet.Shard, "images", None)
        patch.setattr(parquet.Shard, "paths", None)
        patch.setattr(files, "check_whole", None)
        again = read(tmp_path).train
        assert numbers(again) == [0, 1, 2, 3, 4] and list(again.names or [])[-1] == "4.png"
    put(path, range(10, 14))
    assert numbers(read(tmp_path).train) == [10, 11, 12, 13]
    assert len(list(cache.glob("*.images"))) == 1 and not list(cache.glob("*.part"))


@pytest.mark.parametrize("damage", ["short", "empty", "missing"])
def test_damaged_copy_is_written_again(tmp_path: Path, large: None, cache: Path, damage: str) -> None:
    put(tmp_path / "train.parquet", range(5))
    read(tmp_path)
    (copy,) = cache.glob("*.images")
    content = copy.read_bytes()
    copy.unlink() if damage == "missing" else copy.write_bytes(content[:-1] if damage == "short" else b"")
    assert numbers(read(tmp_path).train) == [0, 1, 2, 3, 4]
    assert copy.read_bytes() == content


def test_lack_of_disk_space_is_refused_before_copying(
    tmp_path: Path, large: None, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    put(tmp_path / "train.parquet", range(5))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(packed.shutil, "disk_usage", lambda path: usage(10, 0, 10))
    text = refusal(tmp_path)
    assert str(cache) in text and "XDG_CACHE_HOME" in text
    assert not list(cache.glob("*.images")) and not list(cache.glob("*.part"))


def test_unwritable_cache_folder_is_refused(tmp_path: Path, large: None, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    text = refusal(put(tmp_path / "train.parquet", range(5)))
    assert str(tmp_path / "file") in text and "XDG_CACHE_HOME" in text


# what is refused


def test_file_that_is_not_parquet_is_named(tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    for content in (b"", b"PAR1 but not for long", b"x" * 100):
        path.write_bytes(content)
        assert refusal(tmp_path).startswith(f"{path}: cannot be read as a Parquet file: ")


def test_damaged_page_is_reported(tmp_path: Path) -> None:
    path = put(tmp_path / "train.parquet", range(40), group=40)
    content = bytearray(path.read_bytes())
    content[4:200] = bytes(196)  # the first page's header
    path.write_bytes(content)
    assert refusal(tmp_path).startswith(f"{path}: cannot be read as a Parquet file: ")


def test_files_without_images_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    save(path, {"text": ["a"], "label": [1], "blob": [b"x"]})
    text = refusal(tmp_path)
    assert text.startswith(f"{path}: no column holds images") and "text (string), label (int64), blob (binary)" in text


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("lable", "has no such column; did you mean label?"),
        ("weight", "holds double there; labels are integers or text"),
        ("image", "holds struct<"),
        ("tags", "holds list<"),
    ],
)
def test_column_that_holds_no_labels_is_refused(tmp_path: Path, name: str, words: str) -> None:
    put(tmp_path / "train.parquet", [0, 1], label=[0, 1], weight=[0.5, 1.0], tags=[[1], [2]])
    text = refusal(tmp_path, label_column=name)
    assert text.startswith(f"--label-column {name}: {tmp_path / 'train.parquet'} ") and words in text


def test_label_column_is_refused_for_other_data_sets(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^--label-column fine: digits is not in tables; drop the flag"):
        datasets.load("digits", None, label_column="fine")


@pytest.mark.parametrize(
    ("second", "how"),
    [
        ({"label": ["a", "b"]}, "the column label is string here and int64 there"),
        ({}, "the column label is missing here and int64 there"),
        ({"label": [0, 1], "features": class_label("a", "b")}, "the column label is with other class names"),
    ],
)
def test_shards_with_different_schemas_are_refused(tmp_path: Path, second: dict[str, Any], how: str) -> None:
    put(tmp_path / "train-00000-of-00002.parquet", [0, 1], label=[0, 1])
    path = put(tmp_path / "train-00001-of-00002.parquet", [2, 3], **second)
    text = refusal(tmp_path)
    assert text.startswith(f"{path}: its schema differs from that of train-00000-of-00002.parquet: ") and how in text


def test_invalid_classes_are_refused(tmp_path: Path) -> None:
    put(tmp_path / "a" / "train.parquet", [0, 1], features=class_label("cat", "dog"), label=[0, 2])
    assert "the train split holds 2, but there are names for 2 classes only" in refusal(tmp_path / "a")
    put(tmp_path / "b" / "train.parquet", [0, 1], label=["x", "y"])
    put(tmp_path / "b" / "test.parquet", [2], label=["z"])
    assert "the test split holds 'z', a class without training images" in refusal(tmp_path / "b")


def test_unclear_layouts_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert refusal(tmp_path / "empty").startswith(f"{tmp_path / 'empty'}: holds no Parquet file; ")
    assert refusal(tmp_path / "none").startswith(f"{tmp_path / 'none'}: no such file or folder; ")
    assert "--data-root" in refusal(None)
    put(tmp_path / "tests" / "test.parquet", [0])
    assert refusal(tmp_path / "tests").endswith("holds test.parquet but no train-*.parquet")
    for name in ("fine", "coarse"):
        put(tmp_path / "two" / name / "train.parquet", [0])
    assert "in the folders coarse, fine; pass one of them as --data-root" in refusal(tmp_path / "two")


def test_missing_pyarrow_is_named_with_the_pip_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "train.parquet", [0])
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)  # importing it fails
    assert re.search(r"needs the package pyarrow, .*; run pip install -r requirements-parquet\.txt$", refusal(tmp_path))
    assert len(datasets.load("digits", None).train) == 1437
