"""Which devices a run uses."""

from __future__ import annotations

import os

import torch

from lib.config.options import Options
from lib.distributed import sync_batchnorm
from lib.distributed.processes import Ranks
from lib.errors import UsageError
from lib.session.console import logger


def select(gpus: tuple[int, ...]) -> torch.device:
    """The device of this process: of ``gpus`` the one of its number on this machine, or the CPU where none is named.

    Raises:
        UsageError: a GPU is named that PyTorch does not see, or there are more processes here than GPUs are named.
    """
    if not gpus:
        return torch.device("cpu")
    flag, seen = f"--gpus {','.join(map(str, gpus))}", torch.cuda.device_count()
    if any(gpu >= seen for gpu in gpus):
        there = f"only GPUs 0 to {seen - 1}" if seen else "no GPU"
        raise UsageError(f"{flag}: PyTorch {torch.__version__} sees {there} here; --gpus '' runs on the CPU")
    number = int(os.environ.get("LOCAL_RANK", 0))
    if number >= len(gpus):
        raise UsageError(f"{flag}: process {number} of this machine has none; name as many as there are processes")
    return torch.device("cuda", gpus[number])


def available(gpus: tuple[int, ...]) -> tuple[int, ...]:
    """Those of ``gpus`` that are on this machine; where none is, its first GPU, or () for the CPU where it has none.

    A session that was trained on GPUs says so in its options, and is shown and judged anywhere.
    """
    seen = torch.cuda.device_count()
    return tuple(gpu for gpu in gpus if gpu < seen) or ((0,) if gpus and seen else ())


def choose_gpus(options: Options) -> Options:
    """The options with GPUs that are here; where nothing is trained, others or the CPU replace those that are not."""
    if not options.gpus and torch.cuda.is_available():
        logger().info("%s is not used; --gpus 0 uses it", torch.cuda.get_device_name(0))
    if not (options.test_only or options.is_for_one):
        return options
    gpus = available(options.gpus)
    if gpus != options.gpus:
        missing, place = ",".join(map(str, options.gpus)), f"GPU {gpus[0]}" if gpus else "the CPU"
        logger().warning("--gpus %s: not on this machine; %s takes their place", missing, place)
    return options.model_copy(update={"gpus": gpus})


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
    if torch.are_deterministic_algorithms_enabled() == allowed:  # the call imports PyTorch's compiler, for seconds
        torch.use_deterministic_algorithms(not allowed, warn_only=True)
    torch.backends.cudnn.deterministic = not allowed


def place(
    network: torch.nn.Module,
    device: torch.device,
    ranks: Ranks | None = None,
    *,
    sync_bn: bool = False,
    compile: bool = False,
) -> torch.nn.Module:
    """The network on its device, channels-last, with batch normalisation of this process's images or, with
    ``sync_bn``, of all processes'.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)  # for what names none
    network = network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    network = sync_batchnorm.over_processes(network, ranks or Ranks(), joined=sync_bn)
    if compile:
        network.compile()
    return network
