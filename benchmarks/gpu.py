"""All measurements that need a GPU, in one command that resumes when it is called again.

    python -m benchmarks gpu --minutes 10 --data-root data/cifar10-images -- --amp bf16 --compile

The parts run in this order, each in a separate process:

    tests                 the tests that need a GPU (tests/system/test_gpu.py)
    step-MODE             one training step by part; a mode is float32, tf32, bf16 or one of them compiled
    rate-MODE             images/s through the trainer, against the same network on a constant batch
    discovery-N, knn      seconds and memory at the paper's sizes
    memory                peak of an epoch, and the largest batch
    cifar10               the paper's training by configs/base.yaml and configs/cifar10.yaml; words after ``--`` are
                          added to its command line

``OUT/state.json`` has the result of each part that was run. A finished part is not repeated. One that failed or ran
out of time is tried again by the next call, after those that were not tried yet. A part that cannot end before the
deadline is not started; a part that still runs then receives a signal, and the training on CIFAR-10 saves its state and
resumes with the next call. ``OUT/NAME.log`` is the output of a part; ``OUT/gpu.md`` and ``OUT/cifar10-gpu.md`` are the
tables.
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
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import filelock
import torch

from benchmarks import measure
from benchmarks.study import epochs_of
from lib.errors import UsageError
from lib.session import metrics, provenance
from lib.session.atomic_files import atomic_write
from lib.session.locate import latest

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
TRAINING = ("pydantic", "yaml", "tensorboardX", "tqdm", "sklearn", "psutil", "matplotlib", "jinja2", "PIL")
"""Modules that training needs."""
MEASURES = {
    "step-float32": ("One step by part, float32", 40),
    "step-tf32": ("One step by part, TF32", 30),
    "step-bf16": ("One step by part, bf16", 30),
    "step-tf32-compiled": ("One step by part, TF32, compiled", 90),
    "step-bf16-compiled": ("One step by part, bf16, compiled", 90),
    "rate-float32": ("Images/s through the trainer, float32", 90),
    "rate-bf16": ("Images/s through the trainer, bf16", 60),
    "rate-bf16-compiled": ("Images/s through the trainer, bf16, compiled", 90),
    "discovery-50k": ("Discovery, N = 50,000", 20),
    "discovery-1281k": ("Discovery, N = 1,281,167", 90),
    "knn": ("Weighted kNN, 10,000 queries, 50,000 rows", 20),
    "memory": ("Memory of the training, and the largest batch", 90),
}
"""Part -> title and minimum seconds to start it, on one H100; with ``--small`` at most 20."""
GRACE = 20.0
"""Seconds before the deadline at which a part is signalled to stop; ``KILL`` seconds before it, it is killed."""
KILL = 3.0
MOST = 6
"""A part is stopped after this multiple of its minimum seconds."""
EXPECTED = {0: "", 128 + signal.SIGTERM: "stopped at the deadline", 128 + signal.SIGINT: "stopped by Ctrl-C"}


@dataclass(frozen=True)
class Outcome:
    """How a part ended.

    Attributes:
        status: done, unfinished (to be resumed) or failed.
        reason: why it is not done.
        result: ``text`` in Markdown, ``machine``, and figures.
    """

    status: str
    reason: str = ""
    result: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """Something to run in a separate process.

    Attributes:
        name: in the state file; also of its log.
        title: in the table of results.
        command: returns the words after the Python interpreter.
        outcome: interprets exit status and log.
        least: minimum seconds to start it.
        most: seconds after which it is stopped; None: only at the deadline.
        needs: required modules.
        blocked: why it cannot be started at all; '' if it can.
        stop: the signal that stops it.
    """

    name: str
    title: str
    command: Callable[[], Sequence[str]]
    outcome: Callable[[int], Outcome]
    least: float
    most: float | None = None
    needs: Sequence[str] = ()
    blocked: str = ""
    stop: signal.Signals = signal.SIGTERM


class Runner:
    """The parts and their progress.

    Args:
        out: folder of the state file, logs and tables.
        parts: in the order in which they run; failed ones come after the others, but before the last.
        setting: the settings of all results in the folder.
        deadline: of ``time.monotonic``.
        chosen: names of the parts to run; None: all.

    Raises:
        UsageError: the folder holds results of another setting, or its state file is damaged.
    """

    def __init__(
        self,
        out: Path,
        parts: Sequence[Part],
        setting: dict[str, str],
        deadline: float,
        chosen: Sequence[str] | None = None,
    ) -> None:
        self.out, self.parts, self.deadline = out, parts, deadline
        self.path = out / "state.json"
        self.chosen = [part for part in parts if chosen is None or part.name in chosen]
        self.stopped_by: int | None = None
        self.tried: set[str] = set()
        self.state: dict[str, Any] = {"setting": setting, "parts": {}}
        if self.path.exists():
            try:
                self.state = json.loads(self.path.read_text(encoding="utf-8"))
                before, _ = self.state["setting"].items(), self.state["parts"].items()
            except (ValueError, KeyError, TypeError, AttributeError):
                raise UsageError(f"{self.path}: is damaged; delete it, or choose another --out") from None
            if before != setting.items():
                shown = ", ".join(f"{name} {value}" for name, value in before)
                raise UsageError(f"{self.path}: has the results of {shown}; choose another --out")
        self.entries: dict[str, dict[str, Any]] = self.state["parts"]

    def is_done(self, part: Part) -> bool:
        """Whether the part has its result."""
        return bool(self.entries.get(part.name, {}).get("status") == "done")

    def obstacle(self, part: Part) -> str:
        """Why a part cannot be started now; '' if it can."""
        if part.blocked:
            return part.blocked
        if missing := [name for name in part.needs if not _is_installed(name)]:
            return f"needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed here"
        left = self.deadline - GRACE - time.monotonic()
        return f"needs {part.least:.0f} s, and {max(0, left):.0f} s are left" if left < part.least else ""

    def next(self) -> Part | None:
        """The part to run now."""

        def key(part: Part) -> tuple[bool, int]:
            return part is self.parts[-1], self.entries.get(part.name, {}).get("tries", 0)

        for part in sorted(self.chosen, key=key):
            if not self.is_done(part) and part.name not in self.tried:
                return part
        return None

    def stop(self, number: int, frame: object) -> None:
        """Signal handler: ends the running part and the session."""
        self.stopped_by = number

    def carry_out(self) -> int:
        """Runs the parts that fit into the time. Returns 0 if all are done, 1 if not; 130, 143 if stopped."""
        while not self.stopped_by and (part := self.next()):
            self.tried.add(part.name)
            if obstacle := self.obstacle(part):
                self._say(part.name, f"not begun: {obstacle}")
                if part.name not in self.entries:
                    self._record(part, Outcome("not begun", obstacle), 0.0)
                elif self.entries[part.name]["status"] == "not begun":
                    self.entries[part.name]["reason"] = obstacle
                    self.save()
                continue
            self._say(part.name, "begun")
            started = time.monotonic()
            outcome = self._run(part)
            seconds = time.monotonic() - started
            self._record(part, outcome, seconds)
            self._say(part.name, f"{outcome.status} after {seconds:.1f} s{outcome.reason and ': '}{outcome.reason}")
        if self.stopped_by:
            return 128 + self.stopped_by
        return 0 if all(map(self.is_done, self.chosen)) else 1

    def _run(self, part: Part) -> Outcome:
        limit = self.deadline - GRACE
        if part.most is not None:
            limit = min(limit, time.monotonic() + part.most)
        with (self.out / f"{part.name}.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, *part.command()],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # signals reach it only through this program
            )
        ended_by = ""
        while process.poll() is None:
            now = time.monotonic()
            if not ended_by and (self.stopped_by or now >= limit):
                ended_by = (
                    f"stopped by {signal.Signals(self.stopped_by).name}" if self.stopped_by else "ran out of time"
                )
                process.send_signal(part.stop)
                limit = min(self.deadline, now + GRACE) - KILL
            elif ended_by and now >= limit:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):  # signals are handled between the calls
                process.wait(timeout=0.2)
        outcome = part.outcome(process.returncode)
        if ended_by and outcome.status == "failed":
            return Outcome("failed", ended_by, outcome.result)
        return outcome

    def _record(self, part: Part, outcome: Outcome, seconds: float) -> None:
        before = self.entries.get(part.name, {})
        self.entries[part.name] = {
            "status": outcome.status,
            "reason": outcome.reason,
            "tries": before.get("tries", 0) + (outcome.status != "not begun"),
            "seconds": round(before.get("seconds", 0.0) + seconds, 1),
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "commit": provenance.commit()[:10] or "unknown",
            "result": outcome.result or before.get("result", {}),
        }
        self.save()

    def save(self) -> None:
        """Writes the state file."""
        with atomic_write(self.path) as file:
            file.write(json.dumps(self.state, indent=1).encode("utf-8"))

    def _say(self, name: str, what: str) -> None:
        print(f"{datetime.now(timezone.utc):%H:%M:%S} {name}: {what}", flush=True)

    def report(self) -> str:
        """The results of all parts but the last, in Markdown."""
        text = ["# gpu: the program on a GPU"]
        rest = []
        for part in self.parts[:-1]:
            entry = self.entries.get(part.name, {"status": "not begun", "reason": "not tried", "result": {}})
            if entry["result"]:
                made = f"{entry['seconds']:.0f} s in all; commit {entry['commit']}; {entry['time'][:10]}"
                text.append(f"## {part.title}\n\n{entry['result']['text']}\n\n{entry['result']['machine']}; {made}.")
            if entry["status"] != "done":
                rest.append(f"- {part.title}: {entry['status']}: {entry['reason']}")
        return "\n\n".join([*text, *(["## What is missing\n\n" + "\n".join(rest)] if rest else [])]) + "\n"


def _is_installed(module: str) -> bool:
    return find_spec(module) is not None


def last_line(log: Path) -> str:
    """The last non-empty line of a log."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    return next((line[:300] for line in reversed(lines) if line), "it printed nothing")


def measure_of(name: str, title: str, least: float, out: Path, given: argparse.Namespace) -> Part:
    """A part of ``benchmarks/gpu_parts.py``, which writes its result to a file."""
    result = out / f"{name}.json"

    def command() -> list[str]:
        result.unlink(missing_ok=True)
        words = ["-m", "benchmarks.gpu_parts", name, str(result), "--device", given.device]
        return [*words, *(["--small"] if given.small else [])]

    def outcome(status: int) -> Outcome:
        found = json.loads(result.read_text(encoding="utf-8")) if result.exists() else {}
        if status:
            return Outcome("failed", found.get("reason") or last_line(out / f"{name}.log"), found)
        return Outcome("done", "", found)

    is_tests = name == "tests"
    needs = () if name.startswith(("discovery", "knn")) else TRAINING
    return Part(
        name,
        title,
        command,
        outcome,
        min(least, 20) if given.small else least,
        MOST * least,
        (*needs, "pytest") if is_tests else needs,
        stop=signal.SIGINT if is_tests else signal.SIGTERM,  # pytest then ends the programs that it has started
    )


def cifar10_of(out: Path, given: argparse.Namespace, more: Sequence[str]) -> Part:
    """The training on CIFAR-10, one session, resumed from call to call."""
    session = out / "cifar10"

    def command() -> list[str]:
        words = ["main.py", *(["--resume", str(session)] if latest(session).is_file() else _new_run())]
        return [*words, "--gpus", measure.gpus(torch.device(given.device)), *more]

    def _new_run() -> list[str]:
        if session.exists():  # stopped before its first checkpoint
            shutil.rmtree(session)
        words = ["--cfgs", "configs/base.yaml", "configs/cifar10.yaml", "--seed", "0"]
        words += ["--data-root", str(given.data_root), "--sess-dir", str(out), "--session", session.name]
        if not (given.data_root / "cifar-10-batches-py").is_dir():
            from datasets import DATASETS

            source = DATASETS["cifar10"]
            words += ["--dataset", "folder", "--means", *map(str, source.means), "--stds", *map(str, source.stds)]
        small = (
            "--network resnet10-w16 --resize 8 8 --size 8 8 --low-dim 16 --batch-size 16 --max-round 2 --max-epoch 8"
        )
        return [*words, *(small.split() if given.small else [])]

    def outcome(status: int) -> Outcome:
        result = {"text": training_table(session), "machine": ""} if epochs_of(session) else {}
        if status not in EXPECTED:
            return Outcome("failed", last_line(out / "cifar10.log"), result)
        return Outcome("unfinished" if status else "done", EXPECTED[status], result)

    blocked = ""
    if given.data_root is None:
        blocked = "needs --data-root, a folder of train/<class>/ and test/<class>/, or of cifar-10-batches-py/"
    return Part("cifar10", "CIFAR-10", command, outcome, 20 if given.small else 60, None, TRAINING, blocked)


def training_table(session: Path) -> str:
    """A table of the rounds of a session."""
    rounds: dict[int, list[dict[str, Any]]] = {}
    for row in epochs_of(session):
        rounds.setdefault(row["round"], []).append(row)

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{value:.2%}"

    rows = []
    for number, epochs in rounds.items():
        last = epochs[-1]
        seconds = [[row[name] for row in epochs] for name in ("train_s", "evaluate_s")]
        judged = [percent(last[name]) for name in ("consistency", "top1", "best_top1")]
        rows.append((number, len(epochs), last["anchors"], *judged, *(f"{statistics.median(s):.2f}" for s in seconds)))
    header = ["round", "epochs", "anchors", "consistency", "kNN, last", "kNN, best", "s to train", "s to evaluate"]
    return measure.table(header, rows)


def training_report(session: Path, entry: dict[str, Any]) -> str:
    """The page of the training on CIFAR-10."""
    epochs, starts = len(epochs_of(session)), metrics.starts(session)
    shown = {name: ", ".join(dict.fromkeys(str(start.get(name)) for start in starts)) for name in ("device", "commit")}
    state = entry["status"] + (entry["reason"] and f": {entry['reason']}")
    return (
        f"# CIFAR-10 on a GPU\n\n{entry['result']['text']}\n\n"
        "kNN is the weighted kNN of the test images against the memory bank; the best epoch is chosen by the test "
        "labels. Published: 86.3 %. Seconds are of one epoch, median of the round.\n\n"
        f"{state[0].upper()}{state[1:]}. {epochs} epochs in {entry['seconds']:,.0f} s, starts, checkpoints and all: "
        f"{entry['seconds'] / epochs:.2f} s an epoch. The goal is 1.8 s.\n\n"
        f"{len(starts)} starts; {shown['device']}; {starts[-1].get('versions') if starts else ''}; "
        f"commit {shown['commit']}; {entry['time'][:10]}. The options are in the session's config.yaml.\n"
    )


def parts_of(out: Path, given: argparse.Namespace, more: Sequence[str]) -> list[Part]:
    """All parts, in order."""
    every = {"tests": ("Tests that need a GPU", 90), **MEASURES}
    parts = [measure_of(name, title, least, out, given) for name, (title, least) in every.items()]
    return [*parts, cifar10_of(out, given, more)]


def main(argv: Sequence[str]) -> int:
    """Exit status: 0 all parts are done; 1 some are not; 2 input that cannot be used; 130, 143 stopped by a signal."""
    started = time.monotonic()
    words = list(argv)
    more = words[words.index("--") + 1 :] if "--" in words else []
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [options] [-- OPTIONS OF main.py]",
    )
    parser.add_argument("--minutes", type=float, default=10, help="time that it may take in all (default: 10)")
    parser.add_argument("--out", type=Path, default=Path("sessions/gpu"), help="folder (default: sessions/gpu)")
    parser.add_argument("--data-root", type=Path, help="CIFAR-10: train/<class>/ and test/<class>/, or original files")
    parser.add_argument("--parts", nargs="+", metavar="PART", help="run these parts alone")
    parser.add_argument("--device", default="cuda:0", help="a GPU, or cpu to try the command (default: cuda:0)")
    parser.add_argument("--small", action="store_true", help="small sizes, to try the command")
    parser.add_argument("--save", action="store_true", help="write the tables to benchmarks/results/, too")
    given = parser.parse_args(words[: words.index("--")] if "--" in words else words)
    try:
        return _carry_out(given, more, started + 60 * given.minutes)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _carry_out(given: argparse.Namespace, more: Sequence[str], deadline: float) -> int:
    if given.save and (given.small or given.device == "cpu"):
        raise UsageError("--save: the results are those of a GPU at full size; drop it, or --small and --device cpu")
    if torch.device(given.device).type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device {given.device}: PyTorch sees no GPU here; --device cpu --small tries the command")
    if given.data_root is not None:
        given.data_root = given.data_root.resolve()
        if not any((given.data_root / name).is_dir() for name in ("train", "cifar-10-batches-py")):
            raise UsageError(f"{given.data_root}: has neither train/ nor cifar-10-batches-py/; name their folder")
    out = given.out.resolve()
    parts = parts_of(out, given, more)
    for name in given.parts or ():
        if name not in {part.name for part in parts}:
            raise UsageError(f"--parts {name}: no such part; there are {', '.join(part.name for part in parts)}")
    out.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(out / ".gpu.lock", timeout=0):
            setting = {"device": given.device, "size": "small" if given.small else "full"}
            runner = Runner(out, parts, setting, deadline, given.parts)
            for which in (signal.SIGINT, signal.SIGTERM):
                signal.signal(which, runner.stop)
            status = runner.carry_out()
            write_reports(runner, [out, *([RESULTS] if given.save else [])])
            return status
    except filelock.Timeout:
        raise UsageError(f"{out}: another process uses this folder; wait for it, or stop it") from None


def write_reports(runner: Runner, folders: Sequence[Path]) -> None:
    """Writes the tables to each folder."""
    entry = runner.entries.get("cifar10", {})
    for folder in folders:
        (folder / "gpu.md").write_text(runner.report(), encoding="utf-8")
        if entry.get("result"):
            text = training_report(runner.out / "cifar10", entry)
            (folder / "cifar10-gpu.md").write_text(text, encoding="utf-8")
    print(f"the tables are in {', '.join(map(str, folders))}", flush=True)
