"""Runs that are killed or stopped at any point and resumed end with the bits of an uninterrupted run."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

import runs
from lib.distributed import signals
from lib.distributed.signals import Stopped, StopSignals
from lib.training import checkpoint
from runs import (
    LIMIT,
    altered,
    assert_alike,
    content,
    equal,
    finished,
    metrics,
    nothing_is_saved,
    output_of,
    read_until,
    start,
    until,
    words_of,
    written,
)

New = Callable[[str], list[str]]
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals are another thing there")


@pytest.fixture
def new(photos: Path, tmp_path: Path) -> Callable[[str], list[str]]:
    """Returns a function that gives the command line of a new run."""
    return lambda name: words_of(photos, tmp_path, name)


@pytest.fixture(scope="module")
def whole(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    finished(*words_of(photos, folder, "whole"))
    return folder / "whole"


@pytest.mark.slow
def test_repeatedly_killed_run_ends_with_the_same_bits(whole: Path, tmp_path: Path, new: New) -> None:
    """SIGKILL from outside after the first checkpoint, then in two random steps."""
    session, draw = tmp_path / "killed", np.random.default_rng(0)
    process = start(*new("killed"))
    until(lambda: written(session) > 0, process)
    runs.kill_group(process)
    output_of(process)
    words = ["--resume", str(session), "--brief"]
    for calls in draw.integers(1, 40, 2):
        process = start(*STEP, str(calls), *words, program=altered("kill_itself()"))
        shown = output_of(process)
        assert process.returncode == -signal.SIGKILL, shown
    finished(*words)
    assert_alike(session, whole)


@pytest.mark.slow
@pytest.mark.parametrize("epochs", [3, 7])
def test_resume_after_kill_repeats_epochs_since_the_last_save(
    epochs: int, whole: Path, tmp_path: Path, new: New
) -> None:
    """Only the first epoch and the end of each round (four epochs) are saved: no interval passes."""
    session, steps = tmp_path / "killed", 13
    words = [*new("killed"), "--ckpt-every", "0", "--ckpt-interval", "1e6"]
    process = start(*STEP, str(epochs * steps + 6), *words, program=altered("kill_itself()"))
    shown = output_of(process)
    assert process.returncode == -signal.SIGKILL, shown
    before = content(session)
    assert (before["round"], before["epoch"]) == ((0, 1) if epochs == 3 else (0, 4))
    assert len(metrics(session)) == epochs  # including epochs after the last checkpoint
    finished("--resume", str(session), "--brief")
    assert_alike(session, whole)
    best = {path.name for path in (whole / "checkpoint").glob("0*.ckpt")}
    assert best == {path.name for path in (session / "checkpoint").glob("0*.ckpt")} == {BEST_0, BEST_1}
    for name in best:
        ours, theirs = (torch.load(folder / "checkpoint" / name, weights_only=True) for folder in (session, whole))
        assert equal({**ours, "session": ""}, {**theirs, "session": ""}), name
    starts = (session / "starts.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(starts) == 2


@pytest.mark.slow
@pytest.mark.parametrize("keep", ["best", "last"])
@pytest.mark.parametrize(
    ("place", "calls"), [("save_discovery", 1), ("remove_best_checkpoints", 8), ("remove_best_checkpoints", 9)]
)
def test_killed_run_with_few_checkpoints_resumes(
    place: str, calls: int, keep: str, whole: Path, tmp_path: Path, new: New
) -> None:
    session = tmp_path / "killed"
    process = start(
        "lib.training.checkpoint", place, str(calls), *new("killed"), "--keep", keep, program=altered("kill_itself()")
    )
    shown = output_of(process)
    assert process.returncode == -signal.SIGKILL, shown
    finished("--resume", str(session), "--brief")
    assert_alike(session, whole)
    kept = {path.name for path in (session / "checkpoint").iterdir()}
    assert kept == {"latest.ckpt", "previous.ckpt", *(["0001-00050.ckpt"] if keep == "best" else [])}
    assert [round for round, _ in checkpoint.discoveries(session, content(session), 100)] == [1]


STEP = "lib.training.trainer", "Trainer.backward"
BEST_0, BEST_1 = "0000-00000.ckpt", "0001-00050.ckpt"
PLACES = {
    "in training": (*STEP, 8),
    "with a checkpoint half written": ("lib.training.pretrained", "append_checksum", 1),
    "with a checkpoint written and not renamed": ("os", "replace", 1),
    "between the names of the last checkpoint": ("os", "link", 1),
    "in the evaluation": ("lib.evaluation.nearest_neighbours", "similarities", 1),
    "in the health figures": ("lib.method.diagnostics", "_hubs", 1),
    "with the metrics written and no checkpoint": ("lib.training.recorder", "Recorder.save", 1),
    "with the best checkpoint written and not the latest": ("lib.training.pretrained", "append_checksum", 4),
    "at the end of a round": ("lib.training.recorder", "Recorder.round_finished", 1),
    "in the discovery": ("lib.method.neighbourhoods", "_positions", 1),
    "with the anchors found and not drawn": ("lib.session.image_grid", "draw", 1),
    "with the run done": ("lib.reporting.outputs", "show_embeddings", 1),
}
"""Where the run is killed, in the order of a run: module, function, and number of the call."""
UNFINISHED = [place for place in PLACES if place.startswith("with a checkpoint") or place.endswith("not the latest")]
"""Those that leave a partial file."""


@pytest.mark.slow
def test_run_killed_in_every_phase_ends_with_the_same_bits(whole: Path, tmp_path: Path, new: New) -> None:
    session = tmp_path / "dying"
    words = new("dying")
    for place, (module, name, calls) in PLACES.items():
        process = start(module, name, str(calls), *words, program=altered("kill_itself()"))
        shown = output_of(process)
        assert process.returncode == -signal.SIGKILL, (place, shown)
        assert bool(list(session.glob("checkpoint/*.part"))) == (place in UNFINISHED), place
        words = ["--resume", str(session), "--brief"]
    finished(*words)
    assert_alike(session, whole)


@pytest.mark.slow
@pytest.mark.parametrize(("which", "status"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGUSR1", 0)])
def test_signal_saves_a_checkpoint_and_shows_how_to_resume(
    which: str, status: int, whole: Path, tmp_path: Path, new: New
) -> None:
    session = tmp_path / "stopped"
    program = altered("await_signals(1)")
    process = start(*STEP, "8", *new("stopped"), program=program)
    read_until(process, "waiting for a signal")
    workers = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, getattr(signal, which))  # workers receive it, too, as from a terminal
    shown = output_of(process)
    assert process.returncode == status, shown
    assert f"stopped by {which} after round 0, epoch 1, step 8;" in shown
    assert f"--resume {session}" in shown and "Traceback" not in shown
    assert workers and not psutil.wait_procs(workers, timeout=LIMIT)[1]
    finished("--resume", str(session), "--brief")
    assert_alike(session, whole)


EXPORTS = {"f.npz": "--export-features", "m.safetensors": "--export-model", "t.csv": "--export-table"}
AFTER_TRAINING = {
    "before all": ("SIGINT", 130, "lib.reporting.outputs", "show_embeddings", [*EXPORTS]),
    "with a file half written": ("SIGTERM", 143, "numpy", "savez", [*EXPORTS]),
    "while the model is written": ("SIGINT", 130, "lib.reporting.export", "_header", ["m.safetensors", "t.csv"]),
    "while the table is made": ("SIGTERM", 143, "lib.reporting.table", "columns", ["t.csv"]),
    "in the report": ("SIGTERM", 143, "lib.reporting.page", "write", []),
}
"""Which signal comes after the last epoch, the exit status, module and function that it comes in, and the exports that
are not written then."""


@pytest.mark.slow
@pytest.mark.parametrize("place", AFTER_TRAINING)
def test_stop_after_training_says_how_to_write_the_rest(place: str, whole: Path, tmp_path: Path) -> None:
    which, status, module, name, left = AFTER_TRAINING[place]
    session = tmp_path / "whole"
    shutil.copytree(whole, session)
    words = [word for file, flag in EXPORTS.items() for word in (flag, str(tmp_path / file))]
    resume = ["--resume", str(session), "--brief", "--report"]
    process = start(module, name, "1", *resume, *words, program=altered(f"signal_itself({which!r})"))
    shown = output_of(process)
    assert process.returncode == status, shown
    assert "Traceback" not in shown
    (line,) = [line for line in shown.splitlines() if line.startswith(f"stopped by {which} after the last epoch; ")]
    command = line.rpartition("write the rest with: python ")[2]
    rest = [f"{EXPORTS[file]} {tmp_path / file}" for file in left] + ["--report"]
    assert command == " ".join(["main.py --resume", str(session), *rest])
    assert f"not written: {', '.join(rest)};" in line
    assert all((tmp_path / file).exists() == (file not in left) for file in EXPORTS)
    assert (tmp_path / "m.yaml").exists() == (tmp_path / "m.safetensors").exists()
    assert not list(tmp_path.rglob("*.part")) and not (session / "report.html").exists()
    finished(*command.split()[1:], "--brief")
    assert all((tmp_path / file).exists() for file in (*EXPORTS, "m.yaml", "whole/report.html"))
    assert_alike(session, whole)


@pytest.mark.slow
def test_killed_run_leaves_no_worker_processes(new: New, tmp_path: Path) -> None:
    process = start(*STEP, "8", *new("orphans"), program=altered("await_signals(1)"))
    read_until(process, "waiting for a signal")
    workers = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    output_of(process)
    assert (
        workers and not psutil.wait_procs(workers, timeout=LIMIT)[1]
    )  # PyTorch's workers check for their parent from time to time


@pytest.mark.slow
def test_second_ctrl_c_stops_the_program_at_once(new: New, tmp_path: Path) -> None:
    """The first Ctrl-C waits for a step that never ends."""
    process = start(*STEP, "8", *new("twice"), program=altered("await_signals(-1)"))
    read_until(process, "waiting for a signal")
    os.killpg(process.pid, signal.SIGINT)
    read_until(process, "waiting for a signal")
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=1.5 * signals.BOUNCE)  # the step has not ended
    os.killpg(process.pid, signal.SIGINT)
    shown = output_of(process)
    assert process.returncode == 130 and "Traceback" not in shown and "interrupted" in shown


@pytest.mark.slow
def test_repeated_sigterm_does_not_kill_a_run_that_is_stopping(new: New, tmp_path: Path) -> None:
    process = start(*new("stopped"))
    until(lambda: written(tmp_path / "stopped") > 0, process)
    while process.poll() is None:
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.005)
    assert process.returncode == 143, output_of(process)


@pytest.mark.slow
def test_damaged_latest_checkpoint_is_replaced_by_the_previous(whole: Path, tmp_path: Path, new: New) -> None:
    session = tmp_path / "damaged"
    finished(*new("damaged"), "--max-round", "1")
    latest = session / "checkpoint" / "latest.ckpt"
    bytes_ = bytearray(latest.read_bytes())
    bytes_[len(bytes_) // 2] ^= 1
    latest.write_bytes(bytes_)
    words = ["--resume", str(session), "--max-round", "2", "--brief"]
    process = start(*words, limit=nothing_is_saved)  # failed saves must not damage the good checkpoint
    shown = output_of(process)
    assert process.returncode == 3 and "latest.ckpt: is damaged" in shown and "previous.ckpt" in shown
    finished(*words)
    assert_alike(session, whole)


@pytest.mark.slow
def test_run_that_cannot_save_ends_with_status_3(new: New, tmp_path: Path) -> None:
    process = start(*new("full"), "--max-round", "1", limit=nothing_is_saved)
    shown = output_of(process)
    assert process.returncode == 3, shown
    assert "latest.ckpt: could not be saved: " in shown and "File too large" in shown and "Traceback" not in shown
    assert len(metrics(tmp_path / "full")) == 4
    assert not list((tmp_path / "full" / "checkpoint").iterdir())


@pytest.mark.slow
def test_run_that_cannot_write_anything_continues_to_its_end(new: New, tmp_path: Path) -> None:
    """Log, metrics, events, images and report cannot be written, either."""
    import resource

    out = tmp_path / "features.npz"
    words = ["--max-epoch", "10", "--report", "--ckpt-every", "0", "--export-features", str(out)]
    process = start(*new("full"), *words, limit=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2500,) * 2))
    shown = output_of(process)
    assert process.returncode == 3, shown
    assert "Traceback" not in shown and "Logging error" not in shown
    for part in ("log.txt", "metrics.jsonl", "TensorBoard events", "the picture of anchors", "the report"):
        assert part in shown, part
    assert not out.exists()


@pytest.mark.slow
@pytest.mark.parametrize("back", [True, False])
def test_deleted_session_folder_is_reported(back: bool, whole: Path, new: New, tmp_path: Path) -> None:
    """If the folder returns, as on a network drive, the run saves again; if not, the exit status shows it."""
    session, away = tmp_path / "gone", tmp_path / "away"
    process = start(*STEP, "8", *new("gone"), program=altered("await_line()"))
    until(lambda: written(session) > 0, process)  # saved after five steps; the run waits in the eighth
    session.rename(away)
    assert process.stdin
    process.stdin.write(20 * "\n")  # steps, with a checkpoint after every fifth
    process.stdin.flush()
    read_until(process, "could not be saved")
    if back:
        away.rename(session)
    rest = output_of(process)  # closes its standard input, so that it stops waiting
    assert process.returncode == (0 if back else 3) and "Traceback" not in rest, rest
    assert session.exists() == back
    if not back:
        away.rename(session)  # it contains the last good checkpoint
        finished("--resume", str(session), "--brief")
    assert equal({**content(session), "session": ""}, {**content(whole), "session": ""})


def test_deferred_signal_stops_after_the_block() -> None:
    done: list[int] = []
    with pytest.raises(Stopped) as stopped, StopSignals() as signals:
        with signals.defer():
            with signals.defer():
                signal.raise_signal(signal.SIGTERM)
                done.append(1)
            assert signals.is_stop_requested()
            done.append(2)
        done.append(3)
    assert done == [1, 2] and stopped.value.signal == signal.SIGTERM


def test_signal_outside_defer_stops_at_once() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before
    with pytest.raises(Stopped), StopSignals():
        signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)  # a forwarded copy, while the program exits
    signal.signal(signal.SIGTERM, before)


def test_second_ctrl_c_interrupts_a_deferred_block(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(signals.time, "monotonic", lambda: now)
    with pytest.raises(KeyboardInterrupt), StopSignals() as stop, stop.defer():
        signal.raise_signal(signal.SIGINT)
        assert stop.is_stop_requested()
        now += signals.BOUNCE
        signal.raise_signal(signal.SIGINT)  # the same Ctrl-C, forwarded
        now += 0.1
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("delay", [0.1, 30.0])
def test_sigint_forwarded_by_a_launcher_is_ignored(delay: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's launcher sends each Ctrl-C again, with a delay on a busy machine."""
    now = 100.0
    monkeypatch.setattr(signals.time, "monotonic", lambda: now)
    monkeypatch.setattr(signals, "is_launched", lambda: True)
    copies = []
    with pytest.raises(KeyboardInterrupt), StopSignals() as stop, stop.defer():
        for ctrl_c in range(2):
            now = 200.0 * ctrl_c
            for _ in range(2):
                copies.append(ctrl_c)
                signal.raise_signal(signal.SIGINT)
                now += delay
    assert copies in ([0, 0, 1], [0, 0, 1, 1])
