"""Seeds for the places of a run."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.seeding import Stream, choose, seed_for

many = settings(max_examples=50, deadline=None)
seeds = st.integers(0, 2**63 - 1)
places = st.lists(st.integers(0, 10_000), max_size=3)


@given(seeds, places)
@many
def test_seed_is_repeatable_and_valid_for_every_generator(seed: int, where: list[int]) -> None:
    first = seed_for(seed, *where)
    assert type(first) is int
    assert 0 <= first < 2**63
    assert seed_for(seed, *where) == first
    torch.Generator().manual_seed(first)
    np.random.default_rng(first)


def test_no_two_epochs_of_a_run_share_a_seed() -> None:
    drawn = {seed_for(7, round, epoch) for round in range(20) for epoch in range(50)}
    assert len(drawn) == 20 * 50


def test_no_two_runs_share_a_seed() -> None:
    drawn = {seed_for(seed, round, 3) for seed in range(200) for round in range(5)}
    assert len(drawn) == 200 * 5


def test_no_two_streams_of_a_run_share_a_seed() -> None:
    """Initial weights, memory noise, and the batches and steps of each epoch."""
    epochs = [(round, epoch) for round in range(3) for epoch in range(3)]
    for seed in range(20):
        once = [seed_for(seed), *(seed_for(seed, stream) for stream in Stream)]
        again = [seed_for(seed, stream, *where) for stream in Stream for where in epochs]
        assert len({*once, *again}) == 1 + len(Stream) * (1 + 9)


@given(seeds, places, places)
@many
def test_different_places_have_different_seeds(seed: int, here: list[int], there: list[int]) -> None:
    assert (seed_for(seed, *here) == seed_for(seed, *there)) == (here == there)


@given(seeds, places)
@many
def test_trailing_zero_gives_another_seed(seed: int, where: list[int]) -> None:
    assert seed_for(seed, *where) != seed_for(seed, *where, 0)


def test_long_seed_does_not_collide_with_a_short_one() -> None:
    assert seed_for(5, 1) != seed_for(2**32 + 5)
    assert seed_for(5, 1, 0) != seed_for(2**32 + 5, 0)


def test_neighbouring_places_have_unrelated_seeds() -> None:
    """Every bit is set in about half of the seeds, and about half of the bits differ between neighbours."""
    drawn = [seed_for(0, 0, epoch) for epoch in range(400)]
    bits = np.array([[seed >> bit & 1 for bit in range(63)] for seed in drawn])
    np.testing.assert_allclose(bits.mean(axis=0), 0.5, atol=0.125)  # five deviations
    np.testing.assert_allclose(np.abs(np.diff(bits, axis=0)).mean(axis=0), 0.5, atol=0.125)


def test_default_seed_is_the_start_time() -> None:
    assert choose(None, None, 1_700_000_000) == 1_700_000_000


def test_seed_option_precedes_checkpoint_precedes_clock() -> None:
    assert choose(0, 5, 7) == 0
    assert choose(None, 5, 7) == 5


@pytest.mark.parametrize("saved", [None, "5", -1, True, 5.0])
def test_invalid_seed_of_a_checkpoint_is_ignored(saved: object) -> None:
    assert choose(None, saved, 7) == 7
