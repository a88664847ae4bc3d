"""The memory bank. Layer 2.

Letters: B batch, N samples, D embedding.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


class MemoryBank:
    """One row for each training sample: a running mean of its embeddings, renormalised (METHOD 1).

    The reference ignores the temperature and momentum it is given in favour of its global options; here
    they are honoured.

    Args:
        samples: N.
        low_dim: D.
        temperature: tau of the non-parametric classifier over the rows.
        momentum: eta, the share of the old row that an update keeps.
        seed: of the uniform noise in (-s, s), s = 1 / sqrt(D / 3), that the rows start as.
        device: where the rows lie.
    """

    def __init__(
        self, samples: int, low_dim: int, *, temperature: float, momentum: float, seed: int, device: torch.device | str
    ) -> None:
        self.temperature = temperature
        self.momentum = momentum
        noise = torch.rand(samples, low_dim, generator=torch.Generator().manual_seed(seed))  # drawn on the CPU:
        bound = 1 / math.sqrt(low_dim / 3)  # the same rows whatever the device
        self.memory = noise.mul_(2 * bound).sub_(bound).to(device)  # (N, D)

    @torch.no_grad()
    def update(self, embeddings: torch.Tensor, index: torch.Tensor) -> None:
        """m_i <- normalise(eta m_i + (1 - eta) x_i), in place.

        Call it after ``backward``, which needs the rows as they were.

        Args:
            embeddings: (B, D), unit length.
            index: (B,) the samples' rows, each at most once.
        """
        mixed = self.momentum * self.memory[index] + (1 - self.momentum) * embeddings
        self.memory[index] = F.normalize(mixed, dim=1)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """``params`` = [temperature, momentum] and ``memory`` (N, D): the reference's form."""
        return {"params": torch.tensor([self.temperature, self.momentum]), "memory": self.memory}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Takes over ``memory`` (N, D); temperature and momentum stay what the options say.

        Raises:
            ValueError: the rows are of another number or size.
        """
        if state["memory"].shape != self.memory.shape:
            raise ValueError(f"the memory is {list(state['memory'].shape)}, and should be {list(self.memory.shape)}")
        self.memory.copy_(state["memory"])
