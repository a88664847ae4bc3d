"""Networks of timm and torchvision: trained, exported and loaded by the program, and compared with the originals."""

from __future__ import annotations

import copy
import importlib
import os
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file

import main
import models
from lib.config.options import Options
from lib.distributed import sync_batchnorm
from lib.reporting import export
from lib.training import pretrained
from models.library import LibraryNetwork
from runs import ROOT

NAMES = ["timm/test_resnet", "torchvision/mobilenet_v3_small"]
LOW_DIM = 8
WORDS = f"""--dataset folder --resize 40 --size 32 --low-dim {LOW_DIM} --batch-size 32 --workers-num 0 --max-round 1
--max-epoch 1 --base-lr 0.01 --seed 3 --brief --log-tfb false""".split()


def needs(name: str) -> Any:
    """The package of a network; the test is skipped where it is missing."""
    return pytest.importorskip(name.partition("/")[0], reason="timm is optional: pip install -r requirements-timm.txt")


def built(name: str, size: tuple[int, int] = (32, 32)) -> LibraryNetwork:
    needs(name)
    torch.manual_seed(3)
    network = models.build(name, low_dim=LOW_DIM, size=size)
    assert isinstance(network, LibraryNetwork)
    return network


def package_network(name: str) -> torch.nn.Module:
    """The network with 1,000 classes, built by the package."""
    package, _, inner = name.partition("/")
    torch.manual_seed(4)
    network: torch.nn.Module = (
        needs(name).create_model(inner) if package == "timm" else torchvision.models.get_model(inner)
    )
    return network


def images(count: int = 3, size: tuple[int, int] = (32, 32)) -> torch.Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("name", NAMES)
def test_library_network_is_trained_exported_and_reloaded(name: str, photos: Path, tmp_path: Path) -> None:
    needs(name)
    weights = tmp_path / "own.safetensors"
    save_file(package_network(name).state_dict(), weights)
    data, session = ["--data-root", str(photos)], tmp_path / "s" / "one"
    start = [*WORDS, *data, "--network", name, "--pretrained", str(weights), "--sess-dir", str(tmp_path / "s")]

    def exported(which: str, *words: str) -> np.ndarray:
        assert main.main([*words, *data, "--export-features", str(tmp_path / which)]) == 0
        with np.load(tmp_path / which, allow_pickle=False) as file:
            return np.asarray(file["test_embeddings"])

    model = tmp_path / "model.safetensors"
    trained = exported("trained.npz", *start, "--session", "one", "--export-model", str(model))
    assert f"network: {name}\n" in (session / "config.yaml").read_text(encoding="utf-8")
    assert trained.shape == (20, LOW_DIM)
    np.testing.assert_allclose(np.linalg.norm(trained, axis=1), 1, atol=1e-5)
    np.testing.assert_array_equal(exported("resumed.npz", "--resume", str(session), "--test-only", "--debug"), trained)
    cfgs = ["--cfgs", str(model.with_suffix(".yaml")), "--dataset", "folder", "--test-only", "--batch-size", "32"]
    np.testing.assert_array_equal(exported("model.npz", *cfgs, "--resume", str(model)), trained)
    np.testing.assert_array_equal(exported("file.npz", *cfgs, "--pretrained", str(model)), trained)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("prefix", ["", "module.encoder."])
def test_weights_of_the_package_give_the_same_features(name: str, prefix: str, tmp_path: Path) -> None:
    own, network = package_network(name), built(name)
    torch.save({f"{prefix}{key}": value for key, value in own.state_dict().items()}, tmp_path / "own.pth")
    found = pretrained.load_pretrained(network, tmp_path / "own.pth")
    assert found.missing_keys == ["fc.weight", "fc.bias"]
    if name.startswith("timm"):
        own.reset_classifier(0)  # type: ignore[operator]
    else:
        own.classifier[3] = torch.nn.Identity()  # type: ignore[index, operator]
    with torch.no_grad():
        torch.testing.assert_close(network.eval().stages(images())["pooled"], own.eval()(images()))


@pytest.mark.parametrize(
    ("name", "stage", "shape"),
    [
        ("timm/test_resnet", "layer4", (3, 96, 1, 1)),
        ("timm/test_vit", "blocks.5", (3, 64, 2, 2)),
        ("timm/test_convnext", "stages.3", (3, 64, 1, 1)),
        ("torchvision/mobilenet_v3_small", "features.12", (3, 576, 1, 1)),
        ("torchvision/squeezenet1_1", "features.12", (3, 512, 1, 1)),
        ("torchvision/shufflenet_v2_x0_5", "conv5", (3, 1024, 1, 1)),
    ],
)
def test_stages_have_the_module_names_of_the_package(name: str, stage: str, shape: tuple[int, ...]) -> None:
    network = built(name).eval()
    with torch.no_grad():
        stages = network.stages(images())
        assert stages[stage].shape == shape
        assert list(stages)[-2:] == ["pooled", "fc"] and stages["pooled"].dim() == 2
        torch.testing.assert_close(stages["fc"], network(images()))
    assert not [module for module in network.modules() if module._forward_hooks]


def test_stage_is_the_output_of_its_module() -> None:
    network = built("torchvision/resnet18").eval()
    inner = network.backbone
    with torch.no_grad():
        x = inner.maxpool(torch.relu(inner.bn1(inner.conv1(images()))))  # type: ignore[operator]
        expected = {"conv1": inner.conv1(images())}  # type: ignore[operator]
        for name in ("layer1", "layer2", "layer3", "layer4"):
            expected[name] = x = inner.get_submodule(name)(x)
        stages = network.stages(images())
    assert "bn1" not in stages  # the ReLU after it works in place
    for name, value in expected.items():
        torch.testing.assert_close(stages[name], value)


@pytest.mark.parametrize(("name", "patch"), [("timm/test_vit", 16), ("torchvision/vit_b_32", 32)])
def test_transformer_is_built_for_the_image_size(name: str, patch: int) -> None:
    needs(name)
    package, _, inner = name.partition("/")
    with torch.device("meta"):
        network = models.PACKAGES[package](inner, low_dim=LOW_DIM, size=(64, 64), pretrained=False)
    tokens = [value.shape[1] for key, value in network.state_dict().items() if "pos_embed" in key]
    assert tokens == [(64 // patch) ** 2 + 1]
    assert network.has_fixed_size and not built(NAMES[1]).has_fixed_size


def test_position_embeddings_of_another_size_are_named(tmp_path: Path) -> None:
    torch.save(built("timm/test_vit", (64, 64)).state_dict(), tmp_path / "own.pth")
    found = pretrained.load_pretrained(built("timm/test_vit", (32, 32)), tmp_path / "own.pth")
    assert list(found.unexpected_keys) == found.missing_keys == ["backbone.pos_embed"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["timm/test_resnet", "timm/test_vit", "torchvision/resnet18"])
def test_onnx_embeddings_equal_those_of_torch(name: str, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    network, path = built(name), tmp_path / "out.onnx"
    options = Options(network=name, low_dim=LOW_DIM, resize=40, size=32)
    export.save_model(path, network, options, means=(0.5, 0.5, 0.5), stds=(0.5, 0.5, 0.5))
    session = runtime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    network.eval()
    for count, size in [(1, (32, 32)), (5, (32, 32)), *([] if network.has_fixed_size else [(2, (64, 50))])]:
        with torch.no_grad():
            expected = network(images(count, size)).numpy()
        (found,) = session.run(["embeddings"], {"images": images(count, size).numpy()})
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


class OfTwo:
    """Replaces the ranks of two processes."""

    size = 2


@pytest.mark.parametrize("training", [True, False])
def test_activations_survive_distributed_batch_normalisation(training: bool) -> None:
    network = built("timm/mobilenetv3_small_050").train(training)  # its normalisation layers include the activation
    converted = sync_batchnorm.convert(copy.deepcopy(network), OfTwo(), sync=False)  # type: ignore[arg-type]
    assert converted.state_dict().keys() == network.state_dict().keys()
    with torch.no_grad():
        torch.testing.assert_close(converted(images()), network(images()))


REFUSED = {
    "timm/test_resnett": "timm .* has no such network; did you mean timm/test_resnet[0-9]*?",
    "timm/test_resnet.none": "timm .* has no such network; did you mean timm/test_resnet[.0-9a-z_]*?",
    "timm/": "timm .* has no such network; see the list of models of timm",
    "torchvision/resnet19": "torchvision .* has no such network; did you mean torchvision/resnet18?",
    "torchvision/fcn_resnet50": "torchvision .* has no such network",
    "torchvision/maxvit_t": "cannot be built for images of 32 x 32 pixels .*; choose another --size or --network",
}


@pytest.mark.parametrize("name", REFUSED)
def test_unusable_networks_are_refused_in_one_sentence(
    name: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    needs(name)
    words = [*WORDS, "--data-root", str(photos), "--sess-dir", str(tmp_path / "s"), "--network", name]
    assert main.main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --network {name}: ") and error.count("\n") == 1
    assert re.search(REFUSED[name], error)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--network", "timm/test_vit", "--size", "8"], "does not accept images of 8 x 8 pixels"),
        (["--network", "torchvision/vit_b_32", "--size", "32", "36"], "takes square images only"),
        (["--network", "resnet10-w16", "--pretrained", "timm"], "resnet10-w16 is not a network of timm"),
    ],
)
def test_images_and_weights_that_do_not_fit_are_refused(
    words: list[str], sentence: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    needs("timm")
    assert main.main([*WORDS, "--data-root", str(photos), "--sess-dir", str(tmp_path / "s"), *words]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


def test_missing_timm_is_named_with_the_pip_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(models.NetworkError, match=r"^--network timm/test_resnet: needs .* -r requirements-timm\.txt$"):
        models.build("timm/test_resnet", low_dim=LOW_DIM)


@pytest.mark.slow
def test_unreachable_server_of_timm_is_one_sentence(photos: Path, tmp_path: Path) -> None:
    """Without the messages of ``huggingface_hub``, which tries again for half a minute and more."""
    needs("timm")
    unreachable = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hub"), "no_proxy": "*"}
    words = [*WORDS, "--data-root", str(photos), "--sess-dir", str(tmp_path / "s")]
    command = [sys.executable, "main.py", *words, "--network", "timm/resnet18", "--pretrained", "timm"]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **unreachable}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    sentence = (
        "error: --pretrained timm: the weights of resnet18 cannot be loaded (http://127.0.0.1:9 cannot be reached: "
    )
    assert done.stderr.startswith(sentence) and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "s").exists()


def test_pretrained_weights_are_loaded_by_package_name(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The download is replaced by given weights."""
    own = package_network(NAMES[1])
    api = importlib.import_module("torchvision.models._api")
    monkeypatch.setattr(api, "load_state_dict_from_url", lambda *_, **__: own.state_dict())
    words = [*WORDS, "--data-root", str(photos), "--network", NAMES[1], "--pretrained", "torchvision", "--debug"]
    model = tmp_path / "model.safetensors"
    assert main.main([*words, "--test-only", "--export-model", str(model)]) == 0
    content = load_file(model)
    for name, value in own.state_dict().items():
        assert name.startswith("classifier.3") or torch.equal(content[f"backbone.{name}"], value), name
    capsys.readouterr()

    def fails(*_: Any, **__: Any) -> types.NoneType:
        raise OSError("Name or service not known")

    monkeypatch.setattr(api, "load_state_dict_from_url", fails)
    assert main.main(words) == 2
    assert "cannot be loaded (Name or service not known); without internet access" in capsys.readouterr().err
