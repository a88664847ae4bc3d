"""Discovery compared with the naive oracles, in float64 for tight tolerances and exact orders."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracles
from lib.method import discovery
from lib.method.discovery import discover
from lib.method.entropy import entropy_from_statistics, softmax_statistics
from lib.method.neighbourhoods import Neighbourhoods
from patches import blocks_of

many = settings(max_examples=50, deadline=None)
seeds = st.integers(0, 2**32 - 1)


@st.composite
def memories(draw: st.DrawFn, kinds: tuple[str, ...] = oracles.KINDS, samples: int = 1, low_dim: int = 1) -> np.ndarray:
    """(N, D), of ``samples`` to 14 samples and ``low_dim`` to 6 dimensions."""
    shape = draw(st.integers(samples, 14)), draw(st.integers(low_dim, 6))
    return oracles.rows(draw(st.sampled_from(kinds)), *shape, seed=draw(seeds))


def found_in(memory: np.ndarray, *, temperature: float, anchors: int, size: int, block: int = 2**20) -> Neighbourhoods:
    with blocks_of(block):
        return discover(torch.from_numpy(memory), temperature=temperature, anchors=anchors, size=size)


@many
@given(memories(), st.sampled_from([0.05, 0.1, 0.5, 3.0]), st.integers(1, 60))
def test_entropies_equal_the_oracle(memory: np.ndarray, temperature: float, block: int) -> None:
    found = found_in(memory, temperature=temperature, anchors=0, size=1, block=block)
    expected = oracles.entropies(memory, temperature)
    np.testing.assert_allclose(found.entropy.numpy(), expected, rtol=1e-9, atol=1e-12)


@many
@given(memories(kinds=("random",), samples=3, low_dim=2), st.integers(0, 14), st.integers(1, 4), st.integers(1, 5))
def test_reciprocal_first_selects_mutual_neighbours_first(
    memory: np.ndarray, anchors: int, size: int, partners: int
) -> None:
    samples, anchors = len(memory), min(anchors, len(memory))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(discovery, "PARTNERS", partners)
        found = discover(torch.from_numpy(memory), temperature=0.2, anchors=anchors, size=size, reciprocal_first=True)
    entropies = oracles.entropies(memory, 0.2)
    size = min(size, samples - 1)
    order = sorted(range(samples), key=lambda i: (not oracles.is_reciprocal(memory, i, size), entropies[i]))
    assert found.anchors.tolist() == order[:anchors]
    assert found.neighbours.tolist() == [oracles.neighbours(memory, anchor, size) for anchor in order[:anchors]]


@many
@given(  # without ties: two samples or one dimension would give only ties
    memories(kinds=("random",), samples=3, low_dim=2), st.integers(0, 14), st.integers(1, 20), st.integers(1, 60)
)
def test_anchors_positions_and_neighbours_equal_the_oracle(
    memory: np.ndarray, anchors: int, size: int, block: int
) -> None:
    samples = len(memory)
    anchors = min(anchors, samples)
    found = found_in(memory, temperature=0.2, anchors=anchors, size=size, block=block)
    expected = oracles.anchors(oracles.entropies(memory, 0.2), anchors)
    assert found.anchors.tolist() == expected
    assert found.position.tolist() == oracles.positions(expected, samples)
    assert found.instances.tolist() == sorted(set(range(samples)) - set(expected))
    assert found.neighbours.shape == (anchors, min(size, samples - 1))
    assert found.neighbours.tolist() == [oracles.neighbours(memory, a, size) for a in expected]


@many
@given(memories(), st.integers(1, 20), st.integers(1, 60))
def test_tied_neighbours_are_as_similar_as_those_of_the_oracle(memory: np.ndarray, size: int, block: int) -> None:
    samples = len(memory)
    found = found_in(memory, temperature=0.1, anchors=samples, size=size, block=block)
    for anchor, chosen in zip(found.anchors.tolist(), found.neighbours.tolist(), strict=True):
        best = oracles.neighbours(memory, anchor, size)
        assert anchor not in chosen
        assert len(set(chosen)) == len(chosen) == len(best)
        similarity = [[oracles.dot(memory[anchor], memory[j]) for j in indices] for indices in (chosen, best)]
        np.testing.assert_allclose(similarity[0], similarity[1], atol=1e-12)


@many
@given(memories(), st.integers(0, 14), st.integers(1, 60))
def test_with_ties_the_anchors_have_the_lowest_entropies(memory: np.ndarray, anchors: int, block: int) -> None:
    anchors = min(anchors, len(memory))
    found = found_in(memory, temperature=0.1, anchors=anchors, size=1, block=block)
    entropies = oracles.entropies(memory, 0.1)
    np.testing.assert_allclose(entropies[found.anchors.numpy()], sorted(entropies)[:anchors], atol=1e-12)
    assert found.position.tolist() == oracles.positions(found.anchors.tolist(), len(memory))


@many
@given(st.lists(st.integers(0, 4), min_size=1, max_size=40), st.sampled_from([torch.float32, torch.float64]))
def test_ties_in_entropy_go_to_the_lower_index(groups: list[int], dtype: torch.dtype) -> None:
    """Samples on axes at a very low temperature: the entropy is exactly log(size of the own group)."""
    memory = torch.eye(5, dtype=dtype)[groups]
    found = discover(memory, temperature=1e-5, anchors=len(groups), size=1)
    assert found.anchors.tolist() == sorted(range(len(groups)), key=lambda i: (groups.count(groups[i]), i))
    expected = [math.log(groups.count(group)) for group in groups]
    np.testing.assert_allclose(found.entropy.numpy(), expected, rtol=1e-6)


def test_single_sample_has_zero_entropy_and_no_neighbours() -> None:
    found = discover(torch.tensor([[0.6, 0.8]]), temperature=0.1, anchors=1, size=1)
    assert found.entropy.tolist() == [0.0]
    assert found.neighbours.shape == (1, 0)
    assert (found.anchors.tolist(), found.instances.tolist(), found.position.tolist()) == ([0], [], [0])
    assert found.of(torch.tensor([0])).tolist() == [[0]]


def test_equal_samples_have_maximum_entropy() -> None:
    found = discover(torch.tensor([[0.6, 0.8]]).repeat(50, 1), temperature=0.1, anchors=10, size=3)
    np.testing.assert_allclose(found.entropy.numpy(), math.log(50), rtol=1e-6)


@many
@given(memories(), st.sampled_from([1e-2, 1e-4, 1e-6, 1e-10, 1e-20]))
def test_entropy_is_finite_where_probabilities_underflow(memory: np.ndarray, temperature: float) -> None:
    found = found_in(memory.astype(np.float32), temperature=temperature, anchors=1, size=1)
    assert found.entropy.isfinite().all()
    assert found.entropy.min() >= -1e-6
    assert found.entropy.max() <= math.log(len(memory)) + 1e-6


@many
@given(seeds, st.floats(1.0, 1e30))
def test_entropy_of_a_row_is_finite_for_any_logits(seed: int, scale: float) -> None:
    logits = torch.from_numpy(np.random.default_rng(seed).normal(size=(3, 8)) * scale).float()
    entropy = entropy_from_statistics(softmax_statistics(logits))
    assert entropy.isfinite().all()
    assert (entropy >= -1e-6).all()
    assert (entropy <= math.log(8) + 1e-6).all()


def test_entropy_is_invariant_to_shifted_logits() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.5], [4.0, 4.0, -3.0]], dtype=torch.float64)
    expected = []
    for row in logits.exp().tolist():
        expected.append(-sum(w / sum(row) * math.log(w / sum(row)) for w in row))
    for shift in (0.0, 900.0, -900.0):
        np.testing.assert_allclose(
            entropy_from_statistics(softmax_statistics(logits + shift)).numpy(), expected, rtol=1e-9
        )


@pytest.mark.parametrize("block", [1, 7, 35, 49, 50, 10_000])
def test_blocks_of_any_size_cover_every_sample(block: int) -> None:
    memory = oracles.rows("random", 7, 3, seed=4)  # blocks of 1 row, of 5 and 2 rows, of all 7
    found = found_in(memory, temperature=0.1, anchors=7, size=2, block=block)
    np.testing.assert_allclose(found.entropy.numpy(), oracles.entropies(memory, 0.1), rtol=1e-9)
    assert found.neighbours.tolist() == [oracles.neighbours(memory, a, 2) for a in found.anchors.tolist()]


def test_discovery_does_not_change_the_memory() -> None:
    memory = torch.from_numpy(oracles.rows("random", 9, 3, seed=3))
    before = memory.clone()
    discover(memory, temperature=0.1, anchors=4, size=2)
    assert torch.equal(memory, before)


def test_anchors_do_not_keep_the_memory_of_all_samples() -> None:
    found = discover(torch.from_numpy(oracles.rows("random", 90, 3, seed=3)), temperature=0.1, anchors=4, size=2)
    assert found.anchors.untyped_storage().nbytes() == 4 * 8
    assert found.neighbours.untyped_storage().nbytes() == 4 * 2 * 8
