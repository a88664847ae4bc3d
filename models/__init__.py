"""Backbones: images (B, 3, H, W) -> unit-length embeddings (B, D).

A network of one's own is one more entry of ``NETWORKS``: a callable that takes ``low_dim``, D, and returns a module
whose ``forward`` gives the embeddings, and whose ``stages`` gives the maps (B, channels, h, w) of its stages by name,
in a dict with the embeddings as ``fc``.
"""

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


class NetworkError(Exception):
    """A network that cannot be used; the message says what is wrong with it."""


def build(name: str, *, low_dim: int, size: tuple[int, int] | None = None) -> nn.Module:
    """A freshly initialised network of ``NETWORKS``, by its name in any case.

    Args:
        name: as in ``NETWORKS``.
        low_dim: D, the size of the embedding.
        size: (H, W) that it will see; if it is given, one image is passed through on the CPU.

    Raises:
        KeyError: there is no such network.
        NetworkError: it lacks what this module's docstring asks of a network, or takes no images of that size.
    """
    network = NETWORKS[name.lower()](low_dim=low_dim)
    if not callable(getattr(network, "stages", None)):
        raise NetworkError(f"--network {name}: has no method stages(images); models/__init__.py says what it returns")
    if size and (fault := _fault(network, low_dim, size)):
        raise NetworkError(f"--network {name}: {fault}")
    return network


def _fault(network: nn.Module, low_dim: int, size: tuple[int, int]) -> str | None:
    """What is wrong with the outputs of a network, which stays as it is."""
    import torch

    images = torch.linspace(-1, 1, 3 * size[0] * size[1]).view(1, 3, *size)
    was_training = network.training
    try:
        with torch.no_grad():
            embedding, stages = network.eval()(images), network.stages(images)  # type: ignore[operator]
    except RuntimeError as error:
        if "Allocator" in str(error):  # memory ran out
            raise
        why = str(error).partition("\n")[0][:200]
        return f"takes no images of {size[0]} x {size[1]} pixels ({why}); if they are too small, set --size higher"
    finally:
        network.train(was_training)
    if not isinstance(embedding, torch.Tensor) or embedding.shape != (1, low_dim):
        shape = tuple(embedding.shape) if isinstance(embedding, torch.Tensor) else type(embedding).__name__
        return f"its embedding of one image should be of shape (1, {low_dim}), by --low-dim, and is {shape}"
    if abs(embedding.norm().item() - 1) > 1e-3:
        return f"its embeddings should be of unit length, and one has {embedding.norm().item():.3g}"
    if not isinstance(stages, dict) or not all(isinstance(maps, torch.Tensor) for maps in stages.values()):
        return "its stages(images) should be a dict of tensors by name"
    if "fc" not in stages or stages["fc"].shape != embedding.shape:
        return "its stages(images) should have the embeddings as 'fc'"
    return None
