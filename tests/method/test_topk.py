"""The greatest values of rows, against sorting them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.method.topk import top_k


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 6), st.integers(1, 400), st.integers(0, 400), st.integers(1, 1000), st.integers(0, 2**32 - 1))
def test_they_are_those_of_the_sorted_row(rows: int, columns: int, k: int, different: int, seed: int) -> None:
    k = min(k, columns)
    values = np.random.default_rng(seed).integers(0, different, (rows, columns)).astype(np.float32)  # with ties
    best, index = top_k(torch.from_numpy(values), k)
    assert best.shape == index.shape == (rows, k) and index.dtype == torch.int64
    for row in range(rows):
        assert best[row].tolist() == sorted(values[row].tolist(), reverse=True)[:k]
        assert values[row, index[row].numpy()].tolist() == best[row].tolist()
        assert len(set(index[row].tolist())) == k


@pytest.mark.parametrize(("columns", "k"), [(50_000, 200), (50_003, 1), (4097, 20)])
def test_long_rows_go_by_groups(columns: int, k: int) -> None:
    values = torch.from_numpy(np.random.default_rng(k).permutation(3 * columns).reshape(3, columns))
    best, index = top_k(values, k)
    expected = values.topk(k, dim=1)
    assert torch.equal(best, expected.values) and torch.equal(index, expected.indices)


def test_what_is_struck_out_does_not_come_in_before_the_others() -> None:
    values = torch.arange(100.0)[None].clone()
    values[0, 99] = -torch.inf
    assert top_k(values, 2)[1].tolist() == [[98, 97]]
    assert top_k(values, 100)[1][0, -1] == 99


def test_a_transposed_block_is_as_good() -> None:
    values = torch.from_numpy(np.random.default_rng(0).normal(size=(300, 7))).t()
    assert torch.equal(top_k(values, 3)[0], values.topk(3, dim=1).values)
