"""The program as users run it: what it prints, writes and refuses."""

from __future__ import annotations

import csv
import json
import math
import re
import shlex
import shutil
import signal
import subprocess
import sys
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import datasets
import main
import models
import runs
import synthetic
from datasets import files
from lib.config.options import Options
from lib.data import compiled_augmentation
from lib.errors import UsageError
from lib.evaluation import linear_probe
from lib.reporting import export, outputs
from lib.session.console import LogFile
from lib.training import build, checkpoint, setup
from lib.training.recorder import Recorder
from lib.training.trainer import Trainer
from runs import content, equal, metrics

ROOT = Path(__file__).parents[2]
TINY = "--resize 8 --size 8 --scale 0.5 1 --network tiny --low-dim 8 --batch-size 8 --workers-num 0".split()
SHORT = [
    *TINY,
    *"--max-round 3 --max-epoch 2 --ANs-select-rate 0.5 --base-lr 0.01 --momentum 0.9 --weight-decay 5e-4".split(),
    *"--seed 3".split(),
]


class Tiny(torch.nn.Module):
    """A small network whose checkpoints are written quickly."""

    def __init__(self, *, low_dim: int) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3)
        self.bn = torch.nn.BatchNorm2d(4)
        self.linear = torch.nn.Linear(4, low_dim)

    def stages(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        maps = torch.relu(self.bn(self.conv(x)))
        embeddings = torch.nn.functional.normalize(self.linear(maps.mean(dim=(2, 3))).float(), dim=1)
        return {"conv1": maps, "fc": embeddings}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.stages(x)["fc"]


@pytest.fixture(autouse=True)
def tiny_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.NETWORKS, "tiny", Tiny)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes of 12 training and 4 test images, 8 x 8."""
    draw = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 4)):
        for shade, name in ((40, "dark"), (200, "light")):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                noise = draw.integers(-30, 30, (8, 8, 3))
                Image.fromarray((shade + noise).astype(np.uint8)).save(folder / f"{number}.png")
    return tmp_path / "photos"


@pytest.fixture
def start(photos: Path, tmp_path: Path) -> list[str]:
    return ["--dataset", "folder", "--data-root", str(photos), "--sess-dir", str(tmp_path / "sessions"), *SHORT]


def session_in(folder: Path) -> Path:
    (found,) = (folder / "sessions").iterdir()
    return found


def test_run_writes_the_documented_files(start: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(start) == 0
    session = session_in(tmp_path)
    names = {str(path.relative_to(session)) for path in session.rglob("*") if path.is_file()}
    events = {name for name in names if name.startswith("tfboard/")}
    assert {name.split("/")[1] for name in events} == {"global", "0000-00000", "0001-00012", "0002-00024"}
    assert names - events == {
        "config.yaml",
        "log.txt",
        "metrics.jsonl",
        "starts.jsonl",
        ".lock",
        "checkpoint/latest.ckpt",
        "checkpoint/previous.ckpt",
        "checkpoint/0000-00000.ckpt",
        "checkpoint/0001-00012.ckpt",
        "checkpoint/0002-00024.ckpt",
        "neighbours/0001-00012.png",
        "neighbours/0002-00024.png",
    }
    assert [(row["round"], row["epoch"], row["anchors"]) for row in metrics(session)] == [
        (0, 0, 0), (0, 1, 0), (1, 0, 12), (1, 1, 12), (2, 0, 24), (2, 1, 24),
    ]  # fmt: skip
    screen = capsys.readouterr().out
    assert sum(" epoch " in line for line in screen.splitlines()) == 6
    assert screen.count("done:") == 3
    assert "seed: 3" in screen and f"torch {torch.__version__.split('+')[0]}" in screen and "commit: " in screen
    assert "\r" not in screen
    log = (session / "log.txt").read_text(encoding="utf-8")
    for line in screen.splitlines():
        assert line in log


@pytest.mark.slow
def test_partly_labelled_images_are_trained_on_and_evaluated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    synthetic.stl10(tmp_path, images=20, unlabelled=28)
    synthetic.accept(monkeypatch, tmp_path)
    words = ["--dataset", "stl10", "--data-root", str(tmp_path), "--sess-dir", str(tmp_path / "sessions"), *SHORT]
    assert main.main([*words, "--report"]) == 0
    shown = capsys.readouterr().out
    assert "20 of 48 training images have labels" in shown and "kNN (K=20, sigma=0.1) against the labelled" in shown
    session = session_in(tmp_path)
    rows = metrics(session)
    assert all(0 <= row["top1"] <= 1 and row["consistency"] is None for row in rows)
    assert rows[-1]["anchors"] == 48
    assert "against the labelled training images" in (session / "report.html").read_text(encoding="utf-8")
    test = ["--resume", str(session), "--test-only", "--protocol", "knn", "linear", "cluster"]
    assert main.main([*test, "--linear-layers", "fc", "--workers-num", "0"]) == 0
    results = json.loads((session / "evaluation.json").read_text(encoding="utf-8"))["results"]
    assert [result["protocol"].split()[0] for result in results] == ["weighted", "linear", "k-means"]
    assert results[0]["top1"] == pytest.approx(rows[-1]["top1"], abs=1e-6)  # both recompute the labelled images


def test_parquet_files_train_like_the_same_images_in_a_folder(start: list[str], photos: Path, tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for split in ("train", "test"):
        files = sorted((photos / split).rglob("*.png"))
        rows = [{"bytes": path.read_bytes(), "path": str(path.relative_to(photos))} for path in files]
        table = pa.table({"image": rows, "label": [path.parent.name for path in files]})
        (tmp_path / "tables").mkdir(exist_ok=True)
        pq.write_table(table, tmp_path / "tables" / f"{split}.parquet")
    assert main.main([*start, "--session", "folder"]) == 0
    words = [*start, "--dataset", "parquet", "--data-root", str(tmp_path / "tables"), "--session", "parquet"]
    assert main.main([*words, "--label-column", "label"]) == 0
    one, two = (tmp_path / "sessions" / name for name in ("folder", "parquet"))
    assert metrics(one) == metrics(two)
    assert equal(content(one), content(two))


def test_best_checkpoint_of_a_round_is_its_best_epoch(start: list[str], tmp_path: Path) -> None:
    main.main(start)
    session = session_in(tmp_path)
    for file in (session / "checkpoint").glob("0*.ckpt"):
        kept = torch.load(file, weights_only=True)
        epochs = [row for row in metrics(session) if row["round"] == kept["round"]]
        best = max(range(len(epochs)), key=lambda i: (epochs[i]["top1"], i))  # the last of equal ones
        assert (kept["epoch"], kept["acc"]) == (best + 1, epochs[best]["top1"])


def test_config_of_a_session_repeats_the_run(start: list[str], tmp_path: Path) -> None:
    main.main(start)
    session = session_in(tmp_path)
    again = tmp_path / "again"
    assert main.main(["--cfgs", str(session / "config.yaml"), "--sess-dir", str(again)]) == 0
    assert equal(content(session), content(next(again.iterdir())))


def test_deterministic_run_repeats_exactly_and_resets_the_mode(
    start: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # set by the run; restored for the next test
    during: list[bool] = []
    real = Trainer.fit
    monkeypatch.setattr(
        Trainer, "fit", lambda self: [during.append(torch.are_deterministic_algorithms_enabled()), real(self)]
    )
    for name in ("one", "two"):
        assert main.main([*start, "--session", name, "--deterministic", "--workers-num", "2"]) == 0
    one, two = (tmp_path / "sessions" / name for name in ("one", "two"))
    assert metrics(one) == metrics(two)
    assert equal(content(one), content(two))
    assert main.main([*start, "--session", "three"]) == 0
    assert during == [True, True, False]


def test_another_seed_gives_another_run(start: list[str], tmp_path: Path) -> None:
    main.main([*start, "--session", "one"])
    main.main([*start, "--session", "two", "--seed", "4"])
    one, two = (content(tmp_path / "sessions" / name) for name in ("one", "two"))
    assert not torch.equal(one["npc"]["memory"], two["npc"]["memory"])


def test_initial_weights_and_bank_noise_are_independent(start: list[str]) -> None:
    built = setup.prepare(main.resolve(start))
    bank = build.build_state(built).bank.memory.flatten()
    weights = next(built.network.parameters()).detach().flatten()
    count = min(len(bank), len(weights))
    assert abs(torch.corrcoef(torch.stack([bank[:count], weights[:count]]))[0, 1]) < 0.5


@pytest.mark.parametrize("stop", [1, 2, 3, 5])
def test_interrupted_run_resumes_in_its_session_with_equal_bits(
    stop: int, start: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = [*start, "--ckpt-interval", "0"]  # a checkpoint after every epoch
    main.main([*start, "--session", "whole"])
    save, saved = Recorder.save, 0

    def save_and_stop(*arguments: Any) -> None:
        nonlocal saved
        save(*arguments)
        saved += 1
        if saved == stop:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recorder, "save", save_and_stop)
        assert main.main([*start, "--session", "cut"]) == 130
    assert "--resume" in capsys.readouterr().err
    cut, whole = tmp_path / "sessions" / "cut", tmp_path / "sessions" / "whole"
    assert main.main(["--resume", str(cut)]) == 0
    assert equal(content(whole), content(cut))
    assert equal(metrics(whole), metrics(cut))
    assert [p.name for p in cut.glob("config*")] == ["config.yaml"]


def test_resume_command_is_quoted_for_the_shell(
    start: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finish_epoch = Trainer.finish_epoch

    def stop(*arguments: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)  # the epoch is finished first
        return finish_epoch(*arguments)

    words = [*start, "--sess-dir", str(tmp_path / "runs of mine"), "--session", "first try"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "finish_epoch", stop)
        assert main.main(words) == 143
    (command,) = re.findall(r"resume with: python main\.py (.*)$", capsys.readouterr().out, re.MULTILINE)
    assert shlex.split(command) == ["--resume", str(tmp_path / "runs of mine" / "first try")]
    message = refused(words, capsys)
    assert shlex.split(message.partition("resume it with ")[2]) == shlex.split(command)
    assert main.main(shlex.split(command)) == 0


def test_resume_from_an_older_checkpoint_repeats_no_record(start: list[str], tmp_path: Path) -> None:
    main.main(start)
    session = session_in(tmp_path)
    before = metrics(session)
    older = torch.load(session / "checkpoint" / "0001-00012.ckpt", weights_only=True)
    assert main.main(["--resume", str(session / "checkpoint" / "0001-00012.ckpt")]) == 0
    assert older["round"] == 1
    assert equal(metrics(session), before)


LATEST_TWO = {"latest.ckpt", "previous.ckpt"}


@pytest.mark.parametrize(
    ("keep", "kept"),
    [
        ("all", {"0000-00000.ckpt", "0001-00012.ckpt", "0002-00024.ckpt"}),
        ("best", {"0002-00024.ckpt"}),
        ("last", set()),
    ],
)
def test_kept_checkpoints_follow_the_option(keep: str, kept: set[str], start: list[str], tmp_path: Path) -> None:
    table, again = tmp_path / "all.csv", tmp_path / "again.csv"
    assert main.main([*start, "--session", "all", "--export-table", str(table)]) == 0
    assert main.main([*start, "--session", "kept", "--keep", keep]) == 0
    whole, session = (tmp_path / "sessions" / name for name in ("all", "kept"))
    assert {path.name for path in (session / "checkpoint").iterdir()} == LATEST_TWO | kept
    assert equal({**content(session), "session": "all"}, content(whole)) and metrics(session) == metrics(whole)
    for name in sorted(LATEST_TWO | kept):  # every kept checkpoint can be evaluated
        assert main.main(["--resume", str(session / "checkpoint" / name), "--test-only"]) == 0
    # reports and tables include the discoveries of all rounds
    assert main.main(["--resume", str(session), "--test-only", "--export-table", str(again)]) == 0
    assert again.read_bytes() == table.read_bytes()
    found = [checkpoint.discoveries(folder, content(folder), 24) for folder in (whole, session)]
    assert [number for number, _ in found[1]] == [1, 2]
    assert all(torch.equal(one.entropy, other.entropy) for (_, one), (_, other) in zip(*found, strict=True))
    assert main.main(["--report", str(session)]) == 0
    # and it resumes as usual
    for folder in (whole, session):
        assert main.main(["--resume", str(folder), "--max-round", "4"]) == 0
    assert equal({**content(session), "session": "all"}, content(whole))


def test_resume_with_fewer_kept_removes_earlier_best_checkpoints(start: list[str], tmp_path: Path) -> None:
    main.main(start)
    session = session_in(tmp_path)
    before = {path.name: checkpoint.load(path) for path in (session / "checkpoint").glob("0*.ckpt")}
    assert main.main(["--resume", str(session), "--max-round", "4", "--keep", "last"]) == 0
    assert {path.name for path in (session / "checkpoint").iterdir()} == LATEST_TWO
    for name, content_before in before.items():
        record = checkpoint.load(session / "neighbours" / name)
        assert equal(record["ANs_discovery"], content_before["ANs_discovery"])
        assert (session / "neighbours" / name).stat().st_size < 10_000
    assert [number for number, _ in checkpoint.discoveries(session, content(session), 24)] == [1, 2, 3]


def test_best_checkpoint_holds_the_bank_only_once(start: list[str], tmp_path: Path) -> None:
    main.main(start)
    folder = session_in(tmp_path) / "checkpoint"
    assert checkpoint.load(folder / "latest.ckpt")["health"]["rows"].shape == (24, 8)
    assert checkpoint.load(folder / "0001-00012.ckpt")["health"]["rows"] is None
    # the figures after resuming: test_resume_from_an_older_checkpoint_repeats_no_record


def test_restart_continues_in_a_new_session(start: list[str], tmp_path: Path) -> None:
    main.main([*start, "--session", "old"])
    old = tmp_path / "sessions" / "old"
    before = {path: path.read_bytes() for path in old.rglob("*") if path.is_file()}
    first_round = str(old / "checkpoint" / "0000-00000.ckpt")
    assert main.main(["--resume", first_round, "--restart", "--session", "new"]) == 0
    assert {path: path.read_bytes() for path in old.rglob("*") if path.is_file()} == before
    assert equal(content(old)["npc"], content(tmp_path / "sessions" / "new")["npc"])


def test_options_changed_on_resume_keep_the_former_config(start: list[str], tmp_path: Path) -> None:
    main.main(start)
    session = session_in(tmp_path)
    assert main.main(["--resume", str(session), "--max-round", "4"]) == 0
    former, now = (yaml.safe_load((session / name).read_text()) for name in ("config.1.yaml", "config.yaml"))
    assert (former["max_round"], now["max_round"]) == (3, 4)
    assert metrics(session)[-1]["round"] == 3


def test_test_only_shows_bank_and_recomputed_accuracy(
    start: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main.main(start)
    session = session_in(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert main.main(["--resume", str(session), "--test-only"]) == 0
    screen = capsys.readouterr().out
    (bank,) = (line for line in screen.splitlines() if line.startswith("memory bank"))
    assert bank.split()[-2:] == [f"{metrics(session)[-1][name]:.2%}" for name in ("top1", "top5")]
    assert "recomputed with the test transform" in screen
    kept = json.loads((session / "evaluation.json").read_text(encoding="utf-8"))
    assert kept["results"][1]["top1"] == metrics(session)[-1]["top1"] and kept["round"] == 2
    (session / "evaluation.json").unlink()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_test_run_without_a_checkpoint_warns_of_random_weights(
    start: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main([*start, "--test-only", "--protocol", "nn"]) == 0
    assert "random weights" in capsys.readouterr().out


def test_several_protocols_give_one_table(start: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "--protocol nn knn linear cluster graph --linear-layers conv1 fc --knn-k 7 --knn-sigma 0.2"
    words += " --graph-neighbours 4 --graph-resolution 0.5"
    assert main.main([*start, *words.split(), "--test-only"]) == 0
    screen = capsys.readouterr().out
    rows = "weighted kNN (K=7, sigma=0.2)", ": NN", "conv1, recomputed", "fc, recomputed", "k-means (2 clusters"
    for word in (*rows, "nearest-neighbour graph (K=4, resolution 0.5)"):
        assert word in screen
    assert not (tmp_path / "sessions").exists()
    assert "conv1, fc" in refused([*start, *words.split(), "--linear-layers", "conv9", "--test-only"], capsys)


def test_linear_probe_without_disk_space_is_refused(
    start: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_probe, "IN_MEMORY", 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=100))
    message = refused([*start, "--test-only", "--protocol", "linear", "--linear-layers", "conv1"], capsys)
    assert "--linear-layers conv1" in message and "TMPDIR" in message


def test_held_out_images_are_not_trained_on(
    start: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main([*start, "--val-fraction", "0.25", "--max-round", "2"]) == 0
    rows = metrics(session_in(tmp_path))
    assert all(0 <= row["val_top1"] <= 1 for row in rows)
    assert len(content(session_in(tmp_path))["npc"]["memory"]) == 18
    assert "best: chosen by held-out training images" in capsys.readouterr().out


def test_sessions_are_compared(start: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in ("1", "2"):
        assert main.main([*start, "--seed", seed, "--session", seed, "--max-round", "1"]) == 0
    folder = tmp_path / "sessions"
    capsys.readouterr()
    words = ["--compare", str(folder / "1"), str(folder / "2"), "--sess-dir", str(tmp_path / "out")]
    assert main.main(words) == 0
    assert "±" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"comparison.csv", "comparison.png"}
    assert str(tmp_path / "none") in refused(["--compare", str(tmp_path / "none")], capsys)


@pytest.mark.parametrize("labelled", [True, False])
def test_report_is_written_at_the_end_and_for_any_session(
    labelled: bool, photos: Path, start: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if not labelled:
        (photos / "train").rename(tmp_path / "flat")
        start = [*start, "--data-root", str(tmp_path / "flat")]
    assert main.main([*start, "--report", "--max-round", "2", "--published", "86.3 % <b>somewhere</b>"]) == 0
    session = session_in(tmp_path)
    page = (session / "report.html").read_text(encoding="utf-8")
    assert "86.3 % &lt;b&gt;somewhere" in page and "torch 2." in page
    assert (session / "report" / "loss.png").is_file()
    assert (session / "report" / "confusion.png").is_file() is labelled
    (session / "report.html").unlink()
    capsys.readouterr()
    assert main.main(["--report", str(session)]) == 0
    assert str(session / "report.html") in capsys.readouterr().out
    assert (session / "report.html").read_text(encoding="utf-8") == page
    assert "not a session folder" in refused(["--report", str(tmp_path)], capsys)
    (session / "metrics.jsonl").write_text("")
    assert "metrics.jsonl" in refused(["--report", str(session)], capsys)
    assert (session / "report.html").read_text(encoding="utf-8") == page


def test_exports_with_held_out_images_use_data_set_indices(start: list[str], photos: Path, tmp_path: Path) -> None:
    features, table = tmp_path / "features.npz", tmp_path / "table.csv"
    words = ["--val-fraction", "0.25", "--export-features", str(features), "--export-table", str(table)]
    assert main.main([*start, *words]) == 0
    names = sorted(str(path.relative_to(photos)) for path in photos.glob("train/*/*"))
    with np.load(features) as saved:
        train, val = saved["train_indices"].tolist(), saved["val_indices"].tolist()
        assert sorted(train + val) == list(range(len(names))) and val
        assert saved["train_names"].tolist() == [names[i] for i in train]
        assert saved["val_names"].tolist() == [names[i] for i in val]
        assert len(saved["val_embeddings"]) == len(saved["val_labels"]) == len(val)
    with table.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    split = {name: [row for row in rows if row["split"] == name] for name in ("train", "val", "test")}
    assert [int(row["index"]) for row in split["train"]] == train
    assert [int(row["index"]) for row in split["val"]] == val and len(split["test"]) == 8
    assert all(row["file"] == names[int(row["index"])] for row in split["train"] + split["val"])
    assert {id for row in rows for id in json.loads(row["neighbours"])} <= set(range(len(train)))


class DeviceTensor(torch.Tensor):
    """A tensor that must be copied to the host before it becomes a NumPy array, like one on a GPU."""

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    def cpu(self, *arguments: Any, **options: Any) -> torch.Tensor:
        return self.as_subclass(torch.Tensor)


def test_results_on_a_gpu_are_reported_and_exported(
    start: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = outputs.finish

    def on_device(content: Any) -> Any:
        if isinstance(content, dict):
            return {name: on_device(value) for name, value in content.items()}
        return content.as_subclass(DeviceTensor) if isinstance(content, torch.Tensor) else content

    monkeypatch.setattr(
        outputs, "finish", lambda context, recorder, final, *more: finish(context, recorder, on_device(final), *more)
    )
    out = [tmp_path / name for name in ("features.npz", "net.safetensors", "table.csv")]
    exports = ["--export-features", "--export-model", "--export-table"]
    words = [word for pair in zip(exports, map(str, out), strict=True) for word in pair]
    assert main.main([*start, "--report", *words]) == 0
    assert (session_in(tmp_path) / "report.html").is_file() and all(path.is_file() for path in out)


def test_test_run_without_labels_shows_health_and_clusters(
    photos: Path, start: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "train").rename(tmp_path / "flat")
    assert main.main([*start, "--data-root", str(tmp_path / "flat")]) == 0
    capsys.readouterr()
    assert main.main(["--resume", str(session_in(tmp_path)), "--test-only"]) == 0
    screen = capsys.readouterr().out
    assert "median entropy" in screen and "k-means (10 clusters" in screen
    found = json.loads((session_in(tmp_path) / "evaluation.json").read_text(encoding="utf-8"))["results"]
    assert "silhouette" in found[1] and 0 <= found[0]["reciprocal"] <= 1 and found[2]["groups"] >= 1


def test_identical_images_are_found_by_query_and_in_the_table(
    photos: Path, start: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows of the memory bank would not be equal: they average different augmented views."""
    pairs = {}
    for folder in (photos / "train").iterdir():
        for path in sorted(folder.iterdir())[:3]:
            twin = path.with_name(f"twin-of-{path.name}")
            shutil.copy(path, twin)
            pairs |= {path: twin, twin: path}
    out = tmp_path / "table.csv"
    assert main.main([*start, "--export-table", str(out)]) == 0
    with out.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    of_file = {row["file"]: row for row in rows}
    for path, twin in pairs.items():
        row, other = (of_file[str(image.relative_to(photos))] for image in (path, twin))
        assert rows[json.loads(row["neighbours"])[0]] is other
        assert float(row["nearest_distance"]) == pytest.approx(0, abs=1e-5)
        assert (row["copy_of"] or row["id"]) == (other["copy_of"] or other["id"])
    capsys.readouterr()
    assert main.main(["--resume", str(session_in(tmp_path)), "--query", *map(str, pairs)]) == 0
    tables = capsys.readouterr().out.split("\n\n")
    for table, pair in zip(tables, pairs.items(), strict=False):
        found = [line.split()[1] for line in table.splitlines() if line.endswith("1.0000")]
        assert {str(path.relative_to(photos)) for path in pair} <= set(found), table


def test_failed_report_does_not_prevent_the_exports(
    start: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: Any) -> None:
        raise UsageError("the report cannot be written")

    monkeypatch.setattr(outputs, "write_report", fail)
    out = tmp_path / "features.npz"
    assert "the report cannot be written" in refused([*start, "--report", "--export-features", str(out)], capsys)
    assert out.is_file()


def test_failed_export_does_not_prevent_the_report(
    start: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: Any) -> None:
        raise UsageError("the features cannot be written")

    monkeypatch.setattr(outputs, "export_results", fail)
    assert "the features cannot be written" in refused([*start, "--report"], capsys)
    assert (session_in(tmp_path) / "report.html").is_file()


def test_failed_export_does_not_prevent_the_others(
    start: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise UsageError("the features cannot be written")

    monkeypatch.setattr(export, "save_features", fail)
    features, weights, table = tmp_path / "a.npz", tmp_path / "a.safetensors", tmp_path / "a.csv"
    words = ["--export-features", features, "--export-model", weights, "--export-table", table]
    assert "the features cannot be written" in refused([*start, *map(str, words)], capsys)
    assert weights.is_file() and table.is_file() and not features.exists()


def test_table_has_rounds_and_query_finds_similar_images(
    photos: Path, start: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "table.csv"
    assert main.main([*start, "--export-table", str(out)]) == 0
    session = session_in(tmp_path)
    with out.open(newline="", encoding="utf-8") as file:
        everything = list(csv.DictReader(file))
    rows = [row for row in everything if row["split"] == "train"]
    assert [row["file"] for row in rows] == sorted(str(p.relative_to(photos)) for p in photos.glob("train/*/*"))
    assert all(row["round"] == "" for row in everything[len(rows) :]) and len(everything) == len(rows) + 8
    found = {
        kept["round"]: set(kept["ANs_discovery"]["anchor_indexes"].tolist())
        for path in (session / "checkpoint").glob("0*.ckpt")
        for kept in [torch.load(path, weights_only=True)]
    }
    for row in rows:
        rounds = [number for number, anchors in sorted(found.items()) if int(row["index"]) in anchors]
        assert row["round"] == (str(rounds[0]) if rounds else "")
    assert len({row["round"] for row in rows}) > 1
    again = tmp_path / "again.csv"
    assert main.main(["--resume", str(session), "--test-only", "--export-table", str(again)]) == 0
    assert again.read_bytes() == out.read_bytes()
    picture = photos / "test" / "dark" / "0.png"
    capsys.readouterr()
    assert main.main(["--resume", str(session), "--query", str(picture), str(picture)]) == 0
    screen = capsys.readouterr().out
    assert screen.count("rank") == 2 and screen.count("train") >= 20
    (drawn,) = (session / "queries").glob("*/query.png")
    with Image.open(drawn) as image:
        assert image.width > 1000
    for bad in (photos / "none.png", photos):
        assert str(bad) in refused(["--resume", str(session), "--query", str(bad)], capsys)


def test_debug_stores_nothing(start: list[str], tmp_path: Path) -> None:
    assert main.main([*start, "--debug"]) == 0
    assert not (tmp_path / "sessions").exists()


def test_brief_shows_only_rounds_and_the_table(start: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main([*start, "--brief"]) == 0
    screen = capsys.readouterr().out
    assert " epoch " not in screen.replace("at the last epoch", "") and screen.count("done:") == 3


def test_print_args_prints_options_that_cfgs_reads_back(
    start: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main([*start, "--print-args"]) == 0
    text = capsys.readouterr().out
    (tmp_path / "printed.yaml").write_text(text, encoding="utf-8")
    main.main(["--cfgs", str(tmp_path / "printed.yaml"), "--print-args"])
    assert capsys.readouterr().out == text
    assert yaml.safe_load(text)["low_dim"] == 8
    assert not (tmp_path / "sessions").exists()


def test_images_without_class_folders_train_without_labels(
    photos: Path, start: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for number, file in enumerate(sorted(photos.rglob("train/*/*.png"))):
        file.rename(flat / f"{number}.png")
    assert main.main([*start, "--data-root", str(flat)]) == 0
    session = session_in(tmp_path)
    assert all(row["top1"] is None and row["consistency"] is None for row in metrics(session))
    screen = capsys.readouterr().out
    assert screen.count("no labels") == 1 and "top-1" not in screen
    assert len(list((session / "checkpoint").iterdir())) == 5


def test_first_of_many_skipped_files_are_named(
    photos: Path, start: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(12):
        (photos / "train" / "dark" / f"{number:02}.CR2").write_bytes(b"a raw file")
    assert main.main([*start, "--test-only"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "skipped" in line]
    assert (
        len(lines) == 2 and "09.CR2 and 2 more: camera raw files" in lines[0] and lines[1].startswith("12 unreadable")
    )


def test_unreadable_images_are_skipped_or_refused_and_named(
    photos: Path, start: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "train" / "dark" / "broken.jpg").write_bytes(b"no image")
    assert main.main(start) == 0
    screen = capsys.readouterr().out
    assert str(Path("train", "dark", "broken.jpg")) in screen and "1 unreadable" in screen
    assert main.main([*start, "--strict-data"]) == 2
    assert "broken.jpg" in capsys.readouterr().err


@pytest.mark.parametrize("optimizer", ["adam", "rmsprop", "sgd"])
def test_every_optimiser_schedule_and_protocol_trains(optimizer: str, start: list[str], tmp_path: Path) -> None:
    rates = tmp_path / "rates.yaml"
    rates.write_text("0: 1e-3\n1: 0.0001\n", encoding="utf-8")
    words = f"--optimizer {optimizer} --lr-policy multistep --lr-schedule {rates} --protocol nn --iter-size 2"
    assert main.main([*start, *words.split(), "--max-round", "2"]) == 0
    assert [row["learning_rate"] for row in metrics(session_in(tmp_path))] == [1e-3, 1e-4] * 2


def test_run_exports_the_trained_network_at_its_end(
    start: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    features, model = tmp_path / "features.npz", tmp_path / "model.safetensors"
    assert main.main([*start, "--export-features", str(features), "--export-model", str(model)]) == 0
    session = session_in(tmp_path)
    with np.load(features, allow_pickle=False) as arrays:
        assert arrays["train_embeddings"].shape == (24, 8) and arrays["test_embeddings"].shape == (8, 8)
        assert arrays["train_names"][0] == str(Path("train", "dark", "0.png"))
        assert arrays["test_labels"].tolist() == [0] * 4 + [1] * 4 and arrays["classes"].tolist() == ["dark", "light"]
    capsys.readouterr()
    shown = []
    for words in (
        ["--resume", str(session)],
        [*start, "--cfgs", str(model.with_suffix(".yaml")), "--resume", str(model)],
    ):
        assert main.main([*words, "--test-only"]) == 0
        lines = capsys.readouterr().out.splitlines()
        shown += [line for line in lines if line.startswith("recomputed")]
    assert len(shown) == 2 and shown[0] == shown[1]
    kept = [session / "evaluation.json", tmp_path / "model.evaluation.json"]
    figures = [json.loads(path.read_text(encoding="utf-8"))["results"][0] for path in kept]
    assert figures[0] == figures[1]


def test_exporting_needs_no_labels(photos: Path, start: list[str], tmp_path: Path) -> None:
    shutil.rmtree(photos / "test")
    out = tmp_path / "features.npz"
    assert main.main([*start, "--test-only", "--export-features", str(out)]) == 0
    with np.load(out, allow_pickle=False) as arrays:
        assert {name.split("_")[0] for name in arrays.files} == {"train", "classes"}
    assert not (tmp_path / "sessions").exists()


@pytest.mark.parametrize("flag", ["--export-features", "--export-model"])
def test_existing_export_file_is_refused_before_training(
    flag: str, start: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = tmp_path / ("taken.npz" if flag == "--export-features" else "taken.safetensors")
    taken.write_text("mine")
    assert str(taken) in refused([*start, flag, str(taken)], capsys)
    assert taken.read_text() == "mine" and not (tmp_path / "sessions").exists()


def test_pretrained_weights_are_ignored_on_resume(
    start: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = Tiny(low_dim=8).state_dict()
    torch.save({"state_dict": {f"module.{name}": value for name, value in weights.items()}}, tmp_path / "weights.pth")
    seen: list[dict[str, torch.Tensor]] = []
    fit = Trainer.fit

    def watch(self: Trainer) -> None:
        seen.append({name: value.clone() for name, value in self.state.network.state_dict().items()})
        fit(self)

    monkeypatch.setattr(Trainer, "fit", watch)
    assert main.main([*start, "--pretrained", str(tmp_path / "weights.pth")]) == 0
    assert equal(seen[0], weights)
    session = session_in(tmp_path)
    assert yaml.safe_load((session / "config.yaml").read_text())["pretrained"] == str(tmp_path / "weights.pth")
    (tmp_path / "weights.pth").unlink()
    trained = content(session)["net"]
    assert main.main(["--resume", str(session), "--max-round", "4"]) == 0
    assert equal(seen[1], trained)
    assert str(tmp_path / "weights.pth") in refused([*start, "--pretrained", str(tmp_path / "weights.pth")], capsys)


def test_checkpoint_with_weights_only_is_resumed(
    start: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The bank is filled with the embeddings of the network."""
    torch.save({"net": Tiny(low_dim=8).state_dict()}, tmp_path / "net.ckpt")
    assert main.main([*start, "--resume", str(tmp_path / "net.ckpt"), "--base-lr", "1e-9"]) == 0
    session = session_in(tmp_path)
    capsys.readouterr()
    assert main.main(["--resume", str(session), "--test-only"]) == 0
    rows = [line.split()[-2:] for line in capsys.readouterr().out.splitlines() if line.startswith(("reco", "memory"))]
    assert len(rows) == 2 and metrics(session)[0]["round"] == 0


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The error message without 'error: '; checks that it is one line."""
    capsys.readouterr()
    assert main.main(words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: ") and "Traceback" not in error
    return error.removeprefix("error: ").strip()


BAD_OPTIONS = {
    "--szie 8": "--size",
    "--max-epoch ten": "max_epoch",
    "--batch-size 1": "batch_size",
    "--npc-temperature 0": "npc_temperature",
    "--npc-momentum 2": "npc_momentum",
    "--network resnet19": "resnet18",
    "--dataset cifar11": "cifar10",
    "--gpus 99": "--gpus 99",
    "--cfgs missing.yaml": "missing.yaml",
    "--data-root nowhere": "nowhere",
    "--dataset cifar10 --data-root nowhere": "cifar-10-batches-py",
    "--batch-size 25": "--batch-size to 24",
    "--ANs-size 24": "--ANs-size",
    "--resume nothing.ckpt": "nothing.ckpt",
    "--session ../outside": "../outside",
    "--restart": "resume",
    "--resume nothing.ckpt --session new": "--restart",
    "--lr-policy multistep": "lr_schedule",
    "--lr-policy multistep --lr-schedule none.yaml": "none.yaml",
    "stray": "stray",
    "--protocol svm": "protocol",
    "--val-fraction 0.01": "--val-fraction",
    "--test-only --protocol linear --linear-layers conv6": "stage",
    "--download": "nothing to download",
    "--bounding-boxes": "cub200",
    "--dataset imagenet --download": "image-net.org",
    "--pretrained none.pth": "none.pth",
    "--export-features out.txt": ".npz",
    "--export-model none/out.onnx": "none",
    "--size 2 --resize 2": "--network tiny: does not accept images of 2 x 2 pixels",
    "--max-epoch 9 --lr-decay-offset 0 --lr-decay-step 1 --lr-decay-rate 1e30": "--lr-decay-rate 1e+30",
    f"--resume {'x' * 300}": "File name too long",
    f"--query {'x' * 300}": "File name too long",
    f"--report {'x' * 300}": "File name too long",
}


@pytest.mark.parametrize("words", BAD_OPTIONS)
def test_bad_input_is_refused_and_nothing_is_written(
    words: str, start: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert BAD_OPTIONS[words] in refused([*start, *words.split()], capsys)
    assert not (tmp_path / "sessions").exists()


@pytest.mark.parametrize("name", ["two\nlines", "two\u2028lines", "two\x85lines"])
def test_name_with_line_breaks_is_shown_on_one_line(
    name: str, start: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    spelled = name.encode("unicode_escape").decode("ascii")
    for option in ("--dataset", "--data-root", "--resume"):
        assert spelled in refused([*start, option, name], capsys)


@pytest.mark.parametrize("workers", [0, 1])
def test_deleted_image_is_named_without_worker_traceback(
    workers: int, start: list[str], photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    missing, load = photos / "train" / "dark" / "3.png", setup.load_data

    def load_and_lose(options: Options) -> Any:
        splits = load(options)
        missing.unlink()
        return splits

    monkeypatch.setattr(files, "IN_MEMORY", 0)
    monkeypatch.setattr(setup, "load_data", load_and_lose)
    assert refused([*start, "--workers-num", str(workers)], capsys).startswith(f"{missing}: could be read at the start")


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("CUDA"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_out_of_memory_is_reported(
    error: Exception, start: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(context: object) -> None:
        raise error

    monkeypatch.setattr(outputs, "run_evaluation", fail)
    assert "--batch-size" in refused([*start, "--test-only"], capsys)


def test_internal_error_without_session_shows_its_traceback(
    start: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(context: object) -> None:
        raise RuntimeError("shapes do not fit\x1b[31m")

    monkeypatch.setattr(outputs, "run_evaluation", fail)
    assert main.main([*start, "--test-only"]) == 70
    *above, last = capsys.readouterr().err.splitlines()
    assert above[0].startswith("Traceback") and any("in fail" in line for line in above)
    assert last == "error: unexpected RuntimeError: shapes do not fit\\x1b[31m; its traceback is above"
    assert all(line.isprintable() for line in above)


def failing_after(calls: int, monkeypatch: pytest.MonkeyPatch, error: Exception | None = None) -> None:
    """Makes every training step after ``calls`` raise this error, by default an unexpected one."""
    step, left = Trainer.backward, iter(range(calls))

    def altered(*arguments: Any) -> Any:
        if next(left, None) is None:
            raise error or KeyError("stages")
        return step(*arguments)

    monkeypatch.setattr(Trainer, "backward", altered)


def test_error_in_training_logs_its_traceback_and_resumes(
    start: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, broken = tmp_path / "sessions" / "whole", tmp_path / "sessions" / "broken"
    assert main.main([*start, "--session", "whole"]) == 0
    capsys.readouterr()
    with monkeypatch.context() as patch:
        failing_after(7, patch)  # an epoch has three steps
        assert main.main([*start, "--session", "broken"]) == 70
    shown = capsys.readouterr()
    log = broken / "log.txt"
    assert shown.err == (
        f"error: unexpected KeyError: 'stages'; its traceback is at the end of {log}; "
        f"resume with: python main.py --resume {broken}\n"
    )
    assert "Traceback" not in shown.out
    assert re.search(
        r"ERROR an error ended the run\nTraceback .*in altered.*KeyError: 'stages'\n$", log.read_text(), re.S
    )
    assert main.main(["--resume", str(broken)]) == 0
    assert equal(content(whole), content(broken))


@pytest.mark.parametrize(
    ("error", "status"),
    [(torch.OutOfMemoryError("CUDA"), 2), (RuntimeError("CUDA error: unspecified launch failure\nmore"), 70)],
    ids=["memory", "GPU"],
)
def test_device_failure_names_the_checkpoint_to_resume(
    error: Exception,
    status: int,
    start: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole, broken = tmp_path / "sessions" / "whole", tmp_path / "sessions" / "broken"
    assert main.main([*start, "--session", "whole"]) == 0
    with monkeypatch.context() as patch:
        failing_after(7, patch, error)
        capsys.readouterr()
        assert main.main([*start, "--session", "broken"]) == status
    (message,) = capsys.readouterr().err.splitlines()
    saved = broken / "checkpoint" / "latest.ckpt"
    assert message.endswith(f"; the last checkpoint is {saved}; resume with: python main.py --resume {broken}")
    assert main.main(["--resume", str(broken)]) == 0
    assert equal(content(whole), content(broken))


def test_error_in_the_first_epoch_reports_no_checkpoint(
    start: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing_after(1, monkeypatch)
    assert main.main(start) == 70
    assert capsys.readouterr().err.endswith("log.txt; no checkpoint was saved yet\n")


def test_error_after_training_logs_its_traceback(
    start: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(outputs, "export_results", fail)
    assert main.main([*start, "--max-round", "1"]) == 70
    assert capsys.readouterr().err.startswith(
        "error: unexpected ZeroDivisionError: ZeroDivisionError; its traceback is at"
    )
    assert "in fail" in (session_in(tmp_path) / "log.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("words", ["--log-file false", "--debug", "full"])
def test_traceback_is_shown_if_the_log_cannot_be_written(
    words: str, start: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing_after(4, monkeypatch)
    if words == "full":
        monkeypatch.setattr(LogFile, "has_failed", True)
        words = "--brief"
    assert main.main([*start, *words.split()]) == 70
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback") and shown.endswith("unexpected KeyError: 'stages'; its traceback is above\n")


class Incomplete(Tiny):
    """A user's network with one defect."""

    def __init__(self, *, low_dim: int, defect: str) -> None:
        super().__init__(low_dim=low_dim + (defect == "size"))
        self.defect = defect
        if defect == "stages":
            self.stages = None

    def stages(self, x: torch.Tensor) -> Any:
        found = super().stages(x)
        if self.defect == "fc":
            del found["fc"]
        return {"dict": list(found.values()), "tensors": {**found, "fc": "fc"}}.get(self.defect, found)

    def forward(self, x: torch.Tensor) -> Any:
        embedding = super().stages(x)["fc"]
        return {"length": 2 * embedding, "tensor": [embedding]}.get(self.defect, embedding)


DEFECTS = {
    "stages": "has no method stages(images)",
    "size": "its embedding of one image must have shape (1, 8), as set by --low-dim, and is (1, 9)",
    "tensor": "its embedding of one image must have shape (1, 8), as set by --low-dim, and is list",
    "length": "its embeddings must have unit length, and one has 2",
    "dict": "its stages(images) must return a dict of tensors by name",
    "tensors": "its stages(images) must return a dict of tensors by name",
    "fc": "its stages(images) must contain the embeddings as 'fc'",
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_incomplete_network_is_refused_before_training(
    defect: str,
    start: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(models.NETWORKS, "mine", lambda low_dim: Incomplete(low_dim=low_dim, defect=defect))
    for more in ([], ["--test-only", "--protocol", "linear", "--linear-layers", "conv1"]):
        message = refused([*start, "--network", "mine", *more], capsys)
        assert message.startswith(f"--network mine: {DEFECTS[defect]}")
    assert not (tmp_path / "sessions").exists()


@pytest.mark.parametrize("name", [name for name in models.NETWORKS if name != "tiny"])
def test_every_network_meets_the_requirements(name: str) -> None:
    size = 224 if name in ("alexnet", "imagenet-resnet50") else 64 if name.startswith("imagenet") else 32
    assert models.build(name, low_dim=5, size=(size, size)).training


def test_unwritable_sess_dir_is_refused(start: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert "--sess-dir" in refused([*start, "--sess-dir", str(tmp_path / "file" / "sessions")], capsys)


def test_existing_session_is_never_overwritten(
    start: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main.main([*start, "--session", "mine"])
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert "mine" in refused([*start, "--session", "mine"], capsys)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_incompatible_checkpoint_is_refused_with_the_reason(
    start: list[str], photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main.main(start)
    session = session_in(tmp_path)
    before = {path: path.read_bytes() for path in session.rglob("*") if path.is_file()}
    resume = ["--resume", str(session)]
    assert "contains weights of network tiny" in refused([*resume, "--network", "resnet10"], capsys)
    assert "embedding size 8, not 16" in refused([*resume, "--low-dim", "16"], capsys)
    (photos / "train" / "dark" / "0.png").unlink()
    assert "24 samples, not 23" in refused(resume, capsys)
    assert main.main([*resume, "--test-only", "--debug"]) == 0  # evaluation does not need the same training images
    cut = tmp_path / "cut.ckpt"
    cut.write_bytes((session / "checkpoint" / "latest.ckpt").read_bytes()[:5000])
    assert "cut.ckpt" in refused([*start, "--resume", str(cut)], capsys)
    assert {path: path.read_bytes() for path in session.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("place", ["net", "npc"])
@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_diverged_checkpoint_is_refused_for_every_use(
    place: str, number: float, start: list[str], tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main.main([*start, "--max-round", "1"])
    content_ = content(session_in(tmp_path))
    tensor = content_["npc"]["memory"] if place == "npc" else next(iter(content_["net"].values()))
    tensor.view(-1)[0] = number
    path = tmp_path / "diverged.ckpt"
    torch.save(content_, path)
    out, picture = tmp_path / "features.npz", photos / "test" / "dark" / "0.png"
    resume = [*start, "--resume", str(path)]
    for words in ([], ["--test-only"], ["--test-only", "--export-features", str(out)], ["--query", str(picture)]):
        message = refused([*resume, *words], capsys)
        assert "diverged.ckpt" in message and "not finite" in message and "an earlier checkpoint" in message
    assert not out.exists()
    if place == "net":
        assert "not finite" in refused([*start, "--pretrained", str(path)], capsys)


def test_main_py_exits_with_2_and_one_line(tmp_path: Path) -> None:
    words = [sys.executable, str(ROOT / "main.py"), "--cfgs", str(tmp_path / "none.yaml")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


@pytest.mark.parametrize("gpus", ["[0]", "[0, 1]"])
def test_gpu_session_is_evaluated_but_not_trained_without_gpu(
    gpus: str, start: list[str], photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main.main([*start, "--max-round", "1"])
    session = session_in(tmp_path)
    config = session / "config.yaml"
    config.write_text(config.read_text().replace("gpus: []", f"gpus: {gpus}"))
    resume = ["--resume", str(session)]
    for words in (
        [*resume, "--test-only"],
        [*resume, "--test-only", "--export-features", str(tmp_path / "features.npz")],
        [*resume, "--query", str(photos / "test" / "dark" / "0.png")],
        ["--report", str(session)],
    ):
        capsys.readouterr()
        assert main.main(words) == 0
        assert "not all on this machine; using the CPU" in capsys.readouterr().out
    assert "--gpus '' runs on the CPU" in refused([*resume, "--max-round", "2"], capsys)
    assert main.main([*resume, "--max-round", "2", "--gpus", ""]) == 0


def test_unused_gpu_is_reported(
    start: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    assert main.main([*start, "--max-round", "1"]) == 0
    assert capsys.readouterr().out.count("NVIDIA H100 is not used; set --gpus 0 to use it") == 1


def test_single_process_computes_no_data_fingerprint(start: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "fingerprint", lambda images: pytest.fail("the images are hashed"))
    assert main.main([*start, "--max-round", "1"]) == 0


HEAVY = "torch", "torchvision", "matplotlib", "sklearn", "scipy"
"""Packages that take a second or more to import."""
IMPORTS_AFTER_OPTIONS = f"""
import sys
import main
try:
    status = main.main(sys.argv[1:])
except SystemExit as stop:
    status = stop.code
print([name for name in {HEAVY} if name in sys.modules], status)
"""
IMPORTS_AT_FIRST_STEP = f"""
import os, sys
import main
from lib.training import trainer

def first_loss(*arguments, **options):
    print([name for name in {HEAVY} if name in sys.modules], flush=True)
    os._exit(0)

trainer.Trainer.backward = first_loss
main.main(sys.argv[1:])
"""


def last_line(program: str, *words: str) -> str:
    command = [sys.executable, "-c", program, *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "status"),
    [("--help", 0), ("--print-args", 0), ("--network resnet81", 2), ("--dataset cifar12", 2), ("--no-option", 2)],
)
def test_options_are_read_without_pytorch(words: str, status: int) -> None:
    assert last_line(IMPORTS_AFTER_OPTIONS, *words.split()) == f"[] {status}"


def test_first_step_on_the_digits_imports_only_pytorch(tmp_path: Path) -> None:
    words = ["--cfgs", "configs/base.yaml", "configs/digits.yaml", "--sess-dir", str(tmp_path), "--brief"]
    assert last_line(IMPORTS_AT_FIRST_STEP, *words) == "['torch']"


def test_run_with_closed_output_continues_to_its_end(tmp_path: Path) -> None:
    """As with ``| head -1``."""
    words = "--cfgs configs/base.yaml configs/digits.yaml --max-round 1 --max-epoch 2 --seed 0 --session run"
    process = runs.start(*words.split(), "--sess-dir", str(tmp_path))
    assert process.stdout and process.stdout.readline()
    process.stdout.close()
    assert process.wait() == 0
    assert len(metrics(tmp_path / "run")) == 2
    log = (tmp_path / "run" / "log.txt").read_text(encoding="utf-8")
    assert "round 0 done" in log and "Broken pipe" not in log


@pytest.mark.parametrize("words", [["--help"], ["--print-args"], ["--cfgs", "configs/base.yaml", "--print-args"]])
def test_closed_pipe_ends_the_output_without_an_error(words: list[str]) -> None:
    shell = f"{shlex.quote(sys.executable)} main.py {shlex.join(words)} | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", shell], cwd=ROOT, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("0\n", "")


DIGITS = "--cfgs configs/base.yaml configs/digits.yaml --network resnet10-w16"


HIDDEN = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch.compile does not show it


@HIDDEN
@pytest.mark.slow
def test_compile_has_no_graph_break_and_no_recompilation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend
    from torch._dynamo.utils import counters

    counter, compile = CompileCounterWithBackend("aot_eager"), torch.compile  # type: ignore[no-untyped-call]
    monkeypatch.setattr(torch, "compile", partial(compile, backend=counter, fullgraph=True))
    monkeypatch.setattr(compiled_augmentation, "_compiled", cache(compiled_augmentation._compiled.__wrapped__))
    torch.compiler.reset()
    counters.clear()
    words = f"{DIGITS} --max-round 3 --max-epoch 2 --debug --compile --batch-size 512"  # batches of 512, 512 and 413
    assert main.main(words.split()) == 0
    # the network in training and in evaluation, the augmentation, the loss without and with neighbours
    assert counter.frame_count == 5
    assert not counters["graph_break"]


@HIDDEN
@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="PyTorch compiles for CPUs with g++")
def test_compiled_steps_differ_by_rounding_only(tmp_path: Path) -> None:
    """The mean loss of three steps; later ones amplify the rounding."""
    losses = []
    for more in ("", "--compile"):
        words = f"{DIGITS} --max-round 1 --max-epoch 1 --batch-size 512 --seed 0 --sess-dir {tmp_path}"
        assert main.main([*words.split(), "--session", f"run{more}", *more.split()]) == 0
        losses += [row["loss"] for row in metrics(tmp_path / f"run{more}")]
    assert len(losses) == 2 and losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_unknown_stage_is_refused_before_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = f"{DIGITS} --protocol knn linear --linear-layers conv9 --sess-dir {tmp_path / 'sessions'}"
    assert main.main(words.split()) == 2
    assert "--linear-layers: the network has no stage conv9; its stages are conv1," in capsys.readouterr().err
    assert not (tmp_path / "sessions").exists()
