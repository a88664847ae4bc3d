"""Temporary changes of constants of the code under test."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from lib.distributed import processes, sharded
from lib.method import chunking, memory_bank


@contextmanager
def blocks_of(numbers: int) -> Iterator[None]:
    """Sets the block size to a number of elements, without a minimum of rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunking, "CPU_BLOCK", numbers)
        patch.setattr(chunking, "MIN_ROWS", 1)
        yield


@contextmanager
def chunks_of(numbers: int) -> Iterator[None]:
    """Sets the chunk size for drawing and exchanging rows to a number of elements."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (processes, sharded, memory_bank):
            patch.setattr(module, "CHUNK", numbers)
        yield
