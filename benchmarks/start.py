"""From the command line to the first training step on the digits, against starting Python with PyTorch alone."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks import measure

ROOT = Path(__file__).parent.parent
FIRST_STEP = """
import os, sys, time
import main
from lib import curriculum
def first(*words, **more):
    print(time.time(), flush=True)
    os._exit(0)
curriculum.neighbourhood_loss = first
main.main("--cfgs configs/base.yaml configs/digits.yaml --debug --brief --seed 0".split() + sys.argv[1:])
"""
IMPORTS = "import time, torch, torchvision; print(time.time())"


def run(repeats: int, device: torch.device) -> str:
    """A table of seconds."""
    gpus = ["--gpus", str(device.index or 0)] if device.type == "cuda" else []

    def until(script: str, *words: str) -> float:
        start = time.time()
        shown = subprocess.run(
            [sys.executable, "-c", script, *words], cwd=ROOT, capture_output=True, text=True, check=True
        )
        return float(shown.stdout.split()[-1]) - start

    ways = {"import torch and torchvision": (IMPORTS,), "this project, to the first step": (FIRST_STEP, *gpus)}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, words in ways.items():
            seconds[name].append(until(*words))
    return measure.table(["way", "seconds"], [(name, measure.spread(values)) for name, values in seconds.items()])
