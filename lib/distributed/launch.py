"""Launching one process per GPU with PyTorch's elastic launcher, and identifying the job of a process."""

from __future__ import annotations

import gc
import logging
import os
import signal
import socket
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

import psutil

UNEXPECTED = 70
"""Exit status of an internal error or of a failed peer: EX_SOFTWARE of sysexits.h."""


def is_launched() -> bool:
    """Whether a launcher such as torchrun started this process."""
    return "WORLD_SIZE" in os.environ and "RANK" in os.environ


def restarts() -> int:
    """Number of times the launcher has restarted the processes (``torchrun --max-restarts``)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def job() -> str:
    """Identifier of the job that this process belongs to, stable across restarts; '' without a launcher."""
    if not is_launched():
        return ""
    launcher = psutil.Process(os.getppid())
    return f"{os.environ.get('TORCHELASTIC_RUN_ID', '')} {socket.gethostname()} {launcher.pid} {launcher.create_time()}"


def end(status: int) -> NoReturn:
    """Exits. A launched process exits without clean-up: in PyTorch 2.6, destroying the process group may hang."""
    if is_launched():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    if status == 128 + signal.SIGTERM:
        # Python restores the default handler, which kills the process, when it exits
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if status:
        gc.collect()  # frees loaders held by traceback frames, which ends their workers
    sys.exit(status)


def run(program: Path, words: Sequence[str], processes: int) -> int:
    """Runs a program in several processes on this machine, with PyTorch's elastic launcher.

    If one process fails, the launcher ends the others within seconds.

    Returns:
        The exit status: 0, that of the process that failed first, or 128 plus the signal number if a signal killed it.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from lib.distributed.signals import STATUS

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # each process reports its own errors
    if hasattr(signal, "SIGUSR1"):  # the launcher forwards all signals except this one
        signal.signal(signal.SIGUSR1, _forward_signal)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    config = LaunchConfig(
        run_id=uuid.uuid4().hex,
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)(str(program), *words)
    except ChildFailedError as error:
        failures = sorted(error.failures.values(), key=lambda failure: failure.timestamp)
        codes = [failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode for failure in failures]
        # the peers of a failed process fail too, or the launcher terminates them
        consequences = {UNEXPECTED: 1, STATUS[signal.SIGTERM]: 2}
        return min(codes, key=lambda code: consequences.get(code, 0))
    except SignalException as error:
        return STATUS.get(error.sigval, 128 + error.sigval)
    return 0


def _forward_signal(number: int, frame: FrameType | None) -> None:
    """Signal handler: sends the signal to all child processes."""
    for child in psutil.Process().children():
        child.send_signal(number)
