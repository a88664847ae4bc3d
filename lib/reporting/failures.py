"""Maps errors to exit statuses and messages.

PyTorch is imported only for errors that need it, so that an invalid option is reported without that delay.
"""

from __future__ import annotations

import shlex
import traceback
from typing import TYPE_CHECKING

import datasets
import models
from lib.distributed import launch
from lib.distributed.launch import UNEXPECTED
from lib.errors import ToldElsewhereError, UsageError, is_out_of_memory
from lib.session.atomic_files import printable, reason
from lib.session.console import IS_RANK0
from lib.session.locate import latest

if TYPE_CHECKING:
    from lib.session.run_folder import Session


class UnexpectedError(Exception):
    """An unknown error whose traceback was written to the session's log. The message is one sentence for the user."""


def explain(error: Exception) -> tuple[int, str] | None:
    """Exit status and message of an error, or None if it is unknown. The message is '' if another rank prints it."""
    if isinstance(error, ToldElsewhereError):
        return 2, ""
    if isinstance(error, UnexpectedError):
        return UNEXPECTED, str(error)
    if isinstance(error, UsageError | datasets.DataError | models.NetworkError):
        return 2, printable(str(error).rpartition("DataError: ")[2].strip())  # a worker process prepends its traceback
    if isinstance(error, OSError):
        place = printable(str(error.filename or "the file system"))
        return 2, f"{place}: cannot be used: {reason(error)}; correct this, or choose another path"

    import torch._dynamo.exc

    from lib.distributed.processes import is_peer_failure
    from lib.errors import NonFiniteLossError

    if isinstance(error, NonFiniteLossError):
        return 1, str(error) if IS_RANK0 else ""  # it is raised on every rank
    if isinstance(error, torch._dynamo.exc.TorchDynamoException):
        return 2, f"--compile: PyTorch cannot compile the network on this machine ({reason(error)}); drop --compile"
    if is_out_of_memory(error):
        return 2, "memory ran out; set --batch-size or --size lower, or choose a smaller --network"
    if isinstance(error, RuntimeError) and launch.is_launched() and is_peer_failure(error):
        return UNEXPECTED, "another process of the run has ended; resume with --resume and the session folder"
    return None


def describe(error: Exception) -> str:
    """Type and message of an unknown error, on one line."""
    return printable(f"unexpected {type(error).__name__}: {reason(error)}")


def traceback_of(error: Exception) -> str:
    """The traceback of an error."""
    return "\n".join(map(printable, "".join(traceback.format_exception(error)).splitlines()))


def in_session(error: Exception, session: Session) -> UnexpectedError | None:
    """Writes the traceback of an unknown error to the session's log.

    Returns:
        The error to raise instead, or None if ``explain`` knows the error or the traceback could not be written.
    """
    if explain(error) is not None or not session.write_traceback(error):
        return None
    assert session.folder is not None
    folder = shlex.quote(str(session.folder))
    is_saved = latest(session.folder).is_file()
    resume = f"resume with: python main.py --resume {folder}" if is_saved else "no checkpoint was saved yet"
    return UnexpectedError(f"{describe(error)}; its traceback is at the end of {session.folder / 'log.txt'}; {resume}")
