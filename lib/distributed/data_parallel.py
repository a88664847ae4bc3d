"""Sums the gradients of a network over the ranks."""

# Without "from __future__ import annotations": PyTorch compares the annotations of the communication hook with types.

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import GradBucket
from torch.nn.parallel import DistributedDataParallel

from lib.distributed.processes import Ranks

OVERLAPPING = ("cuda",)
"""Device types on which the gradients are summed during the backward pass.

On CPUs that changes the last bits with three ranks or more, and gains little (docs/scaling.md).
"""


class GradientSum:
    """Sums the gradients over the ranks: on GPUs during the backward pass, by ``DistributedDataParallel``.

    The first optimiser step sums after the backward pass: it shows whether each parameter has a gradient, which
    ``DistributedDataParallel`` requires.

    Args:
        may_skip: whether a batch may have a forward pass without a backward pass. ``DistributedDataParallel`` would
            then sum the gradients of the next batch twice if a step has several batches.
    """

    def __init__(self, network: torch.nn.Module, ranks: Ranks, *, may_skip: bool) -> None:
        self.network = network
        self.ranks = ranks
        devices = {parameter.device.type for parameter in network.parameters()}
        self._can_overlap = ranks.size > 1 and not may_skip and devices <= set(OVERLAPPING)
        self._has_all_gradients = False
        self._parallel: DistributedDataParallel | None = None

    @contextmanager
    def batch(self, *, is_last: bool) -> Iterator[torch.nn.Module]:
        """Yields the network to use in the block, which holds the forward and backward pass of one batch.

        Args:
            is_last: whether it is the last batch of the optimiser step.
        """
        if self._has_all_gradients and self._parallel is None:
            self._parallel = DistributedDataParallel(
                self.network, broadcast_buffers=False, gradient_as_bucket_view=True
            )
            self._parallel.register_comm_hook(None, _sum)
        if self._parallel is None:
            yield self.network
        elif is_last:
            yield self._parallel
        else:
            with self._parallel.no_sync():
                yield self._parallel

    def finish(self) -> None:
        """Completes the sums. Call it before the optimiser step."""
        if self._parallel is not None:
            return
        parameters = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        self.ranks.all_reduce_gradients(parameters)
        self._has_all_gradients = self._can_overlap and all(each.grad is not None for each in parameters)


def _sum(state: None, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Communication hook. By default the sum is divided by the number of ranks, which suits a mean of their losses.

    Here every rank has the loss of the whole batch, and the gradient with respect to its own images.
    """
    reduced = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
    return reduced.then(lambda done: done.value()[0])
