"""When checkpoints are written, and the copy of the best one in host memory until then."""

from __future__ import annotations

import errno
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from lib.distributed.signals import Stopped, StopSignals
from lib.session.run_folder import Session
from lib.training import checkpoint, recorder
from lib.training.trainer import Trainer
from runs import equal
from training.test_trainer import Judge, Watched, state_of, trainer_of

ACCURACIES = [0.1, 0.2, 0.5, 0.3, 0.4, 0.6]  # the third epoch is the best of the first five
"""Of six epochs: the third is the best of the first five."""


class Clock:
    """Seconds that pass only when an epoch is evaluated."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, per_epoch: float) -> None:
        self.now, self.per_epoch = 1000.0, per_epoch
        monkeypatch.setattr(recorder.time, "monotonic", lambda: self.now)


def run_of(session: Session, accuracies: list[float], clock: Clock | None = None, **changes: Any) -> Trainer:
    """One round of as many epochs as there are accuracies."""
    given = iter(accuracies)

    def judged() -> float:
        if clock:
            clock.now += clock.per_epoch
        return next(given)

    named = {"max_round": 1, "max_epoch": len(accuracies), "evaluate": Judge(judged)} | changes
    return trainer_of(state_of(), session=session, **named)


def load(folder: Path, name: str) -> dict[str, Any]:
    return torch.load(folder / "checkpoint" / name, weights_only=True)  # type: ignore[no-any-return]


def epochs_written(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """The ``epoch`` of every checkpoint that the run writes, by file name."""
    written: dict[str, list[int]] = {"latest.ckpt": [], "0000-00000.ckpt": []}
    save = checkpoint.save

    def watched(content: dict[str, Any], path: Path) -> None:
        written[path.name].append(content["epoch"])
        save(content, path)

    monkeypatch.setattr(checkpoint, "save", watched)
    trainer.fit()
    return written


@pytest.mark.parametrize(
    ("interval", "latest", "best"),
    [
        (0, [1, 2, 3, 4, 5, 6], [1, 2, 3, 6]),
        (2, [1, 2, 3, 4, 5, 6], [1, 2, 3, 6]),
        (3, [1, 3, 5, 6], [1, 3, 6]),
        (30, [1, 6], [1, 6]),
    ],
)
def test_checkpoints_follow_the_interval_and_end_of_round(
    interval: float, latest: list[int], best: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch, per_epoch=2)
    session = Session(tmp_path, log_tfb=False)
    trainer = run_of(session, ACCURACIES, clock, ckpt_interval=interval)
    assert epochs_written(trainer, monkeypatch) == {"latest.ckpt": latest, "0000-00000.ckpt": best}
    session.close()


@pytest.mark.parametrize("keep", ["all", "best", "last"])
def test_best_epoch_saved_later_equals_one_saved_at_once(keep: str, tmp_path: Path) -> None:
    """The best epoch may be written several epochs later, from its copy in memory."""
    for interval in (0, 1000):
        session = new_session(tmp_path / str(interval))
        run_of(session, ACCURACIES[:5], ckpt_interval=interval, keep=keep).fit()
        session.close()
    names = {path.name for path in (tmp_path / "0" / "checkpoint").iterdir()}
    assert names == {path.name for path in (tmp_path / "1000" / "checkpoint").iterdir()}
    assert ("0000-00000.ckpt" in names) == (keep != "last")
    for name in names - {"previous.ckpt"}:
        at_once, later = (load(tmp_path / folder, name) for folder in ("0", "1000"))
        assert equal({**at_once, "session": ""}, {**later, "session": ""}), name
    if keep != "last":
        assert load(tmp_path / "1000", "0000-00000.ckpt")["epoch"] == 3
        assert load(tmp_path / "1000", "latest.ckpt")["epoch"] == 5


def new_session(folder: Path) -> Session:
    folder.mkdir()
    return Session(folder, log_tfb=False)


def test_stop_signal_saves_latest_and_best_checkpoints(tmp_path: Path) -> None:
    """The signal comes in the evaluation of the fifth epoch, while a copy of the third is in memory."""
    given = iter(ACCURACIES)

    def judged() -> float:
        accuracy = next(given)
        if accuracy == 0.4:
            signal.raise_signal(signal.SIGTERM)
        return accuracy

    stopped, whole = (new_session(tmp_path / name) for name in ("stopped", "whole"))
    signals = StopSignals()
    run = run_of(stopped, ACCURACIES, ckpt_interval=1000, evaluate=Judge(judged), signals=signals)
    with pytest.raises(Stopped), signals:
        run.fit()
    run_of(whole, ACCURACIES[:4], max_epoch=4).fit()
    best, expected = (load(tmp_path / folder, "0000-00000.ckpt") for folder in ("stopped", "whole"))
    assert best["epoch"] == 3 and equal({**best, "session": ""}, {**expected, "session": ""})
    latest = load(tmp_path / "stopped", "latest.ckpt")
    assert (latest["epoch"], latest["step"]) == (4, 6)  # trained to the end of the fifth epoch, and not evaluated
    stopped.close()
    whole.close()


def test_step_checkpoint_also_saves_the_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session(tmp_path, log_tfb=False)
    trainer = run_of(session, [0.1, 0.5, 0.3], ckpt_interval=1000, ckpt_every=4)
    assert epochs_written(trainer, monkeypatch)["0000-00000.ckpt"] == [1, 2]
    session.close()


def test_best_checkpoint_is_saved_before_latest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run killed between the two saves would resume after the best epoch and never write it."""
    names: list[str] = []
    monkeypatch.setattr(checkpoint, "save", lambda content, path: names.append(path.name))
    session = Session(tmp_path, log_tfb=False)
    run_of(session, [0.1, 0.5, 0.3], ckpt_interval=1000).fit()
    assert names == ["0000-00000.ckpt", "latest.ckpt"] * 2
    session.close()


def test_failed_saves_are_retried_and_best_stays_correct(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = checkpoint.save
    tried: list[tuple[str, int]] = []
    clock = Clock(monkeypatch, per_epoch=20)

    def fails_until_the_fifth_epoch(content: dict[str, Any], path: Path) -> None:
        tried.append((path.name, content["epoch"]))
        if 1050 < clock.now < 1090:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(content, path)

    monkeypatch.setattr(checkpoint, "save", fails_until_the_fifth_epoch)
    session = Session(tmp_path, log_tfb=False)
    run_of(session, ACCURACIES[:5], clock, ckpt_interval=30).fit()
    assert [entry for entry in tried if entry[0] == "latest.ckpt"] == [("latest.ckpt", n) for n in (1, 3, 4, 5)]
    whole = new_session(tmp_path / "whole")
    monkeypatch.setattr(checkpoint, "save", save)
    run_of(whole, ACCURACIES[:5]).fit()
    best, expected = (load(folder, "0000-00000.ckpt") for folder in (tmp_path, tmp_path / "whole"))
    assert best["epoch"] == 3 and equal({**best, "session": ""}, {**expected, "session": ""})
    session.close()
    whole.close()


def test_host_copy_is_independent_and_reuses_memory() -> None:
    state = state_of()
    content = state.checkpoint("net", "")
    kept = checkpoint.copy_to_host(content)
    assert equal(kept, content)

    def storages(part: dict[str, Any]) -> set[int]:
        return {value.data_ptr() for name in ("net", "npc") for value in part[name].values()}

    assert not storages(kept) & storages(content)
    with torch.no_grad():
        state.network.linear.weight.add_(1)
    assert not equal(kept, state.checkpoint("net", ""))
    again = checkpoint.copy_to_host(state.checkpoint("net", ""), kept)
    assert equal(again, state.checkpoint("net", "")) and storages(again) == storages(kept)


def test_ranks_other_than_0_keep_and_write_nothing() -> None:
    trainer = run_of(Session(None), ACCURACIES, ckpt_interval=1000)
    trainer.fit()
    assert isinstance(trainer.recorder, Watched) and trainer.recorder._host_copy is None
