"""Which devices a run uses. Layer 1."""

from __future__ import annotations

import os

import torch

from lib.console import UsageError


def select(gpus: tuple[int, ...]) -> torch.device:
    """The device of the run: the first of ``gpus``, or the CPU where none is named.

    Raises:
        UsageError: a GPU is named that PyTorch does not see.
    """
    if not gpus:
        return torch.device("cpu")
    seen = torch.cuda.device_count()
    missing = [str(gpu) for gpu in gpus if gpu >= seen]
    if missing:
        there = f"only GPUs 0 to {seen - 1}" if seen else "no GPU"
        raise UsageError(
            f"--gpus {','.join(map(str, gpus))}: PyTorch {torch.__version__} sees {there} here; "
            "leave gpus empty to run on the CPU"
        )
    return torch.device("cuda", gpus[0])


PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""What ``--amp`` names."""


def allow_tf32(allowed: bool) -> None:
    """Whether GPUs may round the factors of products and convolutions to TF32; PyTorch's default is half of that."""
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def allow_nondeterminism(allowed: bool) -> None:
    """Whether operations may give another last bit each time, as some of a GPU's do, being faster so.

    Those that know no other way warn where it is not allowed. To be called before anything is computed on a GPU.
    """
    if not allowed:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS guarantees nothing
    torch.use_deterministic_algorithms(not allowed, warn_only=True)
    torch.backends.cudnn.deterministic = not allowed


def place(
    network: torch.nn.Module, gpus: tuple[int, ...], device: torch.device, *, compile: bool = False
) -> torch.nn.Module:
    """The network on its device, channels-last; over GPUs each batch is split, as in the reference.

    One GPU is wrapped, too, at no cost: a checkpoint's names then carry the ``module.`` that the reference
    gives, and expects of, a network trained on GPUs.

    Raises:
        UsageError: a network over several GPUs is to be compiled, which PyTorch cannot do.
    """
    if compile and len(gpus) > 1:
        raise UsageError("--compile: works on one device only; name one GPU in --gpus, or leave it out")
    network = network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if compile:
        network.compile()
    return torch.nn.DataParallel(network, device_ids=list(gpus)) if gpus else network


def unwrapped(network: torch.nn.Module) -> torch.nn.Module:
    """The network inside what splits its batches over GPUs."""
    return network.module if isinstance(network, torch.nn.DataParallel) else network
