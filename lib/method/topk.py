"""The greatest values of long rows. Letters: R rows, N columns, K greatest, G members of a group."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


def top_k(values: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What ``values.topk(k, dim=1)`` gives, exactly, and on a CPU faster. Which of equal values is arbitrary in both.

    Args:
        values: (R, N).
        k: K, at most N.

    Returns:
        (R, K) values, the greatest first, and their columns.
    """
    found, columns = _candidates(values, k)
    best = found.topk(k, dim=1)
    return best.values, columns.gather(1, best.indices)


def _candidates(values: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Values (R, M) among which are the K greatest of each row (R, N), and their columns.

    These lie in the K groups of columns whose maxima are the greatest. So the maxima are taken, which is one fast pass,
    and the members of those groups are left: with the maxima about 2 sqrt(N K) numbers in place of N.
    """
    columns = values.shape[1]
    size = round(math.sqrt(columns / max(k, 1)))  # G
    if values.device.type != "cpu" or size < 4 or k == 0:
        found = values.topk(k, dim=1, sorted=False)
        return found.values, found.indices
    groups = columns // size
    maxima = values[:, : size * groups].unflatten(1, (size, groups)).amax(dim=1)  # a group: every groups-th column
    chosen = maxima.topk(k, dim=1, sorted=False).indices  # (R, K)
    members = (chosen[:, :, None] + torch.arange(size) * groups).flatten(1)  # (R, K * G)
    left_over = torch.arange(size * groups, columns).expand(len(values), -1)
    members = torch.cat([members, left_over], dim=1)
    return values.gather(1, members), members


@dataclass(frozen=True)
class TopK:
    """The K most similar samples of each of R rows, among those offered so far.

    Attributes:
        similarities: (R, K), the greatest first; -inf where fewer were offered.
        samples: (R, K), their numbers.
    """

    similarities: torch.Tensor
    samples: torch.Tensor

    @classmethod
    def empty(cls, rows: int, size: int, like: torch.Tensor) -> TopK:
        """Of samples that will be offered, on the device of ``like``."""
        samples = torch.zeros(rows, size, dtype=torch.long, device=like.device)
        return cls(like.new_full((rows, size), -torch.inf), samples)

    def update(self, similarity: torch.Tensor, first_row: int, first_column: int) -> None:
        """Similarities (r, S) of r rows, from ``first_row`` on, to S samples, from ``first_column`` on."""
        size = self.samples.shape[1]
        if not size or not similarity.numel():
            return
        worst = self.similarities[first_row : first_row + len(similarity), -1]
        (better,) = (similarity.amax(dim=1) > worst).nonzero(as_tuple=True)  # few, once many have been offered
        if not len(better):
            return
        found = similarity if len(better) == len(similarity) else similarity[better]  # without a copy, if all
        values, columns = _candidates(found, min(size, similarity.shape[1]))
        rows = better + first_row
        self._merge_candidates(rows, values, columns + first_column)

    def merge(self, other: TopK) -> None:
        """What was offered to another one for the same rows."""
        self._merge_candidates(slice(None), other.similarities, other.samples)

    def _merge_candidates(self, rows: torch.Tensor | slice, values: torch.Tensor, samples: torch.Tensor) -> None:
        values = torch.cat([self.similarities[rows], values], dim=1)
        samples = torch.cat([self.samples[rows], samples], dim=1)
        self.similarities[rows], order = values.topk(self.samples.shape[1], dim=1)
        self.samples[rows] = samples.gather(1, order)
