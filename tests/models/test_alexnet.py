"""Both AlexNets: parameter counts by formula, and a plain forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F

from models.alexnet import AlexNet, alexnet, alexnet_small

SMALL, LARGE = "small", "large"
BUILD: dict[str, Callable[..., AlexNet]] = {SMALL: alexnet_small, LARGE: alexnet}
LEAST = {SMALL: 15, LARGE: 63}  # pixels
GRID = {SMALL: 3, LARGE: 6}
STAGES = ["conv1", "conv2", "conv3", "conv4", "conv5", "fc"]
FILTERS = (64, 192, 384, 256, 256)

# (position in `features`, stride, padding, pooled afterwards)
CONVOLUTIONS = {
    SMALL: [(0, 1, 2, True), (4, 1, 2, True), (8, 1, 1, False), (11, 1, 1, False), (14, 1, 1, True)],
    LARGE: [(0, 4, 2, True), (4, 1, 2, True), (8, 1, 1, False), (11, 1, 1, False), (14, 1, 1, True)],
}
KERNELS = {SMALL: (5, 5, 3, 3, 3), LARGE: (11, 5, 3, 3, 3)}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The feature maps are so small that several threads would be slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def on_paper(kind: str, low_dim: int = 6) -> AlexNet:
    """A network on the meta device: shapes without values."""
    with torch.device("meta"):
        return BUILD[kind](low_dim=low_dim)


def images(size: int, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(2))


def filled(kind: str) -> AlexNet:
    """A network for inference whose normalisation parameters and statistics differ from their initial values."""
    torch.manual_seed(4)
    network = BUILD[kind](low_dim=6)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d | torch.nn.BatchNorm1d):
            torch.nn.init.uniform_(module.weight, 0.8, 1.2)
            torch.nn.init.uniform_(module.bias, -0.2, 0.2)
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.3, 0.7)
    return network.eval()


@pytest.fixture(scope="module", params=[SMALL, LARGE])
def case(request: pytest.FixtureRequest) -> Iterator[tuple[str, AlexNet]]:
    """A network built once for all tests that do not change it: the hidden layers are large."""
    yield request.param, filled(request.param)


# Names and sizes.


@pytest.mark.parametrize("kind", BUILD)
def test_parameters_have_the_expected_names_and_shapes(kind: str) -> None:
    def norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
        parts = ("weight", "bias", "running_mean", "running_var")
        return {**{f"{name}.{part}": (width,) for part in parts}, f"{name}.num_batches_tracked": ()}

    expected: dict[str, tuple[int, ...]] = {}
    sizes = zip((3, *FILTERS), FILTERS, KERNELS[kind], CONVOLUTIONS[kind], strict=False)
    for inputs, outputs, kernel, (at, *_) in sizes:
        expected |= {f"features.{at}.weight": (outputs, inputs, kernel, kernel), **norm(f"features.{at + 1}", outputs)}
    for at, inputs in ((0, 256 * GRID[kind] ** 2), (3, 4096)):
        expected |= {f"classifier.{at}.weight": (4096, inputs), **norm(f"classifier.{at + 1}", 4096)}
    expected |= {"classifier.6.weight": (128, 4096), "classifier.6.bias": (128,)}
    state = on_paper(kind, low_dim=128).state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == expected


@pytest.mark.parametrize(("kind", "total"), [(SMALL, 29_207_616), (LARGE, 57_537_600)])
def test_number_of_parameters_equals_the_formula(kind: str, total: int) -> None:
    stem = 3 * 64 * (25 if kind == SMALL else 121)
    convolutions = stem + 64 * 192 * 25 + 9 * (192 * 384 + 384 * 256 + 256 * 256)
    hidden = 256 * GRID[kind] ** 2 * 4096 + 4096 * 4096
    norms = 2 * (64 + 192 + 384 + 256 + 256) + 2 * (4096 + 4096)
    head = 4096 * 128 + 128
    assert convolutions + hidden + norms + head == total
    assert sum(p.numel() for p in on_paper(kind, low_dim=128).parameters()) == total


def test_alexnet_differs_from_torchvision_in_norms_biases_and_head() -> None:
    """torchvision publishes 61,100,840 parameters, for a thousand classes."""
    biases, norms = sum(FILTERS) + 2 * 4096, 2 * sum(FILTERS) + 4 * 4096
    expected = 61_100_840 - biases + norms - 4097 * 1000 + 4097 * 128
    assert sum(p.numel() for p in on_paper(LARGE, low_dim=128).parameters()) == expected


@pytest.mark.parametrize(
    ("kind", "size", "edges"),
    [
        (LARGE, 224, [55, 27, 13, 13, 13]),
        (LARGE, 63, [15, 7, 3, 3, 3]),
        (SMALL, 32, [32, 15, 7, 7, 7]),
        (SMALL, 15, [15, 7, 3, 3, 3]),
    ],
)
def test_stages_have_the_expected_shapes(kind: str, size: int, edges: list[int]) -> None:
    maps = on_paper(kind).stages(torch.empty(3, 3, size, size, device="meta"))
    assert list(maps) == STAGES
    *shapes, last = [tuple(value.shape) for value in maps.values()]
    assert shapes == [(3, c, edge, edge) for c, edge in zip(FILTERS, edges, strict=True)]
    assert last == (3, 6)


@pytest.mark.parametrize("kind", BUILD)
def test_images_below_the_minimum_size_are_refused(kind: str) -> None:
    with pytest.raises(RuntimeError):
        on_paper(kind)(torch.empty(2, 3, LEAST[kind] - 1, LEAST[kind] - 1, device="meta"))


@pytest.mark.parametrize(("kind", "size"), [(SMALL, 32), (LARGE, 224)])
def test_adaptive_pooling_is_the_identity_at_the_intended_size(kind: str, size: int) -> None:
    last = on_paper(kind).features(torch.empty(2, 3, size, size, device="meta"))
    assert tuple(last.shape) == (2, 256, GRID[kind], GRID[kind])


# The forward pass.


def plainly(kind: str, state: dict[str, torch.Tensor], x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The network in inference mode, computed from its state dict."""

    def rectified(x: torch.Tensor, norm: str) -> torch.Tensor:
        mean, var, weight, bias = (
            state[f"{norm}.{part}"].view(1, -1, *[1] * (x.dim() - 2))
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        return ((x - mean) / (var + 1e-5).sqrt() * weight + bias).clamp(min=0)

    maps = {}
    for number, (at, stride, padding, pooled) in enumerate(CONVOLUTIONS[kind], 1):
        x = F.conv2d(x, state[f"features.{at}.weight"], stride=stride, padding=padding)
        x = maps[f"conv{number}"] = rectified(x, f"features.{at + 1}")
        x = F.max_pool2d(x, 3, stride=2) if pooled else x
    x = F.adaptive_avg_pool2d(x, GRID[kind]).flatten(1)
    for at in (0, 3):
        x = rectified(x @ state[f"classifier.{at}.weight"].t(), f"classifier.{at + 1}")
    x = x @ state["classifier.6.weight"].t() + state["classifier.6.bias"]
    return {**maps, "fc": x / (x**2).sum(dim=1, keepdim=True).sqrt()}


@pytest.mark.parametrize("last", ["one position", "too few", "to be averaged"])
def test_every_stage_equals_the_plain_formula(case: tuple[str, AlexNet], last: str) -> None:
    """The last maps have edges of 1, 2 and 5 or 7, so that pooling enlarges or averages them."""
    kind, network = case
    sizes = {SMALL: (15, 23, 47), LARGE: (63, 95, 255)}[kind]
    x = images(dict(zip(("one position", "too few", "to be averaged"), sizes, strict=True))[last])
    with torch.no_grad():
        maps, expected = network.stages(x), plainly(kind, network.state_dict(), x)
    assert list(maps) == list(expected)
    for stage, values in maps.items():
        torch.testing.assert_close(values, expected[stage], rtol=1e-4, atol=1e-5, msg=lambda m, s=stage: f"{s}: {m}")


def test_maps_are_taken_before_pooling(case: tuple[str, AlexNet]) -> None:
    """Max pooling follows convolutions 1, 2 and 5. Its inputs are their stages."""
    kind, network = case
    pooled: list[torch.Tensor] = []
    pools = [module for module in network.features if isinstance(module, torch.nn.MaxPool2d)]
    hooks = [pool.register_forward_pre_hook(lambda _, inputs: pooled.append(inputs[0].clone())) for pool in pools]
    try:
        with torch.no_grad():
            maps = network.stages(images(LEAST[kind] + 8))
    finally:
        for hook in hooks:
            hook.remove()
    assert len(pooled) == 3
    for stage, values in zip(("conv1", "conv2", "conv5"), pooled, strict=True):
        assert torch.equal(maps[stage], values), stage


def test_maps_follow_a_relu_and_embeddings_have_unit_length(case: tuple[str, AlexNet]) -> None:
    kind, network = case
    with torch.no_grad():
        *maps, embeddings = network.stages(images(LEAST[kind] + 8, 3)).values()
    assert len(maps) == 5
    for values in maps:
        assert values.min() == 0
        assert values.max() > 0
    assert embeddings.shape == (3, 6)
    torch.testing.assert_close((embeddings**2).sum(dim=1).sqrt(), torch.ones(3))


def test_embeddings_have_negative_values(case: tuple[str, AlexNet]) -> None:
    """No ReLU after the last layer."""
    kind, network = case
    with torch.no_grad():
        assert network(images(LEAST[kind], 3)).min() < 0


def test_forward_is_the_last_stage(case: tuple[str, AlexNet]) -> None:
    kind, network = case
    x = images(LEAST[kind])
    with torch.no_grad():
        assert torch.equal(network(x), network.stages(x)["fc"])


def test_inference_embedding_depends_only_on_its_image(case: tuple[str, AlexNet]) -> None:
    kind, network = case
    x = images(LEAST[kind], 3)
    with torch.no_grad():
        together, alone = network(x), network(x[1:2])
    torch.testing.assert_close(together[1:2], alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=1e-2)


@pytest.mark.parametrize("kind", BUILD)
def test_forward_is_deterministic_and_every_parameter_has_a_gradient(kind: str) -> None:
    """There is no dropout, so two passes in training mode agree."""
    torch.manual_seed(7)
    network, x = BUILD[kind](low_dim=6).train(), images(LEAST[kind], 4)
    embeddings = network(x)
    embeddings[:, 0].sum().backward()
    assert [key for key, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []
    with torch.no_grad():
        torch.testing.assert_close(network(x), embeddings.detach())
