"""The order of the rooms in ``lib/``, checked against every import."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from lib import ROOMS

ROOT = Path(__file__).parent.parent
MODULES = sorted(path for path in (ROOT / "lib").rglob("*.py") if path.stem != "__init__")


def imported(path: Path) -> set[str]:
    """Every module or module member that a file imports, by dotted name."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room_of(name: str) -> str:
    """Room of a module by its dotted name, ``lib.ROOM`` or ``lib.ROOM.FILE``."""
    return name.split(".")[1]


def test_every_module_is_in_a_room() -> None:
    assert {path.relative_to(ROOT / "lib").parts[0].removesuffix(".py") for path in MODULES} == set(ROOMS)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT / "lib")))
def test_rooms_import_only_from_those_before_them(path: Path) -> None:
    own = path.relative_to(ROOT / "lib").parts[0].removesuffix(".py")
    used = {room_of(name) for name in imported(path) if name.startswith("lib.")}
    later = [room for room in used if ROOMS.index(room) > ROOMS.index(own)]
    assert not later, f"{path}: {own} imports from {later}"


@pytest.mark.parametrize("folder", ["models", "datasets"])
def test_models_and_datasets_never_import_lib(folder: str) -> None:
    for path in (ROOT / folder).glob("*.py"):
        assert not {name for name in imported(path) if name.split(".")[0] in ("lib", "main")}, path


def test_only_tests_import_main() -> None:
    for path in [*MODULES, *(ROOT / "models").glob("*.py"), *(ROOT / "datasets").glob("*.py")]:
        assert "main" not in {name.split(".")[0] for name in imported(path)}, path


def test_modules_do_no_work_at_import() -> None:
    """The top level of a file has only imports, definitions, assignments and docstrings, except in main.py."""
    allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    for path in [*MODULES, *(ROOT / "models").glob("*.py"), *(ROOT / "datasets").glob("*.py")]:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            types = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
            assert text or types or isinstance(node, allowed), f"{path}:{node.lineno}"


def test_top_level_has_the_documented_files_and_folders() -> None:
    asked = "main.py configs models lib datasets sessions requirements.yaml README.md LICENSE tests".split()
    assert not [name for name in asked if not (ROOT / name).exists()]
