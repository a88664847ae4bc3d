"""Batches of a split, on the device: shuffled and augmented, or in order and as they are.

Images of one size that lie in memory go straight from their index to the batch, without workers. Others are
decoded and cropped by worker processes; the rest of the augmentation happens on the device.

Letters: B batch, b images of it that this process takes, N samples, H, W of an image, h, w that the network sees.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from lib.data.augmentation import NUM_RANDOM, Augmentation
from lib.distributed.processes import Ranks
from lib.seeding import Stream, seed_for

Batch = tuple[torch.Tensor, torch.Tensor]
"""Images (b, 3, h, w) of this process, normalised and channels-last, and the sample indices (B,) of the whole batch."""


@dataclass(frozen=True)
class BatchPlan:
    """What a batch is made of.

    Attributes:
        index: (B,) samples of the batch, of all processes.
        own: (b,) those whose images this process takes.
        draws: (b, ``DRAWS``) the uniform numbers that their augmentation is made of.
    """

    index: np.ndarray
    own: np.ndarray
    random_numbers: np.ndarray


GRACE = 10
"""Seconds that a worker goes on after SIGTERM."""


class _BatchPlans(Sampler[BatchPlan]):
    """What each batch of an epoch is made of.

    Knows nothing of the loader: in a cycle of references the workers' queues would go before the workers do.

    Args:
        samples: N.
        batch_size: B.
        seed: shuffles and augments; None: in order.
        world: the processes, each of which takes its share of every batch, or in order its part of the samples.
    """

    def __init__(self, samples: int, batch_size: int, seed: int | None, ranks: Ranks) -> None:
        self.samples = samples
        self.ranks = ranks
        self.batch_size = batch_size
        self.seed = seed
        self.where = 0, 0, 0  # round, epoch and batch that come next; workers that live on are told by this alone

    def __iter__(self) -> Iterator[BatchPlan]:
        return self.of(*self.where)

    def of(self, round: int, epoch: int, first: int) -> Iterator[BatchPlan]:
        """The plans of an epoch's batches, from the ``first`` on."""
        if self.seed is None:
            for start, stop in self.bounds()[first:]:
                index = np.arange(start, stop)
                yield BatchPlan(index, index, np.zeros((stop - start, NUM_RANDOM)))
            return
        order = np.random.default_rng(seed_for(self.seed, Stream.ORDER, round, epoch)).permutation(self.samples)
        for number, (start, stop) in list(enumerate(self.bounds()))[first:]:
            shares = self.ranks.local_batch_sizes(stop - start)
            mine = self.ranks.slice_in(shares)
            seed = seed_for(self.seed, Stream.AUGMENTATION, round, epoch, number)
            random_numbers = np.random.default_rng(seed).random((stop - start, NUM_RANDOM))
            yield BatchPlan(order[start:stop], order[start:stop][mine], random_numbers[mine])

    def bounds(self) -> list[tuple[int, int]]:
        """First and last of each batch. A single image left over joins the batch before it: batch
        normalisation over one image of one pixel is undefined."""
        part = slice(0, self.samples) if self.seed is not None else self.ranks.shard(self.samples)
        start, stop = part.start, part.stop
        starts = list(range(start, stop, self.batch_size)) or [start]  # one without images, where there are none
        if len(starts) > 1 and stop - starts[-1] == 1:
            starts.pop()
        return list(zip(starts, [*starts[1:], stop], strict=True))


class _Cropped(Dataset[torch.Tensor]):
    """Whole batches of decoded and cropped images."""

    def __init__(self, images: Sequence[np.ndarray], augmentation: Augmentation) -> None:
        self.images = images
        self.augmentation = augmentation

    def __getitem__(self, plan: BatchPlan) -> torch.Tensor:
        """uint8 (b, h, w, 3)."""
        cropped = np.empty((len(plan.own), *self.augmentation.size, 3), np.uint8)
        for place, (sample, random_numbers) in enumerate(zip(plan.own.tolist(), plan.random_numbers, strict=True)):
            cropped[place] = self.augmentation.crop_on_worker(self.images[sample], random_numbers)
        return torch.from_numpy(cropped)


class Loader:
    """Batches of a split, each ready before it is asked for.

    An image's augmentation is a function of the seed, the round, the epoch and its place in the epoch alone: the
    same whatever the number of workers.

    Args:
        images: N arrays (H, W, 3) of uint8, or a tensor (N, H, W, 3) of them on the device, which needs no workers.
        augmentation: of the images.
        batch_size: B.
        workers: processes that decode and crop; 0: this one does.
        seed: shuffles and augments; None: in order.
        device: where the batches are wanted.
        world: the processes among which each batch, or in order the split, is shared out.
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
    ) -> None:
        self.samples = len(images)
        self.ranks = ranks or Ranks()
        self.device = device
        self.augmentation = augmentation
        self._plans = _BatchPlans(len(images), batch_size, seed, self.ranks)
        if isinstance(images, torch.Tensor):
            self._images: torch.Tensor | DataLoader[torch.Tensor] = images
        else:
            self._images = DataLoader(
                _Cropped(images, augmentation),
                batch_size=None,
                sampler=self._plans,
                num_workers=workers,
                persistent_workers=workers > 0,
                pin_memory=device.type == "cuda",
                worker_init_fn=_leave_signals_to_the_run if workers else None,
                generator=torch.Generator(),  # its own: it draws a seed for its workers, which nothing here uses
            )

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self._plans.bounds())

    def epoch(self, round: int = 0, epoch: int = 0, first: int = 0) -> Iterator[Batch]:
        """Every sample once, in order those of this process; the same seed, round and epoch give the same batches.

        Args:
            round, epoch: which.
            first: batch to begin with, for an epoch that goes on.
        """
        batches = self._batches(round, epoch, first)
        return _ahead(batches, self.device) if self.device.type == "cuda" else batches

    def indices(self, round: int, epoch: int, batch: int) -> list[int]:
        """The samples of a batch."""
        return [int(sample) for sample in next(self._plans.of(round, epoch, batch)).index]

    def _batches(self, round: int, epoch: int, first: int) -> Iterator[Batch]:
        self._plans.where = round, epoch, first
        cropped: Iterator[torch.Tensor] = iter(()) if isinstance(self._images, torch.Tensor) else iter(self._images)
        for plan in self._plans.of(round, epoch, first):
            index, own = (torch.from_numpy(part).to(self.device, non_blocking=True) for part in (plan.index, plan.own))
            if isinstance(self._images, torch.Tensor):
                yield self.augmentation(self._images[own], plan.random_numbers), index
            else:
                images = next(cropped).to(self.device, non_blocking=True)
                yield self.augmentation.augment_on_device(images, plan.random_numbers), index


def _leave_signals_to_the_run(worker: int) -> None:
    """Terminals and schedulers signal every process of a run; the workers end when the run does, which may have to
    finish a step first. One that fails ends its workers by SIGTERM: so that is obeyed, a while later.
    """
    for name in ("SIGINT", "SIGUSR1"):
        if hasattr(signal, name):  # Windows has no SIGUSR1
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(GRACE))


def _ahead(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Prepares each batch on a stream of its own, while the GPU still works on the one before."""
    side = torch.cuda.Stream(device)

    def prepare() -> Batch | None:
        with torch.cuda.stream(side):
            return next(batches, None)

    batch = prepare()
    while batch is not None:
        now = torch.cuda.current_stream(device)
        now.wait_stream(side)
        for tensor in batch:
            tensor.record_stream(now)
        yield batch
        batch = prepare()
