"""Checkpoints of ResNet18, N = 50,000, in epochs of two seconds: both files after every epoch, and every 30 s."""

from __future__ import annotations

import tempfile
import time
from functools import partial
from pathlib import Path

import torch

import models
from benchmarks import measure
from lib.config.options import Options
from lib.distributed import device as placing
from lib.method.memory_bank import MemoryBank
from lib.method.neighbourhoods import Neighbourhoods
from lib.session.run_folder import Session
from lib.training.checkpoint import TrainingState
from lib.training.recorder import Recorder

ROOT = Path(__file__).parent.parent
SAMPLES, LOW_DIM, NETWORK = 50_000, 128, "resnet18"
EPOCH, INTERVAL = 2, 30
"""Seconds of an epoch without saving, and those of ``--ckpt-interval``."""


def run(repeats: int, device: torch.device) -> str:
    """A table of the seconds that saving takes in 30 seconds of training, where every epoch is the best so far."""
    state = _state(device)
    epochs = INTERVAL // EPOCH
    with tempfile.TemporaryDirectory(dir=ROOT / "sessions") as folder:  # on the disk of the sessions
        session = Session(Path(folder), log_file=False, log_tfb=False)
        plain, ours = (Recorder(session, Options(network=NETWORK)) for _ in range(2))

        def after_every_epoch() -> None:
            for _ in range(epochs):
                plain.save(state, is_best=True)

        def every_interval() -> None:
            for _ in range(epochs - 1):
                ours.keep_best(state)
            ours.save(state, is_best=False)

        ways = {"plain: both files after every epoch": after_every_epoch, f"every {INTERVAL} s": every_interval}
        cpu: dict[str, list[float]] = {name: [] for name in ways}

        def counted(name: str) -> None:
            begun = time.process_time()
            ways[name]()
            cpu[name].append(time.process_time() - begun)

        seconds = measure.interleaved({name: partial(counted, name) for name in ways}, repeats, device)
        session.close()
    rows = []
    for name, taken in seconds.items():
        both = (taken, cpu[name][-repeats:])  # not the warm-up
        shares = ([each / INTERVAL for each in times] for times in both)
        rows.append((name, *map(measure.spread, both), *(measure.spread(share, ".1%") for share in shares)))
    header = ("way", f"seconds in {epochs} epochs of {EPOCH} s", "CPU seconds", "share of training time", "CPU alone")
    return (
        f"{measure.table(header, rows)}\n\nAll but the last epoch copy the best checkpoint to host memory; with labels "
        "fewer epochs are the best so far. On a busy machine the CPU seconds tell more; they leave out the disk."
    )


def _state(device: torch.device) -> TrainingState:
    """After a step, so that the optimiser has its momentum."""
    network = placing.place(models.build(NETWORK, low_dim=LOW_DIM), device)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.03, momentum=0.9)
    network(torch.zeros(2, 3, 32, 32, device=device)).sum().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    bank = MemoryBank(SAMPLES, LOW_DIM, temperature=0.1, momentum=0.5, seed=0, device=device)
    return TrainingState(network, optimizer, bank, Neighbourhoods.none(SAMPLES, device), 0)
