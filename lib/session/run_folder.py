"""A session: the folder of one run, and everything written to it except the content of checkpoints.

sessions/NAME/
    config.yaml          the options; pass it to --cfgs to repeat the run
    log.txt              the log with timestamps
    metrics.jsonl        one JSON line for each epoch
    starts.jsonl         one JSON line for each start: versions, commit, hardware, seed, data, network
    checkpoint/          latest.ckpt (see --ckpt-interval); previous.ckpt, the one before it;
                         {round:04d}-{anchors:05d}.ckpt, the best of each round (see --keep)
    neighbours/          {round:04d}-{anchors:05d}.png, anchors next to their neighbours; .ckpt, the discovered
                         neighbourhoods, unless --keep all stores them in the best checkpoints
    tfboard/             TensorBoard events: global/, and a folder for each round
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import filelock
import numpy as np
from tensorboardX import SummaryWriter

from lib.errors import UsageError
from lib.session import metrics
from lib.session.atomic_files import atomic_write, reason
from lib.session.console import LOGGER, LogFile, log_to_file, logger
from lib.session.locate import LATEST
from lib.session.metrics import METRICS, STARTS
from lib.session.tensorboard import EventFile

LOCK = ".lock"
PROJECTOR = "projector_config.pbtxt"
TENSORBOARD = "TensorBoard events"


class Session:
    """Writes a run's log, metrics and TensorBoard events. With ``folder`` None (``--debug``) all methods do nothing.

    A write error is logged as a warning and does not stop the run: a full disk should not end the training.
    Checkpoints are written, and their errors reported, by ``lib/training/recorder.py``.

    Args:
        folder: an existing folder, or None.
        start: (round, epoch) at which the run starts. Metrics and events from there on are removed, so that a run
            resumed from an earlier checkpoint records no epoch twice.
        log_file: write log.txt.
        log_tfb: write TensorBoard events.

    Raises:
        UsageError: another process uses the session.
        OSError: the folder cannot be written.
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        start: tuple[int, int] = (0, 0),
        log_file: bool = True,
        log_tfb: bool = True,
    ) -> None:
        self.folder = folder
        self._start = start
        self._tensorboard = log_tfb and folder is not None
        self._events: dict[str, EventFile] = {}
        self._log: LogFile | None = None
        if folder is None:
            return
        self._lock = filelock.FileLock(folder / LOCK, timeout=0)  # released by the system when the process ends
        try:
            self._lock.acquire()
        except filelock.Timeout:
            raise UsageError(
                f"{folder}: another process is training in this session; wait for it, stop it, or add --restart to "
                "continue in a new session"
            ) from None
        for name in ("checkpoint", "neighbours", *(["tfboard"] if self._tensorboard else [])):
            (folder / name).mkdir(exist_ok=True)
        for part in (*folder.glob("*.part"), *folder.glob("checkpoint/*.part"), *folder.glob("neighbours/*.part")):
            part.unlink()  # temporary files of a killed run
        self._drop_metrics_from(start)
        if log_file:
            self._log = log_to_file(folder / "log.txt")

    @classmethod
    def open(cls, folder: Path, options: str, **arguments: Any) -> Session:
        """Opens a session in ``folder`` and writes ``options`` to its config.yaml.

        Raises:
            UsageError: the folder cannot be written, or another process uses the session.
        """
        try:
            opened = cls(folder, **arguments)
            try:
                opened._write_config(options)
            except OSError:
                opened.close()
                raise
        except OSError as error:
            raise UsageError(
                f"{folder}: cannot be written: {error.strerror}; choose another --sess-dir (with --resume, also add "
                "--restart)"
            ) from None
        return opened

    @property
    def name(self) -> str:
        """The folder's name, '' with ``--debug``."""
        return self.folder.name if self.folder else ""

    def latest(self) -> Path | None:
        """Path of the latest checkpoint."""
        return self.folder / "checkpoint" / LATEST if self.folder else None

    def of_round(self, kind: str, round: int, anchors: int, ending: str) -> Path | None:
        """Path of a round's file in the folder ``kind`` ('checkpoint' or 'neighbours')."""
        return self.folder / kind / f"{_round_name(round, anchors)}.{ending}" if self.folder else None

    def _write_config(self, text: str) -> None:
        """Writes config.yaml. If a resumed run changes it, the former file is renamed to config.<i>.yaml."""
        assert self.folder is not None
        path = self.folder / "config.yaml"
        if path.exists():
            if path.read_bytes() == text.encode("utf-8"):
                return
            before = next(p for i in itertools.count(1) if not (p := self.folder / f"config.{i}.yaml").exists())
            path.rename(before)
            logger().info("the options have changed: the former config.yaml was renamed to %s", before.name)
        with atomic_write(path) as file:
            file.write(text.encode("utf-8"))

    @contextmanager
    def warn_on_write_error(self, what: str) -> Iterator[None]:
        """Turns an OSError in the block into a warning that ``what`` could not be written."""
        try:
            yield
        except OSError as error:
            logger().warning("%s: %s could not be written: %s", self.folder, what, reason(error))

    def write_traceback(self, error: BaseException) -> bool:
        """Writes an error's traceback to log.txt, not to the screen. Returns whether it was written."""
        if self._log is None:
            return False
        where = type(error), error, error.__traceback__
        self._log.handle(logging.LogRecord(LOGGER, logging.ERROR, "", 0, "an error ended the run", None, where))
        return not self._log.has_failed

    def write_start(self, facts: dict[str, Any]) -> None:
        """Appends a line to starts.jsonl, at each start and resume."""
        self._add_line(STARTS, {name: str(value) for name, value in facts.items()})

    def epochs(self) -> list[dict[str, Any]]:
        """The epochs recorded before this start; none if the records cannot be read."""
        try:
            return metrics.read(self.folder) if self.folder else []
        except UsageError:
            return []

    def write_metrics(self, record: dict[str, Any]) -> None:
        """Appends a line to metrics.jsonl. NaN and infinite values become null."""
        self._add_line(METRICS, {name: _finite(value) for name, value in record.items()})

    def _add_line(self, name: str, record: dict[str, Any]) -> None:
        if self.folder:
            path = self.folder / name
            with self.warn_on_write_error(f"a line of {name}"), path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")

    def write_scalars(
        self, values: dict[str, float | None], step: int, round_folder: tuple[int, int] | None = None
    ) -> None:
        """Writes TensorBoard scalars.

        Args:
            values: tag -> value; None is skipped.
            step: the round for the folder ``global``, the epoch within the round otherwise.
            round_folder: (round, anchors), or None for the folder ``global``.
        """
        if not self._tensorboard:
            return
        with self.warn_on_write_error(TENSORBOARD):
            known = {tag: value for tag, value in values.items() if value is not None}
            self._event_file(round_folder).write_scalars(known, step)

    def write_picture(self, tag: str, picture: np.ndarray, step: int) -> None:
        """Writes a TensorBoard image, uint8 (H, W, 3); ``step`` is the round."""
        if self._tensorboard:
            with self.warn_on_write_error(TENSORBOARD):
                self._event_file(None).write_picture(tag, picture, step)

    def write_projector(self, rows: np.ndarray, labels: Sequence[str] | None, thumbnails: np.ndarray) -> None:
        """Writes embeddings for TensorBoard's projector, once per session.

        Args:
            rows: (n, D).
            labels: n class names, or None without labels.
            thumbnails: (n, 3, S, S) in [0, 1].
        """
        if not self._tensorboard or self.folder is None:
            return
        folder = self.folder / "tfboard" / "global"
        if (folder / PROJECTOR).exists():
            return
        words = None if labels is None else [" ".join(label.split()) for label in labels]  # one line each
        # tensorboardX computes with uninitialised memory after the last thumbnail
        with self.warn_on_write_error(TENSORBOARD), np.errstate(all="ignore"):
            folder.mkdir(exist_ok=True)  # tensorboardX would also create the parents
            writer = SummaryWriter(str(folder), write_to_disk=False)  # no event file: embeddings have their own files
            writer.add_embedding(rows, metadata=words, label_img=thumbnails, tag="memory bank")

    def _event_file(self, round_folder: tuple[int, int] | None) -> EventFile:
        """The event file of the folder ``global``, or of (round, anchors); opened on first use."""
        assert self.folder is not None
        name = "global" if round_folder is None else _round_name(*round_folder)
        if name not in self._events:
            round, epoch = self._start
            here = round if round_folder is None else epoch if round_folder[0] == round else 0
            folder = self.folder / "tfboard" / name
            self._events[name] = EventFile(folder, here if folder.exists() else None)
        return self._events[name]

    def close(self) -> None:
        """Closes all files and releases the lock."""
        for file in self._events.values():
            with self.warn_on_write_error(TENSORBOARD):
                file.close()
        if self._log:
            logger().removeHandler(self._log)
            with self.warn_on_write_error("the end of log.txt"):
                self._log.close()
        if self.folder:
            self._lock.release()

    def _drop_metrics_from(self, start: tuple[int, int]) -> None:
        assert self.folder is not None
        path = self.folder / METRICS
        if not path.exists():
            return
        kept = [line for line in path.read_bytes().split(b"\n") if _is_before(line, start)]
        with atomic_write(path) as file:
            file.write(b"".join(line + b"\n" for line in kept))


def _round_name(round: int, anchors: int) -> str:
    return f"{round:04d}-{anchors:05d}"


def _is_before(line: bytes, start: tuple[int, int]) -> bool:
    record = metrics.parse_record(line)  # None: damaged, or the incomplete line of a killed run
    return record is not None and (record["round"], record["epoch"]) < start


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def create_folder(sess_dir: Path, name: str | None) -> Path:
    """Creates a new session folder; an existing one is never reused.

    Args:
        sess_dir: folder of all sessions.
        name: name of the session; None: the UTC time, plus a number if two sessions start in the same second.

    Raises:
        UsageError: the session exists, the name contains a path, or the folder cannot be created.
    """
    if name is not None and (name in ("", ".", "..") or Path(name).name != name or "\0" in name):
        raise UsageError(f"--session {name!r}: must be the name of a folder in {sess_dir}, without a path")
    stem = name or datetime.now(timezone.utc).strftime("%Y-%m-%d-%H-%M-%S")
    try:
        sess_dir.mkdir(parents=True, exist_ok=True)
        number = 1
        while True:
            folder = sess_dir / (stem if number == 1 else f"{stem}-{number}")
            try:
                folder.mkdir()
                return folder
            except FileExistsError:
                if name is not None:
                    resume = f"--resume {shlex.quote(str(folder))}"
                    raise UsageError(
                        f"{folder}: already exists; choose another --session, or resume it with {resume}"
                    ) from None
            number += 1
    except (OSError, ValueError) as error:  # ValueError: an invalid folder name
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"{sess_dir}: cannot create a session: {reason}; choose another --sess-dir") from None


def of_job(sess_dir: Path, job: str) -> Path | None:
    """The latest session started by a launcher job (see ``lib.distributed.launch``), or None."""
    if not sess_dir.is_dir():
        return None
    begun = [path for path in sess_dir.glob(f"*/{STARTS}") if json.dumps(job) in path.read_text(encoding="utf-8")]
    return max(begun, key=lambda path: path.stat().st_mtime).parent if begun else None
