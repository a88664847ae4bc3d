"""All that the report of a session is made of.

Letters: N training samples, D embedding, M test images, A anchors, K neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

SEED = 0
"""Of every choice of samples: the same run has the same report."""


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
    chooser: str = "the test labels"
    warning: str = ""

    @property
    def when(self) -> str:
        """The epoch after which network and memory bank are shown."""
        if not self.metrics:
            return "before the first epoch"
        last = self.metrics[-1]
        return f"after epoch {last['epoch'] + 1} of round {last['round']}"
