"""Synchronised batch normalisation that also runs on CPUs and on ranks without images.

Letters: b images of this rank, C channels.
"""

from __future__ import annotations

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from lib.distributed.processes import Ranks


def convert(network: torch.nn.Module, ranks: Ranks, *, sync: bool) -> torch.nn.Module:
    """Replaces every batch normalisation of the network; unchanged with a single process.

    The replacements accept an empty local batch. ``torch.nn.SyncBatchNorm`` does not run on CPUs. Parameters and
    buffers keep their names and are shared with the original modules.

    Args:
        network: changed in place.
        sync: whether mean and variance are those of all ranks or of this rank only.
    """
    if ranks.size == 1:
        return network
    for name, child in network.named_children():
        setattr(network, name, convert(child, ranks, sync=sync))
    return _DistributedBatchNorm(network, ranks, sync) if isinstance(network, _BatchNorm) else network


class _DistributedBatchNorm(_BatchNorm):
    """Drop-in replacement of a batch normalisation.

    timm's ``BatchNormAct2d`` has child modules, dropout and activation, that follow the normalisation.

    Args:
        other: the module to replace.
        ranks: the ranks of the run.
        sync: whether mean and variance are those of all ranks.
    """

    def __init__(self, other: _BatchNorm, ranks: Ranks, sync: bool) -> None:
        super().__init__(other.num_features, other.eps, other.momentum, other.affine, other.track_running_stats)
        self._parameters.update(other._parameters)
        self._buffers.update(other._buffers)
        self._modules.update(other._modules)
        self.training = other.training
        self.ranks = ranks
        self.sync = sync

    def _check_input_dim(self, input: torch.Tensor) -> None:
        pass

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalises (b, C, ...); the result has the dtype of x.

        Half-precision input is normalised in float32, as in PyTorch: the pixel count of a large batch overflows fp16.
        """
        x = self._normalise(x)
        for child in self.children():
            x = child(x)
        return x

    def _normalise(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or (not self.sync and len(x)):
            return super().forward(x)
        dtype, x = x.dtype, x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        shape = [1, -1, *[1] * (x.dim() - 2)]
        if self.sync:
            dims = [dim for dim in range(x.dim()) if dim != 1]
            count = self.ranks.all_reduce_sum(x.new_full((), x.numel() / x.shape[1]))  # new_tensor waits for a GPU
            mean = self.ranks.all_reduce_sum_with_gradient(x.sum(dims)) / count  # (C,)
            x = x - mean.view(shape)
            variance = self.ranks.all_reduce_sum_with_gradient(x.square().sum(dims)) / count
            self._update_running_statistics(mean.detach(), variance.detach() * count / (count - 1))
            x = x * (variance + self.eps).rsqrt().view(shape)
        # also for an empty batch, so that the parameters have a gradient on every rank
        if self.weight is not None:
            x = torch.addcmul(self.bias.view(shape), x, self.weight.view(shape))
        return x.to(dtype)

    def _update_running_statistics(self, mean: torch.Tensor, variance: torch.Tensor) -> None:
        """Moves the running mean and variance towards those of the batch (C,)."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(variance, momentum)
