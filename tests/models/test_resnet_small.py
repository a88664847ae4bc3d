"""The small-image ResNets: the reference's names and sizes, and a plain forward pass."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from models import NETWORKS, build
from models.head import Normalize

BASIC = {"resnet10": (1, 1, 1, 1), "resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3)}
BOTTLENECK = {"resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3), "resnet152": (3, 8, 36, 3)}
NARROW = {f"{name}-w{width}": (name, width) for name in ("resnet10", "resnet18") for width in (16, 32)}
"""Narrow variants: the full network of each and the channels of its stem."""

State = dict[str, torch.Tensor]
Shapes = dict[str, tuple[int, ...]]


def on_paper(name: str, low_dim: int = 128) -> torch.nn.Module:
    """A network on the meta device: shapes without values, quick at any depth."""
    with torch.device("meta"):
        return build(name, low_dim=low_dim)


def convolutions(name: str) -> Iterator[tuple[str, str, tuple[int, int, int], int]]:
    """(convolution, its normalisation, (outputs, inputs, kernel edge), stride) from the image to the last map."""
    name, stem = NARROW.get(name, (name, 64))
    yield "conv1", "bn1", (stem, 3, 3), 1
    inputs = stem
    for stage, depth in enumerate({**BASIC, **BOTTLENECK}[name], 1):
        width = stem * 2 ** (stage - 1)
        outputs = width if name in BASIC else 4 * width
        for number in range(depth):
            block, stride = f"layer{stage}.{number}", 2 if number == 0 and stage > 1 else 1
            if name in BASIC:
                yield f"{block}.conv1", f"{block}.bn1", (width, inputs, 3), stride
                yield f"{block}.conv2", f"{block}.bn2", (width, width, 3), 1
            else:
                yield f"{block}.conv1", f"{block}.bn1", (width, inputs, 1), 1
                yield f"{block}.conv2", f"{block}.bn2", (width, width, 3), stride
                yield f"{block}.conv3", f"{block}.bn3", (outputs, width, 1), 1
            if stride != 1 or inputs != outputs:
                yield f"{block}.shortcut.0", f"{block}.shortcut.1", (outputs, inputs, 1), stride
            inputs = outputs


def shapes_of(name: str, low_dim: int) -> Shapes:
    shapes: Shapes = {}
    for convolution, norm, (outputs, inputs, edge), _ in convolutions(name):
        shapes[f"{convolution}.weight"] = (outputs, inputs, edge, edge)
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{norm}.{part}"] = (outputs,)
        shapes[f"{norm}.num_batches_tracked"] = ()
    return {
        **shapes,
        "linear.weight": (low_dim, outputs),  # as wide as the last convolution
        "linear.bias": (low_dim,),
    }


def images(size: int, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(2))


def filled(name: str = "resnet10", low_dim: int = 6) -> torch.nn.Module:
    """A network for inference whose normalisation parameters and statistics differ from their initial values."""
    torch.manual_seed(4)
    network = build(name, low_dim=low_dim)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.8, 1.2)
            torch.nn.init.uniform_(module.bias, -0.2, 0.2)
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.3, 0.7)
    return network.eval()


# Names and sizes.


def test_every_depth_of_the_family_is_available() -> None:
    assert {name for name in NETWORKS if name.startswith("resnet")} == {*BASIC, *BOTTLENECK, *NARROW}


@pytest.mark.parametrize("name", [*BASIC, *BOTTLENECK, *NARROW])
def test_names_and_shapes_equal_the_reference(name: str) -> None:
    state = on_paper(name, low_dim=128).state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == shapes_of(name, low_dim=128)


@pytest.mark.parametrize("name", [*BASIC, *BOTTLENECK])
def test_number_in_the_name_is_the_number_of_layers(name: str) -> None:
    """The convolutions of the main path and the linear layer are counted."""
    modules = on_paper(name).named_modules()
    layers = [key for key, m in modules if isinstance(m, torch.nn.Conv2d | torch.nn.Linear) and "shortcut" not in key]
    assert len(layers) == int(name.removeprefix("resnet"))


def test_number_of_parameters_of_resnet18_equals_the_formula() -> None:
    def stage(inputs: int, width: int) -> int:
        """Two blocks of two 3x3 convolutions and normalisations; a 1x1 projection where the width changes."""
        convolutions = 9 * inputs * width + 3 * 9 * width * width
        projection = inputs * width + 2 * width if inputs != width else 0
        return convolutions + 4 * 2 * width + projection

    stem, head = 9 * 3 * 64 + 2 * 64, 512 * 128 + 128
    expected = stem + stage(64, 64) + stage(64, 128) + stage(128, 256) + stage(256, 512) + head
    assert expected == 11_234_496  # 11,168,832 without the head
    assert sum(p.numel() for p in on_paper("resnet18").parameters()) == expected


def test_convolutions_have_no_bias_and_all_parameters_train() -> None:
    network = on_paper("resnet50")
    assert all(m.bias is None for m in network.modules() if isinstance(m, torch.nn.Conv2d))
    assert all(p.requires_grad for p in network.parameters())


def test_network_name_ignores_case_and_unknown_one_is_refused() -> None:
    with torch.device("meta"):
        network = build("ResNet10", low_dim=3)
        with pytest.raises(KeyError):
            build("resnet11", low_dim=3)
    assert {k: tuple(v.shape) for k, v in network.state_dict().items()} == shapes_of("resnet10", low_dim=3)


# The forward pass.


def plainly(name: str, state: State, x: torch.Tensor) -> torch.Tensor:
    """The network in inference mode, computed from its state dict."""

    def normalised(x: torch.Tensor, norm: str) -> torch.Tensor:
        mean, var, weight, bias = (
            state[f"{norm}.{part}"][:, None, None] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    def layer(x: torch.Tensor, convolution: str, norm: str, edge: int, stride: int) -> torch.Tensor:
        return normalised(F.conv2d(x, state[f"{convolution}.weight"], stride=stride, padding=edge // 2), norm)

    (stem, *_), *steps = [(conv, norm, shape[2], stride) for conv, norm, shape, stride in convolutions(name)]
    assert stem == "conv1"
    x = layer(x, "conv1", "bn1", 3, 1).relu()
    blocks: dict[str, list[tuple[str, str, int, int]]] = {}
    for step in steps:
        blocks.setdefault(".".join(step[0].split(".")[:2]), []).append(step)
    for parts in blocks.values():
        main = [part for part in parts if "shortcut" not in part[0]]
        side, out = x, x
        for number, part in enumerate(main):
            out = layer(out, *part)
            out = out.relu() if number < len(main) - 1 else out
        for part in parts:
            side = layer(x, *part) if "shortcut" in part[0] else side
        x = (out + side).relu()
    pooled = x.sum(dim=(2, 3)) / (x.shape[2] * x.shape[3])
    embedding = pooled @ state["linear.weight"].t() + state["linear.bias"]
    return embedding / (embedding**2).sum(dim=1, keepdim=True).sqrt()


NETWORKS_AND_SIZES = [("resnet10", 8), ("resnet10", 32), ("resnet18", 8), ("resnet50", 8), ("resnet10-w16", 8)]


@pytest.mark.parametrize(("name", "size"), NETWORKS_AND_SIZES)
def test_forward_pass_equals_the_plain_formula(name: str, size: int) -> None:
    network = filled(name).double()
    x = images(size).double()
    with torch.no_grad():
        torch.testing.assert_close(network(x), plainly(name, network.state_dict(), x), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("size", [8, 32])
@pytest.mark.parametrize("training", [True, False])
def test_embeddings_have_unit_length(size: int, training: bool) -> None:
    with torch.no_grad():
        embeddings = filled().train(training)(images(size, 3))
    assert embeddings.shape == (3, 6)
    torch.testing.assert_close((embeddings**2).sum(dim=1).sqrt(), torch.ones(3))


@pytest.mark.parametrize(("size", "edges"), [(8, [8, 8, 4, 2, 1]), (32, [32, 32, 16, 8, 4]), (5, [5, 5, 3, 2, 1])])
def test_stages_halve_the_map_and_double_its_channels(size: int, edges: list[int]) -> None:
    network = on_paper("resnet10", low_dim=6)
    maps = network.stages(torch.empty(2, 3, size, size, device="meta"))
    assert list(maps) == ["conv1", "conv2", "conv3", "conv4", "conv5", "fc"]
    *shapes, last = [tuple(value.shape) for value in maps.values()]
    assert shapes == [(2, c, edge, edge) for c, edge in zip((64, 64, 128, 256, 512), edges, strict=True)]
    assert last == (2, 6)


def test_bottleneck_stages_are_four_times_as_wide() -> None:
    maps = on_paper("resnet50").stages(torch.empty(2, 3, 32, 16, device="meta"))
    channels = [value.shape[1] for name, value in maps.items() if name != "fc"]
    assert channels == [64, 256, 512, 1024, 2048]
    assert maps["conv5"].shape[2:] == (4, 2)


def test_last_stage_is_the_output() -> None:
    network, x = filled(), images(8)
    with torch.no_grad():
        assert torch.equal(network.stages(x)["fc"], network(x))


def test_pooling_at_32_pixels_equals_4x4_average_pooling() -> None:
    network, x = filled(), images(32)
    with torch.no_grad():
        maps = network.stages(x)
        pooled = F.avg_pool2d(maps["conv5"], 4).flatten(1)
        expected = F.linear(pooled, network.linear.weight, network.linear.bias)
        torch.testing.assert_close(network(x), expected / expected.norm(dim=1, keepdim=True))


@pytest.mark.parametrize("size", [1, 3, 9])
def test_images_of_any_size_are_accepted(size: int) -> None:
    with torch.no_grad():
        assert filled()(images(size)).isfinite().all()


def test_every_parameter_receives_a_gradient() -> None:
    network = filled().train()
    network(images(8, 4))[:, 0].sum().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_normalising_a_row_of_zeros_gives_zeros() -> None:
    rows = torch.tensor([[0.0, 0.0], [3.0, 4.0], [-5.0, 0.0]])
    torch.testing.assert_close(Normalize()(rows), torch.tensor([[0.0, 0.0], [0.6, 0.8], [-1.0, 0.0]]))
