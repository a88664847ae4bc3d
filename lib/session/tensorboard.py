"""Synchronous TensorBoard event files: every value is written when the call returns.

tensorboardX's ``SummaryWriter`` writes in a thread. A killed run loses its last values, and on a full disk the thread
dies and the run blocks forever. This module uses tensorboardX's protocol buffers and ``EventsWriter`` without the
thread.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog


class EventFile:
    """A new event file.

    Args:
        folder: the folder to create it in; the parent folder must exist.
        purge_step: TensorBoard hides the values of the folder's earlier files from this step on; None: hides nothing.

    Raises:
        OSError: the file cannot be written. All methods raise it, too.
    """

    def __init__(self, folder: Path, purge_step: int | None) -> None:
        folder.mkdir(exist_ok=True)
        # two files created in the same second would have the same name, and the second would overwrite the first
        self._file = EventsWriter(str(folder / "events"), f".{time.time_ns()}")
        if purge_step is not None:
            self._write(purge_step, session_log=SessionLog(status=SessionLog.START))
        self._file.flush()

    def write_scalars(self, values: Mapping[str, float], step: int) -> None:
        """Writes scalars, tag -> value."""
        for tag, value in values.items():
            self._write(step, summary=summary.scalar(tag, value))
        self._file.flush()

    def write_picture(self, tag: str, picture: np.ndarray, step: int) -> None:
        """Writes an image, uint8 (H, W, 3)."""
        self._write(step, summary=summary.image(tag, picture, dataformats="HWC"))
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _write(self, step: int, **what: Any) -> None:
        self._file.write_event(Event(wall_time=time.time(), step=step, **what))
