"""How much of a matrix that is too large to be held is worked on at a time. Layer 0."""

from __future__ import annotations

import torch

CACHED = 2**20
"""Numbers of a block on a CPU (4 MiB of float32): what is computed from it finds it in the cache."""
LEAST = 64
"""Rows of a block at least: products of fewer are slow, as all of the other factor is read for them."""
SHARE = 16
"""A block takes this part of the free memory of a GPU at most."""


def block_size(device: torch.device) -> int:
    """How many float32 numbers to work on at a time, where a matrix is too large to be held."""
    if device.type != "cuda":
        return CACHED
    free, _ = torch.cuda.mem_get_info(device)
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # PyTorch's, and not in use
    return max(CACHED, min(2**28, (free + held) // (4 * SHARE)))


def block_rows(columns: int, device: torch.device) -> int:
    """How many rows of a matrix of so many columns to work on at a time."""
    return max(LEAST, block_size(device) // columns)
