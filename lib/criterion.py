"""The neighbourhood loss. Layer 2. Letters: B batch, N samples, K neighbours."""

from __future__ import annotations

import torch


def neighbourhood_loss(logits: torch.Tensor, neighbourhoods: torch.Tensor) -> torch.Tensor:
    """-log of the probability that a sample is classified into its own neighbourhood, batch mean.

    loss_i = -log sum_{j in neighbourhood of i} p_ij. For an instance sample the neighbourhood is itself and
    this is the instance loss -log p_ii (METHOD 1, neighbourhood supervision). Log-sum-exp throughout.

    Args:
        logits: (B, N), x_i . m_n / tau.
        neighbourhoods: (B, 1 + K) sample indices; -1 marks an empty place.

    Returns:
        Scalar.
    """
    empty = neighbourhoods < 0
    inside = logits.gather(1, neighbourhoods.clamp(min=0)).masked_fill(empty, -torch.inf)  # (B, 1 + K)
    return (logits.logsumexp(dim=1) - inside.logsumexp(dim=1)).sum() / len(logits)
