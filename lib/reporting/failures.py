"""What ended the program, as an exit status and a sentence.

PyTorch is imported for errors that only it raises, so that a wrong option is answered at once.
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
    """An error that ``explain`` does not know; the message is a sentence, and the traceback is in the session's log."""


def explain(error: Exception) -> tuple[int, str] | None:
    """Exit status and sentence of an error; the sentence is empty where another process says it. None: not known."""
    if isinstance(error, ToldElsewhereError):
        return 2, ""
    if isinstance(error, UnexpectedError):
        return UNEXPECTED, str(error)
    if isinstance(error, UsageError | datasets.DataError | models.NetworkError):
        return 2, printable(str(error).rpartition("DataError: ")[2].strip())  # a worker's comes behind its traceback
    if isinstance(error, OSError):
        place = printable(str(error.filename or "the file system"))
        return 2, f"{place}: cannot be used: {reason(error)}; mend that, or choose another place"

    import torch._dynamo.exc

    from lib.distributed.processes import is_peer_failure
    from lib.errors import NonFiniteLossError

    if isinstance(error, NonFiniteLossError):
        return 1, str(error) if IS_RANK0 else ""  # the same in every process
    if isinstance(error, torch._dynamo.exc.TorchDynamoException):
        return 2, f"--compile: PyTorch cannot compile the network here ({reason(error)}); leave it out"
    if is_out_of_memory(error):
        return 2, "memory ran out; set --batch-size or --size lower, or choose a smaller --network"
    if isinstance(error, RuntimeError) and launch.is_launched() and is_peer_failure(error):
        return UNEXPECTED, "another process of the run has ended; --resume with the session's folder goes on"
    return None


def describe(error: Exception) -> str:
    """Kind and message of an error that ``explain`` does not know, on one line."""
    return printable(f"unexpected {type(error).__name__}: {reason(error)}")


def traceback_of(error: Exception) -> str:
    """Where an error came from, as Python shows it."""
    return "\n".join(map(printable, "".join(traceback.format_exception(error)).splitlines()))


def in_session(error: Exception, session: Session) -> UnexpectedError | None:
    """What to raise in place of an error that ended a session, after writing its traceback to the session's log.

    Returns:
        None where ``explain`` knows the error, or there is no log that the traceback could be written to.
    """
    if explain(error) is not None or not session.write_traceback(error):
        return None
    assert session.folder is not None
    folder = shlex.quote(str(session.folder))
    is_saved = latest(session.folder).is_file()
    resume = f"resume with: python main.py --resume {folder}" if is_saved else "no checkpoint was saved yet"
    return UnexpectedError(f"{describe(error)}; its traceback is at the end of {session.folder / 'log.txt'}; {resume}")
