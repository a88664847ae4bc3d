"""The comparison of clusterings: figures, table and unusable input."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import clusterings


def test_unassigned_samples_count_as_wrong_and_as_one_group() -> None:
    labels = np.repeat([0, 1, 2], 4)
    clusters = np.array([5, 5, 5, 5, 2, 2, 2, -1, -1, -1, -1, -1])
    figures = clusterings.judge(labels, clusters)
    assert (figures["groups"], figures["left out"], figures["accuracy"]) == pytest.approx((2, 500 / 12, 700 / 12))
    renamed = np.where(clusters < 0, 7, clusters)
    assert figures["NMI"] == pytest.approx(clusterings.judge(labels, renamed)["NMI"])
    nothing = clusterings.judge(labels, np.full(12, -1))
    assert (nothing["groups"], nothing["accuracy"], nothing["left out"]) == (0, 0, 100)


def test_every_method_finds_planted_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 5, 300)
    rows = (10 * np.eye(8)[labels] + draw.normal(size=(300, 8))).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    np.savez(tmp_path / "a.npz", train_embeddings=rows, train_labels=labels)
    monkeypatch.setattr(clusterings, "pixels", lambda: (rows[:50], labels[:50]))
    words = ["--features", "planted", *[str(tmp_path / "a.npz")] * 2, "--most", "200", "--seeds", "1"]
    assert clusterings.main(words) == 0
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| planted")]
    assert [line[1] for line in lines] == ["300"] * 2 + ["200"] * 5
    assert len({line[2] for line in lines}) == 5
    assert all(float(line[4].split()[0]) > 90 for line in lines)  # NMI


@pytest.mark.parametrize("content", [None, b"no archive", {"train_embeddings": np.eye(3)}])
def test_features_without_labels_are_refused(
    content: bytes | dict[str, np.ndarray] | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.npz"
    if isinstance(content, dict):
        np.savez(path, **content)
    elif content:
        path.write_bytes(content)
    assert clusterings.main(["--features", "a", str(path)]) == 2
    assert "no embeddings with labels can be read" in capsys.readouterr().err
    assert clusterings.main(["--features", "a"]) == 2
