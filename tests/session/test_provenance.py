"""The recorded versions, commit and hardware of a run."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch

from lib.session import provenance


def test_versions_equal_those_of_the_packages() -> None:
    versions = provenance.versions()
    assert versions["python"] == platform.python_version()
    assert versions["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert versions["numpy"] == np.__version__
    assert versions["pillow"] == PIL.__version__
    assert all(re.match(r"\d+\.", number) for number in versions.values())


def test_versions_include_every_requirement() -> None:
    lines = (Path(__file__).parents[2] / "requirements.txt").read_text(encoding="utf-8").splitlines()
    names = {match[0].lower() for line in lines if (match := re.match(r"[A-Za-z][\w-]*", line))}
    assert names and names <= {name.lower() for name in provenance.versions()}


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    if not shutil.which("git"):
        pytest.skip("git is not installed")
    for name in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{name}_NAME", "A")
        monkeypatch.setenv(f"GIT_{name}_EMAIL", "a@example.org")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    folder = tmp_path / "code"
    (folder / "lib" / "session").mkdir(parents=True)
    (folder / "lib" / "session" / "provenance.py").write_text("")
    monkeypatch.setattr(provenance, "__file__", str(folder / "lib" / "session" / "provenance.py"))
    return folder


def git(folder: Path, *words: str) -> str:
    return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


def test_commit_and_digest_identify_the_code(repository: Path) -> None:
    git(repository, "init", "-q")
    git(repository, "add", ".")
    git(repository, "commit", "-q", "-m", "one")
    head = git(repository, "rev-parse", "HEAD")
    assert re.fullmatch(r"[0-9a-f]{40}", head)
    assert provenance.commit() == head
    (repository / "untracked").write_text("new")
    (repository / "lib" / "__pycache__").mkdir()
    (repository / "lib" / "__pycache__" / "environment.pyc").write_text("compiled")
    assert provenance.commit() == head
    found = [head]
    for content in ("changed", "changed again", "changed"):
        (repository / "lib" / "session" / "provenance.py").write_text(content)
        found.append(provenance.commit())
    assert all(re.fullmatch(head + r"\+[0-9a-f]{12}", name) for name in found[1:])
    assert found[1] == found[3] != found[2]
    (repository / "lib" / "new.py").write_text("imported by what was changed")
    found.append(provenance.commit())
    (repository / "lib" / "new.py").write_text("and changed itself")
    found.append(provenance.commit())
    (repository / "lib" / "session" / "provenance.py").unlink()
    assert len({*found, provenance.commit()}) == 6


def test_reading_the_commit_takes_no_git_lock(repository: Path) -> None:
    """A run that is killed at this moment would leave the lock, and git would refuse the next commit."""
    git(repository, "init", "-q")
    git(repository, "add", ".")
    git(repository, "commit", "-q", "-m", "one")
    index = repository / ".git" / "index"
    os.utime(
        repository / "lib" / "session" / "provenance.py", (0, 0)
    )  # git status would write the new time to its index
    before = index.read_bytes()
    assert provenance.commit() == git(repository, "rev-parse", "HEAD")
    assert index.read_bytes() == before


def test_commit_is_empty_outside_a_repository(repository: Path) -> None:
    assert provenance.commit() == ""


def test_commit_is_empty_in_a_repository_without_commits(repository: Path) -> None:
    git(repository, "init", "-q")
    assert provenance.commit() == ""


@pytest.mark.parametrize("error", [FileNotFoundError("git"), subprocess.TimeoutExpired("git", 10)])
def test_commit_is_empty_if_git_fails(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **more: object) -> None:
        raise error

    monkeypatch.setattr(subprocess, "run", fail)
    assert provenance.commit() == ""


def test_cpu_is_described_with_cores_and_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    text = provenance.hardware(torch.device("cpu"))
    assert platform.machine() in text and "12 cores" in text and "5 threads" in text


def test_gpu_is_described_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"Card {device.index}")
    assert provenance.hardware(torch.device("cuda", 1)) == "Card 1"
