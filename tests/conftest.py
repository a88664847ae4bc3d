"""Fixtures of all tests."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # read by PyTorch when it is imported: workers share the cores
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest

import runs
from lib.session.console import logger
from team import Team


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests that use several processes."""
    for item in items:
        if "team" in getattr(item, "fixturenames", ()):
            item.add_marker("distributed")


@pytest.fixture(autouse=True)
def separate_log() -> Iterator[None]:
    """Resets the program's log, so that one test does not affect the next.

    A fixture of a module or of the whole session may have started the log, which sets its level to INFO and ends
    propagation. Each test begins with the level of a log that was not started. Newer versions of pytest also add their
    handlers to a log without propagation, and a test that turns propagation on would see each message twice.
    """
    log = logger()
    before = [handler for handler in log.handlers if type(handler).__module__ != "_pytest.logging"], log.level
    log.handlers.clear()
    log.setLevel(logging.NOTSET)
    log.propagate = True
    yield
    log.handlers[:], log.propagate = before[0], True
    log.setLevel(before[1])


@pytest.fixture(autouse=True)
def end_processes() -> Iterator[None]:
    """Ends processes that a failed test left: they would slow down later tests, and their open pipes could fail one."""
    yield
    runs.end_started()


@pytest.fixture(autouse=True)
def separate_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Gives each test its own cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small images of many sizes in three classes."""
    folder = tmp_path_factory.mktemp("photos")
    runs.save_photos(folder)
    return folder


@pytest.fixture(scope="session", params=[2, 3, 4])
def team(request: pytest.FixtureRequest) -> Iterator[Team]:
    """Two, three and four processes. With an even number, two shards exchange rows at the same time."""
    team = Team(request.param)
    yield team
    team.close()
