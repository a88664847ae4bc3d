"""Operations that one training step would launch on a GPU: ResNet18 at 32x32, batch 128.

At 32 pixels a GPU computes faster than the host can launch kernels, so their number matters. Views are not counted.
The operations are counted on a CPU, so the numbers are the same everywhere. ``--compile`` fuses them: then the loops
and library calls are counted that PyTorch's compiler plans for a CPU; the loops are replaced by empty ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import models
from benchmarks import measure
from benchmarks.augmentation import PAPER
from lib.data.augmentation import NUM_RANDOM
from lib.data.compiled_augmentation import CompiledAugmentation
from lib.method.loss import neighbourhood_loss
from lib.method.memory_bank import MemoryBank

SAMPLES, BATCH, LOW_DIM, TAU = 4096, 128, 128, 0.1
NO_KERNEL = ("aten.empty", "aten.detach", "aten._unsafe_view", "aten.new_empty", "profiler.")
"""Operations that compute nothing."""


def run(repeats: int, device: torch.device) -> str:
    """A table of numbers of operations; ``repeats`` has no effect, since they do not vary."""
    draw = np.random.default_rng(0)
    images = torch.from_numpy(draw.integers(0, 256, (BATCH, 32, 32, 3), dtype=np.uint8))
    network, index = models.build("resnet18", low_dim=LOW_DIM), torch.arange(BATCH)
    bank = MemoryBank(SAMPLES, LOW_DIM, temperature=TAU, momentum=0.5, seed=0, device="cpu")
    neighbourhoods = torch.stack([index, index.flip(0)], dim=1)
    plain, compiled = Counter[str](), Counter[str]()

    def step(
        found: Counter[str],
        counter: Any,
        augment: Callable[..., Any],
        embed: Callable[..., Any],
        loss: Callable[..., Any],
    ) -> None:
        def count(part: str, work: Callable[[], Any]) -> Any:
            before = counter.operations
            result = work()
            found[part] += counter.operations - before
            return result

        both = "network, forward and backward"
        inputs = count("augmentation", lambda: augment(images, draw.random((BATCH, NUM_RANDOM))))
        embeddings = count(both, lambda: embed(inputs))
        value = count("loss", lambda: loss(embeddings, bank.rows, neighbourhoods, temperature=TAU))
        count(both, value.backward)

    with _Counter() as counter:
        step(plain, counter, PAPER, network, neighbourhood_loss)
    with _Planned() as planned:
        parts = CompiledAugmentation(**vars(PAPER)), torch.compile(network), torch.compile(neighbourhood_loss)
        step(compiled, planned, *parts)
    rows_of_batch = torch.randn(BATCH, LOW_DIM)
    with _Counter() as counter:
        bank.update(rows_of_batch, index)
    plain["bank update"] = counter.operations
    for name, fused in (("optimiser, fused as on a GPU", True), ("optimiser, not fused", False)):
        optimizer = torch.optim.SGD(network.parameters(), lr=0.03, momentum=0.9, nesterov=True, fused=fused)
        optimizer.step()
        with _Counter() as counter:
            optimizer.step()
        plain[name] = counter.operations
    rows = [(part, operations, compiled.get(part, operations)) for part, operations in plain.items()]
    return measure.table(["part of a step", "operations", "with `--compile`"], rows)


class _Planned(ExitStack):
    """Counts what PyTorch's compiler plans, loops and library calls; its loops are replaced by empty ones."""

    def __init__(self) -> None:
        from torch._inductor import config
        from torch._inductor.async_compile import AsyncCompile
        from torch._inductor.scheduler import NopKernelSchedulerNode, Scheduler

        super().__init__()
        self.operations = 0
        codegen = Scheduler.codegen

        def counted(scheduler: Scheduler) -> None:
            self.operations += sum(not isinstance(node, NopKernelSchedulerNode) for node in scheduler.nodes)
            codegen(scheduler)

        self.enter_context(config.patch(force_disable_caches=True))
        self.enter_context(mock.patch.object(Scheduler, "codegen", counted))
        self.enter_context(mock.patch.object(AsyncCompile, "cpp_pybinding", lambda *code: lambda *arguments: None))


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
