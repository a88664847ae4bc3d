"""The kNN classifiers compared with the naive oracles."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracles
from lib.evaluation.knn import nearest_neighbour, top_k_accuracy, weighted_knn
from patches import blocks_of

many = settings(max_examples=50, deadline=None)
seeds = st.integers(0, 2**32 - 1)

Case = tuple[np.ndarray, np.ndarray, np.ndarray, int]


@st.composite
def cases(draw: st.DrawFn, kinds: tuple[str, ...] = ("random",)) -> Case:
    """Queries (Q, D), bank (N, D), labels (N,) and C; some classes may have no sample."""
    samples, classes, seed = draw(st.integers(1, 15)), draw(st.integers(1, 7)), draw(seeds)
    low_dim = draw(st.integers(2, 6))
    bank = oracles.rows(draw(st.sampled_from(kinds)), samples, low_dim, seed)
    queries = oracles.rows("random", draw(st.integers(1, 6)), low_dim, seed + 1)
    return queries, bank, np.random.default_rng(seed).integers(0, classes, samples), classes


def scores_of(case: Case, *, block: int = 2**20, **constants: Any) -> np.ndarray:
    queries, bank, labels, classes = case
    tensors = [torch.from_numpy(array) for array in (queries, bank, labels)]
    with blocks_of(block):
        return weighted_knn(*tensors, classes=classes, **constants).numpy()


def shares(scores: np.ndarray) -> np.ndarray:
    """Each query's scores scaled to sum to 1, since the scale of the votes is arbitrary."""
    return scores / scores.sum(axis=1, keepdims=True)


@many
@given(cases(), st.integers(1, 20), st.sampled_from([0.05, 0.1, 1.0]), st.integers(1, 60))
def test_scores_equal_the_oracle(case: Case, k: int, sigma: float, block: int) -> None:
    queries, bank, labels, classes = case
    scores = scores_of(case, k=k, sigma=sigma, block=block)
    expected = [oracles.knn_scores(query, bank, labels, classes=classes, k=k, sigma=sigma) for query in queries]
    np.testing.assert_allclose(shares(scores), expected, rtol=1e-9, atol=1e-12)


@many
@given(cases(kinds=oracles.KINDS), st.sampled_from([0.05, 0.1, 1.0]), st.integers(0, 5))
def test_all_rows_of_a_small_bank_vote_with_ties(case: Case, sigma: float, more: int) -> None:
    queries, bank, labels, classes = case
    scores = scores_of(case, k=len(bank) + more, sigma=sigma)
    expected = [oracles.knn_scores(q, bank, labels, classes=classes, k=len(bank), sigma=sigma) for q in queries]
    np.testing.assert_allclose(shares(scores), expected, rtol=1e-9, atol=1e-12)


@many
@given(cases(kinds=oracles.KINDS), st.integers(1, 20), st.sampled_from([1e-3, 1e-6, 1e-20]))
def test_scores_are_finite_for_any_sigma(case: Case, k: int, sigma: float) -> None:
    queries, bank, labels, classes = case
    scores = scores_of((queries.astype(np.float32), bank.astype(np.float32), labels, classes), k=k, sigma=sigma)
    assert np.isfinite(scores).all()
    assert (scores.max(axis=1) >= 1).all()


@many
@given(cases(), st.integers(1, 60))
def test_nearest_neighbour_class_equals_the_oracle(case: Case, block: int) -> None:
    queries, bank, labels, classes = case
    tensors = [torch.from_numpy(array) for array in (queries, bank, labels)]
    with blocks_of(block):
        scores = nearest_neighbour(*tensors, classes=classes)
    expected = np.zeros((len(queries), classes))
    for row, query in enumerate(queries):
        expected[row, oracles.nearest_class(query, bank, labels)] = 1
    np.testing.assert_array_equal(scores.numpy(), expected)


def test_sigma_decides_between_one_near_and_two_far_votes() -> None:
    query, bank = np.array([[1.0, 0.0]]), np.array([[1.0, 0.0], [0.6, 0.8], [0.6, -0.8]])
    case = (query, bank, np.array([0, 1, 1]), 2)
    assert scores_of(case, k=3, sigma=0.1).argmax() == 0  # e^10 against 2 e^6
    assert scores_of(case, k=3, sigma=1.0).argmax() == 1  # e against 2 e^0.6
    assert scores_of(case, k=1, sigma=1.0).argmax() == 0


def test_single_class_is_always_predicted() -> None:
    case = (oracles.rows("random", 4, 3, 1), oracles.rows("equal", 5, 3, 2), np.zeros(5, dtype=np.int64), 1)
    assert scores_of(case, k=3, sigma=0.1).argmax(axis=1).tolist() == [0, 0, 0, 0]


# Accuracy.


@many
@given(st.integers(1, 20), st.integers(1, 12), st.integers(1, 6), seeds)
def test_accuracy_equals_the_oracle(queries: int, classes: int, k: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    scores, labels = draw.random((queries, classes)), draw.integers(0, classes, queries)
    share = top_k_accuracy(torch.from_numpy(scores), torch.from_numpy(labels), k)
    assert share == pytest.approx(oracles.accuracy(scores, labels, k), abs=1e-6)


@many
@given(st.integers(1, 20), st.integers(1, 8), st.integers(1, 6), seeds)
def test_accuracy_with_ties_is_within_the_possible_range(queries: int, classes: int, k: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    scores, labels = draw.integers(0, 3, (queries, classes)), draw.integers(0, classes, queries)
    share = top_k_accuracy(torch.from_numpy(scores).float(), torch.from_numpy(labels), k)
    against, favour = oracles.accuracy_range(scores, labels, k)
    assert against - 1e-6 <= share <= favour + 1e-6


@pytest.mark.parametrize("classes", [1, 2, 4])
def test_top_5_of_fewer_classes_is_1(classes: int) -> None:
    scores, labels = torch.rand(6, classes), torch.arange(6) % classes
    assert top_k_accuracy(scores, labels, 5) == 1
