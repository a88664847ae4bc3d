"""The entropy of a softmax, from its logits part by part. Letters: R rows, S columns of a part, P parts."""

from __future__ import annotations

import torch


def softmax_statistics(logits: torch.Tensor) -> torch.Tensor:
    """What the entropy of a softmax can be put together from, part by part: the maximum m of each row (R, S), the sum
    of exp(z - m), and that of (z - m) exp(z - m): (R, 3).
    """
    greatest = logits.amax(dim=1, keepdim=True)
    shifted = logits - greatest  # (R, S), at most 0
    weights = shifted.exp()
    return torch.cat([greatest, weights.sum(1, keepdim=True), shifted.mul_(weights).sum(1, keepdim=True)], dim=1)


def empty_statistics(like: torch.Tensor) -> torch.Tensor:
    """(R, 3), of no logits."""
    return like.new_tensor([-torch.inf, 0, 0]).repeat(len(like), 1)


def merge_statistics(parts: torch.Tensor) -> torch.Tensor:
    """The moments (R, 3) of rows whose parts have the moments (P, R, 3)."""
    greatest, total, product = parts.unbind(2)  # (P, R)
    highest = greatest.amax(dim=0)
    lower = torch.where(total > 0, greatest - highest, 0)  # a part of no logits counts nothing
    shrink = lower.exp()
    return torch.stack([highest, (total * shrink).sum(0), ((product + lower * total) * shrink).sum(0)], dim=1)


def entropy_from_statistics(moments: torch.Tensor) -> torch.Tensor:
    """(R,) in nats."""
    return moments[:, 1].log() - moments[:, 2] / moments[:, 1]
