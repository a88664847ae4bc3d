"""Seconds from the command line to --help, to a refused option, and to the first training step on the digits."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks import measure

ROOT = Path(__file__).parent.parent
IMPORTS = ["-c", "import torch, torchvision"]
FIRST_STEP = """
import os, sys
import main
from lib.training.trainer import Trainer
Trainer.backward = lambda *arguments: os._exit(0)
main.main("--cfgs configs/base.yaml configs/digits.yaml --debug --brief --seed 0".split() + sys.argv[1:])
os._exit(3)
"""


def run(repeats: int, device: torch.device) -> str:
    """A table of seconds."""
    gpus = ["--gpus", str(device.index or 0)] if device.type == "cuda" else []
    ways = {
        "import torch and torchvision": (IMPORTS, 0),
        "--help": (["main.py", "--help"], 0),
        "--print-args": (["main.py", "--cfgs", "configs/base.yaml", "configs/digits.yaml", "--print-args"], 0),
        "an unknown network": (["main.py", "--network", "resnet81"], 2),
        "to the first step": (["-c", FIRST_STEP, *gpus], 0),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, (words, status) in ways.items():
            started = time.perf_counter()
            done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False)
            seconds[name].append(time.perf_counter() - started)
            if done.returncode != status:
                raise RuntimeError(f"{name}: exit status {done.returncode} in place of {status}: {done.stderr}")
    return measure.table(["way", "seconds"], [(name, measure.spread(values)) for name, values in seconds.items()])
