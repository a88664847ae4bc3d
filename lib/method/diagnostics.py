"""Health of a run, measured on the memory bank without labels.

Up to ``ROWS`` samples are measured, or a fixed random subset of that size, each against all N. So an epoch of a million
images costs two products (S, D) x (D, N), far less than a discovery.

Letters: N samples, G ranks, D embedding size, S measured samples, M queries, K neighbours, P distinct nearest
neighbours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from lib.distributed.sharded import ShardedRows
from lib.method.chunking import similarities
from lib.method.entropy import empty_statistics, entropy_from_statistics, merge_statistics, softmax_statistics
from lib.method.topk import TopK

ROWS = 2**13
"""Maximum number of measured samples. Shares are within 1.1 points of their values over all samples (95 %)."""
SEED = 0
"""Seed of the random subset, the same in every run."""
QUANTILES = {"entropy_05": 0.05, "entropy_25": 0.25, "entropy_50": 0.5, "entropy_75": 0.75, "entropy_95": 0.95}
"""Name of a figure -> quantile of the entropy."""
FIGURES = (*QUANTILES, "reciprocal", "kept", "drift", "hubness", "largest_hub", "orphans")
"""Names of the figures of an epoch."""
READING = {
    "entropy": "The entropy of a sample's similarities, in nats, from 0 (similar to itself only) to ln N (equally "
    "similar to all samples): the quantiles should fall and stay apart, as the samples of lowest entropy become "
    "anchors; if all are near ln N, the embeddings have collapsed.",
    "reciprocal": "The share of samples that are among the K nearest of their own nearest neighbour: it should rise "
    "from round to round, and a lasting decrease means that the neighbours are less reliable.",
    "kept": "The share of the neighbours at the end of the last round that are still neighbours: it is low at first "
    "(with one neighbour for each sample a tenth or less) and should rise; near 100 %, another round changes little.",
    "drift": "The mean of 1 - cosine between a row of the memory bank and the same row one epoch earlier: it should "
    "fall with the learning rate, and if it stays high, the embeddings have not converged.",
    "hubness": "The skewness of how often samples serve as a neighbour, 0 if all serve equally often: about 1 is "
    "usual, and if it keeps rising, a few samples (hubs) attract the others.",
    "orphans": "The share of samples that are a neighbour of no other sample: with one neighbour for each sample, a "
    "third to two fifths is usual, and if it keeps rising, training relies on fewer and fewer images.",
    "largest_hub": "The share of samples that have the most frequent neighbour among their neighbours: usually it "
    "corresponds to a few samples, and if it reaches some per cent, look at that image, which may be blank or damaged.",
}
"""Name of a figure -> how to interpret it, in one sentence; ``entropy`` covers its quantiles."""


@dataclass(frozen=True)
class State:
    """The state with which the next measurement is compared.

    Attributes:
        round: round of this measurement.
        rows: (S, D) copies of the measured rows of the bank.
        nearest: (S, K) their neighbours.
        before: (S, K) their neighbours at the last measurement of the previous round; None if there was none.
    """

    round: int
    rows: torch.Tensor
    nearest: torch.Tensor
    before: torch.Tensor | None

    def state_dict(self) -> dict[str, Any]:
        """For checkpoints: a resumed run reports the same figures as an uninterrupted one."""
        return {"round": self.round, "rows": self.rows, "nearest": self.nearest, "before": self.before}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any], device: torch.device | str = "cpu") -> State:
        """Inverse of ``state_dict``.

        Raises:
            KeyError: an entry is missing.
            ValueError: a tensor has the wrong shape or type.
        """
        rows, nearest, before = state["rows"], state["nearest"], state["before"]
        tables = [nearest] if before is None else [nearest, before]
        for tensor in (rows, *tables):
            if not isinstance(tensor, torch.Tensor) or tensor.dim() != 2 or len(tensor) != len(rows):
                raise ValueError("health state: rows and neighbours must be matrices of equal length")
        if any(table.dtype != torch.long for table in tables):
            raise ValueError("health state: neighbours must be int64 indices")
        before = None if before is None else before.to(device)
        return cls(int(state["round"]), rows.to(device), nearest.to(device), before)


@torch.no_grad()
def measure(
    memory: torch.Tensor | ShardedRows, previous: State | None, *, round: int, temperature: float, size: int
) -> tuple[dict[str, float | None], State]:
    """Computes the figures of an epoch; ``READING`` explains them.

    - Entropy: quantiles over the measured samples, defined as in discovery.
    - ``reciprocal``: share of samples i that are among the K nearest of their nearest neighbour.
    - ``kept``: share of the K neighbours at the last measurement of the previous round that are still neighbours;
      None in the first measured round.
    - ``drift``: mean of 1 - cosine between a row and the same row at the last measurement; None at the first.
    - ``largest_hub``: share of measured samples that have the most frequent neighbour (of all N) among their K.
    - ``hubness``, ``orphans``: skewness of the counts of how often a sample is among the K nearest of the others, and
      the share of zero counts, within the measured samples; counts over all N would be thinned out if S < N. Hubness
      is S_Nk of Radovanovic et al. 2010, "Hubs in Space", equation 2, and 0 if all counts are equal.

    Figures of neighbours are None for a single sample. Equal similarities are ranked arbitrarily. O(S N D) time,
    O(S (D + K)) memory and two blocks.

    Args:
        memory: (N, D), the bank at the end of an epoch.
        previous: state returned by the last measurement; ignored if its rows have another shape.
        round: the current round.
        temperature: tau.
        size: K, reduced to the number of other samples if it is larger.

    Returns:
        The figures by name and the state for the next measurement, the same on every rank.
    """
    bank = ShardedRows.of(memory)
    rows = measured(bank.samples).to(bank.device)
    own = bank.index_select(rows)  # (S, D), a copy
    search = partial(_entropy_and_nearest, temperature=temperature)
    entropy, nearest = search(bank, rows, size=min(size, bank.samples - 1))
    among = nearest  # (S, K), positions in ``rows``
    if len(rows) < bank.samples:
        _, among = search(
            ShardedRows.of(own), torch.arange(len(rows), device=rows.device), size=min(size, len(rows) - 1)
        )
    if previous and previous.rows.shape != own.shape:
        previous = None
    before = None if previous is None else previous.nearest if previous.round < round else previous.before
    quantiles = torch.quantile(entropy, entropy.new_tensor(list(QUANTILES.values()))).tolist()
    figures: dict[str, float | None] = dict(zip(QUANTILES, quantiles, strict=True))

    def nearest_of(partners: torch.Tensor) -> torch.Tensor:
        if len(rows) == bank.samples:  # already computed for all samples
            return nearest[partners]
        return search(bank, partners, size=nearest.shape[1])[1]

    figures["reciprocal"] = _reciprocal(rows, nearest, nearest_of)
    figures["kept"] = None if before is None else _kept(before, nearest)
    figures["drift"] = _drift(previous.rows, own) if previous else None
    figures["hubness"], figures["orphans"] = _hubs(among)
    figures["largest_hub"] = nearest.flatten().bincount().max().item() / len(rows) if nearest.numel() else None
    return figures, State(round, own, nearest, before)


def _entropy_and_nearest(
    bank: ShardedRows, index: torch.Tensor, *, temperature: float, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Entropy and nearest neighbours of some samples.

    Each rank compares them with its shard; the statistics and the top-k of all shards are merged.

    Args:
        bank: (N, D).
        index: (M,) sample indices, the same on every rank.
        temperature: tau.
        size: K.

    Returns:
        (M,) entropies in nats and (M, K) indices of the nearest other samples, the same on every rank.
    """
    queries = bank.index_select(index)  # (M, D)
    position, is_local = bank.local_positions(index)
    statistics, best = empty_statistics(queries), TopK.empty(len(queries), size, queries)
    for block, similarity in similarities(queries, bank.local, "health"):
        statistics[block] = softmax_statistics(similarity / temperature)
        column = position[block][:, None]
        masked = torch.where(
            is_local[block][:, None], -torch.inf, similarity.gather(1, column)
        )  # not its own neighbour
        best.update(similarity.scatter_(1, column, masked), block.start, bank.start)
    values, samples = (  # (M, G * K)
        bank.ranks.all_gather(table).transpose(0, 1).flatten(1) for table in (best.similarities, best.samples)
    )
    nearest = samples.gather(1, values.topk(size, dim=1).indices)
    return entropy_from_statistics(merge_statistics(bank.ranks.all_gather(statistics))), nearest


def measured(samples: int) -> torch.Tensor:
    """Ascending indices (S,) of the measured samples: all N, or a random subset of ``ROWS`` drawn with ``SEED``."""
    if samples <= ROWS:
        return torch.arange(samples)
    return torch.randperm(samples, generator=torch.Generator().manual_seed(SEED))[:ROWS].sort().values


def _reciprocal(
    rows: torch.Tensor, nearest: torch.Tensor, nearest_of: Callable[[torch.Tensor], torch.Tensor]
) -> float | None:
    """Share of ``rows`` (S,) among the K nearest of their nearest neighbour; ``nearest_of``: (P,) -> (P, K)."""
    if not nearest.numel():
        return None
    partners, back = nearest[:, 0].unique(return_inverse=True)  # (P,), (S,)
    theirs = nearest_of(partners)[back]  # (S, K)
    return (theirs == rows[:, None]).any(dim=1).double().mean().item()


def _kept(before: torch.Tensor, now: torch.Tensor) -> float | None:
    """Share of the neighbours ``before`` (S, K) that are also in ``now``; None if there are none."""
    both = torch.cat([before, now], dim=1).sort(dim=1).values  # a common neighbour occurs twice in its row
    return (both[:, 1:] == both[:, :-1]).sum().item() / before.numel() if before.numel() else None


def _drift(before: torch.Tensor, now: torch.Tensor) -> float:
    """Mean of 1 - cosine between rows (S, D); the cosine of a zero row is 0."""
    return (1 - F.cosine_similarity(before, now, dim=1)).clamp(min=0).mean().item()


def _hubs(among: torch.Tensor) -> tuple[float | None, float | None]:
    """Skewness of the neighbour counts and the share of zero counts; None without neighbours."""
    if not among.numel():
        return None, None
    counts = among.flatten().bincount(minlength=len(among)).double()  # (S,)
    centred = counts - counts.mean()
    deviation = centred.square().mean().sqrt()
    skewness = ((centred / deviation) ** 3).mean().item() if deviation > 0 else 0.0
    return skewness, (counts == 0).double().mean().item()
