"""The data of a session's report.

Letters: N training samples, D embedding, M test images, A anchors, K neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lib.evaluation.findings import Findings
from lib.session.atomic_files import printable

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
