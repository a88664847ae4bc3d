"""The embedding head of all backbones. Letters: B batch, D embedding size, F features before the head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class Normalize(nn.Module):
    """Scales each row to unit length: x / max(||x||, 1e-12). A row of zeros stays zero."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, D) -> (B, D)."""
        half = x.dtype in (torch.float16, torch.bfloat16)  # under autocast
        return F.normalize(x.float() if half else x, dim=1)


def use_mlp(network: nn.Module, low_dim: int) -> bool:
    """Puts a hidden layer of F units with a ReLU before the linear layer F -> D at the end of a network, in place.

    The projection head of Chen, Kornblith, Norouzi and Hinton 2020, "A Simple Framework for Contrastive Learning of
    Visual Representations". The parameters of the linear layer ``NAME`` become ``NAME.2``, those of the hidden layer
    are ``NAME.0``.

    Returns:
        Whether the network has such a layer.
    """
    layers = [(name, layer) for name, layer in network.named_modules() if isinstance(layer, nn.Linear)]
    if not layers or layers[-1][1].out_features != low_dim:
        return False
    name, last = layers[-1]
    hidden = nn.Linear(last.in_features, last.in_features)
    network.set_submodule(name, nn.Sequential(hidden, nn.ReLU(inplace=True), last))
    return True
