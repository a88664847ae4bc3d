"""The report of a run: one page, ``report.html``, and its figures as files.

The page contains everything it shows and loads no other file. If a part cannot be made, a sentence gives the reason.
``page.html`` beside this file has everything that is on the page, in its order, and the words. ``image_findings`` fills
its section Findings, ``training_figures`` and ``test_figures`` make the pictures of the others, which ``plots`` draws.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from lib.reporting import image_findings, plots, test_figures, training_figures
from lib.reporting.report_data import ReportData
from lib.reporting.training_figures import Projection
from lib.session.atomic_files import atomic_write

LIMIT = 5_000_000
"""Maximum size of the page in bytes."""
RESOLUTIONS = (150, 110, 80, 55)
"""Dots per inch of the figures: the first one with which the page stays below ``LIMIT`` is used."""
SCRIPT = Path(__file__).with_name("map.js")
"""The script of the interactive map. The page's content security policy allows this script only."""
TEXT = 300
"""Maximum number of characters of a name or value on the page."""


def write(report: ReportData, folder: Path) -> Path:
    """Writes ``report.html`` to the session's folder, and the figures as PNG to its subfolder ``report/``.

    Everything is drawn before anything is written: if drawing fails, the old report is unchanged.

    Returns:
        The path of the page. The same data give the same bytes.

    Raises:
        OSError: a file cannot be written.
    """
    with plots.style():
        judged, projected = test_figures.classify(report), training_figures.project(report)
        sections = {
            "findings": {"map": training_figures.embedding_map(report, projected)},
            "training": training_figures.training(report),
            "discovery": training_figures.discovery(report),
            "health": training_figures.health(report),
            "tests": {
                "confusion": test_figures.confusion(report, judged),
                "voters": test_figures.voters(report, judged),
            },
        }
        shown = [name for name, parts in sections.items() if any(part.how for part in parts.values())]
        parts = {name: part for group in sections.values() for name, part in group.items()}
        answers = image_findings.answers(report)
        content = {
            "name": _cut(report.name),
            "report": report,
            "labelled": report.labels is not None,
            "left_out": _left_out(report),
            "sections": [*shown, "setting"],
            "answers": answers,
            "explorer": image_findings.explorer(report, projected)
            if answers and isinstance(projected, Projection)
            else None,
            "how": {name: part.how for name, part in parts.items()},
            "summary": _summary(report),
            "rounds": _rounds(report),
            "pairs": [(_cut(a), _cut(b), *figures) for a, b, *figures in test_figures.confused(report, judged)],
            "facts": {name: _cut(value) for name, value in report.facts.items()},
            "options": {name: _cut(value) for name, value in report.options.items()},
        }
        for resolution in RESOLUTIONS:
            pictures = {
                name: plots.render(part.figure, resolution) for name, part in parts.items() if part.figure is not None
            }
            page = _page(content, pictures)
            if len(page) < LIMIT:
                break
    place, path = folder / "report", folder / "report.html"
    place.mkdir(exist_ok=True)
    for name in parts:
        if name in pictures:
            with atomic_write(place / f"{name}.png") as file:
                file.write(pictures[name])
        else:
            (place / f"{name}.png").unlink(missing_ok=True)  # left by an earlier report
    with atomic_write(path) as file:
        file.write(page)
    return path


def _page(content: Mapping[str, Any], pictures: Mapping[str, bytes]) -> bytes:
    """The page with its content and its figures."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(Path(__file__).with_suffix(".html").read_text(encoding="utf-8"))
    script = SCRIPT.read_text(encoding="utf-8")
    text = template.render(
        content,
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii"),
        pictures={name: base64.b64encode(data).decode("ascii") for name, data in pictures.items()},
    )
    return text.encode("utf-8", "backslashreplace")  # file names can be any bytes


def _cut(value: object) -> str:
    """A value as text, shortened to ``TEXT`` characters."""
    text = "not set" if value is None else str(value)
    return text if len(text) <= TEXT else f"{text[:TEXT]}…"


def _left_out(report: ReportData) -> str:
    """A sentence on what is omitted because labels are missing; '' if none are."""
    if report.labels is None and report.protocol:
        return "Most training images have no labels, so consistency, mistakes and the confusion matrix are omitted."
    if report.labels is None:
        return (
            "The training images have no labels, so accuracy, consistency, mistakes and the confusion matrix are left "
            "out."
        )
    if report.tested is None:
        return "There are no labelled test images, so accuracy and the confusion matrix are omitted."
    return ""


def _summary(report: ReportData) -> dict[str, str]:
    """The key figures at the top of the page, by name; unknown ones are omitted."""
    rows = report.metrics
    last = rows[-1] if rows else {}
    seconds = sum((row.get("train_s") or 0) + (row.get("evaluate_s") or 0) for row in rows)
    minutes, rest = divmod(round(seconds), 60)
    best = "top-1, best epoch of the last round"
    figures = {"top-1, last epoch": last.get("top1"), best: last.get("best_top1")}
    cards = {name: f"{value:.2%}" for name, value in figures.items() if value is not None}
    if report.published:
        cards["published"] = _cut(report.published)
    cards |= {"training images": f"{len(report.features):,}", "rounds": str(len({row["round"] for row in rows}))}
    cards["epochs"] = str(len(rows))
    if rows:
        time = f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"
        cards["time of these epochs"] = time
    return cards


def _rounds(report: ReportData) -> list[dict[str, str]]:
    """The last epoch of each round (a selection of many rounds); columns without values are omitted."""
    ends = {row["round"]: row for row in report.metrics}
    every = -(-len(ends) // 50)
    shown = list(ends.values())[:: max(1, every)]
    columns = [
        ("consistency", "consistency", ".1%"),
        ("loss", "loss", ".4f"),
        ("top-1 last", "top1", ".2%"),
        ("top-1 best", "best_top1", ".2%"),
        ("top-5 last", "top5", ".2%"),
        ("held-out last", "val_top1", ".2%"),
    ]
    known = [column for column in columns if any(row.get(column[1]) is not None for row in shown)]
    return [
        {
            "round": str(row["round"]),
            "epochs": str(row["epoch"] + 1),
            "anchors": f"{row['anchors']} ({row['anchors'] / len(report.features):.0%})",
            **{title: "-" if row.get(key) is None else format(row[key], form) for title, key, form in known},
        }
        for row in shown
    ]
