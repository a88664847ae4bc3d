"""Files that are whole, or not there. Layer 0."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def beside(path: Path) -> Path:
    """Where a file is written before it takes its name."""
    return path.with_name(path.name + ".part")


@contextmanager
def write_whole(path: Path) -> Iterator[BinaryIO]:
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
    except BaseException:
        part.unlink(missing_ok=True)
        raise
