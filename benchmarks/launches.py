"""Operations that one training step would launch on a GPU: ResNet18 at 32x32, batch 128.

At 32 pixels a GPU computes faster than the host can launch kernels, so their number counts. Views are left out. The
operations are counted on a CPU, so the numbers are the same on every machine; ``--compile`` fuses those of the network.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import models
from benchmarks import measure
from benchmarks.augmentation import PAPER
from lib.data.augmentation import NUM_RANDOM
from lib.method.loss import neighbourhood_loss
from lib.method.memory_bank import MemoryBank

SAMPLES, BATCH, LOW_DIM, TAU = 4096, 128, 128, 0.1
NO_KERNEL = ("aten.empty", "aten.detach", "aten._unsafe_view", "aten.new_empty", "profiler.")
"""Operations that compute nothing."""


def run(repeats: int, device: torch.device) -> str:
    """A table of numbers of operations; ``repeats`` is without effect, since they do not vary."""
    draw = np.random.default_rng(0)
    images = torch.from_numpy(draw.integers(0, 256, (BATCH, 32, 32, 3), dtype=np.uint8))
    network, index = models.build("resnet18", low_dim=LOW_DIM), torch.arange(BATCH)
    bank = MemoryBank(SAMPLES, LOW_DIM, temperature=TAU, momentum=0.5, seed=0, device="cpu")
    neighbourhoods = torch.stack([index, index.flip(0)], dim=1)
    rows = []

    def count(part: str, work: Callable[[], Any]) -> Any:
        with _Counter() as counter:
            result = work()
        rows.append((part, counter.operations))
        return result

    inputs = count("augmentation", lambda: PAPER(images, draw.random((BATCH, NUM_RANDOM))))
    embeddings = count("network, forward", lambda: network(inputs))
    loss = count("loss", lambda: neighbourhood_loss(embeddings, bank.rows, neighbourhoods, temperature=TAU))
    count("backward", loss.backward)
    count("bank update", lambda: bank.update(embeddings.detach(), index))
    for name, fused in (("optimiser, fused as on a GPU", True), ("optimiser, not fused", False)):
        optimizer = torch.optim.SGD(network.parameters(), lr=0.03, momentum=0.9, nesterov=True, fused=fused)
        optimizer.step()
        count(name, optimizer.step)
    return measure.table(["part of a step", "operations"], rows)


class _Counter(TorchDispatchMode):
    """Counts operations that are not views."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in function._schema.returns)
        if not is_view and not str(function).startswith(NO_KERNEL):
            self.operations += 1
        return function(*arguments, **(options or {}))
