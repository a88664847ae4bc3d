"""How much of a matrix that is too large to be held is worked on at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lib.session.console import progress

CACHED = 2**20
"""Numbers of a block on a CPU (4 MiB of float32): what is computed from it finds it in the cache."""
ON_GPU = 2**26
"""Numbers of a block on a GPU (256 MiB of float32): its kernels take longer than it takes to launch them."""
LEAST = 64
"""Rows of a block at least: products of fewer are slow, as all of the other factor is read for them."""


def block_size(device: torch.device) -> int:
    """How many float32 numbers to work on at a time, where a matrix is too large to be held.

    It depends on the kind of device alone and never on how much memory is free: sums over other blocks are rounded
    differently, and a run has to give the same bits whatever else runs beside it, also after a resume.
    """
    return ON_GPU if device.type == "cuda" else CACHED


def block_rows(columns: int, device: torch.device) -> int:
    """How many rows of a matrix of so many columns to work on at a time."""
    return max(LEAST, block_size(device) // columns)


def similarities(rows: torch.Tensor, others: torch.Tensor, what: str) -> Iterator[tuple[slice, torch.Tensor]]:
    """Similarities (R, S) of blocks of rows to others (S, D), all in the same memory; a bar says what for."""
    step = block_rows(max(1, len(others)), others.device)
    room = rows.new_empty(min(step, len(rows)), len(others))
    for start in progress(range(0, len(rows) if len(others) else 0, step), what, "block"):
        block = slice(start, min(start + step, len(rows)))
        yield block, torch.mm(rows[block], others.t(), out=room[: block.stop - start])
