"""Classification networks of torchvision: ``--network torchvision/NAME``.

Letters: B batch size, H x W pixels, F pooled features.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torchvision
from torch import nn
from torchvision import models as vision

from models import NetworkError
from models.library import LibraryNetwork, Size, construct, refuse_unknown

CONTAINERS = ("features", "layers", "blocks", "trunk_output")
"""torchvision's names of modules that hold the stages of a network."""
AUXILIARY = ("aux1", "aux2", "AuxLogits")
"""torchvision's names of the auxiliary classifiers of GoogLeNet and Inception."""


class TorchvisionNetwork(LibraryNetwork):
    """A network of torchvision. Its stages are its modules, such as ``layer4`` or ``features.12``, that return maps."""

    def maps_and_pooled(self, x: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """The maps (B, channels, h, w) of the stages, and the pooled features (B, F)."""
        maps: dict[str, torch.Tensor] = {}
        hooks = [module.register_forward_hook(partial(self._keep, maps, name)) for name, module in self._modules_of()]
        try:
            return maps, self.backbone(x)
        finally:
            for hook in hooks:
                hook.remove()

    def _modules_of(self) -> Iterator[tuple[str, nn.Module]]:
        for name, module in self.backbone.named_children():
            if name in CONTAINERS:
                yield from ((f"{name}.{inner}", part) for inner, part in module.named_children())
            else:
                yield name, module

    def _keep(self, maps: dict[str, torch.Tensor], name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if not isinstance(output, torch.Tensor) or output.dim() != 4:
            return
        for earlier in [key for key, value in maps.items() if value.data_ptr() == output.data_ptr()]:
            del maps[earlier]  # what an in-place operation, such as ReLU, has overwritten
        is_last = isinstance(self.backbone, vision.SwinTransformer) and name.startswith("features.")
        maps[name] = output.permute(0, 3, 1, 2) if is_last else output  # Swin has its channels last


def create(name: str, *, low_dim: int, size: Size | None, pretrained: bool) -> TorchvisionNetwork:
    """Builds a network of torchvision, for images of ``size`` (H, W) if it needs to know it (None: 224 x 224).

    Raises:
        NetworkError: torchvision has no such network, cannot build it, or cannot download its weights.
    """
    refuse_unknown("torchvision", name, vision.list_models(module=vision), torchvision.__version__)
    options: dict[str, Any] = {}
    if name.startswith("vit_") and size:
        if size[0] != size[1]:
            raise NetworkError(f"--network torchvision/{name}: takes square images only; set --size to one number")
        options = {"image_size": size[0]}
    elif name.startswith("maxvit_") and size:
        options = {"input_size": size}
    elif name in ("googlenet", "inception_v3"):  # would normalise the images a second time if weights are loaded
        options = {"transform_input": False, "init_weights": not pretrained}
    weights = "DEFAULT" if pretrained else None
    model = construct("torchvision", name, size, pretrained, lambda: vision.get_model(name, weights=weights, **options))
    for auxiliary in AUXILIARY:
        if hasattr(model, auxiliary):
            model.aux_logits = False
            setattr(model, auxiliary, None)
    classifier, layer = [
        (key, module) for key, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))
    ][-1]
    features = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels  # SqueezeNet ends in the latter
    model.set_submodule(classifier, nn.Identity())
    has_fixed_size = "image_size" in options or "input_size" in options
    return TorchvisionNetwork(model, features, low_dim=low_dim, has_fixed_size=has_fixed_size)
