"""Networks of other packages, with unit-length embeddings in place of class scores.

Letters: B batch size, H x W pixels, F pooled features, D embedding size.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection
from typing import TypeVar

import torch
from torch import nn

from models import NetworkError
from models.head import Normalize

Size = tuple[int, int]
T = TypeVar("T")


class LibraryNetwork(nn.Module):
    """A package's network without its classifier, followed by an embedding layer.

    Its parameters are named ``backbone.NAME``, with the package's names, and ``fc.weight`` and ``fc.bias``.

    Args:
        backbone: images (B, 3, H, W) -> pooled features (B, F).
        features: F.
        low_dim: D.
        has_fixed_size: whether it was built for images of one size.
    """

    def __init__(self, backbone: nn.Module, features: int, *, low_dim: int, has_fixed_size: bool) -> None:
        super().__init__()
        self.backbone = backbone
        self.fc = nn.Linear(features, low_dim)
        self.l2norm = Normalize()
        self.has_fixed_size = has_fixed_size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) -> unit-length embeddings (B, D)."""
        return self._embed(self.backbone(x))

    def stages(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """The package's stages by the package's names.

        Args:
            x: images (B, 3, H, W).

        Returns:
            Maps (B, channels, h, w); ``pooled``: features (B, F); ``fc``: embeddings (B, D).
        """
        maps, pooled = self.maps_and_pooled(x)
        return {**maps, "pooled": pooled, "fc": self._embed(pooled)}

    def maps_and_pooled(self, x: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """The maps (B, channels, h, w) of the stages, and the pooled features (B, F)."""
        raise NotImplementedError

    def _embed(self, pooled: torch.Tensor) -> torch.Tensor:
        embeddings: torch.Tensor = self.l2norm(self.fc(pooled))
        return embeddings


def refuse_unknown(package: str, name: str, known: Collection[str], version: str) -> None:
    """Raises NetworkError with the most similar name unless ``name`` is known."""
    if name in known:
        return
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {package}/{near[0]}?" if near else f"; see the list of models of {package}"
    raise NetworkError(f"--network {package}/{name}: {package} {version} has no such network{hint}")


def construct(package: str, name: str, size: Size | None, pretrained: bool, build_it: Callable[[], T]) -> T:
    """Calls ``build_it``, and turns its errors into NetworkError: packages raise errors of many types."""
    try:
        return build_it()
    except NetworkError:
        raise
    except Exception as error:
        if isinstance(error, MemoryError) or "Allocator" in str(error):
            raise
        why = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        if pretrained:
            raise NetworkError(
                f"--pretrained {package}: the weights of {name} cannot be loaded ({why}); without internet access, "
                "give --pretrained a file with them"
            ) from None
        pixels = f" for images of {size[0]} x {size[1]} pixels" if size else ""
        raise NetworkError(
            f"--network {package}/{name}: cannot be built{pixels} ({why}); choose another --size or --network"
        ) from None
