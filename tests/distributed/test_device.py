"""Selection and set-up of devices, with and without GPUs."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from lib.config.options import Options
from lib.data.augmentation import Augmentation
from lib.distributed import device, gpus
from lib.errors import UsageError


def has_gpus(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)


def test_without_gpus_the_cpu_is_selected(monkeypatch: pytest.MonkeyPatch) -> None:
    has_gpus(4, monkeypatch)
    assert device.select(()) == torch.device("cpu")


@pytest.mark.parametrize(("gpus", "first"), [((0,), 0), ((1,), 1), ((1, 0), 1), ((0, 1, 2, 3), 0)])
def test_single_process_uses_the_first_gpu_of_the_list(
    gpus: tuple[int, ...], first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_gpus(4, monkeypatch)
    assert device.select(gpus) == torch.device("cuda", first)


def test_local_rank_selects_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    has_gpus(4, monkeypatch)
    for number, gpu in enumerate((2, 0, 3)):
        monkeypatch.setenv("LOCAL_RANK", str(number))
        assert device.select((2, 0, 3)) == torch.device("cuda", gpu)
    monkeypatch.setenv("LOCAL_RANK", "3")
    with pytest.raises(UsageError, match=r"^--gpus 2,0,3: no GPU for local rank 3; "):
        device.select((2, 0, 3))


def test_gpus_option_without_gpus_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    has_gpus(0, monkeypatch)
    with pytest.raises(UsageError, match=r"--gpus 0: .*no GPU.*--gpus '' runs on the CPU"):
        device.select((0,))


OLD_DRIVER = (
    "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver by downloading "
    "and installing a new version from the URL: http://www.nvidia.com/Download/index.aspx Alternatively, go to: "
    "https://pytorch.org to install a PyTorch version that has been compiled with your version of the CUDA driver."
)


def test_too_old_driver_is_named_in_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """NVML counts GPUs without the CUDA driver, so a positive count does not mean that they can be used."""

    def is_available() -> bool:
        warnings.warn(f"CUDA initialization: {OLD_DRIVER}", stacklevel=1)
        return False

    def init() -> None:
        raise RuntimeError(OLD_DRIVER)

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    monkeypatch.setattr(torch.cuda, "init", init)
    with pytest.raises(UsageError) as refused:
        device.select((0,))
    assert str(refused.value) == (
        f"--gpus 0: PyTorch {torch.__version__} sees no GPU here (The NVIDIA driver on your system is too old (found "
        "version 11040); update the driver, or install a PyTorch that was built for it); --gpus '' runs on the CPU"
    )
    assert device.available((0, 1)) == ()


def test_pytorch_without_cuda_is_named_in_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def init() -> None:
        raise AssertionError("Torch not compiled with CUDA enabled")

    has_gpus(0, monkeypatch)
    monkeypatch.setattr(torch.cuda, "init", init)
    with pytest.raises(UsageError, match=r"sees no GPU here \(Torch not compiled with CUDA enabled\); --gpus ''"):
        device.select((0,))


def test_memory_of_other_programs_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 80 GiB, 70 are in use, 2 of them by this process."""
    values = {"is_initialized": True, "current_device": 1, "memory_reserved": 2 * 2**30}
    for name, value in values.items():
        monkeypatch.setattr(torch.cuda, name, lambda *gpu, value=value: value)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda gpu: (10 * 2**30, 80 * 2**30))
    assert "other programs take 68.0 of the 80.0 GiB of GPU 1: end them" in gpus.memory_of_others()
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda gpu: 69 * 2**30)
    assert gpus.memory_of_others() == ""  # the rest is the context of CUDA

    def lost(gpu: int) -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(torch.cuda, "mem_get_info", lost)
    assert gpus.memory_of_others() == ""


@pytest.mark.parametrize(
    ("gpus", "seen", "chosen"),
    [((), 2, ()), ((0,), 0, ()), ((1, 0), 2, (1, 0)), ((0, 1, 2), 2, (0, 1)), ((3,), 2, (0,)), ((), 0, ())],
)
def test_available_returns_the_gpus_that_exist(
    gpus: tuple[int, ...], seen: int, chosen: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    has_gpus(seen, monkeypatch)
    assert device.available(gpus) == chosen


@pytest.mark.parametrize("gpus", [(2,), (0, 2), (7, 0)])
def test_missing_gpu_is_refused_with_the_valid_range(gpus: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    has_gpus(2, monkeypatch)
    with pytest.raises(UsageError) as refused:
        device.select(gpus)
    text = str(refused.value)
    assert text.startswith("--gpus " + ",".join(map(str, gpus))) and "GPUs 0 to 1" in text and "\n" not in text


@pytest.fixture
def restore_nondeterminism(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    yield
    device.allow_nondeterminism(True)
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


def test_allow_nondeterminism_sets_the_flags_of_pytorch(restore_nondeterminism: None) -> None:
    """The settings are those of pytorch.org/docs/stable/notes/randomness.html."""
    for allowed in (True, False, True):
        device.allow_nondeterminism(allowed)
        assert torch.are_deterministic_algorithms_enabled() != allowed
        assert torch.backends.cudnn.deterministic != allowed
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_cublas_workspace_set_by_the_user_is_kept(
    restore_nondeterminism: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    device.allow_nondeterminism(False)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_operations_without_a_deterministic_implementation_warn(restore_nondeterminism: None) -> None:
    """On a CPU, ``put_`` without accumulation is such an operation."""
    device.allow_nondeterminism(False)
    with pytest.warns(UserWarning, match="does not have a deterministic implementation"):
        torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2), accumulate=False)


def test_network_on_the_cpu_is_not_wrapped() -> None:
    network = torch.nn.Linear(2, 3)
    assert device.place(network, torch.device("cpu")) is network


def test_network_is_moved_to_its_device() -> None:
    placed = device.place(torch.nn.Linear(2, 3), torch.device("meta"))
    assert {parameter.device.type for parameter in placed.parameters()} == {"meta"}


def test_network_is_placed_channels_last() -> None:
    placed = device.place(torch.nn.Conv2d(3, 4, 3), torch.device("cpu"))
    assert placed.weight.is_contiguous(memory_format=torch.channels_last)
    assert not placed.weight.is_contiguous()


@pytest.mark.parametrize(
    ("gpus", "options", "layout"),
    [
        ("cpu", {}, torch.channels_last),
        ("cuda", {}, torch.contiguous_format),
        ("cuda", {"tf32": True}, torch.channels_last),
        ("cuda", {"amp": "bf16"}, torch.channels_last),
    ],
)
def test_channels_last_is_used_where_it_is_fast(
    gpus: str, options: dict[str, Any], layout: torch.memory_format
) -> None:
    found = device.memory_format(Options(gpus=(0,), **options), torch.device(gpus))
    assert found == layout
    placed = device.place(torch.nn.Conv2d(3, 4, 3), torch.device("cpu"), layout=found)
    assert device.memory_format_of(placed) == layout
    augmentation = Augmentation((8, 8), (8, 8), (0.5,) * 3, (0.2,) * 3, layout=found)
    images = augmentation(torch.zeros(2, 8, 8, 3, dtype=torch.uint8), np.zeros((2, 32)))
    assert images.is_contiguous(memory_format=layout)


def test_cudnn_benchmark_is_off_with_deterministic(restore_nondeterminism: None) -> None:
    device.allow_nondeterminism(True)
    assert torch.backends.cudnn.benchmark and not torch.backends.cudnn.deterministic
    device.allow_nondeterminism(False)
    assert not torch.backends.cudnn.benchmark and torch.backends.cudnn.deterministic


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="PyTorch compiles for CPUs with g++")
def test_compiled_network_keeps_parameter_names_and_outputs() -> None:
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU())
    expected, images = network(torch.ones(2, 3)), torch.ones(2, 3)
    placed = device.place(network, torch.device("cpu"), compile=True)
    assert list(placed.state_dict()) == ["0.weight", "0.bias"]
    assert placed._compiled_call_impl is not None
    torch.testing.assert_close(placed(images), expected)


def test_tf32_is_off_by_default() -> None:
    try:
        for allowed in (True, False):
            device.allow_tf32(allowed)
            assert torch.backends.cuda.matmul.allow_tf32 is torch.backends.cudnn.allow_tf32 is allowed
    finally:
        device.allow_tf32(False)
