"""Batch normalisation where a batch is shared among processes.

Letters: b images of this process, C channels.
"""

from __future__ import annotations

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from lib.distributed.processes import Ranks


def over_processes(network: torch.nn.Module, ranks: Ranks, *, joined: bool) -> torch.nn.Module:
    """The network with batch normalisation that bears a process without images, and joins all their statistics or none.

    Names of parameters stay. PyTorch's own ``SyncBatchNorm`` knows no CPU.
    """
    if ranks.size == 1:
        return network
    for name, child in network.named_children():
        setattr(network, name, over_processes(child, ranks, joined=joined))
    return _Shared(network, ranks, joined) if isinstance(network, _BatchNorm) else network


class _Shared(_BatchNorm):
    """Takes the place of a batch normalisation and its parameters.

    Args:
        other: what it takes the place of.
        world: the processes.
        joined: mean and variance are of the images of all of them.
    """

    def __init__(self, other: _BatchNorm, ranks: Ranks, joined: bool) -> None:
        super().__init__(other.num_features, other.eps, other.momentum, other.affine, other.track_running_stats)
        self._parameters.update(other._parameters)
        self._buffers.update(other._buffers)
        self.training = other.training
        self.ranks = ranks
        self.joined = joined

    def _check_input_dim(self, input: torch.Tensor) -> None:
        pass

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(b, C, ...) -> (b, C, ...), in the type of x.

        In mixed precision the statistics are computed in float32, as PyTorch's own batch normalisation does: fp16 has
        no number for the pixels of a large batch.
        """
        if not self.training or (not self.joined and len(x)):
            return super().forward(x)
        given, x = x.dtype, x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        shape = [1, -1, *[1] * (x.dim() - 2)]
        if self.joined:
            others = [dim for dim in range(x.dim()) if dim != 1]
            count = self.ranks.all_reduce_sum(x.new_tensor(x.numel() / x.shape[1]))
            mean = self.ranks.all_reduce_sum_with_gradient(x.sum(others)) / count  # (C,)
            x = x - mean.view(shape)
            variance = self.ranks.all_reduce_sum_with_gradient(x.square().sum(others)) / count
            self._note(mean.detach(), variance.detach() * count / (count - 1))
            x = x * (variance + self.eps).rsqrt().view(shape)
        # also without images, lest the parameters of one process alone have no gradient
        if self.weight is not None:
            x = torch.addcmul(self.bias.view(shape), x, self.weight.view(shape))
        return x.to(given)

    def _note(self, mean: torch.Tensor, variance: torch.Tensor) -> None:
        """Moves the running statistics."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(variance, share)
