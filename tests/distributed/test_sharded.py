"""Rows in parts: who has which, how they go round, and who meets whom."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest
import torch

from lib.distributed.processes import Ranks
from lib.distributed.sharded import ShardedRows
from patches import parcels_of
from team import Team


def parts_of(ranks: Ranks, samples: int, parcel: int) -> Any:
    with parcels_of(parcel):
        return parts_in_parcels(ranks, samples)


def parts_in_parcels(ranks: Ranks, samples: int) -> Any:
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


@pytest.mark.parametrize("parcel", [1, 5, 2**22])
@pytest.mark.parametrize("samples", [1, 3, 4, 9, 23])
def test_every_row_is_with_one_process_and_comes_round_to_all(samples: int, parcel: int, team: Team) -> None:
    whole = torch.arange(2.0 * samples).view(samples, 2)
    answers = team.run(parts_of, samples, parcel)
    assert torch.equal(torch.cat([own for own, *_ in answers]), whole)
    sizes = [len(own) for own, *_ in answers]
    assert max(sizes) - min(sizes) <= 1
    for own, seen, gathered, taken, parts, any_ in answers:
        assert torch.equal(torch.cat([seen[start] for start in sorted(seen) if len(seen[start])]), whole)
        assert torch.equal(taken, whole.flip(0)[::2]) and parts == sizes and any_
        assert own is answers[0][0] or not len(gathered)
    assert torch.equal(answers[0][2], whole)


def meetings(ranks: Ranks, samples: int, parcel: int) -> Any:
    """Pairs that met here, and how many others the own rows met elsewhere, by what these wrote down."""
    rows = ShardedRows.scatter(torch.arange(2.0 * samples).view(samples, 2), ranks)
    noted, met = torch.zeros(rows.padded_shard_size, 3, dtype=torch.long), []
    with parcels_of(parcel):
        for visit in rows.ring_pairs([noted]):
            numbers = (visit.rows[:, 0] / 2).long()
            assert numbers.tolist() == list(range(visit.start, visit.start + len(visit.rows)))
            own = range(rows.start, rows.start + len(rows.local))[visit.own]
            met += [(i, j) for i in own for j in numbers[visit.theirs].tolist()]
            visit.tables[0][visit.theirs] += len(own)
    assert (noted == noted[:, :1]).all()
    return met, noted[: len(rows.local), 0].tolist()


@pytest.mark.parametrize("samples", [1, 3, 4, 9, 23])
@pytest.mark.parametrize("parcel", [1, 5, 2**22])
def test_rows_of_different_processes_meet_once(samples: int, parcel: int, team: Team) -> None:
    answers, parts = team.run(meetings, samples, parcel), team.run(part_of, samples)
    pairs = Counter(tuple(sorted(pair)) for met, _ in answers for pair in met)
    home = {row: rank for rank, part in enumerate(parts) for row in range(samples)[part]}
    everyone = itertools.combinations(range(samples), 2)
    assert pairs == Counter(pair for pair in everyone if home[pair[0]] != home[pair[1]])
    visited = Counter(j for met, _ in answers for _, j in met)
    assert [count for _, noted in answers for count in noted] == [visited[row] for row in range(samples)]
    most = max(len(met) for met, _ in answers)
    assert samples < 9 or most <= 1.5 * len(pairs) / len(answers)  # the work is shared out


def part_of(ranks: Ranks, samples: int) -> slice:
    return ranks.shard(samples)
