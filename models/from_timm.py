"""Networks of the package timm, https://github.com/huggingface/pytorch-image-models: ``--network timm/NAME``.

Letters: B batch size, H x W pixels, F pooled features.
"""

from __future__ import annotations

import torch
from torch import nn

from models import NetworkError
from models.library import LibraryNetwork, Size, construct, refuse_unknown


class TimmNetwork(LibraryNetwork):
    """A network of timm. Its stages are those of ``feature_info``, such as ``layer4`` or ``blocks.11``."""

    def maps_and_pooled(self, x: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """The maps (B, channels, h, w) of the stages, and the pooled features (B, F)."""
        model = self.backbone
        if not hasattr(model, "forward_intermediates"):  # a few networks of older versions
            return {}, model(x)
        final, maps = model.forward_intermediates(x, output_fmt="NCHW")  # type: ignore[operator]
        names = [stage["module"] for stage in model.feature_info]  # type: ignore[union-attr]
        return dict(zip(names, maps, strict=True)), model.forward_head(final)  # type: ignore[operator]


def create(name: str, *, low_dim: int, size: Size | None, pretrained: bool) -> TimmNetwork:
    """Builds a network of timm, for images of ``size`` (H, W) if it needs to know it (None: timm's default).

    Raises:
        NetworkError: timm is missing, has no such network, cannot build it, or cannot download its weights.
    """
    try:
        import timm
    except Exception as error:  # also if its version is incompatible with PyTorch's
        raise NetworkError(
            f"--network timm/{name}: needs the package timm, which cannot be imported ({error}); run "
            "pip install -r requirements-timm.txt"
        ) from None
    refuse_unknown("timm", name, {*timm.list_models(), *timm.list_models(pretrained=True)}, timm.__version__)
    model, has_fixed_size = construct("timm", name, size, pretrained, lambda: _create(name, size, pretrained))
    features = getattr(model, "head_hidden_size", None) or model.num_features
    return TimmNetwork(model, int(features), low_dim=low_dim, has_fixed_size=has_fixed_size)  # type: ignore[arg-type]


def _create(name: str, size: Size | None, pretrained: bool) -> tuple[nn.Module, bool]:
    """The network without its classifier, and whether it was built for images of ``size``."""
    import timm

    if size:
        try:
            return timm.create_model(name, num_classes=0, pretrained=pretrained, img_size=size), True
        except TypeError as error:  # convolutional networks take images of any size, and no such argument
            if "img_size" not in str(error):
                raise
    return timm.create_model(name, num_classes=0, pretrained=pretrained), False
