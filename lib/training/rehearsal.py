"""A trial step before training: whether the batch fits into memory, and how much it takes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch

from lib.data.loader import mark_batch_size_dynamic
from lib.distributed import gpus
from lib.distributed.device import memory_format_of
from lib.distributed.processes import Ranks
from lib.errors import UsageError, is_out_of_memory
from lib.method.terms import Term
from lib.training.checkpoint import TrainingState
from lib.training.trainer import batch_loss


def rehearse(
    state: TrainingState,
    terms: Sequence[Term],
    ranks: Ranks,
    *,
    batch_size: int,
    size: tuple[int, int],
    precision: torch.dtype | None = None,
    views: int = 1,
) -> str:
    """Runs forward and backward pass of a full batch of black images and restores the state. Call it on every rank.

    Args:
        batch_size: B V, of all ranks together.
        size: (h, w) that the network sees.
        precision: of mixed precision, or None.
        views: V.

    Returns:
        The peak memory, in words.

    Raises:
        UsageError: memory ran out; on a GPU the message names a batch that fits.
    """
    device = state.bank.memory.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    step = partial(_step, state, terms, ranks, size=size, precision=precision, views=views)
    images = batch_size // views
    if not _fits(step, images):
        fitting = None
        # on CPUs the system may kill the process instead of refusing the memory
        if device.type == "cuda" and ranks.size == 1:
            fitting = _largest_fitting(step, images // 2)
        advice = (
            f"--batch-size {fitting * views} fits"
            if fitting
            else "set it lower, or --size, or choose a smaller --network"
        )
        raise UsageError(
            f"--batch-size {batch_size}: memory ran out in one step of the network; {advice}{gpus.memory_of_others()}"
        )
    peak = _peak(device)
    return f"{peak / 2**30:.2f} GiB at the peak of one step of {batch_size} images" if peak else "not known here"


def _largest_fitting(step: Callable[[int], None], images: int) -> int | None:
    """The largest of ``images``, half of it, a quarter of it and so on that fits; None if none does."""
    while images >= 2:
        torch.cuda.empty_cache()
        if _fits(step, images):
            return images
        images //= 2
    return None


def _fits(step: Callable[[int], None], images: int) -> bool:
    """Whether a step with this number of images, in all their views, fits into memory.

    When it returns, the error and the frames of its traceback, which hold the tensors of the step, are freed.
    """
    try:
        step(images)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True


def _step(
    state: TrainingState,
    terms: Sequence[Term],
    ranks: Ranks,
    count: int,
    *,
    size: tuple[int, int],
    precision: torch.dtype | None,
    views: int,
) -> None:
    network, device = state.network, state.bank.memory.device
    buffers = [buffer.clone() for buffer in network.buffers()]  # the running statistics of batch normalisation change
    was_training = network.training
    images = torch.zeros(views * ranks.local_batch_sizes(count)[ranks.rank], 3, *size, device=device)
    index = torch.arange(count, device=device)
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            network.train()
            images = images.contiguous(memory_format=memory_format_of(network))
            if network._compiled_call_impl is not None:
                images = mark_batch_size_dynamic(images)
            found, _ = batch_loss(state, terms, ranks, images, index, precision, views=views)
            found.backward()
    finally:
        network.zero_grad(set_to_none=True)
        network.train(was_training)
        with torch.no_grad():
            for buffer, before in zip(network.buffers(), buffers, strict=True):
                buffer.copy_(before)


def _peak(device: torch.device) -> int | None:
    """Peak memory in bytes: allocated by PyTorch on a GPU, otherwise of this process; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
