"""The memory bank compared with equations 2 and 3 of docs/method.md."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import oracles
from lib.method.memory_bank import MemoryBank

many = settings(max_examples=50, deadline=None)
seeds = st.integers(0, 2**32 - 1)


def bank_of(
    samples: int, low_dim: int, *, seed: int = 0, temperature: float = 0.1, momentum: float = 0.5
) -> MemoryBank:
    return MemoryBank(samples, low_dim, temperature=temperature, momentum=momentum, seed=seed, device="cpu")


def bank_with(memory: np.ndarray, *, temperature: float = 0.1, momentum: float = 0.5) -> MemoryBank:
    bank = bank_of(*memory.shape, temperature=temperature, momentum=momentum)
    bank.memory = torch.from_numpy(memory.copy())
    return bank


@pytest.mark.parametrize("low_dim", [1, 3, 32, 128])
def test_rows_start_as_uniform_noise_within_the_bound(low_dim: int) -> None:
    noise = bank_of(60_000 // low_dim, low_dim, seed=3).memory.numpy()
    assert noise.dtype == np.float32
    bound = 1 / math.sqrt(low_dim / 3)
    assert np.abs(noise).max() <= bound
    shares = np.histogram(noise, bins=10, range=(-bound, bound))[0] / noise.size
    np.testing.assert_allclose(shares, 0.1, atol=0.01)  # eight deviations of 60,000 draws
    lengths = (noise.astype(np.float64) ** 2).sum(axis=1)
    assert lengths.mean() == pytest.approx(1, abs=0.03)  # the mean length is that of the unit rows which replace them


def test_noise_depends_only_on_the_seed() -> None:
    torch.manual_seed(1)
    first = bank_of(20, 4, seed=7).memory
    torch.manual_seed(2)
    assert torch.equal(bank_of(20, 4, seed=7).memory, first)
    assert not torch.equal(bank_of(20, 4, seed=8).memory, first)


def test_noise_does_not_use_pytorch_s_generator() -> None:
    before = torch.get_rng_state()
    bank_of(20, 4, seed=7)
    assert torch.equal(torch.get_rng_state(), before)


@many
@given(
    st.sampled_from(oracles.KINDS), st.integers(1, 9), st.integers(1, 5), st.sampled_from([0.0, 0.3, 0.5, 1.0]), seeds
)
def test_update_equals_the_oracle_and_keeps_other_rows(
    kind: str, samples: int, low_dim: int, momentum: float, seed: int
) -> None:
    memory = oracles.rows(kind, samples, low_dim, seed)
    index = np.random.default_rng(seed).permutation(samples)[: (samples + 1) // 2]
    x = oracles.rows("random", len(index), low_dim, seed + 1)
    expected = oracles.updated(memory, x, index, momentum)
    mixed = momentum * memory[index] + (1 - momentum) * x
    assume((np.linalg.norm(mixed, axis=1) > 1e-6).all())  # opposite rows have no direction: see below
    bank = bank_with(memory, momentum=momentum)
    bank.update(torch.from_numpy(x), torch.from_numpy(index))
    np.testing.assert_allclose(bank.memory.numpy(), expected, rtol=1e-9, atol=1e-12)
    others = np.setdiff1d(np.arange(samples), index)
    np.testing.assert_array_equal(bank.memory.numpy()[others], memory[others])
    np.testing.assert_allclose(np.linalg.norm(bank.memory.numpy()[index], axis=1), 1, rtol=1e-12)


def test_update_is_in_place() -> None:
    bank = bank_of(4, 3)
    rows = bank.memory
    bank.update(torch.eye(3), torch.tensor([2, 0, 3]))
    assert bank.memory is rows


def test_opposite_rows_cancel_to_zero_instead_of_nan() -> None:
    bank = bank_with(np.array([[1.0, 0.0], [0.6, 0.8]]))
    bank.update(torch.tensor([[-1.0, 0.0]], dtype=torch.float64), torch.tensor([0]))
    assert bank.memory.tolist() == [[0.0, 0.0], [0.6, 0.8]]


def test_first_update_normalises_the_row() -> None:
    bank = bank_of(5, 8, seed=1)
    bank.update(torch.nn.functional.one_hot(torch.tensor([3]), 8).float(), torch.tensor([2]))
    assert bank.memory[2].norm().item() == pytest.approx(1, abs=1e-6)


def test_update_detaches_the_memory() -> None:
    bank = bank_of(4, 2)
    x = torch.ones(1, 2, requires_grad=True)
    bank.update(x * 0.5, torch.tensor([1]))
    assert not bank.memory.requires_grad
    assert bank.memory.grad_fn is None


def test_state_dict_holds_temperature_momentum_and_memory() -> None:
    bank = bank_of(4, 2, temperature=0.25, momentum=0.75)
    state = bank.state_dict()
    assert sorted(state) == ["memory", "params"]
    assert state["params"].tolist() == [0.25, 0.75]
    assert torch.equal(state["memory"], bank.memory)


def test_restored_state_sets_rows_but_not_constants() -> None:
    saved = bank_of(4, 2, seed=1, temperature=0.25, momentum=0.75)
    bank = bank_of(4, 2, seed=2, temperature=0.5, momentum=0.125)
    bank.load_state_dict(saved.state_dict())
    assert torch.equal(bank.memory, saved.memory)
    assert (bank.temperature, bank.momentum) == (0.5, 0.125)
    bank.update(torch.ones(1, 2), torch.tensor([0]))
    assert not torch.equal(bank.memory, saved.memory), "the banks share their rows"


@pytest.mark.parametrize("shape", [(3, 2), (5, 2), (4, 3)])
def test_rows_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises((ValueError, RuntimeError)):
        bank_of(4, 2).load_state_dict({"memory": torch.zeros(shape)})
