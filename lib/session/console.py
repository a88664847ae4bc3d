"""What a person sees while it runs: log lines, progress bars and plain tables.

Log lines go to standard output, bars to standard error; a bar appears only on a terminal and
only for work that takes longer than a second, so a redirected run leaves nothing but lines.
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
"""``extra`` of a log record that ``--brief`` shows, too."""
T = TypeVar("T")
FIRST = os.environ.get("RANK", "0") == "0"
"""Of several processes that train together the first one speaks."""
CONTROLS = re.compile("[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u2028-\\u202e\\u2066-\\u2069]")
"""Characters that a terminal obeys, and does not show."""


class _Formatter(logging.Formatter):
    """Lines that a terminal shows, whatever names are in them: what it would obey stands there in words."""

    def format(self, record: logging.LogRecord) -> str:
        return CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), super().format(record))


class LogFile(logging.FileHandler):
    """A log that lines are missing from where the disk is full; the run goes on.

    Attributes:
        has_failed: whether a line is missing.
    """

    has_failed = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  # the name of logging
        """Warns of the first line that cannot be written."""
        if not self.has_failed:
            print(f"warning: {self.baseFilename}: cannot be written: {sys.exc_info()[1]}", file=sys.stderr)
        self.has_failed = True


class _BarAwareHandler(logging.Handler):
    """Writes records through tqdm, so that a line never lands in the middle of a bar."""

    def emit(self, record: logging.LogRecord) -> None:
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        text = self.format(record).encode(encoding, "backslashreplace").decode(encoding)  # file names may be any bytes
        with closed_pipe_allowed():
            tqdm.write(text, file=sys.stdout)


@contextmanager
def closed_pipe_allowed() -> Iterator[None]:
    """Flushes standard output when the block ends. If its reader has gone, as behind ``| head``, this and all later
    output is discarded and the program continues.
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
    """The program's logger; the session adds its ``log.txt`` to it."""
    return logging.getLogger(LOGGER)


def start_logging(brief: bool = False) -> logging.Logger:
    """Sends the program's log to the screen: everything, or with ``brief`` only what is marked so.

    A record is marked by ``extra=SUMMARY``; warnings and errors always show.
    """
    log = logger()
    log.setLevel(logging.INFO if FIRST else logging.ERROR)
    log.propagate = False
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()
    screen = _BarAwareHandler()
    screen.setFormatter(_Formatter("%(message)s"))
    if brief:
        screen.addFilter(lambda r: r.levelno > logging.INFO or getattr(r, "summary", False))
    log.addHandler(screen)
    log.addHandler(MemoryHandler(sys.maxsize, flushLevel=logging.CRITICAL + 1))  # until there is a file
    return log


def log_to_file(path: Path) -> LogFile:
    """Adds a file to the log, with all that was logged since ``start_logging``; the handler is the caller's."""
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
    """A progress bar around ``items``: after one second, on terminals only, gone when it is done."""
    return tqdm(
        items,
        desc=what,
        unit=unit,
        total=total,
        delay=1,
        leave=False,
        dynamic_ncols=True,
        disable=None if FIRST else True,  # no bar unless standard error is a terminal
    )


def plural(count: int, noun: str) -> str:
    """'1 neighbour', '2 neighbours'."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Rows as text: the first column to the left, the others to the right."""
    cells = [[str(c) for c in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        first, *others = zip(row, widths, strict=True)
        return "  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]).rstrip()

    return "\n".join([line(cells[0]), "  ".join("-" * w for w in widths), *map(line, cells[1:])])
