"""Loss and gradient over N = 1,281,167 rows, batch 256: time and peak memory against a softmax over full rows."""

from __future__ import annotations

import torch

from benchmarks import measure, reference
from lib.method.loss import neighbourhood_loss

SAMPLES, LOW_DIM, BATCH, TAU = 1_281_167, 128, 256, 0.1


def run(repeats: int, device: torch.device) -> str:
    """A table of seconds and memory."""
    memory = measure.unit_rows(SAMPLES, LOW_DIM, device)
    given, index = measure.unit_rows(BATCH, LOW_DIM, device, seed=1), torch.arange(BATCH, device=device)

    def plain() -> None:
        reference.instance_loss(given.clone().requires_grad_(), memory, index, TAU).backward()

    def ours() -> None:
        neighbourhood_loss(given.clone().requires_grad_(), memory, index[:, None], temperature=TAU).backward()

    ways: dict[str, measure.Way] = {"plain": plain, "this project": ours}
    seconds = measure.interleaved(ways, repeats, device)
    one = 4 * BATCH * SAMPLES
    rows = []
    for name, way in ways.items():
        peak = measure.peak_memory(way, device)
        faster = f"{measure.ratio(seconds['plain'], seconds[name]):.2f}"
        rows.append((name, measure.spread(seconds[name]), faster, f"{peak / 2**20:,.0f}", f"{peak / one:.3f}"))
    return measure.table(["way", "seconds", "times faster", "peak extra MiB", "times one (B, N) float32 array"], rows)
