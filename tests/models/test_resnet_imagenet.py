"""The ImageNet ResNets compared with torchvision's: names, weights and every stage."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
import torchvision

from models import resnet_imagenet

NAMES = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
STAGES = ["conv1", "conv2", "conv3", "conv4", "conv5", "fc"]
HEAD = {"fc.weight", "fc.bias"}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The feature maps are so small that several threads would be slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def ours(name: str, low_dim: int = 6) -> torch.nn.Module:
    return getattr(resnet_imagenet, name)(low_dim=low_dim)


def theirs(name: str) -> torch.nn.Module:
    return getattr(torchvision.models, name)(weights=None)


def on_paper(name: str, low_dim: int = 6) -> torch.nn.Module:
    """A network on the meta device: shapes without values, quick at any depth."""
    with torch.device("meta"):
        return ours(name, low_dim)


def images(size: int, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(2))


def filled(network: torch.nn.Module) -> torch.nn.Module:
    """A network for inference whose normalisation parameters and statistics differ from their initial values."""
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.8, 1.2)
            torch.nn.init.uniform_(module.bias, -0.2, 0.2)
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.7, 1.3)
    return network.eval()


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    """A network for all tests that do not change it."""
    torch.manual_seed(4)
    return filled(ours("resnet18"))


def shapes_of(network: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in network.state_dict().items()}


# Names and sizes.


@pytest.mark.parametrize("name", NAMES)
def test_names_and_shapes_equal_torchvision_except_the_head(name: str) -> None:
    with torch.device("meta"):
        expected = shapes_of(theirs(name))
    width = expected["fc.weight"][1]
    assert shapes_of(on_paper(name, low_dim=128)) == {**expected, "fc.weight": (128, width), "fc.bias": (128,)}


@pytest.mark.parametrize("name", NAMES)
def test_number_in_the_name_is_the_number_of_layers(name: str) -> None:
    """The convolutions of the main path and the linear layer are counted."""
    modules = on_paper(name).named_modules()
    layers = [k for k, m in modules if isinstance(m, torch.nn.Conv2d | torch.nn.Linear) and "downsample" not in k]
    assert len(layers) == int(name.removeprefix("resnet"))


@pytest.mark.parametrize(("name", "published"), [("resnet18", 11_689_512), ("resnet50", 25_557_032)])
def test_number_of_parameters_is_the_published_one_with_our_head(name: str, published: int) -> None:
    """The published counts are for a thousand classes."""
    width = 512 if name == "resnet18" else 2048
    expected = published - (width + 1) * 1000 + (width + 1) * 128
    assert sum(p.numel() for p in on_paper(name, low_dim=128).parameters()) == expected


@pytest.mark.parametrize(("name", "expansion"), [("resnet18", 1), ("resnet34", 1), ("resnet50", 4), ("resnet101", 4)])
@pytest.mark.parametrize(("size", "edges"), [(224, [112, 56, 28, 14, 7]), (65, [33, 17, 9, 5, 3]), (1, [1] * 5)])
def test_stages_have_the_expected_shapes(name: str, expansion: int, size: int, edges: list[int]) -> None:
    maps = on_paper(name, low_dim=6).stages(torch.empty(3, 3, size, size, device="meta"))
    channels = [64, *(expansion * width for width in (64, 128, 256, 512))]
    assert list(maps) == STAGES
    *shapes, last = [tuple(value.shape) for value in maps.values()]
    assert shapes == [(3, c, edge, edge) for c, edge in zip(channels, edges, strict=True)]
    assert last == (3, 6)


def test_images_need_not_be_square() -> None:
    maps = on_paper("resnet18").stages(torch.empty(2, 3, 64, 96, device="meta"))
    assert tuple(maps["conv5"].shape) == (2, 512, 2, 3)


# The forward pass.


def record(network: torch.nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The maps in torchvision's network, copied immediately because its ReLUs work in place."""
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            seen[name] = (inputs[0] if name == "maxpool" else output).clone()

        return hook

    for name in ("maxpool", "layer1", "layer2", "layer3", "layer4", "avgpool"):
        network.get_submodule(name).register_forward_hook(keep(name))
    network(x)
    return seen


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_stages_equal_torchvision_with_its_weights(name: str) -> None:
    torch.manual_seed(3)
    source, network = filled(theirs(name)), ours(name).eval()
    body = {key: value for key, value in source.state_dict().items() if key not in HEAD}
    loaded = network.load_state_dict(body, strict=False)
    assert (set(loaded.missing_keys), loaded.unexpected_keys) == (HEAD, [])

    x = images(64)
    with torch.no_grad():
        maps, expected = network.stages(x), record(source, x)
    for stage, module in zip(STAGES[:-1], ("maxpool", "layer1", "layer2", "layer3", "layer4"), strict=True):
        assert torch.equal(maps[stage], expected[module]), stage

    state = network.state_dict()
    embedding = expected["avgpool"].flatten(1) @ state["fc.weight"].t() + state["fc.bias"]
    torch.testing.assert_close(maps["fc"], embedding / (embedding**2).sum(dim=1, keepdim=True).sqrt())


@pytest.mark.parametrize("training", [True, False])
def test_maps_follow_a_relu_and_embeddings_have_unit_length(training: bool, network: torch.nn.Module) -> None:
    network = copy.deepcopy(network).train(training)
    with torch.no_grad():
        *maps, embeddings = network.stages(images(64, 3)).values()
    assert len(maps) == 5
    for values in maps:
        assert values.min() == 0
        assert values.max() > 0
    assert embeddings.shape == (3, 6)
    torch.testing.assert_close((embeddings**2).sum(dim=1).sqrt(), torch.ones(3))


def test_forward_is_the_last_stage(network: torch.nn.Module) -> None:
    x = images(32)
    with torch.no_grad():
        assert torch.equal(network(x), network.stages(x)["fc"])


def test_inference_embedding_depends_only_on_its_image(network: torch.nn.Module) -> None:
    x = images(32, 3)
    with torch.no_grad():
        together, alone = network(x), network(x[1:2])
    torch.testing.assert_close(together[1:2], alone)
    assert not torch.allclose(together[0], together[1])


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_every_parameter_receives_a_gradient(name: str) -> None:
    torch.manual_seed(7)
    network = ours(name).train()
    network(images(32, 4))[:, 0].sum().backward()
    assert [key for key, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []
