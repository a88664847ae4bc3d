"""The entropy of a softmax from the statistics of its parts (online softmax, Milakov and Gimelshein 2018).

With the row maximum m, S = sum_j exp(z_j - m) and T = sum_j (z_j - m) exp(z_j - m), the entropy of softmax(z) is
log S - T / S. The statistics (m, S, T) of two parts of a row give those of the whole: shift both to the larger
maximum and add. This is exact up to rounding and stays finite where probabilities underflow.

Letters: R rows, S columns of a part, P parts.
"""

from __future__ import annotations

import torch


def softmax_statistics(logits: torch.Tensor) -> torch.Tensor:
    """Statistics (m, S, T) of each row of logits z.

    Args:
        logits: (R, S).

    Returns:
        (R, 3): the maximum m, the sum of exp(z - m), and the sum of (z - m) exp(z - m).
    """
    row_max = logits.amax(dim=1, keepdim=True)
    shifted = logits - row_max  # (R, S), at most 0
    weights = shifted.exp()
    return torch.cat([row_max, weights.sum(1, keepdim=True), shifted.mul_(weights).sum(1, keepdim=True)], dim=1)


def empty_statistics(like: torch.Tensor) -> torch.Tensor:
    """Statistics (R, 3) of rows without logits, the neutral element of ``merge_statistics``; R = ``len(like)``."""
    statistics = like.new_zeros(len(like), 3)
    statistics[:, 0] = -torch.inf
    return statistics


def merge_statistics(parts: torch.Tensor) -> torch.Tensor:
    """Merges the statistics of P parts of the same rows: (P, R, 3) -> (R, 3)."""
    part_max, total, product = parts.unbind(2)  # (P, R)
    row_max = part_max.amax(dim=0)
    shift = torch.where(total > 0, part_max - row_max, 0)  # an empty part contributes nothing
    scale = shift.exp()
    return torch.stack([row_max, (total * scale).sum(0), ((product + shift * total) * scale).sum(0)], dim=1)


def entropy_from_statistics(statistics: torch.Tensor) -> torch.Tensor:
    """Entropy in nats, log S - T / S: (R, 3) -> (R,)."""
    return statistics[:, 1].log() - statistics[:, 2] / statistics[:, 1]
