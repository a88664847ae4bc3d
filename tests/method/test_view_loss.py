"""The instance loss between views compared with its formula."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import oracles
from lib.method.view_loss import view_loss


def views_of(images: int, views: int, seed: int = 0) -> torch.Tensor:
    drawn = torch.randn(images, views, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return F.normalize(drawn, dim=2)


@pytest.mark.parametrize(("images", "views"), [(1, 2), (2, 2), (6, 2), (4, 3)])
@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_loss_equals_the_oracle(images: int, views: int, temperature: float) -> None:
    given = views_of(images, views)
    expected = oracles.view_loss(given.numpy(), temperature)
    assert view_loss(given, temperature=temperature).item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_gradient_equals_finite_differences() -> None:
    given = views_of(4, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda views: view_loss(views, temperature=0.3), (given,))


def test_equal_images_give_a_finite_loss_and_gradient() -> None:
    """Equal embeddings, as after a collapse: every probability is 1 / B, and log(1 - P) stays finite."""
    given = torch.ones(8, 2, 4) / 2
    loss = view_loss(given.requires_grad_(), temperature=0.01)
    loss.backward()
    assert loss.isfinite() and given.grad is not None and given.grad.isfinite().all()


def test_similar_views_of_spread_images_have_a_lower_loss() -> None:
    rows = torch.eye(5)
    alike, mixed = torch.stack([rows, rows], dim=1), torch.stack([rows, rows.roll(1, 0)], dim=1)
    assert view_loss(alike, temperature=0.1) < 0.1 < view_loss(mixed, temperature=0.1)
