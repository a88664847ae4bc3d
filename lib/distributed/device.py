"""Selection and set-up of devices: GPUs, precision, determinism, and moving the network."""

from __future__ import annotations

import os

import torch

from lib.config.options import Options
from lib.distributed import gpus as machine
from lib.distributed import sync_batchnorm
from lib.distributed.processes import Ranks
from lib.errors import UsageError
from lib.session.console import logger


def select(gpus: tuple[int, ...]) -> torch.device:
    """The device of this process: ``gpus[LOCAL_RANK]``, or the CPU if ``gpus`` is empty.

    Raises:
        UsageError: PyTorch does not see one of the GPUs, or this machine has more processes than ``gpus`` entries.
    """
    if not gpus:
        return torch.device("cpu")
    flag, seen = f"--gpus {','.join(map(str, gpus))}", machine.count()
    if any(gpu >= seen for gpu in gpus):
        found = f"only GPUs 0 to {seen - 1} here" if seen else f"no GPU here ({machine.why_none()})"
        raise UsageError(f"{flag}: PyTorch {torch.__version__} sees {found}; --gpus '' runs on the CPU")
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if local_rank >= len(gpus):
        raise UsageError(f"{flag}: no GPU for local rank {local_rank}; name as many GPUs as processes on this machine")
    return torch.device("cuda", gpus[local_rank])


def of_process(gpus: tuple[int, ...]) -> torch.device | None:
    """The GPU of one of several processes, or None for the CPU. Raises UsageError as ``select`` does."""
    device = select(gpus)
    return device if device.type == "cuda" else None


def available(gpus: tuple[int, ...]) -> tuple[int, ...]:
    """The entries of ``gpus`` that exist on this machine, otherwise GPU 0, otherwise () for the CPU.

    This allows a session trained on GPUs, whose options name them, to be evaluated on any machine.
    """
    seen = machine.count()
    return tuple(gpu for gpu in gpus if gpu < seen) or ((0,) if gpus and seen else ())


def choose_gpus(options: Options) -> Options:
    """The options with ``gpus`` replaced by ``available`` ones if nothing is trained; otherwise unchanged."""
    if not options.gpus and torch.cuda.is_available():
        logger().info("%s is not used; set --gpus 0 to use it", torch.cuda.get_device_name(0))
    if not (options.test_only or options.is_for_one):
        return options
    gpus = available(options.gpus)
    if gpus != options.gpus:
        missing, used = ",".join(map(str, options.gpus)), f"GPU {gpus[0]}" if gpus else "the CPU"
        logger().warning("--gpus %s: not all on this machine; using %s", missing, used)
    return options.model_copy(update={"gpus": gpus})


PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Value of ``--amp`` -> dtype of automatic mixed precision."""


def allow_tf32(allowed: bool) -> None:
    """Allows or forbids TF32 in matrix products and convolutions. PyTorch's default allows it in convolutions only."""
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def allow_nondeterminism(allowed: bool) -> None:
    """Allows or forbids nondeterministic algorithms, some of which are faster on GPUs.

    Where they are forbidden, operations without a deterministic implementation warn. Call this before the first
    computation on a GPU.
    """
    if not allowed:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # required for deterministic cuBLAS
    if torch.are_deterministic_algorithms_enabled() == allowed:  # the call imports torch.compile, which takes seconds
        torch.use_deterministic_algorithms(not allowed, warn_only=True)
    torch.backends.cudnn.deterministic = not allowed
    # as in the reference: cuDNN selects the fastest convolution for each shape
    torch.backends.cudnn.benchmark = allowed


def memory_format(options: Options, device: torch.device) -> torch.memory_format:
    """Layout of images and convolutions: channels-last on CPUs, and on GPUs with reduced precision.

    The tensor cores compute in channels-last; the float32 convolutions of cuDNN are made for the contiguous layout.
    """
    reduced = options.amp is not None or options.tf32
    return torch.channels_last if device.type == "cpu" or reduced else torch.contiguous_format


def memory_format_of(network: torch.nn.Module) -> torch.memory_format:
    """Layout of the network's convolutions."""
    is_last = any(
        each.dim() == 4 and not each.is_contiguous() and each.is_contiguous(memory_format=torch.channels_last)
        for each in network.parameters()
    )
    return torch.channels_last if is_last else torch.contiguous_format


def place(
    network: torch.nn.Module,
    device: torch.device,
    ranks: Ranks | None = None,
    *,
    layout: torch.memory_format = torch.channels_last,
    sync_bn: bool = False,
    compile: bool = False,
) -> torch.nn.Module:
    """Moves the network to the device of this process.

    Args:
        layout: of its convolutions.
        sync_bn: whether batch normalisation uses the statistics of all ranks or of this rank's images only.
        compile: whether to use ``torch.compile``.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)  # the default device of CUDA calls
    network = network.to(device, memory_format=layout)  # type: ignore[call-overload]
    network = sync_batchnorm.convert(network, ranks or Ranks(), sync=sync_bn)
    if compile:
        network.compile()
    return network
