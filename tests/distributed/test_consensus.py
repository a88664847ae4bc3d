"""Errors and checks that concern all ranks."""

from __future__ import annotations

from lib.distributed.consensus import assert_equal_across_ranks, run_on_all_ranks
from lib.distributed.processes import Ranks
from lib.errors import ReportedElsewhereError, UsageError
from team import Team


def refusing(ranks: Ranks, which: list[int], text: str) -> str:
    def work() -> str:
        if ranks.rank in which:
            raise UsageError(text.format(rank=ranks.rank))
        return "done"

    try:
        return run_on_all_ranks(ranks, work)
    except ReportedElsewhereError:
        return "elsewhere"
    except UsageError as error:
        return str(error)


def test_error_on_one_rank_is_raised_on_all(team: Team) -> None:
    others = ["elsewhere"] * (len(team.run(refusing, [], "no")) - 1)
    assert team.run(refusing, [], "no") == ["done"] * (len(others) + 1)
    assert team.run(refusing, [1], "no image") == ["rank 1: no image", *others]
    assert team.run(refusing, [0], "no image") == ["no image", *others]
    assert team.run(refusing, [0, 1, 2, 3], "no image") == ["no image", *others]


def agreeing(ranks: Ranks, odd: int) -> str:
    try:
        assert_equal_across_ranks(ranks, {"--low-dim": "64", "training images": "9" if ranks.rank != odd else "8"})
        return "agreed"
    except ReportedElsewhereError:
        return "elsewhere"
    except UsageError as error:
        return str(error)


def test_values_that_differ_between_ranks_are_both_named(team: Team) -> None:
    assert set(team.run(agreeing, -1)) == {"agreed"}
    message, *others = team.run(agreeing, 1)
    assert message.startswith("training images: rank 1 has 8, but rank 0 has 9; ") and set(others) == {"elsewhere"}
