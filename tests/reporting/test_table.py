"""The table with a row for each image: read back and compared with plain loops and scikit-learn."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.neighbors import NearestNeighbors

import oracles
import synthetic
from datasets import ImageSet
from lib.config.options import Options
from lib.errors import UsageError
from lib.evaluation import findings
from lib.method.neighbourhoods import Neighbourhoods
from lib.reporting import export, table
from lib.reporting.export import Split
from lib.reporting.report_data import SEED
from lib.reporting.table import NEVER, became_anchor

CLASSES = ("cat", "dog", "=1+1")
FORMULAS = ["=1+1.png", "+a.png", "-a.png", "@a.png", "\ta.png", "\ra.png", "-inf", "+nan"]
PLAIN = ["a=b.png", "-5", "1e5", "ü日本", 'a,"b"', "line\nbreak", "NA"]


def split_of(name: str, count: int, *, seed: int, labelled: bool = True, named: bool = True, size: int = 8) -> Split:
    images = [synthetic.picture(number % 64, (size, size)) for number in range(count)]
    names = [f"{name}/{number}.png" for number in range(count)] if named else None
    known = (np.arange(count) % len(CLASSES), CLASSES) if labelled else (None, ())
    embeddings = oracles.rows("random", count, 6, seed).astype(np.float32)
    return Split(name, ImageSet(images, *known, names), embeddings)


OPTIONS = Options(graph_neighbours=4, npc_temperature=0.2)
ROUNDS = np.arange(40) % 4 - 1


def splits() -> list[Split]:
    return [split_of("train", 40, seed=0), split_of("val", 7, seed=1), split_of("test", 9, seed=2)]


def columns(parts: list[Split] | None = None) -> dict[str, Any]:
    return columns_of(parts) if parts else whole()


def columns_of(parts: list[Split]) -> dict[str, Any]:
    return table.columns(parts, None, np.resize(ROUNDS, len(parts[0].images)), OPTIONS)


@cache
def whole() -> dict[str, Any]:
    """The columns of ``splits()``, cached because t-SNE takes time."""
    return columns_of(splits())


def parquet(path: Path, images: list[Any] | None = None, parts: list[Split] | None = None) -> Any:
    pytest.importorskip("pyarrow")
    table.save(path, columns(parts), images)
    return pytest.importorskip("pandas").read_parquet(path)


# content of the rows


def test_rows_are_the_splits_in_order() -> None:
    found = columns()
    assert found["id"] == list(range(56))
    assert found["split"] == ["train"] * 40 + ["val"] * 7 + ["test"] * 9
    assert found["index"] == [*range(40), *range(7), *range(9)]
    assert found["file"][38:42] == ["train/38.png", "train/39.png", "val/0.png", "val/1.png"]
    assert found["class"][:4] == ["cat", "dog", "=1+1", "cat"] and found["class"][40] == "cat"


def test_neighbours_of_every_row_are_the_nearest_training_images() -> None:
    found, parts = columns(), splits()
    rows = np.concatenate([split.embeddings for split in parts])
    oracle = NearestNeighbors(n_neighbors=5, metric="cosine", algorithm="brute").fit(parts[0].embeddings)
    distances, indices = oracle.kneighbors(rows)
    for row, near in enumerate(found["neighbours"]):
        others = [(i, d) for i, d in zip(indices[row], distances[row], strict=True) if i != row][:4]
        assert near["ids"] == [i for i, _ in others]
        assert near["distances"] == pytest.approx([d for _, d in others], abs=1e-5)
        assert found["nearest_distance"][row] == near["distances"][0]
        other = [CLASSES[i % 3] != found["class"][row] for i in near["ids"]]
        assert found["label_disagreement"][row] == pytest.approx(np.mean(other))


def test_only_training_images_have_entropy_and_round() -> None:
    found, train = columns(), splits()[0].embeddings
    assert found["entropy"][:40] == pytest.approx([oracles.entropy(row, train, 0.2) for row in train], abs=1e-5)
    assert found["round"][:40] == [None if round == NEVER else round for round in ROUNDS.tolist()]
    assert found["entropy"][40:] == found["round"][40:] == found["group"][40:] == [None] * 16


def test_groups_copies_and_outliers_equal_the_findings() -> None:
    parts = splits()
    parts[0].embeddings[[5, 9]] = parts[0].embeddings[2]
    found, train = columns(parts), parts[0]
    expected = findings.find(train.embeddings, train.images.labels, neighbours=4, resolution=1.0, seed=SEED)
    assert found["group"][:40] == expected.groups.tolist()
    assert found["outlier_score"][:40] == expected.outlier_scores.tolist()
    assert found["label_disagreement"][:40] == pytest.approx(expected.label_disagreement)
    assert [(row, copy) for row, copy in enumerate(found["copy_of"]) if copy is not None] == [(5, 2), (9, 2)]


def test_findings_of_many_images_use_a_subset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "SEARCHED", 30)
    found, searched = columns(splits()), table.drawn(40, 30).tolist()
    assert [row for row, group in enumerate(found["group"]) if group is not None] == searched
    assert [row for row, score in enumerate(found["outlier_score"]) if score is not None] == searched
    assert found["neighbours"] == columns()["neighbours"] and found["entropy"] == columns()["entropy"]


def test_unknown_labels_and_names_are_null() -> None:
    found = columns([split_of("train", 12, seed=0, labelled=False, named=False), split_of("test", 5, seed=1)])
    assert found["class"] == [None] * 12 + ["cat", "dog", "=1+1", "cat", "dog"]
    assert found["file"][:12] == [None] * 12 and found["label_disagreement"] == [None] * 17
    partly, labelled = split_of("train", 12, seed=0, labelled=False), split_of("train", 12, seed=0).images
    found = table.columns([partly], labelled.take(np.array([0, 5])), np.zeros(12), OPTIONS)
    assert found["class"] == ["cat", *[None] * 4, "=1+1", *[None] * 6]


@pytest.mark.parametrize("count", [2, 4])
def test_few_images_have_rows_without_map_coordinates(count: int) -> None:
    found = columns([split_of("train", count, seed=0)])
    assert found["x"] == found["y"] == [None] * count
    assert [len(near["ids"]) for near in found["neighbours"]] == [min(4, count - 1)] * count


def test_other_images_are_placed_at_their_nearest_on_the_map(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = splits()[0].embeddings
    monkeypatch.setattr(table, "MAPPED", 25)
    points, chosen = table.to_map(rows), table.drawn(40, 25)
    assert points is not None and points.shape == (40, 2) and np.isfinite(points).all()
    for row in sorted(set(range(40)) - set(chosen.tolist())):
        nearest = np.argsort(-(rows[chosen] @ rows[row]))[: table.BESIDE]
        assert points[row] == pytest.approx(points[chosen[nearest]].mean(axis=0), abs=1e-4)


def test_nonfinite_embeddings_are_refused() -> None:
    parts = splits()
    parts[0].embeddings[3, 2] = np.nan
    with pytest.raises(UsageError, match="NaN or infinite"):
        columns(parts)


# Parquet


def test_pandas_and_pyarrow_read_the_table(tmp_path: Path) -> None:
    found, expected = parquet(tmp_path / "out.parquet"), columns()
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    assert list(found.columns) == list(expected) and len(found) == 56
    assert found["file"].tolist() == expected["file"] and found["class"].tolist() == expected["class"]
    assert found["entropy"].dropna().tolist() == pytest.approx(expected["entropy"][:40])
    assert found["entropy"].isna().tolist() == [False] * 40 + [True] * 16
    assert np.array_equal(np.stack(found["embedding"]), expected["embedding"])
    assert found["neighbours"][3]["ids"].tolist() == expected["neighbours"][3]["ids"]
    schema = pq.read_schema(tmp_path / "out.parquet")
    assert schema.field("embedding").type == pa.list_(pa.float32())
    assert schema.field("neighbours").type == pa.struct(
        {"ids": pa.list_(pa.int64()), "distances": pa.list_(pa.float32())}
    )
    types = {name: str(schema.field(name).type) for name in expected if name not in ("neighbours", "embedding")}
    assert set(types.values()) == {"int64", "string", "float"}
    assert [name for name, kind in types.items() if kind == "int64"] == ["id", "index", "round", "copy_of", "group"]


@pytest.mark.parametrize(("size", "kind", "edge"), [(8, "PNG", 8), (128, "PNG", 128), (200, "JPEG", 128)])
def test_thumbnails_are_stored_as_hugging_face_images(
    tmp_path: Path, size: int, kind: str, edge: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "ROWS", 3)
    parts = [split_of("train", 7, seed=0, size=size), split_of("test", 5, seed=1, named=False, size=size)]
    found = parquet(tmp_path / "out.parquet", [part.images.images for part in parts], parts)
    numbers, paths = [*range(7), *range(5)], [*(f"train/{number}.png" for number in range(7)), *[None] * 5]
    assert [row["path"] for row in found["image"]] == paths
    for number, row in zip(numbers, found["image"], strict=True):
        with Image.open(io.BytesIO(row["bytes"])) as picture:
            assert (picture.format, picture.size) == (kind, (edge, edge))
            assert synthetic.number_of(np.asarray(picture)) == number
    schema = pytest.importorskip("pyarrow.parquet").read_schema(tmp_path / "out.parquet")
    assert json.loads(schema.metadata[b"huggingface"])["info"]["features"] == {"image": {"_type": "Image"}}


def test_table_with_thumbnails_is_read_as_a_data_set(tmp_path: Path) -> None:
    import datasets

    parts = [split_of("train", 7, seed=0)]
    parquet(tmp_path / "train.parquet", [parts[0].images.images], parts)
    train = datasets.load("parquet", tmp_path, label_column="class").train
    assert np.array_equal(np.stack(train.images), np.stack(parts[0].images.images))
    assert list(train.names or []) == parts[0].images.names and train.labels is not None
    assert [train.classes[label] for label in train.labels] == [CLASSES[label] for label in parts[0].images.labels]


def test_file_names_that_are_not_utf8_are_escaped(tmp_path: Path) -> None:
    part = split_of("train", 3, seed=0)
    names = ["b/\udcff raw.png", "é 狗.png", "c"]
    odd = replace(part, images=replace(part.images, names=names))
    assert parquet(tmp_path / "out.parquet", None, [odd])["file"].tolist() == ["b/\\udcff raw.png", "é 狗.png", "c"]


# CSV


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_csv_has_the_same_values_without_vectors(tmp_path: Path) -> None:
    table.save(tmp_path / "out.csv", columns(), None)
    expected, rows = columns(), rows_of(tmp_path / "out.csv")
    assert set(expected) - set(rows[0]) == {"embedding"} and set(rows[0]) - set(expected) == {"distances"}
    for number, row in enumerate(rows):
        assert json.loads(row["neighbours"]) == expected["neighbours"][number]["ids"]
        assert json.loads(row["distances"]) == pytest.approx(expected["neighbours"][number]["distances"], abs=1e-6)
        for name in ("entropy", "x", "outlier_score", "label_disagreement", "group", "round"):
            value = expected[name][number]
            assert row[name] == "" if value is None else float(row[name]) == pytest.approx(value, abs=1e-5)
    assert not (tmp_path / "out.csv").read_bytes().startswith(b"\xef\xbb\xbf")


def test_csv_text_is_never_a_spreadsheet_formula(tmp_path: Path) -> None:
    names = [*FORMULAS, *PLAIN]
    part = split_of("train", len(names), seed=0)
    odd = replace(part, images=replace(part.images, names=names))
    table.save(tmp_path / "out.csv", columns([odd]), None)
    rows = rows_of(tmp_path / "out.csv")
    assert [row["file"] for row in rows] == [*("'" + name for name in FORMULAS), *PLAIN]
    assert [row["class"] for row in rows[:3]] == ["cat", "dog", "'=1+1"]


# paths


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("out.txt", r"^--export-table .*out.txt: the file name must end in .parquet or .csv$"),
        ("taken.csv", r"taken.csv: already exists; choose another name, or move the file away$"),
        ("link.csv", r"link.csv: already exists"),
        ("no/out.parquet", r"the folder .*no does not exist; create it, or choose another folder$"),
        ("x" * 252 + ".csv", r"cannot be written: File name too long; choose another name$"),
        ("a\0b.csv", r"cannot be written: .*null"),
    ],
)
def test_unusable_paths_are_refused(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "taken.csv").write_text("mine")
    (tmp_path / "link.csv").symlink_to("nowhere")
    with pytest.raises(UsageError, match=words):
        export.check(Options(export_table=tmp_path / name))
    assert (tmp_path / "taken.csv").read_text() == "mine"


def test_usable_paths_are_accepted_and_nothing_is_written(tmp_path: Path) -> None:
    export.check(Options())
    export.check(Options(export_table=tmp_path / "OUT.CSV"))
    assert list(tmp_path.iterdir()) == []


def test_thumbnails_need_a_parquet_file(tmp_path: Path) -> None:
    for options in (Options(export_thumbnails=True), Options(export_thumbnails=True, export_table=tmp_path / "a.csv")):
        with pytest.raises(UsageError, match=r"^--export-thumbnails: needs --export-table with a \.parquet file"):
            export.check(options)


def test_missing_pyarrow_is_named_with_the_pip_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)  # importing it fails
    with pytest.raises(UsageError, match=r"pyarrow, .*; run pip install -r requirements-parquet.txt, or name a .csv"):
        export.check(Options(export_table=tmp_path / "out.parquet"))
    export.check(Options(export_table=tmp_path / "out.csv"))


@pytest.mark.parametrize("name", ["out.csv", "out.parquet"])
def test_failed_write_leaves_no_table(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    found = columns()
    (tmp_path / name).write_text("mine")
    with pytest.raises(UsageError, match="already exists"):
        table.save(tmp_path / name, found, None)
    assert (tmp_path / name).read_text() == "mine"
    (tmp_path / name).unlink()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(TypeError):  # during the write
        table.save(tmp_path / name, {**found, "neighbours": [None] * 56, "split": [object()] * 56}, None)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UsageError, match=r"cannot be written: No space left on device; choose another path$"):
        table.save(tmp_path / name, found, None)
    assert list(tmp_path.iterdir()) == []


def test_exported_table_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("and"), "propagate", True)
    caplog.set_level(logging.INFO, "and")
    path = tmp_path / "out.csv"
    table.save(path, columns(), None)
    assert caplog.messages == [f"table: {path} (56 images; {path.stat().st_size:,} bytes)"]


# The round of each anchor.


def found(anchors: list[int], samples: int) -> Neighbourhoods:
    others = [sample for sample in range(samples) if sample not in anchors]
    position = torch.tensor(oracles.positions(anchors, samples))
    near = torch.zeros(len(anchors), 1, dtype=torch.long)
    return Neighbourhoods(torch.tensor(anchors), torch.tensor(others), position, near, torch.zeros(samples))


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 1, 0, 2]])
def test_round_of_a_sample_is_its_first_as_an_anchor(order: list[int]) -> None:
    rounds = {0: [], 1: [4, 2], 2: [0, 2], 3: [1, 0, 4]}
    nothing = Neighbourhoods.none(6)
    given = [(round, found(rounds[round], 6) if rounds[round] else nothing) for round in order]
    assert became_anchor(iter(given), 6).tolist() == [2, 3, 1, NEVER, 1, NEVER]
    assert became_anchor([], 3).tolist() == [NEVER] * 3


def test_anchors_of_another_data_set_are_refused() -> None:
    with pytest.raises(UsageError, match=r"^round 2: its anchors are from 5 samples, not 6; choose the data .*$"):
        became_anchor([(1, found([1], 6)), (2, found([1], 5))], 6)
