"""k-means on embeddings, and how well its clusters are the classes.

Letters: N samples, D embedding, C classes, G clusters.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import partial

import numpy as np

from lib.errors import UsageError
from lib.session.console import logger

STARTS = 10
"""Starts of k-means, of which the one with the smallest sum of squares counts."""
WHOLE = 50_000
"""Samples up to which k-means runs on all at once, and by batches above."""
BATCH = 4096
JUDGED = 10_000
"""Samples that the silhouette is taken over at most: it compares every pair."""


@dataclass(frozen=True)
class Clustering:
    """Clusters, and what they are worth.

    Attributes:
        name: the protocol with its constants.
        clusters: (N,) the cluster of each sample.
        figures: ``nmi`` (normalised mutual information, arithmetic mean), ``ari`` (adjusted Rand index) and
            ``accuracy`` (share of samples in the class that their cluster stands for, clusters and classes paired
            one to one as fits best); without labels ``silhouette``, from -1 to 1.
    """

    name: str
    clusters: np.ndarray
    figures: dict[str, float]


def cluster(embeddings: np.ndarray, labels: np.ndarray | None, *, clusters: int, seed: int) -> Clustering:
    """k-means, judged by the labels, or without them by how apart the clusters lie.

    Args:
        embeddings: (N, D), unit length.
        labels: (N,), or None.
        clusters: G.
        seed: of the starts.

    Raises:
        UsageError: there are fewer samples than clusters, or embeddings that are no numbers.
    """
    from sklearn.cluster import KMeans, MiniBatchKMeans  # takes a second to import, which others need not wait for
    from sklearn.exceptions import ConvergenceWarning

    if clusters > len(embeddings):
        raise UsageError(
            f"--protocol cluster: {len(embeddings)} images cannot make {clusters} clusters; set --clusters, or leave "
            "the protocol out"
        )
    if not np.isfinite(embeddings).all():
        raise UsageError(
            "--protocol cluster: some embeddings are not finite numbers; choose another checkpoint, or leave the "
            "protocol out"
        )
    whole = len(embeddings) <= WHOLE
    method = KMeans if whole else partial(MiniBatchKMeans, batch_size=BATCH)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # at each start, where fewer images differ than clusters
        found: np.ndarray = method(clusters, n_init=STARTS, random_state=seed % 2**32).fit_predict(embeddings)
    if (kinds := len(np.unique(found))) < clusters:
        logger().warning("k-means: %d of the %d clusters are empty, as images are alike", clusters - kinds, clusters)
    kind = "k-means" if whole else "k-means by batches"
    name = f"{kind} ({clusters} clusters, best of {STARTS} starts)"
    return Clustering(name, found, _unsupervised(embeddings, found, seed) if labels is None else against(labels, found))


def against(labels: np.ndarray, clusters: np.ndarray) -> dict[str, float]:
    """The figures of clusters (N,) that labels (N,) give."""
    from scipy.optimize import linear_sum_assignment
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
    from sklearn.metrics.cluster import contingency_matrix

    counts = contingency_matrix(labels, clusters)  # (C, G)
    rows, columns = linear_sum_assignment(counts, maximize=True)
    return {
        "nmi": float(normalized_mutual_info_score(labels, clusters)),
        "ari": float(adjusted_rand_score(labels, clusters)),
        "accuracy": float(counts[rows, columns].sum() / len(labels)),
    }


def _unsupervised(embeddings: np.ndarray, clusters: np.ndarray, seed: int) -> dict[str, float]:
    from sklearn.metrics import silhouette_score

    drawn = np.random.default_rng(seed).permutation(len(embeddings))[:JUDGED]
    kinds = len(np.unique(clusters[drawn]))
    if not 2 <= kinds < len(drawn):
        return {}  # it compares clusters, and needs two, and one with two members
    return {"silhouette": float(silhouette_score(embeddings[drawn], clusters[drawn]))}
