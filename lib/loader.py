"""Batches of a split: in random order with random transforms, or in order with fixed ones. Layer 2.

Letters: B batch, N samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from lib.seeding import Stream, seed_for

Transform = Callable[[np.ndarray], torch.Tensor]
Batch = tuple[torch.Tensor, torch.Tensor]
"""Images (B, 3, h, w) and their sample indices (B,)."""


class _Transformed(Dataset[Batch]):
    """Whole batches of transformed images, each image under its own seed.

    The seed travels with the index, so a sample's augmentation does not depend on which worker, or how
    many, prepared it, and PyTorch's generator is left as it was.
    """

    def __init__(self, images: Sequence[np.ndarray], transform: Transform) -> None:
        self.images = images
        self.transform = transform

    def __getitem__(self, batch: np.ndarray) -> Batch:
        """``batch``: (B, 2), a row of (sample, seed) each."""
        with torch.random.fork_rng(devices=[]):
            images = torch.stack([self._one(sample, seed) for sample, seed in batch.tolist()])
        return images, torch.from_numpy(batch[:, 0].copy())

    def _one(self, sample: int, seed: int) -> torch.Tensor:
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would queue a seed for every GPU, too
        return self.transform(self.images[sample])


class Loader:
    """Batches of a split, prepared by worker processes that live as long as the loader.

    Args:
        images: N arrays (H, W, 3) of uint8.
        transform: of one image.
        batch_size: B.
        workers: processes; 0 prepares batches in this one.
        seed: shuffles, and seeds the transforms; None: in order, for fixed transforms.
        pinned: page-locked batches, for a GPU.
    """

    def __init__(
        self,
        images: Sequence[np.ndarray],
        transform: Transform,
        *,
        batch_size: int,
        workers: int,
        seed: int | None,
        pinned: bool = False,
    ) -> None:
        self.samples = len(images)
        self.batch_size = batch_size
        self.seed = seed
        self._order: list[np.ndarray] = []
        self._batches = DataLoader(
            _Transformed(images, transform),
            batch_size=None,
            sampler=self._order,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=pinned,
            generator=torch.Generator(),  # its own: it draws a seed for its workers, which nothing here uses
        )

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self._bounds())

    def epoch(self, round: int = 0, epoch: int = 0) -> Iterator[Batch]:
        """Every sample once; the same seed, round and epoch give the same batches."""
        if self.seed is None:
            plan = torch.stack([torch.arange(self.samples), torch.zeros(self.samples, dtype=torch.long)], dim=1)
        else:
            draw = torch.Generator().manual_seed(seed_for(self.seed, Stream.BATCHES, round, epoch))
            seeds = torch.randint(2**63 - 1, (self.samples,), generator=draw)
            plan = torch.stack([torch.randperm(self.samples, generator=draw), seeds], dim=1)  # (N, 2)
        self._order[:] = [plan[start:stop].numpy() for start, stop in self._bounds()]
        return iter(self._batches)

    def _bounds(self) -> list[tuple[int, int]]:
        """First and last of each batch. A single image left over joins the batch before it: batch
        normalisation over one image of one pixel is undefined."""
        starts = list(range(0, self.samples, self.batch_size))
        if len(starts) > 1 and self.samples - starts[-1] == 1:
            starts.pop()
        return list(zip(starts, [*starts[1:], self.samples], strict=True))
