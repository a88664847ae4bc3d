"""Errors as a sentence and an exit status."""

from __future__ import annotations

import datasets
from lib.distributed import launch
from lib.errors import NonFiniteLossError, ToldElsewhereError, UsageError
from lib.session.atomic_files import printable, reason
from lib.session.console import FIRST


def explain(error: Exception) -> tuple[int, str]:
    """Exit status of an error that has a sentence, and the sentence, empty in processes other than the one that tells.

    Raises:
        Exception: ``error`` itself, if it is of no known kind.
    """
    if isinstance(error, ToldElsewhereError):
        return 2, ""
    if isinstance(error, UsageError | datasets.DataError):
        return 2, printable(str(error).rpartition("DataError: ")[2].strip())  # a worker's comes behind its traceback
    if isinstance(error, OSError):
        place = printable(str(error.filename or "the file system"))
        return 2, f"{place}: cannot be used: {reason(error)}; mend that, or choose another place"

    import torch._dynamo.exc

    from lib.distributed.processes import is_loss

    if isinstance(error, NonFiniteLossError):
        return 1, str(error) if FIRST else ""  # the same in every process
    if isinstance(error, torch._dynamo.exc.TorchDynamoException):
        return 2, f"--compile: PyTorch cannot compile the network here ({reason(error)}); leave it out"
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    ):
        return 2, "memory ran out; set --batch-size or --size lower, or choose a smaller --network"
    if isinstance(error, RuntimeError) and launch.is_launched() and is_loss(error):
        return 1, "another process of the run has ended; --resume with the session's folder goes on"
    raise error
