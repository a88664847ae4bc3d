"""Anchor neighbourhoods and their discovery. Layer 1.

Letters: N samples, n those of this process, D embedding, A anchors, K neighbours of an anchor, B batch, R rows of a
block, P parts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from lib.blocks import block_rows, block_size
from lib.console import progress
from lib.top_k import Best
from lib.world import Rows

SPREAD = 60.0
"""Logits may differ by this much from a common maximum: exp(-60) is still a float32."""
ROUNDING = 1e-6
"""A similarity may be off by this part: products and sums of squares are rounded apart."""


@dataclass(frozen=True)
class Neighbourhoods:
    """Which samples are anchors, and who their neighbours are.

    Attributes:
        anchors: (A,) sample indices in order of ascending entropy.
        instances: (N - A,) the other samples, ascending.
        position: (N,) j >= 0: the sample is the j-th anchor; -j-1: it is the j-th instance sample.
        neighbours: (A, K) samples most similar to each anchor, itself left out, most similar first.
        entropy: (N,) of each sample's similarity distribution, in nats; zeros before the first discovery.
        consistency: share of anchor-neighbour pairs with equal labels; None without labels or pairs.
    """

    anchors: torch.Tensor
    instances: torch.Tensor
    position: torch.Tensor
    neighbours: torch.Tensor
    entropy: torch.Tensor
    consistency: float | None = None

    @classmethod
    def none(cls, samples: int, device: torch.device | str = "cpu") -> Neighbourhoods:
        """Round 0: no anchors, every sample for itself."""
        everyone = torch.arange(samples, device=device)
        empty = everyone.new_empty(0)
        return cls(empty, everyone, -everyone - 1, empty[:, None], torch.zeros(samples, device=device))

    @property
    def num_anchors(self) -> int:
        """A."""
        return len(self.anchors)

    def of(self, index: torch.Tensor) -> torch.Tensor:
        """The neighbourhood of each sample of a batch.

        Args:
            index: (B,) samples.

        Returns:
            (B, 1 + K): the sample itself, then an anchor's neighbours, or -1 for an instance sample.
        """
        own = index[:, None]  # (B, 1)
        if not self.num_anchors:
            return own
        position = self.position[index]  # (B,)
        others = self.neighbours[position.clamp(min=0)]  # (B, K)
        return torch.cat([own, torch.where(position[:, None] >= 0, others, -1)], dim=1)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The reference's names; unknown consistency is NaN."""
        unknown = float("nan")
        return {
            "samples_num": torch.tensor(len(self.position)),
            "anchor_indexes": self.anchors,
            "instance_indexes": self.instances,
            "position": self.position,
            "neighbours": self.neighbours,
            "entropy": self.entropy,
            "consistency": torch.tensor(unknown if self.consistency is None else self.consistency),
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, torch.Tensor], device: torch.device | str = "cpu") -> Neighbourhoods:
        """From what ``state_dict`` gave; every size is taken as it comes (the reference refuses its own).

        Raises:
            ValueError: the parts contradict each other.
        """
        consistency = float(state["consistency"])
        names = ("anchor_indexes", "instance_indexes", "position", "neighbours", "entropy")
        anchors, instances, position, neighbours, entropy = (state[name].to(device) for name in names)
        samples = len(position)
        if neighbours.dim() != 2 or any(
            table.dtype != torch.long for table in (anchors, instances, position, neighbours)
        ):
            raise ValueError("the anchors, instance samples, positions or neighbours are no indices")
        if len(anchors) + len(instances) != samples or len(neighbours) != len(anchors) or len(entropy) != samples:
            raise ValueError("the anchors, instance samples and neighbours are not of one size")
        if neighbours.numel() and not 0 <= int(neighbours.min()) <= int(neighbours.max()) < samples:
            raise ValueError("the neighbours name samples that do not exist")
        everyone = torch.arange(samples, device=position.device)
        in_place = torch.cat([anchors, instances.flip(0)])  # place j, or -j-1 from the end, holds its sample
        if not (-len(instances) <= int(position.min()) <= int(position.max()) < len(anchors)) or not torch.equal(
            in_place[position], everyone
        ):
            raise ValueError("the position table does not lead to the anchors and instance samples")
        known = None if math.isnan(consistency) else consistency
        return cls(anchors, instances, position, neighbours, entropy, known)


def num_anchors(samples: int, select_rate: float, round: int) -> int:
    """int(N * select_rate * round), at most N: the curriculum's share of anchors."""
    return min(int(samples * select_rate * round), samples)


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
    position, instances = _positions(chosen, samples)
    neighbours = Rows(nearest, samples, world).take(chosen)
    return Neighbourhoods(chosen, instances, position, neighbours, entropy)


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
    known = home.of(slice(0, len(away[0])))
    noted = _Group(own, bank.start, away).of(slice(0, len(known.rows)))
    for ours, theirs in zip(known.sums, noted.sums, strict=True):
        ours.add_(theirs)
    known.best.merge(noted.best)
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
    moments, best = _no_moments(own), Best.none(len(own), size, own)
    rows = torch.arange(len(own), device=own.device)
    for first, others in bank.ring():
        for block, similarity in _blocks(own, others, "discovery"):
            both = torch.stack([moments[block], softmax_moments(similarity / temperature)])
            moments[block] = merge_moments(both)
            if first == bank.start:
                similarity.scatter_(1, rows[block][:, None], -torch.inf)
            best.offer(similarity, block.start, first)
    return entropy_of(moments), best.samples


@torch.no_grad()
def measure(
    bank: Rows, index: torch.Tensor, *, temperature: float, size: int, what: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Entropy (M,) and nearest others (M, K) of some samples, the same in every process.

    Each compares them with its own rows, and what it found is put together.

    Args:
        bank: (N, D).
        index: (M,) which samples, the same in every process.
        temperature: tau.
        size: K.
        what: what the progress bar says.
    """
    queries = bank.take(index)  # (M, D)
    place, here = bank.places(index)
    moments, best = _no_moments(queries), Best.none(len(queries), size, queries)
    for block, similarity in _blocks(queries, bank.own, what):
        moments[block] = softmax_moments(similarity / temperature)
        column = place[block][:, None]
        itself = torch.where(here[block][:, None], -torch.inf, similarity.gather(1, column))
        best.offer(similarity.scatter_(1, column, itself), block.start, bank.start)
    similarities, samples = (  # (M, G * K)
        bank.world.stack(part).transpose(0, 1).flatten(1) for part in (best.similarities, best.samples)
    )
    nearest = samples.gather(1, similarities.topk(size, dim=1).indices)
    return entropy_of(merge_moments(bank.world.stack(moments))), nearest


def _blocks(rows: torch.Tensor, others: torch.Tensor, what: str) -> Iterator[tuple[slice, torch.Tensor]]:
    """Similarities (R, S) of blocks of rows to others (S, D), of which there are some; a bar says what for."""
    step = block_rows(max(1, len(others)), others.device)
    for start in progress(range(0, len(rows) if len(others) else 0, step), what, "block"):
        block = slice(start, min(start + step, len(rows)))
        yield block, rows[block] @ others.t()


def softmax_moments(logits: torch.Tensor) -> torch.Tensor:
    """What the entropy of a softmax can be put together from, part by part: the maximum m of each row (R, S), the sum
    of exp(z - m), and that of (z - m) exp(z - m): (R, 3).
    """
    greatest = logits.amax(dim=1, keepdim=True)
    shifted = logits - greatest  # (R, S), at most 0
    weights = shifted.exp()
    return torch.cat([greatest, weights.sum(1, keepdim=True), shifted.mul_(weights).sum(1, keepdim=True)], dim=1)


def _no_moments(like: torch.Tensor) -> torch.Tensor:
    """(R, 3), of no logits."""
    return like.new_tensor([-torch.inf, 0, 0]).repeat(len(like), 1)


def merge_moments(parts: torch.Tensor) -> torch.Tensor:
    """The moments (R, 3) of rows whose parts have the moments (P, R, 3)."""
    greatest, total, product = parts.unbind(2)  # (P, R)
    highest = greatest.amax(dim=0)
    lower = torch.where(total > 0, greatest - highest, 0)  # a part of no logits counts nothing
    shrink = lower.exp()
    return torch.stack([highest, (total * shrink).sum(0), ((product + lower * total) * shrink).sum(0)], dim=1)


def entropy_of(moments: torch.Tensor) -> torch.Tensor:
    """(R,) in nats."""
    return moments[:, 1].log() - moments[:, 2] / moments[:, 1]


def _positions(anchors: torch.Tensor, samples: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The position table (N,) and the instance samples (N - A,), by two indexed assignments."""
    is_instance = torch.ones(samples, dtype=torch.bool, device=anchors.device)
    is_instance[anchors] = False
    instances = is_instance.nonzero().squeeze(1)
    position = torch.empty(samples, dtype=torch.long, device=anchors.device)
    position[anchors] = torch.arange(len(anchors), device=anchors.device)
    position[instances] = -torch.arange(len(instances), device=anchors.device) - 1
    return position, instances


def consistency(anchors: torch.Tensor, neighbours: torch.Tensor, labels: torch.Tensor) -> float | None:
    """Share of anchor-neighbour pairs with equal labels; reported, never trained on.

    Args:
        anchors: (A,) sample indices.
        neighbours: (A, K) sample indices.
        labels: (N,) classes.

    Returns:
        The share, or None where there is no pair.
    """
    equal = labels[anchors][:, None] == labels[neighbours]  # (A, K)
    return equal.float().mean().item() if equal.numel() else None
