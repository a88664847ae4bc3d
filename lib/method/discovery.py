"""The discovery of anchor neighbourhoods from the memory bank.

Letters: N samples, n those of this process, D embedding, A anchors, K neighbours of an anchor, R rows of a tile.
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

SPREAD = 60.0
"""Logits may differ by this much from a common maximum: exp(-60) is still a float32."""
ROUNDING = 1e-6
"""A similarity may be off by this part: products and sums of squares are rounded apart."""


@torch.no_grad()
def discover(memory: torch.Tensor | ShardedRows, *, temperature: float, anchors: int, size: int) -> Neighbourhoods:
    """Chooses the anchors and finds their neighbours from the memory bank; the same in every process.

    Ties in entropy go to the lower index. O(N^2 D) time, O(N (D + K)) memory and one block.

    Args:
        memory: (N, D), rows of unit length.
        temperature: tau.
        anchors: A, how many samples of lowest entropy become anchors.
        size: K, cut to N - 1 where there are no more others.

    Returns:
        Neighbourhoods without consistency.
    """
    bank = ShardedRows.of(memory)
    samples, ranks = bank.samples, bank.ranks
    entropy, nearest = entropy_and_topk(bank, temperature=temperature, size=min(size, samples - 1))
    entropy = ranks.all_gather_batch(entropy, ranks.shard_sizes(samples))
    order = torch.sort(entropy, stable=True).indices
    chosen = order[:anchors].clone()  # a view would take the whole order into every checkpoint
    return Neighbourhoods.of_anchors(chosen, ShardedRows(nearest, samples, ranks).index_select(chosen), entropy)


def entropy_and_topk(
    memory: torch.Tensor | ShardedRows, *, temperature: float, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Entropy and nearest others of every sample, each process for its own.

    Entropy H_i = -sum_j p_ij log p_ij with m_i in place of x_i, from shifted logits z and S = sum exp z as
    log S - sum(z exp z) / S, which stays finite where p underflows (the reference's log of softmax does not).

    Similarities are symmetric, so half of them are computed, tile by tile, each serving its rows and its columns, those
    of two processes by one of the two. That takes one shift for all rows: the greatest squared length, 1 once all rows
    are of unit length, which no similarity exceeds. Where the lengths differ so much that a row might underflow, each
    row is shifted by its own maximum instead, and all similarities are computed.

    Args:
        memory: (N, D).
        temperature: tau.
        size: K, at most N - 1.

    Returns:
        (n,) entropies in nats; (n, K) the most similar others, most similar first.
    """
    bank = ShardedRows.of(memory)
    own, ranks = bank.local, bank.ranks
    lengths = torch.linalg.vector_norm(own, dim=1).square()
    extremes = torch.stack([lengths.amax(), -lengths.amin()]) if len(own) else own.new_full((2,), -torch.inf)
    bound, minus_least = ranks.all_reduce_max(extremes).tolist()  # waits for the device, once a discovery
    if (bound * (1 + ROUNDING) + minus_least) / temperature > SPREAD:
        return entropy_and_topk_by_row_maximum(bank, temperature=temperature, size=size)
    home = _RowBlock(own, bank.start, _empty_tables(len(own), size, own))
    away = _empty_tables(bank.padded_shard_size, size, own)  # what other processes find out about these rows
    _update_pair(home, home, bound=bound, temperature=temperature)
    for visit in bank.ring_pairs(away):
        guests = _RowBlock(visit.rows, visit.start, visit.tables)
        _update_pair(home.of(visit.own), guests.of(visit.theirs), bound=bound, temperature=temperature)
    home.learn(away)
    total, product = home.sums
    return (total.log() - product / total).to(own.dtype), home.best.samples


@dataclass(frozen=True)
class _RowBlock:
    """Rows (n, D), the number of the first one, and what is known about each so far: the sums (n,) of exp z and of
    z exp z, and the most similar others, their similarities (n, K) and their numbers (n, K).
    """

    rows: torch.Tensor
    first: int
    tables: Sequence[torch.Tensor]

    def of(self, which: slice) -> _RowBlock:
        """Some of them, with the same memory."""
        return _RowBlock(self.rows[which], self.first + which.start, [table[which] for table in self.tables])

    def learn(self, tables: Sequence[torch.Tensor]) -> None:
        """What is known elsewhere; the tables may have more rows, or none where nobody else has looked."""
        known, noted = self.of(slice(0, len(tables[0]))), [table[: len(self.rows)] for table in tables]
        for ours, theirs in zip(known.sums, noted[:2], strict=True):
            ours.add_(theirs)
        known.best.merge(TopK(*noted[2:]))

    @property
    def sums(self) -> Sequence[torch.Tensor]:
        return self.tables[:2]

    @property
    def best(self) -> TopK:
        return TopK(*self.tables[2:])


def _empty_tables(rows: int, size: int, like: torch.Tensor) -> Sequence[torch.Tensor]:
    """The tables of a group of which nothing is known yet."""
    best = TopK.empty(rows, size, like)
    total, product = torch.zeros(2, rows, dtype=torch.float64, device=like.device)
    return total, product, best.similarities, best.samples


def _update_pair(group: _RowBlock, others: _RowBlock, *, bound: float, temperature: float) -> None:
    """Compares two groups, or one with itself, and adds to what is known about both."""
    itself = group is others
    side = max(1, math.isqrt(block_size(group.rows.device) // 4))
    tops, lefts = range(0, len(group.rows), side), range(0, len(others.rows), side)
    tiles = ((top, left) for top in tops for left in (lefts[top // side :] if itself else lefts))
    count = len(tops) * (len(tops) + 1) // 2 if itself else len(tops) * len(lefts)
    for top, left in progress(tiles, "discovery", "tile", count):
        tile = group.rows[top : top + side] @ others.rows[left : left + side].t()  # (R, R)
        themselves = tile.diagonal().clone() if itself and top == left else None
        if themselves is not None:
            tile.fill_diagonal_(-torch.inf)
        group.best.update(tile, top, others.first + left)
        if themselves is not None:
            tile.diagonal().copy_(themselves)
        else:
            others.best.update(tile.t(), left, group.first + top)
        logits = tile.sub_(bound).div_(temperature)
        weights = logits.exp()
        for ours, theirs, values in zip(group.sums, others.sums, (weights, logits.mul_(weights)), strict=True):
            ours[top : top + side] += values.sum(dim=1)
            if themselves is None:
                theirs[left : left + side] += values.sum(dim=0)


def entropy_and_topk_by_row_maximum(
    bank: ShardedRows, *, temperature: float, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """``survey``, every row with its own maximum."""
    own = bank.local
    moments, best = empty_statistics(own), TopK.empty(len(own), size, own)
    rows = torch.arange(len(own), device=own.device)
    for first, others in bank.ring():
        for block, similarity in similarities(own, others, "discovery"):
            both = torch.stack([moments[block], softmax_statistics(similarity / temperature)])
            moments[block] = merge_statistics(both)
            if first == bank.start:
                similarity.scatter_(1, rows[block][:, None], -torch.inf)
            best.update(similarity, block.start, first)
    return entropy_from_statistics(moments), best.samples
