"""What a training run will hold in memory, counted before its first step.

    process       what this process holds already, and the convolutions' machine code, which comes with the first step
    network       parameters, buffers, optimiser state, and the greater of two moments: forward and backward pass of
                  a batch, gradients included, or gradients and temporaries of the optimiser's step
    memory bank   the bank, the neighbourhoods, and the rows that the health figures compare
    logits        the criterion's blocks
    discovery     in place of logits and passes, where the blocks of discovery and evaluation take more than those, or
                  with several processes another's part of the bank, or the whole of it in a checkpoint
    data          decoded images that lie in memory, batches under way, worker processes

Passes are not estimated but walked through (``lib/training/activations.py``).

What cannot be known beforehand is left out: what a GPU's driver and its libraries take for themselves, on the GPU
(some 0.5 GiB) and on the host.

Letters: B batch, N samples, D embedding, K neighbours, h, w pixels that the network sees.
"""

from __future__ import annotations

import math
import multiprocessing
from dataclasses import dataclass, replace

import psutil
import torch

from lib.config.options import Options, height_and_width
from lib.distributed.device import PRECISIONS
from lib.errors import UsageError
from lib.method import diagnostics
from lib.method.chunking import block_rows, block_size
from lib.training.activations import activations

FLOAT, INDEX = 4, 8
"""Bytes of a float32 and of an index."""
KERNELS = 48 * 2**20
"""Bytes of machine code, read or compiled, that training brings into a process that has built its network: measured
with a small ResNet and PyTorch 2.15 on x86-64."""
HOLES = 5
"""One in so many bytes comes on top of the passes on the host: arrays up to 32 MiB lie on glibc's heap, and the holes
they leave are neither all used nor given back. Measured: a twentieth to a half, the most where batches are small. Where
each array is mapped alone (``MALLOC_MMAP_THRESHOLD_``), there are none."""
WORKER, SPAWNED = 16 * 2**20, 300 * 2**20
"""Bytes that a worker process has to itself beside its batches: forked (measured as above) it shares nearly everything
with this process, and otherwise it imports PyTorch anew (what that alone takes)."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """What there is to plan for.

    Attributes:
        network: as it will be trained, on its device.
        device: where it is.
        batch_size: B, of this process.
        size: (h, w).
        samples: N.
        low_dim: D.
        neighbours: K.
        optimizer: ``sgd``, ``adam`` or ``rmsprop``.
        momentum: of the optimiser; 0: none.
        variant: AMSGrad or centred RMSprop, which keep one number more for each parameter.
        iter_size: batches to an optimiser step.
        block: columns of the bank that the criterion takes at a time.
        scratch: bytes that discovery or evaluation hold at their peak, the greater, beside the bank.
        images: bytes of decoded images that lie in the host's memory already.
        images_on_device: bytes of these of which the device has a copy.
        workers_num: processes that prepare images.
        autocast: what the network computes in under ``torch.autocast``; None: as it is.
        layout: of the batch's images.
        processes: over which the samples lie in parts.
    """

    network: torch.nn.Module
    device: torch.device
    batch_size: int
    size: tuple[int, int]
    samples: int
    low_dim: int
    neighbours: int
    optimizer: str
    momentum: float
    iter_size: int = 1
    block: int
    scratch: int
    images: int
    images_on_device: int = 0
    workers_num: int
    autocast: torch.dtype | None = None
    layout: torch.memory_format = torch.channels_last
    processes: int = 1
    variant: bool = False


@dataclass(frozen=True)
class Place:
    """What one memory will hold.

    Attributes:
        name: ``host``, or a GPU's, such as ``cuda:0``.
        parts: bytes by name, at the moment that takes the most.
        taken: bytes of these that are in use already.
    """

    name: str
    parts: dict[str, int]
    taken: int

    @property
    def peak(self) -> int:
        """Bytes at the moment that takes the most."""
        return sum(self.parts.values())

    def missing(self, free: int) -> int:
        """Bytes by which ``free`` ones, beside those in use, are too few; 0 or less: it fits."""
        return self.peak - self.taken - free

    def text(self) -> str:
        """One line."""
        parts = ", ".join(f"{name} {_gib(size)}" for name, size in self.parts.items())
        return f"{self.name} {_gib(self.peak)} GiB: {parts} GiB"


@dataclass(frozen=True)
class MemoryPlan:
    """What a training will hold, and where.

    Attributes:
        training: what it was made for.
        passes: bytes of ``activations``.
        host: of the host's memory.
        device: of the GPU's, or None where the network is on the host.
    """

    training: Training
    passes: int
    host: Place
    device: Place | None

    def text(self) -> str:
        """A line for each place."""
        return "\n".join(place.text() for place in (self.host, self.device) if place)

    def check(self, free_host: int, free_device: int = 0) -> None:
        """Refuses what does not fit.

        Args:
            free_host: bytes that the host's memory has beside those in use, as ``lib/training/free_memory.py`` tells.
            free_device: the same of the GPU's, where there is one.

        Raises:
            UsageError: with the option that would make it fit, or that there is none.
        """
        for place, room in ((self.host, free_host), (self.device, free_device)):
            if place and place.missing(room) > 0:
                remedy = self._option(free_host, free_device) or _other(place, room)
                raise UsageError(
                    f"training takes {place.text()}, of which {_gib(place.taken)} GiB are in use already, and "
                    f"{_gib(room)} GiB more are free: {remedy}"
                )

    def _option(self, free_host: int, free_device: int) -> str | None:
        """The first option that alone makes it fit, with its greatest power of two that does."""
        for option in ("batch_size", "workers_num", "low_dim"):
            powers = (getattr(self.training, option) - 1).bit_length() if getattr(self.training, option) > 1 else 0
            for power in reversed(range(option == "batch_size", powers)):
                other = replace(self.training, **{option: 2**power})
                passes = _passes(other) if option == "batch_size" else self.passes
                host, device = _places(other, passes, self.host.taken, self.device.taken if self.device else 0)
                if host.missing(free_host) <= 0 and (device is None or device.missing(free_device) <= 0):
                    return f"set --{option.replace('_', '-')} to {2**power} or less"
        return None


def of_options(
    options: Options,
    network: torch.nn.Module,
    device: torch.device,
    *,
    samples: int,
    images: int,
    resident: int,
    processes: int = 1,
) -> MemoryPlan:
    """The plan of a training run; to be called when network and images are there, and the memory bank is not.

    Args:
        options: of the run.
        network: placed.
        device: where it is.
        samples: N.
        images: bytes of decoded images that lie in the host's memory.
        resident: bytes of these of which a GPU gets a copy.
        processes: over which batches and samples are shared out.
    """
    batch, part = math.ceil(options.batch_size / processes), math.ceil(samples / processes)
    return plan(
        Training(
            network=network,
            device=device,
            batch_size=batch,
            size=height_and_width(options.size),
            samples=samples,
            low_dim=options.low_dim,
            neighbours=options.ANs_size,
            optimizer=options.optimizer,
            momentum=options.momentum,
            variant=options.amsgrad if options.optimizer == "adam" else options.centered,
            iter_size=options.iter_size,
            block=block_size(device) // options.batch_size,
            scratch=3 * FLOAT * block_rows(part, device) * part,
            images=images,
            images_on_device=resident,
            workers_num=options.workers_num,
            autocast=PRECISIONS[options.amp] if options.amp else None,
            processes=processes,
        )
    )


def plan(training: Training) -> MemoryPlan:
    """Counts what a training will hold, beside what this process holds already."""
    passes = _passes(training)
    in_use = 0 if _on_host(training) else torch.cuda.memory_allocated(training.device)
    return MemoryPlan(training, passes, *_places(training, passes, psutil.Process().memory_info().rss, in_use))


def _passes(training: Training) -> int:
    shape = (training.batch_size, 3, *training.size)
    return activations(training.network, shape, autocast=training.autocast, layout=training.layout)


def _places(training: Training, passes: int, host_taken: int, device_taken: int) -> tuple[Place, Place | None]:
    """The parts of a plan, on the host and on the GPU."""
    state = [*training.network.parameters(), *training.network.buffers()]
    weights = sum(tensor.nbytes for tensor in state)
    pixels = training.batch_size * 3 * training.size[0] * training.size[1]
    bank = math.ceil(training.samples / training.processes) * training.low_dim * FLOAT
    worker = (WORKER if multiprocessing.get_all_start_methods()[0] == "fork" else SPAWNED) + 3 * pixels
    prepared = training.images + 2 * pixels + training.workers_num * worker
    process = max(0, host_taken - training.images - (weights if _on_host(training) else 0)) + KERNELS
    computing = _computing(training, passes, weights, bank)
    data = 6 * FLOAT * pixels
    if _on_host(training):
        return Place("host", {"process": process, **computing, "data": prepared + data}, host_taken), None
    # the bank is drawn on the host, and passes through it into a checkpoint
    whole = training.samples * training.low_dim * FLOAT
    host = Place("host", {"process": process, "memory bank": whole, "data": prepared}, host_taken)
    computing["data"] = training.images_on_device + 2 * pixels + data
    return host, Place(str(training.device), computing, device_taken)


def _computing(training: Training, passes: int, weights: int, bank: int) -> dict[str, int]:
    """The parts that are where the network is."""
    sizes = [parameter.nbytes for parameter in training.network.parameters()]
    moments = {"sgd": training.momentum > 0, "rmsprop": 1 + (training.momentum > 0), "adam": 2}[training.optimizer]
    moments += training.variant and training.optimizer != "sgd"
    # PyTorch steps parameter by parameter on the host, and with all at once on a GPU
    temporaries = (1 if training.optimizer == "sgd" else 2) * (max(sizes) if _on_host(training) else sum(sizes))
    passes += passes // HOLES if _on_host(training) else 0
    held = sum(sizes) if training.iter_size > 1 else 0
    network, moment = weights + moments * sum(sizes), max(held + passes, sum(sizes) + temporaries)
    neighbourhoods = training.samples * (2 * INDEX + FLOAT + training.neighbours * INDEX)
    compared = 2 * min(training.samples, diagnostics.ROWS) * training.low_dim * FLOAT
    logits = 3 * FLOAT * training.batch_size * min(training.block, training.samples)
    parts = {"network": network, "memory bank": bank + neighbourhoods + compared}
    scratch = training.scratch
    if training.processes > 1:  # a part of another process comes by; the first has the whole bank when it saves
        scratch = max(scratch + bank, training.samples * training.low_dim * FLOAT if _on_host(training) else 0)
    if scratch > moment + logits:
        return {**parts, "discovery": scratch}
    return {**parts, "network": network + moment, "logits": logits}


def _other(place: Place, room: int) -> str:
    """What would help where no option does."""
    if place.missing(room) <= place.parts.get("network", 0):
        return "no batch size makes it fit; choose a smaller --network"
    if place.missing(room) <= place.parts["data"]:
        return "no option makes it fit; it takes fewer or smaller images"
    return "no option makes it fit; it takes a machine with more memory"


def _on_host(training: Training) -> bool:
    return training.device.type == "cpu"


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}"
