"""Runs of several processes, started by torchrun and by the program: resumed, failed and stopped."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
from pathlib import Path

import psutil
import pytest
from numpy.testing import assert_allclose

from runs import (
    ROOT,
    assert_alike,
    content,
    finished,
    kill_group,
    metrics,
    output_of,
    read_until,
    start,
    until,
    words_of,
    written,
)
from team import assert_alike as assert_near

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(sys.platform == "win32", reason="signals are another thing there"),
]
LAUNCH = "import sys; from lib.distributed import launch; sys.exit(launch.run(sys.argv[1], sys.argv[2:], 2))"
"""Starts two processes as ``--gpus 0,1`` does, on CPUs; the first argument is the program."""


def torchrun(processes: int, *flags: str) -> tuple[str, ...]:
    return "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), *flags


@pytest.fixture(scope="module")
def two(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The session of an uninterrupted run of two processes."""
    folder = tmp_path_factory.mktemp("two")
    process = start("main.py", *words_of(photos, folder, "two"), program=torchrun(2))
    shown = output_of(process)
    assert process.returncode == 0, shown
    assert shown.count("round 1 done") == 1 and "Traceback" not in shown and "Warning" not in shown
    return folder / "two"


def launched(words: list[str], *flags: str, processes: int = 2) -> tuple[int, str]:
    process = start("main.py", *words, program=torchrun(processes, *flags))
    shown = output_of(process)
    return process.returncode, shown


def test_only_rank_0_writes_the_session(two: Path) -> None:
    assert [(row["round"], row["epoch"]) for row in metrics(two)] == [(r, e) for r in range(2) for e in range(4)]
    assert {path.name for path in two.parent.iterdir()} == {"two"} and not list(two.rglob("*.part"))
    saved = content(two)
    assert saved["npc"]["memory"].shape == (100, 16) and saved["npc"]["memory"].norm(dim=1).sub(1).abs().max() < 1e-5
    assert (two / "log.txt").read_text().count("processes: 2") == 1


def test_evaluation_is_equal_for_any_number_of_processes(two: Path) -> None:
    alone = finished("--resume", str(two), "--test-only", "--protocol", "knn", "linear", "cluster", "--brief")
    for processes in (2, 3):
        status, shown = launched(
            ["--resume", str(two), "--test-only", "--protocol", "knn", "linear", "cluster", "--brief"],
            processes=processes,
        )
        assert status == 0
        table = [line.split() for line in alone.splitlines() if "%" in line]
        assert len(table) >= 4 and [line.split() for line in shown.splitlines() if "%" in line] == table


def test_session_resumes_with_another_number_of_processes(two: Path, photos: Path, tmp_path: Path) -> None:
    words = ["--resume", str(two), "--restart", "--sess-dir", str(tmp_path), "--max-round", "3", "--max-epoch", "4"]
    finished(*words, "--session", "one", "--brief")
    status, shown = launched([*words, "--session", "three", "--brief"], processes=3)
    assert status == 0, shown
    for name in ("one", "three"):
        assert [row["round"] for row in metrics(tmp_path / name)] == [2] * 4
    one, three = content(tmp_path / "one"), content(tmp_path / "three")
    for part in ("anchor_indexes", "neighbours", "entropy"):  # both resumed with the same discovery
        assert_near(three["ANs_discovery"][part], one["ANs_discovery"][part], part)


def test_killed_job_resumes_to_the_same_result(two: Path, photos: Path, tmp_path: Path) -> None:
    session = tmp_path / "killed"
    process = start("main.py", *words_of(photos, tmp_path, "killed"), program=torchrun(2))
    until(lambda: written(session) > 0, process)
    kill_group(process)
    output_of(process)
    status, shown = launched(["--resume", str(session), "--brief"])
    assert status == 0, shown
    assert_alike(session, two)


def main_with(folder: Path, setup: str) -> str:
    """Writes a program that runs ``setup`` after it imported main.py; returns its path."""
    program = folder / "program.py"
    program.write_text(f"import os, signal, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport main\n{setup}\n")
    return str(program)


CALL_ACTION_AT_STEP_20 = """
from lib.distributed import launch
from lib.training.trainer import Trainer
calls, step = iter(range(1, 20)), Trainer.backward

def altered(*arguments):
    if next(calls, None) is None:
        action()
    return step(*arguments)

Trainer.backward = altered
launch.end(main.main())
"""
"""Calls ``action()`` before the twentieth and every later step."""
KILL_RANK_1 = """
def action():
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
"""
FAIL_ON_RANK_1 = """
def action():
    if os.environ["RANK"] == "1":
        raise KeyError("stages")
"""
BOTH_RAISE_NONFINITE_LOSS = """
def action():
    from lib.errors import NonFiniteLossError
    raise NonFiniteLossError("the loss is not a finite number")
"""
WAIT_FOR_A_SIGNAL = """
def action():
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    print("rank", os.environ["RANK"], "waits", flush=True)
    os.read(reader, 1)
    signal.set_wakeup_fd(-1)
"""


def running(text: str) -> list[psutil.Process]:
    """The processes whose command line contains a text."""
    return [process for process in psutil.process_iter(["cmdline"]) if text in " ".join(process.info["cmdline"] or [])]


@pytest.mark.parametrize("restarts", [0, 1])
def test_failed_rank_ends_the_others_and_may_be_restarted(
    restarts: int, two: Path, photos: Path, tmp_path: Path
) -> None:
    session, sessions = tmp_path / "sessions" / "broken", tmp_path / "sessions"
    program = main_with(tmp_path, KILL_RANK_1 + CALL_ACTION_AT_STEP_20)
    words = [program, *words_of(photos, sessions, "broken")]
    process = start(*words, program=torchrun(2, "--max-restarts", str(restarts)))
    shown = output_of(process)
    assert not running(program)
    if restarts == 0:
        assert process.returncode != 0 and written(session)
        assert "another process of the run has ended" in shown and "exitcode  : -9" in shown
        status, shown = launched(["--resume", str(session), "--brief"])
        assert status == 0, shown
    else:
        assert process.returncode == 0, shown
        assert len((session / "starts.jsonl").read_text().splitlines()) == 2
        assert {path.name for path in sessions.iterdir()} == {"broken"}
    assert_alike(session, two)


@pytest.mark.parametrize(
    ("setup", "status", "message"),
    [
        (FAIL_ON_RANK_1, 70, "error: unexpected KeyError: 'stages'"),
        (KILL_RANK_1, 128 + signal.SIGKILL, "error: another process of the run has ended"),
        (BOTH_RAISE_NONFINITE_LOSS, 1, "error: the loss is not a finite number"),
    ],
    ids=["fails", "killed", "not finite"],
)
def test_exit_status_is_that_of_the_failed_process(
    setup: str, status: int, message: str, photos: Path, tmp_path: Path
) -> None:
    program = main_with(tmp_path, setup + CALL_ACTION_AT_STEP_20)
    process = start(program, *words_of(photos, tmp_path, "broken"), program=("-c", LAUNCH))
    shown = output_of(process)
    assert process.returncode == status, shown
    assert message in shown


@pytest.mark.parametrize(("which", "status"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGUSR1", 0)])
@pytest.mark.parametrize("group", [True, False])
def test_signal_stops_all_ranks_at_one_step_and_they_resume(
    which: str, status: int, group: bool, two: Path, photos: Path, tmp_path: Path
) -> None:
    """A terminal sends the signal to all processes, a scheduler to the launcher only."""
    session = tmp_path / "stopped"
    program = main_with(tmp_path, WAIT_FOR_A_SIGNAL + CALL_ACTION_AT_STEP_20)
    process = start(program, *words_of(photos, tmp_path, "stopped"), program=("-c", LAUNCH))
    for _ in range(2):
        read_until(process, "waits")
    (os.killpg if group else os.kill)(process.pid, getattr(signal, which))
    shown = output_of(process)
    assert process.returncode == status, shown
    assert f"stopped by {which}" in shown and f"--resume {session}" in shown and "Traceback" not in shown
    again = start("main.py", "--resume", str(session), "--brief", program=("-c", LAUNCH))
    shown = output_of(again)
    assert again.returncode == 0, shown
    assert_alike(session, two)


STOPPED_IN_EXPORT = """
from lib.distributed import launch
from lib.reporting import export

export._header = lambda path: signal.raise_signal(signal.SIGTERM)
launch.end(main.main())
"""


def test_signal_after_training_stops_rank_0_which_says_what_is_left(two: Path, tmp_path: Path) -> None:
    model, session = tmp_path / "model.safetensors", tmp_path / "two"
    shutil.copytree(two, session)
    program = main_with(tmp_path, STOPPED_IN_EXPORT)
    words = ["--resume", str(session), "--brief", "--export-model", str(model)]
    process = start(program, *words, program=("-c", LAUNCH))
    shown = output_of(process)
    assert process.returncode == 143 and "Traceback" not in shown, shown
    rest = f"python main.py --resume {session} --export-model {model}\n"
    assert shown.count("stopped by SIGTERM after the last epoch; ") == 1 and rest in shown
    assert not list(tmp_path.glob("model*"))


def test_bad_input_is_reported_once_with_exit_status_2(photos: Path, tmp_path: Path) -> None:
    words = words_of(photos, tmp_path, "bad")
    for wrong, message in {
        ("--data-root", "nowhere"): "error: nowhere: no such folder",
        ("--batch-size", "3"): "error: --batch-size 3: the batch is divided among 2 processes",
        ("--ANs-size", "100"): "error: --ANs-size 100",
        ("--resume", "nowhere.ckpt", "--restart"): "error: nowhere.ckpt: no such checkpoint",
    }.items():
        process = start("main.py", *words, *wrong, program=("-c", LAUNCH))
        shown = output_of(process)
        assert process.returncode == 2, shown
        (line,) = [line for line in shown.splitlines() if line.startswith("error")]
        assert line.startswith(message) and "Traceback" not in shown
    assert not list(tmp_path.iterdir())


def test_single_process_commands_are_refused_under_a_launcher(two: Path, tmp_path: Path) -> None:
    for words in (["--compare", str(two)], ["--report", str(two)], ["--query", str(two / "a.png")]):
        before = sorted(tmp_path.rglob("*")), sorted(two.rglob("*"))
        status, shown = launched([*words, "--sess-dir", str(tmp_path)])
        assert status != 0 and 'main.py", line' not in shown
        assert shown.count("error: --report, --query and --compare are for one process") == 1
        assert (sorted(tmp_path.rglob("*")), sorted(two.rglob("*"))) == before


def test_rank_with_other_options_is_refused_at_the_start(photos: Path, tmp_path: Path) -> None:
    more = "['--npc-momentum', '0.7'] if os.environ['RANK'] == '1' else []"
    program = main_with(tmp_path, f"sys.exit(main.main([*sys.argv[1:], *({more})]))")
    process = start(program, *words_of(photos, tmp_path / "sessions", "odd"), program=torchrun(2))
    shown = output_of(process)
    assert process.returncode != 0
    assert "error: --npc-momentum: rank 1 has 0.7, but rank 0 has 0.5; start all ranks with the same" in shown
    assert not (tmp_path / "sessions").exists()


@pytest.mark.parametrize("rank", ["0", "1"])
def test_resume_on_only_one_rank_is_refused_at_the_start(rank: str, two: Path, photos: Path, tmp_path: Path) -> None:
    """Otherwise the ranks would wait for each other."""
    more = f"['--resume', {str(two)!r}, '--restart'] if os.environ['RANK'] == {rank!r} else []"
    program = main_with(tmp_path, f"sys.exit(main.main([*sys.argv[1:], *({more})]))")
    cfgs = ["--cfgs", str(two / "config.yaml")]
    process = start(program, *cfgs, *words_of(photos, tmp_path / "sessions", "odd"), program=torchrun(2))
    shown = output_of(process)
    assert process.returncode != 0
    assert re.search("error: --re(sume|start): rank 1 has .*, but rank 0 has ", shown)
    assert not (tmp_path / "sessions").exists()


COMPILATIONS_ARE_COUNTED = """
from functools import partial
import torch
from lib.distributed import launch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

counter = CompileCounterWithBackend("inductor")
torch.compile = partial(torch.compile, backend=counter, fullgraph=True)
status = main.main()
print("compiled", counter.frame_count, "graph breaks", sum(counters["graph_break"].values()), flush=True)
launch.end(status)
"""
NONE_LEFT = ["--batch-size", "478", "--sync-bn"]
"""Of the digits three are left for the last batch, which all go to rank 0."""


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="PyTorch compiles for CPUs by g++")
@pytest.mark.parametrize("more", [["--batch-size", "512"], NONE_LEFT], ids=["statistics of each rank", "of all"])
def test_compiled_ranks_train_as_plain_ones(more: list[str], tmp_path: Path) -> None:
    """At a low learning rate, as steps amplify the rounding."""
    program = main_with(tmp_path, COMPILATIONS_ARE_COUNTED)
    words = "--cfgs configs/base.yaml configs/digits.yaml --network resnet10-w16 --max-round 2 --max-epoch 1 --seed 0"
    words += f" --base-lr 1e-4 --sess-dir {tmp_path}"
    for name, flag in (("plain", []), ("compiled", ["--compile"])):
        process = start(program, *words.split(), "--session", name, *more, *flag, program=torchrun(2))
        shown = output_of(process)
        assert process.returncode == 0, shown
    # the network in training and in evaluation, the augmentation, the loss without and with neighbours; a rank without
    # images of a batch compiles the augmentation once more
    counts = sorted(map(int, re.findall(r"compiled (\d+) graph breaks 0\n", shown)))
    assert counts == ([5, 6] if more is NONE_LEFT else [5, 5]), shown
    plain, compiled = (metrics(tmp_path / name) for name in ("plain", "compiled"))
    assert [row["loss"] for row in compiled] == pytest.approx([row["loss"] for row in plain], rel=1e-4)
    banks = [content(tmp_path / name)["npc"]["memory"] for name in ("plain", "compiled")]
    assert_allclose(banks[1], banks[0], rtol=0, atol=1e-3)
