"""What a run starts from, be it to train, to test or to show something. Layer 4.

Letters: N training samples, D embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

import datasets
from lib import features, lookup
from lib.augment import Augmentation, Colour
from lib.checkpoint import Checkpoint
from lib.loader import Loader
from lib.options import Options
from lib.protocols import Evaluator
from lib.world import World


@dataclass(frozen=True)
class Setting:
    """Options, data, network, and the checkpoint where one is gone on from."""

    options: Options  # with a seed
    splits: datasets.Splits
    colours: tuple[Colour, Colour]  # means and deviations
    augmentations: tuple[Augmentation, Augmentation]  # for training, for testing
    device: torch.device
    network: torch.nn.Module
    source: Path | None  # of the checkpoint
    loaded: Checkpoint  # empty without --resume
    world: World = field(default_factory=World)
    begun: Path | None = None  # the session that the launcher's processes had begun before they were started anew
    resident: dict[int, torch.Tensor] = field(default_factory=dict)  # images on the device, by their array's id

    def alone(self) -> Setting | None:
        """The same for the first process when the others have nothing more to do; None for these."""
        return replace(self, world=World()) if self.world.is_first else None

    def loader(self, split: datasets.ImageSet, *, train: bool) -> Loader:
        """Batches of a split: shuffled and augmented, or in order and as they are."""
        return Loader(
            self.placed(split.images),
            self.augmentations[0 if train else 1],
            batch_size=self.options.batch_size,
            workers=self.options.workers_num,
            seed=self.options.seed if train else None,
            device=self.device,
            world=self.world,
        )

    def placed(self, images: Sequence[np.ndarray] | np.ndarray) -> Sequence[np.ndarray] | torch.Tensor:
        """One array of images as a tensor on the device, which all loaders share; others as they are."""
        if not isinstance(images, np.ndarray):
            return images
        if id(images) not in self.resident:
            self.resident[id(images)] = torch.from_numpy(images).to(self.device)
        return self.resident[id(images)]

    def evaluator(self, queries: datasets.ImageSet | None, protocol: str | None = None) -> Evaluator | None:
        """A protocol, by default the training's, over test images or those held out; None where labels are missing."""
        options, train = self.options, self.splits.train
        if queries is None or queries.labels is None or train.labels is None:
            return None
        return Evaluator(
            protocol or options.training_protocol,
            test=self.loader(queries, train=False),
            test_labels=queries.labels,
            train_labels=train.labels,
            classes=len(train.classes),
            k=options.knn_k,
            sigma=options.knn_sigma or options.npc_temperature,
            device=self.device,
            world=self.world,
        )

    def memory(self, loaded: Checkpoint) -> torch.Tensor:
        """The rows of the checkpoint's memory bank, or the training images' embeddings where it has none of theirs."""
        memory = loaded.get("npc", {}).get("memory")
        train = self.splits.train
        if isinstance(memory, torch.Tensor) and memory.shape == (len(train), self.options.low_dim):
            return memory.to(self.device)
        return features.extract(self.network, self.loader(train, train=False), "training features")

    def gallery(self) -> lookup.Gallery:
        """The training images by name and class."""
        train = self.splits.train
        return lookup.Gallery(train.images, train.names, train.labels, train.classes)
