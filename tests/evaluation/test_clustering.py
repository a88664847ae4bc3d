"""k-means and its scores compared with brute force and scikit-learn."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from sklearn.cluster import KMeans

import datasets
from lib.errors import UsageError
from lib.evaluation import clustering
from lib.evaluation.clustering import cluster, scores
from lib.session.console import logger


def accuracy_by_brute_force(labels: list[int], clusters: list[int]) -> float:
    """The highest share of correct samples over all assignments of clusters to classes."""
    size = max(*labels, *clusters) + 1
    pairs = list(zip(labels, clusters, strict=True))
    return max(sum(p[c] == label for label, c in pairs) for p in itertools.permutations(range(size))) / len(pairs)


def nmi_by_counting(labels: list[int], clusters: list[int]) -> float:
    """Mutual information over the mean of the entropies."""
    count = len(labels)

    def entropy(values: list[int]) -> float:
        return -sum(values.count(v) / count * math.log(values.count(v) / count) for v in set(values))

    pairs = list(zip(labels, clusters, strict=True))
    shared = sum(
        pairs.count(p) / count * math.log(count * pairs.count(p) / (labels.count(p[0]) * clusters.count(p[1])))
        for p in set(pairs)
    )
    mean = (entropy(labels) + entropy(clusters)) / 2
    return shared / mean if mean else 1.0


def ari_by_counting(labels: list[int], clusters: list[int]) -> float:
    """Share of sample pairs that are together in both, corrected for chance."""
    pairs = list(itertools.combinations(range(len(labels)), 2))
    a = [labels[i] == labels[j] for i, j in pairs]
    b = [clusters[i] == clusters[j] for i, j in pairs]
    both, chance = sum(x and y for x, y in zip(a, b, strict=True)), sum(a) * sum(b) / len(pairs)
    most = (sum(a) + sum(b)) / 2
    return (both - chance) / (most - chance) if most != chance else 1.0


@pytest.mark.parametrize("seed", range(12))
def test_scores_equal_brute_force_counting(seed: int) -> None:
    draw = np.random.default_rng(seed)
    labels, clusters = draw.integers(0, 2 + seed % 3, 25), draw.integers(0, 2 + seed % 4, 25)
    clusters[: seed * 2] = (labels[: seed * 2] + 1) % (2 + seed % 4)
    got = scores(labels, clusters)
    words = labels.tolist(), clusters.tolist()
    assert got["accuracy"] == pytest.approx(accuracy_by_brute_force(*words))
    assert got["nmi"] == pytest.approx(nmi_by_counting(*words), abs=1e-9)
    assert got["ari"] == pytest.approx(ari_by_counting(*words), abs=1e-9)


def digits() -> tuple[np.ndarray, np.ndarray]:
    train = datasets.load("digits", None).train
    assert train.labels is not None
    rows = np.asarray(train.images)[..., 0].reshape(len(train), -1).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True), train.labels


def test_kmeans_on_digits_scores_as_scikit_learn() -> None:
    rows, labels = digits()
    ours = cluster(rows, labels, clusters=10, seed=0)
    theirs = scores(labels, KMeans(10, n_init=10, random_state=0).fit_predict(rows))
    assert ours.name == "k-means (10 clusters, best of 10 starts)"
    assert ours.figures["accuracy"] > 0.6
    for name, value in theirs.items():
        assert ours.figures[name] == pytest.approx(value, abs=0.01)
    assert np.array_equal(ours.clusters, cluster(rows, labels, clusters=10, seed=0).clusters)


def test_many_samples_use_mini_batch_kmeans(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, labels = digits()
    monkeypatch.setattr(clustering, "FULL_BATCH", len(rows) - 1)
    found = cluster(rows, labels, clusters=10, seed=2**40)
    assert found.name == "mini-batch k-means (10 clusters, best of 10 starts)" and found.figures["accuracy"] > 0.5


def silhouette_by_loops(rows: np.ndarray, clusters: np.ndarray) -> float:
    distance = np.linalg.norm(rows[:, None] - rows[None], axis=2)
    values = []
    for i, own in enumerate(clusters):
        mates = [j for j in range(len(rows)) if clusters[j] == own and j != i]
        if not mates:
            values.append(0.0)
            continue
        inside = distance[i, mates].mean()
        outside = min(distance[i, clusters == other].mean() for other in set(clusters.tolist()) - {own})
        values.append((outside - inside) / max(inside, outside))
    return float(np.mean(values))


def test_silhouette_without_labels_equals_plain_loops() -> None:
    rows = np.concatenate([np.random.default_rng(i).normal(6 * i, 1, (15, 3)) for i in range(3)]).astype(np.float32)
    found = cluster(rows, None, clusters=3, seed=0)
    assert set(found.figures) == {"silhouette"}
    assert found.figures["silhouette"] == pytest.approx(silhouette_by_loops(rows, found.clusters), abs=1e-5)
    assert sorted(np.bincount(found.clusters)) == [15, 15, 15]


def test_silhouette_of_many_samples_uses_a_subset(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, _ = digits()
    whole = cluster(rows, None, clusters=5, seed=0).figures["silhouette"]
    monkeypatch.setattr(clustering, "SILHOUETTE_SAMPLES", 400)
    assert cluster(rows, None, clusters=5, seed=0).figures["silhouette"] == pytest.approx(whole, abs=0.05)


def test_equal_rows_have_no_silhouette(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logger(), "propagate", True)
    with caplog.at_level("INFO", logger().name):
        assert cluster(np.ones((6, 2), np.float32), None, clusters=3, seed=0).figures == {}
    assert caplog.messages == ["k-means: 2 of the 3 clusters are empty, because images are identical"]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nonfinite_embeddings_are_refused(value: float) -> None:
    rows = np.ones((6, 2), np.float32)
    rows[3, 1] = value
    with pytest.raises(UsageError, match="finite"):
        cluster(rows, None, clusters=2, seed=0)


def test_fewer_images_than_clusters_are_refused() -> None:
    with pytest.raises(UsageError, match=r"--clusters"):
        cluster(np.ones((3, 2), np.float32), None, clusters=4, seed=0)
