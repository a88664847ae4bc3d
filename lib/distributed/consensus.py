"""Steps that succeed or fail on all ranks together, and checks that all ranks have the same input."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from lib.distributed.processes import Ranks
from lib.errors import ReportedElsewhereError, UsageError

T = TypeVar("T")


def run_on_all_ranks(ranks: Ranks, work: Callable[[], T], usage_errors: tuple[type[Exception], ...] = ()) -> T:
    """Runs a function on every rank; if it fails on one rank, all ranks raise.

    A collective: call it on every rank.

    Args:
        usage_errors: exceptions to treat as a ``UsageError``, in addition to ``UsageError`` itself. All others
            propagate on the rank that raised them.

    Returns:
        The result of ``work`` on this rank.

    Raises:
        UsageError: with the message of the lowest failed rank, on rank 0.
        ReportedElsewhereError: on the other ranks.
    """
    if ranks.size == 1:
        return work()
    message = None
    try:
        result = work()
    except Exception as error:
        if not isinstance(error, (UsageError, *usage_errors)):
            raise
        message = str(error)
    messages = ranks.all_gather_object(message)
    failed = [rank for rank, text in enumerate(messages) if text is not None]
    if not failed:
        return result
    if not ranks.is_rank0:
        raise ReportedElsewhereError("rank 0 reports the error")
    raise UsageError(messages[0] or f"rank {failed[0]}: {messages[failed[0]]}")


def assert_equal_across_ranks(ranks: Ranks, facts: Mapping[str, str]) -> None:
    """Raises if a value differs between ranks, such as an option or a fingerprint of the data.

    A collective: call it on every rank.

    Raises:
        UsageError: names the value and the rank that differs from rank 0; on rank 0.
        ReportedElsewhereError: on the other ranks.
    """
    all_facts = ranks.all_gather_object(dict(facts))

    def compare() -> None:
        for rank, theirs in enumerate(all_facts):
            for name in facts:
                if theirs[name] != all_facts[0][name]:
                    raise UsageError(
                        f"{name}: rank {rank} has {theirs[name]}, but rank 0 has {all_facts[0][name]}; start all ranks "
                        "with the same options and the same data"
                    )

    run_on_all_ranks(ranks, compare)
