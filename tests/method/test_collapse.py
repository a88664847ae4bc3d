"""The collapse warning, with recorded figures of healthy and collapsed runs."""

from __future__ import annotations

import math
from typing import Any

import pytest

from lib.method.collapse import find_collapse

DIGITS = {"samples": 1437, "size": 1, "low_dim": 128, "temperature": 0.1}
HEALTHY = {  # (samples, temperature, entropy_05, neighbours kept) of each epoch
    "digits": (
        *(1437, 0.1),
        [1.073, 1.467, 2.11, 3.246, 4.156, 4.331, 4.379, 4.391, 4.431, 4.419, 4.411, 4.35, 4.308, 4.222, 4.147],
        [None] * 10 + [0.1364, 0.0835, 0.0828, 0.0689, 0.064],
    ),
    "few photographs": (
        *(610, 0.1),
        [1.161, 2.414, 5.792, 5.936, 5.937, 5.938, 5.976, 5.971, 5.96, 5.934, 5.896, 5.86, 5.752, 5.699, 5.615],
        [None] * 10 + [0.0279, 0.0213, 0.0098, 0.0131, 0.0131],
    ),
    "high temperature": (1437, 1.0, [7.263, 7.26, 7.256, 7.243, 7.22, 7.196, 7.184, 7.177, 7.173, 7.171], [None] * 10),
}
COLLAPSED = [1.255, 5.964, 6.477, 6.757, 7.041, 7.1, 7.102, 7.107, 7.105, 7.227]
"""entropy_05 of the digits at a learning rate of 30."""


def rows(entropies: list[float], kept: list[float | None] | None = None, each: int = 10) -> list[dict[str, Any]]:
    kept = kept or [None] * len(entropies)
    return [
        {"round": number // each, "epoch": number % each, "entropy_05": entropy, "kept": share}
        for number, (entropy, share) in enumerate(zip(entropies, kept, strict=True))
    ]


@pytest.mark.parametrize("run", HEALTHY)
def test_healthy_runs_have_no_warning(run: str) -> None:
    samples, temperature, entropies, kept = HEALTHY[run]
    given = rows(entropies, kept)
    assert find_collapse(given, samples=samples, size=1, low_dim=128, temperature=temperature) == ""


def test_equal_embeddings_are_reported_as_collapse() -> None:
    message = find_collapse(rows(COLLAPSED), **DIGITS)
    assert message.startswith("round 0, epoch 10: the embeddings seem to have collapsed")
    assert "ln N = 7.27" in message
    for option in ("--base-lr", "--npc-temperature", "--max-epoch", "--batch-size"):
        assert option in message
    assert find_collapse(rows([*COLLAPSED, *[4.0] * 5]), **DIGITS) == message  # the first sign


def test_collapse_needs_four_epochs_in_a_row_and_ten_in_total() -> None:
    assert find_collapse(rows(COLLAPSED[:9]), **DIGITS) == ""
    assert find_collapse(rows([7.25] * 9), **DIGITS) == ""
    assert find_collapse(rows([7.25] * 10), **DIGITS)
    assert find_collapse(rows([5.0] * 9 + [7.25] * 3 + [5.0, 7.25, 7.25, 7.25]), **DIGITS) == ""
    assert "round 1, epoch 3" in find_collapse(rows([5.0] * 9 + [7.25] * 4), **DIGITS)


def test_random_neighbourhoods_are_reported_as_collapse() -> None:
    kept = [None] * 10 + [0.0807, 0.0035, 0.0014, 0.0007, 0.0007, 0.0]  # of digits at a learning rate of 30
    message = find_collapse(rows([5.0] * 16, kept), **DIGITS)
    assert message.startswith("round 1, epoch 5: the neighbourhoods seem to be random")
    assert "0.16% of the neighbours" in message and "chance alone keeps 0.07%" in message
    assert find_collapse(rows([2.0] * 16, kept), **{**DIGITS, "samples": 50}) == ""  # chance alone keeps many


@pytest.mark.parametrize("samples", [1, 2, 19])
def test_few_samples_are_not_judged(samples: int) -> None:
    assert find_collapse(rows([math.log(samples)] * 20), **{**DIGITS, "samples": samples}) == ""


def test_runs_without_health_figures_are_not_judged() -> None:
    assert find_collapse([{"round": 0, "epoch": number} for number in range(20)], **DIGITS) == ""
    assert find_collapse(rows([math.log(1437)] * 20), **{**DIGITS, "temperature": 100.0}) == ""
