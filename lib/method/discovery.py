"""The discovery of anchor neighbourhoods from the memory bank.

Letters: N samples, n those of this process, D embedding, A anchors, K neighbours of an anchor, R rows of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lib.distributed.sharded import Rows
from lib.method.chunking import block_size, similarities
from lib.method.entropy import entropy_of, merge_moments, no_moments, softmax_moments
from lib.method.neighbourhoods import Neighbourhoods
from lib.method.topk import Best
from lib.session.console import progress

SPREAD = 60.0
"""Logits may differ by this much from a common maximum: exp(-60) is still a float32."""
ROUNDING = 1e-6
"""A similarity may be off by this part: products and sums of squares are rounded apart."""


@torch.no_grad()
def discover(memory: torch.Tensor | Rows, *, temperature: float, anchors: int, size: int) -> Neighbourhoods:
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
    bank = Rows.of(memory)
    samples, world = bank.samples, bank.world
    entropy, nearest = survey(bank, temperature=temperature, size=min(size, samples - 1))
    entropy = world.gather(entropy, world.parts(samples))
    order = torch.sort(entropy, stable=True).indices
    chosen = order[:anchors].clone()  # a view would take the whole order into every checkpoint
    return Neighbourhoods.of_anchors(chosen, Rows(nearest, samples, world).take(chosen), entropy)


def survey(memory: torch.Tensor | Rows, *, temperature: float, size: int) -> tuple[torch.Tensor, torch.Tensor]:
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
    bank = Rows.of(memory)
    own, world = bank.own, bank.world
    lengths = torch.linalg.vector_norm(own, dim=1).square()
    extremes = torch.stack([lengths.amax(), -lengths.amin()]) if len(own) else own.new_full((2,), -torch.inf)
    bound, minus_least = world.max(extremes).tolist()  # waits for the device, once a discovery
    if (bound * (1 + ROUNDING) + minus_least) / temperature > SPREAD:
        return look_around(bank, temperature=temperature, size=size)
    home = _Group(own, bank.start, _blank(len(own), size, own))
    away = _blank(bank.abroad, size, own)  # what other processes find out about these rows
    _meet(home, home, bound=bound, temperature=temperature)
    for visit in bank.visits(away):
        guests = _Group(visit.rows, visit.start, visit.tables)
        _meet(home.of(visit.own), guests.of(visit.theirs), bound=bound, temperature=temperature)
    home.learn(away)
    total, product = home.sums
    return (total.log() - product / total).to(own.dtype), home.best.samples


@dataclass(frozen=True)
class _Group:
    """Rows (n, D), the number of the first one, and what is known about each so far: the sums (n,) of exp z and of
    z exp z, and the most similar others, their similarities (n, K) and their numbers (n, K).
    """

    rows: torch.Tensor
    first: int
    tables: Sequence[torch.Tensor]

    def of(self, which: slice) -> _Group:
        """Some of them, with the same memory."""
        return _Group(self.rows[which], self.first + which.start, [table[which] for table in self.tables])

    def learn(self, tables: Sequence[torch.Tensor]) -> None:
        """What is known elsewhere; the tables may have more rows, or none where nobody else has looked."""
        known, noted = self.of(slice(0, len(tables[0]))), [table[: len(self.rows)] for table in tables]
        for ours, theirs in zip(known.sums, noted[:2], strict=True):
            ours.add_(theirs)
        known.best.merge(Best(*noted[2:]))

    @property
    def sums(self) -> Sequence[torch.Tensor]:
        return self.tables[:2]

    @property
    def best(self) -> Best:
        return Best(*self.tables[2:])


def _blank(rows: int, size: int, like: torch.Tensor) -> Sequence[torch.Tensor]:
    """The tables of a group of which nothing is known yet."""
    best = Best.none(rows, size, like)
    total, product = torch.zeros(2, rows, dtype=torch.float64, device=like.device)
    return total, product, best.similarities, best.samples


def _meet(group: _Group, others: _Group, *, bound: float, temperature: float) -> None:
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
        group.best.offer(tile, top, others.first + left)
        if themselves is not None:
            tile.diagonal().copy_(themselves)
        else:
            others.best.offer(tile.t(), left, group.first + top)
        logits = tile.sub_(bound).div_(temperature)
        weights = logits.exp()
        for ours, theirs, values in zip(group.sums, others.sums, (weights, logits.mul_(weights)), strict=True):
            ours[top : top + side] += values.sum(dim=1)
            if themselves is None:
                theirs[left : left + side] += values.sum(dim=0)


def look_around(bank: Rows, *, temperature: float, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``survey``, every row with its own maximum."""
    own = bank.own
    moments, best = no_moments(own), Best.none(len(own), size, own)
    rows = torch.arange(len(own), device=own.device)
    for first, others in bank.ring():
        for block, similarity in similarities(own, others, "discovery"):
            both = torch.stack([moments[block], softmax_moments(similarity / temperature)])
            moments[block] = merge_moments(both)
            if first == bank.start:
                similarity.scatter_(1, rows[block][:, None], -torch.inf)
            best.offer(similarity, block.start, first)
    return entropy_of(moments), best.samples
