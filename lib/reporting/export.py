"""Exports of embeddings and the network; ``table`` has the third export. Existing files are never overwritten.

Notation: B batch size, H x W pixels, N samples, D embedding size.
"""

from __future__ import annotations

import copy
import importlib
import io
import logging
import shlex
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import yaml

from datasets import ImageSet
from lib.config.options import Options, height_and_width
from lib.errors import UsageError
from lib.evaluation.features import embedder
from lib.session.atomic_files import check_ending, check_place, new_files, reason
from lib.session.console import SUMMARY, logger

Colour = tuple[float, float, float]
EXAMPLE = 64
"""Minimum edge of the example input, in pixels. If a map shrinks to 1, the exporter treats its size as a constant."""
USE = ("network", "low_dim", "head", "embed", "resize", "size", "means", "stds", "npc_temperature")
"""The options that are needed to use an exported network."""


@dataclass(frozen=True)
class Split:
    """A split to export: ``train``, ``val`` (held out) or ``test``, its N images, and their embeddings (N, D)."""

    name: str
    images: ImageSet
    embeddings: np.ndarray


def check(options: Options) -> None:
    """Checks the export options before anything is loaded or trained.

    Raises:
        UsageError: a file name has the wrong extension, a file exists or cannot be written, or packages are missing.
    """
    table = options.export_table
    if options.export_thumbnails and (table is None or table.suffix.lower() != ".parquet"):
        raise UsageError("--export-thumbnails: needs --export-table with a .parquet file, which can contain images")
    if path := options.export_features:
        check_ending("--export-features", path, (".npz",))
        check_place(path)
    if path := options.export_model:
        check_ending("--export-model", path, (".safetensors", ".onnx"))
        for place in (path, _configuration(path)):
            check_place(place)
        if path.suffix.lower() == ".onnx":
            for package in ("onnx", "onnxscript"):
                _check_package(f"--export-model {path}", package, "pip install -r requirements-onnx.txt")
    if table:
        check_ending("--export-table", table, (".parquet", ".csv"))
        check_place(table)
        if table.suffix.lower() == ".parquet":
            advice = "pip install -r requirements-parquet.txt, or name a .csv file"
            _check_package(f"--export-table {table}", "pyarrow", advice)


def _check_package(option: str, package: str, advice: str) -> None:
    try:
        importlib.import_module("pyarrow.parquet" if package == "pyarrow" else package)
    except Exception as error:  # incompatible versions and broken installations can raise any error
        raise UsageError(
            f"{option}: needs the package {package}, which cannot be imported ({reason(error)}); run {advice}"
        ) from None


def save_features(path: Path, splits: Sequence[Split]) -> None:
    """Writes the embeddings of splits to an ``.npz`` file for ``np.load(path, allow_pickle=False)``.

    Arrays of each split: ``<name>_embeddings`` float32 (N, D); ``<name>_indices`` int64 (N,), the index of each image
    in the data set; if available, ``<name>_labels`` int64 (N,) and ``<name>_names`` (N,). ``classes`` contains the
    class names of the first split, if there are any.

    Raises:
        UsageError: the file exists or cannot be written.
    """
    arrays: dict[str, Any] = {}
    for split in splits:
        images = split.images
        arrays[f"{split.name}_embeddings"] = split.embeddings
        arrays[f"{split.name}_indices"] = images.indices.astype(np.int64)
        if images.labels is not None:
            arrays[f"{split.name}_labels"] = np.asarray(images.labels, np.int64)
        if images.names is not None:
            arrays[f"{split.name}_names"] = np.array(list(images.names), np.str_)
    if classes := splits[0].images.classes:
        arrays["classes"] = np.array(list(classes), np.str_)
    with new_files(path) as (file,):
        np.savez(file, **arrays)
    counts = ", ".join(f"{len(split.images)} {split.name}" for split in splits)
    report_file("embeddings", path, f"{counts}, embedding size {splits[0].embeddings.shape[1]}")


def save_model(path: Path, network: torch.nn.Module, options: Options, *, means: Colour, stds: Colour) -> None:
    """Writes the network, and next to it ``<stem>.yaml`` with the options that are needed to use it.

    ``.safetensors``: parameters and buffers by name, with ``network`` and ``low_dim`` as metadata. ``.onnx``:
    ``images`` (B, 3, H, W) -> ``embeddings`` (B, D), or the features of ``--embed``, including the weights, for any B
    and any H and W that the network accepts: only the size of the options if it was built for one size, like vision
    transformers.

    Args:
        path: the file; its extension selects the format.
        network: is not modified.
        options: options that the network was built and trained with.
        means, stds: channel means and standard deviations that its images are normalised with.

    Raises:
        UsageError: a file exists or cannot be written, or PyTorch's ONNX exporter fails.
    """
    content = _onnx(network, options) if path.suffix.lower() == ".onnx" else _safetensors(network, options)
    written = options.model_copy(update={"means": means, "stds": stds})
    text = _header(path) + yaml.safe_dump(
        written.model_dump(mode="json", include=set(USE)), sort_keys=False, default_flow_style=None
    )
    with new_files(_configuration(path), path) as (configuration, model):
        configuration.write(text.encode("utf-8"))
        model.write(content)
    stage = "" if options.embed == "fc" else f", for --embed {options.embed}"
    report_file("model", path, f"{options.network}, embedding size {options.low_dim}{stage}")
    report_file("options of the model", _configuration(path), "for --cfgs")


def _safetensors(network: torch.nn.Module, options: Options) -> bytes:
    tensors = {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}
    metadata = {"format": "pt", "network": options.network, "low_dim": str(options.low_dim)}
    return safetensors.torch.save(tensors, metadata)


class _AdaptiveAveragePool(torch.nn.Module):
    """``AdaptiveAvgPool2d`` as two matrix products, with matrices computed from the size of the map at run time.

    The ONNX exporter would fix the original module to the size of the map at export.

    Args:
        grid: edge g of the output.
    """

    def __init__(self, grid: int) -> None:
        super().__init__()
        self._grid = grid

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """(B, C, h, w) -> (B, C, g, g)."""
        return self._averages(maps.shape[2]) @ maps @ self._averages(maps.shape[3]).t()

    def _averages(self, edge: int) -> torch.Tensor:
        """(g, edge): row i averages the positions from floor(i edge / g) up to ceil((i + 1) edge / g)."""
        cell = torch.arange(self._grid, dtype=torch.float32)[:, None]  # float, as ONNX has no Floor for integers
        position = torch.arange(edge, dtype=torch.float32)
        first, end = torch.floor(cell * edge / self._grid), torch.ceil((cell + 1) * edge / self._grid)
        inside = ((position >= first) & (position < end)).float()
        return inside / inside.sum(dim=1, keepdim=True)


def _with_any_size(network: torch.nn.Module) -> torch.nn.Module:
    """A copy on the CPU in evaluation mode, whose export accepts all image sizes that the network accepts."""
    network = copy.deepcopy(network).cpu().eval()
    for name, module in list(network.named_modules()):
        if isinstance(module, torch.nn.AdaptiveAvgPool2d) and isinstance(grid := module.output_size, int) and grid > 1:
            network.set_submodule(name, _AdaptiveAveragePool(grid))
    return network


def _onnx(network: torch.nn.Module, options: Options) -> bytes:
    """The network as an ONNX file. Raises UsageError if the exporter fails."""
    height, width = height_and_width(options.size)
    sizes = {0: torch.export.Dim("batch")}
    if not getattr(network, "has_fixed_size", False):
        height, width = max(EXAMPLE, height), max(EXAMPLE, width)
        sizes |= {2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    try:
        with _quiet_exporter():
            program = torch.onnx.export(
                _with_any_size(embedder(network, options.embed)),
                (torch.zeros(2, 3, height, width),),  # the exporter would treat a batch size of 1 as a constant
                dynamo=True,
                input_names=["images"],
                output_names=["embeddings"],
                dynamic_shapes=(sizes,),
                optimize=True,
            )
            assert program is not None
            shape = program.model_proto.graph.input[0].type.tensor_type.shape.dim
            if fixed := [axis for axis in sizes if not shape[axis].dim_param]:  # Dim.AUTO may make them constant
                raise ValueError(f"axes {fixed} of the images became constants")
            content: bytes = program.model_proto.SerializeToString()
    except Exception as error:  # the exporter can raise any error
        cause: BaseException = error
        while cause.__cause__:
            cause = cause.__cause__
        raise UsageError(
            f"--export-model: the ONNX exporter of PyTorch {torch.__version__} failed: {reason(cause)}; try other "
            "versions of the packages in requirements-onnx.txt, or export to a .safetensors file"
        ) from None
    return content


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Suppresses the exporter's warnings and output, which address developers of PyTorch."""
    guards = logging.getLogger("torch.fx.experimental.symbolic_shapes")  # warns about specialised sizes
    level = guards.level
    guards.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            for category in (DeprecationWarning, FutureWarning):
                warnings.simplefilter("ignore", category)
            yield
    finally:
        guards.setLevel(level)


def _configuration(path: Path) -> Path:
    return path.with_suffix(".yaml")


def _header(path: Path) -> str:
    """The comment at the top of a model's option file."""
    model, options = (_one_line(shlex.quote(str(place))) for place in (path, _configuration(path)))
    if path.suffix.lower() == ".onnx":
        use = f"{model}, images (B, 3, H, W) -> embeddings (B, D), for onnxruntime and the like"
    else:
        use = f"python main.py --cfgs {options} --resume {model} --test-only --dataset NAME --data-root DIR"
    return (
        "# Options to use a network trained by Anchor Neighbourhood Discovery:\n"
        f"#   {use}\n"
        "# Preprocessing: RGB in [0, 1]; resize to resize; centre crop to size; subtract means; divide by stds.\n"
        "# The embeddings have unit length.\n"
    )


def _one_line(text: str) -> str:
    """Text for a one-line comment: unprintable characters are replaced by question marks."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def report_file(what: str, path: Path, content: str) -> None:
    """Logs a written file, with its size."""
    logger().info("%s: %s (%s; %s bytes)", what, path, content, f"{path.stat().st_size:,}", extra=SUMMARY)
