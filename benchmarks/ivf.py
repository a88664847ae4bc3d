"""Whether an inverted-file index (faiss) finds what discovery finds among N = 100,000 samples: recall and time."""

from __future__ import annotations

import importlib
from functools import partial

import numpy as np
import torch

from benchmarks import measure
from lib.method.discovery import survey

SAMPLES, LOW_DIM, TAU, LISTS, NEAR, DRAWN = 100_000, 128, 0.1, 1_024, 256, 4_096
PROBES = (1, 4, 16, 64)
SHARE = 0.25
"""Of the samples that become anchors."""


def run(repeats: int, device: torch.device) -> str:
    """A table for each kind of rows; each way is run once, so ``repeats`` counts for nothing."""
    try:
        faiss = importlib.import_module("faiss")
    except ImportError:
        return "needs faiss: pip install faiss-cpu"
    tables = []
    for kind, memory in {
        "fifty groups, as embeddings have them": measure.unit_rows(SAMPLES, LOW_DIM, device),
        "no groups at all": torch.nn.functional.normalize(
            torch.randn(SAMPLES, LOW_DIM, generator=torch.Generator().manual_seed(0)), dim=1
        ),
    }.items():
        exact: list[torch.Tensor] = []
        seconds = measure.once(partial(_exact, memory, exact), device)
        rows: list[tuple[str, ...]] = [("exact", f"{seconds:.1f}", "100 %", "100 %", "1.000")]
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(LOW_DIM), LOW_DIM, LISTS, faiss.METRIC_INNER_PRODUCT)
        built = measure.once(partial(index.train, memory.numpy()), device)
        built += measure.once(partial(index.add, memory.numpy()), device)
        for probes in PROBES:
            index.nprobe = probes
            rows.append(_row(index, memory, exact, probes, built, device))
        header = ["way", "seconds", "nearest found", "anchors found", "rank correlation of entropies"]
        tables.append(f"{kind}:\n\n{measure.table(header, rows)}")
    note = (
        f"N = {SAMPLES:,}, D = {LOW_DIM}, tau = {TAU}; {LISTS:,} lists. Entropies: the {NEAR} most similar in the "
        f"lists looked into, and {DRAWN:,} samples drawn alike for all the others. Anchors: the {SHARE:.0%} of "
        "lowest entropy. Seconds of an index are of building and searching. Once each."
    )
    return "\n\n".join([note, *tables])


def _exact(memory: torch.Tensor, found: list[torch.Tensor]) -> None:
    found.extend(survey(memory, temperature=TAU, size=1))


def _row(
    index: object, memory: torch.Tensor, exact: list[torch.Tensor], probes: int, built: float, device: torch.device
) -> tuple[str, ...]:
    found: list[torch.Tensor] = []
    seconds = built + measure.once(lambda: found.extend(_look_up(index, memory)), device)
    entropy, nearest = found
    anchors = [set(values.argsort()[: int(SHARE * SAMPLES)].tolist()) for values in (entropy, exact[0])]
    ranks = torch.stack([values.argsort().argsort().double() for values in (entropy, exact[0])])
    return (
        f"{probes} of the lists",
        f"{seconds:.1f}",
        f"{(nearest == exact[1][:, 0]).double().mean():.1%}",
        f"{len(anchors[0] & anchors[1]) / len(anchors[1]):.1%}",
        f"{torch.corrcoef(ranks)[0, 1]:.3f}",
    )


def _look_up(index: object, memory: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Entropies (N,) and the nearest other (N,) by the index."""
    drawn = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(1))[:DRAWN]
    entropies, nearest = [], []
    for start in range(0, SAMPLES, 2_048):
        rows = memory[start : start + 2_048]
        similar, which = (torch.from_numpy(part) for part in index.search(rows.numpy(), NEAR))  # type: ignore[attr-defined]
        itself = torch.arange(start, start + len(rows))[:, None]
        others = which.where(which != itself, -1)
        nearest.append(others.gather(1, (others >= 0).int().argmax(dim=1, keepdim=True)).squeeze(1))
        near = ((similar - 1) / TAU).masked_fill(which < 0, -torch.inf)  # (R, NEAR)
        far = (rows @ memory[drawn].t() - 1) / TAU  # (R, DRAWN)
        known = torch.from_numpy(np.sort(which.numpy(), axis=1))
        place = torch.searchsorted(known, drawn.expand(len(rows), -1).contiguous()).clamp(max=NEAR - 1)
        far.masked_fill_(known.gather(1, place) == drawn, -torch.inf)  # is counted already
        left = SAMPLES - (which >= 0).sum(dim=1)
        scale = left / far.isfinite().sum(dim=1).clamp(min=1)
        total = near.exp().sum(1) + scale * far.exp().sum(1)
        product = sum(
            factor * (z.exp() * z.masked_fill(z.isinf(), 0)).sum(1) for factor, z in ((1.0, near), (scale, far))
        )
        entropies.append(total.log() - product / total)
    return torch.cat(entropies), torch.cat(nearest)
