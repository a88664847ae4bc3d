"""The report page of a run: its content compared with plain loops, and reports with missing data."""

from __future__ import annotations

import base64
import hashlib
import io
import itertools
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from PIL import Image
from scipy.stats import spearmanr

import oracles
from lib.evaluation.findings import IDENTICAL, Findings, find
from lib.reporting import image_findings, page, plots, test_figures, training_figures
from lib.reporting.report_data import Discovered, ReportData
from lib.reporting.report_data import Tested as Judged
from lib.reporting.training_figures import QUANTILES
from runs import LIMIT

N, D, M, K, VOTERS, SIGMA = 60, 6, 25, 2, 7, 0.1
EVIL = '<script>alert("1")</script>'
CLASSES = (EVIL, "<b>bold&amp;", "$x^2$ \udcff")
PARTS = "accuracy loss consistency entropy surest random mistakes quantiles reciprocal kept drift hubness orphans"
PARTS += " largest_hub follows map confusion voters"
DRAWN = len(PARTS.split()) - 1  # ``metrics`` below has no values of "kept", so that is not drawn


def image(number: int, height: int = 8, width: int = 8) -> np.ndarray:
    """An image whose pixels have the value of its number."""
    return np.full((height, width, 3), number, np.uint8)


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def discovered(number: int, features: np.ndarray) -> Discovered:
    entropy = oracles.entropies(features, 0.3)
    anchors = oracles.anchors(entropy, 15 * number)
    neighbours = [oracles.neighbours(features, anchor, K) for anchor in anchors]
    nearest = [
        [oracles.dot(features[a], features[b]) for b in near] for a, near in zip(anchors, neighbours, strict=True)
    ]
    return Discovered(number, entropy, np.array(anchors), np.array(neighbours), np.array(nearest))


def metrics(rounds: int = 4, epochs: int = 3) -> list[dict[str, Any]]:
    top1 = iter([0.2, 0.4, 0.3, 0.5, 0.45, 0.44, 0.3, 0.2, 0.3, 0.61, 0.7123, 0.6789])
    rows = []
    for number in range(rounds):
        best = 0.0
        for epoch in range(epochs):
            now = next(top1)
            best = max(best, now)
            row = {"round": number, "epoch": epoch, "anchors": 15 * number, "loss": 5 - number, "top1": now}
            row |= {"consistency": [None, 0.9, 0.7, 0.8][number], "top5": 0.9, "best_top1": best}
            row |= {"learning_rate": 0.1, "images_per_s": 10.0, "train_s": 600.0, "evaluate_s": 60.0}
            row |= {
                **dict(zip(QUANTILES, (1.0, 2.0, 3.0 - number, 4.0, 5.0), strict=True)),
                "reciprocal": 0.1 * number + 0.01 * epoch,
            }
            row |= {"drift": 0.5, "hubness": [0, 3, 1, 2][number] + 0.1 * epoch}
            rows.append(row | {"orphans": 0.4, "largest_hub": 0.02})
    return rows


def file_name(number: int) -> str:
    return f"train/{EVIL} <i>\udcff{number}</i>.png"


def with_findings(given: ReportData) -> ReportData:
    """Report data with the findings in all of its images."""
    found = find(given.features, given.labels, neighbours=5, resolution=1.0, seed=0)
    every, none = np.arange(len(given.images)), np.zeros(len(given.images), bool)
    return replace(given, findings=found, searched=every, indices=every, blank=none, noisy=none)


def few(count: int, *, alike: bool = False, labelled: bool = True) -> ReportData:
    """Report data of the first images only."""
    given = full_report_data()
    features = np.repeat(given.features[:1], count, axis=0) if alike else given.features[:count]
    images, names = given.images[:count], [file_name(number) for number in range(count)]
    labels = given.labels[:count] if labelled and given.labels is not None else None
    return with_findings(
        replace(given, images=images, labels=labels, features=features, names=names, rounds=(), tested=None)
    )


def full_report_data() -> ReportData:
    rng = np.random.default_rng(5)
    labels, test_labels = rng.integers(0, 3, N), rng.integers(0, 3, M)
    centres = rng.normal(size=(3, D))
    features = unit(centres[labels] + rng.normal(size=(N, D)))
    tested = Judged(
        images=[image(200 + number) for number in range(M)],
        labels=test_labels,
        features=unit(centres[test_labels] + 2 * rng.normal(size=(M, D))),
        protocol=f"weighted kNN (K={VOTERS}, sigma={SIGMA}), features <i>recomputed</i>",
        k=VOTERS,
        sigma=SIGMA,
    )
    given = ReportData(
        name=f"run {EVIL}",
        facts={"versions": "python 3", "commit <b>": "<i>x</i>"},
        options={"dataset": "<u>digits</u>", "lr_schedule": None, "long": "y" * 5000},
        metrics=metrics(),
        protocol="kNN <i>bank</i>",
        published="86.3 % weighted kNN (https://arxiv.org/abs/2002.12158)",
        rounds=[discovered(number, features) for number in (1, 2, 3)],
        images=[image(number) for number in range(N)],
        labels=labels,
        classes=CLASSES,
        features=features,
        tested=tested,
        finished=True,
        findings="",
        searched=np.arange(N),
        indices=np.arange(N),
        blank=np.zeros(N, bool),
        noisy=np.zeros(N, bool),
        names=[file_name(number) for number in range(N)],
    )
    return with_findings(given)


class Page(HTMLParser):
    """Parses a page: its tags with attributes, its text, and the text of each section by heading."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.parts, self.cells = "", {}, []
        self._open, self._heading = "", ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open = tag
        if tag in ("h2", "h3"):
            self._heading = ""
        elif tag == "tr":
            self.cells.append([])

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._open in ("h2", "h3") and not self._heading:
            self._heading = data
            self.parts[data] = ""
        elif self._heading:
            self.parts[self._heading] += data
        if self._open in ("td", "th") and data.strip():
            self.cells[-1].append(data)

    def images(self) -> list[dict[str, str | None]]:
        """The figures without thumbnails."""
        return [each for tag, each in self.tags if tag == "img" and each.get("class") != "thumb"]

    def thumbs(self) -> list[str]:
        """File names of the thumbnails, in order."""
        return [str(each["alt"]) for tag, each in self.tags if tag == "img" and each.get("class") == "thumb"]


class PlotCalls:
    """Records the calls of ``plots`` by function name: positional and named arguments."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.calls: dict[str, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}
        for name in "curves quantiles consistency histograms follows gallery voters embedding_map confusion".split():
            patch.setattr(plots, name, self._recorder(name, getattr(plots, name)))

    def _recorder(self, name: str, draw: Callable[..., Any]) -> Callable[..., Any]:
        def record(*args: Any, **named: Any) -> Any:
            self.calls.setdefault(name, []).append((args, named))
            return draw(*args, **named)

        return record


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures of low resolution take less time."""
    monkeypatch.setattr(page, "RESOLUTIONS", (40,))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, PlotCalls]]:
    """The report of ``full_report_data`` at the first real resolution, and the plots drawn."""
    folder = tmp_path_factory.mktemp("session")
    with pytest.MonkeyPatch.context() as patch:
        drawn = PlotCalls(patch)
        assert page.write(full_report_data(), folder) == folder / "report.html"
    yield folder, drawn


def old_report(folder: Path) -> bytes:
    """Writes an earlier report to the folder; returns the bytes of the page."""
    (folder / "report").mkdir()
    for name in PARTS.split():
        (folder / "report" / f"{name}.png").write_bytes(b"old picture")
    (folder / "report.html").write_bytes(b"old page")
    return b"old page"


def missing(given: ReportData, folder: Path) -> dict[str, str]:
    """The text of each section without a figure."""
    shown = Page(page.write(given, folder))
    titles = re.findall(r'<h3>([^<]*)</h3>\s*<p class="missing">', (folder / "report.html").read_text("utf-8"))
    return {title: shown.parts[title].strip() for title in titles}


def test_page_embeds_its_images_and_loads_no_other_file(written: tuple[Path, PlotCalls]) -> None:
    folder, _ = written
    page, source = Page(folder / "report.html"), (folder / "report.html").read_text("utf-8")
    for tag, attributes in page.tags:
        assert tag not in ("iframe", "object", "embed", "base", "form")
        for name in ("src", "href", "srcset", "data", "action", "poster", "style", "onload"):
            value = attributes.get(name)
            assert value is None or (value.startswith(("data:", "#")) and name in ("src", "href"))
    assert "url(" not in source and "@import" not in source
    files = {path.read_bytes(): path.stem for path in (folder / "report").iterdir()}
    held = [base64.b64decode((each["src"] or "").removeprefix("data:image/png;base64,")) for each in page.images()]
    assert sorted(files[data] for data in held) == sorted(set(PARTS.split()) - {"kept"})  # no row has "kept"
    for data in held:
        Image.open(io.BytesIO(data)).verify()
    assert sorted(path.name for path in folder.iterdir()) == ["report", "report.html"]


def test_content_security_policy_allows_only_the_own_script(written: tuple[Path, PlotCalls]) -> None:
    source = (written[0] / "report.html").read_text("utf-8")
    scripts = re.findall(r"<script([^>]*)>(.*?)</script>", source, re.DOTALL)
    assert [attributes for attributes, _ in scripts] == [' type="application/json" id="map-data"', ""]
    digest = base64.b64encode(hashlib.sha256(scripts[1][1].encode()).digest()).decode()
    policy = next(str(each["content"]) for tag, each in Page(written[0] / "report.html").tags if "http-equiv" in each)
    assert f"script-src 'sha256-{digest}'" in policy and policy.startswith("default-src 'none'; img-src data:;")


def test_headings_links_and_alt_texts_are_consistent(written: tuple[Path, PlotCalls]) -> None:
    page = Page(written[0] / "report.html")
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    targets = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    links = [str(attributes["href"]) for tag, attributes in page.tags if tag == "a"]
    assert len(links) == 11 and {link.removeprefix("#") for link in links} <= targets
    alts = [str(each["alt"]) for each in page.images()]
    assert len(set(alts)) == len(alts) == DRAWN and all(len(alt) > 20 for alt in alts)
    assert ("html", {"lang": "en"}) in page.tags
    assert any(attributes.get("name") == "viewport" for _, attributes in page.tags)


def test_names_are_escaped_in_the_html(written: tuple[Path, PlotCalls]) -> None:
    shown = Page(written[0] / "report.html")
    assert not {tag for tag, _ in shown.tags} & {"b", "i", "u"}
    names = {file_name(number).encode("utf-8", "backslashreplace").decode() for number in range(N)}
    assert shown.thumbs() and set(shown.thumbs()) <= names
    for text in (f"run {EVIL}", "commit <b>", "<i>x</i>", "<u>digits</u>", "kNN <i>bank</i>", "<i>recomputed</i>"):
        assert text in shown.text
    cells = [cell for row in shown.cells for cell in row]
    assert EVIL in cells and "<b>bold&amp;" in cells and "$x^2$ \\udcff" in cells
    assert "not set" in cells and f"{'y' * page.TEXT}…" in cells


def test_summary_shows_last_best_and_published_accuracy(written: tuple[Path, PlotCalls]) -> None:
    source = (written[0] / "report.html").read_text("utf-8")
    cards = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", source))
    assert cards["top-1, last epoch"] == "67.89%"
    assert cards["top-1, best epoch of the last round"] == "71.23%"
    assert cards["published"] == full_report_data().published
    assert (cards["rounds"], cards["epochs"], cards["time of these epochs"]) == ("4", "12", "2 h 12 min")
    assert "a finished run" in Page(written[0] / "report.html").text


def test_warning_is_shown_at_the_top(written: tuple[Path, PlotCalls], tmp_path: Path) -> None:
    assert 'class="warning"' not in (written[0] / "report.html").read_text("utf-8")
    page.write(replace(full_report_data(), warning="round 0, epoch 10: all <b>alike</b>"), tmp_path)
    source = (tmp_path / "report.html").read_text("utf-8")
    assert source.index("round 0, epoch 10: all &lt;b&gt;alike") < source.index('<dl class="cards">')


def test_table_of_rounds_shows_the_last_epoch_of_each(written: tuple[Path, PlotCalls]) -> None:
    rows = Page(written[0] / "report.html").cells
    assert "top-1 last" in rows[0] and "top-1 best" in rows[0]
    assert rows[1] == ["0", "3", "0 (0%)", "-", "5.0000", "30.00%", "40.00%", "90.00%"]
    assert rows[4] == ["3", "3", "45 (75%)", "80.0%", "2.0000", "67.89%", "71.23%", "90.00%"]


def test_accuracy_plot_marks_last_and_best_epoch_of_each_round(written: tuple[Path, PlotCalls]) -> None:
    (args, named), *_ = written[1].calls["curves"]
    marks = {
        name: dict(zip(np.isfinite(m).nonzero()[0], m[np.isfinite(m)], strict=True))
        for name, m in named["marks"].items()
    }
    assert marks["last epoch of a round"] == {2: 0.3, 5: 0.44, 8: 0.3, 11: 0.6789}
    assert marks["best epoch of a round"] == {1: 0.4, 3: 0.5, 8: 0.3, 10: 0.7123}
    assert args[1].tolist() == [number for number in range(4) for _ in range(3)]
    text = Page(written[0] / "report.html").parts["Accuracy"]
    assert "kNN <i>bank</i>" in text and "chosen by the test labels" in text


def test_consistency_equals_the_oracle(written: tuple[Path, PlotCalls]) -> None:
    given = full_report_data()
    (shares, values, rounds), _ = written[1].calls["consistency"][0]
    assert shares.tolist() == [0.25, 0.5, 0.75] and rounds == [1, 2, 3]
    for found, value in zip(given.rounds, values, strict=True):
        assert value == pytest.approx(oracles.consistency(found.anchors, found.neighbours, given.labels))


def test_galleries_show_certain_random_and_worst_anchors(written: tuple[Path, PlotCalls]) -> None:
    given, found = full_report_data(), full_report_data().rounds[-1]
    assert given.labels is not None
    surest, drawn, worst = (
        [[int(tile.image[0, 0, 0]) for tile in entry] for entry in args[0]] for args, _ in written[1].calls["gallery"]
    )
    near = dict(zip(found.anchors.tolist(), found.neighbours.tolist(), strict=True))
    assert [entry[0] for entry in surest] == found.anchors[:8].tolist()
    assert len({entry[0] for entry in drawn}) == 8 and [entry[0] for entry in drawn] != found.anchors[:8].tolist()
    for entry in [*surest, *drawn, *worst]:
        assert entry[1:] == near[entry[0]]
    mistakes = []
    for anchor in found.anchors.tolist():
        other = [b for b in near[anchor] if given.labels[b] != given.labels[anchor]]
        if other:
            mistakes.append((-max(oracles.dot(given.features[anchor], given.features[b]) for b in other), anchor))
    assert [entry[0] for entry in worst] == [anchor for _, anchor in sorted(mistakes)][:8]
    for args, _ in written[1].calls["gallery"]:
        for first, *others in args[0]:
            label = given.labels[first.image[0, 0, 0]]
            assert first.same is None and first.name == plots.writable(CLASSES[label], label)
            assert [tile.same for tile in others] == [given.labels[t.image[0, 0, 0]] == label for t in others]
    wrong = sum(given.labels[a] != given.labels[b] for a, several in near.items() for b in several)
    assert f"{wrong} of 90 neighbours have another class" in Page(written[0] / "report.html").parts["Worst mistakes"]


def test_confusion_matrix_and_confused_pairs_equal_the_oracle(written: tuple[Path, PlotCalls]) -> None:
    given = full_report_data()
    tested = given.tested
    assert tested is not None and given.labels is not None
    counts = [[0] * 3 for _ in range(3)]
    for query, truth in zip(tested.features, tested.labels.tolist(), strict=True):
        scores = oracles.knn_scores(query, given.features, given.labels, classes=3, k=VOTERS, sigma=SIGMA)
        counts[truth][int(np.argmax(scores))] += 1
    (shown, _), _ = written[1].calls["confusion"][0]
    assert shown.tolist() == counts
    right = sum(counts[c][c] for c in range(3))
    page = Page(written[0] / "report.html")
    assert f"{right} of 25 test images are classified correctly ({right / 25:.2%})" in page.parts["Confusion matrix"]
    assert tested.protocol in page.parts["Confusion matrix"]
    names = [name.encode("utf-8", "backslashreplace").decode() for name in CLASSES]
    expected = {
        (names[a], names[b], str(counts[a][b]), f"{counts[a][b] / sum(counts[a]):.1%}")
        for a in range(3)
        for b in range(3)
        if a != b and counts[a][b]
    }
    start = next(place for place, row in enumerate(page.cells) if row[:1] == ["true class"]) + 1
    rows = page.cells[start : start + len(expected)]
    assert {tuple(row) for row in rows} == expected
    assert [int(row[2]) for row in rows] == sorted((int(row[2]) for row in rows), reverse=True)


def test_shown_neighbours_and_votes_equal_the_oracle(written: tuple[Path, PlotCalls]) -> None:
    given = full_report_data()
    tested = given.tested
    assert tested is not None and given.labels is not None
    (rows,), _ = written[1].calls["voters"][0]
    surest: dict[int, float] = {}
    for number, (query, truth) in enumerate(zip(tested.features, tested.labels, strict=True)):
        scores = oracles.knn_scores(query, given.features, given.labels, classes=3, k=VOTERS, sigma=SIGMA)
        if int(np.argmax(scores)) != truth:
            surest[number] = scores.max()
    shown = [int(tiles[0].image[0, 0, 0]) - 200 for tiles, _, _ in rows]
    assert len(set(shown[:4])) == 4 and not set(shown[:4]) & set(surest)
    assert shown[4:] == sorted(surest, key=lambda number: -surest[number])[:4]
    for number, (tiles, sentence, votes) in zip(shown, rows, strict=True):
        query, truth = tested.features[number], tested.labels[number]
        similarity = [oracles.dot(query, row) for row in given.features]
        nearest = sorted(range(N), key=lambda j: -similarity[j])[:VOTERS]
        assert [int(tile.image[0, 0, 0]) for tile in tiles[1:]] == nearest
        assert [tile.same for tile in tiles[1:]] == [given.labels[j] == truth for j in nearest]
        scores = oracles.knn_scores(query, given.features, given.labels, classes=3, k=VOTERS, sigma=SIGMA)
        order = [c for c in sorted(range(3), key=lambda c: -scores[c]) if scores[c] >= 0.005]
        assert [true for _, true in votes] == [c == truth for c in order]
        assert [share for share, _ in votes] == pytest.approx([scores[c] for c in order], abs=1e-5)
        assert (", wrong. Votes: " in sentence) == (number in surest)
        assert [int(share) for share in re.findall(r"\((\d+)%\)", sentence)] == [round(100 * scores[c]) for c in order]


def answer(title: str, given: ReportData) -> image_findings.Answer:
    return next(each for each in image_findings.answers(given) if each.title == title)


def numbers(row: image_findings.Row) -> list[int]:
    return [int(re.findall(r"\d+", shown.name)[-1]) for shown in row.images]


def with_copies() -> ReportData:
    """As ``full_report_data``, but images 7 and 31 have the embedding of image 4."""
    features = full_report_data().features.copy()
    features[[7, 31]] = features[4]
    return with_findings(replace(full_report_data(), features=features))


def test_groups_show_their_most_typical_images() -> None:
    given = with_copies()
    assert isinstance(given.findings, Findings) and given.labels is not None
    groups = given.findings.groups
    shown = answer("Groups", given)
    assert len(shown.rows) == groups.max() + 1
    assert shown.found.startswith(f"{groups.max() + 1} groups of 60 images. The groups are ")
    for number, row in enumerate(shown.rows):
        members = np.flatnonzero(groups == number).tolist()
        mean = {
            i: sum(oracles.dot(given.features[i], given.features[j]) for j in members) / len(members) for i in members
        }
        distinct = [i for i in members if not (i in (7, 31) and 4 in members)]
        assert numbers(row) == sorted(distinct, key=lambda i: -mean[i])[: image_findings.TYPICAL]
        counts = np.bincount(given.labels[members])
        said = f"{len(members)} images ({len(members) / N:.0%}); {counts.max() / len(members):.0%} are "
        assert row.title.startswith(f"Group {number}: {said}{CLASSES[counts.argmax()][:3]}")


def test_duplicates_are_listed_with_the_number_to_remove() -> None:
    shown = answer("Duplicates", with_copies())
    assert shown.found == "2 images could be removed without loss: identical to another one (1 set)."
    assert shown.rows[0].title == "3 images, identical" and numbers(shown.rows[0]) == [4, 7, 31]
    given = with_copies()
    similarity = [float(row.title.rpartition(" ")[2]) for row in shown.rows[1:]]
    assert similarity == sorted(similarity, reverse=True) and len(shown.rows) > 5
    pairs = {(i, j): oracles.dot(given.features[i], given.features[j]) for i in range(N) for j in range(i)}
    best = max((pair for pair in pairs if not {*pair} <= {4, 7, 31}), key=lambda pair: pairs[pair])
    assert {*best} <= {*numbers(shown.rows[1])} and similarity[0] == pytest.approx(pairs[best], abs=1e-4)
    assert pairs[best] < IDENTICAL


def test_outliers_are_listed_once_with_their_copies() -> None:
    given = with_copies()
    assert isinstance(given.findings, Findings)
    scores = given.findings.outlier_scores
    (row,) = answer("Outliers", given).rows
    assert numbers(row) == sorted(set(range(N)) - {7, 31}, key=lambda i: -scores[i])[: image_findings.LISTED]
    assert all(shown.note.startswith(f"{scores[i]:.2f}") for shown, i in zip(row.images, numbers(row), strict=True))
    (row,) = answer("Outliers", few(6, alike=True)).rows
    assert [shown.note for shown in row.images] == ["0.00, 6 copies"]


def test_blank_and_noisy_images_are_listed_before_outliers() -> None:
    given = full_report_data()
    blank, noisy = np.isin(np.arange(N), [3, 9]), np.arange(N) == 14
    shown = answer("Outliers", replace(given, blank=blank, noisy=noisy))
    assert shown.found.startswith("2 images of a single colour, 1 image of noise; ")
    assert [numbers(row) for row in shown.rows[:2]] == [[3, 9], [14]]
    assert not {3, 9, 14} & set(numbers(shown.rows[2])) and len(shown.rows[2].images) == image_findings.LISTED


def test_suspicious_labels_show_the_class_of_the_neighbours() -> None:
    given = with_copies()
    assert isinstance(given.findings, Findings) and given.labels is not None
    labels = given.labels.copy()
    labels[4] = (labels[4] + 1) % 3  # its two copies, which are among its neighbours, keep theirs
    given = with_findings(replace(given, labels=labels))
    (row,) = answer("Labels", given).rows
    found: Findings = given.findings  # type: ignore[assignment]
    shares = []
    for shown, i in zip(row.images, numbers(row), strict=True):
        near = labels[found.neighbours[i]].tolist()
        shares.append(sum(label != labels[i] for label in near))
        most = max(sorted(set(near)), key=near.count)
        assert most != labels[i]
        assert shown.note.startswith(f"labelled {CLASSES[labels[i]][:3]}")
        assert f"; {near.count(most)} of 5 neighbours: {CLASSES[most][:3]}" in shown.note
    assert shares == sorted(shares, reverse=True) and 4 in numbers(row)


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("given", [(1, False), (2, False), (2, True), (6, True)], ids=str)
def test_few_or_identical_images_have_a_report(given: tuple[int, bool], labelled: bool, tmp_path: Path) -> None:
    count, alike = given
    shown = Page(page.write(few(count, alike=alike, labelled=labelled), tmp_path))
    assert f"{image_findings.plural(count, 'image')}" in shown.parts["Groups"]
    assert ("Labels" in shown.parts) == labelled and "Interactive map" not in shown.parts
    if alike:
        assert f"{image_findings.plural(count - 1, 'image')} could be removed without loss" in shown.parts["Duplicates"]


def test_without_file_names_the_index_in_the_data_set_is_shown() -> None:
    given = replace(full_report_data(), names=None, indices=np.arange(N) + 500)
    assert {shown.name for shown in answer("Outliers", given).rows[0].images} <= {f"image {500 + i}" for i in range(N)}


def test_findings_in_a_subset_show_images_of_the_subset(tmp_path: Path) -> None:
    given, searched = full_report_data(), np.arange(1, N, 2)
    assert given.labels is not None
    found = find(given.features[searched], given.labels[searched], neighbours=5, resolution=1.0, seed=0)
    given = replace(given, findings=found, searched=searched)
    for title in ("Groups", "Outliers", "Labels"):
        assert all(number % 2 for row in answer(title, given).rows for number in numbers(row)), title
    assert numbers(answer("Outliers", given).rows[0])[0] == searched[np.argmax(found.outlier_scores)]
    words = " ".join(Page(page.write(given, tmp_path)).parts["Findings"].split())
    assert words.startswith("Of 30 training images drawn at random from 60")


def test_map_data_holds_neighbours_names_and_groups(written: tuple[Path, PlotCalls]) -> None:
    given, source = full_report_data(), (written[0] / "report.html").read_text("utf-8")
    held = re.search(r'id="map-data">(.*?)</script>', source, re.DOTALL)
    assert held and "<" not in held[1]
    data = json.loads(held[1])
    assert isinstance(given.findings, Findings) and given.labels is not None
    assert data["group"] == given.findings.groups.tolist() and data["label"] == given.labels.tolist()
    assert len(data["name"]) == N and data["name"][3] == given.name_of(3)
    for i, near in enumerate(data["near"]):
        exact = sorted((-oracles.dot(given.features[i], given.features[j]), j) for j in range(N) if j != i)
        assert data["alike"][i] == pytest.approx([-value for value, _ in exact[: len(near)]], abs=2e-3)
    assert min(data["x"]) == min(data["y"]) == 0 and max(data["x"]) == max(data["y"]) == 1
    sprite = np.asarray(Image.open(io.BytesIO(base64.b64decode(data["sprite"]))))
    for i in (0, 9, N - 1):
        top, left = (edge * data["side"] for edge in divmod(i, data["columns"]))
        tile = sprite[top : top + data["side"], left : left + data["side"]]
        assert abs(tile.astype(int) - i).max() < 8


def test_health_figures_are_correlated_with_the_consistency(written: tuple[Path, PlotCalls]) -> None:
    (pairs,), _ = written[1].calls["follows"][0]
    assert list(pairs) == [
        "median entropy, nats",
        "reciprocal neighbours",
        "drift of the memory bank",
        "hubness",
        "orphans",
        "largest hub",
    ]
    truth = [0.9, 0.7, 0.8]
    for label, expected in {"reciprocal neighbours": [0.1, 0.2, 0.3], "hubness": [3, 1, 2]}.items():
        values, beside, rank = pairs[label]
        assert values.tolist() == pytest.approx(expected) and beside.tolist() == truth
        assert rank == pytest.approx(spearmanr(expected, truth).statistic)
    assert np.isnan(pairs["drift of the memory bank"][2])  # the drift is constant


def test_map_shows_all_samples_with_their_labels(written: tuple[Path, PlotCalls]) -> None:
    (points, labels, names), _ = written[1].calls["embedding_map"][0]
    assert (
        points.shape == (N, 2) and np.isfinite(points).all() and labels.tolist() == full_report_data().labels.tolist()
    )
    assert names == ['<script>alert("1")</script>', "<b>bold&amp;", "class 2"]
    text = Page(written[0] / "report.html").parts["Map"]
    assert "60 of 60 embeddings of the training images (test transform)" in text
    assert "memory bank" not in text


def test_map_and_confusion_matrix_use_a_subset_of_many_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_figures, "MAPPED", 20)
    monkeypatch.setattr(test_figures, "TESTS", 10)
    drawn = PlotCalls(monkeypatch)
    shown = Page(page.write(full_report_data(), tmp_path))
    assert "20 of 60 embeddings" in shown.parts["Map"] and len(drawn.calls["embedding_map"][0][0][0]) == 20
    assert "of 10 test images, drawn at random from 25, are classified correctly" in shown.parts["Confusion matrix"]
    assert drawn.calls["confusion"][0][0][0].sum() == 10
    given = full_report_data()
    assert given.tested is not None and given.labels is not None
    for tiles, sentence, _ in drawn.calls["voters"][0][0][0]:  # the number of the image, not its place in the subset
        number = int(tiles[0].image[0, 0, 0]) - 200
        assert sentence.startswith(
            f"{plots.fit(plots.all_writable(given.classes)[given.tested.labels[number]], 1.2, 9)}, "
        )
        similarity = [oracles.dot(given.tested.features[number], row) for row in given.features]
        assert int(tiles[1].image[0, 0, 0]) == int(np.argmax(similarity))


def test_plots_are_reproducible_and_keep_matplotlib_settings(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    first = page.write(full_report_data(), tmp_path).read_bytes()
    assert page.write(full_report_data(), tmp_path).read_bytes() == first
    assert dict(matplotlib.rcParams) == before


def test_report_without_labels_omits_figures_of_labels(tmp_path: Path) -> None:
    old_report(tmp_path)
    rows = [row | {"top1": None, "top5": None, "best_top1": None, "consistency": None} for row in metrics()]
    given = replace(full_report_data(), labels=None, classes=(), tested=None, metrics=rows, protocol="", published="")
    given = with_findings(given)
    assert not missing(given, tmp_path)
    page, source = Page(tmp_path / "report.html"), (tmp_path / "report.html").read_text("utf-8")
    assert list(page.parts) == [
        *("Findings", "Groups", "Duplicates", "Outliers", "Interactive map", "Map"),
        *("Training", "Loss", "Discovery", "Entropy and anchor selection", "Most certain anchors", "Random anchors"),
        *("Health", "Entropy over the epochs", "Reciprocal neighbours", "Drift of the memory bank", "Hubness"),
        *("Orphans", "Largest hub", "Setting", "Run", "Options"),
    ]
    cards = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", source))
    assert set(cards) == {"training images", "rounds", "epochs", "time of these epochs"}
    assert page.cells[0] == ["round", "epochs", "anchors", "loss"]
    for word in ("top-1", "Top-1", "test labels", "published", "frame", "nobody"):
        assert word not in source, word
    assert page.text.count("have no labels") == 1  # stated once, at the top
    drawn = {path.stem for path in (tmp_path / "report").iterdir()}
    assert drawn == set("loss entropy surest random quantiles reciprocal drift hubness orphans largest_hub map".split())


def test_report_without_test_images_omits_their_figures(tmp_path: Path) -> None:
    rows = [row | {"top1": None, "top5": None, "best_top1": None} for row in metrics()]
    assert not missing(replace(full_report_data(), tested=None, metrics=rows, protocol=""), tmp_path)
    page = Page(tmp_path / "report.html")
    assert "Worst mistakes" in page.parts and "Consistency of the anchors" in page.parts
    assert not {"Accuracy", "Confusion matrix", "Test images and their nearest training images"} & set(page.parts)
    assert "no labelled test images" in page.text and page.cells[0][3:] == ["consistency", "loss"]


def test_best_epoch_is_the_one_chosen_by_held_out_images(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = PlotCalls(monkeypatch)
    held_out = [0.1, 0.2, 0.3, 0.3, 0.2, 0.3, 0.1, 0.5, 0.1, 0.9, 0.8, None]
    rows = [row | {"val_top1": value} for row, value in zip(metrics(), held_out, strict=True)]
    with plots.style():
        training_figures.training(replace(full_report_data(), metrics=rows, chooser="held-out training images"))
    (series, *_), named = drawn.calls["curves"][0]
    marked = named["marks"]["best epoch of a round"]
    assert np.flatnonzero(np.isfinite(marked)).tolist() == [2, 5, 7, 9]  # the last of equally accurate epochs
    assert marked[[2, 5, 7, 9]].tolist() == [0.3, 0.44, 0.2, 0.61]  # their test accuracy
    assert series["top-1 of held-out images"].tolist()[:3] == [0.1, 0.2, 0.3]


def test_galleries_state_the_source_of_their_neighbours(written: tuple[Path, PlotCalls]) -> None:
    shown = Page(written[0] / "report.html")
    for title in ("Most certain anchors", "Random anchors", "Worst mistakes"):
        assert "in the memory bank at the start of round 3" in shown.parts[title]


def test_report_in_round_0_explains_missing_figures(tmp_path: Path) -> None:
    old_report(tmp_path)
    given = replace(full_report_data(), rounds=(), metrics=metrics()[:1], finished=False, published="")
    message = missing(given, tmp_path)
    assert "has not reached round 1 yet" in message["Entropy and anchor selection"]
    assert message["Accuracy"].startswith("Measured after one epoch only: top-1 20.00%")
    assert "5.0000" in message["Loss"]
    assert message["Orphans"] == "Measured after one epoch only: 40.00%."
    assert message["Drift of the memory bank"] == "Measured after one epoch only: 0.5."
    kept = {path.stem for path in (tmp_path / "report").iterdir()}
    assert kept == {"map", "confusion", "voters"}  # figures of the earlier report are removed
    text = Page(tmp_path / "report.html").text
    assert "still training, or stopped" in text and "published" not in text


def test_report_before_the_first_epoch_is_written(tmp_path: Path) -> None:
    message = missing(replace(full_report_data(), rounds=(), metrics=(), tested=None), tmp_path)
    assert message["Loss"] == "No epoch is done yet."
    shown = Page(tmp_path / "report.html")
    assert "before the first epoch" in shown.parts["Map"]
    assert "Health" not in shown.parts and not [a for tag, a in shown.tags if tag == "a" and a["href"] == "#health"]


def test_report_of_round_0_only_states_that_there_are_no_anchors(tmp_path: Path) -> None:
    message = missing(replace(full_report_data(), rounds=(), metrics=metrics()[:3]), tmp_path)
    assert "this run ended before" in message["Entropy and anchor selection"]


def test_report_of_a_diverged_run_is_written(tmp_path: Path) -> None:
    given = full_report_data()
    nothing = np.full_like(given.features, np.nan)
    rounds = [replace(found, entropy=np.full(N, np.nan)) for found in given.rounds]
    rows = [row | {"loss": float("nan"), **dict.fromkeys(QUANTILES, float("nan"))} for row in metrics()]
    given = replace(given, features=nothing, rounds=rounds, metrics=rows, findings="Not known: <b>not finite</b>.")
    message = missing(given, tmp_path)
    assert '<p class="missing">Not known: &lt;b&gt;not finite' in (tmp_path / "report.html").read_text("utf-8")
    for title in ("Loss", "Map", "Confusion matrix", "Entropy and anchor selection"):
        assert "not" in message[title] and "finite" in message[title], title
    rows[0]["loss"], rows[1]["loss"] = 3.0, 2.0
    assert (
        "Not shown: 10 epochs whose loss was not a finite number"
        in training_figures.training(replace(given, metrics=rows))["loss"].how
    )


@pytest.mark.parametrize(("samples", "value"), [(N, 0.5), (4, None)])
def test_map_of_few_or_equal_embeddings_is_omitted(samples: int, value: float | None) -> None:
    given = full_report_data()
    features = given.features[:samples] if value is None else np.full((samples, D), value, np.float32)
    projected = training_figures.project(replace(given, features=features))
    assert training_figures.embedding_map(given, projected).figure is None


def test_discovery_without_anchors_has_no_gallery() -> None:
    none = Discovered(1, np.arange(N, dtype=float), np.empty(0, int), np.empty((0, K), int), None)
    with plots.style():
        parts = training_figures.discovery(replace(full_report_data(), rounds=[none]))
    assert [name for name, part in parts.items() if part.figure] == ["entropy"]


def test_mistakes_without_similarities_are_sorted_by_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    given = full_report_data()
    assert given.labels is not None
    drawn, found = PlotCalls(monkeypatch), replace(given.rounds[-1], similarities=None)
    with plots.style():
        training_figures._galleries(given, found)
    worst = [int(entry[0].image[0, 0, 0]) for entry in drawn.calls["gallery"][-1][0][0]]
    pairs = zip(found.anchors.tolist(), found.neighbours.tolist(), strict=True)
    assert worst == [a for a, near in pairs if any(given.labels[b] != given.labels[a] for b in near)][:8]


@pytest.mark.parametrize("when", ["drawing", "writing"])
def test_failure_keeps_the_earlier_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    old_report(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    calls = []

    def fail(*args: Any) -> bytes:
        calls.append(args)
        raise OSError("no space left")

    monkeypatch.setattr(plots, "confusion", fail) if when == "drawing" else monkeypatch.setattr(page, "_page", fail)
    with pytest.raises(OSError, match="no space left"):
        page.write(replace(full_report_data(), name="another", rounds=()), tmp_path)
    assert calls and before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_failed_write_keeps_the_earlier_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = old_report(tmp_path)

    def fail(file: int) -> None:
        if list(tmp_path.glob("report.html.*.part")):  # the figures are written, the page is not
            raise OSError("no space left")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="no space left"):
        page.write(replace(full_report_data(), name="another"), tmp_path)
    assert (tmp_path / "report.html").read_bytes() == old
    assert not list(tmp_path.rglob("*.part"))


class Photographs:
    """Large images of noise, which cannot be compressed; records which are read."""

    def __init__(self, count: int) -> None:
        self.count, self.read = count, set[int]()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> np.ndarray:
        if not 0 <= index < self.count:
            raise IndexError(index)
        self.read.add(index)
        return np.random.default_rng(index).integers(0, 256, (300, 700 + index % 50, 3), dtype=np.uint8)


@pytest.mark.slow
def test_page_with_a_thousand_classes_stays_below_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(training_figures, "MAPPED", 50)
    rng = np.random.default_rng(0)
    classes, photographs = 1000, Photographs(1500)
    labels, features = rng.integers(0, classes, 1500), unit(rng.normal(size=(1500, D)))
    nearest = np.argsort(-(features @ features.T), axis=1)[:, 1:6]
    found = Discovered(1, rng.random(1500), np.arange(700), nearest[:700])
    tested = Judged(photographs, labels[:400], unit(features[:400] + 0.2), "kNN", 200, SIGMA)  # type: ignore[arg-type]
    given = replace(
        full_report_data(),
        rounds=[found],
        images=photographs,  # type: ignore[arg-type]
        labels=labels,
        classes=tuple(f"{'very ' * 100}long {number}" for number in range(classes)),
        features=features,
        tested=tested,
        names=None,
    )
    path = page.write(with_findings(given), tmp_path)
    assert 1_000_000 < path.stat().st_size < 5_000_000
    assert len(photographs.read) < 400
    assert "The legend names 20 of 1000 classes." in Page(path).parts["Map"]


@pytest.mark.slow
def test_image_resolution_is_reduced_for_a_large_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def width() -> int:
        return Image.open(io.BytesIO((tmp_path / "report" / "map.png").read_bytes())).width

    monkeypatch.setattr(page, "RESOLUTIONS", (60, 40, 20))
    monkeypatch.setattr(page, "LIMIT", 1)
    page.write(full_report_data(), tmp_path)
    assert width() == 20 * plots.WIDTH
    monkeypatch.setattr(page, "LIMIT", 10**9)
    page.write(full_report_data(), tmp_path)
    assert width() == 60 * plots.WIDTH


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PROBE = """<body style="margin:0"><iframe src="report.html" style="border:0;width:{0}px;height:900px"></iframe><script>
onload = () => {{ const page = frames[0].document, root = page.documentElement, pictures = [...page.images];
document.title = [frames[0].innerWidth, root.scrollWidth, pictures.length, pictures.filter(p => p.naturalWidth).length,
Math.max(...pictures.map(p => p.getBoundingClientRect().right)),
[...page.querySelectorAll('.scroll')].filter(t => t.scrollWidth > t.clientWidth).length].join(' ') }}
</script>"""
"""Shows the report in a frame, since a window has a minimum width, and writes the measurements into the title."""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
@pytest.mark.parametrize("width", [390, 1280])
def test_page_fits_the_width_of_desktops_and_phones(
    written: tuple[Path, PlotCalls], tmp_path: Path, width: int
) -> None:
    shutil.copy(written[0] / "report.html", tmp_path)
    probe = tmp_path / "probe.html"
    probe.write_text(PROBE.format(width), encoding="utf-8")
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    command += [f"--user-data-dir={tmp_path / 'browser'}", "--virtual-time-budget=5000", "--dump-dom", probe.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=True).stdout
    messages = re.search(r"<title>(.*?)</title>", shown)
    assert messages, shown
    inner, scrolled, pictures, loaded, right, cut = map(float, messages[1].split())
    assert inner == width and scrolled <= inner and right <= inner
    assert not cut  # no table has to be scrolled
    assert pictures == loaded == DRAWN + len(Page(tmp_path / "report.html").thumbs())


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium, driven by Playwright."""
    if BROWSER is None:
        pytest.skip("no Chromium is installed")
    driver = pytest.importorskip("playwright.sync_api", reason="Playwright is missing: pip install playwright")
    with driver.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield chromium
        chromium.close()


class Map:
    """The interactive map of a report in a browser; ``finger``: on a phone with a touch screen."""

    def __init__(self, browser: Any, path: Path, *, finger: bool = False) -> None:
        width = 390 if finger else 1280
        self.tab = browser.new_context(viewport={"width": width, "height": 800}, has_touch=finger).new_page()
        self.browser_errors: list[str] = []
        self.tab.on("pageerror", lambda error: self.browser_errors.append(str(error)))
        self.tab.on("console", lambda message: self.browser_errors.append(message.text))
        self.tab.on("dialog", lambda dialog: (self.browser_errors.append(dialog.message), dialog.dismiss()))
        self.tab.goto(path.as_uri())
        self.canvas, self.shown, self.legend = map(
            self.tab.locator, ("#map-canvas", "#map-shown", "#map-legend button")
        )
        self.data = json.loads(
            self.tab.locator("#map-data").inner_text() or self.tab.locator("#map-data").text_content()
        )

    def at(self, point: int) -> dict[str, float]:
        """The position of a point on the canvas, in pixels."""
        side = self.canvas.bounding_box()["width"] - 20
        return {"x": 10 + self.data["x"][point] * side, "y": 10 + (1 - self.data["y"][point]) * side}

    def isolated(self, group: int | None = None) -> int:
        """The point (of a group, if given) that is farthest from all others."""
        places = np.stack([self.data["x"], self.data["y"]], axis=1)
        distance = np.linalg.norm(places[:, None] - places[None], axis=2) + 9 * np.eye(len(places))
        among = [i for i, own in enumerate(self.data["group"]) if group in (None, own)]
        return max(among, key=lambda i: distance[i].min())

    def pixels(self) -> str:
        return str(self.tab.evaluate("document.getElementById('map-canvas').toDataURL()"))


@pytest.mark.parametrize("finger", [False, True], ids=["mouse", "finger"])
def test_pointing_at_the_map_shows_image_and_neighbours(
    written: tuple[Path, PlotCalls], browser: Any, finger: bool
) -> None:
    shown = Map(browser, written[0] / "report.html", finger=finger)
    assert shown.tab.locator("#map-still").is_hidden() and "tap it" in shown.shown.inner_text()
    point, before = shown.isolated(), shown.pixels()
    (shown.canvas.tap if finger else shown.canvas.hover)(position=shown.at(point))
    assert shown.data["name"][point] in shown.shown.inner_text() and shown.pixels() != before
    near, names = shown.shown.locator("button"), [shown.data["name"][i] for i in shown.data["near"][point]]
    assert [near.nth(i).get_attribute("title") for i in range(near.count())] == names
    assert [float(text) for text in near.all_inner_texts()] == pytest.approx(shown.data["alike"][point], abs=0.006)
    (near.first.tap if finger else near.first.click)()
    assert names[0] in shown.shown.inner_text()
    drawn = shown.shown.locator("canvas").first.evaluate("c => [...c.getContext('2d').getImageData(24, 24, 1, 1).data]")
    assert abs(drawn[0] - shown.data["near"][point][0]) < 8  # pixels have the value of the image's number
    assert not shown.browser_errors
    assert shown.tab.evaluate("document.documentElement.scrollWidth") <= shown.tab.viewport_size["width"]
    shown.tab.context.close()


def test_click_on_the_map_keeps_the_image_shown(written: tuple[Path, PlotCalls], browser: Any) -> None:
    shown = Map(browser, written[0] / "report.html")
    point, other = shown.isolated(), shown.data["near"][shown.isolated()][0]
    shown.canvas.click(position=shown.at(point))
    shown.canvas.hover(position=shown.at(other))
    assert shown.data["name"][point] in shown.shown.inner_text()
    shown.tab.context.close()


def test_click_on_the_legend_selects_a_group(written: tuple[Path, PlotCalls], browser: Any) -> None:
    shown = Map(browser, written[0] / "report.html")
    groups, before = shown.data["group"], shown.pixels()
    assert shown.legend.count() == len(set(groups))
    assert shown.legend.first.inner_text() == f"group 0 ({groups.count(0)})"
    shown.legend.first.click()
    assert shown.legend.first.get_attribute("aria-pressed") == "true" and shown.pixels() != before
    point = shown.isolated(group=1)
    shown.canvas.hover(position=shown.at(point))
    assert shown.data["name"][point] not in shown.shown.inner_text()
    shown.legend.first.click()
    shown.canvas.hover(position={key: value + 1 for key, value in shown.at(point).items()})
    assert shown.data["name"][point] in shown.shown.inner_text()
    shown.tab.locator("#map-by").select_option("label")
    assert sorted(shown.legend.all_inner_texts())[0].startswith("$x^2$")
    assert not shown.browser_errors
    shown.tab.context.close()


def test_without_javascript_the_image_of_the_map_is_shown(written: tuple[Path, PlotCalls], browser: Any) -> None:
    tab = browser.new_context(java_script_enabled=False).new_page()
    tab.goto((written[0] / "report.html").as_uri())
    assert tab.locator("#map-still img").is_visible() and tab.locator("#map-live").is_hidden()
    tab.context.close()
