"""Batches of a split, on the device: shuffled and augmented, or in order and as they are. Layer 3.

Images of one size that lie in memory go straight from their index to the batch, without workers. Others are
decoded and cropped by worker processes; the rest of the augmentation happens on the device.

Letters: B batch, N samples, H, W of an image, h, w that the network sees.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from lib.augment import DRAWS, Augmentation
from lib.seeding import Stream, seed_for

Batch = tuple[torch.Tensor, torch.Tensor]
"""Images (B, 3, h, w), normalised and channels-last, and their sample indices (B,)."""
Plan = tuple[np.ndarray, np.ndarray]
"""Sample indices (B,) of a batch, and the uniform numbers (B, ``DRAWS``) that its augmentation is made of."""


GRACE = 10
"""Seconds that a worker goes on after SIGTERM."""


class _Plans(Sampler[Plan]):
    """What each batch of an epoch is made of.

    Knows nothing of the loader: in a cycle of references the workers' queues would go before the workers do.

    Args:
        samples: N.
        batch_size: B.
        seed: shuffles and augments; None: in order.
    """

    def __init__(self, samples: int, batch_size: int, seed: int | None) -> None:
        self.samples = samples
        self.batch_size = batch_size
        self.seed = seed
        self.where = 0, 0, 0  # round, epoch and batch that come next; workers that live on are told by this alone

    def __iter__(self) -> Iterator[Plan]:
        return self.of(*self.where)

    def of(self, round: int, epoch: int, first: int) -> Iterator[Plan]:
        """The plans of an epoch's batches, from the ``first`` on."""
        order = np.arange(self.samples)
        if self.seed is not None:
            order = np.random.default_rng(seed_for(self.seed, Stream.ORDER, round, epoch)).permutation(self.samples)
        for number, (start, stop) in list(enumerate(self.bounds()))[first:]:
            draws = np.zeros((stop - start, DRAWS))
            if self.seed is not None:
                seed = seed_for(self.seed, Stream.AUGMENTATION, round, epoch, number)
                np.random.default_rng(seed).random(out=draws)
            yield order[start:stop], draws

    def bounds(self) -> list[tuple[int, int]]:
        """First and last of each batch. A single image left over joins the batch before it: batch
        normalisation over one image of one pixel is undefined."""
        starts = list(range(0, self.samples, self.batch_size))
        if len(starts) > 1 and self.samples - starts[-1] == 1:
            starts.pop()
        return list(zip(starts, [*starts[1:], self.samples], strict=True))


class _Cropped(Dataset[torch.Tensor]):
    """Whole batches of decoded and cropped images."""

    def __init__(self, images: Sequence[np.ndarray], augmentation: Augmentation) -> None:
        self.images = images
        self.augmentation = augmentation

    def __getitem__(self, plan: Plan) -> torch.Tensor:
        """uint8 (B, h, w, 3)."""
        pairs = zip(plan[0].tolist(), plan[1], strict=True)
        return torch.from_numpy(np.stack([self.augmentation.cut(self.images[i], draws) for i, draws in pairs]))


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
    ) -> None:
        self.samples = len(images)
        self.device = device
        self.augmentation = augmentation
        self._plans = _Plans(len(images), batch_size, seed)
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
        """Every sample once; the same seed, round and epoch give the same batches.

        Args:
            round, epoch: which.
            first: batch to begin with, for an epoch that goes on.
        """
        batches = self._batches(round, epoch, first)
        return _ahead(batches, self.device) if self.device.type == "cuda" else batches

    def indices(self, round: int, epoch: int, batch: int) -> list[int]:
        """The samples of a batch."""
        samples, _ = next(self._plans.of(round, epoch, batch))
        return [int(sample) for sample in samples]

    def _batches(self, round: int, epoch: int, first: int) -> Iterator[Batch]:
        self._plans.where = round, epoch, first
        cropped = iter(()) if isinstance(self._images, torch.Tensor) else iter(self._images)
        for samples, draws in self._plans.of(round, epoch, first):
            index = torch.from_numpy(samples).to(self.device, non_blocking=True)
            if isinstance(self._images, torch.Tensor):
                yield self.augmentation(self._images[index], draws), index
            else:
                yield self.augmentation.finish(next(cropped).to(self.device, non_blocking=True), draws), index


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
