"""The ImageNet ResNets against torchvision's own: names, weights and every stage."""

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
    """Maps are so small here that threads on shared cores mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def ours(name: str, low_dim: int = 6) -> torch.nn.Module:
    return getattr(resnet_imagenet, name)(low_dim=low_dim)


def theirs(name: str) -> torch.nn.Module:
    return getattr(torchvision.models, name)(weights=None)


def on_paper(name: str, low_dim: int = 6) -> torch.nn.Module:
    """A network of shapes without numbers: quick at any depth."""
    with torch.device("meta"):
        return ours(name, low_dim)


def images(size: int, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(2))


def filled(network: torch.nn.Module) -> torch.nn.Module:
    """Ready for inference, with statistics and scales that are not the initial ones and zeros."""
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.8, 1.2)
            torch.nn.init.uniform_(module.bias, -0.2, 0.2)
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.7, 1.3)
    return network.eval()


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    """One for the tests that only read it."""
    torch.manual_seed(4)
    return filled(ours("resnet18"))


def shapes_of(network: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in network.state_dict().items()}


# Names and sizes.


@pytest.mark.parametrize("name", NAMES)
def test_names_and_shapes_are_torchvisions_but_for_the_head(name: str) -> None:
    with torch.device("meta"):
        expected = shapes_of(theirs(name))
    width = expected["fc.weight"][1]
    assert shapes_of(on_paper(name, low_dim=128)) == {**expected, "fc.weight": (128, width), "fc.bias": (128,)}


@pytest.mark.parametrize("name", NAMES)
def test_the_number_in_a_name_counts_its_layers(name: str) -> None:
    """Convolutions on the main path, and the linear layer."""
    modules = on_paper(name).named_modules()
    layers = [k for k, m in modules if isinstance(m, torch.nn.Conv2d | torch.nn.Linear) and "downsample" not in k]
    assert len(layers) == int(name.removeprefix("resnet"))


@pytest.mark.parametrize(("name", "published"), [("resnet18", 11_689_512), ("resnet50", 25_557_032)])
def test_parameters_are_the_published_ones_with_another_head(name: str, published: int) -> None:
    """torchvision publishes its counts for a thousand classes."""
    width = 512 if name == "resnet18" else 2048
    expected = published - (width + 1) * 1000 + (width + 1) * 128
    assert sum(p.numel() for p in on_paper(name, low_dim=128).parameters()) == expected


@pytest.mark.parametrize(("name", "expansion"), [("resnet18", 1), ("resnet34", 1), ("resnet50", 4), ("resnet101", 4)])
@pytest.mark.parametrize(("size", "edges"), [(224, [112, 56, 28, 14, 7]), (65, [33, 17, 9, 5, 3]), (1, [1] * 5)])
def test_shapes_of_the_stages(name: str, expansion: int, size: int, edges: list[int]) -> None:
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
    """What passes through torchvision's network, copied at once: its ReLUs write in place."""
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
def test_with_torchvisions_weights_each_stage_is_torchvisions(name: str) -> None:
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
def test_maps_are_rectified_and_embeddings_have_unit_length(training: bool, network: torch.nn.Module) -> None:
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


def test_an_embedding_depends_on_its_own_image_in_inference(network: torch.nn.Module) -> None:
    x = images(32, 3)
    with torch.no_grad():
        run_on_all_ranks, alone = network(x), network(x[1:2])
    torch.testing.assert_close(run_on_all_ranks[1:2], alone)
    assert not torch.allclose(run_on_all_ranks[0], run_on_all_ranks[1])


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_the_gradient_reaches_every_parameter(name: str) -> None:
    torch.manual_seed(7)
    network = ours(name).train()
    network(images(32, 4))[:, 0].sum().backward()
    assert [key for key, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []
