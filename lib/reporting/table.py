"""The table of ``--export-table``: a row for each image, for viewers of embeddings, data frames and databases.

Letters: N training samples, M samples of all splits, D embedding, K neighbours.
"""

from __future__ import annotations

import csv
import importlib
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image

import datasets
from lib.config.options import Options
from lib.errors import UsageError
from lib.evaluation import findings
from lib.evaluation.nearest_neighbours import neighbours_of_arrays
from lib.method.discovery import discover
from lib.method.neighbourhoods import Neighbourhoods
from lib.reporting.export import Split, report_file
from lib.reporting.report_data import SEARCHED, SEED, drawn
from lib.reporting.training_figures import to_plane
from lib.session.atomic_files import csv_text, new_files
from lib.session.console import plural, progress

NEVER = -1
"""As a round: the sample was never an anchor. As a label: unknown."""
MAPPED = 5_000
"""Maximum number of images in t-SNE; the others are placed close to the most similar of them."""
BESIDE = 3
"""Number of t-SNE images whose mean position is used for another image."""
ROWS = 1_000
"""Rows written at a time; only their thumbnails are in memory."""
SIDE, QUALITY = 128, 85
"""Maximum length of the longer edge of a thumbnail, in pixels, and JPEG quality of reduced thumbnails."""


def became_anchor(discoveries: Iterable[tuple[int, Neighbourhoods]], samples: int) -> np.ndarray:
    """The first of the given rounds in which each sample was an anchor.

    Args:
        discoveries: (round, neighbourhoods) in any order.
        samples: N.

    Returns:
        (N,) rounds; ``NEVER`` for those that were not an anchor in any.

    Raises:
        UsageError: a discovery has another number of samples.
    """
    first = np.full(samples, NEVER)
    for round, found in sorted(
        discoveries, key=lambda pair: -pair[0]
    ):  # in reverse order: earlier rounds overwrite later ones
        if len(found.position) != samples:
            raise UsageError(
                f"round {round}: its anchors are from {len(found.position)} samples, not {samples}; choose the data "
                "that the session was trained on"
            )
        first[found.anchors.cpu().numpy()] = round
    return first


def columns(
    splits: Sequence[Split], labelled: datasets.ImageSet | None, rounds: np.ndarray, options: Options
) -> dict[str, Any]:
    """The columns without thumbnails, as described in docs/evaluation.md; None if a value is unknown.

    Args:
        splits: the training images first.
        labelled: the training images that have labels, if only some have.
        rounds: (N,), as returned by ``became_anchor``.
        options: temperature, and number of neighbours and resolution of the groups.

    Raises:
        UsageError: an embedding is NaN or infinite.
    """
    train, *others = splits
    samples, sets = len(train.images), [split.images for split in splits]
    embeddings = np.concatenate([split.embeddings for split in splits])  # (M, D)
    total = len(embeddings)
    labels = np.concatenate([np.full(len(s), NEVER) if s.labels is None else s.labels for s in sets])  # (M,)
    if labelled:
        labels[labelled.indices] = labelled.labels
    classes = next((each.classes for each in (*sets, labelled) if each and each.classes), ())
    known = labels[:samples] if (labels[:samples] != NEVER).all() and samples else None
    searched = drawn(samples, SEARCHED)
    constants = {"neighbours": options.graph_neighbours, "resolution": options.graph_resolution, "seed": SEED}
    found = findings.find(train.embeddings[searched], None if known is None else known[searched], **constants)  # type: ignore[arg-type]
    nearest, cosines = found.neighbours, found.similarities  # (N, K)
    if len(searched) < samples:
        nearest, cosines = neighbours_of_arrays(train.embeddings, options.graph_neighbours)
    for split in others:  # their neighbours are training images, too
        near = neighbours_of_arrays(train.embeddings, nearest.shape[1], split.embeddings)
        nearest, cosines = (np.concatenate(pair) for pair in zip((nearest, cosines), near, strict=True))
    distances = 1 - cosines  # (M, K)
    rows = torch.from_numpy(train.embeddings)
    entropy = discover(rows, temperature=options.npc_temperature, anchors=0, size=1).entropy.numpy()
    points = to_map(embeddings)

    def of_training(values: np.ndarray, index: np.ndarray | None = None) -> list[Any]:
        """Values of all rows from those of the training images, or of a subset of them; None for the others."""
        column: list[Any] = [None] * total
        for row, value in zip(range(samples) if index is None else index, values.tolist(), strict=True):
            column[row] = value
        return column

    copies = of_training(searched[found.copies], searched)
    disagreement = findings.label_disagreement(nearest, labels).tolist() if known is not None else [None] * total
    return {
        "id": list(range(total)),
        "file": [_text(each.names[n]) if each.names else None for each in sets for n in range(len(each))],
        "split": [split.name for split in splits for _ in range(len(split.images))],
        "index": [index for each in sets for index in each.indices.tolist()],
        "class": [None if label == NEVER else _text(classes[label]) for label in labels.tolist()],
        "entropy": of_training(entropy),
        "round": [None if round == NEVER else round for round in of_training(rounds)],
        "neighbours": [{"ids": i, "distances": d} for i, d in zip(nearest.tolist(), distances.tolist(), strict=True)],
        "nearest_distance": distances[:, 0].tolist() if distances.shape[1] else [None] * total,
        "copy_of": [None if copy == row else copy for row, copy in enumerate(copies)],
        "group": of_training(found.groups, searched),
        "outlier_score": of_training(found.outlier_scores, searched),
        "label_disagreement": [None if label == NEVER else d for d, label in zip(disagreement, labels, strict=True)],
        "x": [None] * total if points is None else points[:, 0].tolist(),
        "y": [None] * total if points is None else points[:, 1].tolist(),
        "embedding": embeddings,
    }


def _text(name: str) -> str:
    """Text as valid UTF-8: other bytes of a file name become escapes such as ``\\udcff``."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def to_map(embeddings: np.ndarray) -> np.ndarray | None:
    """Embeddings (M, D) in the plane (M, 2): a subset by t-SNE, the others at the mean of the most similar of these.

    None if there are fewer than five embeddings, or all are equal.
    """
    chosen = drawn(len(embeddings), MAPPED)
    placed = to_plane(embeddings[chosen])
    if isinstance(placed, str) or len(chosen) == len(embeddings):
        return None if isinstance(placed, str) else placed[0]
    nearest, _ = neighbours_of_arrays(embeddings[chosen], BESIDE, embeddings)  # (M, BESIDE)
    points: np.ndarray = placed[0][nearest].mean(axis=1)
    points[chosen] = placed[0]
    return points


def save(path: Path, table: dict[str, Any], images: Sequence[Sequence[np.ndarray]] | None) -> None:
    """Writes the columns to a ``.parquet`` or ``.csv`` file.

    CSV has no thumbnails and no embeddings; its lists are JSON, and text is passed through ``csv_text``.

    Args:
        path: the file.
        table: the columns, as returned by ``columns``.
        images: the images of each split, for thumbnails; None: no thumbnails.

    Raises:
        UsageError: the file exists or cannot be written.
    """
    with new_files(path) as (file,):
        if path.suffix.lower() == ".csv":
            _write_csv(file, table)
        else:
            _write_parquet(file, table, images)
    report_file("table", path, plural(len(table["id"]), "image"))


def _write_csv(file: BinaryIO, table: dict[str, Any]) -> None:
    shown = {name: column for name, column in table.items() if name not in ("neighbours", "embedding")}
    shown["neighbours"] = [json.dumps(found["ids"]) for found in table["neighbours"]]
    shown["distances"] = [
        json.dumps([round(value, 6) for value in found["distances"]]) for found in table["neighbours"]
    ]
    text = io.TextIOWrapper(file, "utf-8", newline="")
    writer = csv.writer(text)
    writer.writerow(shown)
    for row in zip(*shown.values(), strict=True):
        writer.writerow([_cell(value) for value in row])
    text.detach()  # flushes without closing the file


def _cell(value: Any) -> Any:
    """A CSV cell: text without formulas, and numbers with the digits of float32."""
    if isinstance(value, str):
        return csv_text(value)
    return round(value, 6) if isinstance(value, float) else value


def _write_parquet(file: BinaryIO, table: dict[str, Any], images: Sequence[Sequence[np.ndarray]] | None) -> None:
    pa, parquet = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    real, whole, text = pa.float32(), pa.int64(), pa.string()
    kinds = {
        "file": text,
        "split": text,
        "class": text,
        **dict.fromkeys(("id", "index", "round", "copy_of", "group"), whole),
        "neighbours": pa.struct({"ids": pa.list_(whole), "distances": pa.list_(real)}),
        "embedding": pa.list_(real),
    }
    fields = [(name, kinds.get(name, real)) for name in table]
    metadata = None
    if images is not None:  # the format of Hugging Face's Image, so that viewers show it
        fields.append(("image", pa.struct({"bytes": pa.binary(), "path": text})))
        metadata = {"huggingface": json.dumps({"info": {"features": {"image": {"_type": "Image"}}}})}
    schema = pa.schema(fields, metadata)
    pictures = (image for part in images or () for image in part)
    with parquet.ParquetWriter(file, schema) as writer:
        for start in progress(range(0, len(table["id"]), ROWS), "writing the table", "block"):
            block = {name: column[start : start + ROWS] for name, column in table.items()}
            if images is not None:
                pairs = zip(block["file"], pictures, strict=False)
                block["image"] = [{"bytes": thumbnail(image), "path": path} for path, image in pairs]
            arrays = [pa.array(list(block[field.name]), field.type) for field in schema]
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))


def thumbnail(image: np.ndarray) -> bytes:
    """An image (H, W, 3) as PNG, or reduced to ``SIDE`` pixels as JPEG if it is larger."""
    picture, data = Image.fromarray(image), io.BytesIO()
    if max(picture.size) <= SIDE:
        picture.save(data, "PNG")
    else:
        picture.thumbnail((SIDE, SIDE))
        picture.save(data, "JPEG", quality=QUALITY)
    return data.getvalue()
