"""Peak memory of one step and of an epoch, and of a discovery over N = 1,281,167 samples, simulated."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks import measure
from lib.method import discovery
from lib.method.chunking import block_size

ROOT = Path(__file__).parent.parent
CASES = [
    ("resnet18", 32, 64),
    ("resnet18", 32, 128),
    ("resnet18", 32, 256),
    ("alexnet-small", 32, 128),
    ("imagenet-resnet18", 224, 16),
]
SAMPLES, LOW_DIM, TILES = 1_281_167, 128, 2_000
TRAINED = """
import json, sys
import numpy as np, torch
from benchmarks import measure
from lib.config.parser import read_options
from lib.training import build, setup
import datasets

name, size, batch, gpu = sys.argv[1], *map(int, sys.argv[2:])
words = f"--network {name} --resize {size} --size {size} --scale 0.2 1 --colorjitter 0.4 0.4 0.4 0.4"
words += f" --random-grayscale 0.2 --batch-size {batch} --workers-num 0 --seed 0 --debug --max-epoch 1"
words += f" --gpus {gpu}" if gpu >= 0 else ""
images = np.random.default_rng(0).integers(0, 256, (6 * batch, size, size, 3), dtype=np.uint8)
datasets.load = lambda *words, **more: datasets.Splits(datasets.ImageSet(images))
context = setup.prepare(read_options(words.split()))
on_gpu = context.device.type == "cuda"

def peak():
    return torch.cuda.max_memory_allocated() if on_gpu else measure.status("VmHWM")

trainer = build.build_trainer(context)
first = peak()
trainer.train_steps()
print(json.dumps([first, peak()]))
"""


def run(repeats: int, device: torch.device) -> str:
    """Two tables; each training runs once in a separate process."""
    gpu = -1 if device.type == "cpu" else device.index or 0
    rows = []
    for case in CASES:
        words = [sys.executable, "-c", TRAINED, *map(str, case), str(gpu)]
        shown = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
        first, peak = json.loads(shown.stdout.splitlines()[-1])
        name, size, batch = case
        rows.append((f"{name}, {size} pixels, batch {batch}", *_mib(first, peak), f"{first / peak:.2f}"))
    header = ["training", "after the trial step, MiB", "after an epoch, MiB", "ratio"]
    return f"{measure.table(header, rows)}\n\n{_discovery(device)}"


def _mib(*sizes: int) -> list[str]:
    return [f"{size / 2**20:,.0f}" for size in sizes]


def _discovery(device: torch.device) -> str:
    memory = measure.unit_rows(SAMPLES, LOW_DIM, device)
    side = math.isqrt(block_size(device) // 4)
    strips = math.ceil(SAMPLES / side)
    tiles = strips * (strips + 1) // 2

    def some(every: Iterable[Any], *words: Any) -> Iterable[Any]:
        return itertools.islice(every, 0, None, tiles // TILES)

    seconds = 0.0

    def entropy_and_topk() -> None:
        nonlocal seconds
        seconds = measure.once(lambda: discovery.entropy_and_topk(memory, temperature=0.1, size=1), device)

    with mock.patch.object(discovery, "progress", some):
        peak = measure.peak_memory(entropy_and_topk, device)
    bank = memory.nbytes
    hours = seconds / (tiles / (tiles // TILES)) * tiles / 3600
    table = measure.table(
        ["memory bank MiB", "discovery beside it MiB", "together MiB", "(N, N) TiB", "hours, extrapolated"],
        [(*_mib(bank, peak, bank + peak), f"{4 * SAMPLES**2 / 2**40:.1f}", f"{hours:.2f}")],
    )
    return (
        f"A discovery over {SAMPLES:,} samples, D = {LOW_DIM}, k = 1, is simulated: of its {tiles:,} tiles of "
        f"{side} x {side} every {tiles // TILES:,}th was computed, once, and the time multiplied. The memory is that "
        "of a whole discovery. The time is an overestimate, because the first tiles find more neighbours than later "
        f"ones.\n\n{table}"
    )
