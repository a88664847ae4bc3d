"""Stopping a run by a signal, between two steps."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from lib.distributed.launch import is_launched
from lib.distributed.processes import Ranks

STATUS: dict[signal.Signals, int] = {
    getattr(signal, name): status
    for name, status in {"SIGINT": 130, "SIGTERM": 143, "SIGUSR1": 0}.items()
    if hasattr(signal, name)  # Windows has no SIGUSR1
}
"""Exit status of a run that was stopped by a signal: 128 plus its number, and 0 for SIGUSR1."""


BOUNCE = 1.0
"""Seconds within which a second SIGINT is ignored as a duplicate of the first."""


GPU_STEPS = 10
"""Training steps on several GPUs between two exchanges of stop requests, which go through the hosts."""


class Stopped(BaseException):
    """Raised when a signal has requested a stop, after a deferred block has ended.

    Attributes:
        signal: the signal.
    """

    def __init__(self, which: signal.Signals) -> None:
        super().__init__(which.name)
        self.signal = which


class StopSignals:
    """Turns SIGINT (Ctrl-C), SIGTERM and SIGUSR1 into ``Stopped``.

    With a single process ``Stopped`` is raised at once, or at the end of a ``defer`` block. With several ranks it is
    raised only in ``raise_if_stopped``, on all of them. A second SIGINT raises ``KeyboardInterrupt`` at once, unless it
    follows within ``BOUNCE`` seconds: programs that start others forward the SIGINT that the terminal has already sent
    to every process. PyTorch's launcher does so too, and on a busy machine later than that, so under it one more SIGINT
    is needed: the forwarded copy of the second Ctrl-C is that one.

    Use it as a context manager in the main thread. In other threads it does nothing: Python runs signal handlers in
    the main thread only. After ``Stopped`` the handlers stay, because a copy of the signal that another program
    forwards must not kill a process that is about to exit.
    """

    def __init__(self, ranks: Ranks | None = None) -> None:
        self.ranks = ranks or Ranks()
        self._first_time = 0.0
        self._previous_handlers: dict[signal.Signals, Any] = {}
        self._pending: signal.Signals | None = None
        self._ignored_repeats = 1 if is_launched() else 0
        self._defer_depth = 0

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._previous_handlers = {which: signal.signal(which, self._handle) for which in STATUS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if isinstance(error, Stopped):
            self.finish_stopping()
            return
        for which, handler in self._previous_handlers.items():
            signal.signal(which, handler)

    @contextmanager
    def defer(self) -> Iterator[None]:
        """Defers ``Stopped`` to the end of the block."""
        self._defer_depth += 1
        try:
            yield
        finally:
            self._defer_depth -= 1
        if self._pending is not None and not self._defer_depth and self.ranks.size == 1:
            raise Stopped(self._pending)

    def raise_if_stopped(self) -> None:
        """Raises ``Stopped`` on all ranks if any of them received a signal. A collective: call it on every rank."""
        if self.is_stop_requested():
            raise Stopped(next(which for which in self.ranks.all_gather_object(self._pending) if which is not None))

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._pending is None:
            self._pending, self._first_time = signal.Signals(number), time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._first_time > BOUNCE:
            if self._ignored_repeats == 0:
                raise KeyboardInterrupt
            self._ignored_repeats -= 1
        if not self._defer_depth and self.ranks.size == 1:
            raise Stopped(self._pending)

    def is_stop_requested(self) -> bool:
        """Whether any rank received a signal. A collective: call it on every rank."""
        return self.ranks.any_rank(self._pending is not None)

    def finish_stopping(self) -> None:
        """Defers further signals until the process exits, except a second SIGINT."""
        self._defer_depth += 1
