"""The screening: equal image passes, separate validation images, and the summary of results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_study import config

from benchmarks import screening
from benchmarks.screening import ARMS, SEEDS, choose_images, plan, summary
from lib.config.parser import read_options
from lib.session import metrics
from runs import output_of, start

__all__ = ["config"]  # a fixture

SMALL = """
import sys
from benchmarks import screening, study
study.CFGS, screening.TRAIN, screening.HELD_OUT = [sys.argv[1]], 60, 20
screening.PASSES, screening.FIRST_EPOCHS, screening.EPOCHS, screening.ROUNDS = 4, 2, 1, 3
sys.exit(screening.main(sys.argv[2:]))
"""
"""The screening at a small size; the first argument is the config."""


def test_all_arms_have_the_same_image_passes() -> None:
    runs = plan(SEEDS, list(ARMS))
    names = [run.name for run in runs]
    assert len(set(names)) == len(names) == len(SEEDS) * (len(ARMS) + 1)
    options = {run.name: read_options(["--cfgs", "configs/base.yaml", *run.flags]) for run in runs}
    for run in runs:
        own = options[run.name]
        passes = own.max_round * own.max_epoch * own.views
        if run.branches_from:
            assert names.index(run.branches_from) < names.index(run.name)
            passes = options[run.branches_from].max_epoch + (own.max_round - 1) * own.max_epoch
        assert passes == (18 if run.name.startswith("round0") else 30), run.name
        assert run.last == (own.max_round - 1, own.max_epoch - 1)


def test_arms_without_discovery_need_no_round_0() -> None:
    assert [run.name for run in plan((4,), ["flip", "cosine"])] == ["flip-s4", "cosine-s4"]


def chosen(folder: Path) -> dict[str, list[str]]:
    return {
        split: sorted(str(path.resolve()) for path in (folder / split).rglob("*.png")) for split in ("train", "test")
    }


def test_validation_images_are_not_trained_on(photos: Path, tmp_path: Path) -> None:
    for name in ("first", "again"):
        choose_images(photos, tmp_path / name, 60, 30)
    found = chosen(tmp_path / "first")
    assert found == chosen(tmp_path / "again")
    assert [len(set(found[split])) for split in ("train", "test")] == [60, 30]
    assert not set(found["train"]) & set(found["test"])
    assert all(path.startswith(str((photos / "train").resolve())) for paths in found.values() for path in paths)


def test_too_few_images_are_refused(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--data-root", str(photos), "--sess-dir", str(tmp_path / "s"), "--results", str(tmp_path / "r")]
    assert screening.main(words) == 2
    shown = capsys.readouterr().err
    assert "has 100 training images in folders train/<class>/, and the screening needs 25000" in shown
    assert shown.count("\n") == 1 and not (tmp_path / "r").exists()


def test_summary_has_mean_and_deviation_of_each_arm() -> None:
    def line(arm: str, accuracy: float) -> dict[str, Any]:
        return {"arm": arm, "passes": 30.0, "knn_bank": accuracy / 2, "knn_conv5": accuracy, "images_per_s": 100}

    rows = summary([line("and", 0.5), {**line("flip", 0.6), "linear": 0.7}, line("and", 0.52)]).splitlines()
    assert rows[2] == "| flip | 1 | 30 | 30.00 | 60.00 | 70.00 | - | 100.00 |"
    assert rows[3] == "| and | 2 | 30 | 25.50 ± 0.71 | 51.00 ± 1.41 | - | - | 100.00 ± 0.00 |"


@pytest.mark.slow
def test_finished_runs_add_a_line_each_to_the_results(config: Path, photos: Path, tmp_path: Path) -> None:
    sessions, results = tmp_path / "sessions", tmp_path / "results"
    results.mkdir()
    other = {"arm": "and", "seed": 5, "started": "2020-01-01", "passes": 4, "knn_bank": 0.5}
    other |= {"knn_conv5": 0.5, "images_per_s": 1}
    (results / "screening.jsonl").write_text(json.dumps(other) + "\n")
    words = [str(config), "--data-root", str(photos), "--sess-dir", str(sessions), "--results", str(results)]
    words += ["--jobs", "2", "--seeds", "5", "--arms", "and", "view-loss"]
    process = start(*words, program=("-c", SMALL))
    shown = output_of(process)
    assert process.returncode == 0, shown

    lines = [json.loads(line) for line in (results / "screening.jsonl").read_text().splitlines()]
    assert lines[0] == other
    assert sorted(line["arm"] for line in lines[1:]) == ["and", "round0", "view-loss"]
    for line in lines[1:]:
        last = metrics.read(sessions / f"{line['arm']}-s5")[-1]
        assert (line["knn_bank"], line["knn_conv5"]) == (last["top1"], last["embed_top1"])
        assert line["passes"] == (2 if line["arm"] == "round0" else 4)
        assert line["processor"] and line["commits"] and line["images_per_s"] > 0
    assert metrics.read(sessions / "and-s5")[-1]["anchors"] == 60

    (results / "screening.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:-1]))
    process = start(*words, program=("-c", SMALL))  # adds the missing line without training
    assert output_of(process) == "" and process.returncode == 0
    assert [json.loads(line) for line in (results / "screening.jsonl").read_text().splitlines()] == lines
    process = start(*words, "--evaluate", program=("-c", SMALL))
    shown = output_of(process)
    assert process.returncode == 0, shown
    evaluated = [json.loads(line) for line in (results / "screening.jsonl").read_text().splitlines()]
    assert [line.keys() & {"linear", "graph_nmi"} for line in evaluated[:1]] == [set()]
    for before, line in zip(lines[1:], evaluated[1:], strict=True):
        found = json.loads((sessions / f"{line['arm']}-s5" / "evaluation.json").read_text())["results"]
        assert (line["linear"], line["graph_nmi"]) == (
            found[0]["top1"],
            found[1]["nmi"],
        ) and line.items() > before.items()
    process = start(*words, "--table", program=("-c", SMALL))
    assert "| and | 2 | 4 |" in output_of(process)
