"""The report of a run: one page, ``report.html``, and its figures as files.

The page contains everything it shows and loads no other file. If a part cannot be made, a sentence gives the reason.
The text is in ``page.html``; ``image_findings``, ``training_figures`` and ``test_figures`` make the parts.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from lib.reporting import image_findings, plots, test_figures, training_figures
from lib.reporting.image_findings import Answer
from lib.reporting.plots import Part
from lib.reporting.report_data import ReportData
from lib.session.atomic_files import atomic_write

SECTIONS = ("findings", "training", "discovery", "health", "tests", "setting")
HEALTH = ("quantiles", *training_figures.HEALTH, "follows")
"""Parts of the section on health."""
TESTS = ("confusion", "voters")
"""Parts of the section on test images."""
LIMIT = 5_000_000
"""Maximum size of the page in bytes."""
RESOLUTIONS = (150, 110, 80, 55)
"""Dots per inch of the figures: the first one with which the page stays below ``LIMIT`` is used."""
SCRIPT = Path(__file__).with_name("map.js")
"""The script of the interactive map. The page's content security policy allows this script only."""
TEXT = 300
"""Maximum number of characters of a name or value on the page."""


def write(material: ReportData, folder: Path) -> Path:
    """Writes ``report.html`` to the session's folder, and the figures as PNG to its subfolder ``report/``.

    Everything is drawn before anything is written: if drawing fails, the old report is unchanged.

    Returns:
        The path of the page. The same data give the same bytes.

    Raises:
        OSError: a file cannot be written.
    """
    with plots.style():
        judged, projected = test_figures.classify(material), training_figures.project(material)
        parts = {
            **training_figures.training(material),
            **training_figures.discovery(material),
            **training_figures.health(material),
        }
        parts |= {
            "map": training_figures.embedding_map(material, projected),
            "confusion": test_figures.confusion(material, judged),
            "voters": test_figures.voters(material, judged),
        }
        pairs = [(_cut(a), _cut(b), count, share) for a, b, count, share in test_figures.confused(material, judged)]
        answers = image_findings.answers(material)
        explorer = image_findings.explorer(material, projected) if answers and not isinstance(projected, str) else None
        for resolution in RESOLUTIONS:
            pictures = {
                name: plots.render(part.figure, resolution) for name, part in parts.items() if part.figure is not None
            }
            page = _page(material, parts, pictures, pairs, answers, explorer)
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


def _page(
    material: ReportData,
    parts: Mapping[str, Part],
    pictures: Mapping[str, bytes],
    pairs: Sequence[tuple[str, str, int, str]],
    answers: Sequence[Answer],
    explorer: Mapping[str, Any] | None,
) -> bytes:
    """The page with its figures."""
    script = SCRIPT.read_text(encoding="utf-8")
    parts_of = {"health": HEALTH, "tests": TESTS}
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(Path(__file__).with_suffix(".html").read_text(encoding="utf-8"))
    text = template.render(
        name=_cut(material.name),
        material=material,
        labelled=material.labels is not None,
        left_out=_left_out(material),
        sections=[name for name in SECTIONS if any(parts[part].how for part in parts_of.get(name, ["map"]))],
        answers=answers,
        explorer=explorer,
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii"),
        how={name: part.how for name, part in parts.items()},
        pictures={name: base64.b64encode(data).decode("ascii") for name, data in pictures.items()},
        summary=_summary(material),
        rounds=_rounds(material),
        pairs=pairs,
        facts={name: _cut(value) for name, value in material.facts.items()},
        options={name: _cut(value) for name, value in material.options.items()},
    )
    return text.encode("utf-8", "backslashreplace")  # file names can be any bytes


def _cut(value: object) -> str:
    """A value as text, shortened to ``TEXT`` characters."""
    text = "not set" if value is None else str(value)
    return text if len(text) <= TEXT else f"{text[:TEXT]}…"


def _left_out(material: ReportData) -> str:
    """A sentence on what is omitted because labels are missing; '' if none are."""
    if material.labels is None and material.protocol:
        return "Most training images have no labels, so consistency, mistakes and the confusion matrix are omitted."
    if material.labels is None:
        return (
            "The training images have no labels, so accuracy, consistency, mistakes and the confusion matrix are left "
            "out."
        )
    if material.tested is None:
        return "There are no labelled test images, so accuracy and the confusion matrix are omitted."
    return ""


def _summary(material: ReportData) -> dict[str, str]:
    """The key figures at the top of the page, by name; unknown ones are omitted."""
    rows = material.metrics
    last = rows[-1] if rows else {}
    seconds = sum((row.get("train_s") or 0) + (row.get("evaluate_s") or 0) for row in rows)
    minutes, rest = divmod(round(seconds), 60)
    best = "top-1, best epoch of the last round"
    figures = {"top-1, last epoch": last.get("top1"), best: last.get("best_top1")}
    cards = {name: f"{value:.2%}" for name, value in figures.items() if value is not None}
    if material.published:
        cards["published"] = _cut(material.published)
    cards |= {"training images": f"{len(material.features):,}", "rounds": str(len({row["round"] for row in rows}))}
    cards["epochs"] = str(len(rows))
    if rows:
        time = f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"
        cards["time of these epochs"] = time
    return cards


def _rounds(material: ReportData) -> list[dict[str, str]]:
    """The last epoch of each round (a selection of many rounds); columns without values are omitted."""
    ends = {row["round"]: row for row in material.metrics}
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
            "anchors": f"{row['anchors']} ({row['anchors'] / len(material.features):.0%})",
            **{title: "-" if row.get(key) is None else format(row[key], form) for title, key, form in known},
        }
        for row in shown
    ]
