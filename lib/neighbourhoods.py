"""Anchor neighbourhoods and their discovery. Layer 1.

Letters: N samples, D embedding, A anchors, K neighbours of an anchor, B batch, R rows of a block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from lib.blocks import block_rows, block_size
from lib.console import progress
from lib.top_k import top_k

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
def discover(memory: torch.Tensor, *, temperature: float, anchors: int, size: int) -> Neighbourhoods:
    """Chooses the anchors and finds their neighbours from the memory bank.

    Ties in entropy go to the lower index. O(N^2 D) time, O(N (D + K)) memory and one block.

    Args:
        memory: (N, D), rows of unit length.
        temperature: tau.
        anchors: A, how many samples of lowest entropy become anchors.
        size: K, cut to N - 1 where there are no more others.

    Returns:
        Neighbourhoods without consistency.
    """
    samples = len(memory)
    entropy, nearest = survey(memory, temperature=temperature, size=min(size, samples - 1))
    order = torch.sort(entropy, stable=True).indices
    chosen = order[:anchors].clone()  # a view would take the whole order into every checkpoint
    position, instances = _positions(chosen, samples)
    return Neighbourhoods(chosen, instances, position, nearest[chosen], entropy)


def survey(memory: torch.Tensor, *, temperature: float, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Entropy and nearest others of every sample.

    Entropy H_i = -sum_j p_ij log p_ij with m_i in place of x_i, from shifted logits z and S = sum exp z as
    log S - sum(z exp z) / S, which stays finite where p underflows (the reference's log of softmax does not).

    The similarities are symmetric, so half of them are computed, tile by tile, each serving its rows and its
    columns. That takes one shift for all rows: the greatest squared length, 1 once all rows are of unit length,
    which no similarity exceeds. Where the lengths differ so much that a row might underflow, each row is
    shifted by its own maximum instead, and all similarities are computed.

    Args:
        memory: (N, D).
        temperature: tau.
        size: K, at most N - 1.

    Returns:
        (N,) entropies in nats; (N, K) the most similar others, most similar first.
    """
    lengths = torch.linalg.vector_norm(memory, dim=1).square()
    bound, least = lengths.max().item(), lengths.min().item()  # waits for the device, once a discovery
    if (bound * (1 + ROUNDING) - least) / temperature > SPREAD:
        return _survey_by_rows(memory, temperature, size)
    samples = len(memory)
    sums = torch.zeros(2, samples, dtype=torch.float64, device=memory.device)  # of exp z and z exp z
    best = _Best(samples, size, memory)
    side = max(1, math.isqrt(block_size(memory.device) // 4))
    starts = range(0, samples, side)
    tiles = ((top, left) for top in starts for left in starts[top // side :])
    for top, left in progress(tiles, "discovery", "tile", len(starts) * (len(starts) + 1) // 2):
        tile = memory[top : top + side] @ memory[left : left + side].t()  # (R, R)
        own = tile.diagonal().clone() if top == left else None
        if own is not None:
            tile.fill_diagonal_(-torch.inf)
        best.offer(tile, top, left)
        if own is not None:
            tile.diagonal().copy_(own)
        else:
            best.offer(tile.t(), left, top)
        logits = tile.sub_(bound).div_(temperature)
        weights = logits.exp()
        for kind, values in enumerate((weights, logits.mul_(weights))):
            sums[kind, top : top + side] += values.sum(dim=1)
            if own is None:
                sums[kind, left : left + side] += values.sum(dim=0)
    entropy = sums[0].log() - sums[1] / sums[0]
    return entropy.to(memory.dtype), best.samples


class _Best:
    """The K most similar samples of each of N, among those offered so far."""

    def __init__(self, samples: int, size: int, like: torch.Tensor) -> None:
        self.similarities = like.new_full((samples, size), -torch.inf)  # (N, K), the greatest first
        self.samples = torch.zeros(samples, size, dtype=torch.long, device=like.device)  # (N, K)

    def offer(self, similarity: torch.Tensor, first_row: int, first_column: int) -> None:
        """Similarities (R, S) of R samples in a row to S others in a row."""
        size = self.samples.shape[1]
        if not size:
            return
        worst = self.similarities[first_row : first_row + len(similarity), -1]
        (better,) = (similarity.amax(dim=1) > worst).nonzero(as_tuple=True)  # few, once many have been offered
        if not len(better):
            return
        values, columns = top_k(similarity[better], min(size, similarity.shape[1]))
        rows = better + first_row
        values = torch.cat([self.similarities[rows], values], dim=1)
        samples = torch.cat([self.samples[rows], columns + first_column], dim=1)
        self.similarities[rows], order = values.topk(size, dim=1)
        self.samples[rows] = samples.gather(1, order)


def _survey_by_rows(memory: torch.Tensor, temperature: float, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``survey``, every row with its own maximum."""
    everyone = torch.arange(len(memory), device=memory.device)
    entropy, nearest = memory.new_empty(len(memory)), everyone.new_empty(len(memory), size)
    for block, similarity in similarities(memory, everyone, "discovery"):  # (R, N)
        entropy[block] = row_entropy(similarity / temperature)
        nearest[block] = nearest_others(similarity, everyone[block], size)
    return entropy, nearest


def similarities(memory: torch.Tensor, rows: torch.Tensor, what: str) -> Iterator[tuple[slice, torch.Tensor]]:
    """Blocks of ``rows`` and their similarities (R, N) to all rows of the bank; a progress bar says what for."""
    step = block_rows(len(memory), memory.device)
    for start in progress(range(0, len(rows), step), what, "block"):
        block = slice(start, min(start + step, len(rows)))
        yield block, memory[rows[block]] @ memory.t()


def nearest_others(similarity: torch.Tensor, itself: torch.Tensor, size: int) -> torch.Tensor:
    """The most similar (R, K) of each row (R, N) but the sample itself (R,), which is struck out in place."""
    return top_k(similarity.scatter_(1, itself[:, None], -torch.inf), size)[1]


def row_entropy(logits: torch.Tensor) -> torch.Tensor:
    """Entropy in nats of the softmax of each row: (R, N) -> (R,)."""
    shifted = logits - logits.max(dim=1, keepdim=True).values  # (R, N), at most 0
    weights = shifted.exp()  # (R, N)
    total = weights.sum(dim=1)  # (R,), at least 1
    return total.log() - (weights * shifted).sum(dim=1) / total


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
