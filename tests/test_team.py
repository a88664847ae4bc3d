"""The processes that tests share."""

from __future__ import annotations

import os
import time

import pytest
import torch

import team as team_module
from lib.distributed.processes import Ranks
from team import Team


def rank_sum(ranks: Ranks, fails: str) -> float:
    if ranks.rank == 1 and fails == "error":
        raise ValueError("on rank 1")
    if ranks.rank == 1 and fails == "death":
        os._exit(9)
    return float(ranks.all_reduce_sum(torch.tensor(1.0 + ranks.rank)))


@pytest.mark.distributed
def test_failed_process_fails_the_test_and_the_team_restarts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(team_module, "GRACE", 1)
    shared = Team(2)
    try:
        for fails, message in {"error": "ValueError: on rank 1", "death": "process 1 died"}.items():
            started = time.monotonic()
            with pytest.raises(AssertionError, match=message):
                shared.run(rank_sum, fails)
            assert time.monotonic() - started < team_module.LIMIT
            assert shared.run(rank_sum, "") == [3.0, 3.0]
    finally:
        shared.close()
