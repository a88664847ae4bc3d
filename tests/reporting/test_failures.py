"""Out-of-memory and GPU errors in training: error message, exit status and last checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lib.reporting import failures
from lib.session.run_folder import Session

MORE = (
    "\nCUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be "
    "incorrect.\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1\n"
)


def accelerator_error(text: str) -> RuntimeError:
    """PyTorch before 2.8 raises RuntimeError."""
    kind = getattr(torch, "AcceleratorError", RuntimeError)
    return kind(text + MORE)  # type: ignore[no-any-return]


LOST = [
    accelerator_error("CUDA error: unspecified launch failure"),
    accelerator_error("CUDA error: device-side assert triggered"),
    RuntimeError("CUDA error: an illegal memory access was encountered" + MORE),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(handle)`"),
]
FULL = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79 GiB"),
    accelerator_error("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"),
    MemoryError(),
]


def messages(error: Exception, folder: Path, saved: bool) -> tuple[int, str]:
    session = Session(folder, log_tfb=False)
    if saved:
        (folder / "checkpoint" / "latest.ckpt").write_bytes(b"")
    instead = failures.in_session(error, session)
    session.close()
    assert instead is not None
    known = failures.explain(instead)
    assert known is not None and "\n" not in known[1]
    return known


@pytest.mark.parametrize("error", LOST, ids=str)
def test_gpu_failure_in_training_names_the_last_checkpoint(error: Exception, tmp_path: Path) -> None:
    status, sentence = messages(error, tmp_path, saved=True)
    assert status == 70 and sentence.startswith(f"the GPU failed: {str(error).splitlines()[0]}; nvidia-smi")
    checkpoint = tmp_path / "checkpoint" / "latest.ckpt"
    assert sentence.endswith(f"; the last checkpoint is {checkpoint}; resume with: python main.py --resume {tmp_path}")
    assert "an error ended the run" in (tmp_path / "log.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("error", FULL, ids=str)
def test_out_of_memory_in_training_names_the_last_checkpoint(error: Exception, tmp_path: Path) -> None:
    status, sentence = messages(error, tmp_path, saved=True)
    assert status == 2 and sentence.startswith("memory ran out; set --batch-size or --size lower")
    assert sentence.endswith(f"latest.ckpt; resume with: python main.py --resume {tmp_path}")


@pytest.mark.parametrize("error", [LOST[0], FULL[0]], ids=str)
def test_missing_checkpoint_is_reported(error: Exception, tmp_path: Path) -> None:
    _, sentence = messages(error, tmp_path, saved=False)
    assert sentence.endswith("; no checkpoint was saved yet") and "the last checkpoint is" not in sentence


@pytest.mark.parametrize("error", [LOST[0], FULL[0]], ids=str)
def test_rank_is_named_with_several_processes(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    known = failures.explain(error)
    assert known is not None and " on rank 3" in known[1]


def test_other_errors_are_unexpected() -> None:
    assert failures.explain(RuntimeError("shapes do not fit")) is None
