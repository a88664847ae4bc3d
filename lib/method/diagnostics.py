"""Whether training is healthy, told from the memory bank alone, without labels.

Measured are all samples up to ``ROWS``, and of more a fixed sample of that many, each against all N: an epoch
of a million images pays for two products (S, D) x (D, N), not for a discovery.

Letters: N samples, G processes, D embedding, S measured samples, M some samples, K neighbours, P partners.
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
"""Samples measured at most; a share of them is within 1.1 points of that of all samples, 19 times of 20."""
SEED = 0
"""Of the sample of rows, the same in every run."""
QUANTILES = {"entropy_05": 0.05, "entropy_25": 0.25, "entropy_50": 0.5, "entropy_75": 0.75, "entropy_95": 0.95}
"""Figure -> quantile of the entropy."""
FIGURES = (*QUANTILES, "reciprocal", "kept", "drift", "hubness", "largest_hub", "orphans")
"""The figures of an epoch."""
READING = {
    "entropy": "The entropy of a sample's similarities, in nats, from 0 (like itself alone) to ln N (like all alike): "
    "the quantiles should fall and stay apart, as the samples of lowest entropy become anchors; all near ln N, the "
    "embeddings have collapsed.",
    "reciprocal": "The share of samples that are among the K nearest of their own nearest neighbour: it should rise "
    "from round to round, and a lasting fall means that neighbours can be trusted less.",
    "kept": "The share of neighbours that are still those of the end of the last round: it is low at first, with one "
    "neighbour each a tenth or less, and should rise; near 100 %, another round has little to teach.",
    "drift": "The mean of 1 - cosine between a row of the memory bank and the same row an epoch before: it should fall "
    "with the learning rate, and where it stays high the embeddings have not settled.",
    "hubness": "The skewness of how often samples serve as a neighbour, 0 where all serve equally often: about 1 is "
    "usual, and if it keeps rising a few samples (hubs) draw the others towards themselves.",
    "orphans": "The share of samples that are a neighbour of no other sample: with one neighbour each a third to two "
    "fifths is usual, and if it keeps rising training relies on ever fewer images.",
    "largest_hub": "The share of samples that have the same one sample as a neighbour: times N it is a handful of "
    "samples as a rule, and at some per cent that sample deserves a look, as it may be blank or damaged.",
}
"""Figure -> how to read it, in a sentence; ``entropy`` stands for its quantiles."""


@dataclass(frozen=True)
class State:
    """What the next measurement compares with.

    Attributes:
        round: that was measured.
        rows: (S, D) copies of the measured rows.
        nearest: (S, K) their neighbours.
        before: (S, K) their neighbours at the last measurement of the round before; None where there was none.
    """

    round: int
    rows: torch.Tensor
    nearest: torch.Tensor
    before: torch.Tensor | None

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint, so that a resumed run has the figures of one that was never interrupted."""
        return {"round": self.round, "rows": self.rows, "nearest": self.nearest, "before": self.before}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any], device: torch.device | str = "cpu") -> State:
        """From what ``state_dict`` gave.

        Raises:
            ValueError: the parts are none of a state; KeyError: one is missing.
        """
        rows, nearest, before = state["rows"], state["nearest"], state["before"]
        tables = [nearest] if before is None else [nearest, before]
        for part in (rows, *tables):
            if not isinstance(part, torch.Tensor) or part.dim() != 2 or len(part) != len(rows):
                raise ValueError("the health's rows and neighbours are not of one size")
        if any(table.dtype != torch.long for table in tables):
            raise ValueError("the health's neighbours are no indices")
        place = None if before is None else before.to(device)
        return cls(int(state["round"]), rows.to(device), nearest.to(device), place)


@torch.no_grad()
def measure(
    memory: torch.Tensor | ShardedRows, previous: State | None, *, round: int, temperature: float, size: int
) -> tuple[dict[str, float | None], State]:
    """The figures of an epoch, to be read as ``READING`` says.

    Entropy as in discovery. ``reciprocal``: the nearest neighbour of i has i among its own K nearest. ``kept``:
    of the K neighbours that a sample had at the last measurement of the round before, those it has now; None in
    the first round measured. ``drift`` since the last measurement, None in the first. ``largest_hub``: the
    measured samples that have the most popular of all N among their K. ``hubness`` and ``orphans`` are of how
    often each measured sample is among the K nearest of the others, these alone: counts over all N would be
    thinned out where S < N. Hubness is S_Nk of Radovanovic et al. 2010, "Hubs in Space", equation 2; 0 where all
    counts are equal. All that concerns neighbours is None where a sample is alone. Equal similarities are ranked
    arbitrarily. O(S N D) time, O(S (D + K)) memory and two blocks. The same in every process.

    Args:
        memory: (N, D), the bank at the end of an epoch.
        previous: what the last measurement returned; one of other rows counts as None.
        round: of the epoch.
        temperature: tau.
        size: K, cut to the others that there are.

    Returns:
        The figures by name, and what to pass on to the next measurement.
    """
    bank = ShardedRows.of(memory)
    rows = measured(bank.samples).to(bank.device)
    own = bank.index_select(rows)  # (S, D), a copy
    look = partial(_look, temperature=temperature)
    entropy, nearest = look(bank, rows, size=min(size, bank.samples - 1))
    among = nearest  # (S, K), by place in ``rows``
    if len(rows) < bank.samples:
        _, among = look(ShardedRows.of(own), torch.arange(len(rows), device=rows.device), size=min(size, len(rows) - 1))
    if previous and previous.rows.shape != own.shape:
        previous = None
    before = None if previous is None else previous.nearest if previous.round < round else previous.before
    quantiles = torch.quantile(entropy, entropy.new_tensor(list(QUANTILES.values()))).tolist()
    figures: dict[str, float | None] = dict(zip(QUANTILES, quantiles, strict=True))

    def nearest_of(partners: torch.Tensor) -> torch.Tensor:
        if len(rows) == bank.samples:  # all are known
            return nearest[partners]
        return look(bank, partners, size=nearest.shape[1])[1]

    figures["reciprocal"] = _reciprocal(rows, nearest, nearest_of)
    figures["kept"] = None if before is None else _kept(before, nearest)
    figures["drift"] = _drift(previous.rows, own) if previous else None
    figures["hubness"], figures["orphans"] = _hubs(among)
    figures["largest_hub"] = nearest.flatten().bincount().max().item() / len(rows) if nearest.numel() else None
    return figures, State(round, own, nearest, before)


def _look(
    bank: ShardedRows, index: torch.Tensor, *, temperature: float, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Entropy (M,) and nearest others (M, K) of some samples, the same in every process.

    Each compares them with its own rows, and what it found is put together.

    Args:
        bank: (N, D).
        index: (M,) which samples, the same in every process.
        temperature: tau.
        size: K.
    """
    queries = bank.index_select(index)  # (M, D)
    place, here = bank.local_positions(index)
    moments, best = empty_statistics(queries), TopK.empty(len(queries), size, queries)
    for block, similarity in similarities(queries, bank.local, "health"):
        moments[block] = softmax_statistics(similarity / temperature)
        column = place[block][:, None]
        itself = torch.where(here[block][:, None], -torch.inf, similarity.gather(1, column))
        best.update(similarity.scatter_(1, column, itself), block.start, bank.start)
    values, samples = (  # (M, G * K)
        bank.ranks.all_gather(part).transpose(0, 1).flatten(1) for part in (best.similarities, best.samples)
    )
    nearest = samples.gather(1, values.topk(size, dim=1).indices)
    return entropy_from_statistics(merge_statistics(bank.ranks.all_gather(moments))), nearest


def measured(samples: int) -> torch.Tensor:
    """(S,) ascending indices of the samples that are measured: all N, or ``ROWS`` drawn by ``SEED``."""
    if samples <= ROWS:
        return torch.arange(samples)
    return torch.randperm(samples, generator=torch.Generator().manual_seed(SEED))[:ROWS].sort().values


def _reciprocal(
    rows: torch.Tensor, nearest: torch.Tensor, nearest_of: Callable[[torch.Tensor], torch.Tensor]
) -> float | None:
    """Share of ``rows`` (S,) among the K nearest of their nearest, which are asked for (P,) -> (P, K)."""
    if not nearest.numel():
        return None
    partners, back = nearest[:, 0].unique(return_inverse=True)  # (P,), (S,)
    theirs = nearest_of(partners)[back]  # (S, K)
    return (theirs == rows[:, None]).any(dim=1).double().mean().item()


def _kept(before: torch.Tensor, now: torch.Tensor) -> float | None:
    """Share of the neighbours ``before`` (S, K) that are among those of ``now``; None where there were none."""
    both = torch.cat([before, now], dim=1).sort(dim=1).values  # a neighbour of both stands twice in its row
    return (both[:, 1:] == both[:, :-1]).sum().item() / before.numel() if before.numel() else None


def _drift(before: torch.Tensor, now: torch.Tensor) -> float:
    """Mean of 1 - cosine between rows (S, D); a row of zeros is at right angles to all."""
    return (1 - F.cosine_similarity(before, now, dim=1)).clamp(min=0).mean().item()


def _hubs(among: torch.Tensor) -> tuple[float | None, float | None]:
    """Skewness of how often each sample is a neighbour, and the share that never is; None without neighbours."""
    if not among.numel():
        return None, None
    counts = among.flatten().bincount(minlength=len(among)).double()  # (S,)
    away = counts - counts.mean()
    deviation = away.square().mean().sqrt()
    skewness = ((away / deviation) ** 3).mean().item() if deviation > 0 else 0.0
    return skewness, (counts == 0).double().mean().item()
