"""The formulas of docs/method.md, written out naively in float64; they share no code with the project.

Letters: N samples, D embedding, A anchors, K neighbours, B batch, Q queries, C classes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

Array = np.ndarray


def dot(x: Array, y: Array) -> float:
    return math.fsum(float(a) * float(b) for a, b in zip(x, y, strict=True))


def unit(x: Array) -> Array:
    """x / ||x||; zeros stay zeros."""
    length = math.sqrt(dot(x, x))
    return np.array([float(a) / length if length else 0.0 for a in x])


def probabilities(x: Array, memory: Array, temperature: float) -> Array:
    """p_ij of one embedding over all rows."""
    logits = np.array([dot(x, row) / temperature for row in memory])
    weights = np.exp(logits - logits.max())  # the common factor cancels
    return weights / math.fsum(weights)


def entropy(x: Array, memory: Array, temperature: float) -> float:
    """-sum_j p_ij log p_ij, with 0 log 0 = 0."""
    return math.fsum(-p * math.log(p) for p in probabilities(x, memory, temperature) if p > 0)


def entropies(memory: Array, temperature: float) -> Array:
    return np.array([entropy(row, memory, temperature) for row in memory])


def entropy_of_others(x: Array, memory: Array, own: int, temperature: float) -> float:
    """The entropy without the row ``own`` of the memory."""
    return entropy(x, np.delete(memory, own, axis=0), temperature)


def is_reciprocal(memory: Array, sample: int, size: int) -> bool:
    """Whether a sample is among the ``size`` neighbours of its nearest neighbour."""
    return sample in neighbours(memory, neighbours(memory, sample, 1)[0], size)


def anchor_count(samples: int, select_rate: float, round: int) -> int:
    """The whole part of N * select_rate * round, and never more than there are samples."""
    count = 0
    while count < samples and count + 1 <= samples * select_rate * round:
        count += 1
    return count


def anchors(entropy: Array, count: int) -> list[int]:
    """The samples of lowest entropy in ascending order; ties go to the lower index."""
    return sorted(range(len(entropy)), key=lambda i: (entropy[i], i))[:count]


def neighbours(memory: Array, anchor: int, size: int) -> list[int]:
    """The other samples most similar to an anchor, most similar first."""
    similarity = {j: dot(memory[anchor], memory[j]) for j in range(len(memory)) if j != anchor}
    return sorted(similarity, key=lambda j: (-similarity[j], j))[:size]


def positions(anchors: Sequence[int], samples: int) -> list[int]:
    """j for the j-th anchor; -j-1 for the j-th instance sample, in ascending order."""
    table, others = [], 0
    for sample in range(samples):
        if sample in anchors:
            table.append(list(anchors).index(sample))
        else:
            table.append(-others - 1)
            others += 1
    return table


def neighbourhood(sample: int, anchors: Sequence[int], neighbours: Sequence[Sequence[int]]) -> list[int]:
    """The sample itself and, if it is an anchor, its neighbours."""
    return [sample, *(list(neighbours[list(anchors).index(sample)]) if sample in anchors else [])]


def loss(x: Array, memory: Array, own: Sequence[Sequence[int]], temperature: float) -> float:
    """Mean over a batch of -log sum_{j in neighbourhood} p_ij; ``own``: each sample's neighbourhood."""
    total = 0.0
    for embedding, members in zip(x, own, strict=True):
        p = probabilities(embedding, memory, temperature)
        total -= math.log(math.fsum(p[j] for j in members))
    return total / len(x)


def gradient(x: Array, memory: Array, own: Sequence[Sequence[int]], temperature: float) -> Array:
    """(B, D), the derivative of ``loss`` by x: (mean of m under p - mean of m under p inside) / (tau B)."""
    result = np.zeros(x.shape)
    for i, members in enumerate(own):
        p = probabilities(x[i], memory, temperature)
        inside = math.fsum(p[j] for j in members)
        for d in range(x.shape[1]):
            everywhere = math.fsum(p[j] * float(memory[j, d]) for j in range(len(memory)))
            within = math.fsum(p[j] / inside * float(memory[j, d]) for j in members)
            result[i, d] = (everywhere - within) / (temperature * len(x))
    return result


def updated(memory: Array, x: Array, index: Sequence[int], momentum: float) -> Array:
    """m_i <- normalise(eta m_i + (1 - eta) x_i) for the batch's samples."""
    result = np.array(memory, dtype=np.float64)
    for embedding, i in zip(x, index, strict=True):
        old = np.asarray(memory[i], dtype=np.float64)
        result[i] = unit(momentum * old + (1 - momentum) * np.asarray(embedding, dtype=np.float64))
    return result


def consistency(anchors: Sequence[int], neighbours: Sequence[Sequence[int]], labels: Sequence[int]) -> float:
    """Share of anchor-neighbour pairs with equal labels."""
    equal = [labels[a] == labels[j] for a, row in zip(anchors, neighbours, strict=True) for j in row]
    return sum(equal) / len(equal)


def knn_scores(query: Array, bank: Array, labels: Sequence[int], *, classes: int, k: int, sigma: float) -> Array:
    """(C,): the k nearest vote for their classes with weight exp(s / sigma), scaled so that the votes sum to 1."""
    similarity = [dot(query, row) for row in bank]
    nearest = sorted(range(len(bank)), key=lambda j: -similarity[j])[:k]
    votes = np.zeros(classes)
    for j in nearest:
        votes[labels[j]] += math.exp((similarity[j] - max(similarity)) / sigma)  # the common factor cancels
    return votes / math.fsum(votes)


def nearest_class(query: Array, bank: Array, labels: Sequence[int]) -> int:
    best = 0
    for j in range(len(bank)):
        if dot(query, bank[j]) > dot(query, bank[best]):
            best = j
    return int(labels[best])


def accuracy_range(scores: Array, labels: Sequence[int], k: int) -> tuple[float, float]:
    """Top-k accuracy if all ties go against the right class, and if all go in its favour."""
    against = favour = 0
    for row, label in zip(scores, labels, strict=True):
        against += sum(row[c] >= row[label] for c in range(len(row)) if c != label) < k
        favour += sum(row[c] > row[label] for c in range(len(row))) < k
    return against / len(scores), favour / len(scores)


def accuracy(scores: Array, labels: Sequence[int], k: int) -> float:
    """Top-k accuracy of scores without ties at the right class."""
    against, favour = accuracy_range(scores, labels, k)
    assert against == favour, "the oracle has no answer for ties"
    return against


def view_loss(views: np.ndarray, temperature: float) -> float:
    """Ye et al. 2019, one probability at a time; the mean over the images and the ordered pairs of views."""
    losses = []
    for one, other in itertools.permutations(range(views.shape[1]), 2):
        f, g = views[:, one], views[:, other]

        def p(i: int, x: np.ndarray, f: np.ndarray = f) -> float:
            return math.exp(f[i] @ x / temperature) / sum(math.exp(row @ x / temperature) for row in f)

        for i in range(len(f)):
            spread = sum(math.log(1 - p(i, f[j])) for j in range(len(f)) if j != i)
            losses.append(-math.log(p(i, g[i])) - spread)
    return sum(losses) / len(losses)


def step_rate(base: float, epoch: int, *, offset: int, every: int, rate: float) -> float:
    """base * rate ** ((epoch - offset) // every) from ``offset`` on, base before."""
    return base if epoch < offset else base * rate ** ((epoch - offset) // every)


def multistep_rate(changes: Sequence[tuple[int, float]], epoch: int) -> float:
    """The rate of the last change at or before the epoch."""
    current = math.nan
    for start, rate in sorted(changes):
        if start <= epoch:
            current = rate
    return current


# Inputs for the tests that compare with the above.

KINDS = ("random", "equal", "duplicates", "one-hot")


def rows(kind: str, samples: int, low_dim: int, seed: int) -> Array:
    """(N, D) unit rows in float64: at random, all the same, few different ones, or axes (exact similarities)."""
    draw = np.random.default_rng(seed)
    result = draw.normal(size=(samples, low_dim))
    if kind == "equal":
        result[:] = result[0]
    elif kind == "duplicates":
        result = result[draw.integers(0, max(1, samples // 2), samples)]
    elif kind == "one-hot":
        result = np.eye(low_dim)[draw.integers(0, low_dim, samples)]
    return result / np.linalg.norm(result, axis=1, keepdims=True)
