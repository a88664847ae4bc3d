"""The runs of the study: how they branch, how they resume, and that finished ones are not repeated."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from benchmarks import right_pairs, study
from lib.config.parser import read_options
from lib.errors import UsageError
from lib.method.neighbourhoods import Neighbourhoods
from lib.session import metrics
from runs import RUN, altered, content, equal, output_of, read_until, start, until

SMALL = """
import sys
from benchmarks import study
study.CFGS, study.SEEDS, study.FIRST_EPOCHS, study.EPOCHS, study.ROUNDS = [sys.argv[1]], (5,), 3, 2, 3
sys.exit(study.main(sys.argv[2:]))
"""
"""The study at a small size; the first argument is the config."""
HELD = SMALL.replace(
    "sys.exit(",
    f"""
command = study.Study.command
held = {[*altered("await_signals(1)"), "lib.training.trainer", "Trainer.backward", "18"]!r}
def hold(self, run):
    python, program, *words = command(self, run)
    return [python, *(held if run.name == "round0-s5" else [program]), *words]
study.Study.command = hold
sys.exit(""",
)
"""The same; round 0 waits for a signal in a step of its second epoch."""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with the options of ``RUN`` except those that the study sets."""
    options: dict[str, Any] = {}
    for word in RUN.split():
        if word.startswith("--"):
            name = word[2:].replace("-", "_")
            options[name] = []
        else:
            options[name].append(yaml.safe_load(word))
    kept = {name: values[0] if len(values) == 1 else values for name, values in options.items() if values}
    path = tmp_path_factory.mktemp("config") / "small.yaml"
    path.write_text(yaml.safe_dump({name: value for name, value in kept.items() if name not in ("seed", "max_round")}))
    return path


HOLD = """
import filelock, sys
with filelock.FileLock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.readline()
"""


def words(config: Path, photos: Path, folder: Path) -> list[str]:
    return [str(config), "--data-root", str(photos), "--sess-dir", str(folder), "--jobs", "2"]


@pytest.mark.slow
def test_stopped_study_is_resumed_to_its_end(config: Path, photos: Path, tmp_path: Path) -> None:
    given = words(config, photos, tmp_path)
    process, output = start(*given, program=("-c", HELD)), tmp_path / "round0-s5.out"
    until(lambda: output.exists() and "waiting for a signal" in output.read_text(), process)
    os.killpg(process.pid, signal.SIGTERM)
    shown = output_of(process)
    assert process.returncode == 128 + signal.SIGTERM, shown
    before = [json.loads(line) for line in (tmp_path / "study.jsonl").read_text().splitlines()]
    assert [line["status"] for line in before if line["event"] == "end" and line["run"] == "round0-s5"] == [143]
    assert before[0]["event"] == "start" and before[0]["run"] == "round0-s5" and before[0]["processor"]

    process = start(*given, program=("-c", SMALL))
    shown = output_of(process)
    assert process.returncode == 0, shown
    lines = [json.loads(line) for line in (tmp_path / "study.jsonl").read_text().splitlines()]
    assert all(line["status"] == 0 for line in lines[len(before) :] if line["event"] == "end")

    arms = ("restarts-s5", "and-s5", "all-at-once-s5", "and-k5-s5")
    anchors = {name: [row["anchors"] for row in metrics.read(tmp_path / name)] for name in arms}
    assert anchors == {
        "restarts-s5": [0, 0, 0, 0],
        "and-s5": [25, 25, 50, 50],
        "all-at-once-s5": [100] * 4,
        "and-k5-s5": [25, 25, 50, 50],
    }
    assert all(0 < row["anchors"] < 50 for row in metrics.read(tmp_path / "right-pairs-s5"))
    assert content(tmp_path / "and-k5-s5")["ANs_discovery"]["neighbours"].shape == (50, 5)
    rows = metrics.read(tmp_path / "one-round-s5")
    assert [(row["round"], row["epoch"]) for row in rows] == [(0, epoch) for epoch in range(7)]
    assert [row["learning_rate"] for row in rows] == pytest.approx([0.01] * 4 + [0.001] * 2 + [0.0001])

    assert [row["passes"] for row in metrics.read(tmp_path / "plus-one-round-s5")] == [2, 4, 6, 8]
    rounds = [(row["round"], row["passes"]) for row in metrics.read(tmp_path / "plus-s5")]
    assert rounds == [(0, 2), (1, 4), (2, 6), (3, 8), (4, 10)]

    # the round 0 that was stopped equals one that was not, and the arms start from its last epoch
    first = torch.load(tmp_path / "restarts-s5" / "checkpoint" / "latest.ckpt", weights_only=True)["history"][0]
    assert first["round"] == 0 and first["epoch"] == 2
    alone = start(*words(config, photos, tmp_path / "again"), program=("-c", SMALL))
    until(lambda: len(study.epochs_of(tmp_path / "again" / "round0-s5")) == 3, alone)
    os.killpg(alone.pid, signal.SIGTERM)
    output_of(alone)
    one, other = (content(folder / "round0-s5") for folder in (tmp_path, tmp_path / "again"))
    assert equal(one["net"], other["net"]) and equal(one["npc"], other["npc"])

    process = start(*given, program=("-c", SMALL))
    assert output_of(process) == "" and process.returncode == 0  # every run is finished
    process = start(*given, "--list", program=("-c", SMALL))
    assert output_of(process).count("done") == 9


@pytest.mark.slow
def test_failed_run_is_reported_and_the_others_continue(config: Path, photos: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text(config.read_text().replace("batch_size: 8", "batch_size: 800"))
    process = start(*words(broken, photos, tmp_path / "study"), program=("-c", SMALL))
    shown = output_of(process)
    assert process.returncode == 1
    assert "error: round0-s5 ended with status 2" in shown and "error: one-round-s5 ended with status 2" in shown
    assert "and-s5" not in shown  # its round 0 failed, so it cannot branch
    assert "fewer than a batch" in (tmp_path / "study" / "round0-s5.out").read_text()


def test_second_study_in_the_same_folder_is_refused(photos: Path, tmp_path: Path, capsys: Any) -> None:
    read_until(start(str(tmp_path / ".study.lock"), program=("-c", HOLD)), "held")
    assert study.main(["--data-root", str(photos), "--sess-dir", str(tmp_path)]) == 2
    assert "another process runs this study" in capsys.readouterr().err


def test_folder_without_training_images_is_refused(tmp_path: Path, capsys: Any) -> None:
    assert study.main(["--data-root", str(tmp_path), "--sess-dir", str(tmp_path / "study")]) == 2
    assert "has no folder train/" in capsys.readouterr().err and not (tmp_path / "study").exists()


def test_run_killed_before_its_first_checkpoint_starts_again(tmp_path: Path) -> None:
    planned = study.Study(tmp_path / "photos", tmp_path, study.plan(study.SEEDS))
    run, session = planned.runs[0], tmp_path / "round0-s0"
    session.mkdir()
    (session / "config.yaml").write_text("seed: 0\n")
    assert "--resume" not in planned.command(run) and not session.exists()
    (session / "checkpoint").mkdir(parents=True)
    (session / "checkpoint" / "latest.ckpt").touch()
    assert planned.command(run)[-2:] == ["--resume", str(session)] and session.exists()


def test_right_pairs_keeps_anchors_with_correct_neighbours() -> None:
    anchors, neighbours = torch.tensor([4, 0, 2]), torch.tensor([[1], [3], [5]])
    found = replace(Neighbourhoods.of_anchors(anchors, neighbours, torch.zeros(6)), consistency=1 / 3)
    labels = torch.tensor([0, 1, 0, 1, 1, 2])  # 4 and 1 have equal labels; 0 and 3, 2 and 5 do not
    trainer: Any = SimpleNamespace(labels=labels, state=SimpleNamespace(neighbourhoods=found))
    right_pairs.keep_right_pairs(trainer)
    kept = trainer.state.neighbourhoods
    assert kept.anchors.tolist() == [4] and kept.neighbours.tolist() == [[1]] and kept.consistency == 1 / 3
    assert kept.instances.tolist() == [0, 1, 2, 3, 5]
    trainer.labels = None
    with pytest.raises(UsageError, match="have no labels"):
        right_pairs.keep_right_pairs(trainer)


def test_learning_rate_drops_at_3_and_4_fifths_of_a_round() -> None:
    for epochs, drops in {50: (30, 40), 10: (6, 8), 90: (54, 72)}.items():
        _, length, _, offset, _, step = study.schedule(epochs)
        assert int(length) == epochs and (int(offset) + int(step), int(offset) + 2 * int(step)) == drops
        assert int(offset) + 3 * int(step) >= epochs


def test_most_important_runs_are_first() -> None:
    plan = study.plan(study.SEEDS)
    names = [run.name for run in plan]
    assert names[:3] == ["round0-s0", "restarts-s0", "and-s0"] and len(set(names)) == len(names) == 27
    assert all(
        names.index(run.branches_from) < names.index(run.name) for run in study.plan(study.SEEDS) if run.branches_from
    )


def test_selected_arms_need_only_round_0() -> None:
    assert [run.name for run in study.plan([1], ["and", "right-pairs"])] == ["round0-s1", "and-s1", "right-pairs-s1"]
    assert [run.name for run in study.plan([1], ["plus"])] == ["plus-s1"]


def test_plus_has_the_options_of_its_config() -> None:
    (run,) = study.plan([0], ["plus"])
    arm, config = (
        vars(read_options(["--cfgs", *study.CFGS, *more])) for more in (run.flags, ["configs/cifar10-cpu-plus.yaml"])
    )
    assert {name for name in arm if arm[name] != config[name]} == {"seed", "max_epoch", "embed", "cfgs"}
