"""Entropies, anchors and neighbours of N = 20,000 samples, against the plain way and one product M M^T."""

from __future__ import annotations

import torch

from benchmarks import measure, reference
from lib.method.discovery import discover

SAMPLES, LOW_DIM, TAU = 20_000, 128, 0.1


def run(repeats: int, device: torch.device) -> str:
    """A table of seconds."""
    memory = measure.unit_rows(SAMPLES, LOW_DIM, device)
    ways: dict[str, measure.Way] = {
        "M M^T alone": lambda: memory @ memory.t(),
        "plain, k = 1": lambda: reference.discovery(memory, TAU, SAMPLES // 4, 1),
        "this project, k = 1": lambda: discover(memory, temperature=TAU, anchors=SAMPLES // 4, size=1),
        "this project, k = 20": lambda: discover(memory, temperature=TAU, anchors=SAMPLES // 4, size=20),
    }
    seconds = measure.interleaved(ways, repeats, device)
    return measure.against(seconds, "M M^T alone", "plain, k = 1")
