"""The loss as a sum of terms, and the direction to which rows of the bank are updated."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from lib.config.options import Options
from lib.distributed.sharded import ShardedRows
from lib.errors import UsageError
from lib.method.entropy_loss import entropy_loss
from lib.method.loss import neighbourhood_loss
from lib.method.terms import PAPER_TERMS, EmbeddedBatch, build, mean_direction, total
from lib.method.view_loss import view_loss


def rows_of(*shape: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def batch_of(views: int) -> EmbeddedBatch:
    members = torch.tensor([[0, 5], [1, -1], [2, 3]])
    return EmbeddedBatch(rows_of(3, views, 4, seed=1), ShardedRows.of(rows_of(7, 4, seed=2)), members, 0.1)


def test_default_loss_is_that_of_the_paper_bit_for_bit() -> None:
    batch = batch_of(1)
    expected = neighbourhood_loss(batch.views[:, 0], batch.bank, batch.neighbourhoods, temperature=0.1)
    assert torch.equal(total(build(Options()), batch), expected) and torch.equal(total(PAPER_TERMS, batch), expected)
    assert torch.equal(mean_direction(batch.views), batch.views[:, 0])


def test_loss_against_the_bank_is_the_mean_over_the_views() -> None:
    batch = batch_of(3)
    each = [
        neighbourhood_loss(view, batch.bank, batch.neighbourhoods, temperature=0.1) for view in batch.views.unbind(1)
    ]
    torch.testing.assert_close(total(PAPER_TERMS, batch), torch.stack(each).mean())


def test_loss_terms_are_weighted_and_added() -> None:
    batch, options = batch_of(2), Options(views=2, view_loss=0.25, view_temperature=0.5)
    expected = total(PAPER_TERMS, batch) + 0.25 * view_loss(batch.views, temperature=0.5)
    torch.testing.assert_close(total(build(options), batch), expected)


def test_entropy_of_others_grows_with_the_round() -> None:
    batch, options = batch_of(2), Options(entropy_loss=0.2)
    own = torch.tensor([0, 0, 1, 1, 2, 2])
    entropy = entropy_loss(batch.views.flatten(0, 1), batch.bank, own, temperature=0.1)
    for round in range(3):
        found = total(build(options), replace(batch, round=round))
        torch.testing.assert_close(found, total(PAPER_TERMS, batch) + 0.2 * round * entropy)


def test_rows_move_to_the_direction_of_the_mean_view() -> None:
    views = batch_of(2).views
    middle = mean_direction(views)
    torch.testing.assert_close(middle.norm(dim=1), torch.ones(3))
    for view in views.unbind(1):  # half way between the two
        other = (middle * (views.sum(dim=1) - view)).sum(dim=1)
        torch.testing.assert_close((middle * view).sum(dim=1), other)


def test_unknown_loss_is_refused() -> None:
    with pytest.raises(UsageError, match="--loss nothing: unknown name"):
        build(Options(loss="nothing"))
