"""One seed, and every random number of a run from it.

Layer 0. Each epoch of each round has its own seed, so nothing random has to be carried from one epoch to
the next: a run that goes on from a checkpoint draws what the unbroken run would have drawn.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Stream(IntEnum):
    """What random numbers are drawn for; no two share theirs."""

    WEIGHTS = 0  # the network's first ones
    MEMORY = 1  # the bank's noise
    ORDER = 2  # an epoch's
    STEPS = 3  # dropout in an epoch's steps
    AUGMENTATION = 4  # a batch's


def seed_for(seed: int, *where: int) -> int:
    """A seed in [0, 2**63) for one place in the run, well mixed.

    Args:
        seed: of the run.
        where: the stream, and the round and epoch where it starts again in each.
    """
    high, low = np.random.SeedSequence(seed, spawn_key=where).generate_state(2, np.uint32)
    return (int(high) << 32 | int(low)) >> 1


def choose(asked: int | None, saved: object, started: int) -> int:
    """The seed asked for; else a checkpoint's; else the time of the start in whole seconds, the reference's default."""
    if asked is not None:
        return asked
    return saved if type(saved) is int and saved >= 0 else started
