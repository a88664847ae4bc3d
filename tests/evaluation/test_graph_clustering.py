"""Communities of the nearest-neighbour graph, against networkx, scikit-learn and planted groups."""

from __future__ import annotations

import networkx as nx
import numpy as np
import pytest
import torch
from sklearn.neighbors import kneighbors_graph

from lib.evaluation.graph_clustering import cluster, communities, nearest_neighbours


def planted(sizes: list[int], noise: float = 0.3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Unit rows (N, 8) around one direction a group, in random order, and the groups (N,)."""
    draw = np.random.default_rng(seed)
    labels = draw.permutation(np.repeat(np.arange(len(sizes)), sizes))
    rows = np.eye(8, dtype=np.float32)[labels] + draw.normal(0, noise, (len(labels), 8)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True), labels


def as_networkx(neighbours: np.ndarray) -> nx.Graph:
    graph = nx.Graph()
    graph.add_nodes_from(range(len(neighbours)))
    graph.add_edges_from((i, j) for i, row in enumerate(neighbours.tolist()) for j in row)
    return graph


def test_the_neighbours_are_those_of_scikit_learn() -> None:
    rows, _ = planted([40, 60, 30])
    expected = kneighbors_graph(rows, 7, metric="cosine").toarray() > 0
    got = np.zeros_like(expected)
    np.put_along_axis(got, nearest_neighbours(torch.from_numpy(rows), 7).numpy(), True, axis=1)
    assert np.array_equal(got, expected)


@pytest.mark.parametrize("resolution", [0.3, 1.0, 3.0])
def test_the_modularity_is_that_of_networkx(resolution: float) -> None:
    rows, _ = planted([50, 40, 60], noise=0.5)
    neighbours = nearest_neighbours(torch.from_numpy(rows), 6).numpy()
    groups, modularity = communities(neighbours, resolution=resolution, seed=0)
    members = [set(np.flatnonzero(groups == group).tolist()) for group in range(groups.max() + 1)]
    assert modularity == pytest.approx(nx.community.modularity(as_networkx(neighbours), members))


@pytest.mark.parametrize("seed", range(3))
def test_no_partition_of_networkx_has_more_modularity(seed: int) -> None:
    rows, _ = planted([50, 40, 60], noise=0.5, seed=seed)
    neighbours = nearest_neighbours(torch.from_numpy(rows), 6).numpy()
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
