"""Embeddings of a whole split. Letters: N samples, n of this process, D embedding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch

from lib.distributed.processes import Ranks
from lib.session.console import progress


class Batches(Protocol):
    """What ``lib/data/loader.py`` makes of a split: N ``samples``, in parts over the processes of a ``world``."""

    samples: int
    ranks: Ranks

    def epoch(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Images (B, 3, h, w) and their sample indices (B,), until every sample has come once."""

    def __len__(self) -> int: ...


@torch.no_grad()
def extract(network: torch.nn.Module, batches: Batches, what: str) -> torch.Tensor:
    """The network's outputs for every sample of this process, in order; batch normalisation in inference mode.

    Args:
        network: images to embeddings; its mode is left as it was.
        batches: the split, in any order, on the device of the network.
        what: what the progress bar says.

    Returns:
        (n, D) on the device of the batches; n = N where a process is alone.
    """
    was_training = network.training
    network.eval()
    parts, order = [], []
    for images, index in progress(batches.epoch(), what, "batch", total=len(batches)):
        parts.append(network(images))
        order.append(index)
    network.train(was_training)
    features, place = torch.cat(parts), torch.cat(order)
    result = torch.empty_like(features)
    result[place - place.min() if len(place) else place] = features
    return result
