"""Where things are in a session's folder; ``lib/session/run_folder.py`` lists them.

Nothing here imports PyTorch, so that the options of a session can be read at once.
"""

from __future__ import annotations

from pathlib import Path

from lib.errors import UsageError

LATEST, PREVIOUS = "latest.ckpt", "previous.ckpt"


def latest(session: Path) -> Path:
    """The latest checkpoint of a session's folder; where there is none, its name."""
    folder = session / "checkpoint"
    return next((folder / name for name in (LATEST, PREVIOUS) if (folder / name).is_file()), folder / LATEST)


def locate(resume: Path) -> Path:
    """The checkpoint file that ``--resume`` means: itself, or the latest of a session's folder.

    Raises:
        UsageError: there is none.
    """
    path = latest(resume) if resume.is_dir() else resume
    if not path.is_file():
        raise UsageError(f"{path}: no such checkpoint; pass --resume a .ckpt file or a session's folder")
    return path


def folder_of(checkpoint: Path) -> Path | None:
    """The session a checkpoint lies in (the folder above ``checkpoint/``), or None where it lies elsewhere."""
    inside = checkpoint.resolve().parent
    return inside.parent if inside.name == "checkpoint" and (inside.parent / "config.yaml").is_file() else None
