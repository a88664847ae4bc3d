"""The data of a session's report, and how they are collected.

Letters: N training samples, D embedding, M test images, A anchors, K neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lib.config.options import Options
from lib.config.parser import extra
from lib.errors import UsageError
from lib.evaluation.classifier import Evaluator
from lib.evaluation.features import extract
from lib.evaluation.findings import Findings, blank_and_noisy, find
from lib.method.collapse import find_collapse
from lib.session import metrics
from lib.session.atomic_files import printable
from lib.training import checkpoint
from lib.training.checkpoint import Checkpoint
from lib.training.setup import RunContext

SEED = 0
"""Seed of every random subset, so that a run always has the same report."""
SEARCHED = 100_000
"""Maximum number of images in the findings of a report: the time grows quadratically."""


def drawn(samples: int, most: int) -> np.ndarray:
    """At most ``most`` samples, drawn at random and sorted; a larger subset contains the smaller ones."""
    return np.sort(np.random.default_rng(SEED).permutation(samples)[:most])


@dataclass(frozen=True)
class Discovered:
    """The result of the discovery of a round.

    Attributes:
        round: its round.
        entropy: (N,) of each sample, in nats.
        anchors: (A,) sample indices in order of ascending entropy.
        neighbours: (A, K) sample indices, most similar first.
        similarities: (A, K) cosine of each anchor and neighbour, or None if unknown.
    """

    round: int
    entropy: np.ndarray
    anchors: np.ndarray
    neighbours: np.ndarray
    similarities: np.ndarray | None = None


@dataclass(frozen=True)
class Tested:
    """Test images, to be classified by their similarity to ``ReportData.features``.

    Attributes:
        images: M arrays uint8 (H, W, 3).
        labels: (M,) classes.
        features: (M, D) of unit length.
        protocol: the classifier with its constants, and the source of the features.
        k: number of neighbours that vote, at most N.
        sigma: temperature of the vote weights exp(s / sigma).
    """

    images: Sequence[np.ndarray]
    labels: np.ndarray
    features: np.ndarray
    protocol: str
    k: int
    sigma: float


@dataclass(frozen=True)
class ReportData:
    """The data of a report.

    Attributes:
        name: name of the session.
        facts: versions, hardware, commit, seed and the like.
        options: by name.
        metrics: rows of metrics.jsonl in order, including the figures of ``lib/method/diagnostics.py`` if recorded.
        protocol: how the accuracies of ``metrics`` were measured.
        published: the published result and its source, '' if not given.
        rounds: the discoveries, in order.
        images: N arrays uint8 (H, W, 3); only the shown ones are read.
        labels: (N,), or None.
        classes: their names.
        features: (N, D) embeddings of the training images, computed with the test transform.
        tested: None without labelled test images.
        finished: whether the last epoch of the last round is complete.
        chooser: what selects the best epoch.
        findings: findings in the searched images, or a sentence why there are none.
        searched: (F,) sample indices, ascending, of the images in the findings.
        blank, noisy: (N,) of bool, images of a single colour and of noise.
        names: N file names, or None if the images have none.
        indices: (N,) index of each image in the data set.
        warning: the first sign of a collapse of training, '' if there is none.
    """

    name: str
    facts: Mapping[str, str]
    options: Mapping[str, object]
    metrics: Sequence[Mapping[str, Any]]
    protocol: str
    published: str
    rounds: Sequence[Discovered]
    images: Sequence[np.ndarray]
    labels: np.ndarray | None
    classes: tuple[str, ...]
    features: np.ndarray
    tested: Tested | None
    finished: bool
    findings: Findings | str
    searched: np.ndarray
    indices: np.ndarray
    blank: np.ndarray
    noisy: np.ndarray
    names: Sequence[str] | None = None
    chooser: str = "the test labels"
    warning: str = ""

    def name_of(self, sample: int) -> str:
        """File name of a training image, or its index in the data set."""
        return printable(self.names[sample]) if self.names else f"image {self.indices[sample]}"

    def class_of(self, label: int) -> str:
        """The name of a class."""
        return printable(self.classes[label])

    @property
    def when(self) -> str:
        """The epoch of the network and the memory bank, in words."""
        if not self.metrics:
            return "before the first epoch"
        last = self.metrics[-1]
        return f"after epoch {last['epoch'] + 1} of round {last['round']}"


def collect(context: RunContext, folder: Path, loaded: Checkpoint) -> ReportData:
    """The data of a session's report, with the network of the context and the session's latest checkpoint.

    Raises:
        UsageError: the session has no metrics, or a checkpoint cannot be used.
    """
    options, train = context.options, context.splits.train
    evaluator = context.evaluator(context.splits.test)
    tested = _tested(context, evaluator)
    features, statistics = context.train_embeddings().cpu().numpy(), context.train_statistics().cpu().numpy()
    rows, starts = metrics.read(folder), metrics.starts(folder)
    last = rows[-1]
    try:
        samples = len(loaded["npc"]["memory"])
    except (KeyError, TypeError):
        raise UsageError(
            f"{folder}: its latest checkpoint has no memory bank, which a report needs; choose another session"
        ) from None
    if samples != len(train):
        raise UsageError(f"{folder}: was trained on {samples} samples, not {len(train)}; choose its data")
    blank, noisy = blank_and_noisy(statistics)
    searched = drawn(len(features), SEARCHED)
    return ReportData(
        name=folder.resolve().name,
        facts={str(name): str(value) for name, value in (starts[-1] if starts else {}).items()},
        options={name: value for name, value in options.model_dump(mode="json").items() if not extra(name)["this_run"]},
        metrics=rows,
        warning=find_collapse(
            rows,
            samples=len(train),
            size=options.ANs_size,
            low_dim=options.low_dim,
            temperature=options.npc_temperature,
        ),
        protocol=f"{evaluator.name} against {evaluator.against}" if evaluator else "",
        published=options.published or "",
        rounds=[
            Discovered(round, *(part.cpu().numpy() for part in (found.entropy, found.anchors, found.neighbours)))
            for round, found in checkpoint.discoveries(folder, loaded, len(train))
        ],
        images=train.images,
        labels=train.labels,
        classes=train.classes,
        names=train.names,
        indices=train.indices,
        features=features,
        findings=_findings(features[searched], None if train.labels is None else train.labels[searched], options),
        searched=searched,
        blank=blank,
        noisy=noisy,
        tested=tested,
        chooser="held-out training images" if options.val_fraction else "the test labels",
        finished=(last["round"], last["epoch"]) >= (options.max_round - 1, options.max_epoch - 1),
    )


def _tested(context: RunContext, evaluator: Evaluator | None) -> Tested | None:
    """The labelled test images with their embeddings; None if they or the training images have no labels."""
    options, test = context.options, context.splits.test
    if not evaluator or test is None or test.labels is None or context.splits.train.labels is None:
        return None
    embeddings = extract(context.embedder, context.loader(test, train=False), "test features")
    return Tested(
        images=test.images,
        labels=test.labels,
        features=embeddings.cpu().numpy(),
        protocol=f"{evaluator.name} against training features, both computed with the test transform",
        k=options.knn_k,
        sigma=options.knn_sigma or options.npc_temperature,
    )


def _findings(features: np.ndarray, labels: np.ndarray | None, options: Options) -> Findings | str:
    """The findings of the searched images (F, D), or a sentence with the reason if there are none."""
    try:
        return find(
            features,
            labels,
            neighbours=options.graph_neighbours,
            resolution=options.graph_resolution,
            seed=SEED,
        )
    except UsageError as error:
        return f"Not known: {error}."
