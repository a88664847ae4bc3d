"""Derives the seeds of all random numbers of a run from one seed.

Each epoch of each round has its own seed, so no generator state is carried from one epoch to the next: a resumed run
uses the same random numbers as an uninterrupted one.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Stream(IntEnum):
    """Purposes of random numbers, each with its own stream."""

    WEIGHTS = 0  # initial weights of the network
    MEMORY = 1  # initial rows of the memory bank
    ORDER = 2  # batches of an epoch
    STEPS = 3  # dropout in the steps of an epoch
    AUGMENTATION = 4  # of a batch


def seed_for(seed: int, *where: int) -> int:
    """A seed in [0, 2**63) for one place in the run, well mixed.

    Args:
        seed: of the run.
        where: the stream and, if it restarts in each, the round and the epoch.
    """
    high, low = np.random.SeedSequence(seed, spawn_key=where).generate_state(2, np.uint32)
    return (int(high) << 32 | int(low)) >> 1


def choose(asked: int | None, saved: object, started: int) -> int:
    """The seed of the options, else that of the checkpoint, else the start time in seconds, as in the reference."""
    if asked is not None:
        return asked
    return saved if type(saved) is int and saved >= 0 else started
