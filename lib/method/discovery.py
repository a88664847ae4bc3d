"""Discovery of anchor neighbourhoods from the memory bank, at the start of every round after the first.

``discover`` is the paper's procedure: the entropy of every sample's similarity distribution, the samples of lowest
entropy as anchors (curriculum), and the K nearest neighbours of each anchor. The rest of the file computes the entropy
and the neighbours of all N samples without storing the (N, N) similarity matrix.

Why this is exact. The matrix is computed in tiles and is symmetric, so only the tiles on and above its diagonal are
computed; each is added to the statistics of its rows and, transposed, to those of its columns. This needs one shift of
the logits that suits rows and columns alike: the largest squared row norm, which no similarity exceeds
(Cauchy-Schwarz). The entropy does not depend on the shift, and no row underflows as long as its own maximum is within
``MAX_SPREAD`` of it. Otherwise ``entropy_and_topk_by_row_maximum`` shifts every row by its own running maximum (online
softmax, Milakov and Gimelshein 2018) and computes the whole matrix. Shards of several ranks travel around a ring, and
each pair of rows meets on one rank.

Letters: N samples, n samples of this rank, D embedding size, A anchors, K neighbours of an anchor, R rows of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lib.distributed.sharded import ShardedRows
from lib.method.chunking import block_size, similarities
from lib.method.entropy import empty_statistics, entropy_from_statistics, merge_statistics, softmax_statistics
from lib.method.neighbourhoods import Neighbourhoods
from lib.method.topk import TopK
from lib.session.console import progress

MAX_SPREAD = 60.0
"""Largest distance of a row's maximal logit from the common shift: exp(-60) is still a normal float32."""
PARTNERS = 2**16
"""Samples whose reciprocity is looked up at a time."""
ROUNDING = 1e-6
"""Relative error of a similarity: the product and the squared norms are rounded separately."""


@torch.no_grad()
def discover(
    memory: torch.Tensor | ShardedRows, *, temperature: float, anchors: int, size: int, reciprocal_first: bool = False
) -> Neighbourhoods:
    """Selects the anchors and finds their neighbours.

    The entropy is H_i = -sum_j p_ij log p_ij, p_ij = exp(m_i . m_j / tau) / sum_n exp(m_i . m_n / tau). The A samples
    of lowest entropy become anchors; ties go to the lower index. The neighbours of an anchor are the K other samples
    of largest m_i . m_j. O(N^2 D) time, O(N (D + K)) memory and one tile.

    Args:
        memory: (N, D), rows of unit length.
        temperature: tau.
        anchors: A.
        size: K, reduced to N - 1 if it is larger.
        reciprocal_first: whether samples that are among the K neighbours of their nearest neighbour come before all
            others, both in order of entropy.

    Returns:
        Neighbourhoods without consistency, the same on every rank.
    """
    bank = ShardedRows.of(memory)
    samples, ranks = bank.samples, bank.ranks
    entropy, nearest = entropy_and_topk(bank, temperature=temperature, size=min(size, samples - 1))
    entropy = ranks.all_gather_batch(entropy, ranks.shard_sizes(samples))
    order = torch.sort(entropy, stable=True).indices
    if reciprocal_first:
        is_one_sided = ~is_reciprocal(ShardedRows(nearest, samples, ranks))[order]
        order = order[torch.sort(is_one_sided, stable=True).indices]
    chosen = order[:anchors].clone()  # a view would store the whole of ``order`` in every checkpoint
    return Neighbourhoods.of_anchors(chosen, ShardedRows(nearest, samples, ranks).index_select(chosen), entropy)


def is_reciprocal(nearest: ShardedRows) -> torch.Tensor:
    """Whether each sample is among the K neighbours of its nearest neighbour: nearest (N, K) -> mask (N,)."""
    samples, ranks = nearest.samples, nearest.ranks
    if not nearest.shape[1]:
        return torch.zeros(samples, dtype=torch.bool, device=nearest.device)
    partners = ranks.all_gather_batch(nearest.local[:, 0], ranks.shard_sizes(samples))  # (N,)
    own = torch.arange(samples, device=nearest.device)
    blocks = zip(own.split(PARTNERS), partners.split(PARTNERS), strict=True)
    return torch.cat([(nearest.index_select(partner) == each[:, None]).any(dim=1) for each, partner in blocks])


def entropy_and_topk(
    memory: torch.Tensor | ShardedRows, *, temperature: float, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Entropy and nearest neighbours of the samples of this rank, by symmetric tiles.

    With the shifted logits z_j = (m_i . m_j - shift) / tau and S = sum_j exp z_j, the entropy is
    log S - sum_j z_j exp z_j / S. This stays finite where p underflows; the reference's log of a softmax does not.

    Args:
        memory: (N, D).
        temperature: tau.
        size: K, at most N - 1.

    Returns:
        (n,) entropies in nats; (n, K) indices of the most similar other samples, most similar first.
    """
    bank = ShardedRows.of(memory)
    own, ranks = bank.local, bank.ranks
    squared_norms = torch.linalg.vector_norm(own, dim=1).square()
    extremes = (
        torch.stack([squared_norms.amax(), -squared_norms.amin()]) if len(own) else own.new_full((2,), -torch.inf)
    )
    shift, minus_least = ranks.all_reduce_max(extremes).tolist()  # synchronises with the device once per discovery
    if (shift * (1 + ROUNDING) + minus_least) / temperature > MAX_SPREAD:
        return entropy_and_topk_by_row_maximum(bank, temperature=temperature, size=size)
    local = _RowBlock(own, bank.start, _empty_tables(len(own), size, own))
    remote_tables = _empty_tables(bank.padded_shard_size, size, own)  # filled in by other ranks for the local rows
    _update_pair(local, local, shift=shift, temperature=temperature)
    for chunk in bank.ring_pairs(remote_tables):
        remote = _RowBlock(chunk.rows, chunk.start, chunk.tables)
        _update_pair(local.of(chunk.own), remote.of(chunk.theirs), shift=shift, temperature=temperature)
    local.merge(remote_tables)
    total, product = local.sums
    return (total.log() - product / total).to(own.dtype), local.best.samples


@dataclass(frozen=True)
class _RowBlock:
    """Consecutive rows of the bank and what has been accumulated for each of them.

    Attributes:
        rows: (n, D).
        first: index of the first row in the bank.
        tables: sum of exp z (n,), sum of z exp z (n,), similarities of the nearest so far (n, K), their indices (n, K).
    """

    rows: torch.Tensor
    first: int
    tables: Sequence[torch.Tensor]

    def of(self, which: slice) -> _RowBlock:
        """A view of some of the rows."""
        return _RowBlock(self.rows[which], self.first + which.start, [table[which] for table in self.tables])

    def merge(self, tables: Sequence[torch.Tensor]) -> None:
        """Adds what other ranks accumulated for these rows. The tables are padded, or empty with a single process."""
        block, added = self.of(slice(0, len(tables[0]))), [table[: len(self.rows)] for table in tables]
        for sums, other_sums in zip(block.sums, added[:2], strict=True):
            sums.add_(other_sums)
        block.best.merge(TopK(*added[2:]))

    @property
    def sums(self) -> Sequence[torch.Tensor]:
        return self.tables[:2]

    @property
    def best(self) -> TopK:
        return TopK(*self.tables[2:])


def _empty_tables(rows: int, size: int, like: torch.Tensor) -> Sequence[torch.Tensor]:
    """Tables of a ``_RowBlock`` before the first update; the sums are float64."""
    best = TopK.empty(rows, size, like)
    total, product = torch.zeros(2, rows, dtype=torch.float64, device=like.device)
    return total, product, best.similarities, best.samples


def _update_pair(block: _RowBlock, others: _RowBlock, *, shift: float, temperature: float) -> None:
    """Adds the similarities of two row blocks, or of one with itself, to the tables of both.

    Each tile serves its rows and, transposed, its columns. In the product of a block with itself only the tiles on
    and above the diagonal are computed. A sample counts in its own entropy but not among its own neighbours.
    """
    is_same = block is others
    side = max(1, math.isqrt(block_size(block.rows.device) // 4))
    tops, lefts = range(0, len(block.rows), side), range(0, len(others.rows), side)
    tiles = ((top, left) for top in tops for left in (lefts[top // side :] if is_same else lefts))
    count = len(tops) * (len(tops) + 1) // 2 if is_same else len(tops) * len(lefts)
    for top, left in progress(tiles, "discovery", "tile", count):
        tile = block.rows[top : top + side] @ others.rows[left : left + side].t()  # (R, R)
        diagonal = tile.diagonal().clone() if is_same and top == left else None
        if diagonal is not None:
            tile.fill_diagonal_(-torch.inf)
        block.best.update(tile, top, others.first + left)
        if diagonal is not None:
            tile.diagonal().copy_(diagonal)
        else:
            others.best.update(tile.t(), left, block.first + top)
        logits = tile.sub_(shift).div_(temperature)
        weights = logits.exp()
        for row_sums, column_sums, values in zip(block.sums, others.sums, (weights, logits.mul_(weights)), strict=True):
            row_sums[top : top + side] += values.sum(dim=1)
            if diagonal is None:
                column_sums[left : left + side] += values.sum(dim=0)


def entropy_and_topk_by_row_maximum(
    bank: ShardedRows, *, temperature: float, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``entropy_and_topk``, by online softmax: every row is shifted by its own maximum, for rows of any length."""
    own = bank.local
    statistics, best = empty_statistics(own), TopK.empty(len(own), size, own)
    rows = torch.arange(len(own), device=own.device)
    for first, others in bank.ring():
        for block, similarity in similarities(own, others, "discovery"):
            both = torch.stack([statistics[block], softmax_statistics(similarity / temperature)])
            statistics[block] = merge_statistics(both)
            if first == bank.start:
                similarity.scatter_(1, rows[block][:, None], -torch.inf)
            best.update(similarity, block.start, first)
    return entropy_from_statistics(statistics), best.samples
