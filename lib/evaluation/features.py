"""Embeddings of a split. Letters: N samples, n samples of this rank, B batch size, D embedding size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F

from lib.data.augmentation import to_device
from lib.distributed.processes import Ranks
from lib.session.console import progress


class Batches(Protocol):
    """A loader of a split, such as ``lib.data.loader.Loader``: N ``samples``, sharded over ``ranks``."""

    samples: int
    ranks: Ranks

    def epoch(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yields images (B, 3, h, w) and sample indices (B,), every sample of this rank once."""

    def __len__(self) -> int: ...


class PooledStage(torch.nn.Module):
    """Images -> features of a stage, averaged over all positions and scaled to unit length: (B, channels).

    Args:
        network: has a method ``stages``; this module has its training mode.
        stage: name of the stage.
    """

    def __init__(self, network: torch.nn.Module, stage: str) -> None:
        super().__init__()
        self.network = network
        self.stage = stage
        self.training = network.training

    def stages(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """The stages of the network."""
        maps: dict[str, torch.Tensor] = self.network.stages(images)  # type: ignore[operator]
        return maps

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, channels)."""
        features = self.stages(images)[self.stage]
        return F.normalize(features.flatten(2).mean(dim=2) if features.dim() == 4 else features, dim=1)


def embedder(network: torch.nn.Module, stage: str) -> torch.nn.Module:
    """The network itself if ``--embed`` is its embeddings (``fc``), otherwise the pooled stage."""
    return network if stage == "fc" else PooledStage(network, stage)


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


class WithStatistics(torch.nn.Module):
    """A network whose outputs have two more columns, the contrast and the smoothness of each image.

    The contrast is the standard deviation of the pixels, in [0, 0.5] for images in [0, 1]. The smoothness is
    1 - E[(x - y)^2] / (2 Var x) over adjacent pixels x and y: near 1 for photographs, near 0 for noise; 1 without
    contrast. Both are computed from the images that the network sees.

    Args:
        network: images (B, 3, h, w) to embeddings (B, D).
        stds: of the normalisation of the images.
    """

    def __init__(self, network: torch.nn.Module, stds: Sequence[float]) -> None:
        super().__init__()
        self.network, self.stds = network, stds
        self.training = network.training

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, h, w) -> (B, D + 2)."""
        scaled = images.float() * to_device(np.array(self.stds), images)[:, None, None]
        variance = scaled.var(dim=(2, 3), correction=0).mean(dim=1)  # (B,)
        steps = torch.stack([scaled.diff(dim=dim).square().mean(dim=(1, 2, 3)) for dim in (2, 3)]).nanmean(dim=0)
        smoothness = 1 - torch.where(variance > 0, steps / (2 * variance), 0).nan_to_num()
        return torch.cat([self.network(images), variance.sqrt()[:, None], smoothness[:, None]], dim=1)
