"""Figures of a run, drawn by matplotlib from plain arrays, without pyplot.

Every figure is ``WIDTH`` inches wide, so that its text can be read on a phone. Draw and ``render`` inside ``style()``,
which restores the settings of matplotlib afterwards.

Letters: E epochs, C classes, P points of a map.
"""

from __future__ import annotations

import io
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache

import matplotlib
import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle
from matplotlib.textpath import text_to_path
from matplotlib.ticker import MaxNLocator, PercentFormatter
from PIL import Image

from lib.session.image_grid import EQUAL, OTHER

WIDTH = 5.6
"""Width of every figure, in inches."""
FONT = "DejaVu Sans"
"""Included in matplotlib, so that a figure is the same on every machine."""
BLUE, ORANGE, GREY = "#1f6fb4", "#d9730d", "#8a8f98"
THUMBNAIL = 128
"""Maximum length of the longer edge of an image, in pixels; larger ones are reduced before drawing."""
NAMED = 30
"""Maximum number of classes that are named at the axes of a confusion matrix."""
CELLS = 100
"""Maximum number of rows of a confusion matrix; with more classes, neighbouring ones share a cell."""
LEGEND = 20
"""Maximum number of classes in a legend."""


@dataclass(frozen=True)
class Tile:
    """An image in a gallery.

    Attributes:
        image: uint8 (H, W, 3).
        name: name of its class, '' without one.
        same: whether it has the expected class, shown by its frame; None: no frame.
    """

    image: np.ndarray
    name: str
    same: bool | None = None


@dataclass(frozen=True)
class Part:
    """A figure and a sentence about its data, or no figure and the reason; with an empty ``how`` it is omitted."""

    figure: Figure | None
    how: str


def style() -> AbstractContextManager[None]:
    """The matplotlib settings of all figures, independent of the user's."""
    return matplotlib.style.context(
        [
            "default",
            {
                "font.family": FONT,
                "font.size": 10,
                "text.parse_math": False,  # a class name may contain $
                "text.hinting": "none",  # so that ``fit`` computes the exact width of a text
                "axes.formatter.limits": (-9, 9),  # the power of ten at an axis would overlap its numbers
                "axes.formatter.useoffset": False,
                "axes.spines.top": False,
                "axes.spines.right": False,
                "axes.grid": True,
                "grid.color": "#e4e6ea",
                "axes.axisbelow": True,
                "axes.edgecolor": GREY,
                "legend.frameon": False,
            },
        ]
    )


def render(figure: Figure, dpi: int) -> bytes:
    """The figure as PNG; the same figure gives the same bytes."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=dpi, metadata={"Software": None})
    return file.getvalue()


def writable(name: str, number: int) -> str:
    """The name of class ``number``, or 'class 7' if the font has no glyph for one of its characters."""
    return name if name and all(ord(letter) in letters() for letter in name) else f"class {number}"


def all_writable(names: Sequence[str]) -> list[str]:
    """``writable`` of every name."""
    return [writable(name, number) for number, name in enumerate(names)]


@cache
def letters() -> frozenset[int]:
    """Code points that the font has."""
    return frozenset(get_font(findfont(FONT)).get_charmap())


def fit(text: str, inches: float, size: float) -> str:
    """``text`` shortened with an ellipsis to at most ``inches`` at a font size of ``size`` points."""
    font, most = FontProperties(family=FONT, size=size), 120

    def fits(candidate: str) -> bool:
        return text_to_path.get_text_width_height_descent(candidate, font, False)[0] / 72 <= inches

    if len(text) <= most and fits(text):
        return text
    kept = bisect_left(range(min(len(text), most)), True, key=lambda last: not fits(f"{text[: last + 1]}…"))
    return f"{text[:kept].rstrip()}…"


def _figure(height: float) -> Figure:
    figure = Figure(figsize=(WIDTH, height), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08))
    FigureCanvasAgg(figure)
    return figure


def curves(
    series: Mapping[str, np.ndarray],
    rounds: np.ndarray,
    label: str,
    *,
    percent: bool = False,
    marks: Mapping[str, np.ndarray] | None = None,
) -> Figure:
    """Lines over the epochs of all rounds; values that are not finite are omitted.

    Args:
        series: (E,) by name; a single one has no legend.
        rounds: (E,) of each epoch, ascending.
        label: label of the vertical axis.
        percent: the values are shares.
        marks: (E,) by name, drawn as points.
    """
    figure = _figure(3.2)
    axes = figure.add_subplot()
    for colour, (name, values) in zip((BLUE, ORANGE, GREY), series.items(), strict=False):
        axes.plot(*_known(values), color=colour, label=name, marker="." if len(rounds) <= 60 else "")
    for shape, (name, values) in zip(("o", "*"), (marks or {}).items(), strict=False):
        axes.plot(*_known(values), shape, ms=9, mec="black", mfc="none", label=name, ls="", clip_on=False)
    if len(series) + len(marks or {}) > 1:
        figure.legend(loc="outside lower center", ncols=2)
    _epochs(axes, rounds, label)
    if percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    return figure


def _known(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Epochs, counted from 1, and values, of the epochs that have a finite value."""
    (at,) = np.isfinite(values).nonzero()
    return at + 1, values[at]


def _epochs(axes: Axes, rounds: np.ndarray, label: str) -> None:
    """Sets up the horizontal axis: epochs of all rounds, with a line at the start of each round."""
    starts = np.flatnonzero(np.diff(rounds, prepend=rounds[0] - 1))  # (rounds,)
    for start in starts[1:]:
        axes.axvline(start + 0.5, color=GREY, lw=0.8, ls=":")
    shown = starts[:: max(1, -(-len(starts) // 10))]
    above = axes.secondary_xaxis("top")
    above.set_xticks(shown + 0.5, [str(rounds[start]) for start in shown], ha="left")
    above.set_xlabel("round")
    above.tick_params(length=0)
    above.spines["top"].set_visible(False)
    axes.set(xlabel="epoch, counted through all rounds", ylabel=label, xlim=(0.5, len(rounds) + 0.5))
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))


def quantiles(values: np.ndarray, rounds: np.ndarray, samples: int) -> Figure:
    """The 5, 25, 50, 75 and 95 % quantiles (E, 5) of the entropy; rows that are not finite are omitted.

    A dashed line shows the maximum entropy, ln N of N ``samples``.
    """
    figure = _figure(3.2)
    axes = figure.add_subplot()
    (at,) = np.isfinite(values).all(axis=1).nonzero()
    low, lower, middle, upper, high = values[at].T
    axes.fill_between(at + 1, low, high, color=BLUE, alpha=0.15, lw=0, label="5 to 95 %")
    axes.fill_between(at + 1, lower, upper, color=BLUE, alpha=0.3, lw=0, label="25 to 75 %")
    axes.plot(at + 1, middle, color=BLUE, marker="." if len(rounds) <= 60 else "", label="median")
    axes.axhline(np.log(samples), color=ORANGE, ls="--", label=f"ln N = {np.log(samples):.2f}")
    figure.legend(loc="outside lower center", ncols=4, columnspacing=1.2)
    _epochs(axes, rounds, "entropy, nats")
    return figure


def consistency(shares: np.ndarray, values: np.ndarray, rounds: Sequence[int]) -> Figure:
    """Consistency over the share of samples that are anchors, a point for each round."""
    figure = _figure(3.0)
    axes = figure.add_subplot()
    axes.plot(shares, values, color=BLUE, marker="o")
    every = max(1, -(-len(rounds) // 12))
    for share, value, number in list(zip(shares, values, rounds, strict=True))[::every]:
        axes.annotate(str(number), (share, value), (0, 10), textcoords="offset points", ha="center", va="center")
    axes.set(
        xlabel="anchors, share of all samples (numbers at the points: rounds)", ylabel="consistency", xlim=(0, 1.08)
    )
    axes.margins(y=0.25)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1))
    return figure


def histograms(found: Sequence[tuple[int, np.ndarray, np.ndarray]]) -> Figure:
    """Histogram of the entropy for each round, anchors and others, and the threshold between them.

    Args:
        found: for each round its number, the finite entropies (N,), and a mask (N,) of the anchors.
    """
    figure = _figure(0.9 + 1.25 * len(found))
    everything = np.concatenate([entropy for _, entropy, _ in found])
    low, high = everything.min(), everything.max()
    bins = np.linspace(low, high if high - low > 1e-6 else low + 1e-6, 61)
    rows = figure.subplots(len(found), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (number, entropy, is_anchor) in zip(rows, found, strict=True):
        parts = [entropy[is_anchor], entropy[~is_anchor]]
        axes.hist(parts, bins, stacked=True, color=[BLUE, "#c9ced6"], label=["anchors", "others"])
        if 0 < is_anchor.sum() < len(entropy):
            threshold = entropy[is_anchor].max()
            axes.axvline(threshold, color=ORANGE, ls="--", label="threshold")
        axes.set_title(f"round {number}: {is_anchor.mean():.0%} are anchors", fontsize=10, loc="left")
        axes.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    handles, labels = rows[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    rows[-1].set_xlabel("entropy, nats")
    figure.supylabel("samples", fontsize=10)
    return figure


def follows(pairs: Mapping[str, tuple[np.ndarray, np.ndarray, float]]) -> Figure:
    """The consistency over each health figure: by name its values, the consistency, and the rank correlation.

    The correlation is shown only if it is finite.
    """
    rows = -(-len(pairs) // 2)
    figure = _figure(0.3 + 2.0 * rows)
    for place, (name, (values, truth, rank)) in enumerate(pairs.items(), start=1):
        axes = figure.add_subplot(rows, 2, place)
        axes.plot(values, truth, "o", color=BLUE)
        axes.set_title(f"rank correlation {rank:+.2f}" if np.isfinite(rank) else " ", fontsize=9)
        axes.set(xlabel=name, ylabel="consistency" if place % 2 else "")
        axes.margins(0.15)
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.yaxis.set_major_locator(MaxNLocator(4))
    return figure


def gallery(entries: Sequence[Sequence[Tile]]) -> Figure:
    """Entries with the same number of tiles, row by row: an anchor followed by its neighbours."""
    length, gap = len(entries[0]), 0.08
    columns = max(1, 8 // length)
    side = min(0.9, (WIDTH - 0.15 * (columns + 1)) / (columns * length) - gap)
    words = [[_two_lines(tile.name, side, 8) for tile in entry] for entry in entries]
    pitch = side + 0.16 + 0.13 * max(len(lines) for entry in words for lines in entry)
    figure, axes = _sheet(0.06 + pitch * -(-len(entries) // columns))
    for place, entry in enumerate(entries):
        left = 0.15 + place % columns * (length * (side + gap) + 0.15)
        top = 0.08 + place // columns * pitch
        for number, tile in enumerate(entry):
            x = left + number * (side + gap)
            _paste(axes, tile, x, top, side)
            for line, text in enumerate(words[place][number]):
                axes.text(x + side / 2, top + side + 0.12 + 0.13 * line, text, fontsize=8, ha="center", va="center")
    return figure


def _two_lines(name: str, inches: float, size: float) -> list[str]:
    """The name in at most two lines, broken between words, or within the first word if it is too long."""
    if not name or fit(name, inches, size) == name:
        return [name] if name else []
    room = len(fit(name, inches, size)) - 1
    breaks = [place + (letter == "-") for place, letter in enumerate(name[:room]) if place and letter in " -"]
    place = breaks[-1] if breaks else room
    return [name[:place], fit(name[place:].lstrip(), inches, size)]


def voters(rows: Sequence[tuple[Sequence[Tile], str, Sequence[tuple[float, bool]]]]) -> Figure:
    """Test images, each followed by its nearest training images.

    Args:
        rows: for each test image its tiles, the test image first; a sentence above them; and the votes of the leading
            classes: the share, and whether it is the true class.
    """
    side = (WIDTH - 0.55) / max(len(tiles) for tiles, _, _ in rows) - 0.06
    pitch = side + 0.52
    figure, axes = _sheet(0.05 + pitch * len(rows))
    for place, (tiles, sentence, votes) in enumerate(rows):
        top = 0.05 + place * pitch
        axes.text(0.15, top + 0.11, fit(sentence, WIDTH - 0.3, 9), fontsize=9, va="center")
        end = 0.15
        for share, true in votes:
            width = share * (WIDTH - 0.3)
            colour = EQUAL if true else OTHER
            axes.add_patch(Rectangle((end, top + 0.22), width, 0.09, fc=colour, ec="white", lw=1))
            end += width
        axes.add_patch(Rectangle((end, top + 0.22), WIDTH - 0.15 - end, 0.09, fc="#e4e6ea", lw=0))
        for number, tile in enumerate(tiles):
            _paste(axes, tile, 0.15 + number * (side + 0.06) + (0.2 if number else 0), top + 0.37, side)
    return figure


def _sheet(height: float) -> tuple[Figure, Axes]:
    """An empty figure with coordinates in inches from the upper left corner."""
    figure = Figure(figsize=(WIDTH, height))
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(height, 0))
    axes.set_axis_off()
    return figure, axes


def _paste(axes: Axes, tile: Tile, left: float, top: float, side: float) -> None:
    """Draws an image in a square without changing its proportions. Frames of mistakes are dashed as well as red."""
    picture = Image.fromarray(tile.image)
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    width, height = (side * edge / max(picture.size) for edge in picture.size)
    x, y = left + (side - width) / 2, top + (side - height) / 2
    small = max(picture.size) <= THUMBNAIL // 2  # keeps the pixels of small images visible
    place = (x, x + width, y + height, y)
    axes.imshow(picture, extent=place, aspect="auto", interpolation="nearest" if small else "antialiased")
    axes.set(xlim=axes.get_xlim(), ylim=axes.get_ylim())
    if tile.same is not None:
        colour, dashes = (EQUAL, "-") if tile.same else (OTHER, (0, (2, 1)))
        axes.add_patch(Rectangle((x, y), width, height, fill=False, ec=colour, lw=2.5, ls=dashes))


def class_colours(classes: int) -> np.ndarray:
    """(C, 4), a colour for each class: distinct ones up to 20 classes, evenly spaced hues for more."""
    if classes <= 20:
        return np.asarray(matplotlib.colormaps["tab10" if classes <= 10 else "tab20"](np.arange(classes)))
    return np.asarray(matplotlib.colormaps["hsv"](np.arange(classes) / classes))


def embedding_map(points: np.ndarray, labels: np.ndarray | None, names: Sequence[str]) -> Figure:
    """Points (P, 2), coloured by their class (P,) of ``names`` (C); the legend names at most ``LEGEND`` classes."""
    figure = _figure(4.4)
    axes = figure.add_subplot()
    axes.set(xticks=[], yticks=[])
    axes.spines[["left", "bottom"]].set_visible(False)
    size = 60 / max(2, len(points) ** 0.4)
    if labels is None:
        axes.scatter(points[:, 0], points[:, 1], s=size, color=BLUE, lw=0, alpha=0.7)
        return figure
    palette = class_colours(len(names))
    axes.scatter(points[:, 0], points[:, 1], s=size, color=palette[labels], lw=0, alpha=0.8)
    shown = np.unique(np.linspace(0, len(names) - 1, min(LEGEND, len(names))).round().astype(int))
    for number in shown:
        axes.scatter([], [], s=40, color=palette[number], label=fit(names[number], 1.2, 9))
    figure.legend(loc="outside right center", fontsize=9, handletextpad=0.2)
    return figure


def confusion(counts: np.ndarray, names: Sequence[str]) -> Figure:
    """A confusion matrix (C, C), true classes in rows, as shares of each row."""
    group = -(-len(counts) // CELLS)
    starts = np.arange(0, len(counts), group)
    cells = np.add.reduceat(np.add.reduceat(counts, starts, axis=0), starts, axis=1)
    shares = cells / np.maximum(cells.sum(axis=1, keepdims=True), 1)
    figure = _figure(4.7)
    axes = figure.add_subplot()
    axes.grid(False)
    picture = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
    figure.colorbar(picture, format=PercentFormatter(1), shrink=0.6, label="share of the true class")
    named = len(counts) <= NAMED
    unit = "" if named else ", by number" if group == 1 else f", by number, {group} to a cell"
    axes.set(xlabel=f"predicted class{unit}", ylabel=f"true class{unit}")
    if named:
        size = 9 if len(names) <= 16 else 7
        labels = [fit(name, 1.0, size) for name in names]
        axes.set_xticks(range(len(names)), labels, rotation=90, fontsize=size)
        axes.set_yticks(range(len(names)), labels, fontsize=size)
    else:
        locator = MaxNLocator(6, integer=True)
        ticks = [int(tick) for tick in locator.tick_values(0, len(counts) - 1) if 0 <= tick < len(counts)]
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_ticks([(tick + 0.5) / group - 0.5 for tick in ticks], [str(tick) for tick in ticks])
    if len(counts) <= 12:
        for (row, column), count in np.ndenumerate(counts):
            ink = "white" if shares[row, column] > 0.4 else "black"
            axes.text(column, row, str(count) if count else "", ha="center", va="center", color=ink, fontsize=8)
    return figure
