"""What a person sees while it runs: log lines, progress bars and plain tables.

Layer 0. Log lines go to standard output, bars to standard error; a bar appears only on a terminal and
only for work that takes longer than a second, so a redirected run leaves nothing but lines.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Sequence
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

LOGGER = "and"
SUMMARY = {"summary": True}
"""``extra`` of a log record that ``--brief`` shows, too."""
T = TypeVar("T")


class UsageError(Exception):
    """Input that cannot be used; the message is one sentence for the user. ``main.py`` exits with 2."""


class _BarAwareHandler(logging.Handler):
    """Writes records through tqdm, so that a line never lands in the middle of a bar."""

    def emit(self, record: logging.LogRecord) -> None:
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        text = self.format(record).encode(encoding, "backslashreplace").decode(encoding)  # file names may be any bytes
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


def logger() -> logging.Logger:
    """The program's logger; the session adds its ``log.txt`` to it."""
    return logging.getLogger(LOGGER)


def start_logging(brief: bool = False) -> logging.Logger:
    """Sends the program's log to the screen: everything, or with ``brief`` only what is marked so.

    A record is marked by ``extra=SUMMARY``; warnings and errors always show.
    """
    log = logger()
    log.setLevel(logging.INFO)
    log.propagate = False
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()
    screen = _BarAwareHandler()
    screen.setFormatter(logging.Formatter("%(message)s"))
    if brief:
        screen.addFilter(lambda r: r.levelno > logging.INFO or getattr(r, "summary", False))
    log.addHandler(screen)
    log.addHandler(MemoryHandler(sys.maxsize, flushLevel=logging.CRITICAL + 1))  # until there is a file
    return log


def log_to_file(path: Path) -> logging.Handler:
    """Adds a file to the log, with all that was logged since ``start_logging``; the handler is the caller's."""
    file = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
    formatter = logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%SZ")
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
        disable=None,  # no bar unless standard error is a terminal
    )


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Rows as text: the first column to the left, the others to the right."""
    cells = [[str(c) for c in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        first, *others = zip(row, widths, strict=True)
        return "  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]).rstrip()

    return "\n".join([line(cells[0]), "  ".join("-" * w for w in widths), *map(line, cells[1:])])
