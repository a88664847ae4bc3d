"""Exit statuses and messages of errors.

PyTorch is imported only for errors that need it, so that an invalid option is reported without that delay.
"""

from __future__ import annotations

import os
import shlex
import traceback
from typing import TYPE_CHECKING

import datasets
import models
from lib.distributed import launch
from lib.distributed.launch import UNEXPECTED
from lib.errors import ReportedElsewhereError, UsageError, is_out_of_memory
from lib.session.atomic_files import printable, reason
from lib.session.console import IS_RANK0
from lib.session.locate import latest

if TYPE_CHECKING:
    from lib.session.run_folder import Session


class UnexpectedError(Exception):
    """An error in training whose traceback was written to the session's log; the message is for the user."""

    def __init__(self, message: str, status: int = UNEXPECTED) -> None:
        super().__init__(message)
        self.status = status


def explain(error: Exception) -> tuple[int, str] | None:
    """Exit status and message of an error, or None if it is unknown. The message is '' if another rank prints it."""
    if isinstance(error, ReportedElsewhereError):
        return 2, ""
    if isinstance(error, UnexpectedError):
        return error.status, str(error)
    if isinstance(error, UsageError | datasets.DataError | models.NetworkError):
        return 2, printable(str(error).rpartition("DataError: ")[2].strip())  # a worker process prepends its traceback
    if isinstance(error, OSError):
        place = printable(str(error.filename or "the file system"))
        return 2, f"{place}: cannot be used: {reason(error)}; correct this, or choose another path"

    import torch._dynamo.exc

    from lib.distributed import gpus
    from lib.distributed.processes import is_peer_failure
    from lib.errors import NonFiniteLossError

    if isinstance(error, NonFiniteLossError):
        return 1, str(error) if IS_RANK0 else ""  # it is raised on every rank
    if isinstance(error, torch._dynamo.exc.TorchDynamoException):
        return 2, f"--compile: PyTorch cannot compile on this machine ({reason(error)}); drop --compile"
    if is_out_of_memory(error):
        advice = "set --batch-size or --size lower, or choose a smaller --network"
        return 2, f"memory ran out{_on_rank()}; {advice}{gpus.memory_of_others()}"
    if gpus.is_failure(error):
        return UNEXPECTED, (
            f"the GPU failed{_on_rank()}: {printable(reason(error))}; nvidia-smi and the system's log (dmesg) may say "
            "why, and CUDA_LAUNCH_BLOCKING=1 makes the traceback name the operation"
        )
    if isinstance(error, RuntimeError) and launch.is_launched() and is_peer_failure(error):
        return UNEXPECTED, "another process of the run has ended; resume with --resume and the session folder"
    return None


def _on_rank() -> str:
    return f" on rank {os.environ['RANK']}" if launch.is_launched() else ""


def describe(error: Exception) -> str:
    """Type and message of an unknown error, on one line."""
    return printable(f"unexpected {type(error).__name__}: {reason(error)}")


def traceback_of(error: Exception) -> str:
    """The traceback of an error."""
    return "\n".join(map(printable, "".join(traceback.format_exception(error)).splitlines()))


def in_session(error: Exception, session: Session) -> UnexpectedError | None:
    """Writes the traceback of an unknown error, or of one of memory or of a GPU, to the session's log.

    Returns:
        The error to raise instead, whose message names the last checkpoint; None if ``explain`` knows another cause,
        or the traceback could not be written.
    """
    from lib.distributed import gpus

    known = explain(error)
    if known and not (is_out_of_memory(error) or gpus.is_failure(error)):
        return None
    if not session.write_traceback(error):
        return None
    assert session.folder is not None
    folder, checkpoint = shlex.quote(str(session.folder)), latest(session.folder)
    resume = f"resume with: python main.py --resume {folder}" if checkpoint.is_file() else "no checkpoint was saved yet"
    if known:
        saved = f"the last checkpoint is {checkpoint}; " if checkpoint.is_file() else ""
        return UnexpectedError(f"{known[1]}; {saved}{resume}", known[0])
    return UnexpectedError(f"{describe(error)}; its traceback is at the end of {session.folder / 'log.txt'}; {resume}")
