"""Embeddings of a whole split compared with a forward pass image by image."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from lib.evaluation.features import embedder, extract

SAMPLES = 11
CPU = torch.device("cpu")


class Shuffled:
    """Batches of four in random order, the last one smaller."""

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(3)
        self.images = torch.randn(SAMPLES, 3, 2, 2, generator=draw)
        self.parts = torch.randperm(SAMPLES, generator=draw).split(4)

    def __len__(self) -> int:
        return len(self.parts)

    def epoch(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return iter([(self.images[part], part) for part in self.parts])


def network() -> torch.nn.Module:
    """With batch normalisation and dropout, which behave differently in training mode."""
    torch.manual_seed(1)
    norm = torch.nn.BatchNorm1d(5)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5), norm, torch.nn.Dropout(0.5))
    norm.running_mean, norm.running_var = torch.randn(5), torch.rand(5) + 0.5
    return net


def one_by_one(net: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """The formula of the network in inference mode."""
    linear, norm = net[1], net[2]
    rows = []
    for image in images:
        hidden = linear.weight @ image.reshape(12) + linear.bias
        scaled = (hidden - norm.running_mean) / (norm.running_var + norm.eps).sqrt()
        rows.append(scaled * norm.weight + norm.bias)
    return torch.stack(rows).detach()


@pytest.mark.parametrize("training", [True, False])
def test_features_are_network_outputs_in_sample_order(training: bool) -> None:
    net, batches = network().train(training), Shuffled()
    features = extract(net, batches, "features")
    assert features.shape == (SAMPLES, 5)
    torch.testing.assert_close(features, one_by_one(net, batches.images), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_extraction_keeps_mode_and_batch_statistics(training: bool) -> None:
    net = network().train(training)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    extract(net, Shuffled(), "features")
    assert [module.training for module in net.modules()] == [training] * 5
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_features_need_no_gradient() -> None:
    net = network()
    assert not extract(net, Shuffled(), "features").requires_grad
    assert all(parameter.grad is None for parameter in net.parameters())
    assert torch.is_grad_enabled()


class Staged(torch.nn.Module):
    """Stages that can be computed by hand."""

    def stages(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"conv1": images.square(), "fc": images.flatten(1)}


@pytest.mark.parametrize("training", [True, False])
def test_pooled_stage_is_the_normalised_mean_over_positions(training: bool) -> None:
    net, batches = Staged().train(training), Shuffled()
    found = extract(embedder(net, "conv1"), batches, "features")
    for image, row in zip(batches.images.double(), found, strict=True):
        means = [sum(value.item() ** 2 for value in channel.flatten()) / 4 for channel in image]
        length = sum(value**2 for value in means) ** 0.5
        assert row.tolist() == pytest.approx([value / length for value in means], rel=1e-5)
    assert net.training is training


def test_embedder_of_the_last_stage_is_the_network() -> None:
    net = network()
    assert embedder(net, "fc") is net
