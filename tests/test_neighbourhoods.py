"""Discovery against the naive oracles. In float64, so that tolerances can be tight and orders are certain."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracles
from lib.neighbourhoods import Neighbourhoods, consistency, discover, entropy_of, num_anchors, softmax_moments
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


# Discovery.


@many
@given(memories(), st.sampled_from([0.05, 0.1, 0.5, 3.0]), st.integers(1, 60))
def test_entropies_are_the_oracles(memory: np.ndarray, temperature: float, block: int) -> None:
    found = found_in(memory, temperature=temperature, anchors=0, size=1, block=block)
    expected = oracles.entropies(memory, temperature)
    np.testing.assert_allclose(found.entropy.numpy(), expected, rtol=1e-9, atol=1e-12)


@many
@given(  # without ties: two samples, or one dimension, would have nothing else
    memories(kinds=("random",), samples=3, low_dim=2), st.integers(0, 14), st.integers(1, 20), st.integers(1, 60)
)
def test_anchors_positions_and_neighbours_are_the_oracles(
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
def test_with_ties_the_neighbours_are_as_similar_as_the_oracles(memory: np.ndarray, size: int, block: int) -> None:
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
    """Samples on axes, and no temperature to speak of: the entropy is log(size of the own group), exactly."""
    memory = torch.eye(5, dtype=dtype)[groups]
    found = discover(memory, temperature=1e-5, anchors=len(groups), size=1)
    assert found.anchors.tolist() == sorted(range(len(groups)), key=lambda i: (groups.count(groups[i]), i))
    expected = [math.log(groups.count(group)) for group in groups]
    np.testing.assert_allclose(found.entropy.numpy(), expected, rtol=1e-6)


def test_a_single_sample_has_zero_entropy_and_no_neighbours() -> None:
    found = discover(torch.tensor([[0.6, 0.8]]), temperature=0.1, anchors=1, size=1)
    assert found.entropy.tolist() == [0.0]
    assert found.neighbours.shape == (1, 0)
    assert (found.anchors.tolist(), found.instances.tolist(), found.position.tolist()) == ([0], [], [0])
    assert found.of(torch.tensor([0])).tolist() == [[0]]


def test_equal_samples_have_the_greatest_entropy() -> None:
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
def test_the_entropy_of_a_row_is_finite_whatever_its_logits(seed: int, scale: float) -> None:
    logits = torch.from_numpy(np.random.default_rng(seed).normal(size=(3, 8)) * scale).float()
    entropy = entropy_of(softmax_moments(logits))
    assert entropy.isfinite().all()
    assert (entropy >= -1e-6).all()
    assert (entropy <= math.log(8) + 1e-6).all()


def test_the_entropy_of_a_row_does_not_change_when_its_logits_are_shifted() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.5], [4.0, 4.0, -3.0]], dtype=torch.float64)
    expected = []
    for row in logits.exp().tolist():
        expected.append(-sum(w / sum(row) * math.log(w / sum(row)) for w in row))
    for shift in (0.0, 900.0, -900.0):
        np.testing.assert_allclose(entropy_of(softmax_moments(logits + shift)).numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize("block", [1, 7, 35, 49, 50, 10_000])
def test_blocks_of_any_size_cover_every_sample(block: int) -> None:
    memory = oracles.rows("random", 7, 3, seed=4)  # 1 row a block, 5 and 2, all 7
    found = found_in(memory, temperature=0.1, anchors=7, size=2, block=block)
    np.testing.assert_allclose(found.entropy.numpy(), oracles.entropies(memory, 0.1), rtol=1e-9)
    assert found.neighbours.tolist() == [oracles.neighbours(memory, a, 2) for a in found.anchors.tolist()]


def test_discovery_leaves_the_memory_as_it_was() -> None:
    memory = torch.from_numpy(oracles.rows("random", 9, 3, seed=3))
    before = memory.clone()
    discover(memory, temperature=0.1, anchors=4, size=2)
    assert torch.equal(memory, before)


def test_the_anchors_own_no_more_memory_than_they_need() -> None:
    found = discover(torch.from_numpy(oracles.rows("random", 90, 3, seed=3)), temperature=0.1, anchors=4, size=2)
    assert found.anchors.untyped_storage().nbytes() == 4 * 8
    assert found.neighbours.untyped_storage().nbytes() == 4 * 2 * 8


# How many, and how pure.


@many
@given(st.integers(0, 60_000), st.sampled_from([0.0, 0.1, 0.2, 0.25, 0.5, 1.0]), st.integers(0, 12))
def test_the_number_of_anchors_is_the_oracles(samples: int, rate: float, round: int) -> None:
    exact = samples * rate * round
    expected = samples if exact >= samples else math.floor(exact)
    assert num_anchors(samples, rate, round) == expected
    if samples <= 300:
        assert num_anchors(samples, rate, round) == oracles.anchor_count(samples, rate, round)


def test_a_quarter_more_of_the_samples_are_anchors_in_each_round() -> None:
    assert [num_anchors(50_000, 0.25, r) for r in range(6)] == [0, 12_500, 25_000, 37_500, 50_000, 50_000]
    assert [num_anchors(7, 0.25, r) for r in range(5)] == [0, 1, 3, 5, 7]


@many
@given(st.integers(1, 12), st.integers(1, 4), st.integers(1, 4), seeds)
def test_consistency_is_the_oracles(anchors: int, size: int, classes: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    labels, chosen = draw.integers(0, classes, 20), draw.permutation(20)[:anchors]
    others = draw.integers(0, 20, (anchors, size))
    share = consistency(torch.from_numpy(chosen), torch.from_numpy(others), torch.from_numpy(labels))
    assert share == pytest.approx(oracles.consistency(chosen, others, labels), rel=1e-6)


def test_consistency_without_pairs_is_unknown() -> None:
    none = Neighbourhoods.none(3)
    assert consistency(none.anchors, none.neighbours, torch.tensor([0, 1, 2])) is None
    alone = discover(torch.ones(1, 1), temperature=0.1, anchors=1, size=1)
    assert consistency(alone.anchors, alone.neighbours, torch.tensor([0])) is None


# Neighbourhoods of a batch.


def test_before_the_first_discovery_everyone_is_an_instance_sample() -> None:
    none = Neighbourhoods.none(4)
    assert none.num_anchors == 0
    assert none.instances.tolist() == [0, 1, 2, 3]
    assert none.position.tolist() == oracles.positions([], 4) == [-1, -2, -3, -4]
    assert none.entropy.tolist() == [0, 0, 0, 0]
    assert none.consistency is None
    assert none.of(torch.tensor([2, 0])).tolist() == [[2], [0]]


@many
@given(memories(), st.integers(0, 14), st.integers(1, 5), seeds)
def test_the_neighbourhood_of_a_sample_is_itself_and_an_anchors_neighbours(
    memory: np.ndarray, anchors: int, size: int, seed: int
) -> None:
    samples = len(memory)
    found = found_in(memory, temperature=0.1, anchors=min(anchors, samples), size=size)
    index = np.random.default_rng(seed).permutation(samples)[: max(1, samples // 2)]
    members = found.of(torch.from_numpy(index)).tolist()
    chosen, others = found.anchors.tolist(), found.neighbours.tolist()
    for sample, row in zip(index.tolist(), members, strict=True):
        assert [j for j in row if j >= 0] == oracles.neighbourhood(sample, chosen, others)
        assert row[0] == sample
        assert all(j == -1 for j in row if j < 0)


# Stored and read back.


def some() -> Neighbourhoods:
    return discover(torch.from_numpy(oracles.rows("random", 8, 3, seed=2)), temperature=0.1, anchors=5, size=2)


@pytest.mark.parametrize("share", [None, 0.75, 0.0])
@pytest.mark.parametrize("anchors", [0, 5, 8])
def test_a_state_read_back_is_the_same(share: float | None, anchors: int) -> None:
    memory = torch.from_numpy(oracles.rows("random", 8, 3, seed=2))
    found = discover(memory, temperature=0.1, anchors=anchors, size=2)
    state = {**found.state_dict(), "consistency": torch.tensor(math.nan if share is None else share)}
    again = Neighbourhoods.from_state_dict(state)
    for name in ("anchors", "instances", "position", "neighbours", "entropy"):
        assert torch.equal(getattr(again, name), getattr(found, name)), name
    assert again.consistency == share


def test_a_state_has_the_references_names_and_sizes() -> None:
    state = some().state_dict()
    names = "samples_num anchor_indexes instance_indexes position neighbours entropy consistency"
    assert sorted(state) == sorted(names.split())
    assert state["samples_num"].item() == 8
    assert state["consistency"].isnan()
    shapes = {name: tuple(value.shape) for name, value in state.items() if value.ndim}
    assert shapes == {
        "anchor_indexes": (5,),
        "instance_indexes": (3,),
        "position": (8,),
        "neighbours": (5, 2),
        "entropy": (8,),
    }


def test_the_state_of_round_0_is_read_back() -> None:
    again = Neighbourhoods.from_state_dict(Neighbourhoods.none(6).state_dict())
    assert again.num_anchors == 0
    assert again.of(torch.tensor([3, 5])).tolist() == [[3], [5]]


def contradictions() -> list[Any]:
    state = some().state_dict()
    anchors, position = state["anchor_indexes"], state["position"]
    changes = {
        "an anchor too few": {"anchor_indexes": anchors[1:]},
        "an instance sample too many": {"instance_indexes": torch.arange(4)},
        "neighbours of fewer anchors": {"neighbours": state["neighbours"][:4]},
        "entropies of fewer samples": {"entropy": state["entropy"][:7]},
        "positions of fewer samples": {"position": position[:7]},
        "an anchor that is no sample": {"anchor_indexes": torch.cat([anchors[:4], torch.tensor([8])])},
        "a neighbour that is no sample": {"neighbours": torch.full((5, 2), 8)},
        "a neighbour below zero": {"neighbours": torch.full((5, 2), -1)},
        "a position beyond the anchors": {"position": position.where(position != 0, 5)},
        "a position beyond the instance samples": {"position": position.where(position != -1, -4)},
        "a position of another sample": {"position": position.flip(0)},
        "an anchor that is an instance sample, too": {"instance_indexes": anchors[:3]},
    }
    return [pytest.param({**state, **change}, id=what) for what, change in changes.items()]


@pytest.mark.parametrize("state", contradictions())
def test_a_state_that_contradicts_itself_is_refused(state: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ValueError):
        Neighbourhoods.from_state_dict(state)
