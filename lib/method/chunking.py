"""Block sizes for matrices that are too large to be stored, and products computed block by block."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lib.session.console import progress

CPU_BLOCK = 2**20
"""Elements of a block on a CPU (4 MiB of float32): later passes over the block find it in the cache."""
GPU_BLOCK = 2**26
"""Elements of a block on a GPU (256 MiB of float32): large enough for kernels to outlast their launch."""
MIN_ROWS = 64
"""Minimum rows of a block. Thinner products are slow, because each of them reads all of the other factor."""


def block_size(device: torch.device) -> int:
    """Number of float32 elements to process at a time.

    It depends on the type of the device only, never on free memory: another block size rounds sums differently, and
    a run, also a resumed one, must give the same bits regardless of other programs on the machine.
    """
    return GPU_BLOCK if device.type == "cuda" else CPU_BLOCK


def block_rows(columns: int, device: torch.device) -> int:
    """Number of rows to process at a time of a matrix with ``columns`` columns; at least ``MIN_ROWS``."""
    return max(MIN_ROWS, block_size(device) // columns)


def similarities(rows: torch.Tensor, others: torch.Tensor, what: str) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yields the product ``rows @ others.T`` in blocks of rows.

    Args:
        rows: (M, D).
        others: (S, D).
        what: label of the progress bar.

    Yields:
        The slice of ``rows`` (R of them) and their similarities (R, S). All blocks share one buffer: use a block
        before asking for the next.
    """
    step = block_rows(max(1, len(others)), others.device)
    buffer = rows.new_empty(min(step, len(rows)), len(others))
    for start in progress(range(0, len(rows) if len(others) else 0, step), what, "block"):
        block = slice(start, min(start + step, len(rows)))
        yield block, torch.mm(rows[block], others.t(), out=buffer[: block.stop - start])
