"""A running top-k of long rows. Letters: R rows, N columns, G columns of a group."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TopK:
    """Running top-k: the K most similar samples of each of R rows so far.

    Attributes:
        similarities: (R, K), largest first; -inf where fewer than K samples have been seen.
        samples: (R, K), their indices.
    """

    similarities: torch.Tensor
    samples: torch.Tensor

    @classmethod
    def empty(cls, rows: int, size: int, like: torch.Tensor) -> TopK:
        """Before the first update; dtype of the similarities and device are those of ``like``."""
        samples = torch.zeros(rows, size, dtype=torch.long, device=like.device)
        return cls(like.new_full((rows, size), -torch.inf), samples)

    def update(self, similarity: torch.Tensor, first_row: int, first_column: int) -> None:
        """Adds the similarities (r, S) of the rows from ``first_row`` to the samples from ``first_column``."""
        size = self.samples.shape[1]
        if not size or not similarity.numel():
            return
        if similarity.device.type != "cpu":  # choosing rows would make the host wait for the device
            values, columns = _candidates(similarity, min(size, similarity.shape[1]))
            self._merge_candidates(slice(first_row, first_row + len(similarity)), values, columns + first_column)
            return
        kth_best = self.similarities[first_row : first_row + len(similarity), -1]
        (improved,) = (similarity.amax(dim=1) > kth_best).nonzero(as_tuple=True)  # few rows after the first updates
        if not len(improved):
            return
        selected = similarity if len(improved) == len(similarity) else similarity[improved]  # avoids a copy
        values, columns = _candidates(selected, min(size, similarity.shape[1]))
        rows = improved + first_row
        self._merge_candidates(rows, values, columns + first_column)

    def merge(self, other: TopK) -> None:
        """Adds the top-k of the same rows over other samples."""
        self._merge_candidates(slice(None), other.similarities, other.samples)

    def _merge_candidates(self, rows: torch.Tensor | slice, values: torch.Tensor, samples: torch.Tensor) -> None:
        values = torch.cat([self.similarities[rows], values], dim=1)
        samples = torch.cat([self.samples[rows], samples], dim=1)
        self.similarities[rows], order = values.topk(self.samples.shape[1], dim=1)
        self.samples[rows] = samples.gather(1, order)


def _candidates(values: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Reduces each row (R, N) to M candidates that include its K largest values: (R, M) values and their columns.

    The columns are split into groups of G. The K largest values lie in the K groups of largest maximum, so one fast
    pass over the maxima leaves K G candidates: about 2 sqrt(N K) values to sort in place of N.
    """
    columns = values.shape[1]
    size = round(math.sqrt(columns / max(k, 1)))  # G
    if k == 1 and values.device.type != "cpu":  # one pass; topk takes several
        best, column = values.max(dim=1, keepdim=True)
        return best, column
    if values.device.type != "cpu" or size < 4 or k == 0:
        found = values.topk(k, dim=1, sorted=False)
        return found.values, found.indices
    groups = columns // size
    maxima = values[:, : size * groups].unflatten(1, (size, groups)).amax(dim=1)  # group j: columns j, j + groups, ...
    best_groups = maxima.topk(k, dim=1, sorted=False).indices  # (R, K)
    members = (best_groups[:, :, None] + torch.arange(size) * groups).flatten(1)  # (R, K * G)
    remainder = torch.arange(size * groups, columns).expand(len(values), -1)
    members = torch.cat([members, remainder], dim=1)
    return values.gather(1, members), members
