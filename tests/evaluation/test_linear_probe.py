"""The linear probe compared with scikit-learn's logistic regression, and its features with plain loops."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

import datasets
import models
import runs
import synthetic
from lib.data.loader import Loader
from lib.errors import UsageError
from lib.evaluation import linear_probe
from lib.evaluation.linear_probe import Probed, extract_stages, pool, probe

CPU = torch.device("cpu")
LAYERS = ["conv1", "conv3", "conv5", "fc"]


def loader_of(images: Any, batch_size: int = 100) -> Loader:
    augmentation = synthetic.untouched(*np.shape(images[0])[:2])
    return Loader(images, augmentation, batch_size=batch_size, workers=0, seed=None, device=CPU)


@pytest.fixture(scope="module")
def digits() -> datasets.Splits:
    return datasets.load("digits", None)


@pytest.fixture(scope="module")
def stages(digits: datasets.Splits) -> list[dict[str, torch.Tensor]]:
    """Stages of an untrained network and the pixels, for training and test images."""
    torch.manual_seed(0)
    network = models.build("resnet10-w16", low_dim=32)
    assert digits.test is not None
    found = []
    for split in (digits.train, digits.test):
        rows = torch.from_numpy(np.asarray(split.images)[..., 0].reshape(len(split), -1)).float()
        found.append({**extract_stages(network, loader_of(split.images), LAYERS, "x"), "pixels": rows})
    return found


def probed(digits: datasets.Splits, train: torch.Tensor, test: torch.Tensor, seed: int = 0) -> Probed:
    assert digits.test is not None and digits.train.labels is not None and digits.test.labels is not None
    labels = torch.from_numpy(digits.train.labels), torch.from_numpy(digits.test.labels)
    return probe(train, labels[0], test, labels[1], classes=10, seed=seed, device=CPU, what="x")


@pytest.mark.parametrize("layer", [*LAYERS, "pixels"])
def test_accuracy_is_within_one_point_of_scikit_learn(
    layer: str, digits: datasets.Splits, stages: list[dict[str, torch.Tensor]]
) -> None:
    train, test = (part[layer] for part in stages)
    scaler = StandardScaler().fit(train.numpy())
    theirs = LogisticRegression(max_iter=500).fit(scaler.transform(train.numpy()), digits.train.labels)
    assert digits.test is not None
    score = theirs.score(scaler.transform(test.numpy()), digits.test.labels)
    ours = probed(digits, train, test)
    assert ours.top1 == pytest.approx(score, abs=0.01) and score > 0.8
    assert ours.top1 <= ours.best_top1 <= 1 and ours.top1 <= ours.top5 <= 1
    assert ours.name == f"linear probe (SGD, 333 epochs, {train.shape[1]} standardised features)"
    assert probed(digits, train, test) == ours


def test_constant_features_and_large_scales_do_not_matter(
    digits: datasets.Splits, stages: list[dict[str, torch.Tensor]]
) -> None:
    train, test = (part["pixels"] for part in stages)
    scaled = [torch.cat([part * 1e4 + 1e5, torch.full((len(part), 3), 7.0)], dim=1) for part in (train, test)]
    assert probed(digits, *scaled).top1 == pytest.approx(probed(digits, train, test).top1, abs=0.01)


def test_best_epoch_has_the_highest_accuracy(digits: datasets.Splits, stages: list[dict[str, torch.Tensor]]) -> None:
    seen: list[float] = []
    accuracy = linear_probe._accuracy
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_probe, "STEPS", (1, 42))
        patch.setattr(linear_probe, "_accuracy", lambda *words: seen.append(accuracy(*words)[0]) or accuracy(*words))
        got = probed(digits, stages[0]["fc"], stages[1]["fc"])
    assert len(seen) == 7 and got.top1 == seen[-1] and got.best_top1 == max(seen)


def test_many_samples_take_fewer_epochs(
    digits: datasets.Splits, stages: list[dict[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_probe, "STEPS", (1, 20))
    assert "SGD, 3 epochs" in probed(digits, stages[0]["fc"], stages[1]["fc"]).name  # of 6 steps each
    monkeypatch.setattr(linear_probe, "STEPS", (1, 10_000))
    assert "SGD, 100 epochs" in probed(digits, stages[0]["fc"], stages[1]["fc"]).name


def test_top_5_of_few_classes_is_1() -> None:
    rows, labels = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.1, 0.9]]), torch.tensor([0, 1, 0])
    got = probe(rows, labels, rows, labels, classes=2, seed=0, device=CPU, what="x")
    assert (got.top1, got.top5) == (1.0, 1.0)
    alone = probe(rows[:1], labels[:1], rows, labels, classes=2, seed=0, device=CPU, what="x")
    assert alone.top5 == 1.0 and 0 <= alone.top1 <= 1


@pytest.mark.parametrize(
    ("shape", "grid"),
    [((64, 55, 60), 12), ((192, 27, 27), 7), ((9001, 4, 4), 1), ((40_000, 4, 4), 1), ((64, 8, 3), 3), ((2, 5, 5), 5)],
)
def test_maps_are_pooled_to_about_nine_thousand_features(shape: tuple[int, ...], grid: int) -> None:
    maps = torch.rand(2, *shape, generator=torch.Generator().manual_seed(1))
    pooled = pool(maps)
    channels, height, width = shape
    assert pooled.shape == (2, channels * grid * grid)
    for channel, i, j in ((0, 0, 0), (channels - 1, grid - 1, grid - 1), (channels // 2, grid // 2, 0)):
        rows = range(i * height // grid, -(-(i + 1) * height // grid))
        columns = range(j * width // grid, -(-(j + 1) * width // grid))
        mean = sum(maps[1, channel, r, c].item() for r in rows for c in columns) / (len(rows) * len(columns))
        assert pooled[1].reshape(channels, grid, grid)[channel, i, j].item() == pytest.approx(mean, abs=1e-5)


@pytest.mark.parametrize(
    ("channels", "numbers"),
    [
        ([96, 256, 384, 384, 256], [9600, 9216, 9600, 9600, 9216]),  # as published
        ([64, 192, 384, 256, 256], [9216, 9408, 9600, 9216, 9216]),  # models/alexnet.py
    ],
)
def test_alexnet_stages_are_pooled_as_published(channels: list[int], numbers: list[int]) -> None:
    maps = [torch.zeros(1, count, edge, edge) for count, edge in zip(channels, (55, 27, 13, 13, 13), strict=True)]
    assert [pool(stage).shape[1] for stage in maps] == numbers


def test_vectors_are_not_pooled() -> None:
    assert torch.equal(pool(torch.ones(2, 10_000)), torch.ones(2, 10_000))


class Counting(torch.nn.Module):
    """Stages that are plain functions of the image; zeros in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.passes = 0

    def stages(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        self.passes += 1
        return {"conv1": x * (0 if self.training else 1), "fc": x.flatten(1)[:, :2]}


IMAGES = np.random.default_rng(0).integers(0, 256, (25, 4, 4, 3)).astype(np.uint8)


@pytest.mark.parametrize("in_memory", [True, False])
def test_stages_are_extracted_in_one_pass_in_order(in_memory: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not in_memory:
        monkeypatch.setattr(linear_probe, "IN_MEMORY", 25 * 40 * 4)
    network = Counting().train()
    found = extract_stages(network, loader_of(IMAGES, 8), ["conv1", "fc"], "x")
    assert network.passes == 4 - 1 * (25 % 8 == 1) and network.training
    pixels = torch.from_numpy(IMAGES).permute(0, 3, 1, 2).float() / 255
    assert found["conv1"].dtype == (torch.float32 if in_memory else torch.float16)
    torch.testing.assert_close(found["conv1"].float(), pixels.flatten(1), atol=0 if in_memory else 1e-3, rtol=0)
    assert found["fc"].dtype == torch.float32 and torch.equal(found["fc"], pixels.flatten(1)[:, :2])


@pytest.mark.parametrize("held", [0, 25 * 2 * 4])
def test_memory_for_features_is_that_of_all_layers_together(held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each alone would fit; the narrow ones stay in memory, with those of the other split (``held``)."""
    monkeypatch.setattr(linear_probe, "IN_MEMORY", 25 * (48 + 2) * 4)
    found = extract_stages(Counting(), loader_of(IMAGES), ["conv1", "fc"], "x", held=held)
    assert {layer: features.dtype for layer, features in found.items()} == {
        "conv1": torch.float16 if held else torch.float32,
        "fc": torch.float32,
    }
    assert list(found) == ["conv1", "fc"]


def test_disk_space_is_checked_for_all_layers_together(monkeypatch: pytest.MonkeyPatch) -> None:
    size = 25 * (48 + 2) * 2
    monkeypatch.setattr(linear_probe, "IN_MEMORY", 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(10**9, 10**9 - size + 1, size - 1))
    with pytest.raises(UsageError, match=r"^--linear-layers conv1 fc: temporary files for the features need 0 MB, "):
        extract_stages(Counting(), loader_of(IMAGES), ["conv1", "fc"], "x")


class Usage(NamedTuple):
    """What ``shutil.disk_usage`` returns."""

    total: int
    used: int
    free: int


def test_features_beyond_the_free_disk_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    size = 25 * 48 * 2
    monkeypatch.setattr(linear_probe, "IN_MEMORY", 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(10**9, 10**9 - size, size))
    assert extract_stages(Counting(), loader_of(IMAGES), ["conv1"], "x")["conv1"].shape == (25, 48)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(10**9, 10**9 - size + 1, size - 1))
    with pytest.raises(UsageError, match=r"^--linear-layers conv1: temporary files .* need 0 MB, .* TMPDIR"):
        extract_stages(Counting(), loader_of(IMAGES), ["conv1"], "x")


LIMITED = """
import resource, sys
from lib.errors import UsageError
from lib.evaluation import linear_probe
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000,) * 2)
features = linear_probe._in_file(100, 50, "conv1")
features[:] = 1
try:
    linear_probe._in_file(100, 51, "conv1")
except UsageError as error:
    print("refused:", error)
"""


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="the system cannot reserve disk space")
def test_disk_space_for_features_is_reserved() -> None:
    """A limit on the size of files acts like a full disk."""
    process = runs.start(program=("-c", LIMITED))
    shown = runs.output_of(process)
    assert process.returncode == 0 and "refused: --linear-layers conv1" in shown, shown


def test_unknown_stage_is_refused_with_the_known_ones() -> None:
    network = Counting().train()
    with pytest.raises(UsageError, match=r"conv9.*conv1, fc"):
        extract_stages(network, loader_of(IMAGES), ["fc", "conv9"], "x")
    assert network.training


def test_features_in_a_file_give_the_same_probe(
    digits: datasets.Splits, stages: list[dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    half = [part["pixels"].half() for part in stages]
    assert probed(digits, *half) == probed(digits, *(part["pixels"] for part in stages))  # 0 to 255: exact in half
