"""Rows that lie with several processes in parts.

Letters: G processes, N rows, n rows of this process, m of another, M some rows, D embedding, R rows of a block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from lib.distributed.processes import PARCEL, World


@dataclass(frozen=True)
class Visit:
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
class Rows:
    """N rows, of which each process holds a part.

    Attributes:
        own: (n, D), this process's, from row ``start`` on.
        samples: N.
        world: who holds the others.
    """

    own: torch.Tensor
    samples: int
    world: World

    @classmethod
    def of(cls, rows: torch.Tensor | Rows) -> Rows:
        """Rows (N, D) that this process has alone, or those that lie in parts already."""
        return cls(rows, len(rows), World()) if isinstance(rows, torch.Tensor) else rows

    @classmethod
    def deal(cls, whole: torch.Tensor, world: World, device: torch.device | str = "cpu") -> Rows:
        """Rows (N, D) of the first process in parts, onto a device; others pass a tensor of that shape and type, which
        need hold no numbers (device "meta").
        """
        if world.size == 1:
            return cls(whole.to(device), len(whole), world)
        part = world.part(len(whole))
        rows = cls(whole.new_empty(part.stop - part.start, whole.shape[1], device=device), len(whole), world)
        rows.fill(whole)
        return rows

    @property
    def start(self) -> int:
        """Number of the first row held here."""
        start: int = self.world.part(self.samples).start
        return start

    @property
    def shape(self) -> tuple[int, int]:
        """N, D."""
        return self.samples, self.own.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the own ones lie."""
        return self.own.device

    def places(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Where rows lie among the own ones, of the same shape as ``index``; 0 where they do not, and whether."""
        place = index - self.start
        here = (place >= 0) & (place < len(self.own))
        return torch.where(here, place, 0), here

    def held(self, index: torch.Tensor) -> tuple[Any, torch.Tensor]:
        """Which of the rows ``index`` (M,) are own ones, as an index of M, and where these lie among the own."""
        if self.world.size == 1:
            return slice(None), index
        place, here = self.places(index)
        return here, place[here]

    def take(self, index: torch.Tensor) -> torch.Tensor:
        """Rows (M, D) of any numbers (M,), the same in every process, in all of them."""
        which, place = self.held(index)
        found = self.own.new_zeros(len(index), self.own.shape[1])
        found[which] = self.own[place]
        return self.world.sum(found)

    def ring(self) -> Iterator[tuple[int, torch.Tensor]]:
        """The parts of all processes with their first rows' numbers, this one's first; to be seen through to the end.

        Each passes on the part it has been passed, in parcels: none ever holds more than two parts and a parcel.
        """
        yield self.start, self.own
        size, rank = self.world.size, self.world.rank
        if size == 1:
            return
        visiting = self._padded()
        for step in range(1, size):
            _pass_on(visiting, (rank + 1) % size, (rank - 1) % size)
            theirs = self.world.part(self.samples, (rank - step) % size)
            yield theirs.start, visiting[: theirs.stop - theirs.start]

    def visits(self, tables: Sequence[torch.Tensor]) -> Iterator[Visit]:
        """The parts of others that come by, for every two rows of different processes to meet once; to be seen through
        to the end. Each goes half-way round the ring with tables of its own, and at the end these are home.

        Args:
            tables: (m, ...) each, m = ``abroad``, in which others write down what concerns the rows of this process;
                when the iteration ends, they have.
        """
        size, rank = self.world.size, self.world.rank
        if size == 1:
            return
        visiting, theirs, half = self._padded(), [table.clone() for table in tables], size // 2
        for step in range(1, half + 1):
            for travelling in (visiting, *theirs):
                _pass_on(travelling, (rank + 1) % size, (rank - 1) % size)
            other = (rank - step) % size
            part = self.world.part(self.samples, other)
            count, own = part.stop - part.start, slice(0, len(self.own))
            rows = slice(0, count)
            if 2 * step == size:  # these two visit each other at the same time, so each takes half of the pairs
                middle = len(self.own if rank < other else visiting[:count]) // 2
                own, rows = (slice(0, middle), rows) if rank < other else (own, slice(middle, count))
            yield Visit(part.start, visiting[:count], [table[:count] for table in theirs], own, rows)
        for table, travelled in zip(tables, theirs, strict=True):
            _pass_on(travelled, (rank - half) % size, (rank + half) % size)
            table.copy_(travelled)

    @property
    def abroad(self) -> int:
        """Rows m of what goes round with this process's part: those of the largest part; 0 where there is nobody."""
        return max(self.world.parts(self.samples)) if self.world.size > 1 else 0

    def _padded(self) -> torch.Tensor:
        """A copy of the own rows, as many as the largest part has."""
        padded = self.own.new_zeros(self.abroad, self.own.shape[1])
        padded[: len(self.own)] = self.own
        return padded

    def fill(self, whole: torch.Tensor) -> None:
        """Takes over rows (N, D) of the first process, part after part; what others pass is not looked at."""
        if not self.world.is_first:
            for part in _parcels(self.own):
                coming = torch.empty_like(part)
                dist.recv(coming, 0)
                part.copy_(coming)
            return
        self.own.copy_(whole[self.world.part(self.samples)])
        for rank in range(1, self.world.size):
            for part in _parcels(whole[self.world.part(self.samples, rank)]):
                dist.send(part.to(self.own).contiguous(), rank)

    def whole(self) -> torch.Tensor:
        """All rows (N, D) in the host's memory of the first process, part after part; of others (0, D)."""
        if self.world.size == 1:
            return self.own
        if not self.world.is_first:
            for part in _parcels(self.own):
                dist.send(part.contiguous(), 0)
            return self.own.new_empty(0, self.own.shape[1], device="cpu")
        everyone = torch.empty(self.samples, self.own.shape[1], dtype=self.own.dtype)
        everyone[: len(self.own)] = self.own
        for rank in range(1, self.world.size):
            for part in _parcels(everyone[self.world.part(self.samples, rank)]):
                coming = torch.empty_like(part, device=self.own.device)
                dist.recv(coming, rank)
                part.copy_(coming)
        return everyone


def _parcels(tensor: torch.Tensor) -> Sequence[torch.Tensor]:
    """Its rows, as many at a time as are passed on; none of what holds no numbers."""
    return tensor.split(max(1, PARCEL // tensor[0].numel())) if tensor.numel() else []


def _pass_on(tensor: torch.Tensor, receiver: int, sender: int) -> None:
    """Sends a tensor to one process and puts what comes from another in its place, in parcels."""
    for part in _parcels(tensor):
        coming = torch.empty_like(part)
        both = [dist.P2POp(dist.isend, part, receiver), dist.P2POp(dist.irecv, coming, sender)]
        for request in dist.batch_isend_irecv(both):
            request.wait()
        part.copy_(coming)
