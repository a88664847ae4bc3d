"""Findings in a set of images from their embeddings: groups, identical images, outliers and suspicious labels.

All of it comes from one exact K-nearest-neighbour search. Labels are needed for suspicious labels only.

Letters: N samples, D embedding size, K neighbours, U distinct images.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from lib.errors import UsageError
from lib.evaluation.graph_clustering import communities
from lib.evaluation.nearest_neighbours import neighbours_of_arrays
from lib.method.chunking import similarities

IDENTICAL = 1 - 1e-5
"""Cosine from which two images count as the same image. Sums of float32 in another order differ by about 1e-6."""
BLANK, NOISY = 0.01, 0.45
"""Contrast below which an image is blank, and smoothness below which it may be noise."""
SEEDS = 4
"""Further seeds of the grouping, for ``Certainty.seed_agreement`` and ``seed_range``."""
RESOLUTION_FACTORS = (0.5, 2.0)
"""Factors of the resolution for ``Certainty.resolution_range``."""


@dataclass(frozen=True)
class Findings:
    """Findings from the neighbour graph of N images.

    Attributes:
        neighbours: (N, K) int64, the other samples, most similar first.
        similarities: (N, K) float32, their cosines.
        groups: (N,) int64, communities of the neighbour graph; 0 is the largest.
        modularity: of the groups.
        resolution, seed: settings with which the groups were found.
        copies: (N,) int64, lowest index among the images with the same embedding; its own index if there is no other.
        outlier_scores: (N,) float32, see ``outlier_scores``; higher: more isolated.
        label_disagreement: (N,) float32, share of the neighbours that have another label; None without labels.
    """

    neighbours: np.ndarray
    similarities: np.ndarray
    groups: np.ndarray
    modularity: float
    resolution: float
    seed: int
    copies: np.ndarray
    outlier_scores: np.ndarray
    label_disagreement: np.ndarray | None


@dataclass(frozen=True)
class Certainty:
    """How certain the number of groups is.

    Attributes:
        seed_range: smallest and largest number of groups over the seed of the findings and ``SEEDS`` others.
        seed_agreement: mean adjusted Rand index of the groups with those of the other seeds; 1: the same groups.
        resolution_range: number of groups at half and at twice the resolution.
    """

    seed_range: tuple[int, int]
    seed_agreement: float
    resolution_range: tuple[int, int]


def certainty(found: Findings) -> Certainty:
    """Finds the groups again with other seeds and resolutions, which takes six times as long as the groups."""
    from sklearn.metrics import adjusted_rand_score  # the import takes a second

    nearest, resolution, seed = found.neighbours, found.resolution, found.seed
    others = [communities(nearest, resolution=resolution, seed=seed + number)[0] for number in range(1, SEEDS + 1)]
    coarse, fine = (communities(nearest, resolution=resolution * factor, seed=seed)[0] for factor in RESOLUTION_FACTORS)
    counts = [int(groups.max()) + 1 for groups in (found.groups, *others)]
    return Certainty(
        seed_range=(min(counts), max(counts)),
        seed_agreement=float(np.mean([adjusted_rand_score(found.groups, groups) for groups in others])),
        resolution_range=(int(coarse.max()) + 1, int(fine.max()) + 1),
    )


def find(
    embeddings: np.ndarray, labels: np.ndarray | None, *, neighbours: int, resolution: float, seed: int
) -> Findings:
    """Finds the neighbours and derives everything else from them. O(N^2 D) time, O(N (D + K)) memory.

    Args:
        embeddings: (N, D), unit length, computed with the test transform.
        labels: (N,) class indices, or None.
        neighbours: K, reduced to N - 1 if it is larger.
        resolution: of the communities; higher: more and smaller groups.
        seed: of the communities.

    Raises:
        UsageError: an embedding is NaN or infinite, or the package for the communities is missing.
    """
    if not np.isfinite(embeddings).all():
        raise UsageError("some embeddings are NaN or infinite, so they have no neighbours; choose another checkpoint")
    nearest, cosines = neighbours_of_arrays(embeddings, neighbours)
    copies = identical_images(embeddings, nearest, cosines)
    groups, modularity = communities(nearest, resolution=resolution, seed=seed)
    return Findings(
        neighbours=nearest,
        similarities=cosines,
        groups=groups,
        modularity=modularity,
        resolution=resolution,
        seed=seed,
        copies=copies,
        outlier_scores=outlier_scores(embeddings, copies, nearest, cosines),
        label_disagreement=None if labels is None else label_disagreement(nearest, labels),
    )


def identical_images(embeddings: np.ndarray, nearest: np.ndarray, cosines: np.ndarray) -> np.ndarray:
    """The first of the images with the same embedding, for each image.

    Args:
        embeddings: (N, D), unit length.
        nearest: (N, K) neighbours.
        cosines: (N, K), theirs.

    Returns:
        (N,) int64, its own index if there is no other.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    samples = len(nearest)
    row, column = np.nonzero(cosines >= IDENTICAL)
    one, other = [row], [nearest[row, column]]
    if nearest.size:  # with more than K copies, not every copy has all others among its neighbours
        (crowded,) = (cosines[:, -1] >= IDENTICAL).nonzero()
        rows = torch.from_numpy(np.require(embeddings[crowded], np.float32))
        places = torch.arange(len(crowded))
        for block, similarity in similarities(rows, rows, "identical images"):
            first = torch.where(similarity >= IDENTICAL, places, len(crowded) - 1).amin(dim=1)
            one.append(crowded[block])
            other.append(crowded[first.numpy()])
    pairs = np.concatenate(one), np.concatenate(other)
    graph = coo_array((np.ones(len(pairs[0]), bool), pairs), (samples, samples))
    _, component = connected_components(graph, directed=False)
    _, first_of = np.unique(component, return_index=True)
    lowest: np.ndarray = first_of[component].astype(np.int64)
    return lowest


def label_disagreement(nearest: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(N,) float32: share of each sample's neighbours (N, K) that have another label; 0 without a neighbour."""
    if not nearest.size:
        return np.zeros(len(nearest), np.float32)
    share: np.ndarray = (labels[nearest] != labels[:, None]).mean(axis=1, dtype=np.float32)
    return share


def outlier_scores(embeddings: np.ndarray, copies: np.ndarray, nearest: np.ndarray, cosines: np.ndarray) -> np.ndarray:
    """How isolated each image is: the simplified local outlier factor among distinct images.

    The distance of an image to its K-th nearest neighbour, divided by the mean of the same distance of its K
    neighbours (Schubert et al. 2014, "Local outlier detection reconsidered"). About 1 is usual: the image lies as close
    to others as its neighbours do. Copies count once, as blank images would otherwise be each other's neighbours at
    distance 0. benchmarks/results/findings.md compares this score with others.

    Args:
        embeddings: (N, D), unit length.
        copies: (N,), as ``identical_images`` gives them.
        nearest, cosines: (N, K), as ``neighbours_of_arrays`` gives them. K is reduced to U - 1 if it is larger.

    Returns:
        (N,) float32, above 0, the same for all copies; zeros with a single distinct image.
    """
    distinct, place = np.unique(copies, return_inverse=True)  # (U,), (N,)
    if len(distinct) < len(copies):
        nearest, cosines = neighbours_of_arrays(embeddings[distinct], nearest.shape[1])
    if not nearest.size:
        return np.zeros(len(copies), np.float32)
    reach = np.maximum(1 - cosines[:, -1], 1 - IDENTICAL)  # (U,); rounding may make it 0
    scores: np.ndarray = (reach / reach[nearest].mean(axis=1))[place]
    return scores


def blank_and_noisy(statistics: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Images of a single colour, and images of noise, which embeddings do not separate reliably.

    An image is noisy if its smoothness is below ``NOISY`` and far below that of the others: more than three
    interquartile ranges under the first quartile (Tukey's outer fence). So a set of drawings is not all noisy.

    Args:
        statistics: (N, 2), contrast and smoothness, as ``features.WithStatistics`` gives them.

    Returns:
        Two arrays (N,) of bool.
    """
    contrast, smoothness = statistics.T
    blank = contrast < BLANK
    if blank.all():
        return blank, np.zeros_like(blank)
    low, high = np.quantile(smoothness[~blank], [0.25, 0.75])
    return blank, ~blank & (smoothness < min(NOISY, low - 3 * (high - low)))


@dataclass(frozen=True)
class SimilarImages:
    """Copies of an image, or similar images: their indices, ascending, and the cosines that join them."""

    members: list[int]
    least: float
    greatest: float


def nearest_sets(found: Findings, count: int) -> list[SimilarImages]:
    """At most ``count`` sets of the most similar images: each image is joined with its nearest neighbour.

    The most similar pairs are joined first, until there are ``count`` sets. Ten copies of an image are thus one set,
    not 45 pairs. Images that are only similar do not form one large set, as they would if more neighbours were joined,
    too. Sets with identical images come first, the largest first.
    """
    sets: dict[int, SimilarImages] = {}  # ordered by their first member
    set_of: dict[int, int] = {}
    for first in np.flatnonzero(np.bincount(found.copies) > 1).tolist():
        members = np.flatnonzero(found.copies == first).tolist()
        sets[first] = SimilarImages(members, 1.0, 1.0)
        set_of.update(dict.fromkeys(members, first))
    nearest, cosines = found.neighbours[:, :1].ravel(), found.similarities[:, :1].ravel()
    for sample in np.argsort(-cosines, kind="stable").tolist():
        if len(sets) >= count:
            break
        one, other = (set_of.get(each, each) for each in (sample, int(nearest[sample])))
        if one == other:
            continue
        cosine = float(cosines[sample])
        parts = [sets.pop(first, SimilarImages([first], 1.0, cosine)) for first in (one, other)]
        members = sorted(parts[0].members + parts[1].members)
        sets[members[0]] = SimilarImages(members, cosine, max(part.greatest for part in parts))
        set_of.update(dict.fromkeys(members, members[0]))
    order = sorted(sets.values(), key=lambda each: (-min(each.greatest, IDENTICAL), -len(each.members), each.members))
    return order[:count]
