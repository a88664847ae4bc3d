"""What the curriculum brings on 50,000 photographs: all runs of the study, those that matter most first.

    python -m benchmarks.study --data-root data/cifar10-images --sess-dir STUDY --jobs 2

Each run is a session in ``STUDY``, in a separate process with one thread. The study can be stopped at any time
(Ctrl-C, SIGTERM) and started again by the same command: finished runs are kept, and stopped runs are resumed. If all
processes are killed, each loses one epoch. Start it with ``nice -n 19`` to give other programs priority.

``STUDY/study.jsonl`` has a line for each start and end of a run, with the commit, the processor and the images/s.
``--list`` shows the progress of each run; ``benchmarks/study_results.py`` evaluates the finished runs. ``--seeds 0
--arms and`` trains only the paper's curriculum, in an evening.

Arms, each branched from the last checkpoint of its seed's round 0 (instance loss), optimiser and bank included:

    restarts        select rate 0: later rounds restart the learning rate, and nothing else changes
    and             the paper: select rate 0.25, one neighbour
    all-at-once     select rate 1: every sample is an anchor from round 1 on
    and-k5          the paper's curriculum with five neighbours
    right-pairs     the paper's curriculum, but anchors whose neighbour has another label stay instance samples
    one-round       instance loss only, in one round with as many epochs as the others have in total (new network)
    plus            configs/cifar10-cpu-plus.yaml with kNN of conv5, too: the paper's curriculum in five rounds, the
                    loss between two views, and a cosine schedule over all rounds (new network)
    plus-one-round  the same in one round, so that no neighbourhoods are discovered

An epoch with two views is two image passes. ``plus`` and ``plus-one-round`` have 60 of them, and the others 59.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import filelock

from lib.errors import UsageError
from lib.session import metrics, provenance
from lib.session.console import table
from lib.session.locate import latest

ROOT = Path(__file__).parent.parent
CFGS = ["configs/base.yaml", "configs/cifar10-cpu.yaml"]
SEEDS = (0, 1, 2)
FIRST_EPOCHS, EPOCHS, ROUNDS = 35, 6, 5
"""Epochs of round 0, epochs of each later round, and rounds, round 0 included."""
ARMS = {
    "restarts": ["--ANs-select-rate", "0"],
    "and": ["--ANs-select-rate", "0.25"],
    "all-at-once": ["--ANs-select-rate", "1"],
    "and-k5": ["--ANs-select-rate", "0.25", "--ANs-size", "5"],
    "right-pairs": ["--ANs-select-rate", "0.25"],
}


@dataclass(frozen=True)
class Arm:
    """One setting.

    Attributes:
        flags: its options.
        views: image passes of an epoch.
        rounds: rounds of an arm with a new network, among which its epochs are divided.
        branches: whether it continues round 0 with the curriculum.
        has_schedule: whether the flags set the learning rate schedule.
    """

    flags: tuple[str, ...] = ()
    views: int = 1
    rounds: int = 1
    branches: bool = False
    has_schedule: bool = False


VIEW_LOSS = ("--views", "2", "--view-loss", "1")
CONV5 = ("--embed", "conv5")
COSINE = ("--lr-policy", "cosine")
COSINE_OF_RUN = (*COSINE, "--lr-span", "run")
NEW_NETWORK = {
    "one-round": Arm(),
    "plus": Arm((*VIEW_LOSS, *CONV5, *COSINE_OF_RUN), views=2, rounds=ROUNDS, has_schedule=True),
    "plus-one-round": Arm((*VIEW_LOSS, *CONV5, *COSINE_OF_RUN), views=2, has_schedule=True),
}
"""Arms that start with a new network, with as many image passes as the others have in total."""
NAMES = (*ARMS, *NEW_NETWORK)
PROGRAMS = {"right-pairs": ("-m", "benchmarks.right_pairs")}
"""Arms that are not trained by ``main.py``."""


def total_epochs() -> int:
    """Epochs of an arm, its round 0 included: its image passes."""
    return FIRST_EPOCHS + (ROUNDS - 1) * EPOCHS


def views_of(arm: str) -> int:
    """Views of each image, which are image passes of an epoch."""
    return NEW_NETWORK[arm].views if arm in NEW_NETWORK else 1


@dataclass(frozen=True)
class Run:
    """One session of the study.

    Attributes:
        name: of the session.
        flags: its options in addition to the config.
        branches_from: name of the run from whose last checkpoint it starts; None: a new network.
        last: (round, epoch) of its last line in metrics.jsonl.
        program: what Python runs.
    """

    name: str
    flags: tuple[str, ...]
    branches_from: str | None
    last: tuple[int, int]
    program: tuple[str, ...] = ("main.py",)


def schedule(epochs: int) -> list[str]:
    """Options of a round of ``epochs`` epochs, with drops of the learning rate after 60 % and 80 %."""
    first, second = round(0.6 * epochs), round(0.8 * epochs)
    step = max(1, second - first)
    return ["--max-epoch", str(epochs), "--lr-decay-offset", str(first - step), "--lr-decay-step", str(step)]


def new_network(name: str, arm: Arm, seed: int, passes: int, common: Sequence[str] = ()) -> Run:
    """The run of an arm with a new network and the number of epochs nearest to ``passes`` image passes."""
    epochs = round(passes / (arm.views * arm.rounds))
    rate = ["--max-epoch", str(epochs)] if arm.has_schedule else schedule(epochs)
    flags = ("--seed", str(seed), *common, "--max-round", str(arm.rounds), *rate, *arm.flags)
    return Run(f"{name}-s{seed}", flags, None, (arm.rounds - 1, epochs - 1))


def plan(seeds: Sequence[int], arms: Sequence[str] = NAMES) -> list[Run]:
    """The runs of these seeds and arms, and round 0 of each seed if one continues it, in the order of their starts."""

    def round_0(seed: int) -> Run:
        flags = ("--seed", str(seed), "--max-round", "1", *schedule(FIRST_EPOCHS))
        return Run(f"round0-s{seed}", flags, None, (0, FIRST_EPOCHS - 1))

    def arm(name: str, seed: int) -> Run:
        flags = ("--max-round", str(ROUNDS), *schedule(EPOCHS), *ARMS[name])
        last, program = (ROUNDS - 1, EPOCHS - 1), PROGRAMS.get(name, ("main.py",))
        return Run(f"{name}-s{seed}", flags, f"round0-s{seed}", last, program)

    runs = [run for seed in seeds for run in (round_0(seed), arm("restarts", seed), arm("and", seed))]
    for seed in seeds:
        runs += [new_network(name, each, seed, total_epochs()) for name, each in NEW_NETWORK.items()]
        runs += [arm(name, seed) for name in ("all-at-once", "and-k5", "right-pairs")]
    wanted = (*arms, "round0") if any(arm in ARMS for arm in arms) else arms
    return [run for run in runs if run.name.rpartition("-s")[0] in wanted]


def epochs_of(session: Path) -> list[dict[str, Any]]:
    """The epochs that a session has recorded; there may be none yet."""
    try:
        return metrics.read(session)
    except UsageError:
        return []


class Study:
    """The runs of the study and their progress.

    Args:
        data_root: folder of the images, ``train/<class>/`` and ``test/<class>/``.
        sess_dir: folder of the sessions.
        runs: in the order in which they are started.
    """

    def __init__(self, data_root: Path, sess_dir: Path, runs: Sequence[Run]) -> None:
        self.data_root = data_root.resolve()
        self.sess_dir = sess_dir.resolve()
        self.runs = runs
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.failed: dict[str, int] = {}
        self.stopped_by: int | None = None
        self._changed = threading.Condition()

    def is_done(self, run: Run) -> bool:
        """Whether the run has trained its last epoch and ended."""
        rows = epochs_of(self.sess_dir / run.name)
        return bool(rows) and (rows[-1]["round"], rows[-1]["epoch"]) == run.last and run.name not in self.running

    def command(self, run: Run) -> list[str]:
        """The command line that starts or resumes a run."""
        session = self.sess_dir / run.name
        words = [sys.executable, *run.program, "--brief"]
        if latest(session).is_file():
            return [*words, "--resume", str(session)]
        if session.exists():  # stopped before its first checkpoint
            shutil.rmtree(session)
        if run.branches_from is None:
            words += ["--cfgs", *CFGS]
        else:
            words += ["--resume", str(self.sess_dir / run.branches_from), "--restart"]
        where = ["--data-root", str(self.data_root), "--sess-dir", str(self.sess_dir), "--session", run.name]
        return [*words, *where, *run.flags]

    def next(self) -> Run | None:
        """The first run that can be started now."""
        done = {run.name for run in self.runs if self.is_done(run)}
        for run in self.runs:
            if run.name in done or run.name in self.running or run.name in self.failed:
                continue
            if run.branches_from is None or run.branches_from in done:
                return run
        return None

    def start(self, run: Run) -> None:
        """Starts a run, and a thread that waits for its end."""
        command, before = self.command(run), len(epochs_of(self.sess_dir / run.name))
        output = (self.sess_dir / f"{run.name}.out").open("ab")
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches it only through ``stop``
        )
        output.close()
        self.running[run.name] = process
        self.log("start", run, command=command[1:], commit=provenance.commit(), processor=provenance.processor())

        def wait() -> None:
            status = process.wait()
            rates = [row["images_per_s"] for row in epochs_of(self.sess_dir / run.name)[before:]]
            rate = round(statistics.median(rates), 1) if rates else None
            with self._changed:
                del self.running[run.name]
                if status and not self.stopped_by:
                    self.failed[run.name] = status
                self.log("end", run, status=status, epochs=len(rates), images_per_s=rate)
                if self.is_done(run):
                    self.finished(run)
                self._changed.notify()

        threading.Thread(target=wait, daemon=True).start()

    def finished(self, run: Run) -> None:
        """Called when a run is done; does nothing here."""

    def log(self, event: str, run: Run, **what: object) -> None:
        """Adds a line to study.jsonl."""
        line = {"time": datetime.now(timezone.utc).isoformat(timespec="seconds"), "event": event, "run": run.name}
        with (self.sess_dir / "study.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({**line, **what}) + "\n")
        status = f" with status {what['status']}" if "status" in what else ""
        print(f"{line['time']} {event} {run.name}{status}", flush=True)

    def stop(self, number: int, frame: object) -> None:
        """Signal handler: makes all runs save and end."""
        self.stopped_by = number

    def carry_out(self, jobs: int) -> int:
        """Runs everything that is not done, several runs at a time; returns the exit status."""
        with self._changed:
            terminated: set[str] = set()  # once each: a second signal would end a run that is closing its session
            while True:
                while not self.stopped_by and len(self.running) < jobs and (run := self.next()):
                    self.start(run)
                if not self.running:
                    break
                if self.stopped_by:
                    for name in self.running.keys() - terminated:
                        self.running[name].terminate()
                    terminated |= self.running.keys()
                self._changed.wait(timeout=1)  # signals are handled between the calls
        if self.stopped_by:
            return 128 + self.stopped_by
        for name, status in self.failed.items():
            print(f"error: {name} ended with status {status}; see {self.sess_dir / name}.out", file=sys.stderr)
        return 1 if self.failed else 0

    def progress(self) -> str:
        """A table of all runs: epochs trained, accuracy and rate of the last one."""
        rows = []
        for run in self.runs:
            done = epochs_of(self.sess_dir / run.name)
            if not done:
                rows.append((run.name, "-", "-", "-"))
                continue
            last, rate = done[-1], statistics.median(row["images_per_s"] for row in done)
            state = "done" if self.is_done(run) else f"round {last['round']}, epoch {last['epoch'] + 1}"
            rows.append((run.name, state, f"{last['top1']:.2%}", f"{rate:.0f}"))
        return table(["run", "state", "kNN", "images/s"], rows)


def parser_of(program: str, about: str | None, seeds: Sequence[int], arms: Sequence[str]) -> argparse.ArgumentParser:
    """The command line of a study."""
    parser = argparse.ArgumentParser(prog=f"python -m {program}", description=(about or "").splitlines()[0])
    parser.add_argument("--data-root", type=Path, required=True, help="folder of train/<class>/ and test/<class>/")
    parser.add_argument("--sess-dir", type=Path, required=True, help="folder of the study's sessions")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, a thread each (default: 1)")
    shown = " ".join(map(str, seeds))
    parser.add_argument("--seeds", type=int, nargs="+", default=seeds, help=f"seeds to run (default: {shown})")
    parser.add_argument("--arms", nargs="+", choices=arms, default=arms, help="arms to run (default: all)")
    parser.add_argument("--list", action="store_true", help="show how far each run has come, and stop")
    return parser


def carry_out(study: Study, jobs: int) -> int:
    """Runs a study, unless another process does.

    Returns:
        Exit status: 0 all runs are done; 1 one failed; 130, 143 stopped.

    Raises:
        UsageError: another process runs a study in its folder.
    """
    study.sess_dir.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(study.sess_dir / ".study.lock", timeout=0):
            for which in (signal.SIGINT, signal.SIGTERM):
                signal.signal(which, study.stop)
            return study.carry_out(jobs)
    except filelock.Timeout:
        raise UsageError(f"{study.sess_dir}: another process runs this study; wait for it, or stop it") from None


def main(argv: Sequence[str]) -> int:
    """Exit status as ``carry_out``, and 2 for unusable input."""
    given = parser_of("benchmarks.study", __doc__, SEEDS, NAMES).parse_args(argv)
    study = Study(given.data_root, given.sess_dir, plan(given.seeds, given.arms))
    if given.list:
        print(study.progress())
        return 0
    try:
        if not (given.data_root / "train").is_dir():
            raise UsageError(f"{given.data_root}: has no folder train/; name the folder that holds it")
        return carry_out(study, given.jobs)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
