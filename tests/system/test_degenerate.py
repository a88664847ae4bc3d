"""Degenerate data, such as identical images: every part of a run accepts it, and no figure is NaN."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import main
import synthetic
from lib.evaluation.knn import weighted_knn
from lib.method import diagnostics
from lib.method.discovery import discover
from lib.method.loss import neighbourhood_loss
from lib.method.neighbourhoods import Neighbourhoods

pytestmark = pytest.mark.slow
RUN = """
--dataset folder --network resnet10-w16 --resize 8 --size 8 --scale 0.3 1 --colorjitter 0.4 0.4 0.4 0.1 --low-dim 4
--random-grayscale 0.2 --random-horizontal-flip --batch-size 2 --workers-num 0 --max-round 3 --max-epoch 1
--ANs-select-rate 0.5 --base-lr 0.01 --seed 3 --brief --protocol knn nn linear cluster graph --clusters 2 --report
--momentum 0.9 --weight-decay 5e-4"""
Picture = Callable[[int], np.ndarray]


def one_colour(value: int) -> Picture:
    return lambda number: np.full((8, 8, 3), value, np.uint8)


KINDS: dict[str, tuple[int, int, Picture]] = {
    "two images": (2, 2, synthetic.picture),
    "one class": (9, 1, synthetic.picture),
    "a class of its own each": (6, 6, synthetic.picture),
    "the same image again and again": (9, 2, lambda number: synthetic.picture(0)),
    "black images": (9, 2, one_colour(0)),
    "white images": (9, 2, one_colour(255)),
    "images of one pixel": (9, 2, lambda number: synthetic.picture(number)[:1, :1]),
    "one colour each": (9, 2, lambda number: one_colour(25 * number)(0)),
}
"""Number of images, number of classes, and the images themselves."""


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_degenerate_data_can_be_trained_on(
    kind: str, labelled: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, classes, draw = KINDS[kind]
    for split in ("train", "test"):
        for number in range(images):
            path = tmp_path / "photos" / split / (str(number % classes) if labelled else "") / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draw(number)).save(path)
    session, out = tmp_path / "run", tmp_path / "neighbours.csv"
    words = [*RUN.split(), "--data-root", str(tmp_path / "photos"), "--sess-dir", str(tmp_path)]
    assert main.main([*words, "--session", "run", "--export-table", str(out)]) == 0, capsys.readouterr().err
    test = ["--resume", str(session), "--test-only", "--export-features", str(tmp_path / "all.npz")]
    assert main.main([*test, *([] if labelled else ["--protocol", "cluster", "graph"])]) == 0, capsys.readouterr().err
    shown = capsys.readouterr()
    is_equal = kind in ("the same image again and again", "black images", "white images")
    assert ("1 of the 2 clusters are empty" in shown.out) == (is_equal and (classes == 2 or not labelled))
    assert "nan" not in shown.out.lower().split() and shown.err == ""
    rows = [json.loads(line) for line in (session / "metrics.jsonl").read_text().splitlines()]
    unknown = {name for row in rows for name, value in row.items() if value is None}
    expected = {
        "consistency",
        "kept",
        "drift",
        "val_top1",
        "embed_top1",
        *(() if labelled else ("top1", "top5", "best_top1")),
    }
    assert len(rows) == 3 and unknown <= expected
    assert rows[-1]["drift"] is not None and (rows[-1]["consistency"] is not None) == labelled
    saved = torch.load(session / "checkpoint" / "latest.ckpt", weights_only=True)
    assert (
        saved["ANs_discovery"].pop("consistency").isfinite() == labelled
    )  # NaN means unknown in the reference's format
    assert all(value.isfinite().all() for value in tensors(saved))
    assert "nan" not in out.read_text() and (session / "report.html").exists()


def tensors(content: Any) -> list[torch.Tensor]:
    parts = content.values() if isinstance(content, dict) else content if isinstance(content, (list, tuple)) else ()
    return [content] if torch.is_tensor(content) else [tensor for part in parts for tensor in tensors(part)]


def test_single_training_image_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "photos" / "train").mkdir(parents=True)
    Image.fromarray(synthetic.picture(0)).save(tmp_path / "photos" / "train" / "a.png")
    assert main.main([*RUN.split(), "--data-root", str(tmp_path / "photos"), "--sess-dir", str(tmp_path)]) == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert "1 training images are fewer than a batch of 2" in message and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("zeros", [[0], [0, 3], range(6)])
def test_zero_rows_give_finite_results(zeros: list[int]) -> None:
    memory = torch.nn.functional.normalize(torch.randn(6, 3, generator=torch.Generator().manual_seed(0)), dim=1)
    memory[list(zeros)] = 0
    found = discover(memory, temperature=0.1, anchors=6, size=2)
    assert found.entropy.isfinite().all()
    assert torch.allclose(
        found.entropy[list(zeros)], torch.tensor(math.log(6))
    )  # all samples are equally similar to it
    embeddings = memory.clone().requires_grad_()
    loss = neighbourhood_loss(embeddings, memory, found.of(torch.arange(6)), temperature=0.1)
    loss.backward()
    assert loss.isfinite() and embeddings.grad is not None and embeddings.grad.isfinite().all()
    alone = neighbourhood_loss(memory, memory, Neighbourhoods.none(6).of(torch.arange(6)), temperature=0.1)
    logits = (memory @ memory.t()).double() / 0.1
    assert alone.item() == pytest.approx(-logits.log_softmax(dim=1).diagonal().mean().item(), abs=1e-5)
    scores = weighted_knn(memory, memory, torch.tensor([0, 0, 0, 1, 1, 1]), classes=2, k=6, sigma=0.1)
    assert scores.isfinite().all() and (scores.sum(dim=1) > 0).all()
    figures, _ = diagnostics.measure(memory, None, round=0, temperature=0.1, size=2)
    assert all(value is None or math.isfinite(value) for value in figures.values())
