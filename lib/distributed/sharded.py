"""Rows that lie with several processes in parts.

Letters: G processes, N rows, n rows of this process, m of another, M some rows, D embedding, R rows of a block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from lib.distributed.processes import CHUNK, Ranks


@dataclass(frozen=True)
class RingChunk:
    """A part of another process that has come by.

    Attributes:
        start: number of its first row.
        rows: (m, D), all of it.
        tables: (m, ...) each, that it has with it.
        own: which of this process's rows meet it.
        theirs: which of its rows they meet.
    """

    start: int
    rows: torch.Tensor
    tables: Sequence[torch.Tensor]
    own: slice
    theirs: slice


@dataclass(frozen=True)
class ShardedRows:
    """N rows, of which each process holds a part.

    Attributes:
        own: (n, D), this process's, from row ``start`` on.
        samples: N.
        world: who holds the others.
    """

    local: torch.Tensor
    samples: int
    ranks: Ranks

    @classmethod
    def of(cls, rows: torch.Tensor | ShardedRows) -> ShardedRows:
        """Rows (N, D) that this process has alone, or those that lie in parts already."""
        return cls(rows, len(rows), Ranks()) if isinstance(rows, torch.Tensor) else rows

    @classmethod
    def scatter(cls, whole: torch.Tensor, ranks: Ranks, device: torch.device | str = "cpu") -> ShardedRows:
        """Rows (N, D) of the first process in parts, onto a device; others pass a tensor of that shape and type, which
        need hold no numbers (device "meta").
        """
        if ranks.size == 1:
            return cls(whole.to(device), len(whole), ranks)
        part = ranks.shard(len(whole))
        rows = cls(whole.new_empty(part.stop - part.start, whole.shape[1], device=device), len(whole), ranks)
        rows.copy_from_rank0(whole)
        return rows

    @property
    def start(self) -> int:
        """Number of the first row held here."""
        start: int = self.ranks.shard(self.samples).start
        return start

    @property
    def shape(self) -> tuple[int, int]:
        """N, D."""
        return self.samples, self.local.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the own ones lie."""
        return self.local.device

    def local_positions(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Where rows lie among the own ones, of the same shape as ``index``; 0 where they do not, and whether."""
        place = index - self.start
        here = (place >= 0) & (place < len(self.local))
        return torch.where(here, place, 0), here

    def local_rows(self, index: torch.Tensor) -> tuple[Any, torch.Tensor]:
        """Which of the rows ``index`` (M,) are own ones, as an index of M, and where these lie among the own."""
        if self.ranks.size == 1:
            return slice(None), index
        place, here = self.local_positions(index)
        return here, place[here]

    def index_select(self, index: torch.Tensor) -> torch.Tensor:
        """Rows (M, D) of any numbers (M,), the same in every process, in all of them."""
        which, place = self.local_rows(index)
        found = self.local.new_zeros(len(index), self.local.shape[1])
        found[which] = self.local[place]
        return self.ranks.all_reduce_sum(found)

    def ring(self) -> Iterator[tuple[int, torch.Tensor]]:
        """The parts of all processes with their first rows' numbers, this one's first; to be seen through to the end.

        Each passes on the part it has been passed, in parcels: none ever holds more than two parts and a parcel.
        """
        yield self.start, self.local
        size, rank = self.ranks.size, self.ranks.rank
        if size == 1:
            return
        visiting = self._padded_copy()
        for step in range(1, size):
            _ring_exchange(visiting, (rank + 1) % size, (rank - 1) % size)
            theirs = self.ranks.shard(self.samples, (rank - step) % size)
            yield theirs.start, visiting[: theirs.stop - theirs.start]

    def ring_pairs(self, tables: Sequence[torch.Tensor]) -> Iterator[RingChunk]:
        """The parts of others that come by, for every two rows of different processes to meet once; to be seen through
        to the end. Each goes half-way round the ring with tables of its own, and at the end these are home.

        Args:
            tables: (m, ...) each, m = ``abroad``, in which others write down what concerns the rows of this process;
                when the iteration ends, they have.
        """
        size, rank = self.ranks.size, self.ranks.rank
        if size == 1:
            return
        visiting, theirs, half = self._padded_copy(), [table.clone() for table in tables], size // 2
        for step in range(1, half + 1):
            for travelling in (visiting, *theirs):
                _ring_exchange(travelling, (rank + 1) % size, (rank - 1) % size)
            other = (rank - step) % size
            part = self.ranks.shard(self.samples, other)
            count, own = part.stop - part.start, slice(0, len(self.local))
            rows = slice(0, count)
            if 2 * step == size:  # these two visit each other at the same time, so each takes half of the pairs
                middle = len(self.local if rank < other else visiting[:count]) // 2
                own, rows = (slice(0, middle), rows) if rank < other else (own, slice(middle, count))
            yield RingChunk(part.start, visiting[:count], [table[:count] for table in theirs], own, rows)
        for table, travelled in zip(tables, theirs, strict=True):
            _ring_exchange(travelled, (rank - half) % size, (rank + half) % size)
            table.copy_(travelled)

    @property
    def padded_shard_size(self) -> int:
        """Rows m of what goes round with this process's part: those of the largest part; 0 where there is nobody."""
        return max(self.ranks.shard_sizes(self.samples)) if self.ranks.size > 1 else 0

    def _padded_copy(self) -> torch.Tensor:
        """A copy of the own rows, as many as the largest part has."""
        padded = self.local.new_zeros(self.padded_shard_size, self.local.shape[1])
        padded[: len(self.local)] = self.local
        return padded

    def copy_from_rank0(self, whole: torch.Tensor) -> None:
        """Takes over rows (N, D) of the first process, part after part; what others pass is not looked at."""
        if not self.ranks.is_rank0:
            for part in _chunks(self.local):
                coming = torch.empty_like(part)
                dist.recv(coming, 0)
                part.copy_(coming)
            return
        self.local.copy_(whole[self.ranks.shard(self.samples)])
        for rank in range(1, self.ranks.size):
            for part in _chunks(whole[self.ranks.shard(self.samples, rank)]):
                dist.send(part.to(self.local).contiguous(), rank)

    def gather_to_rank0(self) -> torch.Tensor:
        """All rows (N, D) in the host's memory of the first process, part after part; of others (0, D)."""
        if self.ranks.size == 1:
            return self.local
        if not self.ranks.is_rank0:
            for part in _chunks(self.local):
                dist.send(part.contiguous(), 0)
            return self.local.new_empty(0, self.local.shape[1], device="cpu")
        everyone = torch.empty(self.samples, self.local.shape[1], dtype=self.local.dtype)
        everyone[: len(self.local)] = self.local
        for rank in range(1, self.ranks.size):
            for part in _chunks(everyone[self.ranks.shard(self.samples, rank)]):
                coming = torch.empty_like(part, device=self.local.device)
                dist.recv(coming, rank)
                part.copy_(coming)
        return everyone


def _chunks(tensor: torch.Tensor) -> Sequence[torch.Tensor]:
    """Its rows, as many at a time as are passed on; none of what holds no numbers."""
    return tensor.split(max(1, CHUNK // tensor[0].numel())) if tensor.numel() else []


def _ring_exchange(tensor: torch.Tensor, receiver: int, sender: int) -> None:
    """Sends a tensor to one process and puts what comes from another in its place, in parcels."""
    for part in _chunks(tensor):
        coming = torch.empty_like(part)
        both = [dist.P2POp(dist.isend, part, receiver), dist.P2POp(dist.irecv, coming, sender)]
        for request in dist.batch_isend_irecv(both):
            request.wait()
        part.copy_(coming)
