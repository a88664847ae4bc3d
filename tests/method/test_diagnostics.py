"""Health figures compared with plain loops, in float64 for tight tolerances and exact orders."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracles
from lib.method import chunking, diagnostics
from lib.method.diagnostics import QUANTILES, READING, State, measure, measured

many = settings(max_examples=40, deadline=None)
seeds = st.integers(0, 2**32 - 1)
NEIGHBOURS = ("reciprocal", "hubness", "orphans", "largest_hub")
Figures = dict[str, float | None]


@st.composite
def memories(draw: st.DrawFn) -> np.ndarray:
    """(N, D) without ties, 3 to 14 samples of 2 to 6 dimensions."""
    return oracles.rows("random", draw(st.integers(3, 14)), draw(st.integers(2, 6)), seed=draw(seeds))


def figures_of(
    memory: np.ndarray, previous: State | None = None, *, round: int = 0, size: int = 1, **patched: int
) -> tuple[Figures, State]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in patched.items():
            patch.setattr(chunking if name in ("CPU_BLOCK", "MIN_ROWS") else diagnostics, name, value)
        return measure(torch.from_numpy(memory), previous, round=round, temperature=0.2, size=size)


# The oracle.


def quantile(values: list[float], share: float) -> float:
    """Linear interpolation between the two nearest values."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def skewness(counts: list[int]) -> float:
    mean = sum(counts) / len(counts)
    spread = math.sqrt(sum((count - mean) ** 2 for count in counts) / len(counts))
    return sum((count - mean) ** 3 for count in counts) / len(counts) / spread**3 if spread else 0.0


def expected(memory: np.ndarray, rows: list[int], size: int) -> Figures:
    """The figures that need no earlier measurement, computed sample by sample."""
    near = {i: oracles.neighbours(memory, i, size) for i in range(len(memory))}
    entropies = [oracles.entropy(memory[i], memory, 0.2) for i in rows]
    result: Figures = {name: quantile(entropies, share) for name, share in QUANTILES.items()}
    result["reciprocal"] = sum(i in near[near[i][0]] for i in rows) / len(rows)
    result["largest_hub"] = max(sum(j in near[i] for i in rows) for j in range(len(memory))) / len(rows)
    inside = [oracles.neighbours(memory[rows], place, size) for place in range(len(rows))]
    counts = [sum(place in chosen for chosen in inside) for place in range(len(rows))]
    several = len(rows) > 1
    result["hubness"] = skewness(counts) if several else None
    result["orphans"] = counts.count(0) / len(rows) if several else None
    return result


def assert_equal(found: Figures, wanted: Figures) -> None:
    for name, value in wanted.items():
        assert found[name] == (None if value is None else pytest.approx(value, abs=1e-9)), name


@many
@given(memories(), st.integers(1, 20), st.integers(1, 60))
def test_figures_of_all_samples_equal_the_oracle(memory: np.ndarray, size: int, block: int) -> None:
    found, _ = figures_of(memory, size=size, CPU_BLOCK=block, MIN_ROWS=1)
    assert_equal(found, expected(memory, list(range(len(memory))), size))
    assert found["kept"] is None and found["drift"] is None


@many
@given(memories(), st.integers(1, 20), st.integers(1, 13), st.integers(1, 60))
def test_figures_of_a_subset_equal_the_oracle(memory: np.ndarray, size: int, rows: int, block: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diagnostics, "ROWS", rows)
        chosen = measured(len(memory)).tolist()
    assert len(chosen) == min(rows, len(memory))
    found, _ = figures_of(memory, size=size, ROWS=rows, CPU_BLOCK=block, MIN_ROWS=1)
    assert_equal(found, expected(memory, chosen, size))


def test_hub_raises_hubness_and_largest_hub() -> None:
    """Samples around a centre, each far from the others: the centre is the nearest neighbour of all."""
    memory = np.eye(10)[1:] + 3 * np.eye(10)[0]
    memory = np.vstack([np.eye(10)[:1], memory / np.linalg.norm(memory, axis=1, keepdims=True)])
    found, _ = figures_of(memory)
    assert found["largest_hub"] == 0.9  # the nine others
    assert found["orphans"] == 0.8  # all but the centre and its own neighbour
    assert found["reciprocal"] == 0.2  # those two
    assert found["hubness"] == pytest.approx(skewness([9, 1] + [0] * 8))


def test_many_samples_are_measured_on_a_fixed_subset() -> None:
    assert measured(diagnostics.ROWS).tolist() == list(range(diagnostics.ROWS))
    some = measured(3 * diagnostics.ROWS)
    assert len(some) == diagnostics.ROWS == len(some.unique())
    assert some.equal(some.sort().values) and some.equal(measured(3 * diagnostics.ROWS))
    assert 0 <= some.min() < diagnostics.ROWS / 10 and 2.9 * diagnostics.ROWS < some.max() < 3 * diagnostics.ROWS
    torch.manual_seed(3)  # PyTorch's global generator has no effect and is not used
    before = torch.random.get_rng_state()
    assert some.equal(measured(3 * diagnostics.ROWS)) and before.equal(torch.random.get_rng_state())


# Changes from measurement to measurement.


@many
@given(memories(), seeds, st.integers(1, 20), st.integers(1, 14))
def test_drift_and_kept_neighbours_equal_the_oracle(memory: np.ndarray, seed: int, size: int, rows: int) -> None:
    later = oracles.rows("random", *memory.shape, seed=seed)
    _, state = figures_of(memory, round=0, size=size, ROWS=rows)
    found, _ = figures_of(later, state, round=1, size=size, ROWS=rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diagnostics, "ROWS", rows)
        chosen = measured(len(memory)).tolist()
    both = [[oracles.neighbours(bank, i, size) for bank in (memory, later)] for i in chosen]
    kept = [j in now for before, now in both for j in before]
    assert found["kept"] == pytest.approx(sum(kept) / len(kept))
    assert found["drift"] == pytest.approx(sum(1 - oracles.dot(memory[i], later[i]) for i in chosen) / len(chosen))


def test_drift_ignores_the_length_of_rows() -> None:
    """Rows do not have unit length before their first update."""
    memory = oracles.rows("random", 6, 4, seed=1)
    _, state = figures_of(memory)
    assert figures_of(3 * memory, state)[0]["drift"] == pytest.approx(0, abs=1e-12)
    assert figures_of(-memory, state)[0]["drift"] == pytest.approx(2)


def test_kept_and_drift_compare_with_last_round_and_last_epoch() -> None:
    banks = [oracles.rows("random", 30, 4, seed=seed) for seed in range(6)]
    rounds = [0, 0, 1, 1, 1, 3]
    reference = [None, None, 1, 1, 1, 4]
    state = None
    for number, (bank, round) in enumerate(zip(banks, rounds, strict=True)):
        found, state = figures_of(bank, state, round=round, size=2)
        past = reference[number]
        if past is None:
            assert found["kept"] is None
        else:
            pairs = [(oracles.neighbours(banks[past], i, 2), oracles.neighbours(bank, i, 2)) for i in range(30)]
            assert found["kept"] == pytest.approx(sum(j in now for before, now in pairs for j in before) / 60)
        if number:
            moved = [1 - oracles.dot(banks[number - 1][i], bank[i]) for i in range(30)]
            assert found["drift"] == pytest.approx(sum(moved) / 30)
    assert found["kept"] not in (0, 1)


def test_diagnostics_state_is_a_copy_of_the_bank() -> None:
    memory = torch.from_numpy(oracles.rows("random", 5, 3, seed=1))
    _, state = measure(memory, None, round=0, temperature=0.2, size=1)
    memory.neg_()
    assert measure(memory, state, round=0, temperature=0.2, size=1)[0]["drift"] == pytest.approx(2)


def test_state_of_other_rows_is_ignored() -> None:
    _, state = figures_of(oracles.rows("random", 9, 3, seed=1))
    found, _ = figures_of(oracles.rows("random", 8, 3, seed=2), state, round=1)
    assert found["kept"] is None and found["drift"] is None


def test_kept_is_the_share_of_earlier_neighbours_for_any_size() -> None:
    memory = oracles.rows("random", 9, 3, seed=1)
    _, few = figures_of(memory, size=2)
    assert figures_of(memory, few, round=1, size=4)[0]["kept"] == 1
    _, much = figures_of(memory, size=4)
    assert figures_of(memory, much, round=1, size=2)[0]["kept"] == 0.5


# Resuming from a checkpoint.


def test_restored_state_gives_the_same_figures(tmp_path: Any) -> None:
    banks = [oracles.rows("random", 12, 4, seed=seed) for seed in range(3)]
    state: State | None = None
    for round, bank in enumerate(banks[:2]):
        _, state = figures_of(bank, state, round=round)
        torch.save(state.state_dict(), tmp_path / "state")
        loaded = State.from_state_dict(torch.load(tmp_path / "state", weights_only=True))
        for next_round in (round, round + 1):
            wanted = figures_of(banks[2], state, round=next_round)[0]
            assert figures_of(banks[2], loaded, round=next_round)[0] == wanted


@pytest.mark.parametrize(
    "change",
    [
        {"rows": None},
        {"rows": torch.zeros(3)},
        {"nearest": torch.zeros(4, 1, dtype=torch.long)},
        {"nearest": torch.zeros(3, 1)},
        {"before": torch.zeros(2, 1, dtype=torch.long)},
        {"before": torch.zeros(3, 1)},
        {"before": 3},
    ],
)
def test_damaged_state_is_refused(change: dict[str, Any]) -> None:
    whole = {"round": 1, "rows": torch.zeros(3, 2), "nearest": torch.zeros(3, 1, dtype=torch.long), "before": None}
    State.from_state_dict(whole)
    with pytest.raises(ValueError, match=r"^health state: .+"):
        State.from_state_dict(whole | change)


# Edges.


@pytest.mark.parametrize("size", [1, 3, 50])
@pytest.mark.parametrize("samples", [1, 2, 3, 20])
@pytest.mark.parametrize("kind", ["equal", "zero", "one zero", "random"])
def test_figures_are_finite_for_degenerate_rows(kind: str, samples: int, size: int) -> None:
    memory = oracles.rows("equal" if kind == "equal" else "random", samples, 3, seed=1).astype(np.float32)
    memory[: {"zero": samples, "one zero": 1}.get(kind, 0)] = 0
    for rows in (1, 2, samples):
        _, state = figures_of(memory, size=size, ROWS=rows)
        found, _ = figures_of(memory, state, round=1, size=size, ROWS=rows)
        unknown = {name for name, value in found.items() if value is None}
        if samples == 1:
            assert unknown == {*NEIGHBOURS, "kept"}
        else:
            assert unknown == ({"hubness", "orphans"} if rows == 1 else set())
            assert found["kept"] == 1
        assert all(value is None or math.isfinite(value) for value in found.values())
        if kind in ("equal", "random"):
            assert found["drift"] == pytest.approx(0, abs=1e-6)
        if kind in ("equal", "zero"):
            assert found["entropy_05"] == found["entropy_95"] == pytest.approx(math.log(samples), abs=1e-6)


def test_hubness_is_zero_for_equal_counts() -> None:
    memory = np.repeat(np.eye(4), 2, axis=0)  # pairs
    found, _ = figures_of(memory)
    assert (found["hubness"], found["orphans"], found["reciprocal"], found["largest_hub"]) == (0, 0, 1, 1 / 8)


def test_nonfinite_rows_do_not_raise() -> None:
    found, state = figures_of(np.full((4, 2), np.nan))
    assert math.isnan(found["entropy_50"] or 0)
    figures_of(np.full((4, 2), np.nan), state, round=1)


def test_every_figure_has_an_explanation() -> None:
    found, _ = figures_of(oracles.rows("random", 5, 3, seed=1))
    assert {"entropy" if name in QUANTILES else name for name in found} == set(READING)
    for sentence in READING.values():
        assert sentence[0].isupper() and sentence.endswith(".") and sentence.count(". ") == 0
        assert not set(sentence) & set("<>&|\n")  # they are shown in Markdown tables and in HTML


def test_measuring_changes_nothing_and_needs_no_gradient() -> None:
    memory = torch.from_numpy(oracles.rows("random", 9, 3, seed=1)).requires_grad_()
    copy = memory.detach().clone()
    _, state = measure(memory, None, round=0, temperature=0.2, size=1)
    assert memory.detach().equal(copy) and not state.rows.requires_grad
