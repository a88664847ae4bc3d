"""The processes that train one model together.

A process alone is the case G = 1: it talks to nobody, and its part is all there is.

Letters: G processes, N rows, B batch, b images of it of this process, D embedding.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

T = TypeVar("T")
TIMEOUT = timedelta(hours=1)
"""How long a process waits for another, one of which may still be opening a million images."""
CHUNK = 2**20
"""Numbers of rows that are passed on at a time, which come on top of the parts that are held."""
GRADIENT_BUCKET = 2**22
"""Numbers of gradients that are added up at a time: fewer take longer, a fifth with a quarter of them over gloo."""


def is_peer_failure(error: RuntimeError) -> bool:
    """Whether it tells that another process has ended."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


class Ranks:
    """The processes, as the launcher's environment describes them.

    Attributes:
        rank: number of this one, from 0.
        size: G.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank = rank
        self.size = size

    @classmethod
    def from_environment(cls) -> Ranks:
        """Meets the others, over gloo, and between GPUs over NCCL; alone where no launcher started this process."""
        ranks = cls(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
        if ranks.size > 1:
            store, _, _ = next(rendezvous("env://", timeout=TIMEOUT))
            # a launcher that starts its processes anew keeps the store, and in it where those before could be reached
            store = PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
            dist.init_process_group(backend, store=store, rank=ranks.rank, world_size=ranks.size, timeout=TIMEOUT)
        return ranks

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        """A copy of what talks to others, such as a network, is of this process alone."""
        return Ranks()

    @property
    def is_rank0(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    def shard_sizes(self, samples: int) -> list[int]:
        """Rows of each process, of N: they differ by one at most, the first ones having more."""
        least, more = divmod(samples, self.size)
        return [least + (rank < more) for rank in range(self.size)]

    def shard(self, samples: int, rank: int | None = None) -> slice:
        """Which of N rows are a process's, by default this one's."""
        return self.slice_in(self.shard_sizes(samples), rank)

    def local_batch_sizes(self, batch: int) -> list[int]:
        """How many of B images each process takes: alike, and two at least or none, for batch normalisation."""
        active = max(1, min(self.size, batch // 2))
        return [batch // active + (rank < batch % active) if rank < active else 0 for rank in range(self.size)]

    def slice_in(self, shares: Sequence[int], rank: int | None = None) -> slice:
        """Where a process's rows lie, by default this one's, when each has as many as ``shares`` says, in order."""
        rank = self.rank if rank is None else rank
        return slice(sum(shares[:rank]), sum(shares[: rank + 1]))

    def all_gather_batch(self, own: torch.Tensor, shares: Sequence[int]) -> torch.Tensor:
        """Rows (b, D) of every process, in order, in all: (B, D). The gradient of own rows is that part of the whole's.

        Args:
            own: as many as ``shares`` says.
            shares: rows of each process.
        """
        gathered: torch.Tensor = _Gather.apply(own, self, list(shares))
        return gathered

    def all_gather(self, own: torch.Tensor) -> torch.Tensor:
        """(G, ...) of equal shapes (...)."""
        if self.size == 1:
            return own[None]
        everyone = [torch.empty_like(own, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(everyone, own.contiguous())
        return torch.stack(everyone)

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over the processes, in place, which takes a contiguous tensor."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def all_reduce_max(self, tensor: torch.Tensor) -> torch.Tensor:
        """The greatest over the processes, number by number, in place, which takes a contiguous tensor."""
        if self.size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor

    def all_reduce_sum_with_gradient(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over the processes; what any of them makes of it has a gradient for each one's part."""
        summed: torch.Tensor = _Sum.apply(tensor, self)
        return summed

    def all_reduce_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Adds up what each process has found, in buckets, for many small tensors travel slowly."""
        if self.size == 1:
            return
        bucket: list[torch.Tensor] = []
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        for number, gradient in enumerate(gradients):
            bucket.append(gradient)
            if number + 1 == len(gradients) or sum(part.numel() for part in bucket) >= GRADIENT_BUCKET:
                total = self.all_reduce_sum(torch.cat([part.flatten() for part in bucket]))
                for part, summed in zip(bucket, total.split([part.numel() for part in bucket]), strict=True):
                    part.copy_(summed.view_as(part))
                bucket = []

    def broadcast(self, tensors: Iterable[torch.Tensor]) -> None:
        """Gives every process the values of the first one."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def any_rank(self, flag: bool) -> bool:
        """Whether it is so in any process."""
        if self.size == 1:
            return flag
        told = torch.tensor(int(flag))
        dist.all_reduce(told, dist.ReduceOp.MAX)
        return bool(told)

    def all_gather_object(self, item: T) -> list[T]:
        """What each process has to tell, in order; anything that can be pickled."""
        if self.size == 1:
            return [item]
        items: list[Any] = [None] * self.size
        dist.all_gather_object(items, item)
        return items

    def broadcast_object(self, item: T | None) -> T:
        """What the first process has to tell, in all; anything that can be pickled, which others need not have."""
        told: list[Any] = [item]
        if self.size > 1:
            dist.broadcast_object_list(told, 0)
        found: T = told[0]
        return found


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: torch.Tensor, ranks: Ranks, shares: list[int]) -> torch.Tensor:
        ctx.part = ranks.slice_in(shares)
        if ranks.size == 1:
            return own.view_as(own)
        padded = own.new_zeros(max(shares), *own.shape[1:])
        padded[: len(own)] = own
        return torch.cat([rows[:share] for rows, share in zip(ranks.all_gather(padded), shares, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradients[0][ctx.part], None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: torch.Tensor, ranks: Ranks) -> torch.Tensor:
        ctx.ranks = ranks
        return ranks.all_reduce_sum(own.clone())

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.ranks.all_reduce_sum(gradients[0].clone()), None
