"""The comparison of sessions and the reader of their metrics, tested on synthetic sessions."""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import shutil
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lib.config import parser
from lib.config.options import Options
from lib.errors import UsageError
from lib.reporting import compare
from lib.session import metrics

BASE: dict[str, Any] = {"max_round": 2, "max_epoch": 3, "seed": 0}


def record(round: int, epoch: int, **changed: Any) -> dict[str, Any]:
    """A line of metrics of an epoch."""
    values = {
        "round": round,
        "epoch": epoch,
        "anchors": 100 * round,
        "consistency": 0.75 if round else None,
        "loss": 4.5 - round - 0.125 * epoch,
        "learning_rate": 0.03,
        "top1": 0.5 + 0.1 * round + 0.01 * epoch,
        "top5": 0.99,
        "best_top1": 0.6 + 0.1 * round,
        "images_per_s": 1000.0,
        "train_s": 2.0,
        "evaluate_s": 0.5,
    }
    return values | changed


def write_lines(folder: Path, records: list[dict[str, Any]], rest: str = "") -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records) + rest, encoding="utf-8")


def make(folder: Path, records: list[dict[str, Any]] | None = None, **options: Any) -> Path:
    """A session, by default with two complete rounds of three epochs."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(parser.to_yaml(Options(**BASE | options)), encoding="utf-8")
    every = [record(r, e) for r in range(2) for e in range(3)]
    write_lines(folder, every if records is None else records)
    return folder


def refusal(*sessions: Path) -> str:
    with pytest.raises(UsageError) as refused:
        compare.compare(sessions)
    text = str(refused.value)
    assert "\n" not in text
    return text


def csv_rows(comparison: compare.Comparison, scope: str = "round", statistic: str = "value") -> list[dict[str, str]]:
    rows = csv.DictReader(io.StringIO(compare.to_csv(comparison).decode("utf-8"), newline=""))
    return [row for row in rows if (row["scope"], row["statistic"]) == (scope, statistic)]


def picture(content: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(content)) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


# Reading metrics.


def test_metrics_records_are_read_back_unchanged(tmp_path: Path) -> None:
    records = [record(0, 0), record(0, 1, loss=None), record(1, 0)]
    assert metrics.read(make(tmp_path / "a", records)) == records


def test_later_record_of_an_epoch_is_used(tmp_path: Path) -> None:
    session = make(tmp_path / "a", [record(0, 0), record(1, 0), record(0, 1, loss=1.0), record(0, 1, loss=2.0)])
    assert [(r["round"], r["epoch"], r["loss"]) for r in metrics.read(session)] == [
        (0, 0, 4.5),
        (0, 1, 2.0),
        (1, 0, 3.5),
    ]


def test_incomplete_last_line_is_ignored(tmp_path: Path) -> None:
    session, line = make(tmp_path / "a"), json.dumps(record(0, 1))
    for cut in range(len(line)):
        write_lines(session, [record(0, 0)], line[:cut])
        assert metrics.read(session) == [record(0, 0)]
    write_lines(session, [record(0, 0)], line)  # all but the line break
    assert metrics.read(session) == [record(0, 0), record(0, 1)]


DAMAGED = [
    b"",
    b"{",
    b"[]",
    b"null",
    b"\0\0\0",
    b"\xff{}",
    b'{"epoch": 0}',
    b'{"round": 0, "epoch": 1.0}',
    b'{"round": 0, "epoch": -1}',
    b'{"round": false, "epoch": 0}',
    b'{"round": 0, "epoch": 0, "loss": "low"}',
    b'{"round": 0, "epoch": 0, "loss": true}',
    b'{"round": 0, "epoch": 0, "loss": NaN}',
    b'{"round": 0, "epoch": 0, "loss": 1e999}',
    b'{"round": 0, "epoch": 0, "loss": 1' + b"0" * 400 + b"}",
    b'{"round": 0, "epoch": 0, "loss": 1' + b"0" * 5000 + b"}",
    b"[" * 100_000,
]


@pytest.mark.parametrize("line", DAMAGED, ids=range(len(DAMAGED)))
def test_damaged_line_is_named(line: bytes, tmp_path: Path) -> None:
    session = make(tmp_path / "a")
    path = session / "metrics.jsonl"
    first, second, *_ = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + second + line + b"\n" + second)
    assert f"{path}, line 3" in refusal(session)


@pytest.mark.parametrize("content", [b"", b'{"round": 0, "ep', b"\0\0"])
def test_session_without_a_complete_epoch_is_refused(content: bytes, tmp_path: Path) -> None:
    session = make(tmp_path / "a")
    (session / "metrics.jsonl").write_bytes(content)
    assert str(session) in refusal(session)


def test_folder_that_is_not_a_session_is_refused(tmp_path: Path) -> None:
    session = make(tmp_path / "a")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for name, word in [("none", "no such folder"), ("file", "no such folder"), ("empty", "config.yaml")]:
        text = refusal(session, tmp_path / name)
        assert str(tmp_path / name) in text and word in text
    assert "cannot be read" in refusal(tmp_path / ("x" * 300))
    (session / "metrics.jsonl").unlink()
    assert str(session) in (text := refusal(session)) and "metrics.jsonl" in text
    (session / "metrics.jsonl").mkdir()
    assert "cannot be read" in refusal(session)


def test_invalid_options_are_refused_with_file_and_name(tmp_path: Path) -> None:
    session = make(tmp_path / "a")
    (session / "config.yaml").write_text("max_rund: 3\n")
    assert str(session / "config.yaml") in (text := refusal(session)) and "max_round" in text


def test_session_given_twice_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = make(tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(session)
    for other in (session, Path("a"), Path("a/../a"), Path("link")):
        assert "twice" in refusal(session, other)


# Groups and figures.

HEAD, OTHER = "3a9b45030dc56b72c152a23f30b380427bdf031e", "8c1a4e1c0f6a4d3ab0d2b7a0d9f1e2c3b4a59687"
VERSIONS = "python 3.11.7, torch 2.14.1, numpy 2.4.6"


def started(session: Path, commit: str = HEAD, versions: str = VERSIONS, origin: Path | None = None) -> Path:
    """Records a start in a session, as the program does; ``origin`` is the resumed checkpoint."""
    facts = {"time": "2026-01-01T00:00:00+00:00", "versions": versions, "commit": commit}
    with (session / "starts.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(facts | ({"resumed from": str(origin)} if origin else {})) + "\n")
    return session


def branched(folder: Path, origin: Path, first: tuple[int, int] = (1, 0), **options: Any) -> Path:
    """A session begun by ``--resume ORIGIN --restart`` at round and epoch ``first``."""
    every = [record(r, e) for r in range(2) for e in range(3)]
    rows = [row for row in every if (row["round"], row["epoch"]) >= first]
    return started(make(folder, rows, **options), origin=origin)


def test_runs_of_one_commit_and_the_same_versions_form_a_group(tmp_path: Path) -> None:
    sessions = [started(make(tmp_path / str(seed), seed=seed), f"{HEAD}+0123456789ab") for seed in range(2)]
    comparison = compare.compare(sessions)
    assert comparison.differing == () and len(comparison.groups) == 1
    assert comparison.equal == compare.compare([make(tmp_path / "bare")]).equal + 4
    text = compare.text(comparison)
    assert f"what differs: nothing; equal: {comparison.equal} facts (options, versions, beginning)" in text
    assert "not recorded" not in text


@pytest.mark.parametrize(
    ("commit", "versions", "name", "values"),
    [
        (OTHER, VERSIONS, "commit", (HEAD, OTHER)),
        (f"{HEAD}+0123456789ab", VERSIONS, "commit", (HEAD, f"{HEAD}+0123456789ab")),
        (HEAD, VERSIONS.replace("2.14.1", "2.6.0"), "torch", ("2.14.1", "2.6.0")),
        (HEAD, VERSIONS.replace("3.11.7", "3.10.1"), "python", ("3.11.7", "3.10.1")),
        (HEAD, VERSIONS + ", rust-network 1.0", "rust-network", ("not recorded", "1.0")),
        ("unknown (not a git checkout)", VERSIONS, "commit", (HEAD, "unknown (not a git checkout)")),
    ],
)
def test_runs_of_different_code_are_in_different_groups(
    commit: str, versions: str, name: str, values: tuple[str, str], tmp_path: Path
) -> None:
    one = started(make(tmp_path / "a"))
    comparison = compare.compare([one, started(make(tmp_path / "b", seed=1), commit, versions)])
    assert comparison.differing == (name,)
    assert [group.values for group in comparison.groups] == [values[:1], values[1:]]
    assert "±" not in (text := compare.text(comparison))
    assert f"what differs: {name};" in text
    assert [row[name] for row in csv_rows(comparison, "run")] == list(values)


def test_commit_is_shown_by_its_first_ten_digits(tmp_path: Path) -> None:
    sessions = [started(make(tmp_path / "a")), started(make(tmp_path / "b"), f"{HEAD}+0123456789ab")]
    text = compare.text(compare.compare(sessions))
    assert row_of(text, "1", HEAD[:10]) and row_of(text, "2", f"{HEAD[:10]}+0123")


def test_run_resumed_by_other_code_names_both_commits(tmp_path: Path) -> None:
    mixed = started(started(started(make(tmp_path / "a"))), OTHER)
    comparison = compare.compare([mixed, started(make(tmp_path / "b", seed=1), OTHER)])
    assert [group.values for group in comparison.groups] == [(f"{HEAD}, then {OTHER}",), (OTHER,)]


@pytest.mark.parametrize("commit", [None, f"{HEAD}+", "unknown (not a git checkout)"])
def test_pooled_runs_of_unknown_code_are_reported(commit: str | None, tmp_path: Path) -> None:
    """None: no record; '+' alone: a record from before changes had a digest."""
    sessions = [make(tmp_path / str(seed), seed=seed) for seed in range(2)]
    if commit:
        sessions = [started(session, commit) for session in sessions]
    (line,) = [x for x in compare.text(compare.compare(sessions)).splitlines() if "taken to be equal" in x]
    assert line.endswith(f": {sessions[0]}, {sessions[1]}")
    assert "taken to be equal" not in compare.text(compare.compare(sessions[:1]))


def test_run_from_a_checkpoint_is_not_pooled_with_a_new_one(tmp_path: Path) -> None:
    new = started(make(tmp_path / "new"))
    comparison = compare.compare([new, branched(tmp_path / "branch", new / "checkpoint" / "latest.ckpt", seed=1)])
    assert comparison.differing == ("begun with",)
    assert [group.values for group in comparison.groups] == [
        ("new network",),
        ("checkpoint before round 1, epoch 1",),
    ]
    text = compare.text(comparison)
    assert "±" not in text and "what differs: begun with;" in text


def test_runs_from_checkpoints_are_grouped_by_round_and_epoch(tmp_path: Path) -> None:
    begun = [(1, 0), (1, 0), (1, 1), (0, 0)]
    sessions = [
        branched(tmp_path / str(seed), tmp_path / f"origin-{seed}.ckpt", first, seed=seed)
        for seed, first in enumerate(begun)
    ]
    comparison = compare.compare(sessions)
    assert [[run.session for run in group.runs] for group in comparison.groups] == [
        sessions[:2],
        sessions[2:3],
        sessions[3:],
    ]
    (line,) = [x for x in compare.text(comparison).splitlines() if "before the checkpoint" in x]
    assert line.endswith(f": {sessions[0]}, {sessions[1]}")


def test_resumed_session_is_pooled_with_an_uninterrupted_one(tmp_path: Path) -> None:
    one, other = (started(make(tmp_path / str(seed), seed=seed)) for seed in range(2))
    comparison = compare.compare([started(one, origin=one / "checkpoint" / "latest.ckpt"), other])
    assert comparison.differing == () and len(comparison.groups) == 1


def test_runs_from_one_checkpoint_are_reported_as_not_independent(tmp_path: Path) -> None:
    origins = [tmp_path / name for name in ("a.ckpt", "a.ckpt", "b.ckpt")]
    sessions = [branched(tmp_path / str(seed), origin, seed=seed) for seed, origin in enumerate(origins)]
    (line,) = [x for x in compare.text(compare.compare(sessions)).splitlines() if "not independent" in x]
    assert line.endswith(f": {sessions[0]}, {sessions[1]}")


def test_damaged_line_of_starts_is_skipped(tmp_path: Path) -> None:
    session = started(make(tmp_path / "a"))
    with (session / "starts.jsonl").open("ab") as file:
        file.write(b'\xff\n[]\n{"commit": "ha')
    assert compare.compare([session]).groups[0].runs[0].code["commit"] == HEAD


def test_runs_that_differ_in_local_options_form_a_group(tmp_path: Path) -> None:
    local = {"seed": 1, "sess_dir": Path("elsewhere"), "log_file": False, "log_tfb": False, "gpus": (3,)}
    changes = [{"gpus": (0,)}, local, {"gpus": (0,), "base_lr": 0.03}, {"gpus": (1,), "base_lr": 0.03, "seed": 2}]
    sessions = [make(tmp_path / str(n), **change) for n, change in enumerate(changes)]
    comparison = compare.compare([sessions[n] for n in (0, 2, 1, 3)])
    assert comparison.differing == ("base_lr",)
    groups = [(group.number, group.values, [run.session.name for run in group.runs]) for group in comparison.groups]
    assert groups == [(1, ("0.1",), ["0", "1"]), (2, ("0.03",), ["2", "3"])]


def test_number_of_gpus_separates_groups(tmp_path: Path) -> None:
    sessions = [make(tmp_path / str(n), gpus=gpus) for n, gpus in enumerate([(), (0,), (1,), (0, 1)])]
    comparison = compare.compare(sessions)
    assert comparison.differing == ("gpus",)
    assert [group.values for group in comparison.groups] == [("CPU",), ("1 GPU",), ("2 GPU",)]


def test_every_other_recorded_option_separates_groups(tmp_path: Path) -> None:
    changed: dict[str, Any] = {"size": (32, 48), "scale": (0.2, 1.0), "nesterov": True, "network": "resnet10"}
    one, other = make(tmp_path / "a", momentum=0.9), make(tmp_path / "b", momentum=0.9, **changed)
    comparison = compare.compare([one, other])
    assert set(comparison.differing) == set(changed)
    values = [dict(zip(comparison.differing, group.values, strict=True)) for group in comparison.groups]
    assert values[0] == {"size": "224", "scale": "not set", "nesterov": "off", "network": "resnet18"}
    assert values[1] == {"size": "32 48", "scale": "0.2 1.0", "nesterov": "on", "network": "resnet10"}
    kept = set(parser.read_yaml(one / "config.yaml"))
    assert comparison.equal + len(changed) == len(kept - {"seed", "sess_dir", "log_file", "log_tfb"}) + 1  # beginning


def test_missing_options_have_their_defaults(tmp_path: Path) -> None:
    one, other = make(tmp_path / "a"), make(tmp_path / "b")
    (other / "config.yaml").write_text("max_round: 2\nmax_epoch: 3\n")
    assert compare.compare([one, other]).differing == ()


def test_metrics_of_a_round_are_those_of_its_last_epoch(tmp_path: Path) -> None:
    records = [record(0, e, train_s=t, images_per_s=v) for e, (t, v) in enumerate([(1.0, 300.0), (3.0, 100.0)])]
    (group,) = compare.compare([make(tmp_path / "a", [*records, record(1, 0)])]).groups
    (run,) = group.runs
    first, second = run.rounds
    assert first == compare.Figures(0, 1, 0, None, 4.375, 0.51, 0.6, 1 + 3 + 0.5 + 0.5, (300 + 300) / 4)
    assert second == compare.Figures(1, 0, 100, 0.75, 3.5, 0.6, 0.7, 2.5, 1000.0)
    assert run.whole == compare.Figures(1, 0, 100, 0.75, 3.5, 0.6, 0.7, 7.5, (300 + 300 + 2000) / 6)


def test_unrecorded_time_is_unknown(tmp_path: Path) -> None:
    for number, name in enumerate(["train_s", "evaluate_s"]):
        session = make(tmp_path / str(number), [record(0, 0), record(0, 1, **{name: None})])
        assert compare.compare([session]).groups[0].runs[0].whole.seconds is None
    bare = make(tmp_path / "bare", [{"round": 0, "epoch": 0}])
    assert compare.compare([bare]).groups[0].figures(None) == [compare.Figures(0, 0, *[None] * 7)]


@pytest.mark.parametrize(("last", "finished"), [((1, 2), True), ((1, 1), False), ((0, 2), False), ((2, 0), True)])
def test_run_is_finished_after_the_last_epoch_of_its_last_round(
    last: tuple[int, int], finished: bool, tmp_path: Path
) -> None:
    every = [record(r, e) for r in range(3) for e in range(3)]
    session = make(tmp_path / "a", [r for r in every if (r["round"], r["epoch"]) <= last])
    comparison = compare.compare([session])
    assert comparison.groups[0].runs[0].finished == finished
    assert ("not finished" in compare.text(comparison)) != finished
    assert {row["finished"] for row in csv_rows(comparison)} == {"yes" if finished else "no"}


def seeds(folder: Path, top1: list[float], **options: Any) -> list[Path]:
    """A session for each accuracy, with different seeds, training times and other metrics."""
    return [
        make(
            folder / str(seed),
            [
                record(r, e, top1=t + 0.01 * r, best_top1=t + 0.02, loss=3 * t, train_s=10 * t, images_per_s=1000 * t)
                for r, e in itertools.product(range(2), range(3))
            ],
            seed=seed,
            **options,
        )
        for seed, t in enumerate(top1)
    ]


def test_mean_and_deviation_equal_the_statistics_module(tmp_path: Path) -> None:
    values = [0.5, 0.55, 0.7, 0.51]
    (group,) = compare.compare(seeds(tmp_path, values)).groups
    expected = {"top1": [v + 0.01 for v in values], "best_top1": [v + 0.02 for v in values]}
    expected |= {"loss": [3 * v for v in values], "images_per_s": [1000 * v for v in values]}
    for name, figures in expected.items():
        found = compare.mean_and_deviation(group.figures(1), name)
        assert found == pytest.approx((statistics.mean(figures), statistics.stdev(figures)))
    seconds = [6 * (10 * v + 0.5) for v in values]
    found = compare.mean_and_deviation(group.figures(None), "seconds")
    assert found == pytest.approx((statistics.mean(seconds), statistics.stdev(seconds)))


def test_missing_metrics_have_no_mean_or_deviation(tmp_path: Path) -> None:
    sessions = seeds(tmp_path, [0.5, 0.75])
    assert compare.mean_and_deviation(compare.compare(sessions[:1]).groups[0].figures(None), "top1") == (0.51, None)
    write_lines(sessions[1], [record(r, e, loss=None, top1=0.76) for r in range(2) for e in range(3)])
    (group,) = compare.compare(sessions).groups
    assert compare.mean_and_deviation(group.figures(None), "loss") == (None, None)
    assert compare.mean_and_deviation(group.figures(None), "top1")[0] == pytest.approx((0.51 + 0.76) / 2)
    assert compare.mean_and_deviation(group.figures(7), "top1") == (None, None)


def test_means_are_over_the_runs_with_the_most_rounds(tmp_path: Path) -> None:
    sessions = seeds(tmp_path, [0.5, 0.6, 0.9])
    write_lines(sessions[2], [record(0, e, top1=0.9) for e in range(3)] + [record(1, 0, top1=0.9)])
    (group,) = compare.compare(sessions).groups
    assert [f.top1 for f in group.figures(0)] == [0.5, 0.6, 0.9]
    assert [f.top1 for f in group.figures(1)] == pytest.approx([0.51, 0.61]) == [f.top1 for f in group.figures(None)]


# The text.


def row_of(text: str, *start: str) -> list[str]:
    """The cells of the row that begins with ``start``; two or more spaces separate cells."""
    rows = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in text.splitlines()]
    (found,) = [row for row in rows if row[: len(start)] == list(start)]
    return found


def test_table_shows_differences_and_last_and_best_accuracy(tmp_path: Path) -> None:
    sessions = seeds(tmp_path / "a", [0.5, 0.6]) + seeds(tmp_path / "b", [0.7], base_lr=0.03)
    text = compare.text(compare.compare(sessions))
    title = row_of(text, "group", "base_lr")
    assert title[2:] == ["runs", "round", "epoch", "top-1 last", "top-1 best", "h:mm:ss", "images/s"]
    assert row_of(text, "1", "0.1")[2:7] == ["2/2", "1/1", "3/3", "56.00% ± 7.07%", "57.00% ± 7.07%"]
    assert row_of(text, "1", "0.1")[7:] == ["0:00:36 ± 0:00:04", "550 ± 71"]
    assert row_of(text, "2", "0.03")[2:] == ["1/1", "1/1", "3/3", "71.00% ± -", "72.00% ± -", "0:00:45 ± -", "700 ± -"]
    by_round = ["0", "-", "1.6500 ± 0.2121", "55.00% ± 7.07%", "57.00% ± 7.07%", "0:00:18 ± 0:00:02"]
    assert row_of(text, "1", "2/2", "0/1") == ["1", "2/2", "0/1", "3/3", *by_round]
    assert "sample standard deviation" in text and "by the test labels" in text
    assert f"group 1 (base_lr 0.1): {sessions[0]}, {sessions[1]}" in text.splitlines()


def test_single_runs_show_no_deviation(tmp_path: Path) -> None:
    text = compare.text(compare.compare([make(tmp_path / "a"), make(tmp_path / "b", base_lr=0.03)]))
    assert "±" not in text
    assert row_of(text, "2", "0.03")[2:] == ["1/1", "1/1", "3/3", "62.00%", "70.00%", "0:00:15", "1,000"]


def test_durations_are_shown_in_hours_minutes_and_seconds(tmp_path: Path) -> None:
    for seconds, shown in [(59.6, "0:01:00"), (3599, "0:59:59"), (3661, "1:01:01"), (360_000, "100:00:00")]:
        session = make(tmp_path / shown, [record(0, 0, train_s=seconds, evaluate_s=0.0)])
        assert shown in compare.text(compare.compare([session]))


def test_many_differing_options_are_in_the_list_of_groups(tmp_path: Path) -> None:
    changed: dict[str, Any] = {"low_dim": 7, "base_lr": 0.5, "momentum": 0.75, "workers_num": 9, "network": "resnet50"}
    text = compare.text(compare.compare([make(tmp_path / "a"), make(tmp_path / "b", **changed)]))
    assert row_of(text, "group", "runs", "round", "epoch", "top-1 last")
    (line,) = [line for line in text.splitlines() if line.startswith("group 2 (")]
    assert all(f"{name} {value}" in line for name, value in changed.items())


def test_runs_of_different_lengths_are_compared(tmp_path: Path) -> None:
    every = [record(r, e) for r in range(4) for e in range(3)]
    comparison = compare.compare([make(tmp_path / "a"), make(tmp_path / "b", every, max_round=4)])
    assert comparison.rounds == [0, 1, 2, 3]
    text = compare.text(comparison)
    assert row_of(text, "2", "1/1", "3/3")[:4] == ["2", "1/1", "3/3", "3/3"]
    assert len([line for line in text.splitlines() if line.startswith("1  ")]) == 1 + 2
    assert [row["group"] for row in csv_rows(comparison)] == ["1", "1", "2", "2", "2", "2"]


def test_same_seed_twice_in_a_group_is_reported(tmp_path: Path) -> None:
    one, other, third = make(tmp_path / "a"), make(tmp_path / "b", seed=1), make(tmp_path / "c", base_lr=0.5)
    assert "not independent" not in compare.text(compare.compare([one, other, third]))
    shutil.copytree(one, tmp_path / "d")
    (line,) = [x for x in compare.text(compare.compare([one, other, tmp_path / "d"])).splitlines() if "not indep" in x]
    assert line.endswith(f"{one}, {tmp_path / 'd'}")


def without_labels(folder: Path, **options: Any) -> Path:
    nothing: dict[str, Any] = {"top1": None, "top5": None, "best_top1": None, "consistency": None}
    return make(folder, [record(r, e, **nothing) for r in range(2) for e in range(3)], **options)


def test_runs_without_labels_have_no_accuracy_columns(tmp_path: Path) -> None:
    one = without_labels(tmp_path / "a")
    text = compare.text(compare.compare([one]))
    assert "top-1" not in text and "consistency" not in text and "4.2500" in text
    mixed = compare.compare([one, make(tmp_path / "b", low_dim=5)])
    assert row_of(compare.text(mixed), "1", "128")[5:7] == ["-", "-"]
    assert [row["top1"] for row in csv_rows(mixed)] == ["", "", "0.52", "0.62"]


# The files.


def test_csv_has_a_line_for_each_session_and_round(tmp_path: Path) -> None:
    sessions = [*seeds(tmp_path / "a", [0.5, 0.6]), make(tmp_path / "b", data_root=Path('x, "y"\n$z'), seed=9)]
    rows = csv_rows(compare.compare(sessions))
    assert [(row["session"], row["round"]) for row in rows] == [(str(s), r) for s in sessions for r in "01"]
    assert [row["seed"] for row in rows] == ["0", "0", "1", "1", "9", "9"]
    assert [row["group"] for row in rows] == ["1", "1", "1", "1", "2", "2"]
    assert [row["data_root"] for row in rows] == ["not set"] * 4 + ['x, "y"\n$z'] * 2
    assert [float(row["top1"]) for row in rows[:4]] == pytest.approx([0.5, 0.51, 0.6, 0.61])
    wanted = {"epoch": "2", "anchors": "100", "consistency": "0.75", "loss": "3.25", "best_top1": "0.7"}
    assert rows[-1].items() >= (wanted | {"seconds": "7.5", "images_per_s": "1000.0"}).items()


def test_csv_has_the_means_and_deviations_of_the_table(tmp_path: Path) -> None:
    sessions = [*seeds(tmp_path / "a", [0.5, 0.6]), *seeds(tmp_path / "b", [0.7], base_lr=0.03)]
    comparison = compare.compare(sessions)
    for scope, found in (
        ("round", lambda group, round: group.figures(round)),
        ("run", lambda group, _: group.figures(None)),
    ):
        rows = zip(csv_rows(comparison, scope, "mean"), csv_rows(comparison, scope, "standard deviation"), strict=True)
        for mean, deviation in rows:
            group = comparison.groups[int(mean["group"]) - 1]
            figures = found(group, int(mean["round"]))
            assert mean["session"] == mean["seed"] == mean["finished"] == ""
            assert int(mean["runs"]) == int(deviation["runs"]) == len(figures) == 3 - group.number
            assert (mean["base_lr"], deviation["base_lr"]) == group.values * 2
            assert mean["epoch"] == deviation["epoch"] == "2"
            for name in compare.FIGURES[2:]:
                expected = compare.mean_and_deviation(figures, name)
                written = [float(row[name]) if row[name] else None for row in (mean, deviation)]
                assert tuple(written) == expected
    assert len(csv_rows(comparison, "round", "mean")) == 4 and len(csv_rows(comparison, "run", "mean")) == 2
    assert [float(row["seconds"]) for row in csv_rows(comparison, "run")] == pytest.approx([33, 39, 45])


def test_csv_names_are_never_spreadsheet_formulas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sessions = [make(Path("=1+1"), published="@SUM(1)"), make(Path("-a"), published="=2"), make(Path("ü, b"))]
    comparison = compare.compare(sessions)
    assert not compare.to_csv(comparison).startswith(b"\xef\xbb\xbf")
    rows = csv_rows(comparison, "run")
    assert [(row["session"], row["published"]) for row in rows] == [
        ("'=1+1", "'@SUM(1)"),
        ("'-a", "'=2"),
        ("ü, b", "not set"),
    ]


ODD = [
    "a b",
    "$x$ <b>[red]{0}%s",
    'with, "quotes"',
    "line\nbreak",
    "r\rr",
    "\x1b[31m",
    "日本",
    "_a",
    os.fsdecode(b"\xff"),
]


def test_unusual_session_names_are_accepted(tmp_path: Path) -> None:
    values = ["$x$", "$ $", "日本\n", "\x1b[31m", "_a", 'a,"b"', "{0}%s", "é", "x" * 200]
    sessions = [make(tmp_path / name, data_root=Path(value)) for name, value in zip(ODD, values, strict=True)]
    comparison = compare.compare(sessions)
    lines = compare.text(comparison).split("\n")
    assert all(line.isprintable() for line in lines)
    assert [line.split()[1] for line in lines if line.startswith("group ") and "(" in line] == list("123456789")
    shown = [str(session).encode("utf-8", "backslashreplace").decode("utf-8") for session in sessions]
    assert [row["session"] for row in csv_rows(comparison)] == [name for name in shown for _ in range(2)]
    assert [row["data_root"] for row in csv_rows(comparison)[::2]] == values
    for _ in range(2):
        compare.write(comparison, tmp_path / "out")


def pixels_by_group(pixels: np.ndarray) -> dict[str, int]:
    """Number of pixels in the colour of each of the first groups."""
    first = {"1": (0x1F, 0x77, 0xB4), "2": (0xFF, 0x7F, 0x0E), "3": (0x2C, 0xA0, 0x2C)}
    return {name: int((pixels == colour).all(axis=2).sum()) for name, colour in first.items()}


def test_plot_shows_each_group_in_its_colour(tmp_path: Path) -> None:
    sessions = seeds(tmp_path / "a", [0.5, 0.6]) + seeds(tmp_path / "b", [0.7, 0.8], base_lr=0.5)
    pixels = picture(compare.draw(compare.compare(sessions)))
    height, width, _ = pixels.shape
    assert 1000 <= width <= 1600 and 400 <= height <= 800
    left, right = pixels[:, : width * 6 // 10], pixels[:, width * 7 // 10 :]
    for half, least in ((left, 200), (right, 5000)):
        found = pixels_by_group(half)
        assert found["1"] > least and found["2"] > least and found["3"] == 0
    assert (
        abs(pixels_by_group(right)["2"] / pixels_by_group(right)["1"] - 8 / 6) < 0.05
    )  # proportional to the training time


def test_more_accurate_group_is_drawn_higher(tmp_path: Path) -> None:
    for number, (kind, values) in enumerate([("top1", (0.5, 0.9)), ("loss", (1.0, 5.0))]):
        sessions = []
        for low_dim, value in enumerate(values, start=1):
            changed = {"top1": None, "best_top1": None} | {kind: value}
            records = [record(r, e, **changed) for r in range(2) for e in range(3)]
            sessions.append(make(tmp_path / str(number) / str(low_dim), records, low_dim=low_dim))
        pixels = picture(compare.draw(compare.compare(sessions)))
        curves = pixels[:450, : pixels.shape[1] * 6 // 10]
        rows = [np.nonzero((curves == c).all(axis=2))[0].mean() for c in ((0x1F, 0x77, 0xB4), (0xFF, 0x7F, 0x0E))]
        assert rows[1] < rows[0] - 200


@pytest.mark.parametrize("count", [1, 12, 30])
def test_plot_grows_with_the_number_of_groups(count: int, tmp_path: Path) -> None:
    sessions = [make(tmp_path / str(n), low_dim=n + 1, data_root=Path("/x" * 40 + str(n))) for n in range(count)]
    pixels = picture(compare.draw(compare.compare(sessions)))
    assert 500 + 20 * count < pixels.shape[0] < 700 + 50 * count
    for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]):
        assert (edge == 255).all()  # nothing is clipped


def test_runs_without_metrics_give_a_plot(tmp_path: Path) -> None:
    assert picture(compare.draw(compare.compare([make(tmp_path / "a", [{"round": 0, "epoch": 0}])]))).size


def test_files_of_an_earlier_comparison_are_replaced(tmp_path: Path) -> None:
    sessions = [make(tmp_path / "a"), make(tmp_path / "b", low_dim=5)]
    folder = tmp_path / "new" / "folder"
    assert compare.write(compare.compare(sessions[:1]), folder) == (
        folder / "comparison.csv",
        folder / "comparison.png",
    )
    before = [path.read_bytes() for path in sorted(folder.iterdir())]
    comparison = compare.compare(sessions)
    compare.write(comparison, folder)
    after = [path.read_bytes() for path in sorted(folder.iterdir())]
    assert len(after) == 2 and after[0] == compare.to_csv(comparison) and after[0] != before[0]
    assert (picture(after[1]) == picture(compare.draw(comparison))).all()
    assert picture(before[1]).shape != picture(after[1]).shape


def put_other_file(kind: str, path: Path, ours: bytes) -> None:
    if kind == "folder":
        path.mkdir()
    elif kind == "link":
        (path.parent / "elsewhere").write_bytes(ours)
        path.symlink_to(path.parent / "elsewhere")
    else:
        others = {".csv": b"a,b\n1,2\n", ".png": b"\x89PNG\r\n\x1a\n no picture IEND\xaeB`\x82"}
        path.write_bytes({"other": others[path.suffix], "cut": ours[:-3], "empty": b""}[kind])


@pytest.mark.parametrize("kind", ["folder", "link", "other", "cut", "empty"])
@pytest.mark.parametrize("name", ["comparison.csv", "comparison.png"])
def test_other_files_are_not_overwritten(name: str, kind: str, tmp_path: Path) -> None:
    comparison = compare.compare([make(tmp_path / "a")])
    folder = tmp_path / "out"
    folder.mkdir()
    ours = {"comparison.csv": compare.to_csv, "comparison.png": compare.draw}[name](comparison)
    put_other_file(kind, folder / name, ours)
    before = {path: path.is_file() and path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UsageError) as refused:
        compare.write(comparison, folder)
    assert str(folder / name) in str(refused.value) and "\n" not in str(refused.value)
    assert {path: path.is_file() and path.read_bytes() for path in folder.iterdir()} == before


def test_unwritable_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    for folder in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(UsageError, match="cannot be written"):
            compare.write(compare.compare([make(tmp_path / f"s{len(folder.parts)}")]), folder)
    assert (tmp_path / "file").read_text() == "precious"


def test_failed_write_keeps_the_older_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "out"
    compare.write(compare.compare([make(tmp_path / "a")]), folder)
    before = {path: path.read_bytes() for path in folder.iterdir()}

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UsageError, match="No space left"):
        compare.write(compare.compare([make(tmp_path / "b")]), folder)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
