"""What each of 1, 2 and 4 processes holds and takes for bank, step, discovery and kNN, over gloo on one host."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks import measure

ROOT = Path(__file__).parent.parent
SAMPLES, LOW_DIM, BATCH, QUERIES = 100_000, 256, 128, 1_000
PROCESSES = (1, 2, 4)
PARTS = ("memory bank", "loss, gradient and update", "discovery", "kNN")
MEASURED = """
import json, sys
import torch
import torch.nn.functional as F
from benchmarks import measure
from lib.distributed import launch
from lib.distributed.processes import Ranks
from lib.evaluation.knn import weighted_knn
from lib.method.discovery import discover
from lib.method.loss import neighbourhood_loss
from lib.method.memory_bank import MemoryBank
from lib.method.neighbourhoods import Neighbourhoods

samples, low_dim, batch, queried = map(int, sys.argv[1:])
device = torch.device("cpu")
ranks, made = Ranks.from_environment(), []
embeddings = F.normalize(torch.randn(batch, low_dim, generator=torch.Generator().manual_seed(0)), dim=1)
index = torch.randperm(samples, generator=torch.Generator().manual_seed(1))[:batch]
shares = ranks.local_batch_sizes(batch)
own = embeddings[ranks.slice_in(shares)]
queries = embeddings.repeat(-(-queried // batch), 1)[:queried][ranks.shard(queried)]
labels = torch.arange(samples) % 10
constants = dict(temperature=0.1, momentum=0.5, seed=0, device=device, ranks=ranks)


def bank():
    made.append(MemoryBank(samples, low_dim, **constants))
    for rows in made[0].memory.split(1_000):
        rows.copy_(F.normalize(rows, dim=1))


def step():
    everyone = ranks.all_gather_batch(own.clone().requires_grad_(), shares)
    members = Neighbourhoods.none(samples).of(index)
    neighbourhood_loss(everyone, made[0].rows, members, temperature=0.1).backward()
    made[0].update(everyone.detach(), index)


def find():
    discover(made[0].rows, temperature=0.1, anchors=samples // 4, size=1)


def vote():
    weighted_knn(queries, made[0].rows, labels, classes=10, k=200, sigma=0.1)


found, taken = [], []
for way in (bank, step, find, vote):
    ranks.any_rank(False)
    peak = measure.peak_memory(lambda: taken.append(measure.once(way, device)), device)
    found.append([peak, taken[-1]])
everyone = ranks.all_gather_object(found)
if ranks.is_rank0:
    print(json.dumps(everyone))
launch.end(0)
"""


def run(repeats: int, device: torch.device) -> str:
    """Tables of memory and seconds. There is one thread per process, so the times of more processes than cores do
    not apply to other machines."""
    memory: list[list[object]] = [[part] for part in PARTS]
    seconds: list[list[object]] = [[part] for part in PARTS]
    for processes in PROCESSES:
        runs = [_measure(processes) for _ in range(repeats)]
        for part in range(len(PARTS)):
            peaks = [max(process[part][0] for process in found) for found in runs]
            times = [max(process[part][1] for process in found) for found in runs]
            memory[part].append(f"{statistics.median(peaks) / 2**20:,.0f}")
            seconds[part].append(measure.spread(times))
    header = ["part", *(f"G = {processes}" for processes in PROCESSES)]
    return (
        f"N = {SAMPLES:,}, D = {LOW_DIM}, batch {BATCH}, k = 1; the bank is {SAMPLES * LOW_DIM * 4 / 2**20:.0f} MiB."
        f"\n\nPeak memory in MiB that the process with the highest peak adds:\n\n{measure.table(header, memory)}"
        f"\n\nSeconds, one thread a process, {os.cpu_count()} cores:\n\n{measure.table(header, seconds)}"
    )


def _measure(processes: int) -> list[list[list[float]]]:
    """Of each process, for each part: bytes and seconds."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "--no-python"]
    sizes = map(str, (SAMPLES, LOW_DIM, BATCH, QUERIES))
    words = [sys.executable, *launcher, sys.executable, "-c", MEASURED, *sizes]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    found: list[list[list[float]]] = json.loads(done.stdout.splitlines()[-1])
    return found
