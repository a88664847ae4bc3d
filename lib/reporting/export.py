"""What leaves the program for others to use: the embeddings of a data set, and the network.

Nothing is overwritten. Letters: B batch, H x W pixels, N samples, D embedding.
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

from lib.config.options import Options, height_and_width
from lib.errors import UsageError
from lib.evaluation.features import Batches, extract
from lib.session.atomic_files import check_ending, check_place, new_files, reason
from lib.session.console import SUMMARY, logger

Colour = tuple[float, float, float]
EXAMPLE = 64
"""Pixels of the example that is exported, at least; the exporter takes an edge that shrinks to 1 for a constant."""
USE = ("network", "low_dim", "resize", "size", "means", "stds", "npc_temperature")
"""The options that it takes to use a network."""


@dataclass(frozen=True)
class Part:
    """A split that is exported.

    Attributes:
        name: ``train``, ``val`` (held out of it) or ``test``; the names of its arrays open with it.
        batches: its N samples, with the test transform.
        labels: (N,), or None where nobody said.
        names: N file names relative to the data root, or None where images have none.
        indices: (N,) where each image stands in the data set's split; None: in order.
    """

    name: str
    batches: Batches
    labels: np.ndarray | None
    names: Sequence[str] | None
    indices: np.ndarray | None = None


def check(options: Options) -> None:
    """Whether what is asked for can be exported; to be called before anything is trained.

    Raises:
        UsageError: an ending says nothing, a place is taken or cannot be written to, or packages are missing.
    """
    if path := options.export_features:
        check_ending("--export-features", path, (".npz",))
        check_place(path)
    if path := options.export_model:
        check_ending("--export-model", path, (".safetensors", ".onnx"))
        for place in (path, _configuration(path)):
            check_place(place)
        if path.suffix.lower() == ".onnx":
            _check_packages(path)


def _check_packages(path: Path) -> None:
    for name in ("onnx", "onnxscript"):
        try:
            importlib.import_module(name)
        except Exception as error:  # versions that do not fit together raise nearly anything
            raise UsageError(
                f"--export-model {path}: needs the package {name}, which cannot be imported ({reason(error)}); "
                "pip install -r requirements-onnx.txt"
            ) from None


def save_features(path: Path, network: torch.nn.Module, parts: Sequence[Part], *, classes: Sequence[str]) -> None:
    """Writes the embeddings of splits as ``.npz``, which ``np.load(path, allow_pickle=False)`` reads.

    For each part: ``<name>_embeddings`` float32 (N, D), ``<name>_indices`` int64 (N,), where each image
    stands in the data set, and where there are any ``<name>_labels`` int64 (N,) and ``<name>_names`` (N,); ``classes``
    holds the names of the classes, where there are any.

    Args:
        path: the file.
        network: images to embeddings; its mode is left as it was.
        parts: the splits.
        classes: names of the classes, may be empty.

    Raises:
        UsageError: the file exists or cannot be written.
    """
    arrays: dict[str, Any] = {}
    for part in parts:
        embeddings = extract(network, part.batches, f"{part.name} embeddings").float().cpu().numpy()
        arrays[f"{part.name}_embeddings"] = embeddings
        indices = np.arange(len(embeddings)) if part.indices is None else part.indices
        arrays[f"{part.name}_indices"] = indices.astype(np.int64)
        if part.labels is not None:
            arrays[f"{part.name}_labels"] = np.asarray(part.labels, np.int64)
        if part.names is not None:
            arrays[f"{part.name}_names"] = np.array(list(part.names), np.str_)
    if classes:
        arrays["classes"] = np.array(list(classes), np.str_)
    with new_files(path) as (file,):
        np.savez(file, **arrays)
    counts = ", ".join(f"{len(arrays[f'{part.name}_indices'])} {part.name}" for part in parts)
    _report("embeddings", path, f"{counts}, of {embeddings.shape[1]} numbers each")


def save_model(path: Path, network: torch.nn.Module, options: Options, *, means: Colour, stds: Colour) -> None:
    """Writes the network, as its ending asks, and beside it ``<stem>.yaml``, the options it takes to use it.

    ``.safetensors``: parameters and statistics by name, with ``network`` and ``low_dim`` as metadata. ``.onnx``:
    ``images`` (B, 3, H, W) -> ``embeddings`` (B, D), with the weights inside, for any B and any H and W that the
    network takes.

    Args:
        path: the file.
        network: stays as it is, on its device and in its mode.
        options: what the network was built and trained with.
        means, stds: what its images are normalised by.

    Raises:
        UsageError: a file exists or cannot be written, or PyTorch's exporter to ONNX fails.
    """
    content = _onnx(network, options) if path.suffix.lower() == ".onnx" else _safetensors(network, options)
    written = options.model_copy(update={"means": means, "stds": stds})
    text = _header(path) + yaml.safe_dump(
        written.model_dump(mode="json", include=set(USE)), sort_keys=False, default_flow_style=None
    )
    with new_files(_configuration(path), path) as (configuration, model):
        configuration.write(text.encode("utf-8"))
        model.write(content)
    _report("model", path, f"{options.network}, embedding {options.low_dim}")
    _report("model's options", _configuration(path), "for --cfgs")


def _safetensors(network: torch.nn.Module, options: Options) -> bytes:
    tensors = {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}
    metadata = {"format": "pt", "network": options.network, "low_dim": str(options.low_dim)}
    return safetensors.torch.save(tensors, metadata)


class _AdaptiveAveragePool(torch.nn.Module):
    """``AdaptiveAvgPool2d`` as two products with matrices of averages, made from the map's size when it runs.

    The exporter writes the module itself for the map's size at export alone.

    Args:
        grid: edge g of the output, in positions.
    """

    def __init__(self, grid: int) -> None:
        super().__init__()
        self._grid = grid

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """(B, C, h, w) -> (B, C, g, g)."""
        return self._averages(maps.shape[2]) @ maps @ self._averages(maps.shape[3]).t()

    def _averages(self, edge: int) -> torch.Tensor:
        """(g, edge): row i averages the positions from floor(i edge / g) up to ceil((i + 1) edge / g)."""
        cell = torch.arange(self._grid, dtype=torch.float32)[:, None]  # ONNX has no floor of integers
        position = torch.arange(edge, dtype=torch.float32)
        first, end = torch.floor(cell * edge / self._grid), torch.ceil((cell + 1) * edge / self._grid)
        inside = ((position >= first) & (position < end)).float()
        return inside / inside.sum(dim=1, keepdim=True)


def _with_any_size(network: torch.nn.Module) -> torch.nn.Module:
    """A copy on the CPU, in evaluation mode, whose export takes images of any size that the network takes."""
    network = copy.deepcopy(network).cpu().eval()
    for name, module in list(network.named_modules()):
        if isinstance(module, torch.nn.AdaptiveAvgPool2d) and isinstance(grid := module.output_size, int) and grid > 1:
            network.set_submodule(name, _AdaptiveAveragePool(grid))
    return network


def _onnx(network: torch.nn.Module, options: Options) -> bytes:
    """The network as an ONNX file; UsageError where the exporter fails."""
    height, width = (max(EXAMPLE, edge) for edge in height_and_width(options.size))
    sizes = {0: torch.export.Dim("batch"), 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    try:
        with _quiet_exporter():
            program = torch.onnx.export(
                _with_any_size(network),
                (torch.zeros(2, 3, height, width),),  # a batch of one would be taken for the only size
                dynamo=True,
                input_names=["images"],
                output_names=["embeddings"],
                dynamic_shapes=(sizes,),
                optimize=True,
            )
            assert program is not None
            shape = program.model_proto.graph.input[0].type.tensor_type.shape.dim
            if fixed := [axis for axis in sizes if not shape[axis].dim_param]:  # "AUTO" may make constants of them
                raise ValueError(f"axes {fixed} of the images became constants")
            content: bytes = program.model_proto.SerializeToString()
    except Exception as error:  # its parts raise nearly anything
        cause: BaseException = error
        while cause.__cause__:
            cause = cause.__cause__
        raise UsageError(
            f"the exporter to ONNX of PyTorch {torch.__version__} failed: {reason(cause)}; try other versions of "
            "the packages in requirements-onnx.txt, or --export-model with a .safetensors file"
        ) from None
    return content


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Keeps what the exporter of some versions says to its own programmers off the screen."""
    guards = logging.getLogger("torch.fx.experimental.symbolic_shapes")  # of batch sizes that other code paths suit
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
    """The comment that a model's option file opens with."""
    model, options = (_one_line(shlex.quote(str(place))) for place in (path, _configuration(path)))
    if path.suffix.lower() == ".onnx":
        use = f"{model}, images (B, 3, H, W) -> embeddings (B, D), for onnxruntime and the like"
    else:
        use = f"python main.py --cfgs {options} --resume {model} --test-only --dataset NAME --data-root DIR"
    return (
        "# What it takes to use a network that Anchor Neighbourhood Discovery trained:\n"
        f"#   {use}\n"
        "# Its images are RGB in [0, 1], resized, cropped in the middle to size, less means, divided by stds;\n"
        "# its embeddings have unit length.\n"
    )


def _one_line(text: str) -> str:
    """Text for a comment: what would end it, and what UTF-8 cannot write, as question marks."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _report(what: str, path: Path, content: str) -> None:
    logger().info("%s: %s (%s; %s bytes)", what, path, content, f"{path.stat().st_size:,}", extra=SUMMARY)
