"""A test run: every protocol that is asked for, in one table and in ``evaluation.json``.

Letters: N training samples, M test images, D embedding.
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
from lib.evaluation import clustering, features, linear_probe
from lib.evaluation.classifier import Evaluator
from lib.method import diagnostics
from lib.session.atomic_files import atomic_write
from lib.session.console import logger, table

RECOMPUTED, BANK = "recomputed with the test transform", "memory bank of the checkpoint"
TITLES = {
    "top1": "top-1",
    "top5": "top-5",
    "best_top1": "top-1 best",
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
"""Figure -> its column."""
SHARES = {"top1", "top5", "best_top1", "accuracy", "reciprocal", "orphans", "largest_hub"}
"""Figures shown in per cent."""
LABELLED = {"knn", "nn", "linear"}
"""Protocols that need labelled training and test images."""


@dataclass(frozen=True)
class EvaluationInputs:
    """What is judged.

    Attributes:
        network: images to embeddings.
        train, test: the images in order, with the test transform; test is None where there are none.
        train_labels, test_labels: (N,) and (M,), or None.
        classes: their number, 0 without labels.
        memory: (N, D) of the checkpoint, of which the first process has the numbers, or None.
        world: the processes that share the work.
        evaluators: kNN and NN over the test images, as far as they are asked for.
        seed: of the linear probe's order and k-means' starts.
        device: where the network is.
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


@dataclass(frozen=True)
class Row:
    """Figures of one protocol: how they came about, and their values by the names of ``TITLES``."""

    protocol: str
    features: str
    figures: dict[str, float]


def evaluate(inputs: EvaluationInputs, options: Options) -> list[Row]:
    """The figures of every protocol of the options; each split passes the network once.

    The reference's figures of record come from the memory bank, in training; its test run would recompute. The two
    differ, so both are shown. Without labels, k-means and figures of the neighbourhoods take the place of kNN and NN.

    Raises:
        UsageError: the linear probe is asked for without labels, or the network has no such stage.
    """
    labelled = inputs.train_labels is not None and inputs.test_labels is not None
    needing = [name for name in options.protocol if name in LABELLED and not labelled]
    if "linear" in needing:
        raise UsageError(
            "--protocol linear: needs labelled training and test images, and they are not there; without labels use "
            "--protocol cluster"
        )
    if needing:
        logger().warning(
            "--protocol %s needs labelled training and test images, and they are not there; what can be told without "
            "them is shown instead",
            " ".join(needing),
        )
    probed = options.linear_layers if "linear" in options.protocol else ()
    # the test images first: there are fewer, and a disk without room for the features is noticed sooner
    test = _features(inputs, inputs.test, probed, "test features") if labelled and inputs.test else {}
    train = _features(inputs, inputs.train, probed, "training features")
    rows: list[Row] = []
    for evaluator in inputs.evaluators:
        rows += _neighbours(inputs, evaluator, train["embedding"], test["embedding"])
    rows += [_linear(inputs, layer, train[layer], test[layer]) for layer in probed]
    where = f"training images, {RECOMPUTED}"
    clusters = inputs.classes or options.clusters
    if needing:
        clusters = min(clusters, inputs.train.samples)
        bank = ShardedRows(train["embedding"], inputs.train.samples, inputs.ranks)
        temperature, size = options.npc_temperature, options.ANs_size
        figures, _ = diagnostics.measure(bank, None, round=0, temperature=temperature, size=size)
        shown = {name: value for name, value in figures.items() if name in TITLES and value is not None}
        rows.append(Row(f"neighbourhoods (k={size}, tau={temperature:g})", where, shown))
    if "cluster" in options.protocol or needing:
        embeddings = ShardedRows(train["embedding"], inputs.train.samples, inputs.ranks).gather_to_rank0().cpu().numpy()
        if inputs.ranks.is_rank0:  # k-means is quick, and scikit-learn knows one process only
            found = clustering.cluster(embeddings, inputs.train_labels, clusters=clusters, seed=inputs.seed)
            rows.append(Row(found.name, where, found.figures))
    return rows


def _features(inputs: EvaluationInputs, batches: Loader, layers: Sequence[str], what: str) -> dict[str, torch.Tensor]:
    """Stages by name, and ``embedding``, which is the stage ``fc``, of the images of this process."""
    if not layers:
        return {"embedding": features.extract(inputs.network, batches, what)}
    wanted = list(dict.fromkeys([*layers, "fc"]))
    found = linear_probe.extract_stages(inputs.network, batches, wanted, what)
    return {**found, "embedding": found["fc"].to(inputs.device).float()}


def _neighbours(inputs: EvaluationInputs, evaluator: Evaluator, train: torch.Tensor, test: torch.Tensor) -> list[Row]:
    sources = {RECOMPUTED: ShardedRows(train, inputs.train.samples, inputs.ranks)}
    if inputs.memory is not None and inputs.memory.shape == sources[RECOMPUTED].shape:
        sources[BANK] = ShardedRows.scatter(inputs.memory, inputs.ranks, inputs.device)
    rows = []
    for source, rows_of_training in sources.items():
        got = evaluator.classify(test, rows_of_training)
        figures = {"top1": got.top1} if got.top5 is None else {"top1": got.top1, "top5": got.top5}
        rows.append(Row(evaluator.name, source, figures))
    return rows


def _linear(inputs: EvaluationInputs, layer: str, train: torch.Tensor, test: torch.Tensor) -> Row:
    assert inputs.train_labels is not None and inputs.test_labels is not None
    got = linear_probe.probe(
        ShardedRows(train, len(inputs.train_labels), inputs.ranks),
        torch.from_numpy(inputs.train_labels),
        ShardedRows(test, len(inputs.test_labels), inputs.ranks),
        torch.from_numpy(inputs.test_labels),
        classes=inputs.classes,
        seed=inputs.seed,
        device=inputs.device,
        what=f"linear probe on {layer}",
    )
    figures = {"top1": got.top1, "top5": got.top5, "best_top1": got.best_top1}
    return Row(got.name, f"{layer}, {RECOMPUTED}", figures)


def text(rows: Sequence[Row]) -> str:
    """The table of a test run; columns that no protocol fills are left out."""
    shown = [name for name in TITLES if any(name in row.figures for row in rows)]
    cells = [
        [f"{row.features}: {row.protocol}", *(_cell(name, row.figures.get(name)) for name in shown)] for row in rows
    ]
    lines = table(["features: protocol", *(TITLES[name] for name in shown)], cells)
    if "best_top1" in shown:
        lines += "\nlinear probe: top-1 and top-5 of its last epoch; best: of its best epoch, chosen by the test labels"
    if "reciprocal" in shown:
        lines += (
            "\nentropy in nats; reciprocal: images that are among the nearest of their nearest neighbour; orphans: "
            "images that are nearest to no other; largest hub: images that have the same image as a neighbour"
        )
    return lines


def _cell(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2%}" if name in SHARES else f"{value:.3f}"


def save(rows: Sequence[Row], path: Path, facts: dict[str, Any]) -> None:
    """Writes the figures with what they are of as JSON, whole or not at all; a place that cannot be written to costs
    a warning, for the figures have been shown."""
    content = {**facts, "results": [{"protocol": r.protocol, "features": r.features, **r.figures} for r in rows]}
    try:
        with atomic_write(path) as file:
            file.write((json.dumps(content, indent=1) + "\n").encode("utf-8"))
        logger().info("written: %s", path)
    except OSError as error:
        logger().warning("%s: cannot be written: %s", path, error.strerror)
