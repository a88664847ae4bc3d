"""What a session recorded: a JSON line for each epoch and for each start."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from lib.errors import UsageError

METRICS = "metrics.jsonl"
STARTS = "starts.jsonl"


def read(session: Path) -> list[dict[str, Any]]:
    """A session's records, in order of rounds and epochs.

    Every record has whole numbers ``round`` and ``epoch``; its other values are finite numbers, lists of such, or
    None. Of two records of one epoch the later counts. What a run that still goes, or was killed, has half written
    behind the last line break is left out.

    Raises:
        UsageError: there is no such session, it has no whole record, or a line is damaged.
    """
    records: dict[tuple[int, int], dict[str, Any]] = {}
    *lines, rest = _content(session).split(b"\n")
    for number, line in enumerate(lines, start=1):
        record = _record(line)
        if record is None:
            raise UsageError(
                f"{session / METRICS}, line {number}: damaged: should be a JSON object with round, epoch and numbers; "
                "mend the line or take it out"
            )
        records[record["round"], record["epoch"]] = record
    if last := _record(rest):
        records[last["round"], last["epoch"]] = last
    if not records:
        raise UsageError(f"{session / METRICS}: holds no whole epoch yet; name a session that has trained for one")
    return [records[key] for key in sorted(records)]


def starts(session: Path) -> list[dict[str, Any]]:
    """With what the session's run started, and each time it was resumed; lines that are damaged are left out."""
    try:
        lines = (session / STARTS).read_bytes().split(b"\n")
    except OSError:
        return []
    return [record for record in map(_object, lines) if record is not None]


def _content(session: Path) -> bytes:
    try:
        if not session.is_dir():
            raise UsageError(f"{session}: no such folder; name a session's, such as sessions/NAME")
        if not (session / "config.yaml").is_file():
            raise UsageError(f"{session}: no session: it has no config.yaml; name a folder such as sessions/NAME")
        return (session / METRICS).read_bytes()
    except FileNotFoundError:
        raise UsageError(f"{session}: has no {METRICS}; name a session that has trained for an epoch") from None
    except OSError as error:
        raise UsageError(f"{session}: its {METRICS} cannot be read: {error.strerror}") from None


def _record(line: bytes) -> dict[str, Any] | None:
    """The record of an epoch on a line, or None where it is none."""
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
    """Whether it is a number that arithmetic can go on with, or a list of such; JSON also spells larger ones, and
    true is none."""
    if type(value) is list:
        return all(map(_is_finite, value))
    return type(value) in (int, float) and abs(value) <= sys.float_info.max  # type: ignore[arg-type]
