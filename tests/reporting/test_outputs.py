"""Errors of exports and the report at the end of a run."""

from __future__ import annotations

import logging
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lib.config.options import Options
from lib.distributed.signals import Stopped
from lib.errors import UsageError
from lib.reporting import export, outputs


def context_of(tmp_path: Path) -> Any:
    """A run that exports embeddings and a model."""
    options = Options(export_features=tmp_path / "f.npz", export_model=tmp_path / "m.safetensors")
    return SimpleNamespace(options=options, network=None, means_and_stds=(None, None))


def failing(error: BaseException) -> Any:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    return fail


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]


def test_failed_export_does_not_prevent_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    written = []
    monkeypatch.setattr(outputs, "_splits", lambda context: [])
    monkeypatch.setattr(export, "save_features", failing(UsageError("f.npz: no space")))
    monkeypatch.setattr(export, "save_model", lambda path, *args, **kwargs: written.append(path.name))
    with pytest.raises(UsageError, match=r"f\.npz: no space"):
        outputs.export_results(context_of(tmp_path), {}, None)
    assert written == ["m.safetensors"] and not errors(caplog)


def test_last_of_two_errors_is_raised_and_the_first_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(outputs, "_splits", lambda context: [])
    monkeypatch.setattr(export, "save_features", failing(UsageError("f.npz: no space")))
    monkeypatch.setattr(export, "save_model", failing(UsageError("m.safetensors: no space")))
    with pytest.raises(UsageError, match=r"m\.safetensors: no space"):
        outputs.export_results(context_of(tmp_path), {}, None)
    assert errors(caplog) == ["f.npz: no space"]


def test_error_of_an_export_is_shown_if_a_signal_stops_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(outputs, "_splits", lambda context: [])
    monkeypatch.setattr(export, "save_features", failing(UsageError("f.npz: no space")))
    monkeypatch.setattr(export, "save_model", failing(Stopped(signal.SIGTERM)))
    with pytest.raises(Stopped):
        outputs.export_results(context_of(tmp_path), {}, None)
    assert errors(caplog) == ["f.npz: no space"]
