"""The instance loss between the views of the images of a batch, without a memory bank.

Ye, Zhang, Yuen and Chang 2019, "Unsupervised Embedding Learning via Invariant and Spreading Instance Feature" (CVPR),
equations 3 to 6.

Letters: B distinct images of a batch, V views of each, D embedding size.
"""

from __future__ import annotations

from itertools import permutations

import torch


def view_loss(views: torch.Tensor, *, temperature: float) -> torch.Tensor:
    """Each image is to be recognised in its other view, and in no other image of the same view.

    With two views f and g of each image,

        loss_i = -log P(i | g_i) - sum_{j != i} log(1 - P(i | f_j))
        P(i | g_i) = exp(f_i . g_i / tau) / sum_k exp(f_k . g_i / tau)
        P(i | f_j) = exp(f_i . f_j / tau) / sum_k exp(f_k . f_j / tau),  k over the B images

    averaged over the images, and over the pairs (f, g) of different views in both orders.

    Args:
        views: (B, V, D), unit length, V at least 2.
        temperature: tau.

    Returns:
        Scalar.
    """
    pairs = list(permutations(views.unbind(1), 2))
    return torch.stack([_loss_of_pair(f, g, temperature) for f, g in pairs]).mean()


def _loss_of_pair(f: torch.Tensor, g: torch.Tensor, temperature: float) -> torch.Tensor:
    is_same = torch.eye(len(f), dtype=torch.bool, device=f.device)
    log_own = (g @ f.t() / temperature).log_softmax(dim=1).diagonal()  # (B,), log P(i | g_i)
    others = (f @ f.t() / temperature).softmax(dim=1).masked_fill(is_same, 0)  # (B, B), row j: P(i | f_j), i != j
    return -(log_own.sum() + torch.log1p(-others).sum()) / len(f)
