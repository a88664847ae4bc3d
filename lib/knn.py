"""Classifiers without parameters: weighted kNN and the nearest neighbour. Layer 2.

Letters: Q queries, N samples, D embedding, K nearest, C classes.
"""

from __future__ import annotations

import torch

from lib.blocks import block_rows
from lib.console import progress
from lib.top_k import top_k


@torch.no_grad()
def weighted_knn(
    queries: torch.Tensor, bank: torch.Tensor, labels: torch.Tensor, *, classes: int, k: int, sigma: float
) -> torch.Tensor:
    """Scores of each class: the k most similar samples vote with weight exp(s / sigma).

    The greatest similarity of a query is subtracted first: the same ranking, and no overflow however
    small sigma is.

    Args:
        queries: (Q, D), unit length.
        bank: (N, D), unit length.
        labels: (N,) classes of the bank's rows.
        classes: C.
        k: voters, cut to N.
        sigma: width of the weights.

    Returns:
        (Q, C), the greatest first choice.
    """
    scores = queries.new_zeros(len(queries) * classes)  # in one row, which GPUs can add up in one order
    rows = block_rows(len(bank), bank.device)
    for start in progress(range(0, len(queries), rows), "kNN", "block"):
        similarity = queries[start : start + rows] @ bank.t()  # (R, N)
        nearest, index = top_k(similarity, min(k, len(bank)))  # (R, K)
        weights = ((nearest - nearest[:, :1]) / sigma).exp()
        first = torch.arange(start, start + len(index), device=bank.device)[:, None] * classes
        scores.scatter_add_(0, (first + labels[index]).flatten(), weights.flatten())
    return scores.view(-1, classes)


def nearest_neighbour(queries: torch.Tensor, bank: torch.Tensor, labels: torch.Tensor, *, classes: int) -> torch.Tensor:
    """Scores (Q, C): one for the class of the most similar sample, zero for the others."""
    return weighted_knn(queries, bank, labels, classes=classes, k=1, sigma=1.0)


def top_k_accuracy(scores: torch.Tensor, labels: torch.Tensor, k: int) -> float:
    """Share of queries whose class is among the k of greatest score (all, where there are fewer than k).

    Args:
        scores: (Q, C).
        labels: (Q,).
    """
    best = scores.topk(min(k, scores.shape[1]), dim=1).indices  # (Q, k)
    return (best == labels[:, None]).any(dim=1).sum().item() / len(labels)
