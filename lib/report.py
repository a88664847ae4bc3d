"""What a run came to, as one page: ``report.html`` and its pictures. Layer 3.

The page holds everything it shows and loads nothing. Where a part cannot be made, a sentence says why.
``lib/report.html`` holds the words, ``plots`` draws, and what is here gathers what they need.

Letters: N training samples, D embedding, M test images, A anchors, K neighbours, C classes, E epochs, P points.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import Environment, StrictUndefined
from matplotlib.figure import Figure
from scipy.stats import rankdata
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits

from lib import knn, plots
from lib.files import write_whole
from lib.plots import Tile

LIMIT = 5_000_000
"""Bytes that the page stays below."""
RESOLUTIONS = (150, 110, 80, 55)
"""Dots per inch of the pictures: the first with which the page stays below its limit."""
SEED = 0
"""Of every choice of samples: the same run has the same report."""
MAPPED, TESTS, ROUNDS, PAIRS = 2_000, 10_000, 6, 10
"""Points of the map, test images that are classified, rounds with a histogram, and confused pairs, at most."""
TEXT = 300
"""Letters of a name or value on the page at most."""
QUANTILES = ("entropy_05", "entropy_25", "entropy_50", "entropy_75", "entropy_95")
"""Quantiles of the entropy after an epoch, in nats."""
HEALTH = {
    "reciprocal": "reciprocal neighbours",
    "kept": "neighbours kept",
    "drift": "drift of the bank",
    "hubness": "hubness",
}
"""Health figures of an epoch, one number each, and what a plot calls them."""


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
class Material:
    """All that a report is made of.

    Attributes:
        name: of the session.
        facts: versions, hardware, commit, seed and the like.
        options: by name.
        metrics: rows of metrics.jsonl in order, with the health figures of ``QUANTILES`` and ``HEALTH`` where they
            are known.
        protocol: how the accuracies of ``metrics`` came about.
        published: the published figure and its source, '' where none is named.
        rounds: the discoveries, in order.
        images: N arrays uint8 (H, W, 3); only those that are shown are read.
        labels: (N,), or None.
        classes: their names.
        features: (N, D), the memory bank.
        tested: None without labelled test images.
        finished: the last epoch of the last round is done.
        chooser: what chooses the best epoch.
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


@dataclass(frozen=True)
class Part:
    """A picture and how it came about, or no picture and why there is none."""

    figure: Figure | None
    how: str


def write(material: Material, folder: Path) -> Path:
    """Writes ``report.html`` into the session's folder, and the pictures to ``report/`` in it as PNG.

    Everything is drawn before anything is written: where drawing fails, the old report stays as it was.

    Returns:
        The page. The same material gives the same bytes.

    Raises:
        OSError: it cannot be written.
    """
    with plots.style():
        classified = _classify(material)
        parts = {**_training(material), **_discovery(material), **_health(material), "map": _map(material)}
        parts |= {"confusion": _confusion(material, classified), "voters": _voters(material, classified)}
        pairs = _confused(material, classified)
        for resolution in RESOLUTIONS:
            pictures = {
                name: plots.render(part.figure, resolution) for name, part in parts.items() if part.figure is not None
            }
            page = _page(material, parts, pictures, pairs)
            if len(page) < LIMIT:
                break
    place, path = folder / "report", folder / "report.html"
    place.mkdir(exist_ok=True)
    for name in parts:
        if name in pictures:
            with write_whole(place / f"{name}.png") as file:
                file.write(pictures[name])
        else:
            (place / f"{name}.png").unlink(missing_ok=True)  # of an earlier report
    with write_whole(path) as file:
        file.write(page)
    return path


def _column(material: Material, name: str) -> np.ndarray:
    """(E,) of the metrics; NaN where a row has none."""
    return np.array([np.nan if row.get(name) is None else row[name] for row in material.metrics], float)


def _training(material: Material) -> dict[str, Part]:
    """Accuracy and loss over the epochs."""
    if not material.metrics:
        return dict.fromkeys(("accuracy", "loss"), Part(None, "No epoch is done yet."))
    rounds, top1, top5, loss = (_column(material, name) for name in ("round", "top1", "top5", "loss"))
    last, best = np.full(len(rounds), np.nan), np.full(len(rounds), np.nan)
    for number in np.unique(rounds[np.isfinite(top1)]):
        epochs = np.flatnonzero((rounds == number) & np.isfinite(top1))
        last[epochs[-1]], best[epochs[top1[epochs].argmax()]] = top1[epochs[-1]], top1[epochs].max()
    accuracy = Part(None, "No accuracy: that takes labelled training and test images.")
    if np.isfinite(top1).sum() == 1:
        accuracy = Part(None, f"Only one epoch was judged: top-1 {np.nanmax(top1):.2%}, {material.protocol}.")
    elif np.isfinite(top1).any():
        series = {"top-1": top1, **({"top-5": top5} if np.isfinite(top5).any() else {})}
        marks = {"last epoch of a round": last, "best epoch of a round": best}
        figure = plots.curves(series, rounds.astype(int), "accuracy", percent=True, marks=marks)
        accuracy = Part(
            figure, f"{material.protocol}, after each epoch. The best epoch is chosen by {material.chooser}."
        )
    return {"accuracy": accuracy, "loss": _loss(loss, rounds.astype(int))}


def _loss(loss: np.ndarray, rounds: np.ndarray) -> Part:
    finite = np.isfinite(loss)
    lost = int((~finite).sum())
    if not finite.any():
        return Part(None, "The loss was not a finite number in any epoch.")
    if finite.sum() == 1:
        return Part(None, f"Only one epoch has a loss that is a finite number: {loss[finite][0]:.4f}.")
    left = f" {lost} epochs whose loss was not a finite number are left out." if lost else ""
    how = f"Mean over the training images of each epoch, while the network learns from them.{left}"
    return Part(plots.curves({"loss": loss}, rounds, "loss"), how)


def _discovery(material: Material) -> dict[str, Part]:
    """Consistency, entropies and galleries."""
    names = ("consistency", "entropy", "surest", "random", "mistakes")
    if not material.rounds:
        return dict.fromkeys(names, Part(None, "No discovery yet: the first one is at the start of round 1."))
    parts = {"consistency": _consistency(material), "entropy": _entropy(material)}
    found = material.rounds[-1]
    if not found.neighbours.size:
        none = Part(None, f"Round {found.round} found no anchor with a neighbour.")
        return parts | dict.fromkeys(names[2:], none)
    return parts | _galleries(material, found)


def _equal(found: Discovered, labels: np.ndarray) -> np.ndarray:
    """(A, K) whether anchor and neighbour are of one class."""
    return np.asarray(labels[found.anchors][:, None] == labels[found.neighbours])


def _consistency(material: Material) -> Part:
    if material.labels is None:
        return Part(None, "No consistency: the training images have no labels.")
    rounds = [found for found in material.rounds if found.neighbours.size]
    if not rounds:
        return Part(None, "No consistency: no round found an anchor with a neighbour.")
    values = np.array([_equal(found, material.labels).mean() for found in rounds])
    shares = np.array([len(found.anchors) / len(found.entropy) for found in rounds])
    figure = plots.consistency(shares, values, [found.round for found in rounds])
    return Part(
        figure, "Share of anchor-neighbour pairs of one class, from the memory bank at the start of each round."
    )


def _entropy(material: Material) -> Part:
    whole = [found for found in material.rounds if np.isfinite(found.entropy).all()]
    if not whole:
        return Part(None, "No histogram: the entropies are not finite numbers.")
    picks = np.unique(np.linspace(0, len(whole) - 1, min(ROUNDS, len(whole))).round().astype(int))
    rounds = [(whole[pick].round, whole[pick].entropy, _is_anchor(whole[pick])) for pick in picks]
    left = len(material.rounds) - len(rounds)
    how = "From the memory bank at the start of each round." + (f" {left} rounds are not shown." if left else "")
    return Part(plots.histograms(rounds), how)


def _is_anchor(found: Discovered) -> np.ndarray:
    """(N,) of bool."""
    chosen = np.zeros(len(found.entropy), bool)
    chosen[found.anchors] = True
    return chosen


def _galleries(material: Material, found: Discovered) -> dict[str, Part]:
    """The anchors of lowest entropy, some at random, and the worst mistakes."""
    near = found.neighbours[:, :5]  # (A, K)
    count = 4 * max(1, 8 // (1 + near.shape[1]))
    drawn = np.random.default_rng(SEED).permutation(len(near))[:count]
    where = f"Discovery at the start of round {found.round}"
    parts = {
        "surest": Part(_gallery(material, found, range(min(count, len(near)))), f"{where}, anchors of lowest entropy."),
        "random": Part(_gallery(material, found, drawn), f"{where}, anchors drawn at random."),
    }
    if material.labels is None:
        return parts | {"mistakes": Part(None, "Mistakes are not known: the training images have no labels.")}
    equal = _equal(found, material.labels)
    (wrong,) = (~equal[:, : near.shape[1]]).any(axis=1).nonzero()
    if not len(wrong):
        return parts | {"mistakes": Part(None, f"Round {found.round} made none among its {len(near)} anchors.")}
    order = "lowest entropy"
    if found.similarities is not None:
        alike = np.where(equal, -np.inf, found.similarities)[wrong, : near.shape[1]].max(axis=1)
        wrong, order = wrong[np.argsort(-alike, kind="stable")], "greatest similarity"
    how = f"{where}, {(~equal).sum()} of {equal.size} pairs are of two classes; shown are those of {order}."
    return parts | {"mistakes": Part(_gallery(material, found, wrong[:count]), how)}


def _gallery(material: Material, found: Discovered, picks: Sequence[int] | np.ndarray) -> Figure:
    entries = []
    for pick in picks:
        anchor, labels = int(found.anchors[pick]), material.labels
        entry = [Tile(material.images[anchor], _name(material, anchor), framed=False)]
        for near in found.neighbours[pick, :5].tolist():
            same = None if labels is None else bool(labels[anchor] == labels[near])
            entry.append(Tile(material.images[near], _name(material, near), same))
        entries.append(entry)
    return plots.gallery(entries)


def _name(material: Material, sample: int) -> str:
    if material.labels is None:
        return ""
    number = int(material.labels[sample])
    return plots.writable(material.classes[number], number)


def _names(material: Material) -> list[str]:
    """(C,) names that the pictures' font can write."""
    return [plots.writable(name, number) for number, name in enumerate(material.classes)]


def _health(material: Material) -> dict[str, Part]:
    """What can be known without labels, over the epochs, and how it went with the truth."""
    rounds = _column(material, "round").astype(int)
    values = np.stack([_column(material, name) for name in QUANTILES], axis=1)  # (E, 5)
    values[~np.isfinite(values).all(axis=1)] = np.nan
    how = "From the memory bank, after each epoch that has a point; no labels are used."
    columns = {"median entropy, nats": values[:, 2]}
    parts = {"quantiles": _too_few(values[:, 2]) or Part(plots.quantiles(values, rounds), how)}
    for name, label in HEALTH.items():
        columns[label] = column = _column(material, name)
        percent = name in ("reciprocal", "kept")
        parts[name] = _too_few(column) or Part(plots.curves({label: column}, rounds, label, percent=percent), how)
    return parts | {"follows": _follows(material, rounds, columns)}


def _too_few(values: np.ndarray) -> Part | None:
    """Why values (E,) make no line, or None where they do."""
    known = values[np.isfinite(values)]
    if not len(known):
        return Part(None, "Not recorded by this run.")
    return Part(None, f"Known after one epoch only: {known[0]:.3g}.") if len(known) == 1 else None


def _follows(material: Material, rounds: np.ndarray, columns: Mapping[str, np.ndarray]) -> Part:
    truth, pairs = _column(material, "consistency"), {}
    first = np.flatnonzero(np.diff(rounds, prepend=-1))  # of each round
    for label, column in columns.items():
        at = first[np.isfinite(column[first]) & np.isfinite(truth[first])]
        if len(at) >= 2:
            pairs[label] = (column[at], truth[at], _rank_correlation(column[at], truth[at]))
    if not pairs:
        return Part(None, "This takes labels, health figures, and two rounds with a discovery.")
    how = "A point is a round: the figure after its first epoch, and the consistency of its discovery."
    return Part(plots.follows(pairs), how)


def _rank_correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Spearman's; NaN below three points, or where one of them is constant."""
    if len(one) < 3 or np.ptp(one) == 0 or np.ptp(other) == 0:
        return float("nan")
    return float(np.corrcoef(rankdata(one), rankdata(other))[0, 1])


def _map(material: Material) -> Part:
    """Some of the embeddings in the plane."""
    samples = len(material.features)
    chosen = np.sort(np.random.default_rng(SEED).permutation(samples)[:MAPPED])
    features = np.asarray(material.features[chosen], np.float64)  # (P, D)
    if not np.isfinite(features).all():
        return Part(None, "No map: some embeddings are not finite numbers.")
    if len(features) < 5 or np.ptp(features, axis=0).max() < 1e-6:
        return Part(None, "No map: there are fewer than five embeddings, or all are the same.")
    before = ""
    if features.shape[1] > 50 and len(features) > 50:
        features, before = PCA(50, random_state=SEED).fit_transform(features), ", after PCA to 50 dimensions"
    perplexity = min(30.0, (len(features) - 1) / 3)
    with threadpool_limits(1):  # sums in one order; and threads that wait for a busy core cost more than they bring
        points = TSNE(perplexity=perplexity, init="pca", random_state=SEED).fit_transform(features)  # (P, 2)
    labels = None if material.labels is None else material.labels[chosen]
    classes = len(material.classes)
    left = f" Of {classes} classes the legend names {plots.LEGEND}." if classes > plots.LEGEND else ""
    how = (
        f"{len(features)} of {samples} rows of the memory bank, by t-SNE (perplexity {perplexity:.3g}, from PCA, seed "
        f"{SEED}){before}; {_when(material)}.{left}"
    )
    return Part(plots.embedding_map(points, labels, _names(material)), how)


def _when(material: Material) -> str:
    """The epoch that bank and network are of."""
    if not material.metrics:
        return "before the first epoch"
    last = material.metrics[-1]
    return f"round {last['round']}, epoch {last['epoch'] + 1}, the last one done"


@dataclass(frozen=True)
class Classified:
    """Test images and the share of the votes (M, C) that each class had.

    ``chosen`` (M,) are their places in ``Material.tested``.
    """

    chosen: np.ndarray
    labels: np.ndarray
    shares: np.ndarray

    @property
    def predicted(self) -> np.ndarray:
        """(M,) the class of most votes."""
        return np.asarray(self.shares.argmax(axis=1))


def _classify(material: Material) -> Classified | str:
    """Weighted kNN of the test images, or of some where there are many; or why there is none."""
    tested = material.tested
    if material.labels is None or tested is None or not len(tested.labels):
        return "This takes labelled training and test images."
    chosen = np.sort(np.random.default_rng(SEED).permutation(len(tested.labels))[:TESTS])
    queries = np.require(tested.features[chosen], np.float32, ["C", "W"])
    bank = np.require(material.features, np.float32, ["C", "W"])  # no copy of what PyTorch can take as it is
    if not (np.isfinite(queries).all() and np.isfinite(bank).all()):
        return "Some embeddings are not finite numbers."
    arrays = (torch.from_numpy(array) for array in (queries, bank, np.require(material.labels, np.int64, ["C", "W"])))
    scores = knn.weighted_knn(*arrays, classes=len(material.classes), k=tested.k, sigma=tested.sigma).numpy()
    return Classified(chosen, tested.labels[chosen], scores / scores.sum(axis=1, keepdims=True))


def _counts(material: Material, classified: Classified) -> np.ndarray:
    """(C, C) test images by their true class, downwards, and the predicted one."""
    counts = np.zeros((len(material.classes),) * 2, int)
    np.add.at(counts, (classified.labels, classified.predicted), 1)
    return counts


def _basis(material: Material, classified: Classified) -> str:
    """How the predictions came about, and how many are right."""
    assert material.tested is not None
    right, shown = (classified.predicted == classified.labels).sum(), len(classified.labels)
    all_ = len(material.tested.labels)
    some = "" if shown == all_ else f", drawn at random from {all_},"
    when = _when(material)
    return f"{material.tested.protocol}; {right} of {shown} test images{some} are right ({right / shown:.2%}); {when}."


def _confusion(material: Material, classified: Classified | str) -> Part:
    if isinstance(classified, str):
        return Part(None, classified)
    return Part(plots.confusion(_counts(material, classified), _names(material)), _basis(material, classified))


def _confused(material: Material, classified: Classified | str) -> list[tuple[str, str, int, str]]:
    """True and predicted class, test images, and their share of the true class; the most frequent first."""
    if isinstance(classified, str):
        return []
    counts = _counts(material, classified)
    wrong = counts - np.diag(counts.diagonal())
    order = np.argsort(-wrong, axis=None, kind="stable")[:PAIRS]
    pairs = [(row, column) for row, column in zip(*np.unravel_index(order, wrong.shape), strict=True)]
    return [
        (_cut(material.classes[a]), _cut(material.classes[b]), int(wrong[a, b]), f"{wrong[a, b] / counts[a].sum():.1%}")
        for a, b in pairs
        if wrong[a, b]
    ]


def _voters(material: Material, classified: Classified | str) -> Part:
    """Test images beside their nearest training images: the surest mistakes, and right ones at random."""
    if isinstance(classified, str):
        return Part(None, classified)
    is_right = classified.predicted == classified.labels
    (right,), (wrong,) = is_right.nonzero(), (~is_right).nonzero()
    right = np.random.default_rng(SEED).permutation(right)[:4]
    wrong = wrong[np.argsort(-classified.shares[wrong].max(axis=1), kind="stable")][:4]
    rows = [_row(material, classified, int(place)) for place in (*right, *wrong)]
    text = f"{len(right)} right ones drawn at random, then the {len(wrong)} mistakes with the most votes."
    return Part(plots.voters(rows), f"{_basis(material, classified)} Shown: {text}")


def _row(material: Material, classified: Classified, place: int) -> tuple[list[Tile], str, list[tuple[float, bool]]]:
    tested, labels, names = material.tested, material.labels, _names(material)
    assert tested is not None and labels is not None
    number, truth, shares = int(classified.chosen[place]), int(classified.labels[place]), classified.shares[place]
    similarity = np.asarray(material.features, np.float32) @ np.asarray(tested.features[number], np.float32)  # (N,)
    nearest = np.argsort(-similarity, kind="stable")[: min(8, tested.k)]
    tiles = [Tile(tested.images[number], "", framed=False)]
    tiles += [Tile(material.images[near], "", bool(labels[near] == truth)) for near in nearest.tolist()]
    first = [c for c in np.argsort(-shares, kind="stable")[:3].tolist() if shares[c] >= 0.005]
    said = ", ".join(f"{plots.fit(names[c], 1.2, 9)} ({shares[c]:.0%})" for c in first)
    verdict = "right" if first[0] == truth else "wrong"
    return (
        tiles,
        f"{plots.fit(names[truth], 1.2, 9)}, {verdict}. Votes: {said}",
        [(float(shares[c]), c == truth) for c in first],
    )


def _page(
    material: Material,
    parts: Mapping[str, Part],
    pictures: Mapping[str, bytes],
    pairs: Sequence[tuple[str, str, int, str]],
) -> bytes:
    """The page, with the pictures in it."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(Path(__file__).with_suffix(".html").read_text(encoding="utf-8"))
    text = template.render(
        name=_cut(material.name),
        material=material,
        how={name: part.how for name, part in parts.items()},
        pictures={name: base64.b64encode(data).decode("ascii") for name, data in pictures.items()},
        summary=_summary(material),
        rounds=_rounds(material),
        pairs=pairs,
        facts={name: _cut(value) for name, value in material.facts.items()},
        options={name: _cut(value) for name, value in material.options.items()},
    )
    return text.encode("utf-8", "backslashreplace")  # file names may be any bytes


def _cut(value: object) -> str:
    """As text, and not longer than a page can bear."""
    text = "not set" if value is None else str(value)
    return text if len(text) <= TEXT else f"{text[:TEXT]}…"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"


def _summary(material: Material) -> dict[str, str]:
    """The figures at the top, by what they are."""
    rows = material.metrics
    last = rows[-1] if rows else {}
    seconds = sum((row.get("train_s") or 0) + (row.get("evaluate_s") or 0) for row in rows)
    minutes, rest = divmod(round(seconds), 60)
    return {
        "top-1, last epoch": _percent(last.get("top1")),
        "top-1, best epoch of the last round": _percent(last.get("best_top1")),
        "published": _cut(material.published) or "none named",
        "rounds": str(len({row["round"] for row in rows})),
        "epochs": str(len(rows)),
        "time of these epochs": f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s",
    }


def _rounds(material: Material) -> list[dict[str, str]]:
    """The last epoch of each round; of very many rounds some."""
    ends = {row["round"]: row for row in material.metrics}
    every = -(-len(ends) // 50)
    samples = len(material.features)
    return [
        {
            "round": str(number),
            "epochs": str(row["epoch"] + 1),
            "anchors": f"{row['anchors']} ({row['anchors'] / samples:.0%})",
            "consistency": "-" if row.get("consistency") is None else f"{row['consistency']:.1%}",
            "loss": f"{row['loss']:.4f}" if row.get("loss") is not None else "-",
            "top-1 last": _percent(row.get("top1")),
            "top-1 best": _percent(row.get("best_top1")),
            "top-5 last": _percent(row.get("top5")),
        }
        for number, row in list(ends.items())[:: max(1, every)]
    ]
