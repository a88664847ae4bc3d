"""The trial step changes no state; if memory runs out, its error names a batch size that fits."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch

import models
from lib.distributed.processes import Ranks
from lib.errors import UsageError
from lib.method.memory_bank import MemoryBank
from lib.method.neighbourhoods import Neighbourhoods
from lib.method.terms import PAPER_TERMS
from lib.training import rehearsal
from lib.training.checkpoint import TrainingState
from lib.training.rehearsal import rehearse
from runs import equal

SAMPLES = 20


def state_of() -> TrainingState:
    torch.manual_seed(0)
    network = models.build("resnet10-w16", low_dim=8)
    bank = MemoryBank(SAMPLES, 8, temperature=0.1, momentum=0.5, seed=1, device="cpu")
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    return TrainingState(network, optimizer, bank, Neighbourhoods.none(SAMPLES), seed=0)


def rehearsed(state: TrainingState, **changes: Any) -> str:
    named = {"batch_size": 16, "size": (8, 8), **changes}
    return rehearse(state, PAPER_TERMS, Ranks(), **named)


def test_rehearsal_changes_nothing() -> None:
    ours, other = state_of(), state_of()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    assert "GiB at the peak of one step of 16 images" in rehearsed(ours)
    assert torch.equal(torch.rand(3), expected)
    assert equal(ours.checkpoint("net", ""), other.checkpoint("net", ""))
    assert all(parameter.grad is None for parameter in ours.network.parameters())
    assert ours.network.training == other.network.training


def test_rehearsal_runs_a_full_batch_forward_and_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[torch.Size, bool]] = []
    state = state_of()
    state.network.register_forward_hook(lambda module, images, out: seen.append((images[0].shape, out.requires_grad)))
    rehearsed(state, batch_size=12, size=(8, 16))
    assert seen == [((12, 3, 8, 16), True)]
    rehearsed(state, batch_size=12, size=(8, 16), views=3)
    assert seen == [((12, 3, 8, 16), True)] * 2


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("CUDA"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_out_of_memory_is_reported_before_anything_is_written(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **more: Any) -> None:
        raise error

    monkeypatch.setattr(rehearsal, "batch_loss", fail)
    with pytest.raises(UsageError, match=r"--batch-size 16: memory ran out in one step of the network; set it lower"):
        rehearsed(state_of())


def test_largest_fitting_batch_is_found_by_halving() -> None:
    tried: list[int] = []

    def step(batch_size: int) -> None:
        tried.append(batch_size)
        if batch_size > 6:
            raise torch.OutOfMemoryError("CUDA")

    assert rehearsal._largest_fitting(step, 20) == 5
    assert tried == [20, 10, 5]


def test_other_errors_propagate(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **more: Any) -> None:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(rehearsal, "batch_loss", fail)
    with pytest.raises(RuntimeError, match="shapes differ"):
        rehearsed(state_of())


def test_tensors_of_a_failed_step_are_freed_before_the_next() -> None:
    held: list[weakref.ref[torch.Tensor]] = []

    def step(batch_size: int) -> None:
        assert all(tensor() is None for tensor in held)
        activation = torch.zeros(3)
        held.append(weakref.ref(activation))
        raise torch.OutOfMemoryError("CUDA")

    assert rehearsal._largest_fitting(step, 8) is None
    assert len(held) == 3
