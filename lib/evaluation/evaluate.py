"""Evaluation of a network by every protocol of the options; results as a table and as JSON.

Letters: N training samples, M test images, D embedding size.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lib.config.options import Options
from lib.data.loader import Loader
from lib.distributed.processes import Ranks
from lib.distributed.sharded import ShardedRows
from lib.errors import UsageError
from lib.evaluation import clustering, features, graph_clustering, linear_probe
from lib.evaluation.classifier import Accuracy, Evaluator
from lib.evaluation.nearest_neighbours import nearest_neighbours
from lib.method import diagnostics
from lib.session.atomic_files import atomic_write
from lib.session.console import logger, table

RECOMPUTED, BANK = "recomputed with the test transform", "memory bank of the checkpoint"
TITLES = {
    "top1": "top-1",
    "top5": "top-5",
    "best_top1": "top-1 best",
    "groups": "groups",
    "modularity": "modularity",
    "nmi": "NMI",
    "ari": "ARI",
    "accuracy": "accuracy",
    "silhouette": "silhouette",
    "entropy_50": "median entropy",
    "reciprocal": "reciprocal",
    "orphans": "orphans",
    "hubness": "hubness",
    "largest_hub": "largest hub",
}
"""Name of a figure -> column title."""
SHARES = {"top1", "top5", "best_top1", "accuracy", "reciprocal", "orphans", "largest_hub"}
"""Figures that are printed as percentages."""
COUNTS = {"groups"}
"""Figures that are printed as whole numbers."""
LABELLED = {"knn", "nn", "linear"}
"""Protocols that require labelled training and test images."""


@dataclass(frozen=True)
class EvaluationInputs:
    """Network, data and settings of an evaluation.

    Attributes:
        network: maps images to embeddings.
        train, test: loaders with the test transform, in order; test is None without test images.
        train_labels, test_labels: class indices (N,) and (M,), or None.
        classes: number of classes, 0 without labels.
        memory: (N, D), the memory bank of the checkpoint, or None; the values are needed on rank 0 only.
        embed: the stage whose features are evaluated besides the embeddings (``fc``).
        evaluators: the kNN and NN evaluators that the options request.
        seed: seed of the linear probe and of k-means.
        device: device of the network.
        ranks: the ranks of the run.
    """

    network: torch.nn.Module
    train: Loader
    test: Loader | None
    train_labels: np.ndarray | None
    test_labels: np.ndarray | None
    classes: int
    memory: torch.Tensor | None
    evaluators: Sequence[Evaluator]
    seed: int
    device: torch.device
    ranks: Ranks = field(default_factory=Ranks)
    embed: str = "fc"


@dataclass(frozen=True)
class Row:
    """Result of one protocol: description, source of the features, and figures by the names of ``TITLES``."""

    protocol: str
    features: str
    figures: dict[str, float]


def evaluate(inputs: EvaluationInputs, options: Options) -> list[Row]:
    """Evaluates every protocol of the options, with one forward pass over each split.

    The published kNN accuracy of the reference uses the memory bank as training features; its test run would recompute
    them. The two differ, so both are reported. Without labels, clustering and statistics of the neighbourhoods replace
    kNN and NN. A collective: call it on every rank.

    Returns:
        One row per protocol and source of features; clustering appears on rank 0 only.

    Raises:
        UsageError: the linear probe is requested without labels, or for a stage that the network does not have; or
            protocol graph without its package.
    """
    labelled = inputs.train_labels is not None and inputs.test_labels is not None
    needing = [name for name in options.protocol if name in LABELLED and not labelled]
    if "linear" in needing:
        raise UsageError(
            "--protocol linear needs labelled training and test images, but there are none; use --protocol cluster "
            "or graph without labels"
        )
    if needing:
        logger().warning(
            "--protocol %s needs labelled training and test images, but there are none; label-free figures are "
            "reported instead",
            " ".join(needing),
        )
    if "graph" in options.protocol or needing:
        graph_clustering.leiden()  # a missing package is noticed before the features are computed
    probed = options.linear_layers if "linear" in options.protocol else ()
    # test images first: there are fewer of them, so a full disk is noticed sooner
    test = _features(inputs, inputs.test, probed, "test features") if labelled and inputs.test else {}
    held = sum(test[layer].nbytes for layer in probed if test[layer].dtype == torch.float32)  # the others are in files
    train = _features(inputs, inputs.train, probed, "training features", held)
    rows: list[Row] = []
    for evaluator in inputs.evaluators:
        rows += _knn_rows(inputs, evaluator, train["embedding"], test["embedding"])
        if inputs.embed != "fc":
            pooled = ShardedRows(train["chosen"], inputs.train.samples, inputs.ranks)
            where = f"{inputs.embed}, pooled, {RECOMPUTED}"
            rows.append(Row(evaluator.name, where, _figures(evaluator.classify(test["chosen"], pooled))))
    rows += [_linear_probe_row(inputs, layer, train[layer], test[layer]) for layer in probed]
    rows += _label_free_rows(inputs, options, ShardedRows(train["chosen"], inputs.train.samples, inputs.ranks), needing)
    return rows


def _label_free_rows(
    inputs: EvaluationInputs, options: Options, embeddings: ShardedRows, needing: Sequence[str]
) -> list[Row]:
    """Rows that need no labels, from the embeddings (N, D) of the training images; ``needing``: replaced protocols."""
    where, rows = f"training images, {RECOMPUTED}", []
    clusters = inputs.classes or options.clusters
    if needing:
        clusters = min(clusters, embeddings.samples)
        temperature, size = options.npc_temperature, options.ANs_size
        figures, _ = diagnostics.measure(embeddings, None, round=0, temperature=temperature, size=size)
        shown = {name: value for name, value in figures.items() if name in TITLES and value is not None}
        rows.append(Row(f"neighbourhoods (k={size}, tau={temperature:g})", where, shown))
    nearest = None
    if "graph" in options.protocol or needing:
        found = nearest_neighbours(embeddings, options.graph_neighbours)
        nearest = ShardedRows(found.samples, embeddings.samples, inputs.ranks).gather_to_rank0().cpu().numpy()
    if nearest is None and "cluster" not in options.protocol:
        return rows
    gathered = embeddings.gather_to_rank0().cpu().numpy()
    if not inputs.ranks.is_rank0:  # the clusterings take little time, and their packages run in one process
        return rows
    clusterings = []
    if "cluster" in options.protocol or needing:
        clusterings.append(clustering.cluster(gathered, inputs.train_labels, clusters=clusters, seed=inputs.seed))
    if nearest is not None:
        resolution = options.graph_resolution
        clusterings.append(
            graph_clustering.cluster(gathered, nearest, inputs.train_labels, resolution=resolution, seed=inputs.seed)
        )
    return rows + [Row(found.name, where, found.figures) for found in clusterings]


def _features(
    inputs: EvaluationInputs, batches: Loader, layers: Sequence[str], what: str, held: int = 0
) -> dict[str, torch.Tensor]:
    """Features of this rank's images: the stages by name, ``embedding`` (the stage ``fc``), and ``chosen``, those of
    ``--embed``, which need a separate forward pass for another stage. ``held``: as in ``extract_stages``."""
    found: dict[str, torch.Tensor] = {}
    if layers:
        found = linear_probe.extract_stages(
            inputs.network, batches, list(dict.fromkeys([*layers, "fc"])), what, held=held
        )
        found["embedding"] = found["fc"].to(inputs.device).float()
    else:
        found["embedding"] = features.extract(inputs.network, batches, what)
    found["chosen"] = found["embedding"]
    if inputs.embed != "fc":
        found["chosen"] = features.extract(features.embedder(inputs.network, inputs.embed), batches, what)
    return found


def _knn_rows(inputs: EvaluationInputs, evaluator: Evaluator, train: torch.Tensor, test: torch.Tensor) -> list[Row]:
    sources = {RECOMPUTED: ShardedRows(train, inputs.train.samples, inputs.ranks)}
    if inputs.memory is not None and inputs.memory.shape == sources[RECOMPUTED].shape:
        sources[BANK] = ShardedRows.scatter(inputs.memory, inputs.ranks, inputs.device)
    return [Row(evaluator.name, source, _figures(evaluator.classify(test, rows))) for source, rows in sources.items()]


def _figures(accuracy: Accuracy) -> dict[str, float]:
    return {"top1": accuracy.top1} if accuracy.top5 is None else {"top1": accuracy.top1, "top5": accuracy.top5}


def _linear_probe_row(inputs: EvaluationInputs, layer: str, train: torch.Tensor, test: torch.Tensor) -> Row:
    assert inputs.train_labels is not None and inputs.test_labels is not None
    result = linear_probe.probe(
        ShardedRows(train, len(inputs.train_labels), inputs.ranks),
        torch.from_numpy(inputs.train_labels),
        ShardedRows(test, len(inputs.test_labels), inputs.ranks),
        torch.from_numpy(inputs.test_labels),
        classes=inputs.classes,
        seed=inputs.seed,
        device=inputs.device,
        what=f"linear probe on {layer}",
    )
    figures = {"top1": result.top1, "top5": result.top5, "best_top1": result.best_top1}
    return Row(result.name, f"{layer}, {RECOMPUTED}", figures)


def text(rows: Sequence[Row]) -> str:
    """Formats the rows as a table; columns without values are omitted."""
    shown = [name for name in TITLES if any(name in row.figures for row in rows)]
    cells = [
        [f"{row.features}: {row.protocol}", *(_cell(name, row.figures.get(name)) for name in shown)] for row in rows
    ]
    lines = table(["features: protocol", *(TITLES[name] for name in shown)], cells)
    if "best_top1" in shown:
        lines += (
            "\nlinear probe: top-1 and top-5 after the last epoch; best: at the best epoch, chosen by the test labels"
        )
    if "reciprocal" in shown:
        lines += (
            "\nentropy in nats; reciprocal: share of images among the nearest of their nearest neighbour; orphans: "
            "share of images that are no neighbour of any other; largest hub: share of images with the same neighbour"
        )
    return lines


def _cell(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2%}" if name in SHARES else f"{value:.0f}" if name in COUNTS else f"{value:.3f}"


def save(rows: Sequence[Row], path: Path, facts: dict[str, Any]) -> None:
    """Writes the rows and ``facts`` about the run to a JSON file, atomically.

    A file that cannot be written causes a warning, not an error: the results have been printed.
    """
    content = {**facts, "results": [{"protocol": r.protocol, "features": r.features, **r.figures} for r in rows]}
    try:
        with atomic_write(path) as file:
            file.write((json.dumps(content, indent=1) + "\n").encode("utf-8"))
        logger().info("written: %s", path)
    except OSError as error:
        logger().warning("%s: cannot be written: %s", path, error.strerror)
