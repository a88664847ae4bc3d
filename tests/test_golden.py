"""The reference implementation's own numbers. ``tests/golden/`` holds arrays that it wrote.

Indices, counts, accuracies and learning rates are equal. Entropies, losses, gradients and memory rows agree
element by element to 1e-5 relative (``close``).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

import oracles
from lib.config.parser import read_options
from lib.evaluation.knn import nearest_neighbour, top_k_accuracy, weighted_knn
from lib.method.discovery import discover
from lib.method.loss import neighbourhood_loss
from lib.method.memory_bank import MemoryBank
from lib.method.neighbourhoods import Neighbourhoods, consistency, num_anchors
from lib.training.optim import build_schedule, step

FOLDER = Path(__file__).parent / "golden"
Golden = dict[str, np.ndarray]

files = pytest.mark.parametrize("name", ["k1", "k3"])
discoveries = pytest.mark.parametrize("round", [1, 2, 4])
rounds = pytest.mark.parametrize("round", [0, 1, 2, 4])


@cache
def golden(name: str) -> Golden:
    with np.load(FOLDER / f"{name}.npz") as archive:
        return {key: archive[key] for key in archive.files}


@cache
def entropies_by_oracle(name: str) -> np.ndarray:
    z = golden(name)
    return oracles.entropies(z["memory"], float(z["temperature"]))


def close(actual: np.ndarray, expected: np.ndarray, *, cancels: bool = False) -> None:
    """Element by element, 1e-5 relative. A gradient is a sum whose terms ``cancel``: an element may be tiny,
    yet carries the float32 roundings (2**-23 each) of terms as large as the greatest one; four are allowed."""
    atol = 4 * 2**-23 * float(np.abs(expected).max()) if cancels else 0.0
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=atol)


def discovered(name: str, round: int) -> Neighbourhoods:
    z = golden(name)
    memory = torch.from_numpy(z["memory"])
    if round == 0:
        return Neighbourhoods.none(len(memory))
    return discover(
        memory,
        temperature=float(z["temperature"]),
        anchors=num_anchors(len(memory), float(z["select_rate"]), round),
        size=int(z["k"]),
    )


def bank_of(z: Golden) -> MemoryBank:
    samples, low_dim = z["memory"].shape
    constants = {"temperature": float(z["temperature"]), "momentum": float(z["momentum"])}
    bank = MemoryBank(samples, low_dim, **constants, seed=0, device="cpu")
    bank.load_state_dict({"memory": torch.from_numpy(z["memory"])})
    return bank


def own_by_golden(z: Golden, round: int) -> list[list[int]]:
    """The neighbourhoods of the batch, from the reference's anchors and neighbours."""
    anchors = z[f"r{round}_anchors"].tolist() if round else []
    neighbours = z[f"r{round}_neighbours"].tolist() if round else []
    return [oracles.neighbourhood(i, anchors, neighbours) for i in z[f"r{round}_batch_index"].tolist()]


# The project against the reference.


@files
@rounds
def test_number_of_anchors_equals_the_reference(name: str, round: int) -> None:
    z = golden(name)
    assert num_anchors(len(z["memory"]), float(z["select_rate"]), round) == z[f"r{round}_num"]


@files
@discoveries
def test_anchors_and_their_order_equal_the_reference(name: str, round: int) -> None:
    found, z = discovered(name, round), golden(name)
    assert found.anchors.tolist() == z[f"r{round}_anchors"].tolist()


@files
@discoveries
def test_neighbours_and_their_order_equal_the_reference(name: str, round: int) -> None:
    found, z = discovered(name, round), golden(name)
    assert found.neighbours.tolist() == z[f"r{round}_neighbours"].tolist()


@files
@discoveries
def test_positions_equal_the_reference(name: str, round: int) -> None:
    found, z = discovered(name, round), golden(name)
    assert found.position.tolist() == z[f"r{round}_position"].tolist()


@files
@discoveries
def test_entropies_equal_the_reference(name: str, round: int) -> None:
    close(discovered(name, round).entropy.numpy(), golden(name)[f"r{round}_entropy"])


@files
@discoveries
def test_consistency_equals_the_reference(name: str, round: int) -> None:
    found, z = discovered(name, round), golden(name)
    share = consistency(found.anchors, found.neighbours, torch.from_numpy(z["labels"]))
    assert share == z[f"r{round}_consistency"]


@files
@rounds
def test_training_step_equals_the_reference(name: str, round: int) -> None:
    z = golden(name)
    bank, found = bank_of(z), discovered(name, round)
    index = torch.from_numpy(z[f"r{round}_batch_index"])
    features = torch.from_numpy(z[f"r{round}_batch_features"]).requires_grad_()

    loss = neighbourhood_loss(features, bank.memory, found.of(index), temperature=bank.temperature)
    loss.backward()
    bank.update(features.detach(), index)

    assert features.grad is not None
    close(loss.detach().numpy(), z[f"r{round}_loss"])
    close(features.grad.numpy(), z[f"r{round}_grad"], cancels=True)
    close(bank.memory.numpy(), z[f"r{round}_memory_after"])


def right_answers(z: Golden, key: str) -> int:
    """An accuracy as a number of queries: the reference's share may have been rounded to float32."""
    return round(float(z[key]) * len(z["query"]))


@files
def test_weighted_knn_accuracy_equals_the_reference(name: str) -> None:
    z = golden(name)
    queries, bank, labels = (torch.from_numpy(z[key]) for key in ("query", "memory", "labels"))
    classes = int(z["labels"].max()) + 1
    scores = weighted_knn(queries, bank, labels, classes=classes, k=int(z["knn_k"]), sigma=float(z["knn_sigma"]))
    share = top_k_accuracy(scores, torch.from_numpy(z["query_labels"]), 1)
    assert share * len(queries) == pytest.approx(right_answers(z, "knn_top1"), abs=1e-3)


@files
def test_nearest_neighbour_accuracy_equals_the_reference(name: str) -> None:
    z = golden(name)
    queries, bank, labels = (torch.from_numpy(z[key]) for key in ("query", "memory", "labels"))
    scores = nearest_neighbour(queries, bank, labels, classes=int(z["labels"].max()) + 1)
    share = top_k_accuracy(scores, torch.from_numpy(z["query_labels"]), 1)
    assert share * len(queries) == pytest.approx(right_answers(z, "nn_top1"), abs=1e-3)


@files
def test_learning_rates_of_base_yaml_equal_the_reference(name: str) -> None:
    z = golden(name)
    rate = build_schedule(read_options(["--cfgs", str(FOLDER.parent.parent / "configs" / "base.yaml")]))
    assert [rate(epoch) for epoch in z["lr_epochs"].tolist()] == z["lr"].tolist()


@files
def test_the_step_policy_gives_the_references_learning_rates(name: str) -> None:
    z = golden(name)
    rate = step(0.03, offset=80, every=40, rate=0.1)
    assert [rate(epoch) for epoch in z["lr_epochs"].tolist()] == z["lr"].tolist()


# The oracles against the reference: what the other tests compare with is right, too.


@files
@discoveries
def test_the_entropy_oracle_agrees(name: str, round: int) -> None:
    close(entropies_by_oracle(name), golden(name)[f"r{round}_entropy"])


@files
@discoveries
def test_the_anchor_and_position_oracles_agree(name: str, round: int) -> None:
    z = golden(name)
    count = oracles.anchor_count(len(z["memory"]), float(z["select_rate"]), round)
    chosen = oracles.anchors(entropies_by_oracle(name), count)
    assert chosen == z[f"r{round}_anchors"].tolist()
    assert oracles.positions(chosen, len(z["memory"])) == z[f"r{round}_position"].tolist()


@files
def test_the_neighbour_oracle_agrees(name: str) -> None:
    z = golden(name)
    some = slice(0, None, 7)
    theirs = zip(z["r4_anchors"].tolist()[some], z["r4_neighbours"].tolist()[some], strict=True)
    for anchor, neighbours in theirs:
        assert oracles.neighbours(z["memory"], anchor, int(z["k"])) == neighbours


@files
@discoveries
def test_the_consistency_oracle_agrees(name: str, round: int) -> None:
    z = golden(name)
    anchors, neighbours = z[f"r{round}_anchors"].tolist(), z[f"r{round}_neighbours"].tolist()
    share = oracles.consistency(anchors, neighbours, z["labels"].tolist())
    assert np.float32(share) == z[f"r{round}_consistency"]


@files
@rounds
def test_the_loss_gradient_and_update_oracles_agree(name: str, round: int) -> None:
    z = golden(name)
    x, temperature, own = z[f"r{round}_batch_features"], float(z["temperature"]), own_by_golden(z, round)
    close(np.array(oracles.loss(x, z["memory"], own, temperature)), z[f"r{round}_loss"])
    close(oracles.gradient(x, z["memory"], own, temperature), z[f"r{round}_grad"], cancels=True)
    index = z[f"r{round}_batch_index"].tolist()
    close(oracles.updated(z["memory"], x, index, float(z["momentum"])), z[f"r{round}_memory_after"])


def test_the_gradient_oracle_is_the_slope_of_the_loss_oracle() -> None:
    memory, x = oracles.rows("random", 9, 3, seed=1), oracles.rows("random", 4, 3, seed=2)
    own, temperature, width = [[0, 5], [1], [2, 3, 4], [8]], 0.3, 1e-5

    def slope(i: int, d: int) -> float:
        loss: Callable[[np.ndarray], float] = lambda moved: oracles.loss(moved, memory, own, temperature)  # noqa: E731
        nudge = np.zeros(x.shape)
        nudge[i, d] = width
        return (loss(x + nudge) - loss(x - nudge)) / (2 * width)

    slopes = [[slope(i, d) for d in range(3)] for i in range(4)]
    np.testing.assert_allclose(oracles.gradient(x, memory, own, temperature), slopes, atol=1e-8)


@files
def test_the_classifier_oracles_agree(name: str) -> None:
    z = golden(name)
    labels, classes = z["labels"].tolist(), int(z["labels"].max()) + 1
    constants = {"classes": classes, "k": int(z["knn_k"]), "sigma": float(z["knn_sigma"])}
    scores = np.array([oracles.knn_scores(query, z["memory"], labels, **constants) for query in z["query"]])
    right = z["query_labels"].tolist()
    assert oracles.accuracy(scores, right, 1) * len(right) == pytest.approx(right_answers(z, "knn_top1"))


@files
def test_the_nearest_neighbour_oracle_agrees(name: str) -> None:
    z = golden(name)
    bank = z["memory"].astype(np.float64)
    some = slice(0, 200, 5)  # scores of these queries by the oracle, of the others by the greatest product
    by_oracle = [oracles.nearest_class(query, bank, z["labels"]) for query in z["query"][some]]
    by_product = z["labels"][(z["query"].astype(np.float64) @ bank.T).argmax(axis=1)]
    assert by_oracle == by_product[some].tolist()
    assert (by_product == z["query_labels"]).sum() == right_answers(z, "nn_top1")


@files
def test_the_step_rate_oracle_agrees(name: str) -> None:
    z = golden(name)
    rates = [oracles.step_rate(0.03, epoch, offset=80, every=40, rate=0.1) for epoch in z["lr_epochs"].tolist()]
    assert rates == z["lr"].tolist()
