"""Networks of the package timm, https://github.com/huggingface/pytorch-image-models: ``--network timm/NAME``.

Letters: B batch size, H x W pixels, F pooled features.
"""

from __future__ import annotations

import ssl
import urllib.error
import urllib.request
from functools import partial

import torch
from torch import nn

from models import NetworkError
from models.library import LibraryNetwork, Size, construct, refuse_unknown

ANSWER = 10
"""Seconds in which the server of the weights has to answer."""


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
    model, has_fixed_size = construct(
        "timm", name, size, pretrained, partial(_create_pretrained if pretrained else _create, name, size)
    )
    features = getattr(model, "head_hidden_size", None) or model.num_features
    return TimmNetwork(model, int(features), low_dim=low_dim, has_fixed_size=has_fixed_size)  # type: ignore[arg-type]


def _create_pretrained(name: str, size: Size | None) -> tuple[nn.Module, bool]:
    """As ``_create``, with weights from a server or, if it does not answer, from the cache of ``huggingface_hub``.

    That package would try again for half a minute or more, with a message each time.

    Raises:
        ConnectionError: the server does not answer, and the cache does not hold the weights.
    """
    from huggingface_hub import constants

    try:
        urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=ANSWER).close()
    except OSError as error:
        why = getattr(error, "reason", error)
        if not isinstance(error, urllib.error.HTTPError) and not isinstance(why, ssl.SSLError):  # these are answers
            constants.HF_HUB_OFFLINE = True
            try:
                return _create(name, size, pretrained=True)
            except OSError:
                raise ConnectionError(f"{constants.ENDPOINT} cannot be reached: {why}") from None
    return _create(name, size, pretrained=True)


def _create(name: str, size: Size | None, pretrained: bool = False) -> tuple[nn.Module, bool]:
    """The network without its classifier, and whether it was built for images of ``size``."""
    import timm

    if size:
        try:
            return timm.create_model(name, num_classes=0, pretrained=pretrained, img_size=size), True
        except TypeError as error:  # convolutional networks take images of any size, and no such argument
            if "img_size" not in str(error):
                raise
    return timm.create_model(name, num_classes=0, pretrained=pretrained), False
