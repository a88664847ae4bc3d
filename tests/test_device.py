"""Which device a run gets, on a machine with GPUs or without."""

from __future__ import annotations

import pytest
import torch

from lib import device
from lib.console import UsageError


def test_the_cpu_serves_where_no_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert device.select(()) == torch.device("cpu")


@pytest.mark.parametrize(("gpus", "first"), [((0,), 0), ((1,), 1), ((1, 0), 1), ((0, 1, 2, 3), 0)])
def test_the_first_named_gpu_is_the_device(gpus: tuple[int, ...], first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert device.select(gpus) == torch.device("cuda", first)


def test_a_gpu_on_a_machine_without_any_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UsageError, match=r"--gpus 0: .*no GPU.*leave gpus empty"):
        device.select((0,))


@pytest.mark.parametrize("gpus", [(2,), (0, 2), (7, 0)])
def test_a_gpu_beyond_those_there_is_refused_with_their_numbers(
    gpus: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UsageError) as refused:
        device.select(gpus)
    text = str(refused.value)
    assert text.startswith("--gpus " + ",".join(map(str, gpus))) and "GPUs 0 to 1" in text and "\n" not in text


def test_a_network_on_the_cpu_is_not_wrapped() -> None:
    network = torch.nn.Linear(2, 3)
    assert device.place(network, (), torch.device("cpu")) is network


def test_a_network_is_moved_to_its_device() -> None:
    placed = device.place(torch.nn.Linear(2, 3), (), torch.device("meta"))
    assert {parameter.device.type for parameter in placed.parameters()} == {"meta"}


@pytest.mark.parametrize("gpus", [(0,), (1, 0)])
def test_over_gpus_batches_are_split_and_names_prefixed_as_in_the_reference(
    gpus: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[int]] = []

    class Recorder(torch.nn.DataParallel):
        def __init__(self, module: torch.nn.Module, device_ids: list[int]) -> None:
            asked.append(device_ids)
            super().__init__(module)

    monkeypatch.setattr(torch.nn, "DataParallel", Recorder)
    network = torch.nn.Linear(2, 3)
    placed = device.place(network, gpus, torch.device("cpu"))
    assert asked == [list(gpus)]
    assert set(placed.state_dict()) == {"module.weight", "module.bias"}
