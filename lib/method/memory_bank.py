"""The memory bank: one row m_i for each training sample.

``update`` is the paper's rule. Each rank stores one shard of the rows; the embeddings of a batch are known on every
rank, and each rank updates the rows that it stores.

Letters: B batch size, N samples, n rows of this rank, D embedding size.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from lib.distributed.processes import CHUNK, Ranks
from lib.distributed.sharded import ShardedRows


class MemoryBank:
    """A moving average of each sample's embeddings, renormalised to unit length (docs/method.md, equation 3).

    The reference ignores the temperature and momentum passed to it and reads its global options; here they are used.

    Args:
        samples: N.
        low_dim: D.
        temperature: tau of the non-parametric classifier over the rows.
        momentum: eta, weight of the old row in an update.
        seed: seed of the initial rows, uniform noise in (-s, s) with s = 1 / sqrt(D / 3).
        device: device of the rows.
        ranks: the ranks over which the rows are sharded; None: a single process.

    Attributes:
        memory: (n, D), the rows of this rank. They have unit length after their first update.
    """

    def __init__(
        self,
        samples: int,
        low_dim: int,
        *,
        temperature: float,
        momentum: float,
        seed: int,
        device: torch.device | str,
        ranks: Ranks | None = None,
    ) -> None:
        self.temperature = temperature
        self.momentum = momentum
        self.samples = samples
        self.ranks = ranks or Ranks()
        shard = self.ranks.shard(samples)
        start, stop = shard.start, shard.stop
        self.memory = torch.empty(stop - start, low_dim, device=device)
        bound, generator = 1 / math.sqrt(low_dim / 3), torch.Generator().manual_seed(seed)
        step = max(1, CHUNK // low_dim)
        for first in range(0, stop, step):  # on the CPU, from row 0: the same for any device and shard
            noise = torch.rand(min(step, stop - first), low_dim, generator=generator).mul_(2 * bound).sub_(bound)
            if first + len(noise) > start:
                skipped = max(0, start - first)
                self.memory[first + skipped - start : first + len(noise) - start] = noise[skipped:]

    @property
    def rows(self) -> ShardedRows:
        """All rows (N, D), sharded."""
        return ShardedRows(self.memory, self.samples, self.ranks)

    @torch.no_grad()
    def update(self, embeddings: torch.Tensor, index: torch.Tensor) -> None:
        """m_i <- normalise(eta m_i + (1 - eta) x_i), in place.

        Call it after ``backward``: the gradient uses the rows as they were before the update.

        Args:
            embeddings: (B, D) of the whole batch, unit length, the same on every rank.
            index: (B,) sample indices without repetition.
        """
        if not len(self.memory):
            return
        position, is_local = (index, None) if self.ranks.size == 1 else self.rows.local_positions(index)
        mixed = self.momentum * self.memory[position] + (1 - self.momentum) * embeddings
        updated = F.normalize(mixed, dim=1)
        if is_local is not None:
            # selecting the local entries by a mask would wait for the GPU; instead the others repeat the write of a
            # local entry, or rewrite row 0 as it is if there is none
            some = is_local.int().argmax(dim=0, keepdim=True)  # (1,)
            repeated = torch.where(is_local[some, None], updated[some], self.memory[:1])  # (1, D)
            position = torch.where(is_local, position, position[some])
            updated = torch.where(is_local[:, None], updated, repeated)
        self.memory[position] = updated

    def state_dict(self) -> dict[str, torch.Tensor]:
        """``params`` = [temperature, momentum] and ``memory`` (N, D), as the reference saves them.

        A collective: call it on every rank. Rank 0 receives all rows, the other ranks (0, D).
        """
        return {"params": torch.tensor([self.temperature, self.momentum]), "memory": self.rows.gather_to_rank0()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Loads ``memory`` (N, D) from rank 0. Temperature and momentum keep the values of the options.

        A collective: call it on every rank. Of the other ranks only the shape of ``memory`` is used.

        Raises:
            ValueError: ``memory`` has another shape than this bank.
        """
        if state["memory"].shape != self.rows.shape:
            raise ValueError(f"memory has shape {list(state['memory'].shape)}, expected {list(self.rows.shape)}")
        self.rows.copy_from_rank0(state["memory"])
