"""The training loss: a sum of terms, each a function of the embedded batch.

By default there is one term, the loss of ``--loss`` against the memory bank. The others are options beyond the paper
(docs/beyond.md).

Letters: B distinct images of a batch, V views of each, N samples, D embedding size, K neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
import torch.nn.functional as F

from lib.config.options import Options
from lib.config.parser import choose
from lib.distributed.sharded import ShardedRows
from lib.method.entropy_loss import entropy_loss
from lib.method.loss import LOSSES, Loss, neighbourhood_loss
from lib.method.view_loss import view_loss


@dataclass(frozen=True)
class EmbeddedBatch:
    """The embedded batch, from which the terms are computed; the same on every rank.

    Attributes:
        views: (B, V, D) embeddings of unit length; the gradient flows to them only.
        bank: (N, D), before the update with this batch.
        neighbourhoods: (B, 1 + K) sample indices, padded with -1.
        temperature: tau.
        round: of the curriculum, from 0.
    """

    views: torch.Tensor
    bank: ShardedRows
    neighbourhoods: torch.Tensor
    temperature: float
    round: int = 0


Term = Callable[[EmbeddedBatch], torch.Tensor]
"""The embedded batch -> scalar."""


def total(terms: Sequence[Term], batch: EmbeddedBatch) -> torch.Tensor:
    """The sum of the terms, a scalar, the same on every rank."""
    return reduce(torch.add, (term(batch) for term in terms))


def over_bank(loss: Loss) -> Term:
    """The mean over the views of a loss against the memory bank."""

    def term(batch: EmbeddedBatch) -> torch.Tensor:
        views = batch.views.shape[1]
        neighbourhoods = batch.neighbourhoods[:, None].expand(-1, views, -1).flatten(0, 1)  # (B V, 1 + K)
        return loss(batch.views.flatten(0, 1), batch.bank, neighbourhoods, temperature=batch.temperature)

    return term


def entropy_of_others(weight: float) -> Term:
    """``entropy_loss`` times a weight and the round: nothing in round 0, as in Super-AND."""

    def term(batch: EmbeddedBatch) -> torch.Tensor:
        if not batch.round:
            return batch.views.new_zeros(())
        own = batch.neighbourhoods[:, :1].expand(-1, batch.views.shape[1]).flatten()  # (B V,)
        entropy = entropy_loss(batch.views.flatten(0, 1), batch.bank, own, temperature=batch.temperature)
        return weight * batch.round * entropy

    return term


def between_views(weight: float, temperature: float) -> Term:
    """``view_loss`` times a weight."""
    return lambda batch: weight * view_loss(batch.views, temperature=temperature)


PAPER_TERMS: tuple[Term, ...] = (over_bank(neighbourhood_loss),)
"""The paper's loss."""


def build(options: Options) -> tuple[Term, ...]:
    """The terms that the options request.

    Raises:
        UsageError: there is no loss of that name.
    """
    terms = [over_bank(choose(LOSSES, options.loss, "--loss"))]
    if options.entropy_loss:
        terms.append(entropy_of_others(options.entropy_loss))
    if options.view_loss:
        terms.append(between_views(options.view_loss, options.view_temperature))
    return tuple(terms)


def mean_direction(views: torch.Tensor) -> torch.Tensor:
    """The normalised mean (B, D) of the views (B, V, D), with which the bank is updated. A single view is unchanged."""
    return views[:, 0] if views.shape[1] == 1 else F.normalize(views.mean(dim=1), dim=1)
