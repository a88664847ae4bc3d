"""The neighbourhood loss over the memory bank. Layer 2. Letters: B batch, N samples, D embedding, K neighbours."""

from __future__ import annotations

from typing import Any

import torch

from lib.blocks import block_size


def neighbourhood_loss(
    embeddings: torch.Tensor, memory: torch.Tensor, neighbourhoods: torch.Tensor, *, temperature: float
) -> torch.Tensor:
    """-log of the probability that a sample is classified into its own neighbourhood, batch mean.

    loss_i = -log sum_{j in neighbourhood of i} p_ij, p_ij = exp(x_i . m_j / tau) / sum_n exp(x_i . m_n / tau). For an
    instance sample the neighbourhood is itself and this is the instance loss -log p_ii (METHOD 1, neighbourhood
    supervision). Log-sum-exp throughout.

    The (B, N) logits never exist: blocks of them are made, summed up and forgotten, as attention is computed
    without its matrix (Milakov and Gimelshein 2018, "Online normalizer calculation for softmax"; Dao et al. 2022,
    "FlashAttention"). The gradient, (sum_j p_ij m_j - sum_{j in neighbourhood} q_ij m_j) / (tau B) where q is p
    within the neighbourhood, falls off on the way, so that nothing has to be computed again for it.

    Args:
        embeddings: (B, D), unit length; the gradient goes to these alone.
        memory: (N, D).
        neighbourhoods: (B, 1 + K) sample indices; -1 marks an empty place.
        temperature: tau.

    Returns:
        Scalar.
    """
    loss: torch.Tensor = _Loss.apply(embeddings, memory, neighbourhoods, temperature)
    return loss


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, embeddings: torch.Tensor, memory: torch.Tensor, neighbourhoods: torch.Tensor, temperature: float
    ) -> torch.Tensor:
        scaled = embeddings / temperature
        all_, mean = _log_sum_exp(scaled, memory, with_mean=ctx.needs_input_grad[0])
        members = memory[neighbourhoods.clamp(min=0)]  # (B, 1 + K, D)
        logits = (members @ scaled[:, :, None]).squeeze(2).masked_fill_(neighbourhoods < 0, -torch.inf)  # (B, 1 + K)
        if mean is not None:
            own = (logits.softmax(dim=1)[:, None] @ members).squeeze(1)  # (B, D)
            ctx.save_for_backward(mean.sub_(own).div_(temperature * len(embeddings)))
        return (all_ - logits.logsumexp(dim=1)).mean()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0], None, None, None


def _log_sum_exp(
    scaled: torch.Tensor, memory: torch.Tensor, *, with_mean: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """log sum_n exp(x_i . m_n) (B,), and sum_n p_in m_n (B, D), from blocks of columns with a running maximum."""
    batch = len(scaled)
    greatest = scaled.new_full((batch, 1), -torch.inf)
    total = scaled.new_zeros(batch, 1)
    mean = torch.zeros_like(scaled) if with_mean else None
    for rows in memory.split(max(1, block_size(memory.device) // batch)):  # (R, D)
        logits = scaled @ rows.t()  # (B, R)
        before, greatest = greatest, torch.maximum(greatest, logits.amax(dim=1, keepdim=True))
        weights = logits.sub_(greatest).exp_()
        shrink = (before - greatest).exp_()
        total.mul_(shrink).add_(weights.sum(dim=1, keepdim=True))
        if mean is not None:
            mean.mul_(shrink).addmm_(weights, rows)
    return (greatest + total.log()).squeeze(1), None if mean is None else mean.div_(total)
