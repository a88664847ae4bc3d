"""The benchmarks: the compared implementations give equal results, and all benchmarks run."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import __main__ as cli
from benchmarks import augmentation, measure, reference
from lib.data.augmentation import NUM_RANDOM
from lib.evaluation.knn import weighted_knn
from lib.method.discovery import discover
from lib.method.loss import neighbourhood_loss
from lib.session import provenance

CPU = torch.device("cpu")
SMALL = {
    "augmentation": {"BATCH": 4},
    "criterion": {"SAMPLES": 3000, "BATCH": 8},
    "discovery": {"SAMPLES": 300},
    "growth": {"SAMPLES": (50, 100, 200), "LARGE": 1000},
    "knn": {"QUERIES": 30, "SAMPLES": 400},
    "launches": {"SAMPLES": 200, "BATCH": 8},
    "memory": {"SAMPLES": 5000, "TILES": 5, "CASES": [("resnet10", 8, 4)]},
    "parallel": {"SAMPLES": 600, "BATCH": 8, "QUERIES": 9, "PROCESSES": (1, 2)},
    "passes": {"SAMPLES": 600, "STEPS": 1},
    "saving": {"SAMPLES": 100, "NETWORK": "resnet10-w16"},
    "scale": {"MEASURED": 2000},
    "start": {},
    "step": {"SAMPLES": 32, "BATCH": 4, "WORKERS": 0},
}


def test_every_benchmark_has_a_small_size_for_tests() -> None:
    assert list(SMALL) == cli.names()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled")  # caches are off while operations are counted
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch.compile does not show it
@pytest.mark.parametrize("name", SMALL)
def test_every_benchmark_runs_and_reports_the_hardware(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Any
) -> None:
    module = importlib.import_module(f"benchmarks.{name}")
    for constant, value in SMALL[name].items():
        monkeypatch.setattr(module, constant, value)
    monkeypatch.setattr(cli, "RESULTS", tmp_path)
    if name == "growth":
        costs = module._costs
        keep = {"discovery", "kNN", "loss and gradient"}
        monkeypatch.setattr(module, "_costs", lambda device: [c for c in costs(device) if c[0] in keep and c[1] == "N"])
    assert cli.main([name, "--repeats", "1", "--save"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"# {name}: ") and "| --- |" in shown and f"torch {provenance.versions()['torch']}" in shown
    assert (tmp_path / f"{name}-cpu.md").read_text(encoding="utf-8").startswith(shown.strip()[:200])
    assert (tmp_path / "growth-cpu.png").is_file() == (name == "growth")


def test_benchmarks_are_listed_without_a_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [*SMALL, "gpu"]


@pytest.mark.parametrize(("words", "message"), [(["speed"], "no benchmark speed; there are augmentation, criterion")])
def test_unknown_benchmark_name_is_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 2
    assert message in capsys.readouterr().err


def test_losses_and_gradients_equal_the_reference() -> None:
    bank, given = measure.unit_rows(500, 16, CPU), measure.unit_rows(20, 16, CPU, seed=1)
    one, other = given.clone().requires_grad_(), given.clone().requires_grad_()
    index = torch.arange(20)
    plain = reference.instance_loss(one, bank, index, 0.1)
    ours = neighbourhood_loss(other, bank, index[:, None], temperature=0.1)
    plain.backward()
    ours.backward()
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(other.grad, one.grad, atol=1e-6, rtol=1e-5)


def test_discovery_equals_the_reference() -> None:
    bank = measure.unit_rows(2500, 16, CPU)
    entropy, position, near = reference.discovery(bank, 0.1, 600, 3)
    found = discover(bank, temperature=0.1, anchors=600, size=3)
    torch.testing.assert_close(found.entropy, entropy, atol=1e-5, rtol=1e-5)
    order = entropy.argsort()
    gap = (entropy[order[600]] - entropy[order[599]]).item()
    assert gap > 1e-5  # the order of the 600th and the 601st does not depend on rounding
    assert set(found.anchors.tolist()) == set(order[:600].tolist())
    assert (found.position >= 0).equal(position >= 0)
    theirs = dict(zip(order[:600].tolist(), near.tolist(), strict=True))
    assert dict(zip(found.anchors.tolist(), found.neighbours.tolist(), strict=True)) == theirs


def test_classifier_ranks_the_classes_as_the_reference() -> None:
    bank, queries = measure.unit_rows(700, 16, CPU), measure.unit_rows(150, 16, CPU, seed=1)
    labels = torch.randint(10, (700,), generator=torch.Generator().manual_seed(2))
    ranked = reference.weighted_knn(queries, bank, labels, classes=10, k=50, sigma=0.1)
    scores = weighted_knn(queries, bank, labels, classes=10, k=50, sigma=0.1)
    assert (scores.argmax(dim=1) == ranked[:, 0]).all()


def test_augmentations_have_equal_mean_and_deviation() -> None:
    """Compares pixels over 2,000 augmentations of an image. Single ones: tests of ``lib/data/augmentation.py``."""
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    draws = np.random.default_rng(1).random((2000, NUM_RANDOM))
    ours = augmentation.PAPER(torch.from_numpy(image).expand(2000, -1, -1, -1), draws)
    torch.manual_seed(0)
    one = reference.augmentation(32)
    theirs = torch.stack([one(image) for _ in range(2000)])
    for moment in (torch.mean, torch.std):
        torch.testing.assert_close(moment(ours, dim=(0, 2, 3)), moment(theirs, dim=(0, 2, 3)), atol=0.03, rtol=0)
