"""What each process has of a batch and of the samples."""

from __future__ import annotations

import pytest
import torch

from lib.distributed.processes import World
from team import Team


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
def test_shares_of_a_batch_are_two_images_at_least_or_none(size: int) -> None:
    for batch in range(1, 60):
        shares = World(0, size).shares(batch)
        assert sum(shares) == batch and len(shares) == size
        active = [share for share in shares if share]
        assert max(active) - min(active) <= 1 and (min(active) >= 2 or batch == 1)
        assert len(active) == min(size, max(1, batch // 2))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
def test_parts_of_the_samples_are_alike_and_follow_each_other(size: int) -> None:
    for samples in range(40):
        parts = [World(0, size).part(samples, rank) for rank in range(size)]
        assert [row for part in parts for row in range(samples)[part]] == list(range(samples))
        counts = World(0, size).parts(samples)
        assert [part.stop - part.start for part in parts] == counts and max(counts) - min(counts) <= 1
        assert [World(rank, size).part(samples) for rank in range(size)] == parts
        assert [World(rank, size).among(counts) for rank in range(size)] == parts


def test_a_process_alone_talks_to_nobody() -> None:
    alone, rows = World(), torch.arange(3.0)
    assert alone.is_first and alone.collect("a") == ["a"] and alone.tell("a") == "a" and alone.any(True)
    assert torch.equal(alone.sum(rows), torch.arange(3.0)) and torch.equal(alone.max(rows), torch.arange(3.0))
    assert torch.equal(alone.stack(rows), rows[None])


def told(world: World) -> str:
    return world.tell("the first" if world.is_first else None)


def test_the_first_tells_all(team: Team) -> None:
    assert set(team.run(told)) == {"the first"}
