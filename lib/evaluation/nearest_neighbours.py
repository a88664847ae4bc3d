"""Exact search for nearest neighbours by cosine similarity, in blocks: O(M N D) time, O(M K) memory and one block.

Letters: M queries of this rank, N samples, n samples of this rank, D embedding size, K neighbours.
"""

from __future__ import annotations

import numpy as np
import torch

from lib.distributed.sharded import ShardedRows
from lib.method.chunking import similarities
from lib.method.topk import TopK


@torch.no_grad()
def nearest_neighbours(
    bank: torch.Tensor | ShardedRows, size: int, queries: torch.Tensor | None = None, what: str = "neighbours"
) -> TopK:
    """The samples that are most similar to each query, or to each sample itself.

    A collective: call it on every rank.

    Args:
        bank: (N, D), unit length.
        size: K, reduced if there are fewer samples.
        queries: (M, D), unit length; M may differ between ranks. None: the n samples of this rank, none of which is
            its own neighbour.
        what: label of the progress bar.

    Returns:
        (M, K) cosines and indices, most similar first.
    """
    rows = ShardedRows.of(bank)
    asked = rows.local if queries is None else queries
    best = TopK.empty(len(asked), min(size, rows.samples - (queries is None)), asked)
    for first, shard in rows.ring():
        for block, similarity in similarities(asked, shard, what):
            if queries is None and first == rows.start:
                similarity.diagonal(block.start).fill_(-torch.inf)
            best.update(similarity, block.start, first)
    return best


def neighbours_of_arrays(
    embeddings: np.ndarray, size: int, queries: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """As ``nearest_neighbours``, of NumPy arrays: (M, K) int64 indices and float32 cosines, from -1 to 1."""

    def tensor(rows: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.require(rows, np.float32, ["C", "W"]))

    found = nearest_neighbours(tensor(embeddings), size, None if queries is None else tensor(queries))
    return found.samples.numpy(), found.similarities.clamp(-1, 1).numpy()
