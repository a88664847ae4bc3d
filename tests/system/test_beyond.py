"""Options beyond the paper in whole runs: resumed runs end with the same bits, and invalid values are refused."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_main import photos, start, tiny_network

import main
from lib.evaluation.evaluate import BANK, RECOMPUTED
from lib.training.trainer import Trainer
from runs import assert_alike, metrics

__all__ = ["photos", "start", "tiny_network"]  # fixtures

SCHEDULE = "--lr-policy cosine --lr-span run --lr-warmup-epochs 1"
OPTIONS = {
    "schedule": SCHEDULE,
    "views": "--views 2",
    "neighbourhoods": "--ANs-size 3 --ANs-size-first 1 --ANs-reciprocal-first --ANs-every 1 --max-epoch 3",
    "early size": "--early-size 6 --early-share 0.4",
    "entropy": "--entropy-loss 0.2 --views 2",
    "head and stage": "--head mlp --embed conv1",
    "view loss": f"--views 2 --view-loss 0.5 --random-horizontal-flip {SCHEDULE}",
}
REFUSED = {
    "--embed conv9": "--network tiny: has no stage conv9; set --embed to one of conv1, fc",
    "--head wide": "command line: head: input should be 'linear' or 'mlp', got 'wide'",
    "--views 3": "views: 3 views of each image do not fill a batch of 8",
    "--view-loss 1": "view_loss: compares views of the same image, and there is one view; set views to 2",
    "--views 8": "--batch-size 8: the batch is divided among 1 processes, and each needs at least two images with 8",
    "--views 2 --batch-size 50": "24 training images with 2 views each are fewer than a batch of 50",
    "--ANs-size 2 --ANs-size-first 3": "ANs_size_first: 3 neighbours cannot grow to ANs_size 2; set it to 2 or less",
    "--early-size 9": "early_size: 9 is larger than size: 8; set it lower",
    "--early-size 2": "--network tiny: does not accept images of 2 x 2 pixels",
    "--lr-warmup-epochs 2": "lr_warmup_epochs: 2 leave nothing of the schedule, which covers 2 epochs",
}


def stopping_at(step: int, patch: pytest.MonkeyPatch) -> None:
    """Makes a signal arrive in this step of a run."""
    calls, backward = iter(range(1, step)), Trainer.backward

    def stopped(*arguments: Any) -> Any:
        if next(calls, None) is None:
            signal.raise_signal(signal.SIGTERM)
        return backward(*arguments)

    patch.setattr(Trainer, "backward", stopped)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_stopped_and_resumed_run_ends_with_the_same_bits(name: str, start: list[str], tmp_path: Path) -> None:
    words = [*start, *OPTIONS[name].split()]
    assert main.main([*words, "--session", "whole"]) == 0
    whole, stopped = (tmp_path / "sessions" / name for name in ("whole", "stopped"))
    words = [*words, "--session", "stopped"]
    for step in (2, 11, 3):
        with pytest.MonkeyPatch.context() as patch:
            stopping_at(step, patch)
            assert main.main(words) == 143
        words = ["--resume", str(stopped)]
    assert main.main(words) == 0
    assert_alike(stopped, whole)


@pytest.mark.parametrize("words", REFUSED)
def test_invalid_values_are_refused_at_the_start(
    words: str, start: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main([*start, *words.split()]) == 2
    shown = capsys.readouterr()
    assert REFUSED[words] in shown.err and shown.err.count("\n") == 1
    assert not (tmp_path / "sessions").exists()


def test_discovery_repeats_in_a_round_and_neighbourhoods_grow(
    start: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[tuple[int, int, torch.Size]] = []
    discover = Trainer.discover

    def watched(trainer: Trainer) -> None:
        discover(trainer)
        state = trainer.state
        found.append((state.round, state.epoch, state.neighbourhoods.neighbours.shape))

    monkeypatch.setattr(Trainer, "discover", watched)
    words = "--max-round 4 --max-epoch 5 --ANs-size 5 --ANs-size-first 2 --ANs-every 2 --ANs-select-rate 0.25".split()
    assert main.main([*start, *words]) == 0
    sizes = {1: (6, 2), 2: (12, 4), 3: (18, 5)}  # 24 images
    rounds = [(round, epoch, size) for round, size in sizes.items() for epoch in (0, 2, 4)]
    assert [entry for entry in found if entry[0]] == rounds


def test_test_run_evaluates_the_embed_stage_as_well(
    start: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main([*start, "--embed", "conv1", "--head", "mlp", "--session", "run"]) == 0
    session = tmp_path / "sessions" / "run"
    rows = metrics(session)
    assert [row["embed_top1"] is None for row in rows] == [True, False] * 3  # after each round
    capsys.readouterr()
    features = tmp_path / "features.npz"
    words = ["--resume", str(session), "--test-only", "--export-features", str(features)]
    assert main.main(words) == 0
    kept = json.loads((session / "evaluation.json").read_text(encoding="utf-8"))["results"]
    assert [row["features"] for row in kept] == [RECOMPUTED, BANK, f"conv1, pooled, {RECOMPUTED}"]
    assert (kept[1]["top1"], kept[2]["top1"]) == (rows[-1]["top1"], rows[-1]["embed_top1"])
    with np.load(features) as arrays:
        assert arrays["train_embeddings"].shape == (24, 4)  # the channels of the stage
        assert np.linalg.norm(arrays["test_embeddings"], axis=1) == pytest.approx(np.ones(8), rel=1e-5)


@pytest.mark.parametrize(("trained", "asked"), [("linear", "mlp"), ("mlp", "linear")])
def test_checkpoint_with_another_head_is_refused(
    trained: str, asked: str, start: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main([*start, "--max-round", "1", "--head", trained, "--session", "run"]) == 0
    capsys.readouterr()
    assert main.main(["--resume", str(tmp_path / "sessions" / "run"), "--head", asked, "--test-only"]) == 2
    shown = capsys.readouterr().err
    assert f"was trained with --head {trained}; set --head {trained}, or choose another checkpoint" in shown
    assert shown.count("\n") == 1


def test_image_passes_count_each_view(start: list[str], tmp_path: Path) -> None:
    for views in (1, 2):
        assert main.main([*start, "--views", str(views), "--session", f"views-{views}"]) == 0
        rows = metrics(tmp_path / "sessions" / f"views-{views}")
        assert [row["passes"] for row in rows] == [views * number for number in range(1, 7)]
