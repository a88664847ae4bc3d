"""Runs of the program in processes of their own, and what they leave."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import made
import tfevents

ROOT = Path(__file__).parent.parent
RUN = """
--dataset folder --network resnet10 --resize 8 --size 8 --scale 0.3 1 --low-dim 16 --colorjitter 0.4 0.4 0.4 0.1
--batch-size 8 --workers-num 2 --max-round 2 --max-epoch 4 --ANs-select-rate 0.5 --base-lr 0.01 --seed 3 --brief
--ckpt-every 5"""
TIMES = {"images_per_s", "train_s", "evaluate_s"}


def start(
    *words: str, limit: Callable[[], None] | None = None, program: tuple[str, ...] = ("main.py",)
) -> subprocess.Popen[str]:
    """The program in a group of its own, as a shell starts it, under a limit of the system's."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *program, *words],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=limit,
    )


PROGRAM = """
import importlib, os, signal, sys

owner, name, calls = importlib.import_module(sys.argv[1]), sys.argv[2], iter(range(1, int(sys.argv[3])))
real = getattr(owner, name)


def altered(*arguments, **named):
    if next(calls, None) is None:
        DEED
    return real(*arguments, **named)


import main

setattr(owner, name, altered)
sys.exit(main.main(sys.argv[4:]))
"""
"""The program, which does a deed when a function is called for the n-th time."""


def that_does(deed: str) -> tuple[str, str]:
    return "-c", PROGRAM.replace("DEED", deed)


def nothing_is_saved() -> None:
    """A limit on the size of files stands for a quota: metrics fit, checkpoints do not."""
    import resource  # Windows has none

    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20,) * 2)


def finished(*words: str) -> str:
    process = start(*words)
    shown, _ = process.communicate(timeout=300)
    assert process.returncode == 0, shown
    return shown


def words_of(photos: Path, folder: Path, name: str) -> list[str]:
    return [*RUN.split(), "--data-root", str(photos), "--sess-dir", str(folder), "--session", name]


def content(session: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(session / "checkpoint" / "latest.ckpt", weights_only=True)
    return loaded


def metrics(session: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (session / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def equal(one: Any, other: Any) -> bool:
    """To the last bit; NaN equals NaN, and nothing else."""
    if isinstance(one, torch.Tensor):
        if not isinstance(other, torch.Tensor) or one.shape != other.shape or one.dtype != other.dtype:
            return False
        return bool(((one == other) | ((one != one) & (other != other))).all())
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[k], other[k]) for k in one if k not in {*TIMES, "session"})
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other or (one != one and other != other))


def assert_alike(session: Path, whole: Path) -> None:
    ours, theirs = content(session), content(whole)
    for name in theirs.keys() - {"session"}:
        assert equal(ours[name], theirs[name]), name
    assert metrics(session) == metrics(whole)
    points = {path.name: tfevents.shown(path) for path in (whole / "tfboard").iterdir()}
    assert {path.name: tfevents.shown(path) for path in (session / "tfboard").iterdir()} == points
    assert not list(session.rglob("*.part"))


def written(session: Path) -> int:
    """When the latest checkpoint was, 0 without one."""
    latest = session / "checkpoint" / "latest.ckpt"
    return latest.stat().st_mtime_ns if latest.exists() else 0


def until(condition: Any, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.01)


def save_photos(folder: Path) -> None:
    """Of many sizes, so that worker processes crop them."""
    for split, count in (("train", 100), ("test", 20)):
        for number in range(count):
            path = folder / split / str(number % 3) / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(made.picture(number % 64)).save(path)
