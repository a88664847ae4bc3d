"""Seconds of 1,000 image passes, so that runs of equal passes can be compared at equal seconds: options and SimCLR.

The network, the pixels and the thread of the study (``benchmarks/study.py``), its 50,000 images and batches of 128,
with augmentation, optimiser step and update of the memory bank; without evaluation. SimCLR by lightly
(``benchmarks/simclr.py``) augments images one by one. It is left out if lightly is not installed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

import models
from benchmarks import measure, reference, simclr
from benchmarks.study import CFGS, VIEW_LOSS
from lib.config.options import Options, height_and_width
from lib.config.parser import read_options
from lib.data.augmentation import for_training
from lib.data.loader import Loader
from lib.distributed import device as placing
from lib.distributed.processes import Ranks
from lib.method import terms
from lib.method.memory_bank import MemoryBank
from lib.method.neighbourhoods import Neighbourhoods
from lib.training import optim
from lib.training.checkpoint import TrainingState
from lib.training.trainer import batch_loss

SAMPLES, STEPS, EARLY = 50_000, 4, 12
"""Images, steps of a repeat, and pixels of early epochs."""
WAYS: dict[str, tuple[tuple[str, ...], bool]] = {
    "the paper, round 0": ((), False),
    "the paper, last round": ((), True),
    "two views, loss between them, round 0": (VIEW_LOSS, False),
    "two views, loss between them, last round": (VIEW_LOSS, True),
    f"the paper, round 0, early epochs of {EARLY} pixels": (
        ("--early-size", str(EARLY), "--early-share", "0.5"),
        False,
    ),
}
"""Name -> options, and whether all samples are anchors with a neighbour."""


def run(repeats: int, device: torch.device) -> str:
    """A table of seconds; on a CPU with one thread, as in the study."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    images = np.random.default_rng(0).integers(0, 256, (SAMPLES, 32, 32, 3), dtype=np.uint8)
    ways: dict[str, Any] = {name: _Ours(images, device, *setting) for name, setting in WAYS.items()}
    if importlib.util.find_spec("lightly"):
        ways["SimCLR by lightly"] = _SimCLR(images, device)
    seconds = measure.interleaved({name: way.steps for name, way in ways.items()}, repeats, device)
    torch.set_num_threads(threads)
    seconds = {name: [1000 * s / ways[name].passes for s in values] for name, values in seconds.items()}
    plain = seconds["the paper, round 0"]
    rows = [(name, measure.spread(values), f"{measure.ratio(values, plain):.2f}") for name, values in seconds.items()]
    return measure.table(["way", "seconds of 1,000 passes", "times the paper's, round 0"], rows)


class _Ours:
    """Steps of this project.

    Attributes:
        passes: image passes of a repeat.
    """

    def __init__(self, images: np.ndarray, device: torch.device, flags: Sequence[str], has_neighbours: bool) -> None:
        self.options = read_options(["--cfgs", *CFGS, "--seed", "0", "--max-epoch", "2", *flags])
        self.passes = STEPS * self.options.batch_size
        self.terms = terms.build(self.options)
        self.state = _state(self.options, len(images), device, has_neighbours)
        resident = torch.from_numpy(images).to(device)
        self.batches: Iterator[Any] = Loader(
            resident,
            for_training(self.options, reference.MEANS, reference.STDS),
            batch_size=self.options.images_per_batch,
            workers=0,
            seed=0,
            device=device,
            views=self.options.views,
            size_of=self.options.size_of_epoch,
        ).epoch()

    def steps(self) -> None:
        state = self.state
        for _ in range(STEPS):
            images, index = next(self.batches)
            loss, embeddings = batch_loss(state, self.terms, Ranks(), images, index, views=self.options.views)
            loss.backward()
            state.bank.update(embeddings, index)
            state.optimizer.step()
            state.optimizer.zero_grad(set_to_none=True)


def _state(options: Options, samples: int, device: torch.device, has_neighbours: bool) -> TrainingState:
    size = height_and_width(options.size)
    network = placing.place(models.build(options.network, low_dim=options.low_dim, size=size), device)
    bank = MemoryBank(
        samples,
        options.low_dim,
        temperature=options.npc_temperature,
        momentum=options.npc_momentum,
        seed=0,
        device=device,
    )
    found = Neighbourhoods.none(samples, device)
    if has_neighbours:
        others = torch.randperm(samples, device=device)[:, None]
        found = Neighbourhoods.of_anchors(torch.arange(samples, device=device), others, found.entropy)
    return TrainingState(network, optim.build_optimizer(options, network.parameters()), bank, found, seed=0)


class _SimCLR:
    """Steps of SimCLR; attributes as of ``_Ours``."""

    def __init__(self, images: np.ndarray, device: torch.device) -> None:
        options = read_options(["--cfgs", *CFGS])
        views = simclr.Views(list(images), simclr.transform(options, reference.MEANS, reference.STDS))
        self.passes, self.device = STEPS * 2 * simclr.BATCH, device
        self.model = simclr.SimCLR(options, device)
        self.batches = iter(DataLoader(views, simclr.BATCH, shuffle=True, drop_last=True))

    def steps(self) -> None:
        for _ in range(STEPS):
            first, second = next(self.batches)
            self.model.step(first.to(self.device), second.to(self.device))
