"""Finds checkpoints in a session folder, whose layout is in ``lib/session/run_folder.py``.

Nothing here imports PyTorch, so that the options of a session can be read without that delay.
"""

from __future__ import annotations

from pathlib import Path

from lib.errors import UsageError

LATEST, PREVIOUS = "latest.ckpt", "previous.ckpt"


def latest(session: Path) -> Path:
    """Path of a session's latest checkpoint. The file may not exist."""
    folder = session / "checkpoint"
    return next((folder / name for name in (LATEST, PREVIOUS) if (folder / name).is_file()), folder / LATEST)


def locate(resume: Path) -> Path:
    """The checkpoint file that ``--resume`` names: a file, or the latest checkpoint of a session folder.

    Raises:
        UsageError: there is no checkpoint.
    """
    path = latest(resume) if resume.is_dir() else resume
    if not path.is_file():
        raise UsageError(f"{path}: no such checkpoint; give --resume a .ckpt file or a session folder")
    return path


def folder_of(checkpoint: Path) -> Path | None:
    """The session folder that contains a checkpoint (in ``checkpoint/``), or None."""
    inside = checkpoint.resolve().parent
    return inside.parent if inside.name == "checkpoint" and (inside.parent / "config.yaml").is_file() else None
