"""Accuracy of test images compared with the naive oracles, and the log lines about reduced K and top-5."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import oracles
import synthetic
from lib.data.loader import Loader
from lib.evaluation.classifier import Accuracy, Evaluator
from lib.session.console import logger

CPU = torch.device("cpu")
LOW_DIM = 3


class Lookup(torch.nn.Module):
    """Embeds image i, one pixel of value i, as the i-th row of a table; gives zeros in training mode."""

    def __init__(self, rows: np.ndarray) -> None:
        super().__init__()
        self.rows = torch.from_numpy(rows).float()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = self.rows[x[:, 0, 0, 0].round().long()]
        return torch.zeros_like(rows) if self.training else rows


class Case:
    """A test split and a bank of training features, in noisy clusters, one for each class."""

    def __init__(self, *, train: int = 230, test: int = 60, classes: int = 7, seed: int = 0) -> None:
        draw = np.random.default_rng(seed)
        self.classes = classes
        centres = draw.normal(size=(classes, LOW_DIM))
        self.train_labels, self.test_labels = draw.integers(0, classes, train), draw.integers(0, classes, test)
        self.bank, self.queries = (
            self._unit(centres[labels] + draw.normal(size=(len(labels), LOW_DIM)))
            for labels in (self.train_labels, self.test_labels)
        )

    @staticmethod
    def _unit(rows: np.ndarray) -> np.ndarray:
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    def evaluator(self, protocol: str = "knn", sigma: float = 0.1) -> Evaluator:
        return Evaluator(
            protocol,
            test=loader_of(len(self.test_labels)),
            test_labels=self.test_labels,
            train_labels=self.train_labels,
            classes=self.classes,
            k=200,
            sigma=sigma,
            device=CPU,
        )

    def accuracy(self, protocol: str = "knn", sigma: float = 0.1) -> Accuracy:
        return self.evaluator(protocol, sigma)(Lookup(self.queries), torch.from_numpy(self.bank).float())

    def expected(self, bank: np.ndarray, k: int, sigma: float) -> Any:
        """Top-1 and top-5 by the oracles."""
        constants: dict[str, Any] = {"classes": self.classes, "k": k, "sigma": sigma}
        scores = np.array([oracles.knn_scores(q, bank, self.train_labels, **constants) for q in self.queries])
        shares = [oracles.accuracy(scores, self.test_labels, top) for top in (1, 5)]
        return pytest.approx(shares, abs=1e-6)


def loader_of(samples: int, first: int = 0) -> Loader:
    images = [np.full((1, 1, 3), first + i, dtype=np.uint8) for i in range(samples)]
    scaled = synthetic.untouched(1, 1, stds=(1 / 255,) * 3)  # back to the numbers
    return Loader(images, scaled, batch_size=8, workers=0, seed=None, device=torch.device("cpu"))


@pytest.fixture
def logged() -> Iterator[list[str]]:
    """The lines that the program logs."""
    lines: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    log, listener, level = logger(), Listener(), logger().level
    log.addHandler(listener)
    log.setLevel(logging.INFO)
    yield lines
    log.removeHandler(listener)
    log.setLevel(level)


@pytest.mark.parametrize("sigma", [0.1, 0.5])
def test_knn_accuracy_with_200_neighbours_equals_the_oracle(sigma: float) -> None:
    case = Case()
    result = case.accuracy(sigma=sigma)
    assert [result.top1, result.top5] == case.expected(case.bank, 200, sigma)
    assert 0.3 < result.top1 < result.top5 < 1  # else the comparison would be trivial


def test_knn_uses_the_given_number_of_neighbours() -> None:
    case = Case(train=400)
    expected = case.expected(case.bank, 200, 1.0)
    assert expected != case.expected(case.bank, 400, 1.0).expected
    result = case.accuracy(sigma=1.0)
    assert [result.top1, result.top5] == expected


def test_nn_accuracy_equals_the_oracle() -> None:
    case = Case()
    nearest = [oracles.nearest_class(query, case.bank, case.train_labels) for query in case.queries]
    result = case.accuracy("nn")
    assert result.top1 == pytest.approx(np.mean(nearest == case.test_labels), abs=1e-6)
    assert result.top5 is None  # the nearest neighbour predicts one class only


@pytest.mark.parametrize("protocol", ["knn", "nn"])
def test_labelled_images_replace_the_memory_bank(protocol: str) -> None:
    case = Case(train=150)
    expected = case.accuracy(protocol)
    evaluator = Evaluator(
        protocol,
        test=loader_of(60),
        test_labels=case.test_labels,
        train_labels=case.train_labels,
        classes=case.classes,
        k=200,
        sigma=0.1,
        device=CPU,
        labelled=loader_of(150, first=60),
    )
    network = Lookup(np.concatenate([case.queries, case.bank]))
    other = torch.nn.functional.normalize(torch.randn(400, LOW_DIM, generator=torch.Generator().manual_seed(0)))
    assert evaluator(network, other) == expected
    assert (evaluator.against, case.evaluator().against) == ("the labelled training images", "the memory bank")


def test_evaluator_has_a_name_for_the_tables() -> None:
    assert Case().evaluator("nn").name == "NN"
    assert Case().evaluator("knn", sigma=0.07).name == "weighted kNN (K=200, sigma=0.07)"
    assert Case(train=30).evaluator().name == "weighted kNN (K=30, sigma=0.1)"


def test_k_is_reduced_for_a_small_split_and_logged_once(logged: list[str]) -> None:
    case = Case(train=30)
    evaluator, network, bank = case.evaluator(), Lookup(case.queries), torch.from_numpy(case.bank).float()
    results = [evaluator(network, bank) for _ in range(3)]
    for result in results:
        assert [result.top1, result.top5] == case.expected(case.bank, 30, 0.1)
    assert len(logged) == 1
    assert "200" in logged[0]
    assert "30" in logged[0]


@pytest.mark.parametrize("classes", [1, 2, 4])
def test_top_5_of_fewer_than_five_classes_is_1_and_logged_once(classes: int, logged: list[str]) -> None:
    case = Case(train=200, classes=classes)
    evaluator, network, bank = case.evaluator(), Lookup(case.queries), torch.from_numpy(case.bank).float()
    results = [evaluator(network, bank) for _ in range(2)]
    for result in results:
        assert [result.top1, result.top5] == case.expected(case.bank, 200, 0.1)
        assert result.top5 == 1
    assert len(logged) == 1
    assert "top-5" in logged[0]
    assert str(classes) in logged[0]


def test_nothing_is_logged_if_nothing_is_clamped(logged: list[str]) -> None:
    Case(train=200, classes=5).accuracy()
    Case(train=30, classes=4).accuracy("nn")  # one voter, and no top-5
    assert logged == []


def test_evaluation_uses_inference_mode_and_restores_the_mode() -> None:
    case, network = Case(), Lookup(Case().queries).train()
    result = case.evaluator()(network, torch.from_numpy(case.bank).float())
    assert [result.top1, result.top5] == case.expected(case.bank, 200, 0.1)
    assert network.training
