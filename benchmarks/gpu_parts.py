"""The measurements of ``python -m benchmarks gpu``, one per process: ``python -m benchmarks.gpu_parts NAME RESULT``."""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import torch

from benchmarks import measure
from lib.session import provenance
from lib.session.atomic_files import atomic_write

if TYPE_CHECKING:
    from lib.training.trainer import Trainer

ROOT = Path(__file__).parent.parent
MODES = {
    "float32": "",
    "tf32": "--tf32",
    "bf16": "--amp bf16",
    "tf32-compiled": "--tf32 --compile",
    "bf16-compiled": "--amp bf16 --compile",
}
"""Mode -> options of main.py."""
MODE_GOAL = 0.9
"""Target rate with images, as a share of the rate with a constant batch."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of the measurements; ``limit``: the largest batch that is tried."""

    network: str = "resnet18"
    pixels: int = 32
    samples: int = 50_000
    tests: int = 10_000
    batch: int = 128
    low_dim: int = 128
    large: int = 1_281_167
    repeats: int = 30
    limit: int = 32_768


SMALL = Sizes("resnet10-w16", 8, 512, 64, 16, 16, 2_000, 3, 64)
Result = dict[str, Any]


@contextmanager
def trainer_of(sizes: Sizes, device: torch.device, mode: str) -> Iterator[Trainer]:
    """The program's own trainer, in a session that is removed afterwards, with random images."""
    import datasets
    from lib.config.parser import read_options
    from lib.training import build, setup

    draw, side = np.random.default_rng(0), str(sizes.pixels)

    def images_of(count: int) -> datasets.ImageSet:
        images: Any = draw.integers(0, 256, (count, sizes.pixels, sizes.pixels, 3), dtype=np.uint8)
        return datasets.ImageSet(images, draw.integers(0, 10, count), tuple("abcdefghij"))

    splits = datasets.Splits(images_of(sizes.samples), images_of(sizes.tests))
    with tempfile.TemporaryDirectory() as folder:
        words = ["--cfgs", "configs/base.yaml", "--network", sizes.network, "--resize", side, "--size", side]
        words += ["--batch-size", str(sizes.batch), "--low-dim", str(sizes.low_dim), "--seed", "0"]
        words += ["--gpus", measure.gpus(device), "--sess-dir", folder]
        words += ["--ckpt-interval", "1000000", *MODES[mode].split()]
        with mock.patch.object(datasets, "load", lambda *words, **named: splits):
            trainer = build.build_trainer(setup.prepare(read_options(words)))
        try:
            yield trainer
        finally:
            trainer.recorder.session.close()


def timed(way: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Seconds that a call takes on the device, between two CUDA events, and seconds until it returns.

    If the two are equal, the device waited for the host.
    """
    measure.wait(device)
    if device.type != "cuda":
        seconds = measure.once(way, device)
        return seconds, seconds
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    begun = time.perf_counter()
    way()
    returned = time.perf_counter() - begun
    last.record()
    measure.wait(device)
    return first.elapsed_time(last) / 1e3, returned


def step(mode: str, device: torch.device, sizes: Sizes) -> Result:
    """The parts of a training step, one after the other, each between two waits for the device."""
    from benchmarks.step import MULTIPLY_ADDS
    from lib.data.augmentation import NUM_RANDOM
    from lib.distributed.device import PRECISIONS
    from lib.method.terms import EmbeddedBatch, total

    with trainer_of(sizes, device, mode) as trainer:
        state, amp = trainer.state, trainer.options.amp
        draw, index = np.random.default_rng(0), torch.arange(sizes.batch, device=device)
        raw = torch.randint(0, 256, (sizes.batch, sizes.pixels, sizes.pixels, 3), dtype=torch.uint8, device=device)
        made: dict[str, torch.Tensor] = {}
        state.network.train()

        def augment() -> None:
            made["images"] = trainer.loader.augmentation(raw, draw.random((sizes.batch, NUM_RANDOM)))

        def forward() -> None:
            with torch.autocast(device.type, PRECISIONS[amp] if amp else None, enabled=bool(amp)):
                made["embeddings"] = state.network(made["images"])

        def loss() -> None:
            made["leaf"] = made["embeddings"].detach().requires_grad_()
            views, own = made["leaf"][:, None], state.neighbourhoods.of(index)
            total(trainer.terms, EmbeddedBatch(views, state.bank.rows, own, state.bank.temperature)).backward()

        def backward() -> None:
            made["embeddings"].backward(made["leaf"].grad)

        ways: dict[str, Callable[[], object]] = {
            "augmentation": augment,
            "network, forward": forward,
            "loss and its gradient": loss,
            "network, backward": backward,
            "update of the bank": lambda: state.bank.update(made["leaf"].detach(), index),
            "optimiser": trainer.optimizer_step,
        }
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for repeat in range(-3, sizes.repeats):  # the first three warm up and compile
            for name, way in ways.items():
                taken = timed(way, device)
                if repeat >= 0:
                    seconds[name].append(taken)
    rows = [(name, *(measure.spread([1e3 * s for s in side], ".2f") for side in zip(*values, strict=True)))
            for name, values in seconds.items()]  # fmt: skip
    sums = [1e3 * sum(statistics.median(side) for side in sides)
            for sides in zip(*(zip(*values, strict=True) for values in seconds.values()), strict=True)]  # fmt: skip
    text = measure.table(
        ["part", "ms on the device", "ms until the call returns"], [*rows, ("sum", *(f"{s:.2f}" for s in sums))]
    )
    text += f"\n\nBatch {sizes.batch}, {sizes.repeats} repeats, median (least to greatest)."
    if sizes.network == "resnet18":
        passes = sum(
            statistics.median(s for s, _ in seconds[name]) for name in ("network, forward", "network, backward")
        )
        rate = 6 * MULTIPLY_ADDS * sizes.batch / passes
        text += f" The network reached {rate / 1e12:.1f} TFLOP/s, forward and backward."
    return {"text": text, "ms": sums[0]}


class Constant:
    """A loader that yields one batch again and again."""

    def __init__(self, batch: tuple[torch.Tensor, torch.Tensor], count: int) -> None:
        self.batch, self.count = batch, count

    def __len__(self) -> int:
        return self.count

    def epoch(self, round: int = 0, epoch: int = 0, first: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yields what is left of the epoch."""
        return itertools.repeat(self.batch, self.count - first)

    def indices(self, round: int, epoch: int, batch: int) -> list[int]:
        """Of any batch."""
        return [int(sample) for sample in self.batch[1]]


def rate(mode: str, device: torch.device, sizes: Sizes) -> Result:
    """Epochs of the trainer with images and with a constant batch, in turn; the loader alone; a whole epoch."""
    with trainer_of(sizes, device, mode) as trainer:
        state, loader = trainer.state, trainer.loader
        batch = next(loader.epoch())
        constant: Any = Constant(batch, len(loader))

        def steps(batches: Any) -> None:
            trainer.loader, state.step = batches, 0
            trainer.train_steps()

        def load() -> None:
            for _ in loader.epoch():
                pass

        def whole() -> None:
            trainer.loader, state.step = loader, 0
            trainer.train_epoch()

        ways: dict[str, measure.Way] = {
            "trainer, images": partial(steps, loader),
            "trainer, a constant batch": partial(steps, constant),
            "loader alone": load,
        }
        seconds = measure.interleaved(ways, 3, device)
        epoch = [measure.once(whole, device) for _ in range(3)]
        save = [measure.once(lambda: trainer.recorder.save(state, is_best=False), device) for _ in range(3)]
    rows = [(name, measure.spread([sizes.samples / s for s in values], ",.0f"), measure.spread(values, ".2f"))
            for name, values in seconds.items()]  # fmt: skip
    share = measure.ratio(seconds["trainer, a constant batch"], seconds["trainer, images"])
    text = measure.table(["way", "images/s", "seconds an epoch"], rows)
    text += (
        f"\n\nWith images the rate is {share:.0%} of that with a constant batch (goal: {MODE_GOAL:.0%}). A whole "
        f"epoch with evaluation and records took {measure.spread(epoch, '.2f')} s, and a checkpoint "
        f"{measure.spread(save, '.2f')} s; by default they are half a minute apart (goal: 1.8 s an epoch with both). "
        f"{sizes.samples:,} images of {sizes.pixels} x {sizes.pixels} pixels, batch {sizes.batch}; 3 repeats, median "
        "(least to greatest)."
    )
    return {"text": text, "share": share, "epoch_s": statistics.median(epoch)}


def discovery(samples: int, device: torch.device, sizes: Sizes, *, repeats: int) -> Result:
    """Seconds and memory of a discovery with a quarter of the samples as anchors."""
    from lib.method.discovery import discover

    memory = measure.unit_rows(samples, sizes.low_dim, device)
    few = memory[:1_000]
    measure.once(lambda: discover(few, temperature=0.1, anchors=250, size=1), device)  # warms up
    rows = []
    for name, allowed in {"float32": False, **({"TF32": True} if device.type == "cuda" else {})}.items():
        torch.backends.cuda.matmul.allow_tf32 = allowed
        way = partial(discover, memory, temperature=0.1, anchors=samples // 4, size=1)
        seconds = [measure.once(way, device) for _ in range(repeats)]
        rows.append((name, measure.spread(seconds), f"{measure.peak_memory(way, device) / 2**20:,.0f}"))
    text = measure.table(["products", "seconds", "MiB beside the bank"], rows)
    size = f"N = {samples:,}, D = {sizes.low_dim}, k = 1; repeats: {repeats}"
    return {"text": f"{text}\n\n{size}; the bank takes {memory.nbytes / 2**20:,.0f} MiB."}


def knn(device: torch.device, sizes: Sizes) -> Result:
    """Seconds of the evaluation's classifier."""
    from lib.evaluation.knn import weighted_knn

    bank, queries = (
        measure.unit_rows(n, sizes.low_dim, device, seed) for seed, n in enumerate((sizes.samples, sizes.tests))
    )
    labels = torch.arange(sizes.samples, device=device) % 10
    ways: dict[str, measure.Way] = {
        "the product alone": lambda: [part @ bank.t() for part in queries.split(1_000)],
        "weighted kNN, K = 200": lambda: weighted_knn(queries, bank, labels, classes=10, k=200, sigma=0.1),
    }
    seconds = measure.interleaved(ways, sizes.repeats, device)
    text = measure.table(["way", "seconds"], [(name, measure.spread(values)) for name, values in seconds.items()])
    return {"text": f"{text}\n\n{sizes.tests:,} queries, {sizes.samples:,} rows; {sizes.repeats} repeats."}


def memory(device: torch.device, sizes: Sizes) -> Result:
    """Peaks of the allocator (on a CPU: of the process) after the trial step and after an epoch."""
    from lib.config.options import height_and_width
    from lib.distributed.device import PRECISIONS
    from lib.distributed.processes import Ranks
    from lib.errors import UsageError
    from lib.training.rehearsal import rehearse

    def peak() -> str:
        bytes_ = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else measure.status("VmHWM")
        return f"{bytes_ / 2**20:,.0f}"

    rows = []
    for mode in ("float32", "bf16"):
        with trainer_of(sizes, device, mode) as trainer:
            peaks = [peak()]
            trainer.train_steps()
            peaks.append(peak())
            options, largest = trainer.options, sizes.batch
            precision = PRECISIONS[options.amp] if options.amp else None
            try:
                while 2 * largest <= sizes.limit:
                    rehearse(
                        trainer.state,
                        trainer.terms,
                        Ranks(),
                        batch_size=2 * largest,
                        size=height_and_width(options.size),
                        precision=precision,
                    )
                    largest *= 2
                reached = f"at least {largest:,}"
            except UsageError:
                reached = f"{largest:,}"
            rows.append((mode, *peaks, reached))
        del trainer
    header = ["mode", "after the trial step, MiB", "after an epoch, MiB", "largest batch"]
    return {"text": f"{measure.table(header, rows)}\n\nBatch {sizes.batch}; the largest is found by doubling."}


def tests(device: torch.device, sizes: Sizes) -> Result:
    """Runs the tests that are marked ``gpu``."""
    import os

    import pytest

    os.environ["GPU_TESTS_ON"] = str(device)
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    reasons: list[str] = []

    class Outcomes:
        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.when == "call" or report.outcome != "passed":  # errors of fixtures, too
                counts[report.outcome] += 1
                if report.failed:
                    line = str(report.longrepr).strip().splitlines()[-1]
                    reasons.append(f"{report.nodeid.split('::')[-1]} ({line[:120]})")

    # without the project's pytest options: they need pytest-xdist, and make errors of another version's warnings
    words = ["-o", "addopts=", "-o", "filterwarnings=default", "-p", "no:cacheprovider", "-q", "-rs", "--tb=short"]
    status = pytest.main([*words, "-m", "gpu", str(ROOT / "tests" / "system" / "test_gpu.py")], plugins=[Outcomes()])
    text = ", ".join(f"{count} {name}" for name, count in counts.items())
    reason = "; ".join(reasons) or (f"pytest ended with status {int(status)}" if status else "")
    if not reason and not counts["passed"]:
        reason = "no test was run"
    return {"text": f"{text}.{' Failed: ' if reason else ''}{reason}", "reason": reason, **counts}


def run(name: str, device: torch.device, sizes: Sizes) -> Result:
    """The result of a part: ``text`` in Markdown, figures, and ``reason`` if it failed."""
    kind, _, mode = name.partition("-")
    if kind == "step":
        return step(mode, device, sizes)
    if kind == "rate":
        return rate(mode, device, sizes)
    if name == "discovery-50k":
        return discovery(sizes.samples, device, sizes, repeats=3)
    if name == "discovery-1281k":
        return discovery(sizes.large, device, sizes, repeats=1)
    result: Result = {"knn": knn, "memory": memory, "tests": tests}[name](device, sizes)
    return result


def machine(device: torch.device) -> str:
    """Hardware and versions."""
    versions = provenance.versions()
    shown = ", ".join(f"{name} {versions[name]}" for name in ("python", "torch", "numpy") if name in versions)
    cuda = f", CUDA {torch.version.cuda}" if device.type == "cuda" else ""
    return f"{provenance.hardware(device)}; {shown}{cuda}"


def main(argv: Sequence[str]) -> int:
    """Exit status: 0 done, 1 the result says why not."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_parts", description=__doc__)
    parser.add_argument("name", help="the part")
    parser.add_argument("result", type=Path, help="JSON file for its result")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda:0"), help="(default: cuda:0)")
    parser.add_argument("--small", action="store_true", help="small sizes")
    given = parser.parse_args(argv)
    if given.device.type == "cuda":
        torch.cuda.set_device(given.device)
    result = {**run(given.name, given.device, SMALL if given.small else Sizes()), "machine": machine(given.device)}
    with atomic_write(given.result) as file:
        file.write(json.dumps(result, indent=1).encode("utf-8"))
    print(result["text"])
    return 1 if result.get("reason") else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
