"""The exact search for nearest neighbours, against plain loops and scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import NearestNeighbors

import oracles
from lib.evaluation.nearest_neighbours import nearest_neighbours, neighbours_of_arrays
from patches import blocks_of

many = settings(max_examples=40, deadline=None)
seeds = st.integers(0, 2**32 - 1)


@many
@given(st.integers(1, 9), st.integers(1, 12), st.integers(1, 15), seeds, st.integers(1, 60))
def test_neighbours_of_queries_are_the_oracles(queries: int, samples: int, k: int, seed: int, block: int) -> None:
    asked, bank = oracles.rows("random", queries, 4, seed), oracles.rows("random", samples, 4, seed + 1)
    with blocks_of(block):
        found = nearest_neighbours(torch.from_numpy(bank), k, torch.from_numpy(asked))
    assert found.samples.shape == found.similarities.shape == (queries, min(k, samples))
    for row in range(queries):
        values = [oracles.dot(asked[row], other) for other in bank]
        best = sorted(range(samples), key=lambda j: -values[j])[:k]
        assert found.samples[row].tolist() == best
        assert found.similarities[row].tolist() == pytest.approx([values[j] for j in best])


@many
@given(st.integers(1, 12), st.integers(1, 15), seeds, st.integers(1, 60))
def test_no_sample_is_its_own_neighbour(samples: int, k: int, seed: int, block: int) -> None:
    bank = oracles.rows("random", samples, 4, seed)
    with blocks_of(block):
        nearest, cosines = neighbours_of_arrays(bank, k)
    assert nearest.shape == cosines.shape == (samples, min(k, samples - 1))
    for row in range(samples):
        values = [oracles.dot(bank[row], other) for other in bank]
        assert nearest[row].tolist() == sorted(set(range(samples)) - {row}, key=lambda j: -values[j])[:k]
        assert cosines[row].tolist() == pytest.approx([values[j] for j in nearest[row]], abs=1e-6)


def test_neighbours_are_those_of_scikit_learn() -> None:
    rows = np.random.default_rng(0).normal(size=(300, 8)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    distances, expected = NearestNeighbors(n_neighbors=7, metric="cosine").fit(rows).kneighbors()
    nearest, cosines = neighbours_of_arrays(rows, 7)
    assert np.array_equal(nearest, expected) and np.allclose(1 - cosines, distances, atol=1e-6)
    assert nearest.dtype == np.int64 and cosines.dtype == np.float32


def test_cosines_of_equal_rows_are_at_most_one() -> None:
    rows = np.tile(np.float32([[0.6, 0.8]]) * np.float32(1.0000001), (20, 1))
    assert neighbours_of_arrays(rows, 3)[1].max() <= 1


def test_the_search_needs_no_gradient() -> None:
    found = nearest_neighbours(torch.eye(3), 2, torch.eye(3, requires_grad=True))
    assert not found.similarities.requires_grad
