"""The figures of a report about training, discovery, health and embeddings.

Each is a ``Part``; if it cannot be drawn, it gives the reason.

Letters: N training samples, A anchors, K neighbours, E epochs, P points.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import rankdata
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits

from lib.reporting import plots
from lib.reporting.plots import Part, Tile
from lib.reporting.report_data import SEED, Discovered, ReportData, drawn
from lib.session.console import plural

MAPPED, ROUNDS = 2_000, 6
"""Maximum number of points on the map, and of rounds with a histogram."""
QUANTILES = ("entropy_05", "entropy_25", "entropy_50", "entropy_75", "entropy_95")
"""Quantiles of the entropy after an epoch, in nats."""
HEALTH = {
    "reciprocal": "reciprocal neighbours",
    "kept": "neighbours kept",
    "drift": "drift of the memory bank",
    "hubness": "hubness",
    "orphans": "orphans",
    "largest_hub": "largest hub",
}
"""Health figures of an epoch with one value each -> label in a plot."""
SHARES = {"reciprocal", "kept", "orphans", "largest_hub"}
"""Health figures that are shares of the samples or of their neighbours."""


def _column(report: ReportData, name: str) -> np.ndarray:
    """(E,), a column of the metrics; NaN for missing values."""
    return np.array([np.nan if row.get(name) is None else row[name] for row in report.metrics], float)


def training(report: ReportData) -> dict[str, Part]:
    """Accuracy and loss over the epochs."""
    if not report.metrics:
        return {"accuracy": Part(None, ""), "loss": Part(None, "No epoch is done yet.")}
    rounds = _column(report, "round").astype(int)
    return {"accuracy": _accuracy(report, rounds), "loss": _loss(_column(report, "loss"), rounds)}


def _accuracy(report: ReportData, rounds: np.ndarray) -> Part:
    top1, top5, held_out = (_column(report, name) for name in ("top1", "top5", "val_top1"))
    known = np.isfinite(top1)
    if not known.any():
        return Part(None, "")
    if known.sum() == 1:
        return Part(None, f"Measured after one epoch only: top-1 {top1[known][0]:.2%}, {report.protocol}.")
    last, chosen = np.full(len(rounds), np.nan), np.full(len(rounds), np.nan)
    for number in np.unique(rounds[known]):
        epochs = np.flatnonzero((rounds == number) & known)
        by = held_out[epochs] if np.isfinite(held_out[epochs]).any() else top1[epochs]
        best = epochs[by == np.nanmax(by)][-1]  # the last of equally accurate epochs, as in training
        last[epochs[-1]], chosen[best] = top1[epochs[-1]], top1[best]
    series = {"top-1": top1, "top-5": top5, "top-1 of held-out images": held_out}
    series = {name: values for name, values in series.items() if np.isfinite(values).any()}
    marks = {"last epoch of a round": last, "best epoch of a round": chosen}
    figure = plots.curves(series, rounds, "accuracy", percent=True, marks=marks)
    return Part(figure, f"{report.protocol}, after each epoch. The best epoch is chosen by {report.chooser}.")


def _loss(loss: np.ndarray, rounds: np.ndarray) -> Part:
    finite = np.isfinite(loss)
    lost = int((~finite).sum())
    if not finite.any():
        return Part(None, "The loss was not a finite number in any epoch.")
    if finite.sum() == 1:
        return Part(None, f"Only one epoch has a finite loss: {loss[finite][0]:.4f}.")
    left = f" Not shown: {plural(lost, 'epoch')} whose loss was not a finite number." if lost else ""
    return Part(plots.curves({"loss": loss}, rounds, "loss"), f"Mean over the training images of each epoch.{left}")


def discovery(report: ReportData) -> dict[str, Part]:
    """Consistency, entropies and galleries."""
    parts = dict.fromkeys(("consistency", "entropy", "surest", "random", "mistakes"), Part(None, ""))
    if not report.rounds:
        last = "this run ended" if report.finished else "this run has not reached round 1 yet"
        text = f"Anchors are discovered at the start of round 1 and of each later round; {last}"
        return parts | {"entropy": Part(None, f"{text}{' before' if report.finished else ''}.")}
    parts |= {"consistency": _consistency(report), "entropy": _entropy(report)}
    found = report.rounds[-1]
    if not found.neighbours.size:
        return parts | {"surest": Part(None, f"Round {found.round} found no anchor with a neighbour.")}
    return parts | _galleries(report, found)


def _equal(found: Discovered, labels: np.ndarray) -> np.ndarray:
    """(A, K), whether anchor and neighbour have the same class."""
    return np.asarray(labels[found.anchors][:, None] == labels[found.neighbours])


def _consistency(report: ReportData) -> Part:
    if report.labels is None:
        return Part(None, "")
    rounds = [found for found in report.rounds if found.neighbours.size]
    if not rounds:
        return Part(None, "No round found an anchor with a neighbour.")
    values = np.array([_equal(found, report.labels).mean() for found in rounds])
    shares = np.array([len(found.anchors) / len(found.entropy) for found in rounds])
    figure = plots.consistency(shares, values, [found.round for found in rounds])
    return Part(
        figure, "Of all pairs of an anchor and a neighbour, found in the memory bank at the start of each round."
    )


def _entropy(report: ReportData) -> Part:
    whole = [found for found in report.rounds if np.isfinite(found.entropy).all()]
    if not whole:
        return Part(None, "Not drawn: the entropies are not finite numbers.")
    picks = np.unique(np.linspace(0, len(whole) - 1, min(ROUNDS, len(whole))).round().astype(int))
    rounds = [(whole[pick].round, whole[pick].entropy, _is_anchor(whole[pick])) for pick in picks]
    left = len(report.rounds) - len(rounds)
    how = "Of the memory bank at the start of each round." + (f" Not shown: {plural(left, 'round')}." if left else "")
    return Part(plots.histograms(rounds), how)


def _is_anchor(found: Discovered) -> np.ndarray:
    """(N,) of bool, the anchors."""
    chosen = np.zeros(len(found.entropy), bool)
    chosen[found.anchors] = True
    return chosen


def _galleries(report: ReportData, found: Discovered) -> dict[str, Part]:
    """The anchors of lowest entropy, random ones, and the worst mistakes."""
    near = found.neighbours[:, :5]  # (A, K)
    count = 4 * max(1, 8 // (1 + near.shape[1]))
    drawn = np.random.default_rng(SEED).permutation(len(near))[:count]
    where = f"Neighbours in the memory bank at the start of round {found.round}"
    parts = {
        "surest": Part(_gallery(report, found, range(min(count, len(near)))), f"{where}; anchors of lowest entropy."),
        "random": Part(_gallery(report, found, drawn), f"{where}; anchors drawn at random."),
        "mistakes": Part(None, ""),
    }
    if report.labels is None:
        return parts
    equal = _equal(found, report.labels)
    (wrong,) = (~equal[:, : near.shape[1]]).any(axis=1).nonzero()
    if not len(wrong):
        return parts | {
            "mistakes": Part(None, f"All neighbours found in round {found.round} have the class of their anchor.")
        }
    order = "lowest entropy"
    if found.similarities is not None:
        alike = np.where(equal, -np.inf, found.similarities)[wrong, : near.shape[1]].max(axis=1)
        wrong, order = wrong[np.argsort(-alike, kind="stable")], "greatest similarity"
    how = (
        f"{where}; {(~equal).sum()} of {plural(equal.size, 'neighbour')} have another class than their anchor; shown "
        f"are those of {order}."
    )
    return parts | {"mistakes": Part(_gallery(report, found, wrong[:count]), how)}


def _gallery(report: ReportData, found: Discovered, picks: Sequence[int] | np.ndarray) -> Figure:
    entries = []
    for pick in picks:
        anchor, labels = int(found.anchors[pick]), report.labels
        entry = [Tile(report.images[anchor], _name(report, anchor))]
        for near in found.neighbours[pick, :5].tolist():
            same = None if labels is None else bool(labels[anchor] == labels[near])
            entry.append(Tile(report.images[near], _name(report, near), same))
        entries.append(entry)
    return plots.gallery(entries)


def _name(report: ReportData, sample: int) -> str:
    if report.labels is None:
        return ""
    number = int(report.labels[sample])
    return plots.writable(report.classes[number], number)


def health(report: ReportData) -> dict[str, Part]:
    """Figures that need no labels, over the epochs, and over the consistency if that is known."""
    rounds = _column(report, "round").astype(int)
    values = np.stack([_column(report, name) for name in QUANTILES], axis=1)  # (E, 5)
    values[~np.isfinite(values).all(axis=1)] = np.nan
    how = "Measured on the memory bank after each epoch, without labels."
    columns = {"median entropy, nats": values[:, 2]}
    parts = {
        "quantiles": _too_few(values[:, 2], "{:.3g} nats (median)")
        or Part(plots.quantiles(values, rounds, len(report.features)), how)
    }
    for name, label in HEALTH.items():
        columns[label] = column = _column(report, name)
        parts[name] = _too_few(column, "{:.2%}" if name in SHARES else "{:.3g}") or Part(
            plots.curves({label: column}, rounds, label, percent=name in SHARES), how
        )
    return parts | {"follows": _follows(report, rounds, columns)}


def _too_few(values: np.ndarray, form: str) -> Part | None:
    """None if values (E,) can be drawn as a line; otherwise a part with the only value in words, or nothing."""
    known = values[np.isfinite(values)]
    if not len(known):
        return Part(None, "")
    return Part(None, f"Measured after one epoch only: {form.format(known[0])}.") if len(known) == 1 else None


def _follows(report: ReportData, rounds: np.ndarray, columns: Mapping[str, np.ndarray]) -> Part:
    truth, pairs = _column(report, "consistency"), {}
    first = np.flatnonzero(np.diff(rounds, prepend=-1))  # first epoch of each round
    for label, column in columns.items():
        at = first[np.isfinite(column[first]) & np.isfinite(truth[first])]
        if len(at) >= 2:
            pairs[label] = (column[at], truth[at], _rank_correlation(column[at], truth[at]))
    if not pairs:
        return Part(None, "")
    how = "A point is a round: the figure after its first epoch, and the consistency of the neighbours it found."
    return Part(plots.follows(pairs), how)


def _rank_correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Spearman's rank correlation; NaN for fewer than three points or constant values."""
    if len(one) < 3 or np.ptp(one) == 0 or np.ptp(other) == 0:
        return float("nan")
    return float(np.corrcoef(rankdata(one), rankdata(other))[0, 1])


@dataclass(frozen=True)
class Projection:
    """Embeddings in the plane.

    Attributes:
        chosen: (P,) sample indices, ascending.
        points: (P, 2).
        how: a sentence about how they were computed.
    """

    chosen: np.ndarray
    points: np.ndarray
    how: str


def project(report: ReportData) -> Projection | str:
    """A subset of the embeddings in the plane by t-SNE, or the reason why there is none."""
    samples = len(report.features)
    chosen = drawn(samples, MAPPED)
    placed = to_plane(report.features[chosen])
    if isinstance(placed, str):
        return f"Not drawn: {placed}."
    points, method = placed
    how = f"{len(points):,} of {plural(samples, 'embedding')} of the training images (test transform), by {method}; "
    return Projection(chosen, points, f"{how}{report.when}.")


def to_plane(features: np.ndarray) -> tuple[np.ndarray, str] | str:
    """Embeddings (P, D) in the plane (P, 2) by t-SNE, and its settings; or the reason why there is no map."""
    features = np.asarray(features, np.float64)
    if not np.isfinite(features).all():
        return "some embeddings are not finite numbers"
    if len(features) < 5 or np.ptp(features, axis=0).max() < 1e-6:
        return "there are fewer than five embeddings, or all are equal"
    before = ""
    if features.shape[1] > 50 and len(features) > 50:
        features, before = PCA(50, random_state=SEED).fit_transform(features), ", after PCA to 50 dimensions"
    perplexity = min(30.0, (len(features) - 1) / 3)
    with threadpool_limits(1):  # one thread: sums always have the same order, and threads would wait for busy cores
        points = TSNE(perplexity=perplexity, init="pca", random_state=SEED).fit_transform(features)  # (P, 2)
    return points, f"t-SNE (perplexity {perplexity:.3g}, started from PCA, seed {SEED}){before}"


def embedding_map(report: ReportData, projected: Projection | str) -> Part:
    """The embeddings in the plane, coloured by their classes."""
    if isinstance(projected, str):
        return Part(None, projected)
    labels = None if report.labels is None else report.labels[projected.chosen]
    classes = len(report.classes)
    left = f" The legend names {plots.LEGEND} of {classes} classes." if classes > plots.LEGEND else ""
    figure = plots.embedding_map(projected.points, labels, plots.all_writable(report.classes))
    return Part(figure, f"{projected.how}{left}")
