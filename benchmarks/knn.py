"""Weighted kNN (K = 200) of 10,000 queries over 50,000 rows, against sorted one-hot votes and the product alone."""

from __future__ import annotations

import torch

from benchmarks import measure, reference
from lib.evaluation.knn import weighted_knn

QUERIES, SAMPLES, LOW_DIM, CLASSES, K, SIGMA = 10_000, 50_000, 128, 10, 200, 0.1


def run(repeats: int, device: torch.device) -> str:
    """A table of seconds."""
    bank, queries = (measure.unit_rows(n, LOW_DIM, device, seed) for seed, n in enumerate((SAMPLES, QUERIES)))
    labels = torch.randint(CLASSES, (SAMPLES,), generator=torch.Generator().manual_seed(0)).to(device)
    constants = {"classes": CLASSES, "k": K, "sigma": SIGMA}
    ways: dict[str, measure.Way] = {
        "the product alone": lambda: [part @ bank.t() for part in queries.split(100)],
        "plain": lambda: reference.weighted_knn(queries, bank, labels, **constants),  # type: ignore[arg-type]
        "this project": lambda: weighted_knn(queries, bank, labels, **constants),  # type: ignore[arg-type]
    }
    seconds = measure.interleaved(ways, repeats, device)
    return measure.against(seconds, "the product alone", "plain")
