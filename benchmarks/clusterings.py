"""Clusterings of embeddings compared: k-means, spectral clustering, HDBSCAN, and Leiden on the neighbour graph.

    python -m benchmarks.clusterings --features digits d0.npz d1.npz d2.npz --features photographs p.npz

Each ``--features NAME FILE ...`` names files of main.py's ``--export-features`` with labels; their training embeddings
are clustered, file i with seed i, and a single file with seeds 0 to ``--seeds`` - 1. Pixels of the digits come first.
Spectral clustering and HDBSCAN compare pairs, so with more than ``--most`` samples all methods cluster a random sample
of that size, and the others also all samples. k-means and spectral clustering receive the number of classes, the
others do not. The table is printed as Markdown.

Letters: N samples, D embedding size.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

import datasets
from benchmarks import measure
from lib.errors import UsageError
from lib.evaluation import clustering, graph_clustering
from lib.evaluation.nearest_neighbours import neighbours_of_arrays
from lib.session import provenance

NOISE = -1
"""HDBSCAN's label of samples without a cluster."""
Method = Callable[[np.ndarray, int, int], np.ndarray]
"""Embeddings (N, D), number of classes and seed -> clusters (N,)."""


def k_means(rows: np.ndarray, classes: int, seed: int) -> np.ndarray:
    """As ``--protocol cluster``."""
    unused = np.zeros(len(rows), np.int64)  # without labels it would compute the silhouette, which takes time
    return clustering.cluster(rows, unused, clusters=classes, seed=seed).clusters


def spectral(rows: np.ndarray, classes: int, seed: int) -> np.ndarray:
    """Spectral clustering of scikit-learn on the graph of 15 neighbours."""
    from sklearn.cluster import SpectralClustering

    method = SpectralClustering(classes, affinity="nearest_neighbors", n_neighbors=15, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warns of an unconnected graph, which k-means of the eigenvectors separates
        found: np.ndarray = method.fit_predict(rows)
    return found


def hdbscan(smallest: int) -> Method:
    """HDBSCAN of scikit-learn with clusters of at least ``smallest`` samples; the rest are its defaults."""

    def of(rows: np.ndarray, classes: int, seed: int) -> np.ndarray:
        from sklearn.cluster import HDBSCAN

        found: np.ndarray = HDBSCAN(min_cluster_size=smallest, copy=True).fit_predict(rows)
        return found

    return of


def leiden(neighbours: int, resolution: float) -> Method:
    """As ``--protocol graph``."""

    def of(rows: np.ndarray, classes: int, seed: int) -> np.ndarray:
        nearest, _ = neighbours_of_arrays(rows, neighbours)
        return graph_clustering.communities(nearest, resolution=resolution, seed=seed)[0]

    return of


ALL: Mapping[str, Method] = {
    "k-means": k_means,
    "Leiden, 15 neighbours": leiden(15, 1.0),
}
FEW: Mapping[str, Method] = {
    "spectral, 15 neighbours": spectral,
    "HDBSCAN, at least 5": hdbscan(5),
    "HDBSCAN, at least 15": hdbscan(15),
}
"""Methods for at most ``--most`` samples."""


def judge(labels: np.ndarray, clusters: np.ndarray) -> dict[str, float]:
    """Figures in per cent except ``groups``; samples without a cluster count as a further group in NMI and ARI, and as
    wrong in the accuracy."""
    known = clusters != NOISE
    found = clustering.scores(labels, clusters)
    right = clustering.scores(labels[known], clusters[known])["accuracy"] * known.sum() if known.any() else 0.0
    return {
        "groups": len(np.unique(clusters[known])),
        "NMI": 100 * found["nmi"],
        "ARI": 100 * found["ari"],
        "accuracy": 100 * float(right) / len(labels),
        "left out": 100 * float(np.mean(~known)),
    }


def compare(sets: Sequence[tuple[np.ndarray, np.ndarray]], most: int) -> list[list[str]]:
    """Rows of the table: samples, method, and mean ± sample standard deviation over the sets of its figures.

    Args:
        sets: embeddings (N, D) and labels (N,) of each run; set i is clustered with seed i.
        most: samples of the methods that compare pairs.
    """
    lines: list[list[str]] = []
    samples = len(sets[0][0])
    plans = [(samples, {**ALL, **FEW})] if samples <= most else [(samples, ALL), (most, {**ALL, **FEW})]
    for size, methods in plans:
        for name, method in methods.items():
            figures: dict[str, list[float]] = {}
            for seed, (rows, labels) in enumerate(sets):
                chosen = np.random.default_rng(seed).permutation(len(rows))[:size] if size < samples else slice(None)
                start = time.process_time()
                clusters = method(np.ascontiguousarray(rows[chosen]), len(np.unique(labels)), seed)
                seconds = time.process_time() - start
                for figure, value in {**judge(labels[chosen], clusters), "CPU seconds": seconds}.items():
                    figures.setdefault(figure, []).append(value)
            lines.append([f"{size:,}", name, *(measure.mean_and_deviation(values) for values in figures.values())])
            print(*lines[-1], sep=" | ", file=sys.stderr, flush=True)
    return lines


def pixels() -> tuple[np.ndarray, np.ndarray]:
    """Pixels (N, 64) of the training digits, scaled to unit length, and their classes (N,)."""
    train = datasets.load("digits", None).train
    assert train.labels is not None
    rows = np.asarray(train.images)[..., 0].reshape(len(train), -1).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True), train.labels


def load(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Training embeddings (N, D) and labels (N,) of an exported file; UsageError if they cannot be read."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return arrays["train_embeddings"], arrays["train_labels"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UsageError(
            f"{path}: no embeddings with labels can be read ({error}); write the file with main.py's --export-features"
        ) from error


def main(argv: Sequence[str]) -> int:
    """Exit status: 0, or 2 for input that cannot be used."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.clusterings", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--features", nargs="+", action="append", default=[], metavar="NAME FILE", help="see above")
    parser.add_argument("--most", type=int, default=10_000, help="samples of slow methods (default: 10000)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of the pixels and of single files (default: 3)")
    given = parser.parse_args(argv)
    try:
        groups = {"digits, pixels": [pixels()]}
        for name, *files in given.features:
            if not files:
                raise UsageError(f"--features {name}: a name and one file at least are needed")
            groups[name] = [load(Path(file)) for file in files]
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    lines = []
    for name, sets in groups.items():
        lines += [[name, *line] for line in compare(sets * (given.seeds if len(sets) == 1 else 1), given.most)]
    header = ["embeddings", "samples", "method", "groups", "NMI", "ARI", "accuracy", "left out", "CPU seconds"]
    print(measure.table(header, lines))
    versions = provenance.versions()
    shown = ", ".join(f"{name} {versions[name]}" for name in ("python", "torch", "scikit-learn", "graspologic-native"))
    print(f"\n{provenance.hardware(torch.device('cpu'))}; {shown}; commit {provenance.commit()[:10] or 'unknown'}.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
