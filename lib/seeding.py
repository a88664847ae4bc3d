"""One seed, and every random number of a run from it.

Layer 0. Each epoch of each round has its own seed, so nothing random has to be carried from one epoch to
the next: a run that goes on from a checkpoint draws what the unbroken run would have drawn.
"""

from __future__ import annotations

import time

import numpy as np


def seed_for(seed: int, *where: int) -> int:
    """A seed in [0, 2**63) for one place in the run, such as (round, epoch), well mixed from ``seed``."""
    high, low = np.random.SeedSequence([seed, *where]).generate_state(2, np.uint32)
    return (int(high) << 32 | int(low)) >> 1


def from_time() -> int:
    """The reference's default seed: the time, in whole seconds."""
    return int(time.time())
