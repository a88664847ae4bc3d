"""The layering that README draws, checked against every import."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = sorted(path for path in (ROOT / "lib").glob("*.py") if path.stem != "__init__")


def drawn_layers() -> dict[str, int]:
    """Module of lib/ -> its layer, from the README's table."""
    rows = re.findall(r"^\| (\d) \| (.+?) \|", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    return {name: int(layer) for layer, names in rows for name in re.findall(r"`(\w+)`", names)}


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


def test_the_readme_places_every_module_of_lib_once() -> None:
    assert sorted(drawn_layers()) == [path.stem for path in MODULES]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_imports_in_lib_point_down_only(path: Path) -> None:
    layers = drawn_layers()
    used = {name.split(".")[1] for name in imported(path) if name.startswith("lib.")}
    upward = {name for name in used if layers[name] >= layers[path.stem]}
    assert not upward, f"lib/{path.name} (layer {layers[path.stem]}) imports {upward} of its own layer or above"


@pytest.mark.parametrize("folder", ["models", "datasets"])
def test_networks_and_data_never_import_lib(folder: str) -> None:
    for path in (ROOT / folder).glob("*.py"):
        assert not {name for name in imported(path) if name.split(".")[0] in ("lib", "main")}, path


def test_nothing_imports_main_but_the_tests() -> None:
    for path in [*MODULES, *(ROOT / "models").glob("*.py"), *(ROOT / "datasets").glob("*.py")]:
        assert "main" not in {name.split(".")[0] for name in imported(path)}, path


def test_modules_do_no_work_at_import() -> None:
    """At the top of a file: imports, definitions, assignments, docstrings; only main.py may start something."""
    allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    for path in [*MODULES, *(ROOT / "models").glob("*.py"), *(ROOT / "datasets").glob("*.py")]:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            types = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
            assert text or types or isinstance(node, allowed), f"{path}:{node.lineno}"


def test_the_top_level_is_what_the_owner_asked_for() -> None:
    asked = "main.py configs models lib datasets sessions requirements.yaml README.md LICENSE tests".split()
    assert not [name for name in asked if not (ROOT / name).exists()]
