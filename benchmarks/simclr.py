"""SimCLR by lightly, with the network, images, image passes and kNN of the study: where this method stands today.

    pip install -r requirements-peers.txt
    python -m benchmarks.simclr --data-root data/cifar10-images --out STUDY/simclr-s0 --seed 0

An epoch passes two views of each image through the network, so it counts as two of the study's. The settings are
those of lightly's own benchmark on CIFAR-10: colour jitter of half strength, no blur, SGD with momentum 0.9, learning
rate 0.06 for a batch of 128, weight decay 5e-4, a cosine schedule over the whole run, temperature 0.5. Neither these
nor our settings were tuned on this network and size. ``OUT/metrics.jsonl`` has a line for each epoch, with kNN against
recomputed training features (the backbone's, before the projection head, and the head's). After each epoch the state is
saved, and the same command resumes it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset

import datasets
import models
from benchmarks.study import CFGS, total_epochs
from lib.config.options import Options, height_and_width
from lib.config.parser import read_options
from lib.data.augmentation import Colour
from lib.errors import UsageError
from lib.evaluation.knn import top_k_accuracy, weighted_knn
from lib.seeding import Stream, seed_for
from lib.session import provenance
from lib.session.atomic_files import atomic_write
from lib.training import setup

BATCH, RATE, MOMENTUM, DECAY = 128, 0.06, 0.9, 5e-4
HIDDEN, OUTPUT = 256, 128
"""Sizes of the projection head; the input is the backbone's 256 pooled values."""


class Views(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Two views of each image."""

    def __init__(self, images: Sequence[np.ndarray], transform: Any) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, sample: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Two tensors (3, h, w)."""
        first, second = self.transform(Image.fromarray(np.asarray(self.images[sample])))
        return first, second


class SimCLR:
    """Network, projection head, loss and optimiser.

    Args:
        options: for the network.
        device: of the network and the batches.
    """

    def __init__(self, options: Options, device: torch.device) -> None:
        from lightly.loss import NTXentLoss
        from lightly.models.modules import SimCLRProjectionHead

        size = height_and_width(options.size)
        self.network = models.build(options.network, low_dim=options.low_dim, size=size).to(device)
        self.head = SimCLRProjectionHead(HIDDEN, HIDDEN, OUTPUT).to(device)
        self.criterion = NTXentLoss()
        parameters = [*self.network.parameters(), *self.head.parameters()]
        self.optimizer = torch.optim.SGD(parameters, lr=RATE * BATCH / 128, momentum=MOMENTUM, weight_decay=DECAY)

    def step(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """Trains with two views (B, 3, h, w) of the same images; returns the loss."""
        projections = self.head(pooled(self.network, torch.cat([first, second])))
        loss: torch.Tensor = self.criterion(*projections.chunk(2))
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def transform(options: Options, means: Colour, stds: Colour) -> Any:
    """lightly's transform of an image into two views, for images of CIFAR-10."""
    from lightly.transforms.simclr_transform import SimCLRTransform

    normalize = {"mean": list(means), "std": list(stds)}
    size, _ = height_and_width(options.size)
    return SimCLRTransform(input_size=size, cj_strength=0.5, gaussian_blur=0.0, normalize=normalize)


def pooled(network: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """The backbone's features (B, C) before the last layer."""
    maps: torch.Tensor = network.stages(images)["conv5"]  # type: ignore[operator]
    return F.adaptive_avg_pool2d(maps, 1).flatten(1)


@torch.no_grad()
def accuracies(context: setup.RunContext, network: torch.nn.Module, head: torch.nn.Module) -> dict[str, float]:
    """kNN accuracy of the test images, by the backbone's features and by the projection head's."""
    network.eval()
    head.eval()
    found = []
    assert context.splits.test is not None
    for split in (context.splits.train, context.splits.test):
        batches = [pooled(network, images) for images, _ in context.loader(split, train=False).epoch()]
        features = torch.cat(batches)
        found.append((F.normalize(features), F.normalize(head(features)), torch.as_tensor(split.labels)))
    (*train, labels), (*test, test_labels) = found
    accuracy, options = {}, context.options
    k, sigma = options.knn_k, options.knn_sigma or options.npc_temperature
    for name, queries, bank in zip(("knn_backbone", "knn_head"), test, train, strict=True):
        scores = weighted_knn(queries, bank, labels, classes=len(context.splits.train.classes), k=k, sigma=sigma)
        accuracy[name] = top_k_accuracy(scores, test_labels, 1)
    network.train()
    head.train()
    return accuracy


def main(argv: Sequence[str]) -> int:
    """Exit status: 0 trained, 2 unusable input."""
    try:
        return train(argv)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        print(f"error: {package} is not installed; pip install -r requirements-peers.txt", file=sys.stderr)
    except (UsageError, datasets.DataError) as error:
        print(f"error: {error}", file=sys.stderr)
    return 2


def train(argv: Sequence[str]) -> int:
    """Trains or resumes."""
    import lightly  # noqa: F401 - if it is missing, this is said before anything is written

    parser = argparse.ArgumentParser(prog="python -m benchmarks.simclr", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data-root", type=Path, required=True, help="folder of train/<class>/ and test/<class>/")
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint and of metrics.jsonl")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--passes", type=float, default=total_epochs(), help="epochs of one view (default: an arm's)")
    parser.add_argument("--evaluate-every", type=int, default=5, help="epochs between two evaluations (default: 5)")
    given = parser.parse_args(argv)
    given.out.mkdir(parents=True, exist_ok=True)
    words = ["--cfgs", *CFGS, "--data-root", str(given.data_root), "--seed", str(given.seed), "--debug"]
    context = setup.prepare(read_options(words))
    options, (means, stds) = context.options, context.means_and_stds
    images = context.splits.train.images
    views = Views(images, transform(options, means, stds))
    torch.manual_seed(seed_for(given.seed, Stream.WEIGHTS))
    model = SimCLR(options, context.device)
    network, head, optimizer = model.network, model.head, model.optimizer
    steps = round(given.passes * len(images) / (2 * BATCH))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    parts: dict[str, Any] = {"net": network, "head": head, "optimizer": optimizer, "schedule": schedule}
    path, done, epoch, seconds = given.out / "latest.ckpt", 0, 0, 0.0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        done, epoch, seconds = saved["done"], saved["epoch"], saved["seconds"]
    network.train()
    head.train()
    while done < steps:
        started, seen, total = time.perf_counter(), 0, 0.0
        torch.manual_seed(seed_for(given.seed, Stream.AUGMENTATION, 0, epoch))  # seeds the order and the transforms
        np.random.seed(seed_for(given.seed, Stream.AUGMENTATION, 0, epoch) % 2**32)
        for first, second in DataLoader(views, BATCH, shuffle=True, drop_last=True):
            if done == steps:
                break
            loss = model.step(first, second)
            schedule.step()
            done, seen, total = done + 1, seen + len(first), total + loss.item() * len(first)
        spent = time.perf_counter() - started
        seconds, epoch = seconds + spent, epoch + 1
        judged = done == steps or epoch % given.evaluate_every == 0
        row: dict[str, Any] = {
            "epoch": epoch,
            "passes": 2 * BATCH * done / len(images),
            "loss": total / seen,
            "train_s": seconds,
        }
        row |= {"train_s": seconds, "image_passes_per_s": 2 * seen / spent}
        row |= accuracies(context, network, head) if judged else {}
        row |= {"commit": provenance.commit(), "processor": provenance.processor()}
        with (given.out / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        with atomic_write(path) as file:
            states = {name: part.state_dict() for name, part in parts.items()}
            torch.save({**states, "done": done, "epoch": epoch, "seconds": seconds}, file)
        print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
