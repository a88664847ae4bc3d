"""The compiled augmentation compared with the one that is not compiled."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from lib.data import compiled_augmentation
from lib.data.augmentation import Augmentation
from lib.data.compiled_augmentation import CompiledAugmentation

PAPER: dict[str, Any] = {
    "resize": (12, 12),
    "size": (12, 12),
    "means": (0.5, 0.4, 0.3),
    "stds": (0.2, 0.3, 0.25),
    "scale": (0.2, 1.0),
    "jitter": (0.4, 0.4, 0.4, 0.4),
    "grey": 0.2,
    "flip": True,
}
CHANGES: list[dict[str, Any]] = [
    {},
    {"jitter": (0.8, 0.8, 0.8, 0.0), "layout": torch.contiguous_format},
    {"scale": None},
    {"scale": None, "resize": (15, 14), "jitter": None, "grey": 0.0, "flip": False},
]


def pictures(count: int, seed: int, side: int = 12) -> tuple[torch.Tensor, np.ndarray]:
    draw = np.random.default_rng(seed)
    return torch.from_numpy(draw.integers(0, 256, (count, side, side, 3), dtype=np.uint8)), draw.random((count, 32))


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("on_worker", [False, True])
def test_compiled_augmentation_equals_the_plain_one(
    change: dict[str, Any], on_worker: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled_augmentation, "_compiled", lambda: compiled_augmentation._augment)
    plain, ours = Augmentation(**PAPER | change), CompiledAugmentation(**PAPER | change)
    for count in (64, 1, 0):
        images, numbers = pictures(count, seed=count)
        before = images.clone()
        expected, found = (
            each.augment_on_device(images, numbers) if on_worker else each(images, numbers) for each in (plain, ours)
        )
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
        assert torch.equal(images, before)
        if count > 1:
            assert found.stride() == expected.stride()


@pytest.mark.slow
@pytest.mark.parametrize("change", [CHANGES[0], CHANGES[2]])
def test_augmentation_is_compiled_once_for_all_batch_sizes(
    change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.compiler.reset()
    compiled = cache(lambda: torch.compile(compiled_augmentation._augment, backend="aot_eager", fullgraph=True))
    monkeypatch.setattr(compiled_augmentation, "_compiled", compiled)
    plain, ours = Augmentation(**PAPER | change), CompiledAugmentation(**PAPER | change)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for count in (16, 16, 9, 3):
            images, numbers = pictures(count, seed=count)
            torch.testing.assert_close(ours(images, numbers), plain(images, numbers), rtol=1e-5, atol=1e-4)
