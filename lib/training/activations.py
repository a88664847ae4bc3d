"""What the passes of a batch through a network take in memory, found without taking it.

They are walked through on PyTorch's meta device, where tensors have shapes and no contents: for a ResNet18 that takes
a tenth of a second.

Letters: B batch, h, w pixels that the network sees.
"""

from __future__ import annotations

import copy
import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

CONVOLUTIONS = (torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default)


class _Autocast(TorchFunctionMode):
    """``torch.autocast``, which knows no meta device: convolutions and linear layers in another type."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.conv2d, F.linear):
            args = tree_map_only(torch.Tensor, lambda tensor: tensor.to(self.dtype), args)
        return func(*args, **(kwargs or {}))


class _Live(TorchDispatchMode):
    """Counts the bytes of the storages that are made, for as long as anything holds them.

    Attributes:
        now: bytes held.
        peak: the most there were at a time, with what a convolution needs to itself while it runs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now: int = 0
        self.peak: int = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [item for item in tree_iter(args) if isinstance(item, torch.Tensor)]
        made = [item for item in tree_iter(out) if isinstance(item, torch.Tensor)]
        self._known |= {tensor.untyped_storage()._cdata for tensor in tensors}  # what nobody made was there before
        for tensor in made:
            self._count(tensor.untyped_storage())
        copies = 0
        if func in CONVOLUTIONS:
            backward = func == CONVOLUTIONS[1]  # of the output's gradient, and then as forward, images and weights
            if not tensors[backward].is_contiguous(memory_format=torch.channels_last):
                # oneDNN and cuDNN compute in a layout of their own, into which they copy all that is not channels-last
                copies = sum(tensor.nbytes for tensor in (tensors if backward else made))
        self.peak = max(self.peak, self.now + copies)
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.now += size
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def activations(
    network: torch.nn.Module,
    shape: tuple[int, int, int, int],
    *,
    autocast: torch.dtype | None = None,
    layout: torch.memory_format = torch.channels_last,
) -> int:
    """Bytes that forward and backward pass of a batch add to the network at their peak.

    Counted is every array that is alive, be it saved for the backward pass, a temporary or a gradient: gradients of
    the parameters come while activations go, so that their peaks must not be added.

    Args:
        network: anywhere; it is neither changed nor copied but for its structure.
        shape: of the batch, (B, 3, h, w); the batch itself is not counted.
        autocast: what ``torch.autocast`` computes in, or None.
        layout: of the batch.
    """
    hollow_network = _hollow(network).train()
    batch = torch.empty(shape, device="meta").contiguous(memory_format=layout)
    with _Live() as live:
        if autocast:
            with _Autocast(autocast):
                embeddings = hollow_network(batch)
        else:
            embeddings = hollow_network(batch)
        embeddings.sum().backward()
    peak: int = live.peak
    return peak


@torch.no_grad()
def takes(network: torch.nn.Module, size: tuple[int, int]) -> bool:
    """Whether images of a size (h, w) pass through the network, on the CPU: some are too small for its kernels."""
    before = network.training
    try:
        network.eval()(torch.zeros(1, 3, *size))
    except RuntimeError:
        return False
    finally:
        network.train(before)
    return True


def _hollow(network: torch.nn.Module) -> torch.nn.Module:
    """A copy without contents, which takes no memory."""
    memo: dict[int, Any] = {}
    for tensor in (*network.parameters(), *network.buffers()):  # hollow before it is copied
        hollow = tensor.detach().to("meta")
        is_parameter = isinstance(tensor, torch.nn.Parameter)
        memo[id(tensor)] = torch.nn.Parameter(hollow, tensor.requires_grad) if is_parameter else hollow
    return copy.deepcopy(network, memo)
