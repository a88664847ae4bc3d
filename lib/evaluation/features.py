"""Embeddings of a split. Letters: N samples, n samples of this rank, B batch size, D embedding size."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch

from lib.distributed.processes import Ranks
from lib.session.console import progress


class Batches(Protocol):
    """A loader of a split, such as ``lib.data.loader.Loader``: N ``samples``, sharded over ``ranks``."""

    samples: int
    ranks: Ranks

    def epoch(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yields images (B, 3, h, w) and sample indices (B,), every sample of this rank once."""

    def __len__(self) -> int: ...


@torch.no_grad()
def extract(network: torch.nn.Module, batches: Batches, what: str) -> torch.Tensor:
    """Computes the network's outputs for every sample of this rank, in sample order, in evaluation mode.

    Args:
        network: maps images to embeddings; its training mode is restored afterwards.
        batches: the split in any order, on the device of the network.
        what: label of the progress bar.

    Returns:
        (n, D) on the device of the batches; n = N with a single process.
    """
    was_training = network.training
    network.eval()
    outputs, indices = [], []
    for images, index in progress(batches.epoch(), what, "batch", total=len(batches)):
        outputs.append(network(images))
        indices.append(index)
    network.train(was_training)
    features, position = torch.cat(outputs), torch.cat(indices)
    result = torch.empty_like(features)
    result[position - position.min() if len(position) else position] = features
    return result
