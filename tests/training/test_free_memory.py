"""What memory can still be had: what the machine says, and its control groups."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lib.training import free_memory
from lib.training.free_memory import free

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(free_memory, "GROUPS", tmp_path / "list")
    monkeypatch.setattr(free_memory, "GROUPS_MOUNT", tmp_path / "mount")
    monkeypatch.setattr(free_memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=10_000))
    return tmp_path


def group(folder: Path, version: int, limit: str, used: int, cached: int = 0) -> None:
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    names = names if version == 1 else ("memory.max", "memory.current", "inactive_file")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {cached}\nfile 7\n")


def test_without_control_groups_the_machine_says_what_is_free(groups: Path) -> None:
    assert free(CPU) == 10_000


@pytest.mark.parametrize(("version", "line", "below"), [(2, "0::/a/b", ""), (1, "9:cpu,memory:/a/b", "memory")])
def test_the_least_limit_of_a_groups_and_those_above_holds(groups: Path, version: int, line: str, below: str) -> None:
    (groups / "list").write_text(f"3:cpuset:/c\n{line}\n")
    mount = groups / "mount" / below
    group(mount / "a" / "b", version, "9000", 1000)
    assert free(CPU) == 8000
    group(mount / "a", version, "6000", 4000, cached=500)
    assert free(CPU) == 2500
    group(mount / "a", version, "6000", 7000)
    assert free(CPU) == 0


def test_a_group_without_a_limit_or_out_of_sight_leaves_it_to_the_machine(groups: Path) -> None:
    (groups / "list").write_text("0::/outside/of/the/container\n")
    assert free(CPU) == 10_000
    group(groups / "mount", 2, "max", 3000)
    assert free(CPU) == 10_000
    group(groups / "mount", 2, "4000", 3000)
    assert free(CPU) == 1000


def test_on_a_gpu_the_driver_says_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (123, 456))
    assert free(GPU) == 123
