"""Sharded rows: scatter, gather, selection, and the ring."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest
import torch

from lib.distributed.processes import Ranks
from lib.distributed.sharded import ShardedRows
from patches import chunks_of
from team import Team


def shards_of(ranks: Ranks, samples: int, chunk: int) -> Any:
    with chunks_of(chunk):
        return shards_in_chunks(ranks, samples)


def shards_in_chunks(ranks: Ranks, samples: int) -> Any:
    rows = ShardedRows.scatter(torch.arange(2.0 * samples).view(samples, 2), ranks)
    seen = {start: part.clone() for start, part in rows.ring()}
    index = torch.arange(samples).flip(0)[::2]
    return (
        rows.local,
        seen,
        rows.gather_to_rank0(),
        rows.index_select(index),
        ranks.shard_sizes(samples),
        ranks.any_rank(ranks.rank == 1),
    )


@pytest.mark.parametrize("chunk", [1, 5, 2**22])
@pytest.mark.parametrize("samples", [1, 3, 4, 9, 23])
def test_ring_visits_every_row_on_every_rank(samples: int, chunk: int, team: Team) -> None:
    whole = torch.arange(2.0 * samples).view(samples, 2)
    answers = team.run(shards_of, samples, chunk)
    assert torch.equal(torch.cat([own for own, *_ in answers]), whole)
    sizes = [len(own) for own, *_ in answers]
    assert max(sizes) - min(sizes) <= 1
    for own, seen, gathered, taken, parts, any_ in answers:
        assert torch.equal(torch.cat([seen[start] for start in sorted(seen) if len(seen[start])]), whole)
        assert torch.equal(taken, whole.flip(0)[::2]) and parts == sizes and any_
        assert own is answers[0][0] or not len(gathered)
    assert torch.equal(answers[0][2], whole)


def pairs_met(ranks: Ranks, samples: int, chunk: int) -> Any:
    """Pairs of rows that were compared on this rank, and for each local row the number compared on other ranks."""
    rows = ShardedRows.scatter(torch.arange(2.0 * samples).view(samples, 2), ranks)
    counts, met = torch.zeros(rows.padded_shard_size, 3, dtype=torch.long), []
    with chunks_of(chunk):
        for received in rows.ring_pairs([counts]):
            numbers = (received.rows[:, 0] / 2).long()
            assert numbers.tolist() == list(range(received.start, received.start + len(received.rows)))
            own = range(rows.start, rows.start + len(rows.local))[received.own]
            met += [(i, j) for i in own for j in numbers[received.theirs].tolist()]
            received.tables[0][received.theirs] += len(own)
    assert (counts == counts[:, :1]).all()
    return met, counts[: len(rows.local), 0].tolist()


@pytest.mark.parametrize("samples", [1, 3, 4, 9, 23])
@pytest.mark.parametrize("chunk", [1, 5, 2**22])
def test_rows_of_different_ranks_are_paired_once(samples: int, chunk: int, team: Team) -> None:
    answers, parts = team.run(pairs_met, samples, chunk), team.run(shard_of, samples)
    pairs = Counter(tuple(sorted(pair)) for met, _ in answers for pair in met)
    owner = {row: rank for rank, part in enumerate(parts) for row in range(samples)[part]}
    all_pairs = itertools.combinations(range(samples), 2)
    assert pairs == Counter(pair for pair in all_pairs if owner[pair[0]] != owner[pair[1]])
    met_elsewhere = Counter(j for met, _ in answers for _, j in met)
    assert [count for _, counts in answers for count in counts] == [met_elsewhere[row] for row in range(samples)]
    most = max(len(met) for met, _ in answers)
    assert samples < 9 or most <= 1.5 * len(pairs) / len(answers)  # the pairs are spread evenly over the ranks


def shard_of(ranks: Ranks, samples: int) -> slice:
    return ranks.shard(samples)
