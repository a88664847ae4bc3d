"""Console output: log lines, progress bars and plain-text tables.

Log lines go to standard output, progress bars to standard error. A bar appears only on a terminal, and only after
one second, so redirected output contains log lines alone.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

LOGGER = "and"
SUMMARY = {"summary": True}
"""``extra`` of a log record that ``--brief`` also shows."""
T = TypeVar("T")
IS_RANK0 = os.environ.get("RANK", "0") == "0"
"""Whether this process is rank 0, the only one that logs and shows progress bars."""
CONTROLS = re.compile("[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u2028-\\u202e\\u2066-\\u2069]")
"""Control and formatting characters, which a terminal interprets instead of printing."""


class _Formatter(logging.Formatter):
    """Escapes control characters, which may come from file names."""

    def format(self, record: logging.LogRecord) -> str:
        return CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), super().format(record))


class LogFile(logging.FileHandler):
    """A log file whose write errors do not stop the run: the lines are lost, and a warning is printed once.

    Attributes:
        has_failed: whether a line could not be written.
    """

    has_failed = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  # overrides logging's method
        """Prints a warning for the first line that cannot be written."""
        if not self.has_failed:
            print(f"warning: {self.baseFilename}: cannot be written: {sys.exc_info()[1]}", file=sys.stderr)
        self.has_failed = True


class _BarAwareHandler(logging.Handler):
    """Writes records with ``tqdm.write``, so that log lines do not break progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        text = self.format(record).encode(encoding, "backslashreplace").decode(encoding)  # file names can be any bytes
        with closed_pipe_allowed():
            tqdm.write(text, file=sys.stdout)


@contextmanager
def closed_pipe_allowed() -> Iterator[None]:
    """Flushes standard output when the block ends. If the pipe is closed, as by ``| head``, this and all later output
    is discarded and the program continues.
    """
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def logger() -> logging.Logger:
    """The program's logger. A session adds its ``log.txt`` as a handler."""
    return logging.getLogger(LOGGER)


def start_logging(brief: bool = False) -> logging.Logger:
    """Shows the log on the screen. With ``brief``, only warnings, errors and records with ``extra=SUMMARY``."""
    log = logger()
    log.setLevel(logging.INFO if IS_RANK0 else logging.ERROR)
    log.propagate = False
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()
    screen = _BarAwareHandler()
    screen.setFormatter(_Formatter("%(message)s"))
    if brief:
        screen.addFilter(lambda r: r.levelno > logging.INFO or getattr(r, "summary", False))
    log.addHandler(screen)
    log.addHandler(MemoryHandler(sys.maxsize, flushLevel=logging.CRITICAL + 1))  # until log_to_file is called
    return log


def log_to_file(path: Path) -> LogFile:
    """Adds a log file, which begins with all records since ``start_logging``. The caller closes the handler."""
    file = LogFile(path, encoding="utf-8", errors="backslashreplace")
    formatter = _Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%SZ")
    formatter.converter = time.gmtime
    file.setFormatter(formatter)
    for handler in list(logger().handlers):
        if isinstance(handler, MemoryHandler):
            handler.setTarget(file)
            handler.close()
            logger().removeHandler(handler)
    logger().addHandler(file)
    return file


def progress(items: Iterable[T], what: str, unit: str = "it", total: int | None = None) -> tqdm[T]:
    """A progress bar over ``items``: shown after one second, on terminals only, and removed at the end."""
    return tqdm(
        items,
        desc=what,
        unit=unit,
        total=total,
        delay=1,
        leave=False,
        dynamic_ncols=True,
        disable=None if IS_RANK0 else True,  # None: disabled unless standard error is a terminal
    )


def plural(count: int, noun: str) -> str:
    """'1 neighbour', '2 neighbours'."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A plain-text table: the first column is left-aligned, the others right-aligned."""
    cells = [[str(c) for c in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        first, *others = zip(row, widths, strict=True)
        return "  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]).rstrip()

    return "\n".join([line(cells[0]), "  ".join("-" * w for w in widths), *map(line, cells[1:])])
