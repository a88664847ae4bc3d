"""Matrices whose rows are sharded over the ranks, and the ring that passes the shards around.

Letters: G ranks, N rows, n rows of this rank, m rows of another rank, M some rows, D embedding size.
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
    """A shard of another rank, received through the ring by ``ShardedRows.ring_pairs``.

    Attributes:
        start: global index of its first row.
        rows: (m, D), the whole shard.
        tables: (m, ...) each; they travel with the shard, and what is written to them returns to the owner of the rows.
        own: the local rows to pair with the shard.
        theirs: the rows of the shard to pair with the local rows.
    """

    start: int
    rows: torch.Tensor
    tables: Sequence[torch.Tensor]
    own: slice
    theirs: slice


@dataclass(frozen=True)
class ShardedRows:
    """A matrix (N, D), of which every rank stores a contiguous shard of rows.

    Attributes:
        local: (n, D), the shard of this rank, from row ``start`` on.
        samples: N.
        ranks: the ranks that store the shards.
    """

    local: torch.Tensor
    samples: int
    ranks: Ranks

    @classmethod
    def of(cls, rows: torch.Tensor | ShardedRows) -> ShardedRows:
        """Wraps a tensor (N, D) as the only shard of a single process; returns ``ShardedRows`` unchanged."""
        return cls(rows, len(rows), Ranks()) if isinstance(rows, torch.Tensor) else rows

    @classmethod
    def scatter(cls, full: torch.Tensor, ranks: Ranks, device: torch.device | str = "cpu") -> ShardedRows:
        """Distributes the rows (N, D) of rank 0 to the ranks.

        Args:
            full: (N, D). Of the other ranks only shape and dtype are used (a tensor on the device "meta" will do).
            device: of the shards.
        """
        if ranks.size == 1:
            return cls(full.to(device), len(full), ranks)
        shard = ranks.shard(len(full))
        rows = cls(full.new_empty(shard.stop - shard.start, full.shape[1], device=device), len(full), ranks)
        rows.copy_from_rank0(full)
        return rows

    @property
    def start(self) -> int:
        """Global index of the first local row."""
        start: int = self.ranks.shard(self.samples).start
        return start

    @property
    def shape(self) -> tuple[int, int]:
        """(N, D)."""
        return self.samples, self.local.shape[1]

    @property
    def device(self) -> torch.device:
        """Device of the local shard."""
        return self.local.device

    def local_positions(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions in the local shard of global row indices, and a mask of those that are local.

        Both have the shape of ``index``; the position is 0 where the mask is False.
        """
        position = index - self.start
        is_local = (position >= 0) & (position < len(self.local))
        return torch.where(is_local, position, 0), is_local

    def local_rows(self, index: torch.Tensor) -> tuple[Any, torch.Tensor]:
        """Selects the local ones of global row indices (M,).

        Returns:
            An index into the M entries that selects the local ones, and their positions in the local shard.
        """
        if self.ranks.size == 1:
            return slice(None), index
        position, is_local = self.local_positions(index)
        return is_local, position[is_local]

    def index_select(self, index: torch.Tensor) -> torch.Tensor:
        """Rows (M, D) of global indices (M,), on all ranks. A collective: ``index`` must be the same on every rank."""
        if self.ranks.size == 1:
            return self.local[index]
        if not len(self.local):
            return self.ranks.all_reduce_sum(self.local.new_zeros(len(index), self.local.shape[1]))
        position, is_local = self.local_positions(index)
        return self.ranks.all_reduce_sum(torch.where(is_local[:, None], self.local[position], 0))

    def ring(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Yields the shards of all ranks with the global index of their first row, the local shard first.

        Exhaust the iterator: every step is a collective. Each rank sends the shard that it received last to the next
        rank, ``CHUNK`` elements at a time, so it stores two shards and one chunk. Use a shard before asking for the
        next: they share one buffer.
        """
        yield self.start, self.local
        size, rank = self.ranks.size, self.ranks.rank
        if size == 1:
            return
        buffer = self._padded_copy()
        for step in range(1, size):
            _ring_exchange(buffer, (rank + 1) % size, (rank - 1) % size)
            theirs = self.ranks.shard(self.samples, (rank - step) % size)
            yield theirs.start, buffer[: theirs.stop - theirs.start]

    def ring_pairs(self, tables: Sequence[torch.Tensor]) -> Iterator[RingChunk]:
        """Yields shards of other ranks such that each pair of rows of two different ranks occurs once, on one rank.

        Every shard travels half-way around the ring together with its tables, which return to their owner at the end.
        With an even G the last step pairs two ranks with each other: each of them takes half of the pairs. Exhaust the
        iterator: every step is a collective.

        Args:
            tables: (m, ...) each, m = ``padded_shard_size``. Other ranks write results for the local rows to them;
                they are complete when the iterator is exhausted.
        """
        size, rank = self.ranks.size, self.ranks.rank
        if size == 1:
            return
        buffer, travelling_tables, half = self._padded_copy(), [table.clone() for table in tables], size // 2
        for step in range(1, half + 1):
            for tensor in (buffer, *travelling_tables):
                _ring_exchange(tensor, (rank + 1) % size, (rank - 1) % size)
            other = (rank - step) % size
            shard = self.ranks.shard(self.samples, other)
            count, own = shard.stop - shard.start, slice(0, len(self.local))
            theirs = slice(0, count)
            if 2 * step == size:  # the two ranks receive each other's shard: each compares half of the pairs
                middle = len(self.local if rank < other else buffer[:count]) // 2
                own, theirs = (slice(0, middle), theirs) if rank < other else (own, slice(middle, count))
            yield RingChunk(shard.start, buffer[:count], [table[:count] for table in travelling_tables], own, theirs)
        for table, travelled in zip(tables, travelling_tables, strict=True):
            _ring_exchange(travelled, (rank - half) % size, (rank + half) % size)
            table.copy_(travelled)

    @property
    def padded_shard_size(self) -> int:
        """Number of rows of the largest shard, to which shards are padded in the ring; 0 with a single process."""
        return max(self.ranks.shard_sizes(self.samples)) if self.ranks.size > 1 else 0

    def _padded_copy(self) -> torch.Tensor:
        """A copy of the local shard, padded with zeros to ``padded_shard_size`` rows."""
        padded = self.local.new_zeros(self.padded_shard_size, self.local.shape[1])
        padded[: len(self.local)] = self.local
        return padded

    def copy_from_rank0(self, full: torch.Tensor) -> None:
        """Overwrites the shards with rows (N, D) of rank 0, in place; ``full`` is ignored on the other ranks."""
        if not self.ranks.is_rank0:
            for chunk in _chunks(self.local):
                received = torch.empty_like(chunk)
                dist.recv(received, 0)
                chunk.copy_(received)
            return
        self.local.copy_(full[self.ranks.shard(self.samples)])
        for rank in range(1, self.ranks.size):
            for chunk in _chunks(full[self.ranks.shard(self.samples, rank)]):
                dist.send(chunk.to(self.local).contiguous(), rank)

    def gather_to_rank0(self) -> torch.Tensor:
        """All rows (N, D) in host memory on rank 0, and (0, D) on the other ranks.

        With a single process it returns the local tensor itself, on its device.
        """
        if self.ranks.size == 1:
            return self.local
        if not self.ranks.is_rank0:
            for chunk in _chunks(self.local):
                dist.send(chunk.contiguous(), 0)
            return self.local.new_empty(0, self.local.shape[1], device="cpu")
        full = torch.empty(self.samples, self.local.shape[1], dtype=self.local.dtype)
        full[: len(self.local)] = self.local
        for rank in range(1, self.ranks.size):
            for chunk in _chunks(full[self.ranks.shard(self.samples, rank)]):
                received = torch.empty_like(chunk, device=self.local.device)
                dist.recv(received, rank)
                chunk.copy_(received)
        return full


def _chunks(tensor: torch.Tensor) -> Sequence[torch.Tensor]:
    """Views of consecutive rows with about ``CHUNK`` elements each; none if the tensor is empty."""
    return tensor.split(max(1, CHUNK // tensor[0].numel())) if tensor.numel() else []


def _ring_exchange(tensor: torch.Tensor, receiver: int, sender: int) -> None:
    """Sends a tensor to ``receiver`` and overwrites it with the one from ``sender``, in chunks."""
    for chunk in _chunks(tensor):
        received = torch.empty_like(chunk)
        operations = [dist.P2POp(dist.isend, chunk, receiver), dist.P2POp(dist.irecv, received, sender)]
        for request in dist.batch_isend_irecv(operations):
            request.wait()
        chunk.copy_(received)
