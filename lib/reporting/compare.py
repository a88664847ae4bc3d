"""Compares sessions in a table, a CSV file and a plot.

Runs that differ only in their seed form a group: their options, commit, changes to it, versions of Python and packages,
and initial checkpoint are equal. A group is summarised by mean and sample standard deviation. If its runs are at
different epochs, only those with the most epochs are used, so that a mean never mixes epochs.
"""

from __future__ import annotations

import csv
import io
import re
import textwrap
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lib.config.options import Options
from lib.config.parser import extra, read_options
from lib.errors import UsageError
from lib.session import metrics
from lib.session.atomic_files import atomic_write, csv_text, printable
from lib.session.console import SUMMARY, logger, table

LOCAL = {"seed", "sess_dir", "log_file", "log_tfb"}
"""Options that differ between repetitions of a run."""
TITLE = "Comparison of AND sessions"
"""Title in the metadata of the plot, by which a later comparison recognises it."""
COMMIT = re.compile(r"([0-9a-f]{40})(\+[0-9a-f]+)?")
"""A commit and a digest of the changes to it, as written by ``provenance.commit``."""
UNKNOWN = "not recorded"
THEN = ", then "
"""Separates the commits or versions of a run that was resumed with another one."""
RUN_COLUMNS = ["session", "group", "seed", "finished"]
STATISTIC_COLUMNS = ["runs", "scope", "statistic"]
FIGURES = ["round", "epoch", "anchors", "consistency", "loss", "top1", "best_top1", "seconds", "images_per_s"]
"""Metric columns of the CSV file. The options that differ are between ``STATISTIC_COLUMNS`` and ``FIGURES``."""


@dataclass(frozen=True)
class Figures:
    """Metrics at the end of a range of epochs; None if unknown.

    Attributes:
        round, epoch: the last epoch of the range, counted from 0.
        anchors, loss: of the last epoch.
        consistency, top1, best_top1: of the last epoch, in [0, 1]; ``best_top1`` is the best of its round so far.
        seconds: training and evaluation time of all epochs of the range.
        images_per_s: training images per second of training time, over all epochs of the range.
    """

    round: int
    epoch: int
    anchors: int | None
    consistency: float | None
    loss: float | None
    top1: float | None
    best_top1: float | None
    seconds: float | None
    images_per_s: float | None


@dataclass(frozen=True)
class Run:
    """A session.

    Attributes:
        session: the folder, as given on the command line.
        options: from its config.yaml.
        code: 'commit', 'python' and package names -> commit or version; several are joined by ``THEN``.
        origin: checkpoint of another run, from which this one began (``--resume --restart``); None: a new network.
        first: round and epoch of its first record, counted from 0.
        rounds: metrics of each round.
        whole: metrics of the whole run.
    """

    session: Path
    options: Options
    code: dict[str, str]
    origin: str | None
    first: tuple[int, int]
    rounds: tuple[Figures, ...]
    whole: Figures

    @property
    def finished(self) -> bool:
        """Whether the last epoch of the last round is complete."""
        last = self.options.max_round - 1, self.options.max_epoch - 1
        return (self.whole.round, self.whole.epoch) >= last

    @property
    def facts(self) -> dict[str, str]:
        """What is equal in all runs of a group, as text. Of the GPUs only their number counts."""
        begun = f"checkpoint before round {self.first[0]}, epoch {self.first[1] + 1}" if self.origin else "new network"
        names = [name for name in Options.model_fields if name not in LOCAL and not extra(name)["this_run"]]
        gpus = f"{len(self.options.gpus)} GPU" if self.options.gpus else "CPU"
        values = {name: gpus if name == "gpus" else _word(getattr(self.options, name)) for name in names}
        return values | {"begun with": begun} | self.code

    def depends_on(self, other: Run) -> bool:
        """Whether the runs have the same seed, or began from the same checkpoint."""
        return self.options.seed == other.options.seed or (self.origin is not None and self.origin == other.origin)

    @property
    def code_is_known(self) -> bool:
        """Whether commit and versions were recorded, so that they identify the code."""
        commits = self.code.get("commit", "").split(THEN)
        return "torch" in self.code and all(map(COMMIT.fullmatch, commits))


@dataclass(frozen=True)
class Group:
    """Runs that differ only in their seed. ``values`` are the group's values of ``Comparison.differing``, as text."""

    number: int
    values: tuple[str, ...]
    runs: tuple[Run, ...]

    def figures(self, round: int | None) -> list[Figures]:
        """Metrics of a round, or of the whole run (None), of the runs with the most epochs in it; empty without any."""
        found = [f for run in self.runs for f in (run.rounds if round is not None else [run.whole])]
        found = [f for f in found if round in (None, f.round)]
        last = max(((f.round, f.epoch) for f in found), default=None)
        return [f for f in found if (f.round, f.epoch) == last]


@dataclass(frozen=True)
class Comparison:
    """Groups of runs, the names of the ``facts`` that differ between them, and the number of equal ones."""

    differing: tuple[str, ...]
    equal: int
    groups: tuple[Group, ...]

    @property
    def rounds(self) -> list[int]:
        """All rounds that at least one run has reached."""
        return sorted({figures.round for group in self.groups for run in group.runs for figures in run.rounds})


def compare(sessions: Sequence[Path]) -> Comparison:
    """Reads one or more sessions and groups them, in the given order.

    Raises:
        UsageError: a folder is not a session or is given twice, or its options or metrics cannot be read.
    """
    runs: dict[Path, Run] = {}
    for session in sessions:
        run = _read(session)
        if runs.setdefault(session.resolve(), run) is not run:
            raise UsageError(f"{session}: given twice; give each session once")
    facts = [run.facts for run in runs.values()]
    names = dict.fromkeys(name for values in facts for name in values)
    differing = tuple(name for name in names if len({values.get(name, UNKNOWN) for values in facts}) > 1)
    members: dict[tuple[str, ...], list[Run]] = {}
    for run, values in zip(runs.values(), facts, strict=True):
        members.setdefault(tuple(values.get(name, UNKNOWN) for name in differing), []).append(run)
    groups = (Group(n, values, tuple(found)) for n, (values, found) in enumerate(members.items(), start=1))
    return Comparison(differing, len(names) - len(differing), tuple(groups))


def show(sessions: Sequence[Path], folder: Path) -> None:
    """Prints a comparison of sessions, and writes it to ``folder`` as comparison.csv and comparison.png."""
    found = compare(sessions)
    logger().info("%s", text(found), extra=SUMMARY)
    for path in write(found, folder):
        logger().info("written: %s", path, extra=SUMMARY)


def _read(session: Path) -> Run:
    records, starts = metrics.read(session), metrics.starts(session)
    rounds = {record["round"]: [r for r in records if r["round"] == record["round"]] for record in records}
    options = read_options([], base=session / "config.yaml")
    return Run(
        session,
        options,
        code=_code(starts),
        origin=starts[0].get("resumed from") if starts else None,
        first=(records[0]["round"], records[0]["epoch"]),
        rounds=tuple(map(_figures, rounds.values())),
        whole=_figures(records),
    )


def _code(starts: Iterable[dict[str, Any]]) -> dict[str, str]:
    found: dict[str, list[str]] = {}
    for start in starts:
        versions = dict(words.rsplit(" ", 1) for words in str(start.get("versions", "")).split(", ") if " " in words)
        for name, value in {"commit": str(start.get("commit", UNKNOWN)), **versions}.items():
            found.setdefault(name, []).append(value)
    return {name: THEN.join(dict.fromkeys(values)) for name, values in found.items()}


def _figures(records: Sequence[dict[str, Any]]) -> Figures:
    last, names = records[-1], ("train_s", "evaluate_s", "images_per_s")
    train, evaluate, speed = (np.array([r.get(name) for r in records], dtype=float) for name in names)  # None: NaN
    seconds, images = train.sum() + evaluate.sum(), (speed * train).sum()
    return Figures(
        round=last["round"],
        epoch=last["epoch"],
        **{name: last.get(name) for name in ("anchors", "consistency", "loss", "top1", "best_top1")},
        seconds=None if np.isnan(seconds) else float(seconds),
        images_per_s=None if np.isnan(images) or not train.sum() else float(images / train.sum()),
    )


def _word(value: object) -> str:
    if isinstance(value, tuple):
        return " ".join(map(_word, value))
    if isinstance(value, bool):
        return "on" if value else "off"
    return "not set" if value is None else str(value)


def mean_and_deviation(found: Sequence[Figures], name: str) -> tuple[float | None, float | None]:
    """Mean and sample standard deviation (n - 1 in the denominator) of a metric.

    Both are None if the metric is missing in a run: a mean over the others would hide, for example, that its loss was
    not finite. The deviation is None for a single run.
    """
    values = [getattr(figures, name) for figures in found]
    if not values or None in values:
        return None, None
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def _duration(seconds: float) -> str:
    """h:mm:ss."""
    return f"{round(seconds) // 3600}:{round(seconds) // 60 % 60:02}:{round(seconds) % 60:02}"


SHOWN: dict[str, tuple[str, Callable[[float], str]]] = {
    "anchors": ("anchors", "{:.0f}".format),
    "consistency": ("consistency", "{:.1%}".format),
    "loss": ("loss", "{:.4f}".format),
    "top1": ("top-1 last", "{:.2%}".format),
    "best_top1": ("top-1 best", "{:.2%}".format),
    "seconds": ("h:mm:ss", _duration),
    "images_per_s": ("images/s", "{:,.0f}".format),
}
"""Metric -> column title and format."""
WHOLE = ("top1", "best_top1", "seconds", "images_per_s")
BY_ROUND = ("anchors", "consistency", "loss", "top1", "best_top1", "seconds")


def text(comparison: Comparison) -> str:
    """The comparison as plain text: a row for each group, its sessions, and a row for each round and group."""
    groups, names = comparison.groups, comparison.differing
    runs = [(run, group) for group in groups for run in group.runs]
    rounds = [(group, group.figures(round)) for round in comparison.rounds for group in groups]
    columns = names if len(names) <= 4 else ()  # more do not fit; the list of groups shows them
    lines = [
        f"sessions: {len(runs)}; what differs: {', '.join(names) or 'nothing'}; "
        f"equal: {comparison.equal} facts (options, versions, beginning)",
        "",
        _table([(group, group.figures(None)) for group in groups], WHOLE, columns),
        "",
        *(f"group {_label(comparison, group)}: {_names(group.runs)}" for group in groups),
    ]
    pooled = [(run, group) for run, group in runs if len(group.runs) > 1]
    notes = {
        "not finished": [run for run, _ in runs if not run.finished],
        "not independent, as another run of the group has the same seed or began from the same checkpoint": [
            run for run, group in pooled if any(run.depends_on(other) for other in group.runs if other is not run)
        ],
        "the options before the checkpoint are taken to be equal": [run for run, _ in pooled if run.origin],
        "commit, changes to it or versions not recorded, and taken to be equal": [
            run for run, _ in pooled if not run.code_is_known
        ],
    }
    lines += [f"{note}: {_names(found)}" for note, found in notes.items() if found]
    lines += ["", _table([(group, figures) for group, figures in rounds if figures], BY_ROUND), ""]
    if len(runs) > len(groups):
        lines.append("±: sample standard deviation over the runs of a group that are furthest (first number of runs)")
    lines.append("last: last epoch of the round; best: best epoch of the round, by the test labels or held-out ones")
    return "\n".join(lines)


def _table(entries: Sequence[tuple[Group, list[Figures]]], names: Sequence[str], options: Sequence[str] = ()) -> str:
    """A table with a row for each entry. Columns without values are omitted."""
    spread = any(len(figures) > 1 for _, figures in entries)
    shown = [n for n in names if any(mean_and_deviation(figures, n)[0] is not None for _, figures in entries)]
    rows = []
    for group, figures in entries:
        limits, last = group.runs[0].options, figures[0]
        place = f"{last.round}/{limits.max_round - 1}", f"{last.epoch + 1}/{limits.max_epoch}"
        cells = [_cell(name, *mean_and_deviation(figures, name), spread) for name in shown]
        values = [_plain(value) for value in group.values[: len(options)]]
        rows.append([group.number, *values, f"{len(figures)}/{len(group.runs)}", *place, *cells])
    return table(["group", *options, "runs", "round", "epoch", *(SHOWN[name][0] for name in shown)], rows)


def _cell(name: str, mean: float | None, deviation: float | None, spread: bool) -> str:
    if mean is None:
        return "-"
    spell = SHOWN[name][1]
    if not spread or name == "anchors":  # equal in all runs of a group
        return spell(mean)
    return f"{spell(mean)} ± {'-' if deviation is None else spell(deviation)}"


def _label(comparison: Comparison, group: Group) -> str:
    values = (f"{name} {_plain(value)}" for name, value in zip(comparison.differing, group.values, strict=True))
    return f"{group.number} ({', '.join(values)})" if group.values else f"{group.number}"


def _names(runs: Iterable[Run]) -> str:
    return ", ".join(printable(str(run.session)) for run in runs)


def _plain(value: str) -> str:
    """A value for a table or legend, with shortened commits, and at most 40 characters."""
    shown = printable(COMMIT.sub(lambda found: found[1][:10] + (found[2] or "")[:5], value))
    return shown if len(shown) <= 40 else f"{shown[:12]}...{shown[-25:]}"


def write(comparison: Comparison, folder: Path) -> tuple[Path, Path]:
    """Writes ``comparison.csv`` and ``comparison.png`` to a folder, which is created if it is missing.

    Existing files are replaced only if they are complete files of an earlier comparison.

    Returns:
        The two paths.

    Raises:
        UsageError: the folder cannot be written, or contains another file of that name.
    """
    paths = folder / "comparison.csv", folder / "comparison.png"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, is_ours in zip(paths, (_is_our_csv, _is_our_png), strict=True):
            if path.is_symlink() or (path.exists() and not is_ours(path.read_bytes())):
                raise UsageError(f"{path}: not a complete file of an earlier comparison; move it away and try again")
        for path, content in zip(paths, (to_csv(comparison), draw(comparison)), strict=True):
            with atomic_write(path) as file:
                file.write(content)
    except OSError as error:
        raise UsageError(
            f"{error.filename or folder}: cannot be written: {error.strerror}; choose another --sess-dir"
        ) from None
    return paths


def to_csv(comparison: Comparison) -> bytes:
    """The comparison as CSV: for each group, the rounds and the whole run of each session, and then of the group.

    Columns: ``session``, ``group``, ``seed`` and ``finished`` (for a group only ``group``); ``runs``, the number of
    runs; ``scope``, 'round' or 'run'; ``statistic``, 'value' for a session, 'mean' or 'standard deviation' for a
    group; the options and versions that differ; the metrics. Unknown values are empty.
    """
    lines = io.StringIO(newline="")
    writer = csv.writer(lines)
    writer.writerow([*RUN_COLUMNS, *STATISTIC_COLUMNS, *comparison.differing, *FIGURES])
    for group in comparison.groups:
        values = [csv_text(value) for value in group.values]
        for run in group.runs:
            who = [csv_text(str(run.session)), group.number, run.options.seed, "yes" if run.finished else "no", 1]
            for scope, figures in [*(("round", figures) for figures in run.rounds), ("run", run.whole)]:
                writer.writerow([*who, scope, "value", *values, *(getattr(figures, name) for name in FIGURES)])
        for scope, round in [*(("round", round) for round in comparison.rounds), ("run", None)]:
            if found := group.figures(round):
                who, epoch = ["", group.number, "", "", len(found)], [found[0].round, found[0].epoch]
                means, deviations = zip(*(mean_and_deviation(found, name) for name in FIGURES[2:]), strict=True)
                writer.writerow([*who, scope, "mean", *values, *epoch, *means])
                writer.writerow([*who, scope, "standard deviation", *values, *epoch, *deviations])
    return lines.getvalue().encode("utf-8", "backslashreplace")  # folder names can be any bytes


def _is_our_csv(content: bytes) -> bool:
    header = content.split(b"\r\n")[0].decode("utf-8", "replace").split(",")
    return (
        header[: len(RUN_COLUMNS)] == RUN_COLUMNS and header[-len(FIGURES) :] == FIGURES and content.endswith(b"\r\n")
    )


def _is_our_png(content: bytes) -> bool:
    return b"tEXtTitle\0" + TITLE.encode() in content[:1000] and content.endswith(b"IEND\xaeB`\x82")


def draw(comparison: Comparison) -> bytes:
    """The comparison as PNG: accuracy (or loss, without labels) over the rounds, and the time of each group."""
    # takes half a second, which only a comparison needs
    from matplotlib.figure import Figure

    groups = comparison.groups
    labels = [_legend(comparison, group) for group in groups]
    rows = sum(label.count("\n") + 1 for label in labels)
    height = max(4.2, 0.2 * len(groups))
    figure = Figure(figsize=(11, height + 0.19 * rows + 0.3), dpi=120, layout="constrained")
    curves, times = figure.subplots(1, 2, width_ratios=(2, 1))
    handles = _draw_curves(curves, comparison)
    _draw_times(times, groups)
    legend = figure.legend(handles, labels, loc="outside lower left", fontsize=8, frameon=False)
    for written in legend.get_texts():
        written.set_parse_math(False)  # names may contain dollar signs
    picture = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # characters missing in the font are drawn as boxes
        figure.savefig(picture, format="png", metadata={"Title": TITLE})
    return picture.getvalue()


def _legend(comparison: Comparison, group: Group) -> str:
    runs = f"{len(group.runs)} run{'s' if len(group.runs) > 1 else ''}"
    finished = "" if all(run.finished for run in group.runs) else ", not finished"
    return "\n".join(textwrap.wrap(f"{_label(comparison, group)}: {runs}{finished}", 150))


def _style(group: Group) -> dict[str, Any]:
    """Colour, marker and line style of a group. Colours repeat after ten groups, with another marker and line."""
    more, colour = divmod(group.number - 1, 10)
    return {"color": f"C{colour}", "marker": "os^Dv"[more % 5], "linestyle": ("-", "--", ":", "-.")[more % 4]}


def _draw_curves(axes: Any, comparison: Comparison) -> list[Any]:
    """Draws mean and deviation of each group over the rounds, shifted so that the error bars do not overlap."""
    groups, rounds = comparison.groups, comparison.rounds

    def points(name: str) -> np.ndarray:
        """(groups, rounds, 2) mean and deviation. None becomes NaN, which is not drawn."""
        found = [[mean_and_deviation(group.figures(round), name) for round in rounds] for group in groups]
        return np.array(found, dtype=float)

    accuracy = 100 * points("top1")
    is_known = np.isfinite(accuracy).any()
    step, handles = min(0.04, 0.5 / len(groups)), []
    for group, found in zip(groups, accuracy if is_known else points("loss"), strict=True):
        x = np.array(rounds) + step * (group.number - (len(groups) + 1) / 2)
        handles.append(axes.errorbar(x, *found.T, capsize=2, markersize=4, linewidth=1, **_style(group)))
    axes.set(xlabel="round", xticks=comparison.rounds)
    axes.set_ylabel("top-1 at the round's last epoch, %" if is_known else "loss at the round's last epoch")
    axes.grid(axis="y", alpha=0.3)
    return handles


def _draw_times(axes: Any, groups: Sequence[Group]) -> None:
    """Draws a bar for each group: the mean time of its runs with the most epochs."""
    seconds = np.array([mean_and_deviation(group.figures(None), "seconds") for group in groups], dtype=float)
    longest = np.nanmax(seconds[:, 0], initial=0)
    unit, name = (3600, "hours") if longest >= 7200 else (60, "minutes") if longest >= 120 else (1, "seconds")
    means, deviations = seconds.T / unit
    colours = [_style(group)["color"] for group in groups]
    axes.barh([str(group.number) for group in groups], means, xerr=deviations, color=colours, capsize=2)
    axes.set_ylim(max(len(groups), 6) - 0.4, -0.6)  # the first group on top; limits the thickness of few bars
    axes.set(xlabel=f"training and evaluation, {name}", ylabel="group")
