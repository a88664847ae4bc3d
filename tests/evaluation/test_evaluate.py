"""The results of a test run compared with those of the single protocols."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import oracles
import synthetic
from lib.config.options import Options
from lib.data.loader import Loader
from lib.errors import UsageError
from lib.evaluation import evaluate, graph_clustering
from lib.evaluation.classifier import Evaluator
from lib.evaluation.evaluate import BANK, RECOMPUTED, EvaluationInputs, Row
from lib.evaluation.nearest_neighbours import neighbours_of_arrays

CPU = torch.device("cpu")
CLASSES, TEST = 4, 60


class Staged(torch.nn.Module):
    """Embeds image i, one pixel of value i, as the i-th row of a table; gives zeros in training mode."""

    def __init__(self, rows: np.ndarray) -> None:
        super().__init__()
        self.rows = torch.from_numpy(rows).float()
        self.passes = 0

    def stages(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        self.passes += 1
        rows = self.rows[x[:, 0, 0, 0].round().long()] * (0 if self.training else 1)
        return {"conv1": rows[:, :2, None, None], "fc": rows}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.stages(x)["fc"]


def loader_of(first: int, count: int) -> Loader:
    images = [np.full((1, 1, 3), first + i, dtype=np.uint8) for i in range(count)]
    scaled = synthetic.untouched(1, 1, stds=(1 / 255,) * 3)  # back to the numbers
    return Loader(images, scaled, batch_size=8, workers=0, seed=None, device=torch.device("cpu"))


def subject_of(**changes: Any) -> EvaluationInputs:
    """150 training and 60 test images, whose embeddings form noisy clusters of four classes."""
    draw = np.random.default_rng(0)
    centres = draw.normal(size=(CLASSES, 5))
    labels = draw.integers(0, CLASSES, 210)
    rows = centres[labels] + 0.7 * draw.normal(size=(210, 5))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    train_labels, test_labels = labels[:150], labels[150:]
    test = loader_of(150, TEST)
    constants: dict[str, Any] = {"test": test, "test_labels": test_labels, "train_labels": train_labels}
    constants |= {"classes": CLASSES, "k": 20, "sigma": 0.1, "device": CPU}
    inputs = EvaluationInputs(
        network=Staged(rows),
        train=loader_of(0, 150),
        test=test,
        train_labels=train_labels,
        test_labels=test_labels,
        classes=CLASSES,
        memory=torch.from_numpy(oracles.rows("random", 150, 5, seed=5)).float(),
        evaluators=[Evaluator("knn", **constants), Evaluator("nn", **constants)],
        seed=3,
        device=CPU,
    )
    return replace(inputs, **changes)


def table_of(inputs: EvaluationInputs) -> np.ndarray:
    rows = inputs.network.rows
    assert isinstance(rows, torch.Tensor)
    return rows.numpy().astype(np.float64)


def knn(inputs: EvaluationInputs, bank: np.ndarray, k: int) -> float:
    """Top-1 by plain loops."""
    assert inputs.train_labels is not None and inputs.test_labels is not None
    constants: dict[str, Any] = {"classes": CLASSES, "k": k, "sigma": 0.1}
    scores = [oracles.knn_scores(q, bank, inputs.train_labels, **constants) for q in table_of(inputs)[150:]]
    return oracles.accuracy(np.array(scores), inputs.test_labels, 1)


def test_all_protocols_share_one_pass_over_each_split() -> None:
    inputs = subject_of()
    options = Options(protocol="knn nn linear cluster graph", linear_layers="conv1 fc", graph_neighbours=6)
    rows = evaluate.evaluate(inputs, options)
    names = ["weighted kNN (K=20, sigma=0.1)"] * 2 + ["NN"] * 2
    assert [row.protocol for row in rows][:4] == names
    assert [row.features for row in rows] == [
        RECOMPUTED, BANK, RECOMPUTED, BANK,
        f"conv1, {RECOMPUTED}", f"fc, {RECOMPUTED}", *[f"training images, {RECOMPUTED}"] * 2,
    ]  # fmt: skip
    assert inputs.network.passes == len(inputs.train) + len(inputs.test or [])
    assert inputs.memory is not None
    bank = inputs.memory.numpy().astype(np.float64)
    rows_of_training = table_of(inputs)[:150]
    expected = [knn(inputs, source, k) for k in (20, 1) for source in (rows_of_training, bank)]
    assert [row.figures["top1"] for row in rows[:4]] == pytest.approx(expected)
    assert expected[0] > expected[1] + 0.2
    assert all(("top5" in row.figures) is (row.protocol != "NN") for row in rows[:4])
    for row in rows[4:6]:
        assert row.figures["top1"] <= row.figures["best_top1"] <= 1 and row.protocol.startswith("linear probe")
    assert rows[5].figures["top1"] > 0.6
    assert set(rows[6].figures) == {"nmi", "ari", "accuracy"} and "4 clusters" in rows[6].protocol
    training = rows_of_training.astype(np.float32)
    nearest, _ = neighbours_of_arrays(training, 6)
    expected_groups = graph_clustering.cluster(training, nearest, inputs.train_labels, resolution=1.0, seed=3)
    assert rows[7].figures == expected_groups.figures and "K=6" in rows[7].protocol


def test_embed_stage_is_evaluated_as_well_as_the_embeddings() -> None:
    inputs = subject_of(embed="conv1")
    inputs = replace(inputs, evaluators=inputs.evaluators[:1])
    rows = evaluate.evaluate(inputs, Options(protocol="knn"))
    where = f"conv1, pooled, {RECOMPUTED}"
    inputs.network.eval()
    assert [row.features for row in rows] == [RECOMPUTED, BANK, where]
    tables = [
        inputs.network.stages(images)["conv1"].flatten(2).mean(dim=2)  # type: ignore[operator]
        for batches in (inputs.train, inputs.test)
        if batches
        for images, _ in batches.epoch()
    ]
    pooled = torch.nn.functional.normalize(torch.cat(tables).double(), dim=1).numpy()
    assert inputs.train_labels is not None and inputs.test_labels is not None
    constants: dict[str, Any] = {"classes": CLASSES, "k": 20, "sigma": 0.1}
    scores = [oracles.knn_scores(row, pooled[:150], inputs.train_labels, **constants) for row in pooled[150:]]
    assert rows[2].figures["top1"] == pytest.approx(oracles.accuracy(np.array(scores), inputs.test_labels, 1))


@pytest.mark.parametrize("memory", [None, torch.ones(149, 5), torch.ones(150, 6)])
def test_missing_or_mismatched_bank_is_not_evaluated(memory: torch.Tensor | None) -> None:
    rows = evaluate.evaluate(subject_of(memory=memory), Options(protocol="knn"))
    assert {row.features for row in rows} == {RECOMPUTED}


def test_without_labels_only_clustering_is_evaluated() -> None:
    inputs = subject_of(train_labels=None, test_labels=None, test=None, classes=0, evaluators=[])
    (row,) = evaluate.evaluate(inputs, Options(protocol="cluster", clusters=3))
    assert set(row.figures) == {"silhouette"} and "3 clusters" in row.protocol
    (row,) = evaluate.evaluate(inputs, Options(protocol="graph", graph_neighbours=200, graph_resolution=0.5))
    assert set(row.figures) == {"groups", "modularity"} and "K=149, resolution 0.5" in row.protocol  # one group
    with pytest.raises(UsageError, match="linear needs labelled"):
        evaluate.evaluate(inputs, Options(protocol="cluster linear"))


@pytest.mark.parametrize("protocol", ["knn", "nn", "knn nn cluster"])
@pytest.mark.parametrize("train_labels", [None, np.arange(150) % CLASSES])
def test_without_test_labels_health_and_clusters_are_evaluated(
    protocol: str, train_labels: np.ndarray | None, caplog: pytest.LogCaptureFixture
) -> None:
    classes = 0 if train_labels is None else CLASSES
    inputs = subject_of(train_labels=train_labels, test_labels=None, test=None, classes=classes, evaluators=[])
    health, clusters, groups = evaluate.evaluate(inputs, Options(protocol=protocol, clusters=3, npc_temperature=0.2))
    rows = table_of(inputs)[:150]
    entropies = [oracles.entropy(row, rows, 0.2) for row in rows]
    assert health.figures["entropy_50"] == pytest.approx(np.median(entropies), abs=1e-5)
    nearest = [oracles.neighbours(rows, sample, 1)[0] for sample in range(150)]
    assert health.figures["reciprocal"] == pytest.approx(np.mean([nearest[nearest[i]] == i for i in range(150)]))
    assert health.figures["orphans"] == pytest.approx(1 - len(set(nearest)) / 150)
    judged = {"silhouette"} if train_labels is None else {"nmi", "ari", "accuracy"}
    assert set(clusters.figures) == judged and set(groups.figures) == judged | {"groups", "modularity"}
    assert "median entropy" in evaluate.text([health, clusters])
    (record,) = caplog.records
    assert "needs labelled training and test images" in record.getMessage()


def test_unknown_stage_is_refused() -> None:
    with pytest.raises(UsageError, match=r"conv7.*conv1, fc"):
        evaluate.evaluate(subject_of(), Options(protocol="linear", linear_layers="conv7"))


ROWS = [
    Row("weighted kNN (K=20, sigma=0.1)", RECOMPUTED, {"top1": 0.5, "top5": 1.0}),
    Row("linear probe (SGD)", f"conv5, {RECOMPUTED}", {"top1": 0.25, "top5": 0.75, "best_top1": 0.5}),
    Row("k-means (4 clusters)", "training images", {"nmi": 0.1234, "ari": -0.05, "accuracy": 0.5}),
    Row("Leiden (K=15)", "training images", {"groups": 13.0, "modularity": 0.6}),
]


def test_table_shows_only_columns_with_values() -> None:
    lines = evaluate.text(ROWS).splitlines()
    assert lines[0].split()[2:] == "top-1 top-5 top-1 best groups modularity NMI ARI accuracy".split()
    assert lines[2].startswith(f"{RECOMPUTED}: weighted kNN (K=20, sigma=0.1) ")
    assert lines[2].split()[-8:] == ["50.00%", "100.00%", *["-"] * 6]
    assert lines[4].split()[-3:] == ["0.123", "-0.050", "50.00%"]
    assert lines[5].split()[-5:] == ["13", "0.600", "-", "-", "-"]
    assert "chosen by the test labels" in lines[6]
    short = evaluate.text(ROWS[:1])
    assert "best" not in short and "NMI" not in short and len(short.splitlines()) == 3


def test_results_are_saved_as_json_in_full_precision(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    evaluate.save(ROWS, path, {"seed": 3, "checkpoint": None})
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["seed"] == 3 and len(content["results"]) == 4
    assert content["results"][1] == {
        "protocol": "linear probe (SGD)", "features": f"conv5, {RECOMPUTED}",
        "top1": 0.25, "top5": 0.75, "best_top1": 0.5,
    }  # fmt: skip
    evaluate.save(
        ROWS, tmp_path / "none" / "evaluation.json", {}
    )  # the results were logged already, so this is no error
    assert [entry.name for entry in tmp_path.iterdir()] == ["evaluation.json"]
