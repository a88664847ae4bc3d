"""Which devices a run uses. Layer 1."""

from __future__ import annotations

import torch

from lib.console import UsageError

CACHED = 2**20
"""Numbers of a block on a CPU (4 MiB of float32): what is computed from it finds it in the cache."""
SHARE = 16
"""A block takes this part of the free memory of a GPU at most."""


def block_size(device: torch.device) -> int:
    """How many float32 numbers to work on at a time, where a matrix is too large to be held."""
    if device.type != "cuda":
        return CACHED
    free, _ = torch.cuda.mem_get_info(device)
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # PyTorch's, and not in use
    return max(CACHED, min(2**28, (free + held) // (4 * SHARE)))


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


def place(network: torch.nn.Module, gpus: tuple[int, ...], device: torch.device) -> torch.nn.Module:
    """The network on its device; over GPUs each batch is split, as in the reference.

    One GPU is wrapped, too, at no cost: a checkpoint's names then carry the ``module.`` that the reference
    gives, and expects of, a network trained on GPUs.
    """
    network = network.to(device)
    return torch.nn.DataParallel(network, device_ids=list(gpus)) if gpus else network
