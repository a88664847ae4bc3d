"""Which devices a run uses. Layer 1."""

from __future__ import annotations

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


def place(network: torch.nn.Module, gpus: tuple[int, ...], device: torch.device) -> torch.nn.Module:
    """The network on its device; over GPUs each batch is split, as in the reference.

    One GPU is wrapped, too, at no cost: a checkpoint's names then carry the ``module.`` that the reference
    gives, and expects of, a network trained on GPUs.
    """
    network = network.to(device)
    return torch.nn.DataParallel(network, device_ids=list(gpus)) if gpus else network
