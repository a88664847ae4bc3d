"""Backbones: images (B, 3, H, W) -> unit-length embeddings (B, D).

To add a network, add an entry to ``NETWORKS``: a callable that takes ``low_dim``, D, and returns a module. Its
``forward`` returns the embeddings; its ``stages`` returns a dict of the feature maps (B, channels, h, w) by name, with
the embeddings as ``fc``. Networks of other packages are named ``PACKAGE/NAME``; see ``PACKAGES``.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def _lazy(module: str, name: str, **fixed: Any) -> Callable[..., nn.Module]:
    """``name`` of ``models/<module>.py``, imported on first use, so that listing the names does not import PyTorch."""

    def build_it(*arguments: Any, **options: Any) -> nn.Module:
        network: nn.Module = getattr(import_module(f"{__name__}.{module}"), name)(*arguments, **fixed, **options)
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

PACKAGES: dict[str, Callable[..., nn.Module]] = {
    "timm": _lazy("from_timm", "create"),
    "torchvision": _lazy("from_torchvision", "create"),
}
"""Packages whose networks can be used: functions of a network's name, ``low_dim``, ``size`` and ``pretrained``."""


class NetworkError(Exception):
    """A network cannot be used. The message says why."""


def package_of(name: str) -> str | None:
    """The package of a network called ``PACKAGE/NAME``; None for those of ``NETWORKS``."""
    package, slash, _ = name.lower().partition("/")
    return package if slash and package in PACKAGES else None


def build(
    name: str,
    *,
    low_dim: int,
    size: tuple[int, int] | None = None,
    pretrained: bool = False,
    head: str = "linear",
    stage: str = "fc",
) -> nn.Module:
    """Builds a network with random weights.

    Args:
        name: a key of ``NETWORKS``, or the name of a network of ``PACKAGES``, in any case.
        low_dim: D, the size of the embedding.
        size: (H, W) of the input; if given, the network is checked with one image on the CPU. Some networks of other
            packages are built for one size.
        pretrained: download the weights that its package has for the network, all but those of the embedding layer.
        head: ``linear``, or ``mlp`` for a hidden layer before the last one (``models.head.use_mlp``).
        stage: a stage that the network must have; checked if ``size`` is given.

    Raises:
        KeyError: there is no such network.
        NetworkError: the network does not have the interface above, does not accept images of that size, or cannot be
            built by its package.
    """
    if package := package_of(name):
        inner = name.lower().partition("/")[2]
        network = PACKAGES[package](inner, low_dim=low_dim, size=size, pretrained=pretrained)
    else:
        network = NETWORKS[name.lower()](low_dim=low_dim)
    if not callable(getattr(network, "stages", None)):
        raise NetworkError(f"--network {name}: has no method stages(images); add it as described in models/__init__.py")
    if head == "mlp":
        from models.head import use_mlp  # imports PyTorch

        if not use_mlp(network, low_dim):
            raise NetworkError(
                f"--head mlp: the network {name} does not end in a linear layer of --low-dim {low_dim} outputs; use "
                "--head linear"
            )
    if size and (fault := _fault(network, low_dim, size, stage)):
        raise NetworkError(f"--network {name}: {fault}")
    return network


def check_size(network: nn.Module, name: str, *, low_dim: int, size: tuple[int, int]) -> None:
    """Checks that a network accepts the images of the early epochs (``--early-size``), too.

    Raises:
        NetworkError: it does not.
    """
    if fault := _fault(network, low_dim, size, "fc", "--early-size"):
        raise NetworkError(f"--network {name}: {fault}")


def _fault(network: nn.Module, low_dim: int, size: tuple[int, int], stage: str, option: str = "--size") -> str | None:
    """The fault of a network's outputs, or None. The network is not modified."""
    import torch

    images = torch.linspace(-1, 1, 3 * size[0] * size[1]).view(1, 3, *size)
    was_training = network.training
    try:
        with torch.no_grad():
            embedding, stages = network.eval()(images), network.stages(images)  # type: ignore[operator]
    except (RuntimeError, AssertionError, ValueError) as error:  # the last two from networks of other packages
        if "Allocator" in str(error):  # memory ran out
            raise
        why = str(error).partition("\n")[0][:200]
        return (
            f"does not accept images of {size[0]} x {size[1]} pixels ({why}); set {option} higher if that is too small"
        )
    finally:
        network.train(was_training)
    if not isinstance(embedding, torch.Tensor) or embedding.shape != (1, low_dim):
        shape = tuple(embedding.shape) if isinstance(embedding, torch.Tensor) else type(embedding).__name__
        return f"its embedding of one image must have shape (1, {low_dim}), as set by --low-dim, and is {shape}"
    if abs(embedding.norm().item() - 1) > 1e-3:
        return f"its embeddings must have unit length, and one has {embedding.norm().item():.3g}"
    if not isinstance(stages, dict) or not all(isinstance(maps, torch.Tensor) for maps in stages.values()):
        return "its stages(images) must return a dict of tensors by name"
    if "fc" not in stages or stages["fc"].shape != embedding.shape:
        return "its stages(images) must contain the embeddings as 'fc'"
    if stage not in stages:
        return f"has no stage {stage}; set --embed to one of {', '.join(stages)}"
    return None
