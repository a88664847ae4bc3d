"""What tests change in the code under test for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from lib.distributed import processes, sharded
from lib.method import chunking, memory_bank


@contextmanager
def blocks_of(numbers: int) -> Iterator[None]:
    """Matrices are worked on in blocks of so many numbers, of any shape."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunking, "CPU_BLOCK", numbers)
        patch.setattr(chunking, "MIN_ROWS", 1)
        yield


@contextmanager
def parcels_of(numbers: int) -> Iterator[None]:
    """Rows are drawn and passed on in parcels of so many numbers."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (processes, sharded, memory_bank):
            patch.setattr(module, "CHUNK", numbers)
        yield
