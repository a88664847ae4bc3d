"""Findings in a set of embeddings compared with plain loops."""

from __future__ import annotations

import networkx
import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_rand_score

import oracles
from lib.errors import UsageError
from lib.evaluation import findings
from lib.evaluation.features import WithStatistics
from lib.evaluation.findings import Findings, find
from lib.evaluation.graph_clustering import communities

N, D, K = 90, 8, 6


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def embeddings(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings of three well separated groups, and the group of each image."""
    rng = np.random.default_rng(seed)
    groups = rng.integers(0, 3, N)
    return unit(4 * np.eye(D)[groups] + rng.normal(size=(N, D))), groups


def found_in(rows: np.ndarray, labels: np.ndarray | None = None, neighbours: int = K) -> Findings:
    return find(rows, labels, neighbours=neighbours, resolution=1.0, seed=0)


def test_neighbours_equal_plain_loops() -> None:
    rows, _ = embeddings()
    found = found_in(rows)
    assert found.neighbours.dtype == np.int64 and found.similarities.dtype == np.float32
    for sample in range(N):
        assert found.neighbours[sample].tolist() == oracles.neighbours(rows, sample, K)
        exact = [oracles.dot(rows[sample], rows[other]) for other in found.neighbours[sample]]
        assert found.similarities[sample] == pytest.approx(exact, abs=1e-6)


def test_groups_are_communities_with_a_range_of_their_number() -> None:
    rows, groups = embeddings()
    found = found_in(rows)
    expected, modularity = communities(found.neighbours, resolution=1.0, seed=0)
    assert found.groups.tolist() == expected.tolist() and found.modularity == modularity
    assert adjusted_rand_score(groups, found.groups) > 0.6
    others = [communities(found.neighbours, resolution=1.0, seed=seed)[0] for seed in range(1, findings.SEEDS + 1)]
    counts = [len(set(each.tolist())) for each in (expected, *others)]
    sure = findings.certainty(found)
    assert sure.seed_range == (min(counts), max(counts))
    assert sure.seed_agreement == pytest.approx(np.mean([adjusted_rand_score(expected, each) for each in others]))
    ends = [communities(found.neighbours, resolution=factor, seed=0)[0] for factor in (0.5, 2.0)]
    assert sure.resolution_range == tuple(len(set(each.tolist())) for each in ends)


def test_copies_have_the_index_of_the_first() -> None:
    rows, _ = embeddings()
    rows[[5, 50, 60]] = rows[20]
    rows[70] = unit(rows[70:71] + 1e-7)[0]
    expected = np.arange(N)
    expected[[5, 20, 50, 60]] = 5
    assert found_in(rows).copies.tolist() == expected.tolist()


def test_more_copies_than_neighbours_form_one_set() -> None:
    rows, _ = embeddings()
    rows[10 : 10 + 4 * K] = rows[3]
    found = found_in(rows)
    members = [3, *range(10, 10 + 4 * K)]
    assert found.copies[members].tolist() == [3] * len(members)
    assert findings.nearest_sets(found, 1)[0].members == members


def test_outlier_score_equals_plain_loops() -> None:
    rows, _ = embeddings()
    rows[[5, 50]] = rows[20]
    distinct = [sample for sample in range(N) if sample not in (20, 50)]

    def reach(sample: int) -> tuple[float, list[int]]:
        order = sorted((-oracles.dot(rows[sample], rows[other]), other) for other in distinct if other != sample)[:K]
        return 1 + order[-1][0], [other for _, other in order]

    found = found_in(rows)
    for sample in range(N):
        own, near = reach(5 if sample in (20, 50) else sample)
        expected = own / np.mean([reach(other)[0] for other in near])
        assert found.outlier_scores[sample] == pytest.approx(expected, rel=1e-4)


def test_many_copies_of_a_blank_image_are_outliers() -> None:
    rows = unit(np.eye(D)[embeddings()[1]] + 0.05 * np.random.default_rng(1).normal(size=(N, D)))
    blank = np.zeros((4 * K, D), np.float32)
    blank[:, D - 1] = -1
    scores = found_in(np.concatenate([rows, blank])).outlier_scores
    assert scores[N:].min() == scores[N:].max() > scores[:N].max()


def test_label_disagreement_is_the_share_of_other_labels() -> None:
    rows, labels = embeddings()
    found = found_in(rows, labels)
    assert found.label_disagreement is not None
    for sample in range(N):
        other = sum(labels[near] != labels[sample] for near in oracles.neighbours(rows, sample, K))
        assert found.label_disagreement[sample] == pytest.approx(other / K)
    assert found_in(rows).label_disagreement is None


def test_nearest_sets_join_images_with_their_nearest_neighbour() -> None:
    rows, _ = embeddings()
    rows[[5, 50]] = rows[20]
    rows[[8, 9]] = rows[40]
    rows[11] = rows[12]
    sets = findings.nearest_sets(found_in(rows), 9)
    assert len(sets) == 9 and all(each.greatest == 1 for each in sets[:3])
    assert [set(each.members) >= few for each, few in zip(sets[:3], ({5, 20, 50}, {8, 9, 40}, {11, 12}), strict=True)]
    least = min(each.least for each in sets)
    graph = networkx.Graph()
    for sample in range(N):
        near = oracles.neighbours(rows, sample, 1)[0]
        if oracles.dot(rows[sample], rows[near]) >= least - 1e-6:
            graph.add_edge(sample, near)
    expected = {tuple(sorted(members)) for members in networkx.connected_components(graph)}
    assert {tuple(each.members) for each in sets} == expected
    similar = [each.greatest for each in sets[3:]]
    assert similar == sorted(similar, reverse=True)
    for each in sets:
        pairs = [oracles.dot(rows[a], rows[b]) for a in each.members for b in each.members if a < b]
        assert each.greatest == pytest.approx(max(pairs), abs=1e-6) and each.least >= min(pairs) - 1e-6


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_images_have_findings(count: int) -> None:
    rows, labels = embeddings()
    found = found_in(rows[:count], labels[:count])
    assert found.neighbours.shape == found.similarities.shape == (count, count - 1)
    assert found.groups.min() == 0 and len(found.groups) == count
    assert found.outlier_scores.shape == (count,) and np.isfinite(found.outlier_scores).all()
    assert found.label_disagreement is not None and found.label_disagreement.shape == (count,)
    assert len(findings.nearest_sets(found, 5)) == (count > 1)


def test_identical_images_are_one_set_without_outliers() -> None:
    rows = np.repeat(embeddings()[0][:1], 30, axis=0)
    found = found_in(rows)
    assert set(found.copies.tolist()) == {0} and set(found.outlier_scores.tolist()) == {0.0}
    (only,) = findings.nearest_sets(found, 5)
    assert only.members == list(range(30)) and only.least == 1


def test_nonfinite_embeddings_are_refused() -> None:
    rows, _ = embeddings()
    rows[3, 2] = np.nan
    with pytest.raises(UsageError, match="NaN or infinite"):
        found_in(rows)


def statistics(images: list[np.ndarray]) -> np.ndarray:
    """Contrast and smoothness of images (h, w, 3) in [0, 1], normalised as for a network."""
    stds = (0.2, 0.3, 0.4)
    batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float()
    normalised = (batch - 0.5) / torch.tensor(stds)[:, None, None]
    found = WithStatistics(torch.nn.Flatten(), stds)(normalised)
    assert torch.equal(found[:, :-2], normalised.flatten(1))  # the network's output is unchanged
    return found[:, -2:].numpy()


def test_contrast_and_smoothness_equal_plain_loops() -> None:
    image = np.random.default_rng(0).random((5, 4, 3))
    variance = np.mean([np.var(image[:, :, channel]) for channel in range(3)])
    down = [(image[y, x, c] - image[y + 1, x, c]) ** 2 for y in range(4) for x in range(4) for c in range(3)]
    right = [(image[y, x, c] - image[y, x + 1, c]) ** 2 for y in range(5) for x in range(3) for c in range(3)]
    smoothness = 1 - (np.mean(down) + np.mean(right)) / 2 / (2 * variance)
    assert statistics([image])[0] == pytest.approx([np.sqrt(variance), smoothness], abs=1e-5)
    assert statistics([np.full((1, 1, 3), 0.7)])[0] == pytest.approx([0, 1])


def test_blank_and_noisy_images_are_found_by_their_pixels() -> None:
    rng = np.random.default_rng(0)
    ramp = np.linspace(0, 1, 16)
    scenes = [np.outer(ramp ** rng.uniform(1, 3), ramp)[:, :, None].repeat(3, 2) for _ in range(20)]
    noise, blanks = [rng.random((16, 16, 3))], [np.zeros((16, 16, 3)), np.full((16, 16, 3), 0.997)]
    blank, noisy = findings.blank_and_noisy(statistics([*scenes, *noise, *blanks]))
    assert np.flatnonzero(blank).tolist() == [21, 22] and np.flatnonzero(noisy).tolist() == [20]
    blank, noisy = findings.blank_and_noisy(statistics([*noise * 20, *blanks]))
    assert blank.sum() == 2 and not noisy.any()  # if most images look like noise, none is reported as noisy
    assert findings.blank_and_noisy(statistics(blanks))[0].all()


def test_similar_images_are_not_joined_into_one_set() -> None:
    sets = findings.nearest_sets(found_in(embeddings()[0]), N)
    assert len(sets) > 15 and max(len(each.members) for each in sets) < N / 3
