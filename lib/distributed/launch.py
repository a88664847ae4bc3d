"""Starting a process for each GPU, and knowing the processes of one start again."""

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
"""Exit status of an error of the program itself, or of another process of the run; EX_SOFTWARE of sysexits.h."""


def is_launched() -> bool:
    """Whether a launcher, such as torchrun, started this process."""
    return "WORLD_SIZE" in os.environ and "RANK" in os.environ


def restarts() -> int:
    """How often the launcher has started the processes anew, as ``torchrun --max-restarts`` does."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def job() -> str:
    """What tells the processes of one launcher from those of others, restarts included; '' without one."""
    if not is_launched():
        return ""
    launcher = psutil.Process(os.getppid())
    return f"{os.environ.get('TORCHELASTIC_RUN_ID', '')} {socket.gethostname()} {launcher.pid} {launcher.create_time()}"


def end(status: int) -> NoReturn:
    """Ends this process; one of several at once, for in PyTorch 2.6 taking their group apart may wait for ever."""
    if is_launched():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    if status:
        gc.collect()  # the frames of a failure hold loaders, whose worker processes end when these are freed
    sys.exit(status)


def run(program: Path, words: Sequence[str], processes: int) -> int:
    """Runs a program in several processes on this machine, by PyTorch's elastic launcher; the exit status.

    The first of them writes to the screen. The others end within seconds of one that fails, whose status it is; of one
    that a signal has killed it is 128 and the signal's number, as shells have it.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from lib.distributed.signals import STATUS

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the processes speak for themselves
    if hasattr(signal, "SIGUSR1"):  # the launcher passes on all signals but this one
        signal.signal(signal.SIGUSR1, _ring_exchange)
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
        # the others lose the one that failed, or are ended by the launcher
        consequences = {UNEXPECTED: 1, STATUS[signal.SIGTERM]: 2}
        return min(codes, key=lambda code: consequences.get(code, 0))
    except SignalException as error:
        return STATUS.get(error.sigval, 128 + error.sigval)
    return 0


def _ring_exchange(number: int, frame: FrameType | None) -> None:
    for child in psutil.Process().children():
        child.send_signal(number)
