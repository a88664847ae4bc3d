"""Batches: every sample once, and equal for a seed with any number of workers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import synthetic
from lib.data import loader
from lib.data.augmentation import Augmentation
from lib.data.loader import Loader
from lib.distributed.processes import Ranks

CPU = torch.device("cpu")
many = settings(max_examples=50, deadline=None)

Batches = list[tuple[torch.Tensor, torch.Tensor]]


def images(samples: int) -> list[np.ndarray]:
    """Images of one pixel that encodes the sample's index."""
    return [np.array([[[i // 128, i % 128, 7]]], dtype=np.uint8) for i in range(samples)]


PLAIN = synthetic.untouched(1, 1, stds=(1 / 255,) * 3)
NOISY = replace(PLAIN, jitter=(0.9, 0, 0, 0))
"""With random brightness, which the third channel shows."""


def loader_of(samples: int, augmentation: Augmentation = NOISY, *, in_memory: bool = False, **options: Any) -> Loader:
    given = torch.from_numpy(np.stack(images(samples))) if in_memory else images(samples)
    return Loader(given, augmentation, **{"batch_size": 4, "workers": 0, "seed": 3, "device": CPU, **options})


def same(first: Batches, second: Batches) -> bool:
    pairs = zip(first, second, strict=False)
    return len(first) == len(second) and all(torch.equal(x, y) for a, b in pairs for x, y in zip(a, b, strict=True))


def order(batches: Batches) -> list[int]:
    return [i for _, index in batches for i in index.tolist()]


@contextmanager
def global_generator_unchanged() -> Iterator[None]:
    before = torch.get_rng_state()
    yield
    assert torch.equal(torch.get_rng_state(), before), "PyTorch's global generator was used"


@many
@given(st.integers(1, 70), st.integers(1, 20), st.sampled_from([None, 0, 5]), st.integers(0, 3), st.booleans())
def test_epoch_has_every_sample_once(
    samples: int, batch_size: int, seed: int | None, epoch: int, in_memory: bool
) -> None:
    loader = loader_of(samples, PLAIN, batch_size=batch_size, seed=seed, in_memory=in_memory)
    batches = list(loader.epoch(1, epoch))
    assert sorted(order(batches)) == list(range(samples))
    assert len(batches) == len(loader)
    for pixels, index in batches:
        assert pixels.shape == (len(index), 3, 1, 1)
        assert index.dtype == torch.int64
        assert (pixels[:, 0, 0, 0].round() * 128 + pixels[:, 1, 0, 0].round()).tolist() == index.tolist()


@pytest.mark.parametrize("in_memory", [False, True])
def test_views_of_an_image_are_consecutive_and_differ(in_memory: bool) -> None:
    loader = loader_of(10, views=3, in_memory=in_memory)
    batches = list(loader.epoch(1, 2))
    assert sorted(order(batches)) == list(range(10)) and [len(index) for _, index in batches] == [4, 4, 2]
    for pixels, index in batches:
        views = pixels.view(len(index), 3, 3)  # (B, V, channels)
        red, green, other = views.unbind(2)
        brightness = other / 7
        assert (brightness.amax(1) - brightness.amin(1)).min() > 1e-3
        found = (red / brightness).round() * 128 + (green / brightness).round()
        dark = brightness < 0.2  # rounding hides the sample
        assert ((found == index[:, None]) | dark).all() and not dark.all()
    assert same(batches, list(loader_of(10, views=3, in_memory=not in_memory).epoch(1, 2)))
    assert same(batches[1:], list(loader.epoch(1, 2, first=1)))


@pytest.mark.parametrize("in_memory", [False, True])
def test_each_epoch_has_its_size(in_memory: bool) -> None:
    """The images of each epoch equal those of an augmentation with that size."""
    sizes = {(0, 0): (2, 3), (0, 1): (4, 4), (1, 0): (1, 1)}
    wide = replace(NOISY, scale=(0.2, 1.0))
    loader = loader_of(6, wide, in_memory=in_memory, size_of=lambda round, epoch: sizes[round, epoch])
    for (round, epoch), size in sizes.items():
        batches = list(loader.epoch(round, epoch))
        assert {tuple(pixels.shape[2:]) for pixels, _ in batches} == {size}
        alone = loader_of(6, replace(wide, size=size), in_memory=in_memory)
        assert same(batches, list(alone.epoch(round, epoch)))


def test_images_are_decoded_once_for_all_views() -> None:
    class Counting(list[np.ndarray]):
        def __getitem__(self, sample: Any) -> Any:
            asked.append(sample)
            return super().__getitem__(sample)

    asked: list[int] = []
    loader = Loader(Counting(images(6)), NOISY, batch_size=4, workers=0, seed=1, device=CPU, views=2)
    assert sorted(order(list(loader.epoch()))) == sorted(asked) == list(range(6))


@pytest.mark.parametrize(
    ("samples", "batch_size", "sizes"),
    [
        (12, 4, [4, 4, 4]),
        (14, 4, [4, 4, 4, 2]),
        (13, 4, [4, 4, 5]),
        (5, 4, [5]),
        (4, 4, [4]),
        (3, 4, [3]),
        (1, 4, [1]),
        (3, 2, [3]),
    ],
)
@pytest.mark.parametrize("seed", [None, 1])
def test_single_remaining_image_joins_the_previous_batch(
    samples: int, batch_size: int, sizes: list[int], seed: int | None
) -> None:
    loader = loader_of(samples, batch_size=batch_size, seed=seed)
    assert [len(index) for _, index in loader.epoch()] == sizes
    assert len(loader) == len(sizes)


def test_without_a_seed_images_keep_their_order() -> None:
    loader = loader_of(11, PLAIN, seed=None)
    for epoch in range(2):
        assert order(list(loader.epoch(0, epoch))) == list(range(11))


def test_order_differs_in_every_epoch_and_round() -> None:
    loader = loader_of(40)
    orders = [order(list(loader.epoch(round, epoch))) for round in range(3) for epoch in range(3)]
    assert list(range(40)) not in orders
    assert len({tuple(o) for o in orders}) == 9


def test_random_order_is_uniform() -> None:
    loader = loader_of(6, PLAIN, batch_size=6)
    places = np.array([order(list(loader.epoch(0, epoch))) for epoch in range(600)])
    for sample in range(6):
        np.testing.assert_allclose((places == sample).mean(axis=0), 1 / 6, atol=0.076)  # five deviations


def test_another_seed_gives_another_order() -> None:
    first, second = (list(loader_of(40, seed=seed).epoch()) for seed in (1, 2))
    assert order(first) != order(second)


@pytest.mark.parametrize("in_memory", [True, False])
def test_augmentation_differs_by_epoch_and_sample(in_memory: bool) -> None:
    loader = loader_of(30, in_memory=in_memory)
    drawn = [pixels[:, 2] for epoch in range(2) for pixels, _ in loader.epoch(0, epoch)]
    assert len(torch.cat(drawn).unique()) == 60


def test_batches_from_memory_equal_those_of_the_workers() -> None:
    """A worker rounds a crop to 8 bits, which changes nothing here: the images are not resized."""
    pairs = zip(loader_of(23).epoch(1, 2), loader_of(23, in_memory=True).epoch(1, 2), strict=True)
    for (decoded, index), (resident, same_index) in pairs:
        assert torch.equal(index, same_index)
        torch.testing.assert_close(decoded, resident, atol=1e-4, rtol=0)


def test_batches_are_channels_last() -> None:
    augmentation = synthetic.untouched(5, 6)
    given = np.zeros((4, 3, 5, 6), np.uint8).transpose(0, 2, 3, 1)  # the layout of CIFAR's files
    for images in (torch.from_numpy(given), list(given)):
        ((batch, _),) = Loader(images, augmentation, batch_size=4, workers=0, seed=None, device=CPU).epoch()
        assert batch.shape == (4, 3, 5, 6)
        assert batch.is_contiguous(memory_format=torch.channels_last)


def test_batches_do_not_depend_on_earlier_epochs() -> None:
    fresh = list(loader_of(30).epoch(2, 5))
    loader = loader_of(30)
    list(loader.epoch(0, 0))
    next(loader.epoch(1, 1))  # an epoch that stops early
    torch.manual_seed(99)
    assert same(list(loader.epoch(2, 5)), fresh)


def test_every_number_of_workers_gives_the_same_batches() -> None:
    loaders = [loader_of(23, workers=workers) for workers in (0, 1, 2)]
    for where in ((0, 0), (0, 1), (1, 0)):
        alone, one, two = (list(loader.epoch(*where)) for loader in loaders)
        assert sorted(order(alone)) == list(range(23))
        assert same(one, alone)
        assert same(two, alone)
        assert same(list(loaders[2].epoch(*where)), alone)


@pytest.mark.parametrize(("ranks", "pauses"), [(Ranks(0, 2), [loader.PAUSE]), (Ranks(), [])])
def test_one_of_several_ranks_pauses_once_before_it_starts_workers(
    ranks: Ranks, pauses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    batches, seen = loader_of(13, workers=1, ranks=ranks), list[float]()
    monkeypatch.setattr(loader.time, "sleep", seen.append)
    for epoch in range(2):
        list(batches.epoch(0, epoch))
    assert seen == pauses


def test_workers_keep_the_order_without_a_seed() -> None:
    assert order(list(loader_of(23, PLAIN, workers=2, seed=None).epoch())) == list(range(23))


def test_preparing_batches_does_not_use_the_global_generator() -> None:
    loader = loader_of(10)
    batches = loader.epoch()
    with global_generator_unchanged():
        assert len(list(batches)) == 3


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("seed", [None, 3])
def test_epoch_does_not_use_the_global_generator(workers: int, seed: int | None) -> None:
    loader = loader_of(10, workers=workers, seed=seed)
    for epoch in range(2):
        with global_generator_unchanged():
            list(loader.epoch(0, epoch))


def test_building_a_loader_does_not_use_the_global_generator() -> None:
    with global_generator_unchanged():
        loader_of(10)
