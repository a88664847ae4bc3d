"""The processes that train one model together, and rows that lie with them in parts. Layer 0.

A process alone is the case G = 1: it talks to nobody, and its part is all there is.

Letters: G processes, N rows, n rows of this process, B batch, D embedding.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

T = TypeVar("T")
PATIENCE = timedelta(hours=1)
"""How long a process waits for another, one of which may still be opening a million images."""
PARCEL = 2**22
"""Numbers that are passed on at a time, beside the parts that are held."""


def is_loss(error: RuntimeError) -> bool:
    """Whether it tells that another process has ended."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


class World:
    """The processes, as the launcher's environment describes them.

    Attributes:
        rank: number of this one, from 0.
        size: G.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank = rank
        self.size = size

    @classmethod
    def join(cls) -> World:
        """Meets the others, over gloo, and between GPUs over NCCL; alone where no launcher started this process."""
        world = cls(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
        if world.size > 1:
            store, _, _ = next(rendezvous("env://", timeout=PATIENCE))
            # a launcher that starts its processes anew keeps the store, and in it where those before could be reached
            store = PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
            dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=PATIENCE)
        return world

    def __deepcopy__(self, memo: dict[int, Any]) -> World:
        """A copy of what talks to others, such as a network, is of this process alone."""
        return World()

    @property
    def is_first(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    def parts(self, samples: int) -> list[int]:
        """Rows of each process, of N: they differ by one at most, the first ones having more."""
        least, more = divmod(samples, self.size)
        return [least + (rank < more) for rank in range(self.size)]

    def part(self, samples: int, rank: int | None = None) -> slice:
        """Which of N rows are a process's, by default this one's."""
        return self.among(self.parts(samples), rank)

    def shares(self, batch: int) -> list[int]:
        """How many of B images each process takes: alike, and two at least or none, for batch normalisation."""
        active = max(1, min(self.size, batch // 2))
        return [batch // active + (rank < batch % active) if rank < active else 0 for rank in range(self.size)]

    def among(self, shares: Sequence[int], rank: int | None = None) -> slice:
        """Where a process's rows lie, by default this one's, when each has as many as ``shares`` says, in order."""
        rank = self.rank if rank is None else rank
        return slice(sum(shares[:rank]), sum(shares[: rank + 1]))

    def gather(self, own: torch.Tensor, shares: Sequence[int]) -> torch.Tensor:
        """Rows (b, D) of every process, in order, in all: (B, D). The gradient of own rows is that part of the whole's.

        Args:
            own: as many as ``shares`` says.
            shares: rows of each process.
        """
        gathered: torch.Tensor = _Gather.apply(own, self, list(shares))
        return gathered

    def stack(self, own: torch.Tensor) -> torch.Tensor:
        """(G, ...) of equal shapes (...)."""
        if self.size == 1:
            return own[None]
        everyone = [torch.empty_like(own, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(everyone, own.contiguous())
        return torch.stack(everyone)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over the processes, in place, which takes a contiguous tensor."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def max(self, tensor: torch.Tensor) -> torch.Tensor:
        """The greatest over the processes, number by number, in place, which takes a contiguous tensor."""
        if self.size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor

    def sum_with_gradient(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over the processes; what any of them makes of it has a gradient for each one's part."""
        summed: torch.Tensor = _Sum.apply(tensor, self)
        return summed

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Adds up what each process has found, in parcels, for many small tensors travel slowly."""
        if self.size == 1:
            return
        parcel: list[torch.Tensor] = []
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        for number, gradient in enumerate(gradients):
            parcel.append(gradient)
            if number + 1 == len(gradients) or sum(part.numel() for part in parcel) >= PARCEL:
                total = self.sum(torch.cat([part.flatten() for part in parcel]))
                for part, summed in zip(parcel, total.split([part.numel() for part in parcel]), strict=True):
                    part.copy_(summed.view_as(part))
                parcel = []

    def follow(self, tensors: Iterable[torch.Tensor]) -> None:
        """Gives every process the values of the first one."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def any(self, flag: bool) -> bool:
        """Whether it is so in any process."""
        if self.size == 1:
            return flag
        told = torch.tensor(int(flag))
        dist.all_reduce(told, dist.ReduceOp.MAX)
        return bool(told)

    def collect(self, item: T) -> list[T]:
        """What each process has to tell, in order; anything that can be pickled."""
        if self.size == 1:
            return [item]
        items: list[Any] = [None] * self.size
        dist.all_gather_object(items, item)
        return items

    def tell(self, item: T | None) -> T:
        """What the first process has to tell, in all; anything that can be pickled, which others need not have."""
        told: list[Any] = [item]
        if self.size > 1:
            dist.broadcast_object_list(told, 0)
        found: T = told[0]
        return found


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: torch.Tensor, world: World, shares: list[int]) -> torch.Tensor:
        ctx.part = world.among(shares)
        if world.size == 1:
            return own.view_as(own)
        padded = own.new_zeros(max(shares), *own.shape[1:])
        padded[: len(own)] = own
        return torch.cat([rows[:share] for rows, share in zip(world.stack(padded), shares, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradients[0][ctx.part], None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: torch.Tensor, world: World) -> torch.Tensor:
        ctx.world = world
        return world.sum(own.clone())

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.world.sum(gradients[0].clone()), None


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
            for part in self._parcels(self.own):
                coming = torch.empty_like(part)
                dist.recv(coming, 0)
                part.copy_(coming)
            return
        self.own.copy_(whole[self.world.part(self.samples)])
        for rank in range(1, self.world.size):
            for part in self._parcels(whole[self.world.part(self.samples, rank)]):
                dist.send(part.to(self.own).contiguous(), rank)

    def whole(self) -> torch.Tensor:
        """All rows (N, D) in the host's memory of the first process, part after part; of others (0, D)."""
        if self.world.size == 1:
            return self.own
        if not self.world.is_first:
            for part in self._parcels(self.own):
                dist.send(part.contiguous(), 0)
            return self.own.new_empty(0, self.own.shape[1], device="cpu")
        everyone = torch.empty(self.samples, self.own.shape[1], dtype=self.own.dtype)
        everyone[: len(self.own)] = self.own
        for rank in range(1, self.world.size):
            for part in self._parcels(everyone[self.world.part(self.samples, rank)]):
                coming = torch.empty_like(part, device=self.own.device)
                dist.recv(coming, rank)
                part.copy_(coming)
        return everyone

    def _parcels(self, rows: torch.Tensor) -> Sequence[torch.Tensor]:
        return rows.split(max(1, PARCEL // rows.shape[1])) if len(rows) else []


def _pass_on(tensor: torch.Tensor, receiver: int, sender: int) -> None:
    """Sends a tensor to one process and puts what comes from another in its place, in parcels."""
    if not tensor.numel():
        return
    parcel = torch.empty_like(tensor[: max(1, PARCEL // tensor[0].numel())])
    for part in tensor.split(len(parcel)):
        coming = parcel[: len(part)]
        both = [dist.P2POp(dist.isend, part, receiver), dist.P2POp(dist.irecv, coming, sender)]
        for request in dist.batch_isend_irecv(both):
            request.wait()
        part.copy_(coming)
