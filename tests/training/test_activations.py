"""What passes take in memory: counted by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lib.training.activations import activations, takes

CPU = torch.device("cpu")


def test_activations_of_a_small_network_counted_by_hand() -> None:
    """Linear 48 -> 64, ReLU in place, linear 64 -> 8, for 16 images, in floats of 4 bytes."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(48, 64, bias=False), nn.ReLU(inplace=True), nn.Linear(64, 8))
    saved = 16 * 48  # the channels-last batch, copied to become rows
    out = 16 * 8 + 1 + 1  # embeddings, their sum and its gradient
    gradients = (64 * 8 + 8) + 16 * 64 + 48 * 64  # of the second layer, of the hidden units, of the first layer
    assert activations(network, (16, 3, 4, 4)) == 4 * (saved + out + gradients)


def test_a_view_is_no_array_of_its_own() -> None:
    def network(*more: nn.Module) -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 32, 3, padding=1, bias=False), *more, nn.BatchNorm2d(32))

    shape, layout = (8, 3, 16, 16), torch.contiguous_format
    seen_through = network(nn.Flatten(), nn.Unflatten(1, (32, 16, 16)))
    assert activations(seen_through, shape, layout=layout) == activations(network(), shape, layout=layout)


def test_activations_grow_with_the_batch_and_shrink_under_autocast() -> None:
    network = nn.Sequential(*[nn.Conv2d(3, 3, 3, padding=1) for _ in range(8)])
    one, two = activations(network, (8, 3, 32, 32)), activations(network, (16, 3, 32, 32))
    assert two == pytest.approx(2 * one, rel=0.05)
    half = activations(network, (16, 3, 32, 32), autocast=torch.bfloat16)
    assert half == pytest.approx(two / 2, rel=0.2)


def test_a_contiguous_batch_is_copied_for_a_convolution() -> None:
    network = nn.Conv2d(16, 16, 3, padding=1, bias=False)
    shape, array = (8, 16, 32, 32), 4 * 8 * 16 * 32 * 32
    contiguous = activations(network, shape, layout=torch.contiguous_format)
    assert contiguous - activations(network, shape) >= array  # of images and gradients; one of weights is small


def test_counting_leaves_the_network_as_it_was() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    activations(network, (4, 3, 8, 8))
    assert not network.training and not network[1].training
    assert all(parameter.grad is None and parameter.device == CPU for parameter in network.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_images_too_small_for_a_network_s_kernels_do_not_pass_it() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 5), nn.BatchNorm2d(4))
    assert takes(network, (5, 5)) and not takes(network, (4, 5))
    assert network.training and all(parameter.device == CPU for parameter in network.parameters())
