"""Anchor neighbourhoods: the result of discovery, and the curriculum that sets the number of anchors.

Letters: N samples, A anchors, K neighbours of an anchor, B batch size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Neighbourhoods:
    """Anchors, instance samples and the neighbours of each anchor.

    Attributes:
        anchors: (A,) sample indices in order of ascending entropy.
        instances: (N - A,) indices of the instance samples (all others), ascending.
        position: (N,) j >= 0 if the sample is the j-th anchor, -j-1 if it is the j-th instance sample.
        neighbours: (A, K) indices of the samples most similar to each anchor, without itself, most similar first.
        entropy: (N,) entropy of each sample's similarity distribution, in nats; zeros before the first discovery.
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
        """Round 0: no anchors, every sample is an instance sample."""
        indices = torch.arange(samples, device=device)
        empty = indices.new_empty(0)
        return cls(empty, indices, -indices - 1, empty[:, None], torch.zeros(samples, device=device))

    @classmethod
    def of_anchors(cls, anchors: torch.Tensor, neighbours: torch.Tensor, entropy: torch.Tensor) -> Neighbourhoods:
        """Builds the position table from the anchors (A,), their neighbours (A, K) and the entropies (N,)."""
        position, instances = _positions(anchors, len(entropy))
        return cls(anchors, instances, position, neighbours, entropy)

    @property
    def num_anchors(self) -> int:
        """A."""
        return len(self.anchors)

    def of(self, index: torch.Tensor) -> torch.Tensor:
        """Neighbourhoods of the samples of a batch.

        Args:
            index: (B,) sample indices.

        Returns:
            (B, 1 + K): the sample itself, then the K neighbours of an anchor, or -1 for an instance sample. (B, 1)
            if there are no anchors.
        """
        own = index[:, None]  # (B, 1)
        if not self.num_anchors:
            return own
        position = self.position[index]  # (B,)
        neighbours = self.neighbours[position.clamp(min=0)]  # (B, K)
        return torch.cat([own, torch.where(position[:, None] >= 0, neighbours, -1)], dim=1)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The tensors under the reference's names; an unknown consistency is NaN."""
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
        """Inverse of ``state_dict``, for any number of anchors (the reference fails to load its own files).

        Raises:
            ValueError: the tensors are inconsistent.
        """
        consistency = float(state["consistency"])
        names = ("anchor_indexes", "instance_indexes", "position", "neighbours", "entropy")
        anchors, instances, position, neighbours, entropy = (state[name].to(device) for name in names)
        samples = len(position)
        if neighbours.dim() != 2 or any(
            table.dtype != torch.long for table in (anchors, instances, position, neighbours)
        ):
            raise ValueError("anchors, instance samples, positions and neighbours must be int64 indices")
        if len(anchors) + len(instances) != samples or len(neighbours) != len(anchors) or len(entropy) != samples:
            raise ValueError("anchors, instance samples, neighbours and entropies differ in length")
        if neighbours.numel() and not 0 <= int(neighbours.min()) <= int(neighbours.max()) < samples:
            raise ValueError("a neighbour is not a valid sample index")
        expected = torch.arange(samples, device=position.device)
        by_position = torch.cat([anchors, instances.flip(0)])  # entry j, or -j-1 counted from the end
        if not (-len(instances) <= int(position.min()) <= int(position.max()) < len(anchors)) or not torch.equal(
            by_position[position], expected
        ):
            raise ValueError("the position table does not match the anchors and instance samples")
        known = None if math.isnan(consistency) else consistency
        return cls(anchors, instances, position, neighbours, entropy, known)


def num_anchors(samples: int, select_rate: float, round: int) -> int:
    """The curriculum: A = int(N * select_rate * round), at most N."""
    return min(int(samples * select_rate * round), samples)


def num_neighbours(size: int, first: int | None, round: int, rounds: int) -> int:
    """Neighbours of an anchor in a round (from 1): K = ``size``, or growing linearly from ``first`` in round 1 to it.

    Args:
        size: in the last round.
        first: in round 1; None: as in the last round.
        round: from 1.
        rounds: of the run, round 0 included.
    """
    if first is None or round >= rounds - 1:
        return size
    return first + (2 * (size - first) * (round - 1) + rounds - 2) // (2 * (rounds - 2))  # rounds halves up


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
    """Share of anchor-neighbour pairs with equal labels. Reported only, never used in training.

    Args:
        anchors: (A,) sample indices.
        neighbours: (A, K) sample indices.
        labels: (N,) class indices.

    Returns:
        The share in [0, 1], or None if there are no pairs.
    """
    equal = labels[anchors][:, None] == labels[neighbours]  # (A, K)
    return equal.float().mean().item() if equal.numel() else None
