"""Shards, local batches and collectives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from lib.distributed import processes
from lib.distributed.processes import Ranks
from team import Team


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
def test_local_batches_have_at_least_two_images_or_none(size: int) -> None:
    for batch in range(1, 60):
        sizes = Ranks(0, size).local_batch_sizes(batch)
        assert sum(sizes) == batch and len(sizes) == size
        active = [count for count in sizes if count]
        assert max(active) - min(active) <= 1 and (min(active) >= 2 or batch == 1)
        assert len(active) == min(size, max(1, batch // 2))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
def test_shards_are_consecutive_and_differ_by_at_most_one_row(size: int) -> None:
    for samples in range(40):
        parts = [Ranks(0, size).shard(samples, rank) for rank in range(size)]
        assert [row for part in parts for row in range(samples)[part]] == list(range(samples))
        counts = Ranks(0, size).shard_sizes(samples)
        assert [part.stop - part.start for part in parts] == counts and max(counts) - min(counts) <= 1
        assert [Ranks(rank, size).shard(samples) for rank in range(size)] == parts
        assert [Ranks(rank, size).slice_in(counts) for rank in range(size)] == parts


def test_single_process_collectives_are_no_ops() -> None:
    single, rows = Ranks(), torch.arange(3.0)
    assert (
        single.is_rank0
        and single.all_gather_object("a") == ["a"]
        and single.broadcast_object("a") == "a"
        and single.any_rank(True)
    )
    assert torch.equal(single.all_reduce_sum(rows), torch.arange(3.0)) and torch.equal(
        single.all_reduce_max(rows), torch.arange(3.0)
    )
    assert torch.equal(single.all_gather(rows), rows[None])


def from_rank0(ranks: Ranks) -> str:
    return ranks.broadcast_object("rank 0" if ranks.is_rank0 else None)


def test_broadcast_object_sends_the_object_of_rank_0(team: Team) -> None:
    assert set(team.run(from_rank0)) == {"rank 0"}


@pytest.mark.parametrize(
    ("others", "given"), [("cuda:1", torch.device("cuda", 0)), ("", None)], ids=["all have a GPU", "one has none"]
)
def test_nccl_gets_the_gpu_if_every_rank_has_one(
    others: str, given: torch.device | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise NCCL would wait for the rank without a GPU."""
    arguments: dict[str, Any] = {}
    store = dist.HashStore()
    dist.PrefixStore("start 0", store).set("GPU of rank 1", others)
    monkeypatch.setattr(processes, "rendezvous", lambda *words, **named: iter([(store, 0, 2)]))
    monkeypatch.setattr(dist, "init_process_group", lambda *words, **named: arguments.update(named, backend=words[0]))
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    Ranks.from_environment(torch.device("cuda", 0))
    assert arguments["backend"] == "cpu:gloo,cuda:nccl" and arguments["device_id"] == given
