"""The study's figures compared with plain numpy and scipy, and its tables."""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from benchmarks import simclr, study_results
from benchmarks.study_results import Results
from runs import finished, words_of


def write_epochs(folder: Path, name: str, *accuracies: float) -> None:
    rows = [
        {"round": round, "epoch": epoch, "top1": top1 - 0.1 * (epoch == 0), "consistency": round / 10 or None}
        for round, top1 in enumerate(accuracies)
        for epoch in (0, 1)
    ]
    rows = [{**row, "train_s": 10.0, "images_per_s": 500.0} for row in rows]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_arms_are_averaged_and_paired_by_seed(tmp_path: Path) -> None:
    write_epochs(tmp_path, "restarts-s0", 0.5, 0.52)
    write_epochs(tmp_path, "restarts-s1", 0.5, 0.54)
    write_epochs(tmp_path, "and-s0", 0.5, 0.55)
    write_epochs(tmp_path, "and-s1", 0.5, 0.55)
    write_epochs(tmp_path, "and-s7", 0.5, 0.9)  # no other arm has this seed
    text = Results(tmp_path).tables()
    rows = {line.split("|")[1].strip(): line for line in text.split("consistency")[0].splitlines() if "|" in line}
    assert "53.00 ± 1.41" in rows["restarts"] and "66.67 ± 20.21" in rows["and"]
    difference = text.split("paired differences: kNN, bank")[1].splitlines()[4]
    assert "0, 1" in difference and "+2.00" in difference and "-10.71 to +14.71" in difference


def test_neighbour_statistics_equal_plain_loops() -> None:
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 3, 200)
    rows = np.eye(3)[labels] + draw.normal(0, 0.6, (200, 3))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    found = study_results.neighbour_figures(torch.from_numpy(rows).float(), torch.from_numpy(labels), 3, 0.1)

    similarities = rows @ rows.T
    p = np.exp(similarities / 0.1) / np.exp(similarities / 0.1).sum(axis=1, keepdims=True)
    entropy = -(p * np.log(p)).sum(axis=1)
    np.fill_diagonal(similarities, -2)
    nearest = labels[similarities.argmax(axis=1)]
    is_correct = (nearest == labels)[np.argsort(entropy)]
    assert found["consistency_by_quartile"] == pytest.approx([part.mean() for part in np.split(is_correct, 4)])
    assert found["consistency_of_share"][4] == pytest.approx(is_correct[:50].mean())
    assert found["rank_correlation"] == pytest.approx(stats.spearmanr(entropy, nearest == labels).statistic, abs=1e-6)
    assert found["pairs"][0][1] == ((labels == 0) & (nearest == 1)).sum()
    assert 0.3 < is_correct.mean() < 1


def test_mcnemar_counts_images_that_one_arm_alone_gets_right(tmp_path: Path) -> None:
    correct = {"restarts": [1] * 10 + [0] * 30, "and": [1] * 9 + [0] + [1] * 8 + [0] * 22}
    for arm, bits in correct.items():
        packed = base64.b64encode(np.packbits(np.array(bits, bool)).tobytes()).decode()
        (tmp_path / f"{arm}-s0.json").write_text(json.dumps({"correct": packed, "knn": 0.1, "linear_conv5": 0.1}))
    expected = stats.binomtest(8, 9).pvalue
    text = Results(tmp_path).tables().split("(McNemar, exact)")[1]
    (row,) = [line for line in text.splitlines() if line.startswith("| and | 0 |")]
    assert row == f"| and | 0 | 8 | 1 | {expected:.2g} |"


@pytest.mark.slow
def test_evaluation_of_a_run_equals_that_of_the_program(photos: Path, tmp_path: Path) -> None:
    finished(*words_of(photos, tmp_path, "run"))
    found = study_results.evaluate_run(tmp_path / "run", photos)
    words = ["--resume", str(tmp_path / "run"), "--test-only", "--protocol", "knn", "nn", "linear"]
    finished(*words, "--linear-layers", "conv5", "--gpus", "")
    (path,) = (tmp_path / "run").glob("**/evaluation*.json")
    results: list[dict[str, Any]] = json.loads(path.read_text())["results"]
    assert [row["top1"] for row in results] == pytest.approx(
        [found[name] for name in ("knn", "knn_bank", "nn", "nn_bank", "linear_conv5")]
    )
    finished("--resume", str(tmp_path / "run"), "--test-only", "--protocol", "graph", "--embed", "conv5", "--gpus", "")
    (path,) = (tmp_path / "run").glob("**/evaluation*.json")
    (graph,) = json.loads(path.read_text())["results"]
    assert found["graph_nmi"] == pytest.approx(graph["nmi"], abs=1e-6)
    (tmp_path / "round0-s0.json").write_text(json.dumps(found))
    (tmp_path / "round0-s0.jsonl").write_text((tmp_path / "run" / "metrics.jsonl").read_text())
    results_of_one = Results(tmp_path)
    for plot in (results_of_one.knn_plot(), results_of_one.consistency_plot()):
        assert [text.get_text() for text in plot.axes[0].get_legend().get_texts()] == ["round0 (1)"]


def test_missing_lightly_is_named_with_the_pip_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lightly.loss", None)
    monkeypatch.setitem(sys.modules, "lightly", None)
    assert simclr.main(["--data-root", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == "error: lightly is not installed; pip install -r requirements-peers.txt\n"
    assert not list(tmp_path.iterdir())
