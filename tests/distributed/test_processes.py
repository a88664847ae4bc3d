"""What each process has of a batch and of the samples."""

from __future__ import annotations

import pytest
import torch

from lib.distributed.processes import Ranks
from team import Team


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
def test_shares_of_a_batch_are_two_images_at_least_or_none(size: int) -> None:
    for batch in range(1, 60):
        shares = Ranks(0, size).local_batch_sizes(batch)
        assert sum(shares) == batch and len(shares) == size
        active = [share for share in shares if share]
        assert max(active) - min(active) <= 1 and (min(active) >= 2 or batch == 1)
        assert len(active) == min(size, max(1, batch // 2))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
def test_parts_of_the_samples_are_alike_and_follow_each_other(size: int) -> None:
    for samples in range(40):
        parts = [Ranks(0, size).shard(samples, rank) for rank in range(size)]
        assert [row for part in parts for row in range(samples)[part]] == list(range(samples))
        counts = Ranks(0, size).shard_sizes(samples)
        assert [part.stop - part.start for part in parts] == counts and max(counts) - min(counts) <= 1
        assert [Ranks(rank, size).shard(samples) for rank in range(size)] == parts
        assert [Ranks(rank, size).slice_in(counts) for rank in range(size)] == parts


def test_a_process_alone_talks_to_nobody() -> None:
    alone, rows = Ranks(), torch.arange(3.0)
    assert (
        alone.is_rank0
        and alone.all_gather_object("a") == ["a"]
        and alone.broadcast_object("a") == "a"
        and alone.any_rank(True)
    )
    assert torch.equal(alone.all_reduce_sum(rows), torch.arange(3.0)) and torch.equal(
        alone.all_reduce_max(rows), torch.arange(3.0)
    )
    assert torch.equal(alone.all_gather(rows), rows[None])


def told(ranks: Ranks) -> str:
    return ranks.broadcast_object("the first" if ranks.is_rank0 else None)


def test_the_first_tells_all(team: Team) -> None:
    assert set(team.run(told)) == {"the first"}
