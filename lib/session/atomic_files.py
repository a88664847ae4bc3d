"""Atomic file writes, and checks of output paths."""

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


def temp_path(path: Path) -> Path:
    """The temporary file that becomes ``path``: in the same folder, with the process id in its name."""
    return path.with_name(f"{path.name}.{os.getpid()}.part")


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Opens a temporary file for writing; when the block ends, flushes it to disk and renames it to ``path``.

    Readers see either the old file or the complete new one. If the block fails or is interrupted, ``path`` is
    unchanged and the temporary file is removed.

    Raises:
        OSError: the file cannot be written.
    """
    part = temp_path(path)
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        _fsync_folder(path.parent)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _fsync_folder(folder: Path) -> None:
    """Flushes a folder's entries to disk, so that a rename survives a power cut. POSIX only."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            with suppress(OSError):  # some file systems do not support it
                os.fsync(descriptor)
        finally:
            os.close(descriptor)


def hard_link(path: Path, name: Path) -> None:
    """Makes ``name`` a hard link to the file, or a copy if the file system has no links; replaces ``name``."""
    name.unlink(missing_ok=True)
    try:
        os.link(path, name)
    except OSError:  # no hard links on this file system
        shutil.copyfile(path, name)


@contextmanager
def new_files(*paths: Path) -> Iterator[tuple[BinaryIO, ...]]:
    """Opens new files for writing; when the block ends, either all of them appear or none.

    Raises:
        UsageError: a file exists or cannot be written.
    """
    for path in paths:
        check_place(path)  # checked again: hours may have passed since the options were checked
    try:
        with ExitStack() as stack:
            yield tuple(stack.enter_context(atomic_write(path)) for path in paths)
    except BaseException as error:
        for path in paths:  # the first may have been renamed before the second failed
            path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise UsageError(f"{paths[-1]}: cannot be written: {reason(error)}; choose another path") from None
        raise


def check_ending(flag: str, path: Path, endings: Sequence[str]) -> None:
    """Raises UsageError unless the file name given to ``flag`` ends in one of ``endings``."""
    if path.suffix.lower() not in endings:
        raise UsageError(f"{flag} {path}: the file name must end in {' or '.join(endings)}")


def check_place(path: Path) -> None:
    """Raises UsageError unless a new file can be created at ``path``."""
    try:
        with suppress(FileNotFoundError):
            temp_path(path).lstat()  # raises for an invalid name; the temporary name is the longer one
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be written: {reason(error)}; choose another name") from None
    if os.path.lexists(path):  # also a broken link
        raise UsageError(f"{path}: already exists; choose another name, or move the file away")
    if not path.parent.is_dir():
        raise UsageError(f"{path}: the folder {path.parent} does not exist; create it, or choose another folder")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UsageError(
            f"{path}: no permission to write to the folder {path.parent}; change its permissions, or choose another "
            "folder"
        )


def reason(error: BaseException) -> str:
    """The first line of an error's message, at most 200 characters; its type if the message is empty."""
    lines = (getattr(error, "strerror", None) or str(error)).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def printable(name: str) -> str:
    """A file name with unprintable characters escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in name)


def csv_text(value: str) -> str:
    """Text for a CSV cell. A leading quote is added where a spreadsheet would read the text as a formula.

    That is text that starts with ``=``, ``+``, ``-``, ``@``, a tab or a line break (OWASP, "CSV Injection"). Numbers
    written in digits are unchanged; infinity and NaN are names to a spreadsheet and are quoted.
    """
    is_formula = value.startswith(("=", "+", "-", "@", "\t", "\r", "\n")) and not NUMBER.fullmatch(value)
    return f"'{value}" if is_formula else value
