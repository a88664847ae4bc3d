"""Classifiers without parameters: weighted kNN and the nearest neighbour.

Letters: Q queries, N samples, D embedding, K nearest, C classes.
"""

from __future__ import annotations

import torch

from lib.distributed.processes import Ranks
from lib.distributed.sharded import ShardedRows
from lib.method.chunking import similarities
from lib.method.topk import TopK


@torch.no_grad()
def weighted_knn(
    queries: torch.Tensor, bank: torch.Tensor | ShardedRows, labels: torch.Tensor, *, classes: int, k: int, sigma: float
) -> torch.Tensor:
    """Scores of each class: the k most similar samples vote with weight exp(s / sigma).

    The greatest similarity of a query is subtracted first: the same ranking, and no overflow however
    small sigma is.

    Args:
        queries: (Q, D), unit length; each process has its own.
        bank: (N, D), unit length.
        labels: (N,) classes of the bank's rows.
        classes: C.
        k: voters, cut to N.
        sigma: width of the weights.

    Returns:
        (Q, C), the greatest first choice.
    """
    rows = ShardedRows.of(bank)
    best = TopK.empty(len(queries), min(k, rows.samples), queries)
    for first, part in rows.ring():
        for block, similarity in similarities(queries, part, "kNN"):
            best.update(similarity, block.start, first)
    weights = ((best.similarities - best.similarities[:, :1]) / sigma).exp()  # (Q, K)
    scores = queries.new_zeros(len(queries) * classes)  # in one row, which GPUs can add up in one order
    place = torch.arange(len(queries), device=queries.device)[:, None] * classes + labels[best.samples]
    return scores.scatter_add_(0, place.flatten(), weights.flatten()).view(-1, classes)


def nearest_neighbour(
    queries: torch.Tensor, bank: torch.Tensor | ShardedRows, labels: torch.Tensor, *, classes: int
) -> torch.Tensor:
    """Scores (Q, C): one for the class of the most similar sample, zero for the others."""
    return weighted_knn(queries, bank, labels, classes=classes, k=1, sigma=1.0)


def top_k_accuracy(scores: torch.Tensor, labels: torch.Tensor, k: int, ranks: Ranks | None = None) -> float:
    """Share of queries whose class is among the k of greatest score (all, where there are fewer than k).

    Args:
        scores: (Q, C).
        labels: (Q,).
        world: the processes over whose queries the share is taken; None: this one alone.
    """
    best = scores.topk(min(k, scores.shape[1]), dim=1).indices  # (Q, k)
    right = (best == labels[:, None]).any(dim=1).sum()
    right, asked = (ranks or Ranks()).all_reduce_sum(torch.stack([right, right.new_tensor(len(labels))]))
    return float(right.item() / asked.item())
