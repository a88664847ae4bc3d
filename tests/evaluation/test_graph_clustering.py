"""Communities of the nearest-neighbour graph compared with networkx, scikit-learn and planted groups."""

from __future__ import annotations

import sys

import networkx as nx
import numpy as np
import pytest

from lib.errors import UsageError
from lib.evaluation import graph_clustering
from lib.evaluation.clustering import Clustering
from lib.evaluation.graph_clustering import communities
from lib.evaluation.nearest_neighbours import neighbours_of_arrays


def planted(sizes: list[int], noise: float = 0.3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Unit rows (N, 8) around one direction per group, in random order, and the groups (N,)."""
    draw = np.random.default_rng(seed)
    labels = draw.permutation(np.repeat(np.arange(len(sizes)), sizes))
    rows = np.eye(8, dtype=np.float32)[labels] + draw.normal(0, noise, (len(labels), 8)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True), labels


def cluster(
    rows: np.ndarray, labels: np.ndarray | None, *, neighbours: int, resolution: float, seed: int
) -> Clustering:
    nearest, _ = neighbours_of_arrays(rows, neighbours)
    return graph_clustering.cluster(rows, nearest, labels, resolution=resolution, seed=seed)


def as_networkx(neighbours: np.ndarray) -> nx.Graph:
    graph = nx.Graph()
    graph.add_nodes_from(range(len(neighbours)))
    graph.add_edges_from((i, j) for i, row in enumerate(neighbours.tolist()) for j in row)
    return graph


@pytest.mark.parametrize("resolution", [0.3, 1.0, 3.0])
def test_modularity_equals_that_of_networkx(resolution: float) -> None:
    rows, _ = planted([50, 40, 60], noise=0.5)
    neighbours = neighbours_of_arrays(rows, 6)[0]
    groups, modularity = communities(neighbours, resolution=resolution, seed=0)
    members = [set(np.flatnonzero(groups == group).tolist()) for group in range(groups.max() + 1)]
    assert modularity == pytest.approx(nx.community.modularity(as_networkx(neighbours), members))


@pytest.mark.parametrize("seed", range(3))
def test_modularity_is_at_least_that_of_louvain_in_networkx(seed: int) -> None:
    rows, _ = planted([50, 40, 60], noise=0.5, seed=seed)
    neighbours = neighbours_of_arrays(rows, 6)[0]
    graph = as_networkx(neighbours)
    for resolution in (0.5, 1.0, 2.0):
        groups, _ = communities(neighbours, resolution=resolution, seed=seed)
        members = [set(np.flatnonzero(groups == group).tolist()) for group in range(groups.max() + 1)]
        louvain = nx.community.louvain_communities(graph, resolution=resolution, seed=seed)
        ours, theirs = (nx.community.modularity(graph, m, resolution=resolution) for m in (members, louvain))
        assert ours > theirs - 0.005


def test_planted_groups_are_found_and_numbered_by_size() -> None:
    rows, labels = planted([40, 100, 60, 90, 70, 80], noise=0.15)
    found = cluster(rows, labels, neighbours=10, resolution=1.0, seed=0)
    assert found.clusters.tolist() == np.array([5, 0, 4, 1, 3, 2])[labels].tolist()
    assert found.figures == pytest.approx(
        {"groups": 6, "modularity": found.figures["modularity"], "nmi": 1.0, "ari": 1.0, "accuracy": 1.0}
    )
    assert found.name == "Leiden on the nearest-neighbour graph (K=10, resolution 1)"
    assert found.clusters.dtype == np.int64


def test_same_seed_gives_the_same_groups() -> None:
    rows, _ = planted([150, 150], noise=1.0)  # with almost no structure, another seed gives other groups
    neighbours = neighbours_of_arrays(rows, 4)[0]
    runs = [communities(neighbours, resolution=1.0, seed=seed)[0].tolist() for seed in (5, 5, 6, 2**63 - 1)]
    assert runs[0] == runs[1] and runs[0] != runs[2] and runs[0] != runs[3]


def test_another_order_of_the_samples_gives_the_same_groups() -> None:
    rows, _ = planted([40, 100, 60, 90, 70, 80], noise=0.15)
    order = np.random.default_rng(1).permutation(len(rows))
    found, shuffled = (cluster(each, None, neighbours=10, resolution=1.0, seed=0) for each in (rows, rows[order]))
    assert shuffled.clusters.tolist() == found.clusters[order].tolist()  # holds for well separated groups


def test_more_resolution_gives_more_groups() -> None:
    rows, _ = planted([60] * 6, noise=0.4)
    counts = [cluster(rows, None, neighbours=10, resolution=r, seed=0).figures["groups"] for r in (0.1, 1.0, 8.0)]
    assert counts == sorted(counts) and counts[0] < counts[1] < counts[2]


def test_equal_sizes_are_numbered_by_their_first_sample() -> None:
    pairs = np.array([[3], [2], [1], [0], [5], [4]])  # 0 with 3, 1 with 2, 4 with 5
    assert communities(pairs, resolution=1.0, seed=0)[0].tolist() == [0, 1, 1, 0, 2, 2]


@pytest.mark.parametrize(("samples", "groups"), [(1, [0]), (2, [0, 0]), (5, [0] * 5)])
def test_fewer_images_than_neighbours_are_one_group(samples: int, groups: list[int]) -> None:
    rows, labels = planted([5])
    found = cluster(rows[:samples], labels[:samples], neighbours=15, resolution=1.0, seed=0)
    assert found.clusters.tolist() == groups and f"(K={samples - 1}, " in found.name
    assert found.figures["groups"] == 1 and found.figures["modularity"] == pytest.approx(0, abs=1e-12)
    without = cluster(rows[:samples], None, neighbours=15, resolution=1.0, seed=0).figures
    assert set(without) == {"groups", "modularity"}


def test_equal_embeddings_are_clustered() -> None:
    rows = np.tile(np.float32([0.6, 0.8]), (3000, 1))
    found = cluster(rows, None, neighbours=5, resolution=1.0, seed=0)
    assert len(found.clusters) == 3000 and found.figures["modularity"] < 0.1
    mixed, labels = planted([40, 60, 50, 45, 55], noise=0.1)
    mixed[labels == 1] = mixed[labels == 1][0]  # one class of identical images
    assert cluster(mixed, labels, neighbours=10, resolution=1.0, seed=0).figures["nmi"] > 0.9


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nonfinite_embedding_is_refused(value: float) -> None:
    rows, labels = planted([20, 20])
    rows[7, 3] = value
    with pytest.raises(UsageError, match="protocol graph: some embeddings are NaN or infinite"):
        cluster(rows, labels, neighbours=5, resolution=1.0, seed=0)


def test_missing_leiden_package_is_named_with_the_pip_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "graspologic_native", None)
    with pytest.raises(UsageError, match=r"pip install 'graspologic-native>=1\.3\.1'"):
        graph_clustering.leiden()


@pytest.mark.slow
def test_clustering_of_a_large_sparse_graph_terminates() -> None:
    draw = np.random.default_rng(0)
    groups = draw.integers(0, 10, 20_000)
    rows = draw.normal(size=(10, 16))[groups] + 1.5 * draw.normal(size=(20_000, 16))
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    found, modularity = communities(neighbours_of_arrays(rows, 2)[0], resolution=1.0, seed=0)
    assert 0.77 < modularity < 0.85 and found.max() < 200
