"""What a run starts from, be it to train, to test or to show something, and how it comes together.

Letters: N training samples, D embedding.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import datasets
import models
from lib import seeding
from lib.config import parser
from lib.config.options import Options, height_and_width
from lib.data import augmentation
from lib.data.augmentation import Augmentation, Colour
from lib.data.loader import Loader
from lib.distributed import consensus, device, launch
from lib.distributed.processes import Ranks
from lib.evaluation import features
from lib.evaluation.classifier import Evaluator
from lib.seeding import Stream
from lib.session.console import logger, progress
from lib.session.locate import latest
from lib.session.run_folder import of_job
from lib.training import checkpoint, pretrained
from lib.training.checkpoint import Checkpoint

EXAMPLES = 10
"""Files, and reasons, that are named when many are left out."""


@dataclass(frozen=True)
class RunContext:
    """Options, data, network, and the checkpoint where one is gone on from."""

    options: Options  # with a seed
    splits: datasets.Splits
    means_and_stds: tuple[Colour, Colour]  # means and deviations
    augmentations: tuple[Augmentation, Augmentation]  # for training, for testing
    device: torch.device
    network: torch.nn.Module
    source: Path | None  # of the checkpoint
    loaded: Checkpoint  # empty without --resume
    ranks: Ranks = field(default_factory=Ranks)
    begun: Path | None = None  # the session that the launcher's processes had begun before they were started anew
    resident: dict[int, torch.Tensor] = field(default_factory=dict)  # images on the device, by their array's id
    embedded: list[torch.Tensor] = field(default_factory=list)  # the training images' embeddings, once computed

    def alone(self) -> RunContext | None:
        """The same for the first process when the others have nothing more to do; None for these."""
        return replace(self, ranks=Ranks()) if self.ranks.is_rank0 else None

    def loader(self, split: datasets.ImageSet, *, train: bool) -> Loader:
        """Batches of a split: shuffled and augmented, or in order and as they are."""
        return Loader(
            self.placed(split.images),
            self.augmentations[0 if train else 1],
            batch_size=self.options.batch_size,
            workers=self.options.workers_num,
            seed=self.options.seed if train else None,
            device=self.device,
            ranks=self.ranks,
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
            ranks=self.ranks,
        )

    def train_embeddings(self) -> torch.Tensor:
        """(N, D) embeddings of the training images by the network as it is now, with the test transform.

        They are computed once. The memory bank is not the same: its rows are running means over augmented views, so
        that identical images have different rows.
        """
        if not self.embedded:
            train = self.loader(self.splits.train, train=False)
            self.embedded.append(features.extract(self.network, train, "training features"))
        return self.embedded[0]


def prepare(options: Options, ranks: Ranks | None = None) -> RunContext:
    """Checks everything that can be checked before anything is written, in all processes that train together."""
    ranks = ranks or Ranks()
    consensus.assert_equal_across_ranks(ranks, asked(options))  # first of all: what is done together hangs on them
    device.allow_nondeterminism(not options.deterministic)
    place = consensus.run_on_all_ranks(ranks, lambda: device.select(options.gpus))
    if options.download and ranks.size > 1:  # one process of each machine fetches
        here = int(os.environ.get("LOCAL_RANK", 0))
        consensus.run_on_all_ranks(ranks, lambda: load_data(options) if here == 0 else None, (datasets.DataError,))
    begun = None
    if launch.restarts():
        begun = ranks.broadcast_object(of_job(options.sess_dir, launch.job()))
        if begun and ranks.broadcast_object(latest(begun).is_file()):  # it is the first process that reads it
            options = options.model_copy(update={"resume": begun, "restart": False, "session": None})
    source, loaded = checkpoint.load_resumed(options.resume, ranks) if options.resume else (None, {})
    seed = seeding.choose(options.seed, loaded.get("seed"), ranks.broadcast_object(int(time.time())))
    options = options.model_copy(update={"seed": seed})
    read = partial(assemble, options, place, ranks, source=source, loaded=loaded)
    context = consensus.run_on_all_ranks(ranks, read, (datasets.DataError, models.NetworkError))
    if ranks.size > 1:  # it decodes images and hashes every name
        consensus.assert_equal_across_ranks(ranks, seen(context))
    return replace(context, begun=begun)


def assemble(
    options: Options, place: torch.device, ranks: Ranks, *, source: Path | None, loaded: Checkpoint
) -> RunContext:
    """Reads what a run starts from, beside its checkpoint."""
    data_source = datasets.DATASETS[options.dataset]
    assert options.seed is not None
    torch.manual_seed(seeding.seed_for(options.seed, Stream.WEIGHTS))  # the network's first weights
    network = models.build(options.network, low_dim=options.low_dim, size=height_and_width(options.size))
    if options.pretrained and not source:
        pretrained.load_pretrained(network, options.pretrained)
    splits = load_data(options)
    means_and_stds = options.means or data_source.means, options.stds or data_source.stds
    augmentations = (
        augmentation.for_training(options, *means_and_stds),
        augmentation.for_testing(options, *means_and_stds),
    )
    device.allow_tf32(options.tf32)
    network = device.place(network, place, ranks, sync_bn=options.sync_bn, compile=options.compile)
    return RunContext(options, splits, means_and_stds, augmentations, place, network, source, loaded, ranks)


def asked(options: Options) -> dict[str, str]:
    """The options, in words; of paths, which may be others on every machine, whether there is one."""
    return {
        parser.flag(name): ("a path" if value else "none") if parser.is_path(name) else str(value)
        for name, value in options
    }


def seen(context: RunContext) -> dict[str, str]:
    """What all processes of a run must see alike beside their options, in words."""
    named = {"training images": context.splits.train, "test images": context.splits.test}
    images = {name: datasets.fingerprint(split) if split else "none" for name, split in named.items()}
    return {**images, "PyTorch": torch.__version__}


def load_data(options: Options) -> datasets.Splits:
    """The splits, with what the user should know about them said once."""

    def bar(items: Iterable[Any], what: str, total: int, unit: str) -> Iterable[Any]:
        return progress(items, what, unit, total)

    splits = datasets.load(
        options.dataset,
        options.data_root,
        strict=options.strict_data,
        download=options.download,
        boxes=options.bounding_boxes,
        progress=bar,
    )
    if options.val_fraction:
        splits = datasets.hold_out(splits, options.val_fraction)
    for note in splits.notes:
        logger().info("%s", note)
    warn_of_skipped(splits.skipped)
    if splits.train.labels is None:
        logger().info("the training images have no labels: accuracy and consistency are not computed")
    elif splits.test is None or splits.test.labels is None:
        logger().info("there are no labelled test images: accuracy is not computed")
    return splits


def warn_of_skipped(skipped: Sequence[tuple[str, str]]) -> None:
    """Says which files were left out and why; many of one reason, or many reasons, by examples."""
    names_of: dict[str, list[str]] = {}
    for name, why in skipped:
        names_of.setdefault(why, []).append(name)
    for why, names in list(names_of.items())[:EXAMPLES]:
        more = f" and {len(names) - EXAMPLES} more" if len(names) > EXAMPLES else ""
        logger().warning("unreadable, left out: %s%s: %s", ", ".join(names[:EXAMPLES]), more, why)
    if skipped:
        logger().warning("%d unreadable images were left out; --strict-data refuses them", len(skipped))


def load_network(context: RunContext) -> None:
    """The network of the checkpoint, where nothing is trained."""
    if context.source:
        checkpoint.load_network(context.network, context.loaded, context.source)
    elif not context.options.pretrained:
        logger().warning("no --resume: the network has random weights")
