"""Exported files, read by other libraries and compared with the network image by image."""

from __future__ import annotations

import copy
import logging
import os
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch
from safetensors.torch import load_file

import models
from datasets import ImageSet
from lib.config.options import Options
from lib.config.parser import read_options
from lib.errors import UsageError
from lib.reporting import export
from lib.reporting.export import Split
from lib.session import atomic_files
from lib.session.console import SUMMARY

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
LOW_DIM = 6
COLOURS: dict[str, Any] = {"means": (0.1, 0.2, 0.30000000000000004), "stds": (0.5, 0.6, 0.7)}
ONNX_TOLERANCE = 1e-5
"""Absolute tolerance of embeddings. The largest measured difference is 4e-6; torch differs from float64 by 3e-6."""


def options_of(**values: Any) -> Options:
    return Options(**{"network": "resnet10", "low_dim": LOW_DIM, "resize": 9, "size": 8, **values})


def trained(name: str = "resnet10", low_dim: int = LOW_DIM) -> torch.nn.Module:
    """A network in training mode with running statistics of some images."""
    torch.manual_seed(5)
    network = models.build(name, low_dim=low_dim).train()
    with torch.no_grad():
        network(2 * torch.randn(4, 3, 32, 32) + 0.5)
    return network


@pytest.fixture(scope="module")
def resnet() -> torch.nn.Module:
    return trained()


def modes(network: torch.nn.Module) -> list[bool]:
    return [module.training for module in network.modules()]


@torch.no_grad()
def one_by_one(network: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    network = copy.deepcopy(network).eval()
    return torch.cat([network(image[None]) for image in images])


NAMES = ["d/é.png", "b/\udcff raw.png", "c/new\nline.png", "a/😀.png", "e/" + "x" * 200, "f f", "g"]


def split_of(name: str, samples: int, labels: list[int] | None, names: list[str] | None) -> Split:
    classes = ("ant", "bée", "cat") if labels else ()
    known = None if labels is None else np.array(labels)
    images = ImageSet([np.zeros((2, 2, 3), np.uint8)] * samples, known, classes, names)
    return Split(name, images, np.random.default_rng(samples).normal(size=(samples, LOW_DIM)).astype(np.float32))


def splits() -> list[Split]:
    return [split_of("train", 7, [2, 0, 1, 1, 0, 2, 2], NAMES), split_of("test", 5, [0, 1, 2, 1, 0], NAMES[2:])]


def saved(path: Path, given: list[Split]) -> dict[str, Any]:
    export.save_features(path, given)
    with np.load(path, allow_pickle=False) as content:
        return dict(content)


# embeddings


def test_exported_rows_match_labels_and_names(tmp_path: Path) -> None:
    given = splits()
    content = saved(tmp_path / "out.npz", given)
    assert list(content) == [
        f"{split}_{what}" for split in ("train", "test") for what in ("embeddings", "indices", "labels", "names")
    ] + ["classes"]
    for split in given:
        assert np.array_equal(content[f"{split.name}_embeddings"], split.embeddings)
        assert content[f"{split.name}_embeddings"].dtype == np.float32
        assert content[f"{split.name}_indices"].dtype == content[f"{split.name}_labels"].dtype == np.int64
        assert content[f"{split.name}_indices"].tolist() == list(range(len(split.images)))
        assert np.array_equal(content[f"{split.name}_labels"], split.images.labels)
        assert content[f"{split.name}_names"].dtype.kind == "U"
        assert content[f"{split.name}_names"].tolist() == split.images.names
    assert content["classes"].tolist() == ["ant", "bée", "cat"]


def test_missing_labels_and_names_have_no_arrays(tmp_path: Path) -> None:
    bare = split_of("train", 7, None, None)
    assert list(saved(tmp_path / "bare.npz", [bare])) == ["train_embeddings", "train_indices"]
    named = split_of("train", 7, None, NAMES)
    assert list(saved(tmp_path / "named.npz", [named]))[2:] == ["train_names"]


# the network with its options


def test_safetensors_reload_gives_equal_embeddings(tmp_path: Path, resnet: torch.nn.Module) -> None:
    path = tmp_path / "out.safetensors"
    export.save_model(path, resnet, options_of(), **COLOURS)
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata == {"format": "pt", "network": "resnet10", "low_dim": str(LOW_DIM)}
    fresh = models.build(metadata["network"], low_dim=int(metadata["low_dim"]))
    fresh.load_state_dict(load_file(path))
    images = torch.randn(5, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(fresh.eval()(images), copy.deepcopy(resnet).eval()(images))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out.safetensors", "out.yaml"]


def test_channels_last_weights_are_saved_contiguous(tmp_path: Path, resnet: torch.nn.Module) -> None:
    moved = copy.deepcopy(resnet).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    export.save_model(tmp_path / "out.safetensors", moved, options_of(), **COLOURS)
    content = load_file(tmp_path / "out.safetensors")
    assert content.keys() == resnet.state_dict().keys()
    assert all(torch.equal(value, content[name]) for name, value in resnet.state_dict().items())


@pytest.mark.parametrize("size", [8, (8, 12)])
def test_options_file_of_a_model_is_read_back(tmp_path: Path, resnet: torch.nn.Module, size: Any) -> None:
    options = options_of(resize=(16, 17), size=size, npc_temperature=0.07, means=(9.0, 9.0, 9.0), batch_size=3)
    export.save_model(tmp_path / "my net.safetensors", resnet, options, **COLOURS)
    written = tmp_path / "my net.yaml"
    read = read_options(["--cfgs", str(written)])
    expected = {"network": "resnet10", "low_dim": LOW_DIM, "resize": (16, 17), "size": size, "npc_temperature": 0.07}
    assert read == Options(
        **expected, **COLOURS, cfgs=(written,)
    )  # other options, such as the batch size, are not written


def test_options_file_begins_with_a_valid_command(tmp_path: Path, resnet: torch.nn.Module) -> None:
    path = tmp_path / "odd: 'name\n--oops.safetensors"
    export.save_model(tmp_path / "net.safetensors", resnet, options_of(), **COLOURS)
    export.save_model(path, resnet, options_of(), **COLOURS)
    assert read_options(["--cfgs", str(path.with_suffix(".yaml"))]).low_dim == LOW_DIM
    (command,) = re.findall(r"^#   python main\.py (.+)$", (tmp_path / "net.yaml").read_text(encoding="utf-8"), re.M)
    read = read_options(command.split())
    assert read.resume == tmp_path / "net.safetensors" and read.test_only and read.means == COLOURS["means"]


def test_each_exported_file_is_logged(
    tmp_path: Path, resnet: torch.nn.Module, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("and"), "propagate", True)
    caplog.set_level(logging.INFO, "and")
    saved(tmp_path / "out.npz", splits())
    export.save_model(tmp_path / "net.safetensors", resnet, options_of(), **COLOURS)
    sizes = {name: f"{(tmp_path / name).stat().st_size:,}" for name in ("out.npz", "net.safetensors", "net.yaml")}
    assert caplog.messages == [
        f"embeddings: {tmp_path}/out.npz (7 train, 5 test, embedding size 6; {sizes['out.npz']} bytes)",
        f"model: {tmp_path}/net.safetensors (resnet10, embedding size 6; {sizes['net.safetensors']} bytes)",
        f"options of the model: {tmp_path}/net.yaml (for --cfgs; {sizes['net.yaml']} bytes)",
    ]
    assert all(getattr(record, "summary", False) == SUMMARY["summary"] for record in caplog.records)


# ONNX


@pytest.mark.parametrize(
    ("name", "size"), [("resnet10", 8), ("alexnet-small", (40, 24)), ("imagenet-resnet18", 33)], ids=str
)
def test_onnx_embeddings_equal_those_of_torch(
    tmp_path: Path, name: str, size: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    runtime = pytest.importorskip("onnxruntime")
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)
    network, path = trained(name), tmp_path / "net.onnx"
    before = copy.deepcopy(network.state_dict())
    options = options_of(network=name, resize=64, size=size)
    export.save_model(path, network, options, **COLOURS)
    assert capfd.readouterr() == ("", "")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [
        "net.onnx",
        "net.yaml",
    ]  # the weights are in the ONNX file
    assert read_options(["--cfgs", str(tmp_path / "net.yaml")]).network == name
    assert all(modes(network)) and all(torch.equal(v, before[k]) for k, v in network.state_dict().items())

    session = runtime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    edges = size if isinstance(size, tuple) else (size, size)
    (taken,), (given,) = session.get_inputs(), session.get_outputs()
    assert taken.name == "images" and taken.shape[1] == 3
    assert all(isinstance(taken.shape[axis], str) for axis in (0, 2, 3)), taken.shape  # dynamic axes
    assert (given.name, given.shape[1:]) == ("embeddings", [LOW_DIM])
    for samples, (height, width) in [(1, edges), (2, edges), (5, edges), (3, (16, 16)), (1, (32, 32)), (2, (23, 48))]:
        images = 2 * torch.randn(samples, 3, height, width) + 0.5
        (embeddings,) = session.run(["embeddings"], {"images": images.numpy()})
        expected = one_by_one(network, images).numpy()
        np.testing.assert_allclose(embeddings, expected, rtol=0, atol=ONNX_TOLERANCE)
        np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, rtol=0, atol=ONNX_TOLERANCE)


@pytest.mark.parametrize("edge", [1, 3, 6])
def test_exported_pooling_equals_that_of_torch(edge: int) -> None:
    for height, width in ((1, 1), (3, 3), (6, 7), (2, 13), (40, 5)):
        maps = torch.randn(2, 5, height, width)
        expected = torch.nn.AdaptiveAvgPool2d(edge)(maps)
        torch.testing.assert_close(export._AdaptiveAveragePool(edge)(maps), expected)


class Unknown(torch.nn.Module):
    """Uses an operation that no exporter supports."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.special.bessel_j0(x).flatten(1)


def test_failed_onnx_export_leaves_no_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)
    network = Unknown().train()
    with pytest.raises(
        UsageError, match=r"^--export-model: the ONNX exporter of PyTorch .* failed: .*bessel_j0.*safetensors file$"
    ):
        export.save_model(tmp_path / "net.onnx", network, options_of(), **COLOURS)
    assert network.training and not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")


# what is refused before any work


def asked(**paths: Path) -> Options:
    return options_of(**{f"export_{what}": path for what, path in paths.items()})


def test_check_accepts_valid_paths_and_writes_nothing(tmp_path: Path) -> None:
    export.check(options_of())
    export.check(asked(features=tmp_path / "out.npz", model=tmp_path / "OUT.SafeTensors"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["out", "out.npy", ".npz", "out.npz.gz", "out.safetensors"])
def test_embeddings_file_needs_the_npz_extension(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"^--export-features .*: the file name must end in \.npz$"):
        export.check(asked(features=tmp_path / name))


@pytest.mark.parametrize("name", ["out", "out.pt", ".onnx", "out.npz", "out.yaml"])
def test_model_file_needs_a_known_extension(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"^--export-model .*: the file name must end in \.safetensors or \.onnx$"):
        export.check(asked(model=tmp_path / name))


@pytest.mark.parametrize(
    ("what", "name", "there"),
    [
        ("features", "out.npz", "out.npz"),
        ("model", "out.safetensors", "out.safetensors"),
        ("model", "out.safetensors", "out.yaml"),
        ("model", "out.onnx", "out.onnx"),
        ("model", "out.onnx", "out.yaml"),
    ],
)
@pytest.mark.parametrize("link", [False, True], ids=["file", "broken link"])
def test_existing_files_are_not_overwritten(
    tmp_path: Path, what: str, name: str, there: str, link: bool, resnet: torch.nn.Module
) -> None:
    taken = tmp_path / there
    taken.symlink_to(tmp_path / "nowhere") if link else taken.write_text("mine")
    refused = pytest.raises(
        UsageError, match=rf"/{re.escape(there)}: already exists; choose another name, or move the file away$"
    )
    with refused:
        export.check(asked(**{what: tmp_path / name}))
    with refused:  # the file was created during training
        if what == "features":
            export.save_features(tmp_path / name, splits())
        elif name.endswith(".onnx"):
            pytest.importorskip("onnxscript")
            small = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 2))
            export.save_model(tmp_path / name, small, options_of(), **COLOURS)
        else:
            export.save_model(tmp_path / name, resnet, options_of(), **COLOURS)
    assert [entry.name for entry in tmp_path.iterdir()] == [there]
    assert taken.is_symlink() if link else taken.read_text() == "mine"


def test_missing_folder_is_named(tmp_path: Path) -> None:
    for given in (asked(features=tmp_path / "no" / "out.npz"), asked(model=tmp_path / "no" / "out.onnx")):
        with pytest.raises(UsageError, match=r"out\.\w+: the folder .*/no does not exist; create it"):
            export.check(given)


@pytest.mark.parametrize("name", ["x" * 250 + ".npz", "x\0.npz"], ids=["long", "NUL"])
def test_impossible_file_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r": cannot be written: .*; choose another name$"):
        export.check(asked(features=tmp_path / name))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes anywhere")
def test_folder_without_write_permission_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(UsageError, match="no permission to write to the folder"):
            export.check(asked(features=tmp_path / "out.npz"))
    finally:
        tmp_path.chmod(0o700)


def test_read_only_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path or not mode & os.W_OK)
    with pytest.raises(UsageError, match="no permission to write to the folder"):
        export.check(asked(model=tmp_path / "out.safetensors"))


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_missing_packages_are_named_with_the_pip_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    for name in ("onnx", "onnxscript"):  # treated as installed, so that the test runs without them
        monkeypatch.setitem(sys.modules, name, sys.modules[__name__])
    export.check(asked(model=tmp_path / "out.onnx"))
    monkeypatch.setitem(sys.modules, package, None)  # type: ignore[arg-type]  # importing it fails
    with pytest.raises(UsageError, match=rf"{package}, which .*; run pip install -r requirements-onnx\.txt$"):
        export.check(asked(model=tmp_path / "out.onnx"))
    export.check(asked(model=tmp_path / "out.safetensors"))


# interruptions


class Full(OSError):
    """The error of a full disk."""

    def __init__(self) -> None:
        super().__init__(28, "No space left on device")


@pytest.mark.parametrize("error", [KeyboardInterrupt, Full])
def test_interrupted_embeddings_export_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    def half(file: Any, **arrays: Any) -> None:
        file.write(b"half")
        raise error

    monkeypatch.setattr(np, "savez", half)
    with pytest.raises(UsageError if error is Full else error, match="No space left" if error is Full else None):
        export.save_features(tmp_path / "b.npz", splits())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [KeyboardInterrupt, Full])
@pytest.mark.parametrize("call", [1, 3])  # the fsync of each file; that of the folder comes between
def test_interrupted_model_export_leaves_neither_file(
    tmp_path: Path, resnet: torch.nn.Module, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], call: int
) -> None:
    calls = []

    def fsync(number: int) -> None:
        calls.append(number)
        if len(calls) == call:
            raise error

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(UsageError if error is Full else error):
        export.save_model(tmp_path / "net.safetensors", resnet, options_of(), **COLOURS)
    assert len(calls) == call and not list(tmp_path.iterdir())


def test_atomic_write_replaces_a_file_completely_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match="half"), atomic_files.atomic_write(path) as file:
        file.write(b"new")
        raise ValueError("half")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    with atomic_files.atomic_write(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


# what has to be installed


def test_onnx_packages_are_listed_with_their_purpose() -> None:
    lists = [(ROOT / name).read_text(encoding="utf-8") for name in ("requirements-onnx.txt", "requirements-dev.txt")]
    (extra, tests) = ([line for line in text.splitlines() if not line.startswith("#")] for text in lists)
    assert all(re.fullmatch(r"[\w-]+>=[\d.]+\s+# \w.+", line) for line in extra)
    assert {line.split()[0] for line in extra} <= {line.split()[0] for line in tests}
