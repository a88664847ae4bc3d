"""The neighbourhood loss over the memory bank.

Letters: B batch, N samples, n rows of this process, D embedding, K neighbours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lib.distributed.sharded import ShardedRows
from lib.method.chunking import block_size


def neighbourhood_loss(
    embeddings: torch.Tensor, memory: torch.Tensor | ShardedRows, neighbourhoods: torch.Tensor, *, temperature: float
) -> torch.Tensor:
    """-log of the probability that a sample is classified into its own neighbourhood, batch mean.

    loss_i = -log sum_{j in neighbourhood of i} p_ij, p_ij = exp(x_i . m_j / tau) / sum_n exp(x_i . m_n / tau). For an
    instance sample the neighbourhood is itself and this is the instance loss -log p_ii (docs/method.md,
    equations 4 and 7). Log-sum-exp throughout.

    The (B, N) logits never exist: blocks of them are made, summed up and forgotten, as attention is computed
    without its matrix (Milakov and Gimelshein 2018, "Online normalizer calculation for softmax"; Dao et al. 2022,
    "FlashAttention"). The gradient, (sum_j p_ij m_j - sum_{j in neighbourhood} q_ij m_j) / (tau B) where q is p
    within the neighbourhood, falls off on the way, so that nothing has to be computed again for it.

    Each process looks at its own rows; what is put together is a maximum and then a sum for the whole bank and for the
    neighbourhood, (B, 2) each, and the gradient (B, D): nothing of order N.

    Args:
        embeddings: (B, D) of the whole batch, unit length, the same in every process; the gradient goes to these alone.
        memory: (N, D).
        neighbourhoods: (B, 1 + K) sample indices; -1 marks an empty place.
        temperature: tau.

    Returns:
        Scalar, the same in every process.
    """
    loss: torch.Tensor = _Loss.apply(embeddings, ShardedRows.of(memory), neighbourhoods, temperature)
    return loss


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, embeddings: torch.Tensor, bank: ShardedRows, neighbourhoods: torch.Tensor, temperature: float
    ) -> torch.Tensor:
        scaled = embeddings / temperature
        wanted = ctx.needs_input_grad[0]
        parts = [
            _statistics_over_bank(scaled, bank.local, wanted),
            _statistics_over_neighbourhood(scaled, bank, neighbourhoods, wanted),
        ]
        greatest, total = (torch.stack([part[i] for part in parts], dim=1) for i in (0, 1))  # (B, 2) each
        highest = bank.ranks.all_reduce_max(greatest.clone())
        total = bank.ranks.all_reduce_sum(total * (greatest - highest).exp())
        if wanted:
            gradient = torch.zeros_like(embeddings)
            for part, sign in ((0, 1), (1, -1)):
                own_greatest, _, rows = parts[part]
                weight = (own_greatest - highest[:, part]).exp() / total[:, part]  # (B,)
                gradient.add_(rows * weight[:, None], alpha=sign)
            ctx.save_for_backward(bank.ranks.all_reduce_sum(gradient).div_(temperature * len(embeddings)))
        in_all, in_members = (highest + total.log()).unbind(1)
        return (in_all - in_members).mean()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0], None, None, None


SoftmaxStatistics = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Of some logits z = x_i . m_n: their maximum z' (B,), sum exp(z - z') (B,) and sum exp(z - z') m_n (B, D)."""


def _statistics_over_bank(scaled: torch.Tensor, memory: torch.Tensor, with_rows: bool) -> SoftmaxStatistics:
    """Over the rows of this process (n, D), from blocks of columns with a running maximum."""
    batch = len(scaled)
    greatest = scaled.new_full((batch, 1), -torch.inf)
    total = scaled.new_zeros(batch, 1)
    sums = torch.zeros_like(scaled)
    for rows in memory.split(max(1, block_size(memory.device) // batch)) if len(memory) else ():  # (R, D)
        logits = scaled @ rows.t()  # (B, R)
        before, greatest = greatest, torch.maximum(greatest, logits.amax(dim=1, keepdim=True))
        weights = logits.sub_(greatest).exp_()
        shrink = (before - greatest).exp_()
        total.mul_(shrink).add_(weights.sum(dim=1, keepdim=True))
        if with_rows:
            sums.mul_(shrink).addmm_(weights, rows)
    return greatest.squeeze(1), total.squeeze(1), sums


def _statistics_over_neighbourhood(
    scaled: torch.Tensor, bank: ShardedRows, neighbourhoods: torch.Tensor, with_rows: bool
) -> SoftmaxStatistics:
    """Over those of the neighbourhoods' members that are rows of this process."""
    place, here = bank.local_positions(neighbourhoods)  # an empty place is nobody's row
    if not len(bank.local):
        return scaled.new_full((len(scaled),), -torch.inf), scaled.new_zeros(len(scaled)), torch.zeros_like(scaled)
    members = bank.local[place]  # (B, 1 + K, D)
    logits = (members @ scaled[:, :, None]).squeeze(2).masked_fill_(~here, -torch.inf)  # (B, 1 + K)
    greatest = logits.amax(dim=1)
    weights = (logits - torch.where(greatest.isfinite(), greatest, 0)[:, None]).exp_()
    sums = (weights[:, None] @ members).squeeze(1) if with_rows else torch.zeros_like(scaled)
    return greatest, weights.sum(dim=1), sums


Loss = Callable[..., torch.Tensor]
"""As ``neighbourhood_loss``: (embeddings, memory, neighbourhoods, *, temperature) -> scalar."""
LOSSES: dict[str, Loss] = {"neighbourhood": neighbourhood_loss}
"""``--loss``: name -> function."""
