"""Backbones: images (B, 3, H, W) -> unit-length embeddings (B, D)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from models import alexnet, resnet_imagenet, resnet_small

NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "resnet10-w16": partial(resnet_small.resnet10, width=16),
    "resnet10-w32": partial(resnet_small.resnet10, width=32),
    "resnet10": resnet_small.resnet10,
    "resnet18-w16": partial(resnet_small.resnet18, width=16),
    "resnet18-w32": partial(resnet_small.resnet18, width=32),
    "resnet18": resnet_small.resnet18,
    "resnet34": resnet_small.resnet34,
    "resnet50": resnet_small.resnet50,
    "resnet101": resnet_small.resnet101,
    "resnet152": resnet_small.resnet152,
    "imagenet-resnet18": resnet_imagenet.resnet18,
    "imagenet-resnet34": resnet_imagenet.resnet34,
    "imagenet-resnet50": resnet_imagenet.resnet50,
    "imagenet-resnet101": resnet_imagenet.resnet101,
    "imagenet-resnet152": resnet_imagenet.resnet152,
    "alexnet": alexnet.alexnet,
    "alexnet-small": alexnet.alexnet_small,
}


def build(name: str, *, low_dim: int) -> nn.Module:
    """A freshly initialised network of ``NETWORKS``, by its name in any case; KeyError if there is none."""
    return NETWORKS[name.lower()](low_dim=low_dim)
