"""Anchor Neighbourhood Discovery from the command line; ``python main.py --help`` lists the options.

Reads the options, has them carried out by ``lib/commands.py``, and turns errors into a sentence and an exit status.

PyTorch takes seconds to import. What needs it is imported once the options are known to be valid, so that ``--help``
and a wrong option answer at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import datasets
import models
from lib.config import parser
from lib.config.options import Options
from lib.distributed import launch
from lib.errors import ToldElsewhereError, UsageError
from lib.session.atomic_files import printable, reason
from lib.session.console import FIRST, closed_pipe_allowed
from lib.session.locate import folder_of, latest, locate

if TYPE_CHECKING:
    from lib.distributed.processes import World


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, or stopped by SIGUSR1; 1 the loss is not finite; 2 input that cannot be used; 3 the last
    checkpoint could not be saved; 130 and 143 stopped by Ctrl-C and SIGTERM.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        options, world = read_together(words) if launch.is_launched() else (resolve(words), None)
        if options.print_args:
            with closed_pipe_allowed():
                print(parser.to_yaml(options), end="")
            return 0
        from lib import commands

        return commands.run(options, words, world)
    except Exception as error:
        status, sentence = explain(error)
        if sentence:
            print(f"error: {sentence}", file=sys.stderr)
        return status
    except KeyboardInterrupt:
        print("interrupted; a run that stores a session is resumed by --resume with its folder", file=sys.stderr)
        return 130


def resolve(argv: Sequence[str]) -> Options:
    """The options. A run that is resumed without ``--cfgs``, and a report, have the session's options as defaults.

    Raises:
        UsageError: an option that is not known, or a value that it cannot have.
    """
    options = parser.read_options(argv)
    if options.is_for_one and launch.is_launched():
        raise UsageError("--report, --query and --compare are for one process; start them without a launcher")
    if isinstance(options.report, Path):
        folder = options.report
        if not (folder / "config.yaml").is_file():
            raise UsageError(f"{folder}: is no session's folder; pass --report one that holds config.yaml")
        if not latest(folder).is_file():
            raise UsageError(f"{folder}: has no checkpoint; a report can be made when the run's first epoch is done")
        options = parser.read_options([*argv, "--resume", str(folder)], base=folder / "config.yaml")
    elif options.resume and not options.cfgs and (session := folder_of(locate(options.resume))):
        options = parser.read_options(argv, base=session / "config.yaml")
    if not options.compare:
        parser.choose(datasets.DATASETS, options.dataset, "--dataset")
        parser.choose(models.NETWORKS, options.network, "--network")
    return options


def read_together(words: Sequence[str]) -> tuple[Options, World]:
    """The options in one of several processes that a launcher started, and these; what one refuses all refuse."""
    from lib.distributed.consensus import together
    from lib.distributed.processes import World

    world = World.join()
    return together(world, lambda: resolve(words)), world


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
    from lib.errors import NonFiniteLossError

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


if __name__ == "__main__":
    status = 0
    with closed_pipe_allowed():
        status = main()
    launch.end(status)
