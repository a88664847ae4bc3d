"""``python -m benchmarks gpu``: finished parts are kept, failed ones are retried, and the deadline is met."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import __main__ as cli
from benchmarks import gpu, gpu_parts
from benchmarks.gpu import Outcome, Part, Runner
from benchmarks.study import epochs_of
from lib.errors import UsageError
from lib.session import metrics
from runs import output_of, start, until

HOUR = 3600.0


def part(name: str, code: str, out: Path, **changes: Any) -> Part:
    def outcome(status: int) -> Outcome:
        if status == 143:
            return Outcome("unfinished", "stopped at the deadline")
        reason = gpu.last_line(out / f"{name}.log") if status else ""
        return Outcome("failed" if status else "done", reason, {"text": "a table", "machine": "a machine"})

    return Part(name, name.title(), lambda: ["-c", code], outcome, **{"least": 0.0, **changes})


def run_parts(out: Path, parts: list[Part], seconds: float = HOUR) -> tuple[int, dict[str, Any]]:
    status = Runner(out, parts, {"device": "cpu"}, time.monotonic() + seconds).carry_out()
    return status, json.loads((out / "state.json").read_text())["parts"]


def test_failed_parts_are_retried_after_the_others(tmp_path: Path) -> None:
    trace, mended = tmp_path / "trace", tmp_path / "mended"

    def note(name: str, then: str = "") -> str:
        return f"open({str(trace)!r}, 'a').write('{name} '); {then}"

    fails = note("b", f"from pathlib import Path; assert Path({str(mended)!r}).exists(), 'not mended'")
    parts = [
        part("a", note("a"), tmp_path),
        part("b", fails, tmp_path),
        part("c", note("c"), tmp_path, blocked="no data"),
    ]
    parts.append(part("last", note("last"), tmp_path))
    status, entries = run_parts(tmp_path, parts)
    assert status == 1 and trace.read_text() == "a b last "
    assert {name: entry["status"] for name, entry in entries.items()} == {
        "a": "done",
        "b": "failed",
        "c": "not begun",
        "last": "done",
    }
    assert entries["b"]["reason"] == "AssertionError: not mended" and entries["c"]["reason"] == "no data"

    mended.touch()
    parts[2] = part("c", note("c"), tmp_path)
    status, again = run_parts(tmp_path, parts)
    assert status == 0 and trace.read_text() == "a b last c b "  # c, which was not tried yet, comes before b
    assert again["a"] == entries["a"] and again["last"] == entries["last"]
    assert again["b"]["status"] == "done" and again["b"]["tries"] == 2 and again["b"]["reason"] == ""
    assert "What is missing" not in Runner(tmp_path, parts, {"device": "cpu"}, 0).report()


def test_part_that_cannot_finish_is_not_started(tmp_path: Path) -> None:
    parts = [
        part("long", "raise SystemExit('begun')", tmp_path, least=100.0),
        part("missing", "raise SystemExit('begun')", tmp_path, needs=("json", "no_such_module")),
        part("short", "", tmp_path),
    ]
    status, entries = run_parts(tmp_path, parts, gpu.GRACE + 60)
    assert status == 1 and entries["short"]["status"] == "done"
    assert entries["long"]["status"] == entries["missing"]["status"] == "not begun"
    assert entries["long"]["reason"].startswith("needs 100 s, and ") and not entries["long"]["tries"]
    assert entries["missing"]["reason"] == "needs no_such_module, which is not installed here"
    assert "- Missing: not begun: needs no_such_module" in Runner(tmp_path, parts, {"device": "cpu"}, 0).report()


WAIT = "import signal; print('begun', flush=True); signal.pause()"
STUBBORN = "import signal; signal.signal(signal.SIGTERM, lambda *_: print('ignored', flush=True)); "
STUBBORN += "print('begun', flush=True)\nwhile True: signal.pause()"
SAVES = "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)); print('begun', flush=True); "
SAVES += "signal.pause()"


@pytest.mark.parametrize(
    ("code", "status", "reason"),
    [
        (WAIT, "failed", "ran out of time"),
        (STUBBORN, "failed", "ran out of time"),
        (SAVES, "unfinished", "stopped at the deadline"),
    ],
    ids=["ends", "is killed", "saves"],
)
def test_session_ends_before_the_deadline(
    code: str, status: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock jumps to the time to stop when the part has begun, and then to the time to kill."""
    log, deadline = tmp_path / "waits.log", HOUR

    def clock() -> float:
        shown = log.read_text() if log.exists() else ""
        return deadline - gpu.KILL if "ignored" in shown else deadline - gpu.GRACE if "begun" in shown else 0.0

    monkeypatch.setattr(gpu, "time", SimpleNamespace(monotonic=clock))
    parts = [part("waits", code, tmp_path), part("next", "", tmp_path)]
    Runner(tmp_path, parts, {"device": "cpu"}, deadline).carry_out()
    entries = json.loads((tmp_path / "state.json").read_text())["parts"]
    assert clock() < deadline
    assert (entries["waits"]["status"], entries["waits"]["reason"]) == (status, reason)
    assert "begun" in log.read_text()
    assert entries["next"]["status"] == "not begun" if code == STUBBORN else True


def test_hanging_part_is_stopped_in_time_for_the_others(tmp_path: Path) -> None:
    parts = [part("hangs", WAIT, tmp_path, most=0.5), part("next", "", tmp_path)]
    _, entries = run_parts(tmp_path, parts)
    assert entries["hangs"]["reason"] == "ran out of time" and entries["next"]["status"] == "done"


def test_results_of_other_settings_and_damaged_state_are_refused(tmp_path: Path) -> None:
    run_parts(tmp_path, [part("a", "", tmp_path)])
    with pytest.raises(UsageError, match=r"state.json: has the results of device cpu; choose another --out"):
        Runner(tmp_path, [], {"device": "cuda:0"}, 0)
    for content in ("{", "[]", '{"setting": 1, "parts": {}}'):
        (tmp_path / "state.json").write_text(content)
        with pytest.raises(UsageError, match="is damaged; delete it"):
            Runner(tmp_path, [], {"device": "cpu"}, 0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--device cpu --small --save", "--save: the results are those of a GPU at full size"),
        ("--device cpu --small --parts knn speed", "--parts speed: no such part; there are tests, step-float32"),
        ("--device cpu --small --data-root .", "has neither train/ nor cifar-10-batches-py/"),
        ("", "--device cuda:0: PyTorch sees no GPU here; --device cpu --small tries the command"),
    ],
)
def test_invalid_arguments_are_refused(
    words: str, message: str, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["gpu", *words.split()]) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_constant_batches_replace_the_loader() -> None:
    batch = (torch.zeros(2, 3, 4, 4), torch.tensor([5, 6]))
    constant = gpu_parts.Constant(batch, 7)
    assert len(constant) == 7 and len(list(constant.epoch(first=3))) == 4
    assert constant.indices(0, 0, 1) == [5, 6]


@pytest.mark.slow
def test_stopped_session_is_resumed(photos: Path, tmp_path: Path) -> None:
    out, chosen = tmp_path / "out", ["step-float32", "rate-bf16", "discovery-50k", "discovery-1281k", "knn", "memory"]
    words = ["gpu", "--device", "cpu", "--small", "--out", str(out), "--data-root", str(photos), "--parts", *chosen]
    words += ["cifar10", "--", "--max-epoch", "100"]

    def rows() -> list[dict[str, Any]]:
        return epochs_of(out / "cifar10")

    process = start(*words, program=("-m", "benchmarks"))
    until(rows, process)
    process.send_signal(signal.SIGTERM)
    shown = output_of(process)
    assert process.returncode == 143, shown
    before, entries = rows(), json.loads((out / "state.json").read_text())["parts"]
    assert {entries[name]["status"] for name in chosen} == {"done"}
    assert entries["cifar10"]["status"] == "unfinished" and 0 < len(before) < 200
    assert "s an epoch" in (out / "cifar10-gpu.md").read_text()

    process = start(*words, program=("-m", "benchmarks"))
    shown = output_of(process)
    assert process.returncode == 0, shown
    again = json.loads((out / "state.json").read_text())["parts"]
    assert {name: again[name] for name in chosen} == {name: entries[name] for name in chosen}
    assert again["cifar10"]["status"] == "done" and again["cifar10"]["tries"] == 2
    after = rows()
    assert after[: len(before)] == before and len(metrics.starts(out / "cifar10")) == 2
    assert [(row["round"], row["epoch"]) for row in after] == [(r, e) for r in (0, 1) for e in range(100)]
    page = (out / "gpu.md").read_text()
    assert "| augmentation |" in page and "of that with a constant batch" in page
    assert "| 1 | 100 | 25 |" in (out / "cifar10-gpu.md").read_text()
