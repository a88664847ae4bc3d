"""Stopping a run from outside, between two steps."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from lib.distributed.processes import Ranks

STATUS: dict[signal.Signals, int] = {
    getattr(signal, name): status
    for name, status in {"SIGINT": 130, "SIGTERM": 143, "SIGUSR1": 0}.items()
    if hasattr(signal, name)  # Windows has no SIGUSR1
}
"""Exit status of a run that a signal stopped, as shells have it; of one that SIGUSR1 stopped: 0."""


BOUNCE = 1.0
"""Seconds within which a second Ctrl-C is the first one's echo."""


class Stopped(BaseException):
    """A signal asks the run to stop; what was under way is finished.

    Attributes:
        signal: which.
    """

    def __init__(self, which: signal.Signals) -> None:
        super().__init__(which.name)
        self.signal = which


class StopSignals:
    """Turns Ctrl-C, SIGTERM and SIGUSR1 into ``Stopped``, at once or when the shield that is up comes down.

    A second Ctrl-C is a ``KeyboardInterrupt`` at once, unless it comes within ``BOUNCE`` of the first, as it does from
    launchers, which pass on what the terminal has told everyone. Use it as a context, in the main thread; elsewhere it
    does nothing, since Python delivers no signals there.

    Args:
        world: the processes, which stop together where ``check`` is called, and nowhere else; alone: as above.
    """

    def __init__(self, ranks: Ranks | None = None) -> None:
        self.ranks = ranks or Ranks()
        self._since = 0.0
        self._before: dict[signal.Signals, Any] = {}
        self._pending: signal.Signals | None = None
        self._shields = 0

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {which: signal.signal(which, self._handle) for which in STATUS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for which, handler in self._before.items():
            signal.signal(which, handler)

    @contextmanager
    def defer(self) -> Iterator[None]:
        """What is in the block is finished first."""
        self._shields += 1
        try:
            yield
        finally:
            self._shields -= 1
        if self._pending is not None and not self._shields and self.ranks.size == 1:
            raise Stopped(self._pending)

    def raise_if_stopped(self) -> None:
        """Stops here if any process is asked to; to be called in all of them."""
        if self.is_stop_requested():
            raise Stopped(next(which for which in self.ranks.all_gather_object(self._pending) if which is not None))

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._pending is None:
            self._pending, self._since = signal.Signals(number), time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._since > BOUNCE:
            raise KeyboardInterrupt
        if not self._shields and self.ranks.size == 1:
            raise Stopped(self._pending)

    def is_stop_requested(self) -> bool:
        """Whether any process is asked to stop; to be called in all of them."""
        return self.ranks.any_rank(self._pending is not None)

    def finish_stopping(self) -> None:
        """The stop has been taken note of: what follows may finish, unless Ctrl-C comes again."""
        self._shields += 1
