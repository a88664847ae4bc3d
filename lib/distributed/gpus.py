"""Which GPUs PyTorch can use, and why GPUs fail."""

from __future__ import annotations

import warnings
from contextlib import suppress

import torch

from lib.session.atomic_files import reason


def count() -> int:
    """Number of GPUs that PyTorch can use; 0 if the driver is missing or too old."""
    with warnings.catch_warnings():  # PyTorch's warning about the driver has several lines; ``why_none`` gives one
        warnings.simplefilter("ignore")
        return torch.cuda.device_count() if torch.cuda.is_available() else 0


def why_none() -> str:
    """PyTorch's reason why it can use no GPU: no driver, an old driver, or a build without CUDA."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        first = reason(error).partition(". ")[0].rstrip(".")
        mend = "; update the driver, or install a PyTorch that was built for it" if "too old" in first else ""
        return first + mend
    return "it finds none"


def memory_of_others() -> str:
    """A clause with the memory of this process's GPU that other programs use; '' if it is less than a tenth."""
    if not torch.cuda.is_initialized():
        return ""
    with suppress(RuntimeError):  # a failed GPU may not reply
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
    """Whether an error means that a GPU has failed, so that this process cannot use it any more."""
    kind, text = type(error).__name__, str(error)  # PyTorch has AcceleratorError since 2.8
    return kind == "AcceleratorError" or (isinstance(error, RuntimeError) and "CUDA error: " in text)
