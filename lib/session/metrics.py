"""Reads a session's records: one JSON line for each epoch and for each start."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from lib.errors import UsageError

METRICS = "metrics.jsonl"
STARTS = "starts.jsonl"


def read(session: Path) -> list[dict[str, Any]]:
    """The epoch records of a session, sorted by round and epoch.

    Every record has integers ``round`` and ``epoch``; other values are finite numbers, lists of them, or None. If an
    epoch has two records, the later one is used. An incomplete last line, of a run that is active or was killed, is
    ignored.

    Raises:
        UsageError: the folder is not a session, it has no complete record, or a line is damaged.
    """
    records: dict[tuple[int, int], dict[str, Any]] = {}
    lines = _content(session).split(b"\n")
    for number, line in enumerate(lines, start=1):
        if record := parse_record(line):
            records[record["round"], record["epoch"]] = record
        elif number < len(lines):
            raise UsageError(
                f"{session / METRICS}, line {number}: damaged: must be a JSON object with round, epoch and numbers; "
                "correct or delete the line"
            )
    if not records:
        raise UsageError(f"{session / METRICS}: contains no complete epoch; choose a session with at least one")
    return [records[key] for key in sorted(records)]


def starts(session: Path) -> list[dict[str, Any]]:
    """The start records of a session: one for its first start and one for each resume. Damaged lines are skipped."""
    try:
        lines = (session / STARTS).read_bytes().split(b"\n")
    except OSError:
        return []
    return [record for record in map(_object, lines) if record is not None]


def _content(session: Path) -> bytes:
    try:
        if not session.is_dir():
            raise UsageError(f"{session}: no such folder; name a session folder, such as sessions/NAME")
        if not (session / "config.yaml").is_file():
            raise UsageError(
                f"{session}: not a session folder: it has no config.yaml; name a folder such as sessions/NAME"
            )
        return (session / METRICS).read_bytes()
    except FileNotFoundError:
        raise UsageError(f"{session}: has no {METRICS}; choose a session with at least one complete epoch") from None
    except OSError as error:
        raise UsageError(f"{session / METRICS}: cannot be read: {error.strerror}; check its permissions") from None


def parse_record(line: bytes) -> dict[str, Any] | None:
    """The epoch record of a line, or None if the line is not one."""
    record = _object(line)
    if record is None or not all(v is None or _is_finite(v) for v in record.values()):
        return None
    whole = all(type(record.get(name)) is int and record[name] >= 0 for name in ("round", "epoch"))
    return record if whole else None


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _is_finite(value: object) -> bool:
    """Whether a value is a finite number, or a list of them. Booleans and integers beyond float's range are not."""
    if type(value) is list:
        return all(map(_is_finite, value))
    return type(value) in (int, float) and abs(value) <= sys.float_info.max  # type: ignore[arg-type]
