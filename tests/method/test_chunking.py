"""The block size depends only on the type of the device."""

from __future__ import annotations

import pytest
import torch

from lib.method.chunking import MIN_ROWS, block_rows, block_size

GPU = torch.device("cuda", 0)


def test_block_size_does_not_depend_on_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another size would round sums differently, so the bits would depend on other programs that use the GPU."""
    for name in ("mem_get_info", "memory_reserved", "memory_allocated", "memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *arguments: pytest.fail("the device is queried"))
    assert block_size(GPU) == block_size(torch.device("cuda", 1)) > block_size(torch.device("cpu"))
    for device in (GPU, torch.device("cpu")):
        size = block_size(device)
        assert size & (size - 1) == 0  # a power of two
        assert block_rows(1000, device) == size // 1000 and block_rows(10 * size, device) == MIN_ROWS
