"""Anchor neighbourhoods.

Letters: N samples, A anchors, K neighbours of an anchor, B batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


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

    @classmethod
    def of_anchors(cls, anchors: torch.Tensor, neighbours: torch.Tensor, entropy: torch.Tensor) -> Neighbourhoods:
        """From the anchors (A,), their neighbours (A, K) and all entropies (N,)."""
        position, instances = _positions(anchors, len(entropy))
        return cls(anchors, instances, position, neighbours, entropy)

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
