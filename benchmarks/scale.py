"""Memory, computation and traffic of G processes over N samples, from what a pair of samples costs one core here."""

from __future__ import annotations

import torch

from benchmarks import measure
from lib.method.discovery import entropy_and_topk
from lib.method.loss import neighbourhood_loss

LOW_DIM, BATCH, NEIGHBOURS, PARAMETERS = 128, 128, 1, 11_230_000
"""Sizes of the paper, and parameters of a ResNet18."""
MEASURED = 40_000
SAMPLES = {"1.28 million": 1_281_167, "100 million": 10**8, "1 billion": 10**9}
PROCESSES = (8, 64, 256, 1_024)
PASSES = 3 * 2 * 0.555e9
"""Operations of the forward and backward pass of an image of 32x32 pixels through a ResNet18."""


def run(repeats: int, device: torch.device) -> str:
    """Three tables; the first is measured, the others are arithmetic."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    memory = measure.unit_rows(MEASURED, LOW_DIM, device)
    embeddings, own = memory[:BATCH].clone().requires_grad_(), torch.arange(BATCH, device=device)[:, None]
    ways: dict[str, measure.Way] = {
        "discovery": lambda: entropy_and_topk(memory, temperature=0.1, size=NEIGHBOURS),
        "loss and gradient": lambda: neighbourhood_loss(embeddings, memory, own, temperature=0.1).backward(),
    }
    seconds = measure.interleaved(ways, repeats, device)
    torch.set_num_threads(threads)
    pairs = {"discovery": MEASURED * (MEASURED + 1) / 2, "loss and gradient": BATCH * MEASURED}
    costs = {name: sorted(values)[len(values) // 2] / pairs[name] for name, values in seconds.items()}
    rows = [
        (name, measure.spread(values), f"{pairs[name]:.3g}", f"{costs[name] * 1e9:.2f}")
        for name, values in seconds.items()
    ]
    measured = measure.table(["part, one thread", "seconds", "pairs of samples", "ns a pair"], rows)
    return "\n\n".join(
        [
            f"N = {MEASURED:,}, D = {LOW_DIM}, batch {BATCH}, k = {NEIGHBOURS}. Measured:\n\n{measured}",
            "What a process holds and receives over the network:\n\n" + _holds(),
            "What it computes, in hours of such a core, and the loss's share of all operations:\n\n" + _takes(costs),
        ]
    )


def _holds() -> str:
    rows = []
    for name, samples in SAMPLES.items():
        for processes in PROCESSES:
            part = samples / processes * LOW_DIM * 4
            tables = samples * (8 + 8 + 4 + 8 * NEIGHBOURS)
            step = BATCH * LOW_DIM * 4 * 3 + BATCH * 4 * 8 + 2 * PARAMETERS * 4
            halfway = processes // 2  # steps of the ring, with eight-byte sums and two numbers for each neighbour
            around = samples / processes * (LOW_DIM * 4 * halfway + (16 + 12 * NEIGHBOURS) * (halfway + 1))
            rows.append((name, processes, *(f"{size / 2**30:.3g}" for size in (part, 2 * part, tables, step, around))))
    header = ["N", "G", "bank", "in discovery", "neighbourhoods", "traffic a step", "traffic a discovery"]
    return measure.table([header[0], header[1], *(f"{title}, GiB" for title in header[2:])], rows)


def _takes(costs: dict[str, float]) -> str:
    rows = []
    for name, samples in SAMPLES.items():
        loss = 4 * samples * LOW_DIM
        for processes in PROCESSES:
            step = BATCH * samples / processes * costs["loss and gradient"]
            once = samples * samples / 2 / processes
            epoch = step * samples / BATCH / 3600
            discovery = once * costs["discovery"] / 3600
            share = loss / (loss + PASSES)
            rows.append((name, processes, f"{step:.3g}", f"{epoch:.3g}", f"{discovery:.3g}", f"{share:.1%}"))
    return measure.table(
        ["N", "G", "loss of a step, s", "loss of an epoch, h", "discovery, h", "loss of all operations"], rows
    )
