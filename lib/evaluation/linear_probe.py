"""The linear probe: how well a linear classifier tells the classes from the features of a stage.

The protocol of Zhang et al., "Colorful Image Colorization", 2016, and "Split-Brain Autoencoders", 2017, which the
published columns follow: the network stays as it is, the maps of each stage are pooled to about 9,000 numbers, and
multinomial logistic regression is trained on them. Their AlexNet has 96, 256, 384, 384, 256 channels, pooled to grids
of 10, 6, 5, 5, 6, which is 9,600, 9,216, 9,600, 9,600, 9,216 numbers; the one here has 64, 192, 384, 256, 256 channels,
pooled to 12, 7, 5, 6, 6, which is 9,216, 9,408, 9,600, 9,216, 9,216. Here the features are taken once, with the test
transform, standardised by the training images' mean and deviation and kept; Zhang et al. train on random crops of the
images, which gives higher figures and takes a pass of the network for every epoch.

Letters: N samples, n of this process, B batch, b of it that this process has, F features, C classes.
"""

from __future__ import annotations

import errno
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from lib.distributed.sharded import ShardedRows
from lib.errors import UsageError
from lib.evaluation.features import Batches
from lib.session.console import logger, progress

POOLED = 9000
"""Numbers that a map is pooled to, as nearly as a square grid allows."""
EPOCHS, BATCH, RATE, MOMENTUM, DECAY = 100, 256, 0.1, 0.9, 1e-4
"""SGD with Nesterov momentum; the rate goes to zero along half a cosine, and is divided by the features' number over
100 where that is more than one: the steepest direction of standardised features grows with it."""
STEPS = 2_000, 100_000
"""Steps at least and at most: few images take more epochs until it has converged, a million take 20 and not 100."""
BLOCK = 4096
"""Rows that are looked at together where order does not matter."""
IN_MEMORY = 8 * 2**30
"""Bytes of a layer's features that are held in memory; more are kept in a temporary file, in half precision."""


@dataclass(frozen=True)
class Probed:
    """Accuracy on the test images by the classifier's last epoch, and by the best, which the test labels choose."""

    name: str
    top1: float
    top5: float
    best_top1: float


def pool(maps: torch.Tensor) -> torch.Tensor:
    """Maps (B, C, h, w) averaged to g x g positions, g the integer nearest to sqrt(POOLED / C) and at most h and w.

    Vectors (B, F) stay as they are.
    """
    if maps.dim() == 2:
        return maps
    channels, height, width = maps.shape[1:]
    grid = max(1, min(height, width, round(math.sqrt(POOLED / channels))))
    return F.adaptive_avg_pool2d(maps, grid).flatten(1)


@torch.no_grad()
def extract_stages(
    network: torch.nn.Module, batches: Batches, layers: Sequence[str], what: str
) -> dict[str, torch.Tensor]:
    """The pooled features of several stages from one pass over this process's part of a split, in sample order.

    Args:
        network: has ``stages``; its mode is left as it was.
        batches: the split, in any order.
        layers: names of stages.
        what: what the progress bar says.

    Returns:
        for each layer (n, F), in host memory as float32, or in a temporary file as float16.

    Raises:
        UsageError: the network has no such stage (lists those it has), or the disk has no room for the features.
    """
    was_training = network.training
    stages_of: Callable[[torch.Tensor], dict[str, torch.Tensor]] = network.stages  # type: ignore[assignment]
    network.eval()
    found: dict[str, torch.Tensor] = {}
    part = batches.ranks.shard(batches.samples)
    try:
        for images, index in progress(batches.epoch(), what, "batch", total=len(batches)):
            stages = stages_of(images)
            if missing := [layer for layer in layers if layer not in stages]:
                raise UsageError(f"--linear-layers: no stage {missing[0]}; there are {', '.join(stages)}")
            for layer in layers:
                features = pool(stages[layer]).float().cpu()
                if layer not in found:
                    found[layer] = _storage(part.stop - part.start, features.shape[1], layer)
                found[layer][index.cpu() - part.start] = features.to(found[layer].dtype)
    finally:
        network.train(was_training)
    return found


def _storage(samples: int, width: int, layer: str) -> torch.Tensor:
    """Where a layer's features (samples, width) go; UsageError where they need a file and the disk has no room for it.

    The room is reserved: writing to a mapped file on a full disk would kill the process (SIGBUS).
    """
    if 4 * samples * width <= IN_MEMORY:
        return torch.empty(samples, width)
    size, folder = 2 * samples * width, tempfile.gettempdir()
    there = shutil.disk_usage(folder).free
    refusal = UsageError(
        f"--linear-layers {layer}: its features take {size / 1e6:,.0f} MB in a temporary file, and {folder} has "
        f"{there / 1e6:,.0f} MB left; set TMPDIR to a folder with more room, or name fewer layers"
    )
    if size > there:
        raise refusal
    with tempfile.TemporaryFile() as file:  # stays as long as it is mapped
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    raise refusal from None  # a quota, or another process that writes there
        logger().info("%s: %.0f MB of features are kept in a temporary file as float16", layer, size / 1e6)
        return torch.from_numpy(np.memmap(file, np.float16, "r+", shape=(samples, width)))


def probe(
    train: torch.Tensor | ShardedRows,
    train_labels: torch.Tensor,
    test: torch.Tensor | ShardedRows,
    test_labels: torch.Tensor,
    *,
    classes: int,
    seed: int,
    device: torch.device,
    what: str,
) -> Probed:
    """Trains a linear classifier on features and judges it on others after every epoch; the same in every process.

    Args:
        train: (N, F).
        train_labels: (N,).
        test: (M, F).
        test_labels: (M,).
        classes: C.
        seed: of the order of the batches.
        device: where it is trained.
        what: what the progress bar says.
    """
    train, test = ShardedRows.of(train), ShardedRows.of(test)
    ranks, labels = train.ranks, train_labels[train.ranks.shard(train.samples)]
    mean, scale = (value.to(device) for value in _moments(train))
    layer = torch.nn.Linear(train.shape[1], classes, device=device)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    rate = RATE / max(1.0, train.shape[1] / 100)
    optimizer = torch.optim.SGD(layer.parameters(), lr=rate, momentum=MOMENTUM, nesterov=True, weight_decay=DECAY)
    steps = math.ceil(train.samples / BATCH)
    least, most = STEPS
    epochs = max(1, min(max(EPOCHS, least // steps), most // steps))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps * epochs)
    draw = torch.Generator().manual_seed(seed)
    best, top1, top5 = 0.0, 0.0, 0.0
    for _ in progress(range(epochs), what, "epoch"):
        for index in torch.randperm(train.samples, generator=draw).split(BATCH):
            _, own = train.local_rows(index)
            rows = (train.local[own].to(device).float() - mean) / scale  # (b, F)
            loss = F.cross_entropy(layer(rows), labels[own].to(device), reduction="sum") / len(index)
            optimizer.zero_grad()
            loss.backward()
            ranks.all_reduce_gradients(layer.parameters())
            optimizer.step()
            schedule.step()
        top1, top5 = _judge(layer, test, test_labels, mean, scale)
        best = max(best, top1)
    name = f"linear probe (SGD, {epochs} epochs, {train.shape[1]} standardised features)"
    return Probed(name, top1, top5, best)


def _moments(features: ShardedRows) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation (F,); a deviation of 1 for what never changes, which is not to be blown up."""
    nothing = torch.zeros(features.shape[1], dtype=torch.float64)
    blocks = features.local.split(BLOCK) if len(features.local) else ()
    mean = features.ranks.all_reduce_sum(sum((rows.double().sum(dim=0) for rows in blocks), nothing)) / features.samples
    squares = sum(((rows.double() - mean).square().sum(dim=0) for rows in blocks), nothing)
    deviation = (features.ranks.all_reduce_sum(squares) / features.samples).sqrt()
    return mean.float(), torch.where(deviation > 1e-6, deviation, 1.0).float()


@torch.no_grad()
def _judge(
    layer: torch.nn.Linear, features: ShardedRows, labels: torch.Tensor, mean: torch.Tensor, scale: torch.Tensor
) -> tuple[float, float]:
    """Top-1 and top-5 accuracy."""
    right = torch.zeros(2, dtype=torch.long)
    labels = labels[features.ranks.shard(features.samples)]
    for rows, truth in zip(features.local.split(BLOCK), labels.split(BLOCK), strict=True):
        scores = layer((rows.to(mean.device).float() - mean) / scale)
        hits = scores.topk(min(5, layer.out_features)).indices.cpu() == truth[:, None]  # waits for the device
        right += torch.stack([hits[:, 0].sum(), hits.sum()])
    top1, top5 = (features.ranks.all_reduce_sum(right) / features.samples).tolist()
    return top1, top5
