"""The folder of a run and its files."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone, tzinfo
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lib.errors import UsageError
from lib.session import run_folder
from lib.session.console import LOGGER, logger, start_logging
from lib.session.locate import folder_of
from lib.session.run_folder import Session, create_folder
from runs import kill_group, output_of, read_until, start
from tfevents import events, shown


@pytest.fixture(autouse=True)
def restore_log() -> Iterator[None]:
    log = logging.getLogger(LOGGER)
    before = list(log.handlers), log.level, log.propagate
    start_logging(brief=True)
    yield
    for handler in log.handlers:
        if handler not in before[0]:
            handler.close()
    log.handlers[:], log.level, log.propagate = before


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return create_folder(tmp_path / "sessions", "mine")


def refusal(sess_dir: Path, name: str | None) -> str:
    with pytest.raises(UsageError) as refused:
        create_folder(sess_dir, name)
    text = str(refused.value)
    assert "\n" not in text
    return text


def test_named_session_creates_its_folder_and_parents(tmp_path: Path) -> None:
    created = create_folder(tmp_path / "a" / "b", "mine 1.0")
    assert created == tmp_path / "a" / "b" / "mine 1.0" and list(created.iterdir()) == []


class Frozen(datetime):
    @classmethod
    def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
        moment = datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone.utc)
        return moment.astimezone(tz) if tz else moment.astimezone(timezone(timedelta(hours=9))).replace(tzinfo=None)


def test_sessions_of_one_second_get_separate_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "datetime", Frozen)
    created = [create_folder(tmp_path, None) for _ in range(30)]
    assert len(set(created)) == 30 and all(path.is_dir() and path.parent == tmp_path for path in created)
    assert all("".join(filter(str.isdigit, path.name)).startswith("20260102030405") for path in created)


def test_concurrent_sessions_get_separate_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "datetime", Frozen)
    with ThreadPoolExecutor(8) as pool:
        created = list(pool.map(lambda _: create_folder(tmp_path / "new", None), range(80)))
    assert len(set(created)) == 80 == len(list((tmp_path / "new").iterdir()))


@pytest.mark.parametrize("kind", ["empty folder", "full folder", "file"])
def test_existing_session_name_is_refused_and_unchanged(kind: str, tmp_path: Path) -> None:
    there = tmp_path / "mine"
    if kind == "file":
        there.write_text("precious")
    else:
        there.mkdir()
    if kind == "full folder":
        (there / "log.txt").write_text("precious")
    text = refusal(tmp_path, "mine")
    assert str(there) in text and "--session" in text and "--resume" in text
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    if kind != "empty folder":
        assert (there if kind == "file" else there / "log.txt").read_text() == "precious"


@pytest.mark.parametrize("name", ["", ".", "..", "../mine", "a/b", "/mine", "mine/", "a\0b", "./mine"])
def test_name_that_is_a_path_is_refused(name: str, tmp_path: Path) -> None:
    sess_dir = tmp_path / "sessions"
    assert repr(name) in refusal(sess_dir, name)
    assert list(tmp_path.rglob("*")) == []


@pytest.mark.parametrize("name", [None, "mine"])
@pytest.mark.parametrize("below", [".", "sessions"])
def test_path_that_is_a_file_is_refused(name: str | None, below: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    text = refusal(tmp_path / "file" / below, name)
    assert str(tmp_path / "file") in text and "--sess-dir" in text


def test_name_too_long_for_a_folder_is_refused(tmp_path: Path) -> None:
    assert "too long" in refusal(tmp_path, "x" * 300)


@pytest.mark.parametrize("sess_dir", ["a\0b", "\ud800"])
def test_invalid_folder_name_of_sess_dir_is_refused(sess_dir: str, tmp_path: Path) -> None:
    """A YAML file can contain both."""
    assert "--sess-dir" in refusal(tmp_path / sess_dir, None)


def test_session_creates_its_folders_and_returns_paths(folder: Path) -> None:
    opened = Session.open(folder, "seed: 1\n")
    opened.close()
    assert opened.name == "mine"
    assert {path.name for path in folder.iterdir()} >= {"checkpoint", "config.yaml", "log.txt"}
    assert (folder / "config.yaml").read_text() == "seed: 1\n"
    assert opened.latest() == folder / "checkpoint" / "latest.ckpt"
    assert opened.of_round("checkpoint", 3, 37500, "ckpt") == folder / "checkpoint" / "0003-37500.ckpt"
    assert opened.of_round("neighbours", 12, 7, "png") == folder / "neighbours" / "0012-00007.png"


def test_session_without_a_folder_does_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    nothing = Session(None)
    nothing.write_metrics({"round": 0})
    nothing.write_scalars({"Train/Loss": 1.0}, 0)
    assert nothing.latest() is None and nothing.of_round("checkpoint", 0, 0, "ckpt") is None and nothing.name == ""
    nothing.close()
    assert list(tmp_path.iterdir()) == []


def test_log_file_is_optional_and_closed_with_the_session(folder: Path) -> None:
    Session.open(folder, "", log_file=False, log_tfb=False).close()
    assert not (folder / "log.txt").exists()
    opened = Session.open(folder, "")
    logger().info("inside")
    opened.close()
    logger().info("afterwards")
    text = (folder / "log.txt").read_text()
    assert "inside" in text and "afterwards" not in text


@pytest.mark.parametrize("name", ["checkpoint", "neighbours", "log.txt", "config.yaml"])
def test_unwritable_session_is_refused(name: str, folder: Path) -> None:
    if "." in name:
        (folder / name).mkdir()
    else:
        (folder / name).write_text("in the way")
    before = list(logger().handlers)
    with pytest.raises(UsageError, match="--sess-dir") as refused:
        Session.open(folder, "seed: 1\n")
    assert str(folder) in str(refused.value)
    assert [h for h in logger().handlers if isinstance(h, logging.FileHandler) and h not in before] == []


def lines(folder: Path) -> list[dict[str, Any]]:
    def strict(word: str) -> float:
        raise AssertionError(f"{word} is no JSON")

    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line, parse_constant=strict) for line in text.splitlines()]


def test_metrics_are_json_lines_with_null_for_nonfinite_values(folder: Path) -> None:
    opened = Session(folder)
    opened.write_metrics({"round": 0, "epoch": 0, "loss": 0.1, "top1": None, "note": "é\n"})
    opened.write_metrics({"round": 0, "epoch": 1, "loss": float("nan"), "a": float("inf"), "b": float("-inf")})
    assert lines(folder) == [
        {"round": 0, "epoch": 0, "loss": 0.1, "top1": None, "note": "é\n"},
        {"round": 0, "epoch": 1, "loss": None, "a": None, "b": None},
    ]
    opened.close()


def test_metrics_are_on_disk_after_the_call(folder: Path) -> None:
    opened = Session(folder)
    for epoch in range(3):
        opened.write_metrics({"round": 0, "epoch": epoch})
        assert len(lines(folder)) == epoch + 1
    opened.close()


@pytest.mark.parametrize("start", [(0, 0), (0, 2), (1, 0), (1, 2), (2, 1), (9, 0)])
def test_resume_removes_the_records_of_repeated_epochs(start: tuple[int, int], folder: Path) -> None:
    opened = Session(folder)
    for round in range(3):
        for epoch in range(3):
            opened.write_metrics({"round": round, "epoch": epoch})
    opened.close()
    Session(folder, start=start).close()
    expected = [(r, e) for r in range(3) for e in range(3) if r < start[0] or (r == start[0] and e < start[1])]
    assert [(line["round"], line["epoch"]) for line in lines(folder)] == expected


@pytest.mark.parametrize(
    "rest", ['{"round": 0, "epo', "{", '{"round": 0}', "[]", "null", "\0\0\0", '{"round": null, "epoch": 0}']
)
def test_resume_removes_an_incomplete_line(rest: str, folder: Path) -> None:
    (folder / "metrics.jsonl").write_text('{"round": 0, "epoch": 0}\n' + rest)
    opened = Session(folder, start=(0, 1))
    opened.write_metrics({"round": 0, "epoch": 1})
    opened.close()
    assert [line["epoch"] for line in lines(folder)] == [0, 1]


def test_scalars_can_be_read_back_by_tag_step_and_folder(folder: Path) -> None:
    opened = Session(folder)
    opened.write_scalars({"ANs/Number": 0.0, "ANs/Consistency": None}, 0)
    for epoch in range(2):
        opened.write_scalars({"Train/Loss": 1.5 - epoch, "Train/Learning_Rate": 0.25}, epoch, (0, 0))
    opened.write_scalars({"Evaluate/best_acc": 0.5}, 0)
    opened.write_scalars({"ANs/Number": 12.0, "ANs/Consistency": 0.75}, 1)
    opened.write_scalars({"Train/Loss": 0.25, "Evaluate/Rank-1": 0.125}, 0, (1, 12))
    opened.close()
    tfboard = folder / "tfboard"
    assert sorted(path.name for path in tfboard.iterdir()) == ["0000-00000", "0001-00012", "global"]
    assert shown(tfboard / "global") == {
        "ANs/Number": [(0, 0.0), (1, 12.0)],
        "ANs/Consistency": [(1, 0.75)],
        "Evaluate/best_acc": [(0, 0.5)],
    }
    assert shown(tfboard / "0000-00000") == {
        "Train/Loss": [(0, 1.5), (1, 0.5)],
        "Train/Learning_Rate": [(0, 0.25), (1, 0.25)],
    }
    assert shown(tfboard / "0001-00012") == {"Train/Loss": [(0, 0.25)], "Evaluate/Rank-1": [(0, 0.125)]}


def test_scalars_are_on_disk_after_the_call(folder: Path) -> None:
    opened = Session(folder)
    opened.write_scalars({"Train/Loss": 0.5}, 0, (0, 0))
    assert shown(folder / "tfboard" / "0000-00000") == {"Train/Loss": [(0, 0.5)]}
    opened.close()


def test_no_scalars_are_written_without_tensorboard(folder: Path) -> None:
    opened = Session(folder, log_tfb=False)
    opened.write_scalars({"Train/Loss": 0.5}, 0)
    opened.close()
    assert not (folder / "tfboard").exists()


def some_rounds(opened: Session, rounds: range, first_epoch: int, value: float) -> None:
    for round in rounds:
        opened.write_scalars({"ANs/Number": value}, round)
        for epoch in range(first_epoch if round == rounds.start else 0, 3):
            opened.write_scalars({"Train/Loss": value}, epoch, (round, round))


def test_resumed_run_shows_no_tensorboard_point_twice(folder: Path) -> None:
    opened = Session(folder)
    some_rounds(opened, range(3), 0, 1.0)
    opened.close()
    for path in folder.rglob("*tfevents*"):  # as if written long ago: the name contains the time
        path.rename(path.with_name(re.sub(r"tfevents\.\d+", "tfevents.1000000000", path.name)))
    again = Session(folder, start=(1, 2))
    some_rounds(again, range(1, 3), 2, 2.0)
    again.close()
    tfboard = folder / "tfboard"
    assert shown(tfboard / "global") == {"ANs/Number": [(0, 1.0), (1, 2.0), (2, 2.0)]}
    assert shown(tfboard / "0000-00000") == {"Train/Loss": [(0, 1.0), (1, 1.0), (2, 1.0)]}
    assert shown(tfboard / "0001-00001") == {"Train/Loss": [(0, 1.0), (1, 1.0), (2, 2.0)]}
    assert shown(tfboard / "0002-00002") == {"Train/Loss": [(0, 2.0), (1, 2.0), (2, 2.0)]}


def test_resume_within_a_second_keeps_tensorboard_points(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 1_700_000_000.5)
    for epoch in range(2):
        opened = Session(folder, start=(0, epoch))
        opened.write_scalars({"Train/Loss": float(epoch)}, epoch, (0, 0))
        opened.close()
    assert shown(folder / "tfboard" / "0000-00000") == {"Train/Loss": [(0, 0.0), (1, 1.0)]}


def test_changed_config_is_kept_under_another_name(folder: Path) -> None:
    for text in ("one\n", "one\n", "two\n", "three\n", "three\n"):
        Session.open(folder, text).close()
    found = {path.name: path.read_text() for path in folder.glob("config*")}
    assert found == {"config.yaml": "three\n", "config.1.yaml": "one\n", "config.2.yaml": "two\n"}


def test_session_of_a_checkpoint_is_its_grandparent_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Session.open(folder, "").close()
    checkpoint = folder / "checkpoint" / "latest.ckpt"
    assert folder_of(checkpoint) == folder.resolve()
    monkeypatch.chdir(folder / "checkpoint")
    assert folder_of(Path("latest.ckpt")) == folder.resolve()


def test_checkpoint_outside_a_session_has_no_session(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    assert folder_of(tmp_path / "checkpoint" / "a.ckpt") is None  # no config.yaml
    (tmp_path / "config.yaml").write_text("")
    assert folder_of(tmp_path / "a.ckpt") is None
    (tmp_path / "other").mkdir()
    assert folder_of(tmp_path / "other" / "a.ckpt") is None


def test_session_folder_may_be_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    created = create_folder(Path("sessions"), None)
    opened = Session.open(created, "")
    opened.write_metrics({"round": 0, "epoch": 0})
    opened.close()
    (found,) = os.scandir(tmp_path / "sessions")
    assert lines(Path(found.path)) == [{"round": 0, "epoch": 0}]


def test_image_grid_is_logged_at_its_round_in_tensorboard(folder: Path) -> None:
    picture = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    run = Session(folder)
    run.write_picture("ANs/Neighbours", picture, 3)
    run.close()
    (found,) = ((event.step, value) for event in events(folder / "tfboard" / "global") for value in event.summary.value)
    step, value = found
    assert (step, value.tag, value.image.height, value.image.width) == (3, "ANs/Neighbours", 4, 6)
    shown_again = np.asarray(Image.open(io.BytesIO(value.image.encoded_image_string)).convert("RGB"))
    assert np.array_equal(shown_again, picture)


def test_projector_gets_rows_labels_and_thumbnails_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, tiles = np.linspace(0, 1, 10, dtype=np.float32).reshape(5, 2), np.zeros((5, 3, 4, 4), np.float32)
    for _ in range(2):
        run = Session(folder)
        run.write_projector(rows, ["a\tb", "c\nd", "e", "f", "<g>"], tiles)
        run.close()
    place = folder / "tfboard" / "global"
    config = (place / "projector_config.pbtxt").read_text(encoding="utf-8")
    assert config.count("embeddings {") == 1
    names = dict(re.findall(r'(\w+_path): "([^"]+)"', config))
    assert np.allclose(np.loadtxt(place / names["tensor_path"]), rows)
    assert (place / names["metadata_path"]).read_text(encoding="utf-8").splitlines() == ["a b", "c d", "e", "f", "<g>"]
    with Image.open(place / names["image_path"]) as sprite:
        assert sprite.size == (12, 12)
    assert capsys.readouterr() == ("", "")


def test_no_image_grid_without_session_or_tensorboard(folder: Path) -> None:
    for run in (Session(None), Session(folder, log_tfb=False)):
        run.write_picture("a", np.zeros((2, 2, 3), np.uint8), 0)
        run.write_projector(np.zeros((1, 2)), None, np.zeros((1, 3, 4, 4), np.float32))
        run.close()
    assert not (folder / "tfboard").exists()


def test_second_process_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    """The operating system releases the lock of a killed process."""
    hold = f"""
import sys
from pathlib import Path
from lib.session.run_folder import Session
session = Session(Path({str(tmp_path)!r}), log_tfb=False)
session.write_metrics({{"round": 0, "epoch": 0}})
print("held", flush=True)
sys.stdin.readline()
"""
    first = start(program=("-c", hold))
    read_until(first, "held")
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(UsageError, match="another process is training in this session"):
        Session(tmp_path, start=(0, 0))
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    kill_group(first)
    output_of(first)
    Session(tmp_path, log_tfb=False).close()
    Session(tmp_path, log_tfb=False).close()  # closing a session releases its lock


def test_temporary_files_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "latest.ckpt.77.part").write_bytes(b"half")
    Session(tmp_path, log_tfb=False).close()
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize("damage", [b"\x80", b"[" * 100_000, b'{"round": null, "epoch": 0}'])
def test_resume_removes_a_damaged_line_of_the_metrics(damage: bytes, tmp_path: Path) -> None:
    whole = b'{"round": 0, "epoch": 0}\n'
    (tmp_path / "metrics.jsonl").write_bytes(whole + damage + b"\n")
    Session(tmp_path, start=(1, 0), log_tfb=False).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == whole


def test_damaged_config_is_kept_under_another_name(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes(b"\x80")
    Session.open(tmp_path, "seed: 1\n", log_tfb=False).close()
    assert (tmp_path / "config.1.yaml").read_bytes() == b"\x80"
    assert (tmp_path / "config.yaml").read_text(encoding="utf-8") == "seed: 1\n"
