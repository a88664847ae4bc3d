"""Batches of a split on the device: shuffled and augmented for training, in order for testing.

A tensor of images of one size is indexed directly, without workers. Other images are decoded and cropped by worker
processes; the rest of the augmentation runs on the device.

Letters: B distinct images of a batch, b of them on this rank, V views of each, N samples, H x W input size, h x w
output size.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import groupby

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from lib.data.augmentation import NUM_RANDOM, Augmentation
from lib.distributed.processes import Ranks
from lib.seeding import Stream, seed_for

Batch = tuple[torch.Tensor, torch.Tensor]
"""Images (b V, 3, h, w) of this rank, normalised, the views of an image one after another, and the sample indices (B,)
of the whole batch."""


@dataclass(frozen=True)
class BatchPlan:
    """Samples and random numbers of a batch.

    Attributes:
        index: (B,) sample indices of the whole batch.
        own: (b V,) sample index of each of this rank's views.
        random_numbers: (b V, ``NUM_RANDOM``), uniform in [0, 1), for the augmentation of this rank's views.
        size: (h, w) of the augmented images.
    """

    index: np.ndarray
    own: np.ndarray
    random_numbers: np.ndarray
    size: tuple[int, int]


SizeOfEpoch = Callable[[int, int], tuple[int, int]]
"""Round and epoch -> (h, w) of the augmented images."""
GRACE = 10
"""Seconds that a worker continues after SIGTERM."""
PAUSE = 0.05
"""Seconds that one of several ranks waits before it starts workers. Threads of gloo enter Python shortly after a
collective, to free its tensors, and a process that is forked then waits for ever (Python before 3.11.10)."""


class _BatchPlans(Sampler[BatchPlan]):
    """Yields the plan of each batch of an epoch.

    It holds no reference to the loader: in a reference cycle the workers' queues could be freed before the workers.

    Args:
        samples: N.
        batch_size: B.
        seed: seed of shuffling and augmentation; None: in order.
        ranks: the ranks of the run. With a seed each rank takes part of every batch, otherwise batches of its shard.
        views: V, with a seed.
        size_of: of the augmented images, by epoch.
    """

    def __init__(
        self, samples: int, batch_size: int, seed: int | None, ranks: Ranks, views: int, size_of: SizeOfEpoch
    ) -> None:
        self.size_of = size_of
        self.samples = samples
        self.views = views
        self.ranks = ranks
        self.batch_size = batch_size
        self.seed = seed
        self.next = (0, 0, 0)  # round, epoch and first batch of the next iteration

    def __iter__(self) -> Iterator[BatchPlan]:
        return self.of(*self.next)

    def of(self, round: int, epoch: int, first: int) -> Iterator[BatchPlan]:
        """Plans of the batches of an epoch, starting with batch ``first``."""
        if self.seed is None:
            for start, stop in self.bounds()[first:]:
                index = np.arange(start, stop)
                yield BatchPlan(index, index, np.zeros((stop - start, NUM_RANDOM)), self.size_of(round, epoch))
            return
        size = self.size_of(round, epoch)
        order = np.random.default_rng(seed_for(self.seed, Stream.ORDER, round, epoch)).permutation(self.samples)
        for number, (start, stop) in list(enumerate(self.bounds()))[first:]:
            local = self.ranks.slice_in(self.ranks.local_batch_sizes(stop - start))
            seed = seed_for(self.seed, Stream.AUGMENTATION, round, epoch, number)
            random_numbers = np.random.default_rng(seed).random((stop - start, self.views, NUM_RANDOM))
            own = order[start:stop][local].repeat(self.views)
            yield BatchPlan(order[start:stop], own, random_numbers[local].reshape(-1, NUM_RANDOM), size)

    def bounds(self) -> list[tuple[int, int]]:
        """Start and stop of each batch. A last batch of one image is merged into the previous one: batch normalisation
        over a single image of one pixel is undefined."""
        shard = slice(0, self.samples) if self.seed is not None else self.ranks.shard(self.samples)
        start, stop = shard.start, shard.stop
        starts = list(range(start, stop, self.batch_size)) or [start]  # one empty batch for an empty shard
        if len(starts) > 1 and stop - starts[-1] == 1:
            starts.pop()
        return list(zip(starts, [*starts[1:], stop], strict=True))


class _Cropped(Dataset[tuple[torch.Tensor, BatchPlan]]):
    """Decoded and cropped images, a batch per item."""

    def __init__(self, images: Sequence[np.ndarray], augmentation: Augmentation) -> None:
        self.images = images
        self.augmentation = augmentation

    def __getitem__(self, plan: BatchPlan) -> tuple[torch.Tensor, BatchPlan]:
        """uint8 (b V, h, w, 3), and the plan."""
        cropped, augmentation = np.empty((len(plan.own), *plan.size, 3), np.uint8), self.augmentation.to_size(plan.size)
        places = enumerate(plan.own.tolist())
        for sample, views in groupby(places, key=lambda place: place[1]):  # each image is decoded once
            image = self.images[sample]
            for place, _ in views:
                cropped[place] = augmentation.crop_on_worker(image, plan.random_numbers[place])
        return torch.from_numpy(cropped), plan


class Loader:
    """Iterates over the batches of a split; on a GPU each batch is prepared ahead.

    The augmentation of an image is a function of the seed, the round, the epoch and its position in the epoch, so it
    does not depend on the number of workers or ranks.

    Args:
        images: N uint8 arrays (H, W, 3), or a uint8 tensor (N, H, W, 3) on the device, which needs no workers.
        augmentation: the transform.
        batch_size: B.
        workers: number of processes that decode and crop; 0: the main process.
        seed: seed of shuffling and augmentation; None: in order.
        device: device of the batches.
        ranks: the ranks over which each batch, or without a seed the split, is sharded; None: a single process.
        compiled: whether the network is compiled. If so, the batch size is marked as dynamic, so that a smaller last
            batch does not compile it again.
        views: V, augmented views of each image, with a seed; 1 otherwise.
        size_of: size of the augmented images by epoch; None: that of ``augmentation``.
    """

    def __init__(
        self,
        images: Sequence[np.ndarray] | torch.Tensor,
        augmentation: Augmentation,
        *,
        batch_size: int,
        workers: int,
        seed: int | None,
        device: torch.device,
        ranks: Ranks | None = None,
        compiled: bool = False,
        views: int = 1,
        size_of: SizeOfEpoch | None = None,
    ) -> None:
        self.samples = len(images)
        self.compiled = compiled
        self.ranks = ranks or Ranks()
        self.device = device
        self.augmentation = augmentation
        self._pauses = self.ranks.size > 1 and workers > 0
        self._plans = _BatchPlans(
            len(images), batch_size, seed, self.ranks, views, size_of or partial(_same_size, augmentation.size)
        )
        if isinstance(images, torch.Tensor):
            self._images: torch.Tensor | DataLoader[tuple[torch.Tensor, BatchPlan]] = images
        else:
            self._images = DataLoader(
                _Cropped(images, augmentation),
                batch_size=None,
                sampler=self._plans,
                num_workers=workers,
                persistent_workers=workers > 0,
                pin_memory=device.type == "cuda",
                worker_init_fn=_ignore_signals if workers else None,
                generator=torch.Generator(),  # separate: DataLoader draws an unused seed for its workers
            )

    def __len__(self) -> int:
        """Number of batches per epoch."""
        return len(self._plans.bounds())

    def epoch(self, round: int = 0, epoch: int = 0, first: int = 0) -> Iterator[Batch]:
        """Yields every sample once, or without a seed every sample of this rank's shard, in order.

        The same seed, round and epoch give the same batches.

        Args:
            round, epoch: round and epoch, from 0.
            first: first batch to yield, to resume within an epoch.
        """
        batches = self._batches(round, epoch, first)
        if self.compiled:
            batches = ((mark_batch_size_dynamic(images), index) for images, index in batches)
        return _prefetch(batches, self.device) if self.device.type == "cuda" else batches

    def indices(self, round: int, epoch: int, batch: int) -> list[int]:
        """Sample indices of the whole batch number ``batch``."""
        return [int(sample) for sample in next(self._plans.of(round, epoch, batch)).index]

    def _batches(self, round: int, epoch: int, first: int) -> Iterator[Batch]:
        if isinstance(self._images, torch.Tensor):
            for plan in self._plans.of(round, epoch, first):
                index, own = self._to_device(plan.index), self._to_device(plan.own)
                yield self.augmentation.to_size(plan.size)(self._images[own], plan.random_numbers), index
            return
        self._plans.next = round, epoch, first
        if self._pauses:  # the workers are started by the first epoch
            time.sleep(PAUSE)
            self._pauses = False
        for cropped, plan in self._images:
            images = cropped.to(self.device, non_blocking=True)
            yield self.augmentation.augment_on_device(images, plan.random_numbers), self._to_device(plan.index)

    def _to_device(self, samples: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(samples).to(self.device, non_blocking=True)


def _same_size(size: tuple[int, int], round: int, epoch: int) -> tuple[int, int]:
    return size


def mark_batch_size_dynamic(images: torch.Tensor) -> torch.Tensor:
    """Tells ``torch.compile`` that the first dimension varies; returns ``images``."""
    torch._dynamo.maybe_mark_dynamic(images, 0)
    return images


def _ignore_signals(worker: int) -> None:
    """Makes a worker ignore SIGINT and SIGUSR1, and exit ``GRACE`` seconds after SIGTERM.

    Terminals and schedulers signal every process of a run, but the main process may have to finish a step that needs
    the workers. It ends them when it exits, by SIGTERM if it fails.
    """
    for name in ("SIGINT", "SIGUSR1"):
        if hasattr(signal, name):  # Windows has no SIGUSR1
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(GRACE))


@cache
def _prefetch_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream per device for the whole run: the allocator keeps freed memory separately for each stream."""
    return torch.cuda.Stream(device)


def _prefetch(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Prepares the next batch on a separate CUDA stream while the GPU computes on the current one."""
    prefetch_stream = _prefetch_stream(device)

    def prepare() -> Batch | None:
        with torch.cuda.stream(prefetch_stream):
            return next(batches, None)

    batch = prepare()
    while batch is not None:
        current_stream = torch.cuda.current_stream(device)
        current_stream.wait_stream(prefetch_stream)
        for tensor in batch:
            tensor.record_stream(current_stream)
        yield batch
        batch = prepare()
