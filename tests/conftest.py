"""What every test gets."""

from __future__ import annotations

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
    """What trains in several processes is marked so."""
    for item in items:
        if "team" in getattr(item, "fixturenames", ()):
            item.add_marker("distributed")


@pytest.fixture(autouse=True)
def log_of_its_own() -> Iterator[None]:
    """A log of its own: what one test lets the program say does not show in the next.

    A fixture of a module may have started the log, which ends propagation. Newer versions of pytest then add their
    handlers to this logger, too, and a test that turns propagation on would see each message twice.
    """
    log = logger()
    before = [handler for handler in log.handlers if type(handler).__module__ != "_pytest.logging"], log.level
    log.handlers.clear()
    log.propagate = True
    yield
    log.handlers[:], log.propagate = before[0], True
    log.setLevel(before[1])


@pytest.fixture(autouse=True)
def no_process_left() -> Iterator[None]:
    """What a failed test leaves running would slow the next ones down, and its open pipes would fail one of them."""
    yield
    runs.end_started()


@pytest.fixture(autouse=True)
def no_remembered_files(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The user's cache folder stays out of the tests."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small photographs of many sizes, in three classes."""
    folder = tmp_path_factory.mktemp("photos")
    runs.save_photos(folder)
    return folder


@pytest.fixture(scope="session", params=[2, 3, 4])
def team(request: pytest.FixtureRequest) -> Iterator[Team]:
    """Two processes, three and four: with even numbers two parts visit each other at the same time."""
    team = Team(request.param)
    yield team
    team.close()
