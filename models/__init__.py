"""Backbones: images (B, 3, H, W) -> unit-length embeddings (B, D)."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def _lazy(module: str, name: str, **fixed: int) -> Callable[..., nn.Module]:
    """``name`` of ``models/<module>.py``, imported when it is called: the names alone must not wait for PyTorch."""

    def build_it(**options: int) -> nn.Module:
        network: nn.Module = getattr(import_module(f"models.{module}"), name)(**fixed, **options)
        return network

    return build_it


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "resnet10-w16": _lazy("resnet_small", "resnet10", width=16),
    "resnet10-w32": _lazy("resnet_small", "resnet10", width=32),
    "resnet10": _lazy("resnet_small", "resnet10"),
    "resnet18-w16": _lazy("resnet_small", "resnet18", width=16),
    "resnet18-w32": _lazy("resnet_small", "resnet18", width=32),
    "resnet18": _lazy("resnet_small", "resnet18"),
    "resnet34": _lazy("resnet_small", "resnet34"),
    "resnet50": _lazy("resnet_small", "resnet50"),
    "resnet101": _lazy("resnet_small", "resnet101"),
    "resnet152": _lazy("resnet_small", "resnet152"),
    "imagenet-resnet18": _lazy("resnet_imagenet", "resnet18"),
    "imagenet-resnet34": _lazy("resnet_imagenet", "resnet34"),
    "imagenet-resnet50": _lazy("resnet_imagenet", "resnet50"),
    "imagenet-resnet101": _lazy("resnet_imagenet", "resnet101"),
    "imagenet-resnet152": _lazy("resnet_imagenet", "resnet152"),
    "alexnet": _lazy("alexnet", "alexnet"),
    "alexnet-small": _lazy("alexnet", "alexnet_small"),
}


def build(name: str, *, low_dim: int) -> nn.Module:
    """A freshly initialised network of ``NETWORKS``, by its name in any case; KeyError if there is none."""
    return NETWORKS[name.lower()](low_dim=low_dim)
