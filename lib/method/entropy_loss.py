"""The entropy of a sample's similarities to all other samples, as a loss: it makes each image similar to few others.

The unification entropy of Han et al. 2020, "A Comprehensive Approach to Unsupervised Embedding Learning based on AND
Algorithm" (Super-AND, arXiv:2002.12158).

Entropy and gradient are accumulated over blocks of rows with a running maximum, as in ``lib/method/loss.py``, so the
(B, N) logits are never stored.

Letters: B embeddings, N samples, R rows of a block, D embedding size.
"""

from __future__ import annotations

from typing import Any

import torch

from lib.distributed.sharded import ShardedRows
from lib.method.chunking import block_size

LOWEST = -1e30
"""The running maximum before the first row. It is finite, so that differences are never NaN."""
NEGLIGIBLE = -100.0
"""Logits are clamped to this below the maximum: exp(-100) is negligible compared with 1, also in float64."""


def entropy_loss(
    embeddings: torch.Tensor, memory: torch.Tensor | ShardedRows, own: torch.Tensor, *, temperature: float
) -> torch.Tensor:
    """Entropy of the similarities to the rows of all other samples, averaged over the embeddings.

    H_i = -sum_{j != i} p_ij log p_ij with p_ij = exp(z_ij) / sum_{n != i} exp(z_in) and z_ij = x_i . m_j / tau. The
    gradient by x_i is -sum_j p_ij (z_ij - sum_n p_in z_in) m_j / (tau B).

    Args:
        embeddings: (B, D), unit length, the same on every rank.
        memory: (N, D), treated as a constant.
        own: (B,) sample index of each embedding.
        temperature: tau.

    Returns:
        Scalar, the same on every rank.
    """
    loss: torch.Tensor = _EntropyLoss.apply(embeddings, ShardedRows.of(memory), own, temperature)
    return loss


class _EntropyLoss(torch.autograd.Function):
    """With z' = z - max: S = sum exp z', T = sum z' exp z', and the rows weighted by exp z' and by z' exp z'."""

    @staticmethod
    def forward(
        ctx: Any, embeddings: torch.Tensor, bank: ShardedRows, own: torch.Tensor, temperature: float
    ) -> torch.Tensor:
        scaled = embeddings / temperature
        local_max, sums, rows = _statistics(scaled, bank, own)
        global_max = bank.ranks.all_reduce_max(local_max.clone())
        sums, rows = (_shift(each, local_max - global_max) for each in (sums, rows))
        total, product = bank.ranks.all_reduce_sum(sums.contiguous()).unbind(1)  # (B, 1) each
        mean = product / total
        gradient = (mean * rows[:, 0] - rows[:, 1]) / (total * temperature * len(embeddings))
        ctx.save_for_backward(bank.ranks.all_reduce_sum(gradient))
        return (total.log() - mean).mean()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0], None, None, None


def _shift(sums: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Sums (B, 2, ...) of exp z' and of z' exp z' for z' + shift, shift (B, 1) at most 0."""
    plain, product = sums.unbind(1)
    return torch.stack([plain, product + shift * plain], dim=1) * shift.exp()[:, None]


def _statistics(
    scaled: torch.Tensor, bank: ShardedRows, own: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Statistics over the rows of this rank without the own ones: the maximum (B, 1), S and T (B, 2, 1), and the rows
    weighted by exp z' and by z' exp z' (B, 2, D)."""
    running_max = scaled.new_full((len(scaled), 1), LOWEST)
    sums, weighted = scaled.new_zeros(len(scaled), 2, 1), scaled.new_zeros(len(scaled), 2, scaled.shape[1])
    size, start = max(1, block_size(bank.device) // len(scaled)), bank.start
    for rows in bank.local.split(size) if len(bank.local) else ():  # (R, D)
        logits = scaled @ rows.t()  # (B, R)
        column = own - start
        is_here = ((column >= 0) & (column < len(rows)))[:, None]
        column = column.clamp(0, len(rows) - 1)[:, None]
        logits.scatter_(1, column, torch.where(is_here, -torch.inf, logits.gather(1, column)))
        previous_max, running_max = running_max, torch.maximum(running_max, logits.amax(dim=1, keepdim=True))
        shifted = logits.sub_(running_max).clamp_(min=NEGLIGIBLE)
        weights = shifted.exp()
        both = torch.stack([weights, shifted.mul_(weights)], dim=1)  # (B, 2, R)
        sums = _shift(sums, previous_max - running_max) + both.sum(dim=2, keepdim=True)
        weighted = _shift(weighted, previous_max - running_max) + both @ rows
        start += len(rows)
    return running_max, sums, weighted
