"""TensorBoard's event files, each word on the disk when the call returns.

tensorboardX's own writer hands words to a thread: what a killed run wrote last is lost, and where the disk is full the
thread ends and the run waits for it for ever. So its formats are used here, and its file, without the thread.
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
        folder: where it comes into being; the folder above must exist.
        purge_step: TensorBoard hides what other files of the folder say of this step and later ones; None: nothing.

    Raises:
        OSError: it cannot be written; so does every method.
    """

    def __init__(self, folder: Path, purge_step: int | None) -> None:
        folder.mkdir(exist_ok=True)
        # two files of one second would share a name, the second emptying the first
        self._file = EventsWriter(str(folder / "events"), f".{time.time_ns()}")
        if purge_step is not None:
            self._write(purge_step, session_log=SessionLog(status=SessionLog.START))
        self._file.flush()

    def write_scalars(self, values: Mapping[str, float], step: int) -> None:
        """Numbers by tag."""
        for tag, value in values.items():
            self._write(step, summary=summary.scalar(tag, value))
        self._file.flush()

    def write_picture(self, tag: str, picture: np.ndarray, step: int) -> None:
        """An image (H, W, 3) of uint8."""
        self._write(step, summary=summary.image(tag, picture, dataformats="HWC"))
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _write(self, step: int, **what: Any) -> None:
        self._file.write_event(Event(wall_time=time.time(), step=step, **what))
