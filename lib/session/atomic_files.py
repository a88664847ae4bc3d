"""Files that are whole, or not there."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from lib.errors import UsageError

NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


def beside(path: Path) -> Path:
    """Where a file is written before it takes its name; another place in every process."""
    return path.with_name(f"{path.name}.{os.getpid()}.part")


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A file to write to; when the block ends it is flushed to the disk, and renamed to ``path``.

    A reader sees the old file or the new one. Where the block fails or is interrupted, ``path`` stays as it
    was and nothing lies beside it.
    """
    part = beside(path)
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        _settle(path.parent)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _settle(folder: Path) -> None:
    """Has the names in a folder written to the disk, where the system can, for a power cut to find them there."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            with suppress(OSError):  # some file systems know no such thing
                os.fsync(descriptor)
        finally:
            os.close(descriptor)


def keep(path: Path, name: Path) -> None:
    """Gives a file a second name, which outlives a new file of the first one; replaces what had that name."""
    name.unlink(missing_ok=True)
    try:
        os.link(path, name)
    except OSError:  # file systems without links
        shutil.copyfile(path, name)


@contextmanager
def new_files(*paths: Path) -> Iterator[tuple[BinaryIO, ...]]:
    """Files that come into being when the block ends; UsageError where they exist or cannot be written."""
    for path in paths:
        check_place(path)  # again: training takes hours
    try:
        with ExitStack() as stack:
            yield tuple(stack.enter_context(atomic_write(path)) for path in paths)
    except BaseException as error:
        for path in paths:  # one may be done when the other fails
            path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise UsageError(f"{paths[-1]}: cannot be written: {reason(error)}; choose another place") from None
        raise


def check_ending(flag: str, path: Path, endings: Sequence[str]) -> None:
    """UsageError unless the name of a file that ``flag`` asks for ends in one of ``endings``."""
    if path.suffix.lower() not in endings:
        raise UsageError(f"{flag} {path}: the file's name should end in {' or '.join(endings)}")


def check_place(path: Path) -> None:
    """UsageError unless a file can be made at ``path``."""
    try:
        with suppress(FileNotFoundError):
            beside(path).lstat()  # raises for a name that no file can have; this is the longer one
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be written: {reason(error)}; choose another name") from None
    if os.path.lexists(path):  # also where a link leads nowhere
        raise UsageError(f"{path}: exists; choose another name, or move it away")
    if not path.parent.is_dir():
        raise UsageError(f"{path}: there is no folder {path.parent}; make it, or choose another one")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UsageError(f"{path}: the folder {path.parent} cannot be written to; allow it, or choose another one")


def reason(error: BaseException) -> str:
    """Why something failed, on one line."""
    lines = (getattr(error, "strerror", None) or str(error)).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def printable(name: str) -> str:
    """A file's name on one line; it may hold any bytes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in name)


def csv_text(value: str) -> str:
    """Text for a cell of a CSV file, with a quote in front where a spreadsheet would take it for a formula.

    As OWASP advises, "CSV Injection": what begins with ``=``, ``+``, ``-``, ``@``, a tab or a line break. A number
    in digits stays as it is; infinity and NaN are names to a spreadsheet.
    """
    is_formula = value.startswith(("=", "+", "-", "@", "\t", "\r", "\n")) and not NUMBER.fullmatch(value)
    return f"'{value}" if is_formula else value
