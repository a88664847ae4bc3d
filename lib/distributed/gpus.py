"""What this machine's GPUs can do for PyTorch, and why they fail."""

from __future__ import annotations

import warnings
from contextlib import suppress

import torch

from lib.session.atomic_files import reason


def count() -> int:
    """Number of GPUs that PyTorch can use: 0 where there are GPUs and the driver is missing or too old."""
    with warnings.catch_warnings():  # it warns of the driver in several lines; ``why_none`` says it in one
        warnings.simplefilter("ignore")
        return torch.cuda.device_count() if torch.cuda.is_available() else 0


def why_none() -> str:
    """Why PyTorch can use no GPU, in PyTorch's words: no driver, one that is too old, or a build without CUDA."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        first = reason(error).partition(". ")[0].rstrip(".")
        mend = "; update the driver, or install a PyTorch that was built for it" if "too old" in first else ""
        return first + mend
    return "it finds none"


def memory_of_others() -> str:
    """A clause that says how much of this process's GPU other programs fill; '' if that is under a tenth of it."""
    if not torch.cuda.is_initialized():
        return ""
    with suppress(RuntimeError):  # the GPU may not answer any more
        gpu = torch.cuda.current_device()
        free, total = torch.cuda.mem_get_info(gpu)
        others = total - free - torch.cuda.memory_reserved(gpu)
        if others > total / 10:
            return (
                f"; other programs take {others / 2**30:.1f} of the {total / 2**30:.1f} GiB of GPU {gpu}: end them "
                "(nvidia-smi lists them), or choose another of --gpus"
            )
    return ""


def is_failure(error: BaseException) -> bool:
    """Whether an error means that a GPU has failed: nothing that runs on it succeeds until the process ends."""
    kind, text = type(error).__name__, str(error)  # PyTorch has AcceleratorError since 2.8
    return kind == "AcceleratorError" or (isinstance(error, RuntimeError) and "CUDA error: " in text)
