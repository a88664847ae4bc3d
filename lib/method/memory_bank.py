"""The memory bank.

Letters: B batch, N samples, D embedding.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from lib.distributed.processes import CHUNK, Ranks
from lib.distributed.sharded import ShardedRows


class MemoryBank:
    """One row for each training sample: a running mean of its embeddings, renormalised (docs/method.md, equation 3).

    The reference ignores the temperature and momentum it is given in favour of its global options; here
    they are honoured.

    Args:
        samples: N.
        low_dim: D.
        temperature: tau of the non-parametric classifier over the rows.
        momentum: eta, the share of the old row that an update keeps.
        seed: of the uniform noise in (-s, s), s = 1 / sqrt(D / 3), that the rows start as.
        device: where the rows lie.
        world: the processes over which the rows lie in parts.

    Attributes:
        memory: (n, D), the rows of this process.
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
        part = self.ranks.shard(samples)
        start, stop = part.start, part.stop
        self.memory = torch.empty(stop - start, low_dim, device=device)
        bound, draw = 1 / math.sqrt(low_dim / 3), torch.Generator().manual_seed(seed)
        step = max(1, CHUNK // low_dim)
        for first in range(0, stop, step):  # on the CPU and from the first row on: the same whatever device and part
            noise = torch.rand(min(step, stop - first), low_dim, generator=draw).mul_(2 * bound).sub_(bound)
            if first + len(noise) > start:
                skipped = max(0, start - first)
                self.memory[first + skipped - start : first + len(noise) - start] = noise[skipped:]

    @property
    def rows(self) -> ShardedRows:
        """All rows (N, D), in parts."""
        return ShardedRows(self.memory, self.samples, self.ranks)

    @torch.no_grad()
    def update(self, embeddings: torch.Tensor, index: torch.Tensor) -> None:
        """m_i <- normalise(eta m_i + (1 - eta) x_i), in place.

        Call it after ``backward``, which needs the rows as they were.

        Args:
            embeddings: (B, D) of the whole batch, unit length, the same in every process.
            index: (B,) the samples' rows, each at most once.
        """
        which, place = self.rows.local_rows(index)
        mixed = self.momentum * self.memory[place] + (1 - self.momentum) * embeddings[which]
        self.memory[place] = F.normalize(mixed, dim=1)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """``params`` = [temperature, momentum] and ``memory`` (N, D): the reference's form.

        To be called in every process; only the first gets the rows, the others (0, D).
        """
        return {"params": torch.tensor([self.temperature, self.momentum]), "memory": self.rows.gather_to_rank0()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Takes over ``memory`` (N, D) of the first process; temperature and momentum stay what the options say.

        To be called in every process; of others only the shape counts.

        Raises:
            ValueError: the rows are of another number or size.
        """
        if state["memory"].shape != self.rows.shape:
            raise ValueError(f"the memory is {list(state['memory'].shape)}, and should be {list(self.rows.shape)}")
        self.rows.copy_from_rank0(state["memory"])
