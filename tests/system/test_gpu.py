"""Tests on a GPU: its results agree with the CPU, and whole runs work.

``python -m pytest -m gpu`` runs them where there is one. With ``GPU_TESTS_ON=cpu`` the CPU takes its place, which tries
the tests themselves.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import models
from lib.data.augmentation import NUM_RANDOM, Augmentation
from lib.data.loader import Loader
from lib.distributed import device as placing
from lib.distributed.processes import Ranks
from lib.errors import UsageError
from lib.evaluation.knn import weighted_knn
from lib.method import diagnostics
from lib.method.discovery import discover
from lib.method.loss import neighbourhood_loss
from lib.method.memory_bank import MemoryBank
from lib.method.neighbourhoods import Neighbourhoods
from lib.method.terms import PAPER_TERMS
from lib.session import metrics
from lib.training.checkpoint import TrainingState
from lib.training.rehearsal import rehearse
from lib.training.trainer import batch_loss
from runs import altered, assert_alike, finished, output_of, read_until, start, words_of

CPU, GPU = torch.device("cpu"), torch.device(os.environ.get("GPU_TESTS_ON", "cuda:0"))
IS_GPU = GPU.type == "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(IS_GPU and not torch.cuda.is_available(), reason="needs a GPU"),
]
real = pytest.mark.skipif(not IS_GPU, reason="tests the memory of a GPU")
GPUS = ["--gpus", str(GPU.index or 0) if IS_GPU else ""]
SAMPLES, LOW_DIM, BATCH = 3_000, 32, 64
PAPER = Augmentation(
    (32, 32), (32, 32), (0.5,) * 3, (0.2,) * 3, scale=(0.2, 1.0), jitter=(0.4,) * 4, grey=0.2, flip=True
)


@pytest.fixture(autouse=True)
def no_tf32() -> Iterator[None]:
    placing.allow_tf32(False)
    yield
    placing.allow_tf32(False)


def rows(samples: int, seed: int = 0) -> torch.Tensor:
    """Unit rows (N, D) in clusters, similar to embeddings."""
    draw = torch.Generator().manual_seed(seed)
    centres = torch.randn(20, LOW_DIM, generator=torch.Generator().manual_seed(9))
    noise = torch.randn(samples, LOW_DIM, generator=draw)
    return torch.nn.functional.normalize(centres[torch.randint(20, (samples,), generator=draw)] + noise, dim=1)


def pictures(count: int, pixels: int = 32) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, pixels, pixels, 3), dtype=np.uint8)


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> None:
    """Compares relative to the largest value, since single elements may be close to zero."""
    greatest = theirs.abs().max().item()
    torch.testing.assert_close(ours.cpu(), theirs.cpu(), rtol=0, atol=tolerance * greatest)


def state_on(device: torch.device, samples: int = SAMPLES, network: str = "resnet18") -> TrainingState:
    torch.manual_seed(0)
    placed = placing.place(models.build(network, low_dim=LOW_DIM), device)
    bank = MemoryBank(samples, LOW_DIM, temperature=0.1, momentum=0.5, seed=1, device=device)
    optimizer = torch.optim.SGD(placed.parameters(), lr=0.03, momentum=0.9, nesterov=True, weight_decay=5e-4)
    return TrainingState(placed, optimizer, bank, Neighbourhoods.none(samples, device), seed=0)


# The computations agree with those on a CPU.


def test_augmentation_equals_that_of_the_cpu() -> None:
    images, draws = torch.from_numpy(pictures(200)), np.random.default_rng(1).random((200, NUM_RANDOM))
    ours, theirs = PAPER(images.to(GPU), draws), PAPER(images, draws)
    assert ours.device.type == GPU.type and ours.is_contiguous(memory_format=torch.channels_last)
    # a pixel whose two largest channels are almost equal may get another hue sector, which changes it only slightly
    assert ((ours.cpu() - theirs).abs() > 1e-4).float().mean() < 1e-4
    close(ours, theirs, 0.02)


@pytest.mark.parametrize("network", ["resnet18", "resnet10-w16", "alexnet-small"])
def test_network_equals_that_of_the_cpu(network: str) -> None:
    images = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    results = []
    for device in (GPU, CPU):
        state = state_on(device, network=network)
        state.network.train()
        torch.manual_seed(0)
        trained = (
            state.network(images.to(device)) if "alexnet" not in network else None
        )  # dropout uses the generator of the device
        results.append((trained, state.network.eval()(images.to(device))))
    (trained, tested), (trained_cpu, tested_cpu) = results
    close(tested.detach(), tested_cpu.detach(), 1e-4)
    if trained is not None and trained_cpu is not None:
        close(trained.detach(), trained_cpu.detach(), 1e-4)


@pytest.mark.parametrize("size", [0, 1, 5])
def test_loss_and_gradient_equal_those_of_the_cpu(size: int) -> None:
    bank, index = rows(SAMPLES), torch.arange(BATCH)
    near = discover(bank, temperature=0.1, anchors=SAMPLES // 2, size=size or 1)
    own = near.of(index) if size else index[:, None]
    results = []
    for device in (GPU, CPU):
        given = rows(BATCH, seed=2).to(device).requires_grad_()
        loss = neighbourhood_loss(given, bank.to(device), own.to(device), temperature=0.1)
        loss.backward()
        results.append((loss.detach(), given.grad))
    (loss, gradient), (loss_cpu, gradient_cpu) = results
    close(loss, loss_cpu, 1e-5)
    close(gradient, gradient_cpu, 1e-5)


def test_memory_bank_equals_that_of_the_cpu() -> None:
    banks = [MemoryBank(SAMPLES, LOW_DIM, temperature=0.1, momentum=0.5, seed=3, device=each) for each in (GPU, CPU)]
    assert torch.equal(banks[0].memory.cpu(), banks[1].memory)
    index = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(0))[:BATCH]
    for bank in banks:
        bank.update(rows(BATCH).to(bank.memory.device), index.to(bank.memory.device))
    close(banks[0].memory, banks[1].memory, 1e-6)


@pytest.mark.parametrize("temperature", [0.1, 0.001])
def test_discovery_equals_that_of_the_cpu(temperature: float) -> None:
    """The second temperature needs the fallback that shifts each row by its own maximum."""
    bank = rows(SAMPLES)
    bank[::7] *= 0.5 if temperature < 0.01 else 1.0
    found = [discover(bank.to(each), temperature=temperature, anchors=SAMPLES // 4, size=3) for each in (GPU, CPU)]
    (ours, theirs), exact = found, bank.double() @ bank.double().t()
    torch.testing.assert_close(ours.entropy.cpu(), theirs.entropy, atol=1e-4 / temperature * 0.1, rtol=1e-4)
    anchors, anchors_cpu = (set(each.anchors.tolist()) for each in found)
    threshold = theirs.entropy.sort().values[SAMPLES // 4]
    assert all((theirs.entropy[i] - threshold).abs() < 1e-3 for i in anchors ^ anchors_cpu)
    for anchor, near in zip(
        ours.anchors.tolist(), ours.neighbours.cpu(), strict=True
    ):  # equally similar neighbours may swap
        exact[anchor, anchor] = -2
        torch.testing.assert_close(exact[anchor, near], exact[anchor].topk(3).values, atol=1e-6, rtol=0)


def test_knn_and_health_figures_equal_those_of_the_cpu() -> None:
    bank, queries, labels = rows(SAMPLES), rows(400, seed=5), torch.arange(SAMPLES) % 10
    constants = {"classes": 10, "k": 200, "sigma": 0.1}
    scores = [weighted_knn(queries.to(each), bank.to(each), labels.to(each), **constants) for each in (GPU, CPU)]
    close(*scores, 1e-3)  # the 200th neighbour may be another one of equal similarity
    assert (scores[0].argmax(dim=1).cpu() == scores[1].argmax(dim=1)).float().mean() > 0.99
    ours, theirs = (
        diagnostics.measure(bank.to(each), None, round=0, temperature=0.1, size=1)[0] for each in (GPU, CPU)
    )
    known = {name: value for name, value in theirs.items() if value is not None}
    assert {name: ours[name] for name in known} == pytest.approx(known, rel=1e-3, abs=1e-3)


def test_step_equals_that_of_the_cpu_and_never_waits() -> None:
    """CUDA is set to raise if the host waits in loading, loss, gradient, bank or optimiser."""
    images, states, losses = pictures(300), [], []
    for device in (GPU, CPU):
        state = state_on(device, len(images), "resnet10-w16")
        resident = torch.from_numpy(images).to(device)
        batches = Loader(resident, PAPER, batch_size=BATCH, workers=0, seed=0, device=device).epoch()
        state.network.train()
        total = torch.zeros((), device=device)
        for number in range(3):
            if number == 1 and device.type == "cuda":  # the first step initialises the libraries
                torch.cuda.set_sync_debug_mode("error")
            try:
                batch, index = next(batches)
                loss, embeddings = batch_loss(state, PAPER_TERMS, Ranks(), batch, index)
                loss.backward()
                state.bank.update(embeddings.detach(), index)
                state.optimizer.step()
                state.optimizer.zero_grad(set_to_none=True)
                total += loss.detach()
            finally:
                if device.type == "cuda":
                    torch.cuda.set_sync_debug_mode("default")
        states.append(state)
        losses.append(total)
    close(losses[0], losses[1], 1e-3)
    close(states[0].bank.memory, states[1].bank.memory, 1e-2)


# Memory.


@real
def test_out_of_memory_error_names_a_batch_that_fits() -> None:
    """The program may use one more GiB; the rehearsal halves the batch until it fits."""
    state = state_on(GPU, 8_192, "resnet10-w16")
    torch.cuda.empty_cache()
    allowed = torch.cuda.memory_reserved(GPU) + 2**30
    torch.cuda.set_per_process_memory_fraction(allowed / torch.cuda.get_device_properties(GPU).total_memory, GPU)
    try:
        tried = partial(rehearse, state, PAPER_TERMS, Ranks(), size=(64, 64))
        with pytest.raises(UsageError, match=r"--batch-size 8192: memory ran out .* --batch-size \d+ fits") as refused:
            tried(batch_size=8_192)
        match = re.search(r"--batch-size (\d+) fits", str(refused.value))
        assert match and 8 <= int(match[1]) < 8_192
        torch.cuda.empty_cache()
        assert "GiB at the peak of one step" in tried(batch_size=int(match[1]))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, GPU)


LITTLE_MEMORY = """
import sys
import torch
torch.cuda.set_per_process_memory_fraction(2**30 / torch.cuda.get_device_properties(0).total_memory, 0)
import main
sys.exit(main.main(sys.argv[1:]))
"""


@real
def test_run_without_enough_memory_ends_with_an_error_line(tmp_path: Path) -> None:
    words = "--cfgs configs/base.yaml configs/digits.yaml --resize 64 64 --size 64 64 --batch-size 1024 --gpus 0"
    process = start(*words.split(), "--sess-dir", str(tmp_path), program=("-c", LITTLE_MEMORY))
    shown = output_of(process)
    assert process.returncode == 2 and "Traceback" not in shown, shown
    assert re.search(
        r"error: --batch-size 1024: memory ran out in one step of the network; --batch-size \d+ fits", shown
    )
    assert not list(tmp_path.iterdir())


# Whole runs.


@pytest.fixture(scope="module")
def new(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Returns a function that trains a session with a name and options."""
    folder = tmp_path_factory.mktemp("sessions")

    def train(name: str, *more: str) -> Path:
        finished(*words_of(photos, folder, name), *GPUS, *more)
        return folder / name

    return train


@pytest.fixture(scope="module")
def whole(new: Callable[..., Path]) -> Path:
    return new("whole", "--deterministic")


def losses_of(session: Path) -> list[float]:
    return [row["loss"] for row in metrics.read(session)]


def test_gpu_run_reaches_the_accuracy_of_a_cpu_run(whole: Path, photos: Path, tmp_path: Path) -> None:
    finished(*words_of(photos, tmp_path, "cpu"))
    ours, theirs = metrics.read(whole), metrics.read(tmp_path / "cpu")
    assert [row["anchors"] for row in ours] == [row["anchors"] for row in theirs]
    assert ours[0]["loss"] == pytest.approx(theirs[0]["loss"], rel=0.05)  # rounding grows from step to step
    assert losses_of(whole) == pytest.approx(losses_of(tmp_path / "cpu"), rel=0.3)
    assert all(0 <= row["top1"] <= 1 for row in ours)
    message = (whole / "log.txt").read_text(encoding="utf-8")
    assert "GiB at the peak of one step of 8 images" in message
    assert not IS_GPU or torch.cuda.get_device_name(GPU) in metrics.starts(whole)[0]["device"]


def test_resumed_deterministic_run_ends_with_the_same_bits(whole: Path, photos: Path, tmp_path: Path) -> None:
    words = [*words_of(photos, tmp_path, "stopped"), *GPUS, "--deterministic"]
    process = start("lib.training.trainer", "Trainer.backward", "18", *words, program=altered("await_signals(1)"))
    read_until(process, "waiting for a signal")
    process.send_signal(signal.SIGTERM)
    shown = output_of(process)
    assert process.returncode == 143 and "stopped by SIGTERM" in shown, shown
    finished("--resume", str(tmp_path / "stopped"), "--brief")
    assert_alike(tmp_path / "stopped", whole)


@pytest.mark.parametrize("more", [["--tf32"], ["--amp", "bf16"], ["--amp", "fp16"]], ids=" ".join)
def test_run_of_reduced_precision_has_similar_results(more: list[str], whole: Path, new: Callable[..., Path]) -> None:
    losses = losses_of(new("-".join(more).strip("-"), *more))
    assert len(losses) == len(losses_of(whole)) and np.isfinite(losses).all()
    # fp16 skips the first steps, until its scale is small enough
    assert losses[0] == pytest.approx(losses_of(whole)[0], rel=0.2 if "fp16" in more else 0.05)


@pytest.mark.skipif(not IS_GPU, reason="tests/distributed/test_device.py compiles for a CPU")
@pytest.mark.skipif(not any(map(shutil.which, ("gcc", "cc", "clang"))), reason="Triton needs a C compiler")
def test_compiled_run_has_similar_results_and_resumes(whole: Path, new: Callable[..., Path]) -> None:
    session = new("compiled", "--compile", "--max-round", "1")
    assert losses_of(session)[0] == pytest.approx(losses_of(whole)[0], rel=0.05)
    assert losses_of(session) == pytest.approx(losses_of(whole)[:4], rel=0.3)
    finished("--resume", str(session), "--max-epoch", "5", "--brief")
    assert len(losses_of(session)) == 5


def test_gpu_checkpoint_is_evaluated_reported_and_exported(whole: Path, tmp_path: Path) -> None:
    shown = finished("--resume", str(whole), "--test-only", "--protocol", "knn", "nn", "linear", "cluster", *GPUS)
    assert "top-1" in shown
    features, network = tmp_path / "features.npz", tmp_path / "model.safetensors"
    words = ["--resume", str(whole), "--test-only", "--export-features"]
    finished(*words, str(features), "--export-model", str(network), *GPUS)
    finished(*words, str(tmp_path / "cpu.npz"), "--gpus", "")
    assert network.stat().st_size > 10_000
    with np.load(features) as ours, np.load(tmp_path / "cpu.npz") as theirs:
        assert ours.files == theirs.files
        for name in ours.files:
            if ours[name].dtype.kind == "f":
                np.testing.assert_allclose(ours[name], theirs[name], atol=1e-3)
            else:
                assert (ours[name] == theirs[name]).all()
    finished("--report", str(whole))
    assert list(whole.rglob("*.html"))


def test_gpu_checkpoint_resumes_on_the_cpu(whole: Path, tmp_path: Path) -> None:
    """A checkpoint of a GPU can be resumed without one."""
    finished(
        "--resume", str(whole), "--restart", "--gpus", "", "--max-epoch", "5", "--sess-dir", str(tmp_path), "--brief"
    )
    (session,) = tmp_path.iterdir()
    assert metrics.read(session)[-1]["epoch"] == 4


def test_loader_gives_the_same_batches_as_on_the_cpu() -> None:
    """Including images that worker processes crop, and batches prepared on another stream."""
    images = pictures(70, 40)
    many_sizes: Any = [image[: 30 + i % 9, : 30 + i % 7] for i, image in enumerate(images)]
    for given in (torch.from_numpy(images), many_sizes):
        batches: list[list[tuple[torch.Tensor, torch.Tensor]]] = []
        for device in (GPU, CPU):
            placed = given.to(device) if isinstance(given, torch.Tensor) else given
            workers = 0 if isinstance(given, torch.Tensor) else 2
            loader = Loader(placed, PAPER, batch_size=16, workers=workers, seed=4, device=device)
            batches.append(
                [(images.cpu(), index.cpu()) for epoch in range(2) for images, index in loader.epoch(0, epoch)]
            )
        for (ours, index), (theirs, index_cpu) in zip(*batches, strict=True):
            assert torch.equal(index, index_cpu)
            close(ours, theirs, 0.02)
