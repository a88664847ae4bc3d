"""The embedding head of all backbones."""

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
