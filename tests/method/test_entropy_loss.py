"""Value and gradient of the entropy loss, which uses the similarities to all other samples."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import oracles
from lib.method.entropy_loss import entropy_loss
from patches import blocks_of


def rows_of(count: int, low_dim: int = 4, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, low_dim, dtype=torch.float64, generator=draw), dim=1)


@pytest.mark.parametrize("block", [1, 7, 2**20])
@pytest.mark.parametrize("temperature", [0.01, 0.1, 2.0])
def test_value_and_gradient_equal_the_dense_formula(block: int, temperature: float) -> None:
    memory, own = rows_of(9, seed=1), torch.tensor([3, 8, 0, 3])
    memory[2] *= 0.1  # as before its first update
    ours, dense = (rows_of(4, seed=2).requires_grad_() for _ in range(2))
    with blocks_of(block):
        loss = entropy_loss(ours, memory, own, temperature=temperature)
        loss.backward()
    expected = [
        oracles.entropy_of_others(x, memory.numpy(), int(i), temperature)
        for x, i in zip(dense.detach().numpy(), own, strict=True)
    ]
    assert loss.item() == pytest.approx(np.mean(expected), rel=1e-9, abs=1e-12)
    logits = (dense @ memory.t() / temperature).scatter(1, own[:, None], -torch.inf)
    log_p = logits.log_softmax(dim=1)
    (-(log_p.exp() * log_p.masked_fill(log_p.isinf(), 0)).sum(dim=1).mean()).backward()
    torch.testing.assert_close(ours.grad, dense.grad, rtol=1e-8, atol=1e-10)


def test_single_other_sample_has_zero_entropy() -> None:
    embeddings = rows_of(2, seed=3).requires_grad_()
    loss = entropy_loss(embeddings, rows_of(2), torch.tensor([0, 1]), temperature=0.1)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-9)
    torch.testing.assert_close(embeddings.grad, torch.zeros_like(embeddings))
