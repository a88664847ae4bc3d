"""The network for other programs, loaded by ``torch.hub``; docs/using.md has examples.

This repository's packages have common names, such as ``datasets``. They are loaded under a private name here, so that
a program's own packages of these names still work: a loader changes the names in the import statements.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import pathlib
import sys
import types
import typing
import zlib

if typing.TYPE_CHECKING:
    from lib.reporting.encoder import Encoder

dependencies = ["torch", "torchvision", "numpy", "PIL", "yaml", "pydantic", "safetensors", "tqdm"]

_ROOT = pathlib.Path(__file__).resolve().parent
_PACKAGES = ("datasets", "lib", "models")
_PRIVATE = f"_and_{zlib.crc32(os.fsencode(_ROOT)):08x}"
"""Name of the private package that contains those of this repository; different for every clone."""


def and_encoder(
    weights: str | os.PathLike[str] | None = None,
    *,
    network: str | None = None,
    low_dim: int | None = None,
    resize: int | tuple[int, int] | None = None,
    size: int | tuple[int, int] | None = None,
    means: tuple[float, float, float] | None = None,
    stds: tuple[float, float, float] | None = None,
) -> Encoder:
    """An encoder: a ``torch.nn.Module`` from images (B, 3, H, W) to unit-length embeddings (B, D), in evaluation mode.

    ``encoder.transform`` makes a tensor (3, H, W) of a PIL image, ``encoder.stages`` returns feature maps by name, and
    ``encoder.embed`` takes a list of files, PIL images or arrays.

    Args:
        weights: a .safetensors file of ``--export-model``, with its .yaml next to it; a session folder or a checkpoint
            in one; None: random weights.
        network: name of the backbone, ``resnet18`` if there are no weights.
        low_dim: D, 128 if there are no weights.
        resize, size, means, stds: the preprocessing, as the options of these names.

    The defaults of all but ``weights`` are the values that belong to the weights.

    Raises:
        ValueError: the weights or a value cannot be used. The message is one sentence.
    """
    given = {
        "network": network,
        "low_dim": low_dim,
        "resize": resize,
        "size": size,
        "means": means,
        "stds": stds,
    }
    with _not_on_path():
        encoder: Encoder = _module("lib.reporting.encoder").load(
            None if weights is None else os.fspath(weights),
            {name: value for name, value in given.items() if value is not None},
        )
    return encoder


@contextlib.contextmanager
def _not_on_path() -> typing.Iterator[None]:
    """Removes this folder, which ``torch.hub`` has added, from ``sys.path``.

    Otherwise a package that imports another ``datasets`` would find the one of this repository.
    """
    before = list(sys.path)
    sys.path[:] = [entry for entry in before if not entry or pathlib.Path(entry).resolve() != _ROOT]
    try:
        yield
    finally:
        sys.path[:] = before


def _module(name: str) -> typing.Any:
    """A module of this repository, under its private name."""
    if _PRIVATE not in sys.modules:
        package = types.ModuleType(_PRIVATE)
        package.__path__ = []
        sys.modules[_PRIVATE] = package
        sys.meta_path.insert(0, _Finder())  # Python's own finder would find the files, too
    return importlib.import_module(f"{_PRIVATE}.{name}")


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the modules below the private package."""

    def find_spec(
        self, fullname: str, path: typing.Any, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not fullname.startswith(f"{_PRIVATE}."):
            return None
        place = _ROOT.joinpath(*fullname.split(".")[1:])
        file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
        if not file.is_file():
            return None
        return importlib.util.spec_from_file_location(fullname, file, loader=_Loader(fullname, str(file)))


class _Loader(importlib.machinery.SourceFileLoader):
    """Compiles a module whose imports of this repository's packages have the private name; never cached on disk."""

    def get_code(self, fullname: str) -> types.CodeType:
        path = self.get_filename(fullname)
        tree = _Renaming().visit(ast.parse(self.get_data(path), path))
        code: types.CodeType = compile(ast.fix_missing_locations(tree), path, "exec", dont_inherit=True)
        return code


class _Renaming(ast.NodeTransformer):
    """Changes ``from lib.errors import E`` and ``import datasets``, also within functions."""

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.ImportFrom:
        if node.module and node.module.partition(".")[0] in _PACKAGES:
            node.module = f"{_PRIVATE}.{node.module}"
        return node

    def visit_Import(self, node: ast.Import) -> ast.Import:
        for alias in node.names:
            if alias.name in _PACKAGES:
                alias.name, alias.asname = f"{_PRIVATE}.{alias.name}", alias.asname or alias.name
        return node
