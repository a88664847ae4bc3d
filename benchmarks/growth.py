"""What discovery, kNN, loss and training step cost against N, D, k and the batch, with fitted exponents."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import numpy as np
import torch
from matplotlib.figure import Figure

import models
from benchmarks import measure
from lib.distributed import device as placing
from lib.evaluation.knn import weighted_knn
from lib.method.discovery import discover
from lib.method.loss import neighbourhood_loss

LARGE = 1_281_167
SAMPLES = (1_000, 3_000, 10_000, 30_000, 100_000)
Cost = Callable[[int], measure.Way]


def run(repeats: int, device: torch.device) -> tuple[str, Figure]:
    """A table, and a plot of seconds; parts are timed one after the other, each size ``repeats`` times."""
    rows, figure = [], Figure(figsize=(9, 6), layout="constrained")
    panels = dict(zip("NDkB", figure.subplots(2, 2).flat, strict=True))
    for part, letter, sizes, cost in _costs(device):
        seconds = [_median(cost(size), repeats, device) for size in sizes]
        exponent, factor = _fit(sizes, seconds)
        panels[letter].loglog(sizes, seconds, "o-", ms=4, label=f"{part}: {letter}^{exponent:.2f}")
        shown = [f"{size:,}: {value:.3g}" for size, value in zip(sizes, seconds, strict=True)]
        far = f"{factor * LARGE**exponent:,.3g} s" if letter == "N" else "-"
        rows.append((part, letter, "; ".join(shown), f"{exponent:.2f}", far))
    for letter, axes in panels.items():
        axes.set(xlabel=letter, ylabel="seconds")
        ticks = sorted({int(x) for line in axes.lines for x in np.asarray(line.get_xdata())})
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.minorticks_off()
        axes.set_ylim(top=axes.get_ylim()[1] * 8)  # room for the legend
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=8, loc="upper left")
    text = measure.table(["part", "against", "size: seconds", "exponent", f"N = {LARGE:,}, extrapolated"], rows)
    note = (
        "The exponent is the slope of a line through the logarithms of the upper three sizes. What does not vary: "
        "N = 20,000, D = 128, k = 1, batch 128, 1,000 queries, ResNet18 at 32x32."
    )
    return f"{text}\n\n{note}", figure


def _median(way: measure.Way, repeats: int, device: torch.device) -> float:
    return statistics.median(measure.interleaved({"": way}, repeats, device)[""])


def _fit(sizes: Sequence[int], seconds: Sequence[float]) -> tuple[float, float]:
    """Exponent and factor, from the upper three sizes, where fixed costs weigh least."""
    exponent, offset = np.polyfit(np.log(sizes[-3:]), np.log(seconds[-3:]), 1)
    return float(exponent), float(np.exp(offset))


def _costs(device: torch.device) -> list[tuple[str, str, Sequence[int], Cost]]:
    def discovery(samples: int = 20_000, low_dim: int = 128, size: int = 1) -> measure.Way:
        memory = measure.unit_rows(samples, low_dim, device)
        return lambda: discover(memory, temperature=0.1, anchors=samples // 4, size=size)

    def knn(samples: int = 20_000, low_dim: int = 128, k: int = 200) -> measure.Way:
        bank, queries = (measure.unit_rows(n, low_dim, device) for n in (samples, 1_000))
        labels = torch.zeros(samples, dtype=torch.long, device=device)
        return lambda: weighted_knn(queries, bank, labels, classes=10, k=k, sigma=0.1)

    def loss(samples: int = 20_000, low_dim: int = 128, batch: int = 128, size: int = 0) -> measure.Way:
        bank, given = measure.unit_rows(samples, low_dim, device), measure.unit_rows(batch, low_dim, device)
        own = torch.randint(samples, (batch, 1 + size), generator=torch.Generator().manual_seed(0)).to(device)

        def way() -> None:
            neighbourhood_loss(given.clone().requires_grad_(), bank, own, temperature=0.1).backward()

        return way

    def passes(batch: int) -> measure.Way:
        network = placing.place(models.build("resnet18", low_dim=128), device)
        images = torch.randn(batch, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
        return lambda: network(images).sum().backward()

    dimensions, neighbours, batches = (32, 64, 128, 256, 512), (1, 2, 5, 10, 20), (32, 64, 128, 256)
    return [
        ("discovery", "N", SAMPLES, discovery),
        ("kNN", "N", SAMPLES, knn),
        ("loss and gradient", "N", SAMPLES, loss),
        ("discovery", "D", dimensions, lambda n: discovery(low_dim=n)),
        ("kNN", "D", dimensions, lambda n: knn(low_dim=n)),
        ("loss and gradient", "D", dimensions, lambda n: loss(low_dim=n)),
        ("discovery", "k", neighbours, lambda n: discovery(size=n)),
        ("loss and gradient", "k", neighbours, lambda n: loss(size=n)),
        ("loss and gradient", "B", batches, lambda n: loss(batch=n)),
        ("passes of the network", "B", batches, passes),
    ]
