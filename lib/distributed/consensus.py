"""What all processes of a run do, or refuse, together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from lib.distributed.processes import Ranks
from lib.errors import ToldElsewhereError, UsageError

T = TypeVar("T")


def run_on_all_ranks(ranks: Ranks, work: Callable[[], T], refusals: tuple[type[Exception], ...] = ()) -> T:
    """Does the same in every process, and refuses in all what one refuses, in one sentence.

    Args:
        world: the processes.
        work: what each does.
        refusals: exceptions that are refusals, beside ``UsageError``.

    Raises:
        UsageError: in the first process, with the sentence; in the others it is a ``ToldElsewhereError``.
    """
    if ranks.size == 1:
        return work()
    said = None
    try:
        done = work()
    except Exception as error:
        if not isinstance(error, (UsageError, *refusals)):
            raise
        said = str(error)
    told = ranks.all_gather_object(said)
    failed = [rank for rank, sentence in enumerate(told) if sentence is not None]
    if not failed:
        return done
    if not ranks.is_rank0:
        raise ToldElsewhereError("the first process tells")
    raise UsageError(told[0] or f"process {failed[0]}: {told[failed[0]]}")


def assert_equal_across_ranks(ranks: Ranks, facts: Mapping[str, str]) -> None:
    """Refuses to go on where processes were told, or see, different things.

    Args:
        world: the processes.
        facts: what should be the same in all, by name.

    Raises:
        UsageError: with what differs and where, in the first process; otherwise as ``together``.
    """
    everyone = ranks.all_gather_object(dict(facts))

    def compare() -> None:
        for rank, theirs in enumerate(everyone):
            for name in facts:
                if theirs[name] != everyone[0][name]:
                    raise UsageError(
                        f"{name}: process {rank} has {theirs[name]}, and process 0 has {everyone[0][name]}; give all "
                        "processes the same options and the same data"
                    )

    run_on_all_ranks(ranks, compare)
