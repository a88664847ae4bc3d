"""The figures of a report about the test images.

Letters: N training samples, D embedding, M test images, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from lib.evaluation import knn
from lib.reporting import plots
from lib.reporting.plots import Part, Tile
from lib.reporting.report_data import SEED, ReportData, drawn
from lib.session.console import plural

TESTS, PAIRS = 10_000, 10
"""Maximum number of classified test images, and of listed class pairs."""


@dataclass(frozen=True)
class Classified:
    """Test images and the share of the votes (M, C) of each class.

    ``chosen`` (M,) are their indices in ``ReportData.tested``.
    """

    chosen: np.ndarray
    labels: np.ndarray
    shares: np.ndarray

    @property
    def predicted(self) -> np.ndarray:
        """(M,), the class with the most votes."""
        return np.asarray(self.shares.argmax(axis=1))


def classify(report: ReportData) -> Classified | str:
    """Weighted kNN of the test images, or of a subset if there are many; or the reason for none, '' without labels."""
    tested = report.tested
    if report.labels is None or tested is None or not len(tested.labels):
        return ""
    chosen = drawn(len(tested.labels), TESTS)
    queries = np.require(tested.features[chosen], np.float32, ["C", "W"])
    bank = np.require(report.features, np.float32, ["C", "W"])  # avoids a copy if PyTorch can use the array directly
    if not (np.isfinite(queries).all() and np.isfinite(bank).all()):
        return "Not drawn: some embeddings are not finite numbers."
    arrays = (torch.from_numpy(array) for array in (queries, bank, np.require(report.labels, np.int64, ["C", "W"])))
    scores = knn.weighted_knn(*arrays, classes=len(report.classes), k=tested.k, sigma=tested.sigma).numpy()
    return Classified(chosen, tested.labels[chosen], scores / scores.sum(axis=1, keepdims=True))


def _counts(report: ReportData, classified: Classified) -> np.ndarray:
    """(C, C), number of test images by true class (rows) and predicted class."""
    counts = np.zeros((len(report.classes),) * 2, int)
    np.add.at(counts, (classified.labels, classified.predicted), 1)
    return counts


def _basis(report: ReportData, classified: Classified) -> str:
    """A sentence about the classifier and its correct predictions."""
    assert report.tested is not None
    right, shown = (classified.predicted == classified.labels).sum(), len(classified.labels)
    all_ = len(report.tested.labels)
    some = "" if shown == all_ else f", drawn at random from {all_},"
    judged = f"{right} of {plural(shown, 'test image')}{some} are classified correctly ({right / shown:.2%})"
    return f"{report.tested.protocol}; {judged}; {report.when}."


def confusion(report: ReportData, classified: Classified | str) -> Part:
    """The confusion matrix."""
    if isinstance(classified, str):
        return Part(None, classified)
    return Part(
        plots.confusion(_counts(report, classified), plots.all_writable(report.classes)),
        _basis(report, classified),
    )


def confused(report: ReportData, classified: Classified | str) -> list[tuple[str, str, int, str]]:
    """Pairs of true and predicted class, with the number of test images and the share; most frequent first."""
    if isinstance(classified, str):
        return []
    counts = _counts(report, classified)
    wrong = counts - np.diag(counts.diagonal())
    order = np.argsort(-wrong, axis=None, kind="stable")[:PAIRS]
    return [
        (report.classes[a], report.classes[b], int(wrong[a, b]), f"{wrong[a, b] / counts[a].sum():.1%}")
        for a, b in zip(*np.unravel_index(order, wrong.shape), strict=True)
        if wrong[a, b]
    ]


def voters(report: ReportData, classified: Classified | str) -> Part:
    """Test images and their nearest training images: random correct ones and the most confident mistakes."""
    if isinstance(classified, str):
        return Part(None, classified)
    is_right = classified.predicted == classified.labels
    (right,), (wrong,) = is_right.nonzero(), (~is_right).nonzero()
    right = np.random.default_rng(SEED).permutation(right)[:4]
    wrong = wrong[np.argsort(-classified.shares[wrong].max(axis=1), kind="stable")][:4]
    rows = [_row(report, classified, int(place)) for place in (*right, *wrong)]
    kinds = [f"{len(right)} correct ones drawn at random"] if len(right) else []
    kinds += [f"the {plural(len(wrong), 'mistake')} with the largest share of the votes"] if len(wrong) else []
    return Part(plots.voters(rows), f"{_basis(report, classified)} Shown: {', then '.join(kinds)}.")


def _row(report: ReportData, classified: Classified, place: int) -> tuple[list[Tile], str, list[tuple[float, bool]]]:
    tested, labels, names = report.tested, report.labels, plots.all_writable(report.classes)
    assert tested is not None and labels is not None
    number, truth, shares = int(classified.chosen[place]), int(classified.labels[place]), classified.shares[place]
    similarity = np.asarray(report.features, np.float32) @ np.asarray(tested.features[number], np.float32)  # (N,)
    nearest = np.argsort(-similarity, kind="stable")[: min(8, tested.k)]
    tiles = [Tile(tested.images[number], "")]
    tiles += [Tile(report.images[near], "", bool(labels[near] == truth)) for near in nearest.tolist()]
    first = [c for c in np.argsort(-shares, kind="stable")[:3].tolist() if shares[c] >= 0.005]
    said = ", ".join(f"{plots.fit(names[c], 1.2, 9)} ({shares[c]:.0%})" for c in first)
    verdict = "correct" if first[0] == truth else "wrong"
    return (
        tiles,
        f"{plots.fit(names[truth], 1.2, 9)}, {verdict}. Votes: {said}",
        [(float(shares[c]), c == truth) for c in first],
    )
