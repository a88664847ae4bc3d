"""Prepares a run: checks the options, and loads the data, the network and the checkpoint.

Notation: N training samples, D embedding size.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
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
from lib.distributed.sharded import ShardedRows
from lib.errors import UsageError
from lib.evaluation import features, linear_probe
from lib.evaluation.classifier import Accuracy, Evaluator
from lib.seeding import Stream
from lib.session.console import logger, progress
from lib.session.locate import latest
from lib.session.run_folder import of_job
from lib.training import checkpoint, pretrained
from lib.training.checkpoint import Checkpoint

EXAMPLES = 10
"""Maximum number of skipped files per reason, and of reasons, that are logged."""


@dataclass(frozen=True)
class RunContext:
    """Options, data, network, ranks, and the checkpoint that is resumed or evaluated."""

    options: Options  # with a seed
    splits: datasets.Splits
    means_and_stds: tuple[Colour, Colour]  # means and deviations
    augmentations: tuple[Augmentation, Augmentation]  # for training, for testing
    device: torch.device
    network: torch.nn.Module
    source: Path | None  # path of the checkpoint
    loaded: Checkpoint  # empty without --resume
    ranks: Ranks = field(default_factory=Ranks)
    begun: Path | None = None  # session that the job had started before the launcher restarted it
    resident: dict[int, torch.Tensor] = field(default_factory=dict)  # images on the device, by the id of their array
    embedded: list[torch.Tensor] = field(default_factory=list)  # of the training images: embeddings, statistics

    def on_rank0(self) -> RunContext | None:
        """This context for a single process on rank 0, for work without collectives; None on the other ranks."""
        return replace(self, ranks=Ranks()) if self.ranks.is_rank0 else None

    def loader(self, split: datasets.ImageSet, *, train: bool) -> Loader:
        """Batches of a split: shuffled and augmented if ``train``, else in order with the test transform."""
        return Loader(
            self.placed(split.images),
            self.augmentations[0 if train else 1],
            batch_size=self.options.images_per_batch if train else self.options.batch_size,
            workers=self.options.workers_num,
            seed=self.options.seed if train else None,
            device=self.device,
            ranks=self.ranks,
            compiled=self.options.compile,
            views=self.options.views if train else 1,
            size_of=self.options.size_of_epoch if train else None,
        )

    def placed(self, images: Sequence[np.ndarray] | np.ndarray) -> Sequence[np.ndarray] | torch.Tensor:
        """An array of images as a tensor on the device, shared by all loaders; other sequences unchanged."""
        if not isinstance(images, np.ndarray):
            return images
        if id(images) not in self.resident:
            self.resident[id(images)] = torch.from_numpy(images).to(self.device)
        return self.resident[id(images)]

    def evaluator(self, queries: datasets.ImageSet | None, protocol: str | None = None) -> Evaluator | None:
        """An evaluator of the queries, by default with the protocol of training; None without labels."""
        options, train = self.options, self.splits.labelled or self.splits.train
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
            labelled=self.loader(train, train=False) if self.splits.labelled else None,
        )

    @property
    def embedder(self) -> torch.nn.Module:
        """Maps images to the features that ``--embed`` chooses; by default the network."""
        return features.embedder(self.network, self.options.embed)

    def stage_evaluator(self) -> Callable[[], Accuracy] | None:
        """Accuracy of the test images by the stage of ``--embed``, recomputed for all images, as a test run does.

        None for the embeddings, which every epoch evaluates against the memory bank, and without labels.
        """
        test, evaluator = self.splits.test, self.evaluator(self.splits.test)
        if self.options.embed == "fc" or evaluator is None or test is None:
            return None

        def evaluate() -> Accuracy:
            train = self.loader(self.splits.labelled or self.splits.train, train=False)
            rows = features.extract(self.embedder, train, "training features")
            queries = features.extract(self.embedder, self.loader(test, train=False), "test features")
            return evaluator.classify(queries, ShardedRows(rows, train.samples, self.ranks))

        return evaluate

    def train_embeddings(self) -> torch.Tensor:
        """Features (N, D) of the training images with the test transform. They are computed once and cached.

        The memory bank differs: its rows are running means over augmented views.
        """
        return self._embed()[0]

    def train_statistics(self) -> torch.Tensor:
        """Contrast and smoothness (N, 2) of the training images, from the same pass as their embeddings."""
        return self._embed()[1]

    def _embed(self) -> list[torch.Tensor]:
        if not self.embedded:
            train = self.loader(self.splits.train, train=False)
            network = features.WithStatistics(self.embedder, self.means_and_stds[1])
            found = features.extract(network, train, "training features")
            self.embedded.extend([found[:, :-2].contiguous(), found[:, -2:].contiguous()])
        return self.embedded


def prepare(options: Options, ranks: Ranks | None = None) -> RunContext:
    """Loads data, network and checkpoint, and checks them before anything is written. Call it on every rank.

    Raises:
        UsageError: options, data or checkpoint cannot be used, or differ between ranks.
        DataError, NetworkError: on the rank that found the error.
    """
    ranks = ranks or Ranks()
    consensus.assert_equal_across_ranks(ranks, option_fingerprint(options))  # first: the collectives depend on them
    device.allow_nondeterminism(not options.deterministic)
    place = consensus.run_on_all_ranks(ranks, lambda: device.select(options.gpus))
    if options.download and ranks.size > 1:  # one process of each machine downloads
        here = int(os.environ.get("LOCAL_RANK", 0))
        consensus.run_on_all_ranks(ranks, lambda: load_data(options) if here == 0 else None, (datasets.DataError,))
    begun = None
    if launch.restarts():
        begun = ranks.broadcast_object(of_job(options.sess_dir, launch.job()))
        if begun and ranks.broadcast_object(latest(begun).is_file()):  # found by rank 0, which reads it
            options = options.model_copy(update={"resume": begun, "restart": False, "session": None})
    source, loaded = checkpoint.load_resumed(options.resume, ranks) if options.resume else (None, {})
    seed = seeding.choose(options.seed, loaded.get("seed"), ranks.broadcast_object(int(time.time())))
    options = options.model_copy(update={"seed": seed})
    read = partial(assemble, options, place, ranks, source=source, loaded=loaded)
    context = consensus.run_on_all_ranks(ranks, read, (datasets.DataError, models.NetworkError))
    if ranks.size > 1:  # the fingerprint decodes images and hashes every name
        consensus.assert_equal_across_ranks(ranks, data_fingerprint(context))
    return replace(context, begun=begun)


def assemble(
    options: Options, place: torch.device, ranks: Ranks, *, source: Path | None, loaded: Checkpoint
) -> RunContext:
    """Builds the network and loads the data, but not the checkpoint's weights."""
    data_source = datasets.DATASETS[options.dataset]
    assert options.seed is not None
    torch.manual_seed(seeding.seed_for(options.seed, Stream.WEIGHTS))  # for the initial weights
    network = build_network(options, load=not source)
    if "linear" in options.protocol:  # here, and not in the evaluation after days of training
        linear_probe.check_stages(network, options.linear_layers, height_and_width(options.size))
    splits = load_data(options)
    means_and_stds = options.means or data_source.means, options.stds or data_source.stds
    layout = device.memory_format(options, place)
    augmentations = (
        replace(augmentation.for_training(options, *means_and_stds), layout=layout),
        replace(augmentation.for_testing(options, *means_and_stds), layout=layout),
    )
    device.allow_tf32(options.tf32)
    network = device.place(network, place, ranks, layout=layout, sync_bn=options.sync_bn, compile=options.compile)
    return RunContext(options, splits, means_and_stds, augmentations, place, network, source, loaded, ranks)


def build_network(options: Options, *, load: bool = True) -> torch.nn.Module:
    """The network of the options, with the weights of ``pretrained`` if ``load``.

    Raises:
        UsageError, NetworkError: the network or its weights cannot be used.
    """
    package = str(options.pretrained) if load and str(options.pretrained) in models.PACKAGES else None
    if package and package != models.package_of(options.network):
        raise UsageError(
            f"--pretrained {package}: {options.network} is not a network of {package}; set --network to "
            f"{package}/NAME, or give --pretrained a file"
        )
    network = models.build(
        options.network,
        low_dim=options.low_dim,
        size=height_and_width(options.size),
        pretrained=bool(package),
        head=options.head,
        stage=options.embed,
    )
    if options.early_size is not None:
        models.check_size(network, options.network, low_dim=options.low_dim, size=height_and_width(options.early_size))
    if package:
        logger().info("%s: loaded its weights of %s; the embedding layer is random", package, options.network)
    elif options.pretrained and load:
        pretrained.load_pretrained(network, options.pretrained)
    return network


def option_fingerprint(options: Options) -> dict[str, str]:
    """The options as text. Paths may differ between machines: only whether they are set is compared."""
    return {
        parser.flag(name): ("a path" if value else "none") if parser.is_path(name) else str(value)
        for name, value in options
    }


def data_fingerprint(context: RunContext) -> dict[str, str]:
    """Fingerprints of the images, and PyTorch's version, which must be equal on all ranks."""
    named = {"training images": context.splits.train, "test images": context.splits.test}
    images = {name: datasets.fingerprint(split) if split else "none" for name, split in named.items()}
    return {**images, "PyTorch": torch.__version__}


def load_data(options: Options) -> datasets.Splits:
    """Loads the splits and logs notes, skipped images and missing labels."""

    def bar(items: Iterable[Any], what: str, total: int, unit: str) -> Iterable[Any]:
        return progress(items, what, unit, total)

    splits = datasets.load(
        options.dataset,
        options.data_root,
        strict=options.strict_data,
        download=options.download,
        boxes=options.bounding_boxes,
        label_column=options.label_column,
        progress=bar,
    )
    if options.val_fraction:
        splits = datasets.hold_out(splits, options.val_fraction)
    for note in splits.notes:
        logger().info("%s", note)
    warn_of_skipped(splits.skipped)
    if splits.labelled is None and splits.train.labels is None:
        logger().info("the training images have no labels: accuracy and consistency are not computed")
    elif splits.test is None or splits.test.labels is None:
        logger().info("there are no labelled test images: accuracy is not computed")
    return splits


def warn_of_skipped(skipped: Sequence[tuple[str, str]]) -> None:
    """Logs the skipped files by reason, at most ``EXAMPLES`` files per reason and ``EXAMPLES`` reasons."""
    names_of: dict[str, list[str]] = {}
    for name, why in skipped:
        names_of.setdefault(why, []).append(name)
    for why, names in list(names_of.items())[:EXAMPLES]:
        more = f" and {len(names) - EXAMPLES} more" if len(names) > EXAMPLES else ""
        logger().warning("unreadable, skipped: %s%s: %s", ", ".join(names[:EXAMPLES]), more, why)
    if skipped:
        logger().warning("%d unreadable images were skipped; --strict-data stops instead", len(skipped))


def load_network(context: RunContext) -> None:
    """Loads the checkpoint's weights, for runs that do not train."""
    if context.source:
        checkpoint.load_network(context.network, context.loaded, context.source)
    elif not context.options.pretrained:
        logger().warning("the network has random weights; use --resume or --pretrained to load weights")
