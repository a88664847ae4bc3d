"""The top of a report: groups, duplicates, outliers and suspicious labels with their images, and the interactive map.

Letters: N training samples, F of them searched, K neighbours, P points of the map.
"""

from __future__ import annotations

import base64
import io
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from scipy.stats import mode

from lib.evaluation import findings
from lib.evaluation.findings import RESOLUTION_FACTORS, SEEDS, Findings
from lib.evaluation.nearest_neighbours import neighbours_of_arrays
from lib.reporting.report_data import ReportData
from lib.reporting.training_figures import Projection
from lib.session import image_grid
from lib.session.console import plural

GROUPS, TYPICAL, LISTED, MEMBERS = 12, 6, 20, 8
"""Maximum number of groups, images of a group, entries of every other list, and images of a set of duplicates."""
SIDE, QUALITY = 72, 80
"""Edge in pixels and JPEG quality of a thumbnail."""
TILE, NEAR = image_grid.TILE, 8
"""Edge in pixels of an image on the map, and the number of neighbours shown for it."""
CLEAR = 1.5
"""Outlier score above which an image is counted as an outlier."""
STABLE, FAIR = 0.9, 0.7
"""Minimum adjusted Rand index between seeds of stable and of fairly stable groups."""


@dataclass(frozen=True)
class Shown:
    """An image on the page: JPEG in base64, file name or index in the data set, and a note."""

    picture: str
    name: str
    note: str = ""


@dataclass(frozen=True)
class Row:
    """A row of images with a title; '' for none."""

    title: str
    images: list[Shown]
    left: int = 0
    """Number of images that are not shown."""


@dataclass(frozen=True)
class Answer:
    """A section of the findings: title, result, explanation and images."""

    title: str
    found: str
    reading: str
    rows: list[Row]


def answers(report: ReportData) -> list[Answer]:
    """Groups, duplicates, outliers and, with labels, suspicious labels; empty without findings."""
    found = report.findings
    if not isinstance(found, Findings):
        return []
    parts = [_groups(report, found), _duplicates(report, found), _outliers(report, found)]
    return parts if found.label_disagreement is None else [*parts, _labels(report, found)]


def _shown(report: ReportData, place: int, note: str = "") -> Shown:
    """A searched image by its index among the searched ones."""
    sample = int(report.searched[place])
    return Shown(_jpeg(image_grid.tile(report.images[sample], SIDE)), report.name_of(sample), note)


def _jpeg(picture: Image.Image) -> str:
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=QUALITY)
    return base64.b64encode(data.getvalue()).decode("ascii")


def _groups(report: ReportData, found: Findings) -> Answer:
    sizes, features = np.bincount(found.groups), report.features[report.searched]
    rows = []
    for group, size in enumerate(sizes[:GROUPS].tolist()):
        (members,) = (found.groups == group).nonzero()
        _, first = np.unique(found.copies[members], return_index=True)  # one of several copies
        similarity = features[members[first]] @ features[members].mean(axis=0)  # mean over the group
        typical = members[first][np.argsort(-similarity, kind="stable")[:TYPICAL]]
        title = f"Group {group}: {plural(size, 'image')} ({size / len(features):.0%}){_majority(report, members)}"
        rows.append(Row(title, [_shown(report, place) for place in typical.tolist()]))
    left = len(sizes) - GROUPS
    rest = f" Not shown: {plural(left, 'group')} of {plural(int(sizes[GROUPS:].sum()), 'image')}." if left > 0 else ""
    reading = (
        f"Communities (Leiden, modularity {found.modularity:.2f}) of the graph that joins each image with its "
        f"{plural(found.neighbours.shape[1], 'nearest neighbour')}. Of each group its most typical images are shown, "
        f"those most similar to the others of the group.{rest}"
    )
    return Answer(
        "Groups", f"{plural(len(sizes), 'group')} of {plural(len(features), 'image')}. {_sure(found)}", reading, rows
    )


def _sure(found: Findings) -> str:
    """A sentence on how certain the number of groups is."""
    sure = findings.certainty(found)
    (low, high), (coarse, fine) = sure.seed_range, sure.resolution_range
    agreement, (half, twice) = sure.seed_agreement, RESOLUTION_FACTORS
    stable = "stable" if agreement >= STABLE else "fairly stable" if agreement >= FAIR else "uncertain"
    return (
        f"The groups are {stable}: with {SEEDS} other random seeds there are "
        f"{low if low == high else f'{low} to {high}'}, with an adjusted Rand index of {agreement:.2f} (1: the same "
        f"groups, 0: chance); {half:g} times the resolution makes {coarse}, and {twice:g} times {fine}."
    )


def _majority(report: ReportData, members: np.ndarray) -> str:
    """The most frequent class of some searched images, with its share; '' without labels."""
    if report.labels is None:
        return ""
    counts = np.bincount(report.labels[report.searched[members]])
    return f"; {counts.max() / len(members):.0%} are {report.class_of(int(counts.argmax()))}"


def _duplicates(report: ReportData, found: Findings) -> Answer:
    copies = np.bincount(found.copies)  # copies of each image, including itself
    repeated, sets = int((copies[copies > 1] - 1).sum()), int((copies > 1).sum())
    same = (
        f"{plural(repeated, 'image')} could be removed without loss: identical to another one ({plural(sets, 'set')})."
    )
    rows = []
    for each in findings.nearest_sets(found, LISTED):
        least, greatest = (f"{cosine:.4f}" for cosine in (each.least, each.greatest))
        alike = f"similarity {least if least == greatest else f'{least} to {greatest}'}"
        title = f"{plural(len(each.members), 'image')}, {'identical' if each.least == 1 else alike}"
        shown = [_shown(report, place) for place in each.members[:MEMBERS]]
        rows.append(Row(title, shown, len(each.members) - MEMBERS))
    reading = (
        "The most similar images, identical ones first. Identical means that the network sees no difference: the files "
        "are the same, or differ in details that resizing removes. Recompressed and cropped copies follow, and then "
        "images that merely look alike."
    )
    return Answer("Duplicates", same if repeated else "No two images are identical to the network.", reading, rows)


def _outliers(report: ReportData, found: Findings) -> Answer:
    rows, counts = [], []
    flagged = {"of a single colour": report.blank[report.searched], "of noise": report.noisy[report.searched]}
    for kind, is_kind in flagged.items():
        (places,) = is_kind.nonzero()
        title = f"{plural(len(places), 'image')} {kind}"
        counts.append(title)
        if len(places):
            shown = [_shown(report, place) for place in places[:LISTED].tolist()]
            rows.append(Row(title, shown, len(places) - LISTED))
    distinct, copies = np.unique(found.copies, return_counts=True)
    kept = ~np.any([is_kind[distinct] for is_kind in flagged.values()], axis=0)
    distinct, copies = distinct[kept], copies[kept]
    order = np.argsort(-found.outlier_scores[distinct], kind="stable")[:LISTED]
    shown = []
    for place, count in zip(distinct[order].tolist(), copies[order].tolist(), strict=True):
        same = f", {count:,} copies" if count > 1 else ""
        shown.append(_shown(report, place, f"{found.outlier_scores[place]:.2f}{same}"))
    if shown:
        rows.append(Row("Others, by their embeddings" if rows else "", shown))
    above = int((found.outlier_scores[distinct] > CLEAR).sum())
    reading = (
        "Images of a single colour and of noise are recognised by their pixels, the others by their embeddings: the "
        f"score is the distance to the farthest of the {plural(found.neighbours.shape[1], 'nearest neighbour')}, "
        "relative to the same distance of these neighbours. Copies count once. About 1 is usual; images that are the "
        "only ones of their kind stand out."
    )
    return Answer(
        "Outliers", f"{', '.join(counts)}; {plural(above, 'other')} with a score above {CLEAR:g}.", reading, rows
    )


def _labels(report: ReportData, found: Findings) -> Answer:
    assert report.labels is not None and found.label_disagreement is not None
    own, size = report.labels[report.searched], found.neighbours.shape[1]
    shown, others = [], np.empty(0, int)
    if size:
        usual, votes = mode(
            own[found.neighbours], axis=1
        )  # (F,), the most frequent label of the neighbours and its count
        others = np.flatnonzero(usual != own)
        order = others[np.lexsort((-votes[others], -found.label_disagreement[others]))][:LISTED]
        for place in order.tolist():
            says = f"{votes[place]} of {size} neighbours: {report.class_of(int(usual[place]))}"
            shown.append(_shown(report, place, f"labelled {report.class_of(int(own[place]))}; {says}"))
    reading = (
        "Images whose neighbours have other labels, those with the most such neighbours first. "
        f"{found.label_disagreement.mean():.0%} of all neighbours have another label than the image: the higher this "
        "share, the more of the images listed here are labelled correctly."
    )
    said = f"{plural(len(others), 'image')} of {len(own):,} with another label than most of the neighbours."
    return Answer("Labels", said, reading, [Row("", shown)] if shown else [])


def explorer(report: ReportData, projected: Projection) -> dict[str, Any]:
    """The data with which the script of the page draws the map and shows an image with its neighbours.

    Returns:
        ``sprite``: all images in one JPEG, base64; ``columns`` and ``side`` of its tiles; ``classes``; and for each
        point ``x`` and ``y`` from 0 to 1, ``group``, ``label`` (absent without labels), ``name``, and ``near`` and
        ``alike``, the most similar points and their cosines.
    """
    found, points, chosen = report.findings, projected.points, projected.chosen
    assert isinstance(found, Findings)
    near, alike = neighbours_of_arrays(report.features[chosen], NEAR)
    columns = math.isqrt(len(chosen) - 1) + 1
    tiles = [image_grid.tile(report.images[sample], TILE) for sample in chosen.tolist()]
    x, y = np.round((points - points.min(axis=0)) / np.ptp(points, axis=0), 4).T  # scaled to the unit square
    labels = None if report.labels is None else report.labels[chosen].tolist()
    return {
        "sprite": _jpeg(image_grid.grid(tiles, columns)),
        "columns": columns,
        "side": TILE,
        "x": x.tolist(),
        "y": y.tolist(),
        "group": found.groups[np.searchsorted(report.searched, chosen)].tolist(),
        "label": labels,
        "classes": [report.class_of(number) for number in range(len(report.classes))],
        "name": [report.name_of(sample) for sample in chosen.tolist()],
        "near": near.tolist(),
        "alike": np.round(alike, 3).astype(float).tolist(),
    }
