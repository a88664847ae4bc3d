"""Detects a collapse of training from the figures of its epochs (``lib/method/diagnostics.py``), without labels.

There are two criteria, each over ``WINDOW`` epochs in a row. Neither applies before epoch ``FIRST`` of the run, because
the memory bank still contains random rows in the first epochs:

* Entropy. N unit vectors drawn at random in D dimensions have similarities of variance 1 / D, so their entropies are
  about 1 / (2 D tau^2) below ln N: 0.39 nats for D = 128, tau = 0.1. After training even the lowest twentieth of the
  entropies (``entropy_05``) is less than half of that below ln N only if nearly all embeddings are the same vector.
* Neighbours kept. Chance alone keeps K / (N - 1) of the neighbours from round to round. Less than ``CHANCE`` times
  that, on average, means that the neighbours of a round are unrelated to those of the previous round.

The values of healthy runs that were closest to a warning, and the worst windows of collapsed runs. One seed each, 2
rounds of 10 epochs, D = 128 and tau = 0.1 unless stated otherwise; accuracy by weighted kNN after the last epoch; from
the third row on with resnet10-w16:

================================================  ========  ==========================  =============
run                                               accuracy  ln N - entropy_05, nats     kept / chance
================================================  ========  ==========================  =============
digits.yaml, seed 0                                 96.1 %  2.9                         90
digits.yaml, seed 1                                 94.7 %  3.0                         97
digits.yaml with --base-lr 0.3                      88.6 %  1.6                         30
digits.yaml with --low-dim 16                       91.4 %  1.8                         37
digits.yaml with --npc-temperature 1                80.0 %  0.1 (limit 0.002)           32
digits.yaml with --npc-temperature 5                67.5 %  0.0007 (limit 0.00008)      14
cifar10-cpu.yaml, 2,000 images                           -  1.1                         12
cifar10-cpu.yaml, 610 images, 3 rounds of 20             -  0.48                        9
cifar10-cpu.yaml, 50,000 images, 35 epochs, then 6  55.0 %  2.7                         5,700
collapsed: digits.yaml with --base-lr 30            11.1 %  0.11 to 0.17 (limit 0.195)  0.75
collapsed: digits.yaml with --base-lr 0.1
and --weight-decay 1                                10.0 %  0.16 (limit 0.195)          0.5
================================================  ========  ==========================  =============

From the fourth epoch on, no healthy run at the default temperature was below 0.43 nats (610 images, after 20 steps). An
accuracy equal to the share of one class is not a criterion: in collapsed runs the predicted class changes from epoch to
epoch, and if N is only slightly larger than the K of kNN, a healthy run can predict a single class, too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

FIRST = 10
"""Epochs of the run before the first check."""
WINDOW = 4
"""Epochs in a row that must meet a criterion."""
SPREAD = 0.5
"""Fraction of the distance from ln N of random unit vectors, below which the embeddings count as collapsed."""
NEAREST = 0.2
"""Upper limit of that distance in nats, for few dimensions or a low temperature."""
CHANCE = 3
"""Neighbours kept, in multiples of the expectation by chance, below which neighbourhoods count as random."""
ADVICE = (
    "try a lower --base-lr or --weight-decay, another --npc-temperature, more epochs (--max-epoch) or a larger "
    "--batch-size"
)


def find_collapse(
    rows: Sequence[Mapping[str, Any]], *, samples: int, size: int, low_dim: int, temperature: float
) -> str:
    """A message about the first sign of collapse, or '' if there is none.

    Args:
        rows: records of the epochs in order, as in metrics.jsonl.
        samples: N; very small sets are not checked.
        size: K neighbours.
        low_dim: D.
        temperature: tau.
    """
    limit = min(NEAREST, SPREAD / (2 * low_dim * temperature**2))
    chance = size / max(1, samples - 1)
    for end in range(FIRST, len(rows) + 1):
        window = rows[end - WINDOW : end]
        where = f"round {window[-1]['round']}, epoch {window[-1]['epoch'] + 1}"
        entropies = [row.get("entropy_05") for row in window]
        distances = [math.log(samples) - entropy for entropy in entropies if entropy is not None]
        # at very high temperatures the limit is below the resolution of float32
        if samples >= 20 and limit > 1e-5 and len(distances) == WINDOW and max(distances) < limit:
            return (
                f"{where}: the embeddings seem to have collapsed: for {WINDOW} epochs the entropies of nearly all "
                f"samples have been within {max(distances):.2g} nats of the maximum, ln N = "
                f"{math.log(samples):.2f}, so the network hardly distinguishes the images; {ADVICE}"
            )
        kept = [row["kept"] for row in window if row.get("kept") is not None]
        if chance <= 0.01 and len(kept) == WINDOW and sum(kept) / WINDOW < CHANCE * chance:
            return (
                f"{where}: the neighbourhoods seem to be random: over {WINDOW} epochs only {sum(kept) / WINDOW:.2%} of "
                f"the neighbours of the previous round are still neighbours, and chance alone keeps {chance:.2%}; "
                f"{ADVICE}"
            )
    return ""
