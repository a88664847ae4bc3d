"""Runs the program in separate processes and reads what they write."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from PIL import Image

import synthetic
import tfevents

ROOT = Path(__file__).parent.parent
RUN = """
--dataset folder --network resnet10-w16 --resize 8 --size 8 --scale 0.3 1 --low-dim 16 --colorjitter 0.4 0.4 0.4 0.1
--batch-size 8 --workers-num 2 --max-round 2 --max-epoch 4 --ANs-select-rate 0.5 --base-lr 0.01 --seed 3 --brief
--momentum 0.9 --weight-decay 5e-4
--ckpt-every 5 --ckpt-interval 0"""
TIMES = {"images_per_s", "train_s", "evaluate_s"}
LIMIT = 600
"""Seconds after which a hanging process is killed. Nothing else here depends on the speed of the machine."""
STARTED = "STARTED_BY_TEST"
"""Environment variable of all processes of a run: what ``start`` starts, and what that starts."""
_started: list[tuple[subprocess.Popen[str], str, threading.Timer]] = []


def start(
    *words: str,
    limit: Callable[[], None] | None = None,
    program: tuple[str, ...] = ("main.py",),
    cwd: Path = ROOT,
) -> subprocess.Popen[str]:
    """Starts the program in its own process group, as a shell does.

    Processes that are left when the test ends are killed (``conftest.py``).

    Args:
        words: the command line.
        limit: called in the new process before the program, to set limits of the operating system.
        program: what Python runs.
        cwd: the folder it runs in.
    """
    process = subprocess.Popen(
        [sys.executable, *program, *words],
        cwd=cwd,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore:This DataLoader will create",
            STARTED: (run := uuid.uuid4().hex),
        },
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=limit,
    )
    watchdog = threading.Timer(LIMIT, kill_run, [run])
    watchdog.daemon = True
    watchdog.start()
    _started.append((process, run, watchdog))
    return process


def kill_group(process: subprocess.Popen[str]) -> None:
    """Kills a process and its children, as far as they are in its group."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def kill_run(run: str) -> None:
    """Kills all processes of a run. Those that ``torchrun`` starts have other groups, and survive if it is killed."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # it has ended, or belongs to another user
            if process.environ().get(STARTED) == run:
                process.kill()


def end_started() -> None:
    """Kills all running processes of ``start`` and closes their pipes."""
    while _started:
        process, run, watchdog = _started.pop()
        watchdog.cancel()
        process.kill()
        kill_run(run)
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe:
                with suppress(BrokenPipeError):  # what was written to it is lost
                    pipe.close()


def output_of(process: subprocess.Popen[str]) -> str:
    """Everything that a process writes to standard output and standard error until it ends."""
    return process.communicate()[0]


def read_until(process: subprocess.Popen[str], text: str) -> None:
    """Reads the output of a process up to the line that holds ``text``."""
    assert process.stdout
    read = []
    for line in process.stdout:
        read.append(line)
        if text in line:
            return
    raise AssertionError(f"the process ended without {text!r}: {''.join(read)}")


ALTERED = """
import importlib, os, signal, sys

owner, calls = importlib.import_module(sys.argv[1]), iter(range(1, int(sys.argv[3])))
*classes, name = sys.argv[2].split(".")
for part in classes:
    owner = getattr(owner, part)
real = getattr(owner, name)


def altered(*arguments, **named):
    if next(calls, None) is None:
        ACTION
    return real(*arguments, **named)


def kill_itself():
    os.kill(os.getpid(), signal.SIGKILL)


def signal_itself(name):
    signal.raise_signal(getattr(signal, name))


def await_signals(number):
    # prints a line for each signal it waits for; a signal that comes before the read is not missed
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    while number:
        print("waiting for a signal", flush=True)
        os.read(reader, 1)
        number -= 1
    signal.set_wakeup_fd(-1)


def await_line():
    # or for the end of standard input
    sys.stdin.readline()


import main

setattr(owner, name, altered)
sys.exit(main.main(sys.argv[4:]))
"""
"""main.py, where from the n-th call of a function on each call does something first. Its words are the module, the
function (or Class.method) and n, and then those of main.py.
"""


def altered(action: str) -> tuple[str, str]:
    """A program for ``start``: ``ALTERED`` with a call such as ``kill_itself()``."""
    return "-c", ALTERED.replace("ACTION", action)


def nothing_is_saved() -> None:
    """A limit on the size of files acts like a quota: metrics fit, checkpoints do not."""
    import resource  # Windows has none

    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20,) * 2)


def finished(*words: str) -> str:
    process = start(*words)
    shown = output_of(process)
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
    """Bit-for-bit equality, with NaN equal to NaN."""
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
    """Modification time of the latest checkpoint; 0 without one."""
    latest = session / "checkpoint" / "latest.ckpt"
    return latest.stat().st_mtime_ns if latest.exists() else 0


def until(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    """Waits until a condition holds, and fails if the process ends first."""
    while not condition():
        if process.poll() is not None:
            assert condition(), output_of(process)
        time.sleep(0.01)


def save_photos(folder: Path) -> None:
    """Saves images of many sizes, so that worker processes crop them."""
    for split, count in (("train", 100), ("test", 20)):
        for number in range(count):
            path = folder / split / str(number % 3) / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(synthetic.picture(number % 64)).save(path)
