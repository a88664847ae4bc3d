"""k-means on embeddings, and the agreement of its clusters with the classes.

Letters: N samples, D embedding size, C classes, G clusters.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import partial

import numpy as np

from lib.errors import UsageError
from lib.session.console import logger

STARTS = 10
"""Initialisations of k-means; the result with the smallest inertia is used."""
FULL_BATCH = 50_000
"""Largest number of samples for full-batch k-means; mini-batch k-means is used above."""
BATCH = 4096
"""Batch size of mini-batch k-means."""
SILHOUETTE_SAMPLES = 10_000
"""Maximum number of samples of the silhouette, which compares every pair."""


@dataclass(frozen=True)
class Clustering:
    """Cluster assignments and their scores.

    Attributes:
        name: description of the protocol with its constants.
        clusters: (N,) cluster index of each sample.
        figures: with labels ``nmi`` (normalised mutual information, arithmetic mean), ``ari`` (adjusted Rand index) and
            ``accuracy`` (share of samples whose cluster is matched to their class by the best one-to-one assignment);
            without labels ``silhouette``, in [-1, 1].
    """

    name: str
    clusters: np.ndarray
    figures: dict[str, float]


def cluster(embeddings: np.ndarray, labels: np.ndarray | None, *, clusters: int, seed: int) -> Clustering:
    """Runs k-means and scores the clusters by the labels or, without labels, by the silhouette.

    Args:
        embeddings: (N, D), unit length.
        labels: (N,) class indices, or None.
        clusters: G.
        seed: seed of the initialisations.

    Raises:
        UsageError: there are fewer samples than clusters, or an embedding is NaN or infinite.
    """
    from sklearn.cluster import KMeans, MiniBatchKMeans  # the import takes a second
    from sklearn.exceptions import ConvergenceWarning

    if clusters > len(embeddings):
        raise UsageError(
            f"--protocol cluster: {len(embeddings)} images are too few for {clusters} clusters; lower --clusters or "
            "leave the protocol out"
        )
    if not np.isfinite(embeddings).all():
        raise UsageError(
            "--protocol cluster: some embeddings are NaN or infinite; choose another checkpoint or leave the "
            "protocol out"
        )
    full_batch = len(embeddings) <= FULL_BATCH
    method = KMeans if full_batch else partial(MiniBatchKMeans, batch_size=BATCH)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # raised if there are fewer distinct images than clusters
        found: np.ndarray = method(clusters, n_init=STARTS, random_state=seed % 2**32).fit_predict(embeddings)
    if (used := len(np.unique(found))) < clusters:
        logger().warning(
            "k-means: %d of the %d clusters are empty, because images are identical", clusters - used, clusters
        )
    algorithm = "k-means" if full_batch else "mini-batch k-means"
    name = f"{algorithm} ({clusters} clusters, best of {STARTS} starts)"
    return Clustering(name, found, silhouette(embeddings, found, seed) if labels is None else scores(labels, found))


def scores(labels: np.ndarray, clusters: np.ndarray) -> dict[str, float]:
    """NMI, ARI and accuracy of cluster indices (N,) with respect to labels (N,)."""
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


def silhouette(embeddings: np.ndarray, clusters: np.ndarray, seed: int) -> dict[str, float]:
    """The silhouette of at most ``SILHOUETTE_SAMPLES`` random samples; empty where it is undefined."""
    from sklearn.metrics import silhouette_score

    subset = np.random.default_rng(seed).permutation(len(embeddings))[:SILHOUETTE_SAMPLES]
    used = len(np.unique(clusters[subset]))
    if not 2 <= used < len(subset):
        return {}  # undefined: it needs two clusters, one of them with two members
    return {"silhouette": float(silhouette_score(embeddings[subset], clusters[subset]))}
