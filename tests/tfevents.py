"""Reads event files as TensorBoard shows them."""

from __future__ import annotations

import struct
from pathlib import Path

from tensorboardX.proto import event_pb2


def events(folder: Path) -> list[event_pb2.Event]:
    """All events of a folder, read as TFRecord files: length, its checksum, data, its checksum."""
    found = []
    for path in sorted(folder.glob("*tfevents*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            if at + 16 + length > len(data):  # incomplete event of a killed run
                break
            found.append(event_pb2.Event.FromString(data[at + 12 : at + 12 + length]))
            at += 16 + length
    return found


def shown(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Tag -> points as TensorBoard shows them: a start at step s hides earlier points of steps s and later."""
    points: dict[str, list[tuple[int, float]]] = {}
    for event in events(folder):
        if event.session_log.status == 1:  # START
            points = {tag: [p for p in kept if p[0] < event.step] for tag, kept in points.items()}
        for value in event.summary.value:
            points.setdefault(value.tag, []).append((event.step, value.simple_value))
    return points
