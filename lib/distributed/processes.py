"""Ranks and collectives, a thin layer over ``torch.distributed``.

With a single process (G = 1) the collectives are no-ops and the shard is the whole tensor.

Letters: G ranks, N rows, B batch size, b images of the batch on this rank, D embedding size.
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
"""Timeout of collectives. A rank may have to index a million images before it reaches the first one."""
CHUNK = 2**20
"""Elements sent per message when shards are exchanged; the size of the extra buffer."""
GRADIENT_BUCKET = 2**22
"""Elements per all-reduce of gradients. With a quarter of that, the all-reduce takes a fifth longer over gloo."""


def is_peer_failure(error: RuntimeError) -> bool:
    """Whether an error means that another rank has failed or exited."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


class Ranks:
    """The ranks of a run and their collectives, over the default process group.

    ``Ranks()`` is a single process.

    Attributes:
        rank: rank of this process, 0 to G - 1.
        size: world size G.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank = rank
        self.size = size

    @classmethod
    def from_environment(cls, gpu: torch.device | None = None) -> Ranks:
        """Initialises the process group from RANK, WORLD_SIZE and the like: gloo, and NCCL for GPU tensors.

        Returns a single process if no launcher started this one.

        Args:
            gpu: the GPU of this process, if it is known. If it is on all ranks, NCCL connects them at once and reports
                an error here; otherwise it does so at the first collective of GPU tensors.
        """
        ranks = cls(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
        if ranks.size > 1:
            store, _, _ = next(rendezvous("env://", timeout=TIMEOUT))
            # a restart reuses the store, which still has the addresses of the previous processes
            store = PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
            # NCCL would wait for a rank that has none, such as one that is about to refuse its options
            store.set(f"GPU of rank {ranks.rank}", str(gpu or ""))
            device = gpu if all(store.get(f"GPU of rank {rank}") for rank in range(ranks.size)) else None
            dist.init_process_group(
                backend,
                store=store,
                rank=ranks.rank,
                world_size=ranks.size,
                timeout=TIMEOUT,
                device_id=device if "nccl" in backend else None,
            )
        return ranks

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        """Copies are single-process: a copied network must not take part in collectives."""
        return Ranks()

    @property
    def is_rank0(self) -> bool:
        """Whether this is rank 0, which writes files and log lines."""
        return self.rank == 0

    def shard_sizes(self, samples: int) -> list[int]:
        """Number of rows per rank, of N: they differ by at most one, the first ranks have more."""
        least, more = divmod(samples, self.size)
        return [least + (rank < more) for rank in range(self.size)]

    def shard(self, samples: int, rank: int | None = None) -> slice:
        """The rows of a rank, of N; by default of this rank."""
        return self.slice_in(self.shard_sizes(samples), rank)

    def local_batch_sizes(self, batch: int) -> list[int]:
        """Number of images per rank, of B: equal up to one, and 0 or at least 2, as batch normalisation needs.

        Only a batch of one image gives a rank a single image.
        """
        active = max(1, min(self.size, batch // 2))
        return [batch // active + (rank < batch % active) if rank < active else 0 for rank in range(self.size)]

    def slice_in(self, sizes: Sequence[int], rank: int | None = None) -> slice:
        """The rows of a rank, by default of this one, when the ranks have ``sizes`` rows each, in rank order."""
        rank = self.rank if rank is None else rank
        return slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))

    def all_gather_batch(self, local: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        """Concatenates rows of all ranks: (b, D) -> (B, D). Differentiable.

        The gradient of the local rows is their slice of the gradient of the result, which must be the same on every
        rank; it is not summed.

        Args:
            local: (b, ...), b = ``sizes[rank]``.
            sizes: rows of each rank.
        """
        gathered: torch.Tensor = _AllGatherBatch.apply(local, self, list(sizes))
        return gathered

    def all_gather(self, local: torch.Tensor) -> torch.Tensor:
        """Stacks tensors (...) of equal shape from all ranks: (G, ...)."""
        if self.size == 1:
            return local[None]
        gathered = [torch.empty_like(local, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(gathered, local.contiguous())
        return torch.stack(gathered)

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks, in place; the tensor must be contiguous."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def all_reduce_max(self, tensor: torch.Tensor) -> torch.Tensor:
        """Elementwise maximum over the ranks, in place; the tensor must be contiguous."""
        if self.size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor

    def all_reduce_sum_with_gradient(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks, out of place and differentiable: the backward pass sums the gradients over the ranks."""
        summed: torch.Tensor = _AllReduceSum.apply(tensor, self)
        return summed

    def all_reduce_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Sums the gradients over the ranks, in buckets: few large messages are faster."""
        if self.size == 1:
            return
        bucket: list[torch.Tensor] = []
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        for i, gradient in enumerate(gradients):
            bucket.append(gradient)
            if i + 1 == len(gradients) or sum(each.numel() for each in bucket) >= GRADIENT_BUCKET:
                total = self.all_reduce_sum(torch.cat([each.flatten() for each in bucket]))
                for each, summed in zip(bucket, total.split([each.numel() for each in bucket]), strict=True):
                    each.copy_(summed.view_as(each))
                bucket = []

    def broadcast(self, tensors: Iterable[torch.Tensor]) -> None:
        """Copies the values of rank 0 to all ranks, in place."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def any_rank(self, flag: bool) -> bool:
        """Logical OR of a flag over the ranks."""
        if self.size == 1:
            return flag
        any_flag = torch.tensor(int(flag))
        dist.all_reduce(any_flag, dist.ReduceOp.MAX)
        return bool(any_flag)

    def all_gather_object(self, item: T) -> list[T]:
        """The picklable objects of all ranks, in rank order."""
        if self.size == 1:
            return [item]
        items: list[Any] = [None] * self.size
        dist.all_gather_object(items, item)
        return items

    def broadcast_object(self, item: T | None) -> T:
        """The picklable object of rank 0, on all ranks; the argument of the other ranks is ignored."""
        items: list[Any] = [item]
        if self.size > 1:
            dist.broadcast_object_list(items, 0)
        received: T = items[0]
        return received


class _AllGatherBatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: torch.Tensor, ranks: Ranks, sizes: list[int]) -> torch.Tensor:
        ctx.local_slice = ranks.slice_in(sizes)
        if ranks.size == 1:
            return local.view_as(local)
        padded = local.new_zeros(max(sizes), *local.shape[1:])
        padded[: len(local)] = local
        return torch.cat([rows[:size] for rows, size in zip(ranks.all_gather(padded), sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradients[0][ctx.local_slice], None, None


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: torch.Tensor, ranks: Ranks) -> torch.Tensor:
        ctx.ranks = ranks
        return ranks.all_reduce_sum(local.clone())

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.ranks.all_reduce_sum(gradients[0].clone()), None
