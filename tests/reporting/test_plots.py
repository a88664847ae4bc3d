"""The figures, read back from the matplotlib objects."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from PIL import Image

from lib.reporting import plots
from lib.reporting.plots import Tile

RNG = np.random.default_rng(3)
LONG = ["golden retriever", "three-toed sloth", "WWWWWWWWWWWWWW", "it costs $5 or $6", "a", "Donaudampfschifffahrt"]


@pytest.fixture(autouse=True)
def styled() -> Iterator[None]:
    with plots.style():
        yield


def names(classes: int) -> list[str]:
    return [f"{LONG[number % len(LONG)]} {number}" for number in range(classes)]


def read(figure: Figure) -> Image.Image:
    picture = Image.open(io.BytesIO(plots.render(figure, 60)))
    picture.load()
    return picture


def shown_texts(figure: Figure) -> list[Text]:
    """Every text that is drawn, without tick labels beyond the ends of an axis."""
    figure.canvas.draw()
    hidden: set[Text] = set()
    for axes in figure.findobj(matplotlib.axes.Axes):
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            room = (high - low) * 1e-6
            for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()]:
                if not axes.axison or not low - room <= tick.get_loc() <= high + room:
                    hidden |= {tick.label1, tick.label2}
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    return [text for text in texts if text not in hidden]


def assert_readable(figure: Figure) -> None:
    """Checks that no text is clipped at the edge, overlaps another text, or is very small."""
    texts = shown_texts(figure)
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts]
    for text in texts:
        assert text.get_fontsize() >= 7, text
    for word, box in boxes:
        assert box.x0 >= -1 and box.y0 >= -1, word
        assert box.x1 <= figure.bbox.x1 + 1 and box.y1 <= figure.bbox.y1 + 1, word
    for place, (word, box) in enumerate(boxes):
        for other, beside in boxes[place + 1 :]:
            wide = min(box.x1, beside.x1) - max(box.x0, beside.x0)
            high = min(box.y1, beside.y1) - max(box.y0, beside.y0)
            assert wide <= 1 or high <= 1, (word, other)


def epochs(rounds: int, each: int) -> tuple[np.ndarray, np.ndarray]:
    """Rounds (E,) and some values (E,)."""
    return np.repeat(np.arange(rounds), each), RNG.random(rounds * each)


def tiles(count: int, name: str, side: int = 8) -> list[Tile]:
    image = RNG.integers(0, 256, (side, side * 2, 3), dtype=np.uint8)
    return [Tile(image, name), *(Tile(image, name, bool(k % 2)) for k in range(count - 1))]


def histogram_rounds(rounds: int) -> list[tuple[int, np.ndarray, np.ndarray]]:
    return [(r, entropy := RNG.random(80), entropy < 0.2 * r) for r in range(1, rounds + 1)]


PICTURES: dict[str, Callable[[], Figure]] = {
    "two epochs": lambda: plots.curves({"loss": RNG.random(2)}, np.array([0, 1]), "loss"),
    "40 epochs": lambda: plots.curves(
        {"top-1": epochs(5, 8)[1], "top-5": epochs(5, 8)[1]},
        epochs(5, 8)[0],
        "accuracy",
        percent=True,
        marks={"last epoch of a round": epochs(5, 8)[1], "best epoch of a round": epochs(5, 8)[1]},
    ),
    "60 rounds": lambda: plots.curves({"loss": epochs(60, 30)[1] * 1e6}, epochs(60, 30)[0], "loss"),
    "quantiles": lambda: plots.quantiles(np.sort(RNG.random((40, 5)), axis=1), epochs(5, 8)[0], 50_000),
    "consistency, 1": lambda: plots.consistency(np.array([0.25]), np.array([1.0]), [1]),
    "consistency, 4": lambda: plots.consistency(np.arange(1, 5) / 4, np.array([0.98, 0.96, 0.94, 0.87]), [1, 2, 3, 4]),
    "consistency, 40": lambda: plots.consistency(np.arange(40) / 40, np.linspace(0.9, 0.5, 40), list(range(40))),
    "histogram": lambda: plots.histograms(histogram_rounds(1)),
    "histograms": lambda: plots.histograms(histogram_rounds(6)),
    "follows 1": lambda: plots.follows({"median entropy, nats": (RNG.random(4), RNG.random(4), -0.4)}),
    "follows 5": lambda: plots.follows(
        {f"reciprocal neighbours {k}": (RNG.random(4), RNG.random(4), np.nan) for k in range(5)}
    ),
    **{
        f"gallery {length} {name}": lambda length=length, name=name: plots.gallery([tiles(length, name)] * 9)
        for length in (2, 3, 4, 6)
        for name in ("", LONG[1], LONG[2])
    },
    "voters": lambda: plots.voters([(tiles(9, ""), ", ".join(LONG) * 2, [(0.6, True), (0.3, False)])] * 8),
    "one voter": lambda: plots.voters([(tiles(2, ""), "a, right", [(1.0, True)])]),
    "map": lambda: plots.embedding_map(RNG.normal(size=(50, 2)), None, []),
    **{
        f"map {c}": lambda c=c: plots.embedding_map(RNG.normal(size=(60, 2)), RNG.integers(0, c, 60), names(c))
        for c in (1, 10, 20, 30, 1000)
    },
    **{
        f"confusion {c}": lambda c=c: plots.confusion(RNG.integers(0, 300, (c, c)), names(c))
        for c in (1, 2, 10, 12, 20, 30, 31, 100, 101, 1000)
    },
}


@pytest.mark.parametrize("name", PICTURES)
def test_every_figure_is_readable_and_has_the_common_width(name: str) -> None:
    figure = PICTURES[name]()
    assert figure.get_figwidth() == plots.WIDTH
    assert read(figure).width == round(60 * plots.WIDTH)
    assert_readable(figure)


def test_readability_check_can_fail() -> None:
    figure = plots.curves({"loss": np.arange(2.0)}, np.zeros(2, int), "loss")
    figure.axes[0].text(1.5, 0.5, "over")
    figure.axes[0].text(1.5, 0.5, "another")
    with pytest.raises(AssertionError, match="over"):
        assert_readable(figure)


def test_matplotlib_settings_of_the_user_are_ignored_and_kept() -> None:
    def draw() -> bytes:
        with plots.style():
            return plots.render(plots.consistency(np.array([0.2, 0.4]), np.array([0.9, 0.8]), [1, 2]), 60)

    expected = draw()
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "text.usetex": True}):
        before = dict(matplotlib.rcParams)
        assert draw() == expected
        assert dict(matplotlib.rcParams) == before


def test_text_is_shortened_to_the_given_width() -> None:
    figure = plots.curves({"loss": np.arange(2.0)}, np.zeros(2, int), "loss")
    for name in [*LONG, "i" * 500, "m" * 500]:
        for inches in (0.3, 0.7, 1.3):
            kept = plots.fit(name, inches, 8)
            drawn = figure.text(0, 0, kept, fontsize=8).get_window_extent().width / figure.dpi
            assert drawn <= inches + 0.02
            assert kept == name or (kept.endswith("…") and name.startswith(kept[:-1]))
            longer = figure.text(0, 0, name[: len(kept) + 1] + "…", fontsize=8).get_window_extent().width / figure.dpi
            assert kept == name or len(kept) > 100 or longer > inches - 0.05


@pytest.mark.parametrize("name", ["猫", "", "tab\tbed", "line\nbreak", "\udcff"])
def test_name_without_glyphs_in_the_font_becomes_a_number(name: str) -> None:
    assert plots.writable(name, 7) == "class 7"


@pytest.mark.parametrize("name", ["été", "$x^2$", "<script>", "собака"])
def test_other_names_are_unchanged(name: str) -> None:
    assert plots.writable(name, 7) == name
    figure = plots.confusion(np.eye(1, dtype=int), [name])
    assert name in [text.get_text() for text in shown_texts(figure)]
    read(figure)


def test_curves_omit_nonfinite_values() -> None:
    values = np.array([3.0, np.nan, 2.0, np.inf, 1.0])
    figure = plots.curves({"loss": values}, np.array([0, 0, 1, 1, 2]), "loss")
    axes = figure.axes[0]
    line, *starts = axes.lines
    assert list(line.get_xdata()) == [1, 3, 5] and list(line.get_ydata()) == [3, 2, 1]
    assert [start.get_xdata()[0] for start in starts] == [2.5, 4.5]
    assert {"0", "1", "2"} <= {text.get_text() for text in shown_texts(figure)}


def test_entropy_plot_shows_the_maximum_entropy() -> None:
    values = np.sort(RNG.random((4, 5)), axis=1)
    figure = plots.quantiles(values, np.zeros(4, int), 587)
    levels = [line.get_ydata()[0] for line in figure.axes[0].lines if line.get_linestyle() == "--"]
    assert levels == [pytest.approx(np.log(587))]
    assert figure.axes[0].get_ylim()[1] > np.log(587)
    assert "ln N = 6.38" in [text.get_text() for text in figure.legends[0].get_texts()]


def test_entropy_histograms_show_counts_and_the_threshold() -> None:
    entropy = np.array([1.0, 1.1, 1.2, 2.0, 2.1, 3.0])
    chosen = np.array([True, True, True, True, False, False])
    figure = plots.histograms([(2, entropy, chosen), (3, entropy, np.ones(6, bool))])
    first, second = figure.axes
    anchors, others = first.containers
    assert [sum(bar.get_height() for bar in bars) for bars in (anchors, others)] == [4, 2]
    edges = [(bar.get_x(), bar.get_x() + bar.get_width(), bar.get_height()) for bar in anchors]
    assert edges[0][0] == pytest.approx(1) and len(edges) == 60
    for low, high, count in edges:  # a value on an edge may count to either bin
        inside = sum(1 for value in entropy[chosen] if low + 1e-9 < value < high - 1e-9)
        assert inside <= count <= sum(1 for value in entropy[chosen] if low - 1e-9 <= value <= high + 1e-9)
    assert [line.get_xdata()[0] for line in first.lines] == [2.0]
    assert not second.lines  # all samples are anchors, so there is no threshold
    assert first.get_title(loc="left") == "round 2: 67% are anchors"


def test_consistency_is_plotted_over_the_share_of_anchors() -> None:
    figure = plots.consistency(np.array([0.25, 0.5]), np.array([0.9, 0.8]), [1, 2])
    assert figure.axes[0].lines[0].get_xydata().tolist() == [[0.25, 0.9], [0.5, 0.8]]
    assert [text.get_text() for text in figure.axes[0].texts] == ["1", "2"]


def test_frames_show_equal_labels_and_images_keep_proportions() -> None:
    wide = np.zeros((10, 40, 3), np.uint8)
    figure = plots.gallery([[Tile(wide, "a"), *(Tile(wide, "b", same) for same in (True, False, None))]])
    axes = figure.axes[0]
    frames = [(to_hex(patch.get_edgecolor()), patch.get_linestyle() == "-") for patch in axes.patches]
    assert frames == [(plots.EQUAL, True), (plots.OTHER, False)]  # and no frame if a label is unknown
    for image in axes.images:
        left, right, bottom, top = image.get_extent()
        assert right - left == pytest.approx(4 * (bottom - top))
    starts = [image.get_extent()[0] for image in axes.images]
    assert starts == sorted(starts) and axes.texts[0].get_text() == "a" and len(axes.texts) == 4


def test_large_images_are_reduced_before_drawing() -> None:
    figure = plots.gallery([tiles(2, "", side=1500)])
    assert {max(image.get_array().shape) for image in figure.axes[0].images} == {plots.THUMBNAIL}


def test_vote_bar_segments_are_proportional_to_the_shares() -> None:
    figure = plots.voters([(tiles(3, ""), "cat", [(0.5, False), (0.25, True)])])
    bars = [patch for patch in figure.axes[0].patches if isinstance(patch, Rectangle) and patch.get_fill()]
    lengths = [bar.get_width() / sum(each.get_width() for each in bars) for bar in bars]
    assert lengths == pytest.approx([0.5, 0.25, 0.25])
    assert [to_hex(bar.get_facecolor()) for bar in bars[:2]] == [plots.OTHER, plots.EQUAL]


@pytest.mark.parametrize("classes", [1, 10, 11, 20, 21, 1000])
def test_every_class_has_a_colour(classes: int) -> None:
    found = plots.class_colours(classes)
    assert found.shape == (classes, 4)
    if classes <= 21:
        assert len({tuple(colour) for colour in found.tolist()}) == classes


def test_map_points_have_the_colours_of_the_legend() -> None:
    labels = np.array([0, 2, 2, 1])
    figure = plots.embedding_map(np.arange(8.0).reshape(4, 2), labels, ["a", "b", "c"])
    points, *entries = figure.axes[0].collections
    key = [entry.get_facecolor()[0][:3].tolist() for entry in entries]
    assert [colour[:3].tolist() for colour in points.get_facecolor()] == [key[label] for label in labels]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b", "c"]
    assert points.get_offsets().tolist() == np.arange(8.0).reshape(4, 2).tolist()


def test_legend_names_at_most_twenty_classes() -> None:
    figure = plots.embedding_map(np.zeros((5, 2)), np.arange(5), names(1000))
    named = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(named) == 20 and named[0].startswith("golden")


@pytest.mark.parametrize("classes", [3, 100, 250])
def test_confusion_matrix_shows_shares_of_the_true_class(classes: int) -> None:
    counts = RNG.integers(0, 5, (classes, classes))
    counts[-1] = 0  # a class without test images
    drawn = np.asarray(plots.confusion(counts, names(classes)).axes[0].images[0].get_array())
    group = 1 if classes <= 100 else 3
    assert drawn.shape == (-(-classes // group),) * 2
    for row in {0, 1, len(drawn) - 1}:
        rows = range(row * group, min((row + 1) * group, classes))
        total = sum(int(counts[a, b]) for a in rows for b in range(classes))
        for column in range(len(drawn)):
            columns = range(column * group, min((column + 1) * group, classes))
            cell = sum(int(counts[a, b]) for a in rows for b in columns)
            assert drawn[row, column] == pytest.approx(cell / total if total else 0)


def test_confusion_matrix_of_few_classes_shows_counts() -> None:
    figure = plots.confusion(np.array([[5, 2], [0, 7]]), ["a", "b"])
    where = {tuple(map(float, text.get_position())): text.get_text() for text in figure.axes[0].texts}
    assert where == {(0, 0): "5", (1, 0): "2", (0, 1): "", (1, 1): "7"}
