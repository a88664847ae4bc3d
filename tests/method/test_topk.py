"""The running top-k compared with sorted rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.method.topk import TopK


def top_k(values: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The K largest values of each row in one update, and their columns."""
    best = TopK.empty(len(values), k, values)
    best.update(values, 0, 0)
    return best.similarities, best.samples


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 6), st.integers(1, 400), st.integers(0, 400), st.integers(1, 1000), st.integers(0, 2**32 - 1))
def test_top_k_equals_the_sorted_row(rows: int, columns: int, k: int, different: int, seed: int) -> None:
    k = min(k, columns)
    values = np.random.default_rng(seed).integers(0, different, (rows, columns)).astype(np.float32)  # with ties
    best, index = top_k(torch.from_numpy(values), k)
    assert best.shape == index.shape == (rows, k) and index.dtype == torch.int64
    for row in range(rows):
        assert best[row].tolist() == sorted(values[row].tolist(), reverse=True)[:k]
        assert values[row, index[row].numpy()].tolist() == best[row].tolist()
        assert len(set(index[row].tolist())) == k


@pytest.mark.parametrize(("columns", "k"), [(50_000, 200), (50_003, 1), (4097, 20)])
def test_long_rows_give_the_result_of_torch_topk(columns: int, k: int) -> None:
    values = torch.from_numpy(np.random.default_rng(k).permutation(3 * columns).reshape(3, columns)).double()
    best, index = top_k(values, k)
    expected = values.topk(k, dim=1)
    assert torch.equal(best, expected.values) and torch.equal(index, expected.indices)


def test_masked_value_comes_after_all_others() -> None:
    values = torch.arange(100.0)[None].clone()
    values[0, 99] = -torch.inf
    assert top_k(values, 2)[1].tolist() == [[98, 97]]
    best, index = top_k(values, 100)
    assert best[0, -1] == -torch.inf and index[0, :-1].tolist() == list(range(98, -1, -1))


def test_transposed_block_gives_the_same_result() -> None:
    values = torch.from_numpy(np.random.default_rng(0).normal(size=(300, 7))).t()
    assert torch.equal(top_k(values, 3)[0], values.topk(3, dim=1).values)


def test_updates_in_blocks_give_the_result_of_one_update() -> None:
    values = torch.from_numpy(np.random.default_rng(0).permutation(5 * 900).reshape(5, 900)).double()
    best = TopK.empty(5, 7, values)
    for row, column in ((0, 0), (3, 0), (0, 400), (3, 400)):
        best.update(values[row : row + 3, column : column + (400 if column == 0 else 500)], row, column)
    expected = values.topk(7, dim=1)
    assert torch.equal(best.similarities, expected.values) and torch.equal(best.samples, expected.indices)
