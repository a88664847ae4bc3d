"""Non-parametric classifiers: weighted kNN and the nearest neighbour.

Letters: Q queries of this rank, N samples, D embedding size, K nearest, C classes.
"""

from __future__ import annotations

import torch

from lib.distributed.processes import Ranks
from lib.distributed.sharded import ShardedRows
from lib.evaluation.nearest_neighbours import nearest_neighbours


@torch.no_grad()
def weighted_knn(
    queries: torch.Tensor, bank: torch.Tensor | ShardedRows, labels: torch.Tensor, *, classes: int, k: int, sigma: float
) -> torch.Tensor:
    """Class scores: score_c = sum of exp(s_j / sigma) over those of the K most similar samples j that have class c.

    The largest similarity of a query is subtracted from all s_j. This keeps the ranking and prevents overflow for small
    sigma. A collective: call it on every rank.

    Args:
        queries: (Q, D), unit length; Q may differ between ranks.
        bank: (N, D), unit length.
        labels: (N,) class indices of the rows of the bank.
        classes: C.
        k: K, reduced to N if it is larger.
        sigma: temperature of the vote weights.

    Returns:
        (Q, C) scores; the class of the largest score is the prediction.
    """
    best = nearest_neighbours(bank, k, queries, "kNN")
    weights = ((best.similarities - best.similarities[:, :1]) / sigma).exp()  # (Q, K)
    scores = queries.new_zeros(len(queries) * classes)  # flat: scatter_add_ is deterministic on GPUs in one dimension
    position = torch.arange(len(queries), device=queries.device)[:, None] * classes + labels[best.samples]
    return scores.scatter_add_(0, position.flatten(), weights.flatten()).view(-1, classes)


def nearest_neighbour(
    queries: torch.Tensor, bank: torch.Tensor | ShardedRows, labels: torch.Tensor, *, classes: int
) -> torch.Tensor:
    """Class scores (Q, C): 1 for the class of the most similar sample, 0 for the others; as ``weighted_knn``."""
    return weighted_knn(queries, bank, labels, classes=classes, k=1, sigma=1.0)


def top_k_accuracy(scores: torch.Tensor, labels: torch.Tensor, k: int, ranks: Ranks | None = None) -> float:
    """Top-k accuracy in [0, 1]; 1 if there are at most k classes.

    Args:
        scores: (Q, C).
        labels: (Q,) class indices.
        k: number of predictions per query.
        ranks: the ranks whose queries are averaged over; None: a single process.
    """
    best = scores.topk(min(k, scores.shape[1]), dim=1).indices  # (Q, k)
    correct = (best == labels[:, None]).any(dim=1).sum()
    counts = (ranks or Ranks()).all_reduce_sum(torch.stack([correct, correct.new_full((), len(labels))]))
    correct_count, total = counts.tolist()  # waits for the device once
    return float(correct_count / total)
