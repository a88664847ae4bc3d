"""A session: the folder of one run and everything written into it but the checkpoints' content.

sessions/NAME/
    config.yaml          the options; pass it to --cfgs to repeat the run
    log.txt              what the screen showed, with times
    metrics.jsonl        a JSON line for each epoch
    starts.jsonl         a JSON line for each start: versions, commit, hardware, seed, data, network
    checkpoint/          {round:04d}-{anchors:05d}.ckpt, the best of each round; latest.ckpt, every epoch, and
                         previous.ckpt, the one before it
    neighbours/          {round:04d}-{anchors:05d}.png, anchors beside their neighbours; .ckpt, what the discovery
                         found, unless the best checkpoints of all rounds are kept
    tfboard/             TensorBoard events: global/, and a folder for each round
"""

from __future__ import annotations

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
from lib.session.atomic_files import atomic_write, reason
from lib.session.console import LOGGER, LogFile, log_to_file, logger
from lib.session.locate import LATEST
from lib.session.metrics import METRICS, STARTS
from lib.session.tensorboard import EventFile

LOCK = ".lock"
PROJECTOR = "projector_config.pbtxt"
TENSORBOARD = "what TensorBoard shows"


class Session:
    """Where a run writes. With ``folder`` None (``--debug``) every call does nothing.

    What cannot be written is warned of and left out: a full disk is no reason to lose a run, and the checkpoints, which
    others write, tell how it ended.

    Args:
        folder: an existing folder, or None.
        start: (round, epoch) that the run starts at; metrics and events from there on are dropped, so that
            a run continued from an earlier checkpoint has no epoch twice.
        log_file: write log.txt.
        log_tfb: write TensorBoard events.
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
        self._lock = filelock.FileLock(folder / LOCK, timeout=0)  # goes with the process, however it ends
        try:
            self._lock.acquire()
        except filelock.Timeout:
            raise UsageError(
                f"{folder}: another process trains in this session; wait for it, stop it, or add --restart to go on "
                "in a new one"
            ) from None
        for name in ("checkpoint", "neighbours", *(["tfboard"] if self._tensorboard else [])):
            (folder / name).mkdir(exist_ok=True)
        for part in (*folder.glob("*.part"), *folder.glob("checkpoint/*.part"), *folder.glob("neighbours/*.part")):
            part.unlink()  # what a killed run had half written
        self._keep_metrics_before(start)
        if log_file:
            self._log = log_to_file(folder / "log.txt")

    @classmethod
    def open(cls, folder: Path, options: str, **arguments: Any) -> Session:
        """A session in ``folder`` with ``options`` as its config.yaml; UsageError where it cannot be written."""
        try:
            opened = cls(folder, **arguments)
            try:
                opened._write_config(options)
            except OSError:
                opened.close()
                raise
        except OSError as error:
            raise UsageError(
                f"{folder}: cannot be written: {error.strerror}; choose another --sess-dir (to go on there: --restart)"
            ) from None
        return opened

    @property
    def name(self) -> str:
        """The folder's name, '' where nothing is stored."""
        return self.folder.name if self.folder else ""

    def latest(self) -> Path | None:
        """Where the checkpoint of every epoch goes."""
        return self.folder / "checkpoint" / LATEST if self.folder else None

    def of_round(self, kind: str, round: int, anchors: int, ending: str) -> Path | None:
        """Where a round's file of a kind ('checkpoint', 'neighbours') goes."""
        return self.folder / kind / f"{_round_name(round, anchors)}.{ending}" if self.folder else None

    def _write_config(self, text: str) -> None:
        """Writes config.yaml; one that a continued run changes is kept under another name."""
        assert self.folder is not None
        path = self.folder / "config.yaml"
        if path.exists():
            if path.read_bytes() == text.encode("utf-8"):
                return
            before = next(p for i in range(1, 10**6) if not (p := self.folder / f"config.{i}.yaml").exists())
            path.rename(before)
            logger().info("the options differ from the session's: the former config.yaml is now %s", before.name)
        with atomic_write(path) as file:
            file.write(text.encode("utf-8"))

    @contextmanager
    def spare(self, what: str) -> Iterator[None]:
        """Around the writing of what a run can do without, in words; where that fails the log says so."""
        try:
            yield
        except OSError as error:
            logger().warning("%s: %s could not be written: %s", self.folder, what, reason(error))

    def write_traceback(self, error: BaseException) -> bool:
        """Writes where an error came from to log.txt, and not to the screen; whether it is there."""
        if self._log is None:
            return False
        where = type(error), error, error.__traceback__
        self._log.handle(logging.LogRecord(LOGGER, logging.ERROR, "", 0, "an error ended the run", None, where))
        return not self._log.has_failed

    def write_start(self, facts: dict[str, Any]) -> None:
        """Adds a line to starts.jsonl: with what a run, or one that went on, started."""
        self._add_line(STARTS, {name: str(value) for name, value in facts.items()})

    def write_metrics(self, record: dict[str, Any]) -> None:
        """Adds a line to metrics.jsonl; numbers that are not finite become null."""
        self._add_line(METRICS, {name: _finite(value) for name, value in record.items()})

    def _add_line(self, name: str, record: dict[str, Any]) -> None:
        if self.folder:
            with self.spare(f"a line of {name}"), (self.folder / name).open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")

    def write_scalars(
        self, values: dict[str, float | None], step: int, round_folder: tuple[int, int] | None = None
    ) -> None:
        """TensorBoard scalars by tag; None is left out.

        Args:
            values: tag -> value.
            step: round for the global tags, epoch within the round otherwise.
            round_folder: (round, anchors), or None for the folder ``global``.
        """
        if not self._tensorboard:
            return
        with self.spare(TENSORBOARD):
            known = {tag: value for tag, value in values.items() if value is not None}
            self._event_file(round_folder).write_scalars(known, step)

    def write_picture(self, tag: str, picture: np.ndarray, step: int) -> None:
        """A TensorBoard image (H, W, 3) of uint8, of a round (``step``)."""
        if self._tensorboard:
            with self.spare(TENSORBOARD):
                self._event_file(None).write_picture(tag, picture, step)

    def write_projector(self, rows: np.ndarray, labels: Sequence[str] | None, thumbnails: np.ndarray) -> None:
        """Rows for TensorBoard's embedding projector; once a session.

        Args:
            rows: (n, D).
            labels: n, or None where nobody said.
            thumbnails: (n, 3, S, S) in [0, 1].
        """
        if not self._tensorboard or self.folder is None:
            return
        folder = self.folder / "tfboard" / "global"
        if (folder / PROJECTOR).exists():
            return
        words = None if labels is None else [" ".join(label.split()) for label in labels]  # a line each
        # tensorboardX computes with what it leaves unset beyond the last thumbnail
        with self.spare(TENSORBOARD), np.errstate(all="ignore"):
            folder.mkdir(exist_ok=True)  # tensorboardX would make those above, too
            writer = SummaryWriter(str(folder), write_to_disk=False)  # no events: an embedding has files of its own
            writer.add_embedding(rows, metadata=words, label_img=thumbnails, tag="memory bank")

    def _event_file(self, round_folder: tuple[int, int] | None) -> EventFile:
        """Of the folder ``global``, or of a (round, anchors)."""
        assert self.folder is not None
        name = "global" if round_folder is None else _round_name(*round_folder)
        if name not in self._events:
            round, epoch = self._start
            here = round if round_folder is None else epoch if round_folder[0] == round else 0
            folder = self.folder / "tfboard" / name
            self._events[name] = EventFile(folder, here if folder.exists() else None)
        return self._events[name]

    def close(self) -> None:
        """Closes what is open; the files stay."""
        for file in self._events.values():
            with self.spare(TENSORBOARD):
                file.close()
        if self._log:
            logger().removeHandler(self._log)
            with self.spare("the end of log.txt"):
                self._log.close()
        if self.folder:
            self._lock.release()

    def _keep_metrics_before(self, start: tuple[int, int]) -> None:
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
    try:
        record = json.loads(line.decode("utf-8"))
        return (record["round"], record["epoch"]) < start
    except (ValueError, KeyError, TypeError, RecursionError):  # damaged, or the half line of a killed run
        return False


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def create_folder(sess_dir: Path, name: str | None) -> Path:
    """A new folder for a session; one that exists is never used again.

    Args:
        sess_dir: folder of all sessions.
        name: the session's; None: the UTC time, with a number behind it where two start in one second.

    Raises:
        UsageError: the name exists or is not a plain name, or nothing can be written there.
    """
    if name is not None and (name in ("", ".", "..") or Path(name).name != name or "\0" in name):
        raise UsageError(f"--session {name!r}: should be the name of a folder inside {sess_dir}, without a path")
    stem = name or datetime.now(timezone.utc).strftime("%Y-%m-%d-%H-%M-%S")
    try:
        sess_dir.mkdir(parents=True, exist_ok=True)
        for number in range(1, 10**6):
            folder = sess_dir / (stem if number == 1 else f"{stem}-{number}")
            try:
                folder.mkdir()
                return folder
            except FileExistsError:
                if name is not None:
                    resume = f"--resume {shlex.quote(str(folder))}"
                    raise UsageError(f"{folder}: exists; choose another --session, or resume it by {resume}") from None
    except (OSError, ValueError) as error:  # ValueError: a name that no folder can have
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"{sess_dir}: no session can be made there: {reason}; choose another --sess-dir") from None
    raise UsageError(f"{sess_dir}: holds a million sessions of {stem}")


def of_job(sess_dir: Path, job: str) -> Path | None:
    """The latest session that a job (see ``lib.distributed.launch``) has started, or None."""
    if not sess_dir.is_dir():
        return None
    begun = [path for path in sess_dir.glob(f"*/{STARTS}") if json.dumps(job) in path.read_text(encoding="utf-8")]
    return max(begun, key=lambda path: path.stat().st_mtime).parent if begun else None
