"""All that the report of a session is made of.

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
"""Of every choice of samples: the same run has the same report."""
SEARCHED = 100_000
"""Images among which a report searches groups, duplicates and outliers, at most: the time grows with the square."""


def drawn(samples: int, most: int) -> np.ndarray:
    """At most so many samples, drawn at random and sorted; more of them contain those of fewer."""
    return np.sort(np.random.default_rng(SEED).permutation(samples)[:most])


@dataclass(frozen=True)
class Discovered:
    """What the discovery of a round found.

    Attributes:
        round: at whose start it was.
        entropy: (N,) of each sample, in nats.
        anchors: (A,) sample indices in order of ascending entropy.
        neighbours: (A, K) sample indices, most similar first.
        similarities: (A, K) cosine of each anchor and neighbour, or None where they are not known.
    """

    round: int
    entropy: np.ndarray
    anchors: np.ndarray
    neighbours: np.ndarray
    similarities: np.ndarray | None = None


@dataclass(frozen=True)
class Tested:
    """Test images, to be classified by their similarity to ``Material.features``.

    Attributes:
        images: M arrays uint8 (H, W, 3).
        labels: (M,) classes.
        features: (M, D) of unit length.
        protocol: how they are classified, with its constants, and where both sides' features come from.
        k: voters, cut to N.
        sigma: width of the votes' weights exp(s / sigma).
    """

    images: Sequence[np.ndarray]
    labels: np.ndarray
    features: np.ndarray
    protocol: str
    k: int
    sigma: float


@dataclass(frozen=True)
class ReportData:
    """All that a report is made of.

    Attributes:
        name: of the session.
        facts: versions, hardware, commit, seed and the like.
        options: by name.
        metrics: rows of metrics.jsonl in order, with the figures of ``lib/method/diagnostics.py`` where they are known.
        protocol: how the accuracies of ``metrics`` came about.
        published: the published figure and its source, '' where none is named.
        rounds: the discoveries, in order.
        images: N arrays uint8 (H, W, 3); only those that are shown are read.
        labels: (N,), or None.
        classes: their names.
        features: (N, D) embeddings of the training images, computed with the test transform.
        tested: None without labelled test images.
        finished: the last epoch of the last round is done.
        chooser: what chooses the best epoch.
        findings: what the embeddings of the searched images say of these, or a sentence why that is not known.
        searched: (F,) sample indices, ascending: the images that the findings are about.
        blank, noisy: (N,) of bool, images of a single colour and of noise.
        names: N file names, or None where images have none.
        indices: (N,) where each image stands in the data set.
        warning: the first sign that training has collapsed, '' where there is none.
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
        """File of a training image, or its place in the data set."""
        return printable(self.names[sample]) if self.names else f"image {self.indices[sample]}"

    def class_of(self, label: int) -> str:
        """Name of a class."""
        return printable(self.classes[label])

    @property
    def when(self) -> str:
        """The epoch after which network and memory bank are shown."""
        if not self.metrics:
            return "before the first epoch"
        last = self.metrics[-1]
        return f"after epoch {last['epoch'] + 1} of round {last['round']}"
