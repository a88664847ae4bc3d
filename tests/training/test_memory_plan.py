"""What a training will hold in memory: counted by hand, and held against what a process really took."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lib.errors import UsageError
from lib.training import memory_plan
from lib.training.memory_plan import HOLES, KERNELS, WORKER, MemoryPlan, Place, Training, plan
from runs import LIMIT

ROOT = Path(__file__).parents[2]
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
MIB = 2**20


def linear(inputs: int = 3 * 4 * 4, outputs: int = 8) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, outputs, bias=False))


def training(**changes: object) -> Training:
    made = Training(
        network=linear(),
        device=CPU,
        batch_size=16,
        size=(4, 4),
        samples=1000,
        low_dim=8,
        neighbours=1,
        optimizer="sgd",
        momentum=0.9,
        block=100,
        scratch=0,
        images=0,
        workers_num=0,
    )
    return replace(made, **changes)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def process_of_a_gibibyte(monkeypatch: pytest.MonkeyPatch) -> None:
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=2**30))
    monkeypatch.setattr(memory_plan.psutil, "Process", lambda: process)


@pytest.mark.parametrize(
    ("optimizer", "momentum", "arrays"), [("sgd", 0.0, 0), ("sgd", 0.9, 1), ("adam", 0.9, 2), ("rmsprop", 0.9, 2)]
)
def test_the_optimisers_state_is_counted(optimizer: str, momentum: float, arrays: int) -> None:
    network, weights = linear(48, 4096), 4 * 48 * 4096
    made = plan(training(network=network, optimizer=optimizer, momentum=momentum))
    temporaries = 1 if optimizer == "sgd" else 2
    moment = max(made.passes + made.passes // HOLES, weights + temporaries * weights)
    assert made.host.parts["network"] == weights + arrays * weights + moment


def test_gradients_that_wait_for_more_batches_are_held_during_the_passes() -> None:
    network = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.Flatten(), nn.Linear(64 * 16, 8))
    weights = sum(parameter.nbytes for parameter in network.parameters())
    once, twice = (plan(training(network=network, iter_size=n, batch_size=256)).host.parts["network"] for n in (1, 2))
    assert twice - once == weights


def test_parts_on_the_host_counted_by_hand() -> None:
    made = plan(training(images=5 * MIB, batch_size=32, samples=20_000, neighbours=3))
    parts, weights, pixels = made.host.parts, 4 * 48 * 8, 32 * 3 * 4 * 4
    assert made.device is None and made.host.taken == 2**30
    assert parts["process"] == 2**30 - 5 * MIB - weights + KERNELS
    assert parts["memory bank"] == 20_000 * (8 * 4 + 2 * 8 + 4 + 3 * 8) + 2 * 8192 * 8 * 4
    assert parts["logits"] == 3 * 4 * 32 * 100
    assert parts["data"] == 5 * MIB + (2 + 6 * 4) * pixels
    assert made.host.peak == sum(parts.values())


def test_each_of_several_processes_plans_its_part_and_another_s_in_discovery() -> None:
    bank, many = 100_000 * 64 * 4, {"samples": 100_000, "low_dim": 64}
    alone, four = plan(training(**many)).host, plan(training(**many, processes=4)).host
    assert alone.parts["memory bank"] - four.parts["memory bank"] == bank * 3 // 4
    assert four.parts["discovery"] == bank  # the first one, when it saves
    assert plan(training(**many, processes=4, scratch=2**30)).host.parts["discovery"] == 2**30 + bank // 4


def test_workers_take_their_share(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = 16 * 3 * 4 * 4
    for method, own in (("fork", WORKER), ("forkserver", memory_plan.SPAWNED)):
        monkeypatch.setattr(memory_plan.multiprocessing, "get_all_start_methods", lambda method=method: [method])
        without, two = (plan(training(workers_num=n)).host.parts["data"] for n in (0, 2))
        assert two - without == 2 * (own + 3 * pixels)


def test_on_a_gpu_the_parts_are_where_they_lie() -> None:
    made = plan(training(device=GPU, images=5 * MIB, images_on_device=4 * MIB))
    assert made.device and made.device.name == "cuda:0"
    assert list(made.host.parts) == ["process", "memory bank", "data"]
    assert list(made.device.parts) == ["network", "memory bank", "logits", "data"]
    assert made.host.parts["memory bank"] == 1000 * 8 * 4  # it is drawn there
    assert made.device.parts["data"] == 4 * MIB + (2 + 6 * 4) * 16 * 3 * 4 * 4


def test_discovery_takes_the_place_of_the_passes_where_it_takes_more() -> None:
    small, great = plan(training(scratch=1)), plan(training(scratch=64 * MIB))
    assert "discovery" not in small.host.parts and "logits" not in great.host.parts
    assert great.host.parts["discovery"] == 64 * MIB
    assert great.host.parts["network"] == 2 * 4 * 48 * 8  # weights and momentum


def test_the_text_has_a_short_line_for_each_place() -> None:
    made = plan(training(device=GPU, samples=10**7))
    assert made.text().splitlines() == [
        "host 1.34 GiB: process 1.05, memory bank 0.30, data 0.00 GiB",
        "cuda:0 0.56 GiB: network 0.00, memory bank 0.56, logits 0.00, data 0.00 GiB",
    ]


def refusal(made: MemoryPlan, free_host: int, free_device: int = 0) -> str:
    with pytest.raises(UsageError) as refused:
        made.check(free_host, free_device)
    text = str(refused.value)
    assert "\n" not in text and "in use already" in text
    return text


def needed(made: MemoryPlan) -> int:
    return made.host.peak - made.host.taken


def test_what_fits_to_the_byte_is_let_through() -> None:
    made = plan(training())
    made.check(needed(made))
    refusal(made, needed(made) - 1)


def test_a_batch_too_large_is_refused_with_the_largest_that_fits() -> None:
    network = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.Flatten(), nn.Linear(64 * 32 * 32, 8))
    made = training(network=network, batch_size=96, size=(32, 32))
    fits = {size: needed(plan(replace(made, batch_size=size))) for size in (16, 32, 64)}
    assert refusal(plan(made), fits[64]).endswith("set --batch-size to 64 or less")
    assert refusal(plan(made), fits[64] - 1).endswith("set --batch-size to 32 or less")
    assert refusal(plan(made), fits[16]).endswith("set --batch-size to 16 or less")


def test_a_bank_too_large_is_refused_with_the_embedding_that_fits() -> None:
    made = training(samples=10**6, low_dim=128)
    room = needed(plan(replace(made, low_dim=32)))
    text = refusal(plan(made), room)
    assert text.endswith("set --low-dim to 32 or less") and "memory bank 0.5" in text


def test_too_many_workers_are_refused_with_the_number_that_fits() -> None:
    made = training(workers_num=6)
    assert refusal(plan(made), needed(plan(replace(made, workers_num=2)))).endswith("set --workers-num to 2 or less")


def test_where_no_batch_fits_a_smaller_network_is_asked_for() -> None:
    text = refusal(plan(training(network=linear(48, 2**18))), 20 * MIB + KERNELS)
    assert text.endswith("no batch size makes it fit; choose a smaller --network")


def test_images_that_leave_no_room_are_named() -> None:
    text = refusal(plan(training(images=900 * MIB)), KERNELS - 2 * MIB)
    assert text.endswith("no option makes it fit; it takes fewer or smaller images")


def test_it_is_said_where_nothing_helps() -> None:
    assert refusal(plan(training()), MIB).endswith("no option makes it fit; it takes a machine with more memory")


def test_a_gpu_too_small_is_refused_though_the_host_would_do() -> None:
    made = plan(training(device=GPU, samples=10**6, low_dim=128))
    assert made.device
    made.check(2**40, made.device.peak)
    text = refusal(made, 2**40, made.device.peak // 2)
    assert text.startswith("training takes cuda:0 0.") and text.endswith("set --low-dim to 32 or less")


def test_memory_in_use_is_not_asked_for_again() -> None:
    assert Place("host", {"process": 100, "data": 50}, taken=120).missing(20) == 10


MEASURED = """
import json, torch, models
from lib.memory_plan import Training, plan
torch.set_num_threads(1)
network = models.build("resnet10", low_dim=128)
optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
made = plan(Training(network=network, device=torch.device("cpu"), batch_size=128, size=(32, 32), samples=5000,
    low_dim=128, neighbours=1, optimizer="sgd", momentum=0.9, block=5000, scratch=0, images=0, workers_num=0))
bank = torch.nn.functional.normalize(torch.randn(5000, 128))
for step in range(2):
    images = torch.randn(128, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    logits = network(images) @ bank.t() / 0.1
    torch.nn.functional.cross_entropy(logits, torch.arange(128)).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
status = open("/proc/self/status").read()  # ru_maxrss would have the peak of the process that started this one
print(json.dumps([made.host.peak, int(status.split("VmHWM:")[1].split()[0]) * 1024, made.host.taken]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="how Linux tells the peak of a process")
def test_the_plan_is_within_a_quarter_of_what_steps_really_take() -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEASURED], cwd=ROOT, capture_output=True, text=True, check=True, timeout=LIMIT
    )
    planned, measured, before = json.loads(done.stdout)
    assert measured - before > 300 * MIB  # so that it was the steps that took it
    assert planned == pytest.approx(measured, rel=0.25)
