"""Anchors, their number and their neighbourhoods compared with the naive oracles."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracles
from lib.method.discovery import discover
from lib.method.neighbourhoods import Neighbourhoods, consistency, num_anchors, num_neighbours

many = settings(max_examples=50, deadline=None)
seeds = st.integers(0, 2**32 - 1)


# Number of anchors, and consistency.


@many
@given(st.integers(0, 60_000), st.sampled_from([0.0, 0.1, 0.2, 0.25, 0.5, 1.0]), st.integers(0, 12))
def test_number_of_anchors_equals_the_oracle(samples: int, rate: float, round: int) -> None:
    exact = samples * rate * round
    expected = samples if exact >= samples else math.floor(exact)
    assert num_anchors(samples, rate, round) == expected
    if samples <= 300:
        assert num_anchors(samples, rate, round) == oracles.anchor_count(samples, rate, round)


def test_share_of_anchors_grows_by_a_quarter_each_round() -> None:
    assert [num_anchors(50_000, 0.25, r) for r in range(6)] == [0, 12_500, 25_000, 37_500, 50_000, 50_000]
    assert [num_anchors(7, 0.25, r) for r in range(5)] == [0, 1, 3, 5, 7]


@many
@given(st.integers(1, 12), st.integers(1, 4), st.integers(1, 4), seeds)
def test_consistency_equals_the_oracle(anchors: int, size: int, classes: int, seed: int) -> None:
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


def test_all_are_instance_samples_before_the_first_discovery() -> None:
    none = Neighbourhoods.none(4)
    assert none.num_anchors == 0
    assert none.instances.tolist() == [0, 1, 2, 3]
    assert none.position.tolist() == oracles.positions([], 4) == [-1, -2, -3, -4]
    assert none.entropy.tolist() == [0, 0, 0, 0]
    assert none.consistency is None
    assert none.of(torch.tensor([2, 0])).tolist() == [[2], [0]]


@many
@given(st.integers(1, 14), st.integers(0, 14), st.integers(1, 5), seeds)
def test_neighbourhood_is_the_sample_and_its_neighbours(samples: int, anchors: int, size: int, seed: int) -> None:
    memory = torch.from_numpy(oracles.rows("random", samples, 3, seed=seed))
    found = discover(memory, temperature=0.1, anchors=min(anchors, samples), size=size)
    index = np.random.default_rng(seed).permutation(samples)[: max(1, samples // 2)]
    members = found.of(torch.from_numpy(index)).tolist()
    chosen, others = found.anchors.tolist(), found.neighbours.tolist()
    for sample, row in zip(index.tolist(), members, strict=True):
        assert [j for j in row if j >= 0] == oracles.neighbourhood(sample, chosen, others)
        assert row[0] == sample
        assert all(j == -1 for j in row if j < 0)


# State dictionaries.


def some() -> Neighbourhoods:
    return discover(torch.from_numpy(oracles.rows("random", 8, 3, seed=2)), temperature=0.1, anchors=5, size=2)


@pytest.mark.parametrize("share", [None, 0.75, 0.0])
@pytest.mark.parametrize("anchors", [0, 5, 8])
def test_restored_state_is_equal(share: float | None, anchors: int) -> None:
    memory = torch.from_numpy(oracles.rows("random", 8, 3, seed=2))
    found = discover(memory, temperature=0.1, anchors=anchors, size=2)
    state = {**found.state_dict(), "consistency": torch.tensor(math.nan if share is None else share)}
    again = Neighbourhoods.from_state_dict(state)
    for name in ("anchors", "instances", "position", "neighbours", "entropy"):
        assert torch.equal(getattr(again, name), getattr(found, name)), name
    assert again.consistency == share


def test_state_dict_has_the_keys_and_shapes_of_the_reference() -> None:
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


def test_state_dict_of_round_0_is_restored() -> None:
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
def test_inconsistent_state_is_refused(state: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ValueError):
        Neighbourhoods.from_state_dict(state)


@pytest.mark.parametrize(
    ("size", "first", "rounds", "expected"),
    [
        (3, None, 4, [3, 3, 3]),
        (5, 2, 4, [2, 4, 5]),
        (5, 1, 6, [1, 2, 3, 4, 5]),
        (9, 1, 4, [1, 5, 9]),
        (1, 1, 3, [1, 1]),
        (7, 2, 2, [7]),
    ],
)
def test_neighbourhoods_grow_linearly_to_their_size(
    size: int, first: int | None, rounds: int, expected: list[int]
) -> None:
    assert [num_neighbours(size, first, round, rounds) for round in range(1, rounds)] == expected
