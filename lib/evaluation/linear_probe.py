"""The linear probe: accuracy of a linear classifier on the frozen features of a stage.

The published columns follow Zhang et al., "Colorful Image Colorization", 2016, and "Split-Brain Autoencoders", 2017:
the network is frozen, the feature maps of each stage are pooled to about 9,000 values, and multinomial logistic
regression is trained on them. Their AlexNet has 96, 256, 384, 384, 256 channels, pooled to grids
of 10, 6, 5, 5, 6, which is 9,600, 9,216, 9,600, 9,600, 9,216 values; the AlexNet here has 64, 192, 384, 256, 256
channels, pooled to 12, 7, 5, 6, 6, which is 9,216, 9,408, 9,600, 9,216, 9,216 values.

One difference: here the features are extracted once, with the test transform, and standardised by the mean and standard
deviation of the training images. Zhang et al. train on random crops, which gives higher accuracy and takes a forward
pass per epoch.

Letters: N training samples, M test images, n samples of this rank, B batch size, b samples of the batch on this rank,
F features, C classes.
"""

from __future__ import annotations

import errno
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from lib.distributed.sharded import ShardedRows
from lib.errors import UsageError
from lib.evaluation.features import Batches
from lib.session.console import logger, progress

POOLED = 9000
"""Target number of values of a pooled feature map; a square grid comes close to it."""
EPOCHS, BATCH, RATE, MOMENTUM, DECAY = 100, 256, 0.1, 0.9, 1e-4
"""SGD with Nesterov momentum and a cosine schedule to zero. The learning rate is divided by F / 100 if F > 100: the
largest curvature of the loss on standardised features grows with F."""
STEPS = 2_000, 100_000
"""Minimum and maximum number of steps: small sets need more than ``EPOCHS`` to converge, a million images need 20."""
BLOCK = 4096
"""Rows per block of the statistics and of the evaluation."""
IN_MEMORY = 8 * 2**30
"""Maximum bytes of features in the memory of a process, of all layers together; the widest of what is more go to
temporary files, in half precision."""


@dataclass(frozen=True)
class Probed:
    """Test accuracy in [0, 1] after the last epoch, and of the best epoch, which is chosen by the test labels."""

    name: str
    top1: float
    top5: float
    best_top1: float


def pool(maps: torch.Tensor) -> torch.Tensor:
    """Average-pools feature maps with C channels (B, C, h, w) to a g x g grid and flattens them: (B, C g g).

    g is the integer nearest to sqrt(``POOLED`` / C), at most h and w. Vectors (B, F) are returned unchanged.
    """
    if maps.dim() == 2:
        return maps
    channels, height, width = maps.shape[1:]
    grid = max(1, min(height, width, round(math.sqrt(POOLED / channels))))
    return F.adaptive_avg_pool2d(maps, grid).flatten(1)


@torch.no_grad()
def check_stages(network: torch.nn.Module, layers: Sequence[str], size: tuple[int, int]) -> None:
    """Raises UsageError if the network, on the CPU, has no stage of one of the names ``layers``.

    It embeds one black image of ``size`` (h, w).
    """
    was_training = network.training
    network.eval()
    stages = network.stages(torch.zeros(1, 3, *size))  # type: ignore[operator]
    network.train(was_training)
    _check_names(layers, stages)


def _check_names(layers: Sequence[str], stages: Iterable[str]) -> None:
    if missing := [layer for layer in layers if layer not in stages]:
        raise UsageError(f"--linear-layers: the network has no stage {missing[0]}; its stages are {', '.join(stages)}")


@torch.no_grad()
def extract_stages(
    network: torch.nn.Module, batches: Batches, layers: Sequence[str], what: str, *, held: int = 0
) -> dict[str, torch.Tensor]:
    """Extracts the pooled features of several stages in one pass over this rank's shard of a split.

    Args:
        network: has a method ``stages`` (images -> features by name); its training mode is restored afterwards.
        batches: the split, in any order.
        layers: names of stages.
        what: label of the progress bar.
        held: bytes of features of other splits that are in memory at the same time.

    Returns:
        For each layer (n, F) in sample order, in host memory as float32 or in a temporary file as float16.

    Raises:
        UsageError: the network has no such stage (the message lists its stages), or the disk is too full.
    """
    was_training = network.training
    stages_of: Callable[[torch.Tensor], dict[str, torch.Tensor]] = network.stages  # type: ignore[assignment]
    network.eval()
    found: dict[str, torch.Tensor] = {}
    shard = batches.ranks.shard(batches.samples)
    try:
        for images, index in progress(batches.epoch(), what, "batch", total=len(batches)):
            stages = stages_of(images)
            _check_names(layers, stages)
            pooled = {layer: pool(stages[layer]) for layer in layers}
            if not found:
                widths = {layer: features.shape[1] for layer, features in pooled.items()}
                found = _allocate(shard.stop - shard.start, widths, held)
            for layer, features in pooled.items():
                found[layer][index.cpu() - shard.start] = features.float().cpu().to(found[layer].dtype)
    finally:
        network.train(was_training)
    return found


def _allocate(samples: int, widths: Mapping[str, int], held: int) -> dict[str, torch.Tensor]:
    """Allocates the features (samples, width) of each layer, the narrowest in memory.

    Args:
        samples: n.
        widths: F of each layer.
        held: bytes that are in memory already.

    Raises:
        UsageError: the disk has no space for the files of the others.
    """
    in_memory: dict[str, torch.Tensor] = {}
    for layer in sorted(widths, key=widths.__getitem__):
        held += 4 * samples * widths[layer]
        if held <= IN_MEMORY:
            in_memory[layer] = torch.empty(samples, widths[layer])
    in_files = [layer for layer in widths if layer not in in_memory]
    size, folder = sum(2 * samples * widths[layer] for layer in in_files), tempfile.gettempdir()
    if in_files and size > shutil.disk_usage(folder).free:
        raise _no_space(in_files, size)
    return {
        layer: in_memory[layer] if layer in in_memory else _in_file(samples, widths[layer], layer) for layer in widths
    }


def _in_file(samples: int, width: int, layer: str) -> torch.Tensor:
    """A memory-mapped temporary file for the features (samples, width) of a layer.

    The disk space of the file is reserved: writing to a mapped file on a full disk would kill the process (SIGBUS).

    Raises:
        UsageError: the disk has no space for the file.
    """
    size = 2 * samples * width
    with tempfile.TemporaryFile() as file:  # exists as long as it is mapped
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    raise _no_space([layer], size) from None  # a quota, or another process that fills the disk
        logger().info("%s: %.0f MB of features are stored in a temporary file as float16", layer, size / 1e6)
        return torch.from_numpy(np.memmap(file, np.float16, "r+", shape=(samples, width)))


def _no_space(layers: Sequence[str], size: int) -> UsageError:
    folder = tempfile.gettempdir()
    return UsageError(
        f"--linear-layers {' '.join(layers)}: temporary files for the features need {size / 1e6:,.0f} MB, but {folder} "
        f"has only {shutil.disk_usage(folder).free / 1e6:,.0f} MB free; set TMPDIR to a folder with more space or name "
        "fewer layers"
    )


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
    """Trains a linear classifier on frozen features and evaluates it after every epoch.

    Minimises the mean cross-entropy over standardised features. A collective: call it on every rank.

    Args:
        train: (N, F).
        train_labels: (N,) class indices.
        test: (M, F).
        test_labels: (M,) class indices.
        classes: C.
        seed: seed of the order of the samples.
        device: device of the classifier.
        what: label of the progress bar.

    Returns:
        The accuracies, the same on every rank.
    """
    train, test = ShardedRows.of(train), ShardedRows.of(test)
    ranks, labels = train.ranks, train_labels[train.ranks.shard(train.samples)]
    mean, scale = (value.to(device) for value in _mean_and_deviation(train))
    layer = torch.nn.Linear(train.shape[1], classes, device=device)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    rate = RATE / max(1.0, train.shape[1] / 100)
    optimizer = torch.optim.SGD(layer.parameters(), lr=rate, momentum=MOMENTUM, nesterov=True, weight_decay=DECAY)
    steps = math.ceil(train.samples / BATCH)
    least, most = STEPS
    epochs = max(1, min(max(EPOCHS, least // steps), most // steps))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps * epochs)
    generator = torch.Generator().manual_seed(seed)
    best, top1, top5 = 0.0, 0.0, 0.0
    for _ in progress(range(epochs), what, "epoch"):
        for index in torch.randperm(train.samples, generator=generator).split(BATCH):
            _, own = train.local_rows(index)
            rows = (train.local[own].to(device).float() - mean) / scale  # (b, F)
            loss = F.cross_entropy(layer(rows), labels[own].to(device), reduction="sum") / len(index)
            optimizer.zero_grad()
            loss.backward()
            ranks.all_reduce_gradients(layer.parameters())
            optimizer.step()
            schedule.step()
        top1, top5 = _accuracy(layer, test, test_labels, mean, scale)
        best = max(best, top1)
    passes = "1 epoch" if epochs == 1 else f"{epochs} epochs"
    name = f"linear probe (SGD, {passes}, {train.shape[1]} standardised features)"
    return Probed(name, top1, top5, best)


def _mean_and_deviation(features: ShardedRows) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation (F,) over all ranks; the deviation of constant features is set to 1."""
    zeros = torch.zeros(features.shape[1], dtype=torch.float64)
    blocks = features.local.split(BLOCK) if len(features.local) else ()
    mean = features.ranks.all_reduce_sum(sum((rows.double().sum(dim=0) for rows in blocks), zeros)) / features.samples
    squares = sum(((rows.double() - mean).square().sum(dim=0) for rows in blocks), zeros)
    deviation = (features.ranks.all_reduce_sum(squares) / features.samples).sqrt()
    return mean.float(), torch.where(deviation > 1e-6, deviation, 1.0).float()


@torch.no_grad()
def _accuracy(
    layer: torch.nn.Linear, features: ShardedRows, labels: torch.Tensor, mean: torch.Tensor, scale: torch.Tensor
) -> tuple[float, float]:
    """Top-1 and top-5 accuracy in [0, 1] over all ranks."""
    correct = torch.zeros(2, dtype=torch.long)
    labels = labels[features.ranks.shard(features.samples)]
    for rows, targets in zip(features.local.split(BLOCK), labels.split(BLOCK), strict=True):
        scores = layer((rows.to(mean.device).float() - mean) / scale)
        hits = scores.topk(min(5, layer.out_features)).indices.cpu() == targets[:, None]  # synchronises with the device
        correct += torch.stack([hits[:, 0].sum(), hits.sum()])
    top1, top5 = (features.ranks.all_reduce_sum(correct) / features.samples).tolist()
    return top1, top5
