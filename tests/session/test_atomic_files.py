"""Atomic writes of single files and of several files together."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lib.errors import UsageError
from lib.session import atomic_files


def test_several_files_are_written_all_or_none(tmp_path: Path) -> None:
    with atomic_files.new_files(tmp_path / "a", tmp_path / "b") as (one, other):
        one.write(b"1")
        other.write(b"2")
        assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()
    assert [(tmp_path / name).read_bytes() for name in "ab"] == [b"1", b"2"]
    with pytest.raises(ZeroDivisionError), atomic_files.new_files(tmp_path / "c", tmp_path / "d"):
        raise ZeroDivisionError
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_failure_of_the_last_file_removes_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[int] = []

    def full(descriptor: int) -> None:
        done.append(descriptor)
        if len(done) == 3:  # the second file; the fsync of the folder comes between
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UsageError, match="No space left"), atomic_files.new_files(tmp_path / "a", tmp_path / "b"):
        pass
    assert len(done) == 3 and list(tmp_path.iterdir()) == []
