"""Training steps of ResNet18 at 32x32, batch 128, images included, against a contiguous layout and Pillow workers."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

import models
from benchmarks import measure, reference
from benchmarks.augmentation import PAPER
from lib.data.loader import Loader
from lib.distributed import device as placing
from lib.method.loss import neighbourhood_loss
from lib.method.memory_bank import MemoryBank

SAMPLES, BATCH, LOW_DIM, TAU = 50_000, 128, 128, 0.1
WORKERS = 2
MULTIPLY_ADDS = 0.555e9
"""Multiply-adds of ResNet18 for one 32x32 image, forward; backward takes twice as many."""


def run(repeats: int, device: torch.device) -> str:
    """A table of images/s."""
    images = np.random.default_rng(0).integers(0, 256, (SAMPLES, 32, 32, 3), dtype=np.uint8)
    plain, ours = _Plain(images, device), _Ours(images, device)
    square = torch.randn(4096, 4096, device=device)
    ways: dict[str, measure.Way] = {
        "plain": plain.step,
        "this project": ours.step,
        "this project, a constant batch": ours.constant_step,
        "one product of 4096 x 4096 matrices": lambda: square @ square,
    }
    seconds = measure.interleaved(ways, repeats, device)
    *steps, product = seconds
    rows = [
        (
            name,
            measure.spread([BATCH / s for s in seconds[name]], ",.1f"),
            f"{measure.ratio(seconds['plain'], seconds[name]):.2f}",
        )
        for name in steps
    ]
    rate = 2 * 4096**3 / statistics.median(seconds[product])
    reached = 6 * MULTIPLY_ADDS * BATCH / statistics.median(seconds["this project"])
    text = measure.table(["way", "images/s", "times faster than plain"], rows)
    alone = measure.ratio(seconds["this project, a constant batch"], seconds["this project"])
    return (
        f"{text}\n\nWith images the rate is {alone:.0%} of that with a constant batch. The network takes "
        f"{6 * MULTIPLY_ADDS / 1e9:.2f} GFLOP an image, forward and backward: {reached / 1e9:,.0f} GFLOP/s were "
        f"reached, {reached / rate:.0%} of what a product of two 4096 x 4096 matrices reaches here "
        f"({rate / 1e9:,.0f} GFLOP/s)."
    )


def _optimizer(network: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(network.parameters(), lr=0.03, momentum=0.9, nesterov=True, weight_decay=5e-4)


class _Plain:
    def __init__(self, images: np.ndarray, device: torch.device) -> None:
        self.network = models.build("resnet18", low_dim=LOW_DIM).to(device)
        self.optimizer, self.device = _optimizer(self.network), device
        self.memory = measure.unit_rows(SAMPLES, LOW_DIM, device)
        self.batches: Iterator[Any] = iter(reference.loader(images, 32, BATCH, WORKERS))

    def step(self) -> None:
        images, index = next(self.batches)
        images, index = images.to(self.device), index.to(self.device)
        embeddings = self.network(images)
        self.optimizer.zero_grad()
        reference.instance_loss(embeddings, self.memory, index, TAU).backward()
        self.optimizer.step()
        mixed = 0.5 * self.memory[index] + 0.5 * embeddings.detach()
        self.memory[index] = torch.nn.functional.normalize(mixed, dim=1)


class _Ours:
    def __init__(self, images: np.ndarray, device: torch.device) -> None:
        self.network = placing.place(models.build("resnet18", low_dim=LOW_DIM), device)
        self.optimizer = _optimizer(self.network)
        self.bank = MemoryBank(SAMPLES, LOW_DIM, temperature=TAU, momentum=0.5, seed=0, device=device)
        self.batches = Loader(
            torch.from_numpy(images).to(device), PAPER, batch_size=BATCH, workers=0, seed=0, device=device
        ).epoch()
        self.constant = next(self.batches)

    def step(self) -> None:
        self._train(*next(self.batches))

    def constant_step(self) -> None:
        self._train(*self.constant)

    def _train(self, images: torch.Tensor, index: torch.Tensor) -> None:
        embeddings = self.network(images)
        self.optimizer.zero_grad(set_to_none=True)
        neighbourhood_loss(embeddings, self.bank.memory, index[:, None], temperature=TAU).backward()
        self.optimizer.step()
        self.bank.update(embeddings.detach(), index)
