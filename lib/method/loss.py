"""The neighbourhood loss over the memory bank.

``neighbourhood_loss`` states the equation; ``_Loss`` computes it and its gradient without storing the (B, N) logits.

Why this is exact. The log-sum-exp over all N rows is accumulated over blocks of rows with a running maximum: whenever
the maximum grows, what has been summed is rescaled (online softmax, Milakov and Gimelshein 2018, "Online normalizer
calculation for softmax"). The sum of softmax-weighted rows, which the gradient needs, is accumulated in the same pass,
as attention is in FlashAttention (Dao et al. 2022), so the backward pass recomputes nothing. Each rank does this for
its shard of the bank, and the statistics of the shards are merged in the same way.

Letters: B batch size, N samples, n rows of this rank, R rows of a block, D embedding size, K neighbours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lib.distributed.sharded import ShardedRows
from lib.method.chunking import block_size

COMPILED_BATCH = 256
"""Batch size by which compiled code chooses its blocks."""
COMPILED_BLOCKS = 16
"""Largest number of blocks of compiled code."""


def neighbourhood_loss(
    embeddings: torch.Tensor, memory: torch.Tensor | ShardedRows, neighbourhoods: torch.Tensor, *, temperature: float
) -> torch.Tensor:
    """Negative log-probability that a sample is classified into its own neighbourhood, averaged over the batch.

    loss_i = -log sum_{j in N(i)} p_ij with the non-parametric classifier
    p_ij = exp(x_i . m_j / tau) / sum_n exp(x_i . m_n / tau). N(i) is an anchor and its K neighbours (the paper's
    neighbourhood supervision), or an instance sample alone, which gives the instance loss -log p_ii
    (docs/method.md, equations 4 and 7).

    The gradient by x_i is (sum_j p_ij m_j - sum_{j in N(i)} q_ij m_j) / (tau B), where q_ij is p_ij normalised over
    N(i). It flows to the embeddings only; the memory is treated as a constant.

    Each rank reads its own rows. The ranks exchange (B, 2) maxima, (B, 2) sums and the (B, D) gradient, nothing of
    order N.

    Args:
        embeddings: (B, D) of the whole batch, unit length, the same on every rank.
        memory: (N, D).
        neighbourhoods: (B, 1 + K) sample indices, padded with -1.
        temperature: tau.

    Returns:
        Scalar, the same on every rank.
    """
    loss: torch.Tensor = _Loss.apply(embeddings, ShardedRows.of(memory), neighbourhoods, temperature, None)
    return loss


def similarity_weighted_loss(
    embeddings: torch.Tensor, memory: torch.Tensor | ShardedRows, neighbourhoods: torch.Tensor, *, temperature: float
) -> torch.Tensor:
    """``neighbourhood_loss`` in which a neighbour counts as much as it is similar to the anchor.

    loss_i = -log sum_{j in N(i)} w_ij p_ij with w_ij = max(0, m_i . m_j) by the rows of the memory bank, and w_ii = 1.
    An instance sample has the same loss as there. This is beyond the paper (docs/beyond.md).

    Args and returns as of ``neighbourhood_loss``. The ranks also exchange the (B, 1 + K, D) rows of the neighbourhoods.
    """
    bank = ShardedRows.of(memory)
    members = bank.index_select(neighbourhoods.clamp(min=0).flatten()).reshape(*neighbourhoods.shape, -1)
    weights = (members @ members[:, 0, :, None]).squeeze(2).clamp_(min=0)  # (B, 1 + K)
    weights[:, 0] = 1
    loss: torch.Tensor = _Loss.apply(embeddings, bank, neighbourhoods, temperature, weights.log_())
    return loss


class _Loss(torch.autograd.Function):
    """log-sum-exp over the bank minus log-sum-exp over the neighbourhood; the gradient is computed in ``forward``."""

    @staticmethod
    def forward(
        ctx: Any,
        embeddings: torch.Tensor,
        bank: ShardedRows,
        neighbourhoods: torch.Tensor,
        temperature: float,
        log_weights: torch.Tensor | None,
    ) -> torch.Tensor:
        scaled = embeddings / temperature
        needs_gradient = ctx.needs_input_grad[0]
        statistics = [
            _statistics_over_bank(scaled, bank.local, needs_gradient),
            _statistics_over_neighbourhood(scaled, bank, neighbourhoods, log_weights, needs_gradient),
        ]
        local_max, total = (torch.stack([each[i] for each in statistics], dim=1) for i in (0, 1))  # (B, 2) each
        global_max = bank.ranks.all_reduce_max(local_max.clone())
        total = bank.ranks.all_reduce_sum(total * (local_max - global_max).exp())
        if needs_gradient:
            gradient = torch.zeros_like(embeddings)
            for which, sign in ((0, 1), (1, -1)):
                own_max, _, weighted_rows = statistics[which]
                scale = (own_max - global_max[:, which]).exp() / total[:, which]  # (B,)
                gradient.add_(weighted_rows * scale[:, None], alpha=sign)
            ctx.save_for_backward(bank.ranks.all_reduce_sum(gradient).div_(temperature * len(embeddings)))
        over_bank, over_neighbourhood = (global_max + total.log()).unbind(1)  # log-sum-exp, (B,) each
        return (over_bank - over_neighbourhood).mean()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0], None, None, None, None


SoftmaxStatistics = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Of logits z_n = x_i . m_n / tau: maximum z' (B,), sum_n exp(z_n - z') (B,) and sum_n exp(z_n - z') m_n (B, D)."""


def _statistics_over_bank(scaled: torch.Tensor, memory: torch.Tensor, with_rows: bool) -> SoftmaxStatistics:
    """Statistics over the rows (n, D) of this rank, in blocks with a running maximum.

    Args:
        scaled: (B, D) embeddings divided by tau.
        memory: (n, D).
        with_rows: whether the weighted sum of rows is needed; it is zero otherwise.
    """
    batch = len(scaled)
    running_max = scaled.new_full((batch, 1), -torch.inf)
    total = scaled.new_zeros(batch, 1)
    weighted_rows = torch.zeros_like(scaled)
    for rows in memory.split(_rows_of_block(batch, memory)) if len(memory) else ():  # (R, D)
        logits = scaled @ rows.t()  # (B, R)
        previous_max, running_max = running_max, torch.maximum(running_max, logits.amax(dim=1, keepdim=True))
        weights = logits.sub_(running_max).exp_()
        rescale = (previous_max - running_max).exp_()
        total.mul_(rescale).add_(weights.sum(dim=1, keepdim=True))
        if with_rows:
            weighted_rows.mul_(rescale).addmm_(weights, rows)
    return running_max.squeeze(1), total.squeeze(1), weighted_rows


def _rows_of_block(batch: int, memory: torch.Tensor) -> int:
    """R. In compiled code the loop is unrolled, so R is the same for every batch, and there are few blocks."""
    block = block_size(memory.device)
    if torch.compiler.is_compiling():
        return max(block // COMPILED_BATCH, -(-len(memory) // COMPILED_BLOCKS))
    return max(1, block // batch)


def _statistics_over_neighbourhood(
    scaled: torch.Tensor,
    bank: ShardedRows,
    neighbourhoods: torch.Tensor,
    log_weights: torch.Tensor | None,
    with_rows: bool,
) -> SoftmaxStatistics:
    """Statistics over the members of each neighbourhood that are rows of this rank.

    Args:
        scaled: (B, D) embeddings divided by tau.
        bank: (N, D).
        neighbourhoods: (B, 1 + K).
        log_weights: (B, 1 + K), added to the logits; None: all weights are 1.
        with_rows: as in ``_statistics_over_bank``.
    """
    position, is_local = bank.local_positions(neighbourhoods)  # padding (-1) is local to no rank
    if not len(bank.local):
        return scaled.new_full((len(scaled),), -torch.inf), scaled.new_zeros(len(scaled)), torch.zeros_like(scaled)
    members = bank.local[position]  # (B, 1 + K, D)
    logits = (members @ scaled[:, :, None]).squeeze(2)  # (B, 1 + K)
    if log_weights is not None:
        logits += log_weights
    logits.masked_fill_(~is_local, -torch.inf)
    local_max = logits.amax(dim=1)
    weights = (logits - torch.where(local_max.isfinite(), local_max, 0)[:, None]).exp_()
    weighted_rows = (weights[:, None] @ members).squeeze(1) if with_rows else torch.zeros_like(scaled)
    return local_max, weights.sum(dim=1), weighted_rows


Loss = Callable[..., torch.Tensor]
"""Signature of ``neighbourhood_loss``: (embeddings, memory, neighbourhoods, *, temperature) -> scalar."""
LOSSES: dict[str, Loss] = {"neighbourhood": neighbourhood_loss, "similarity-weighted": similarity_weighted_loss}
"""``--loss``: name -> function."""
