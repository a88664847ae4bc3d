"""The effect of each augmentation option on the pixels of an image."""

from __future__ import annotations

import colorsys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, ks_2samp
from torchvision.transforms import ColorJitter, RandomResizedCrop
from torchvision.transforms import functional as F

from lib.config.options import Options
from lib.data.augmentation import NUM_RANDOM, Augmentation, for_testing, for_training, jitter_of

PLAIN = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
"""Means and deviations that change nothing: the output times 255 gives the pixels."""


def options_of(**options: Any) -> Options:
    return Options(**{"resize": 16, "size": 16, **options})


def coordinates(height: int, width: int) -> np.ndarray:
    """An image whose red encodes the row, green the column and blue both."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows * 2, columns * 2, 255 - rows - columns], axis=2).astype(np.uint8)


def flat(*colour: int) -> np.ndarray:
    return np.full((16, 16, 3), colour, dtype=np.uint8)


def pixels(output: torch.Tensor) -> np.ndarray:
    """(3, h, w) in [0, 1] -> (h, w, 3) in 0..255."""
    return (output.permute(1, 2, 0).double().numpy() * 255).round().astype(int)


def made_of(augmentation: Augmentation, image: np.ndarray, random_numbers: np.ndarray, by_worker: bool) -> torch.Tensor:
    """The augmented image (H, W, 3) for each row of random numbers (n, ``NUM_RANDOM``): (n, 3, h, w)."""
    if by_worker:
        return augmentation.augment_on_device(
            torch.from_numpy(np.stack([augmentation.crop_on_worker(image, d) for d in random_numbers])), random_numbers
        )
    return augmentation(torch.from_numpy(image).expand(len(random_numbers), *image.shape), random_numbers)


def trained(image: np.ndarray, times: int = 30, **options: Any) -> list[np.ndarray]:
    """The pixels of ``times`` training augmentations of an image, half of them cropped by a worker."""
    augmentation = for_training(options_of(**options), *PLAIN)
    random_numbers = np.random.default_rng(5).random((times, NUM_RANDOM))
    halves = ((random_numbers[: -(-times // 2)], False), (random_numbers[-(-times // 2) :], True))
    return [
        pixels(output)
        for part, by_worker in halves
        if len(part)
        for output in made_of(augmentation, image, part, by_worker)
    ]


def for_the_test(image: np.ndarray, means_and_stds: Any = PLAIN, **options: Any) -> torch.Tensor:
    """The image after the test transform; checks that batch and worker agree."""
    augmentation = for_testing(options_of(**options), *means_and_stds)
    batch, worker = (
        made_of(augmentation, image, np.zeros((1, NUM_RANDOM)), by_worker)[0] for by_worker in (False, True)
    )
    torch.testing.assert_close(batch, worker, atol=0.51 / 255 / min(means_and_stds[1]), rtol=0)
    return batch


def different(outputs: list[np.ndarray]) -> int:
    return len({output.tobytes() for output in outputs})


def window(output: np.ndarray) -> tuple[int, int]:
    """Top left corner of a crop of ``coordinates``; fails if the output is not such a crop."""
    top, left = int(output[0, 0, 0]) // 2, int(output[0, 0, 1]) // 2
    height, width, _ = output.shape
    np.testing.assert_array_equal(output, coordinates(80, 80)[top : top + height, left : left + width])
    return top, left


# Crops.


def test_without_scale_the_crop_is_a_window_of_the_resized_image() -> None:
    corners = {window(output) for output in trained(coordinates(16, 16), 200, size=12)}
    assert {top for top, _ in corners} == {0, 1, 2, 3, 4}
    assert {left for _, left in corners} == {0, 1, 2, 3, 4}


def test_crop_of_the_whole_image_changes_nothing() -> None:
    for output in trained(coordinates(16, 16), 3):
        np.testing.assert_array_equal(output, coordinates(16, 16))


def test_scale_is_the_share_of_the_area() -> None:
    outputs = trained(coordinates(80, 80), 60, size=40, resize=80, scale=(0.25, 0.25), ratio=(1, 1))
    corners = {window(output) for output in outputs}  # half of the edge: cropped and not resized
    assert len(corners) > 40
    assert min(min(corner) for corner in corners) < 10
    assert max(max(corner) for corner in corners) > 30


def test_scale_of_one_keeps_the_whole_image() -> None:
    for output in trained(coordinates(16, 16), 3, scale=(1, 1), ratio=(1, 1)):
        np.testing.assert_array_equal(output, coordinates(16, 16))


def test_ratio_is_width_to_height() -> None:
    outputs = trained(coordinates(80, 80), 20, resize=80, size=(20, 80), scale=(0.25, 0.25), ratio=(4, 4))
    corners = {window(output) for output in outputs}
    assert {left for _, left in corners} == {0}
    assert len(corners) > 5


def test_scales_cover_the_whole_range() -> None:
    """Red shows how many rows a crop spans. Resizing blurs about a pixel."""
    outputs = trained(coordinates(80, 80), 150, resize=80, size=16, scale=(0.2, 1), ratio=(1, 1))
    spans = [(np.ptp(output[:, :, 0]) / 2 + 80 / 16) / 80 for output in outputs]
    assert min(spans) < 0.2**0.5 + 0.06
    assert min(spans) > 0.2**0.5 - 0.06
    assert max(spans) > 0.94


@pytest.mark.parametrize(
    ("size", "shape"), [(8, (8, 8)), ((8, 8), (8, 8)), ((6, 12), (6, 12)), ("(12, 6)", (12, 6)), ([6, 8], (6, 8))]
)
@pytest.mark.parametrize("scale", [None, (0.5, 1.0)])
def test_size_is_a_square_or_height_and_width(size: Any, shape: tuple[int, int], scale: Any) -> None:
    options = options_of(size=size, scale=scale)
    for augmentation in (for_training(options, *PLAIN), for_testing(options, *PLAIN)):
        for by_worker in (False, True):
            output = made_of(augmentation, coordinates(20, 24), np.full((2, NUM_RANDOM), 0.3), by_worker)
            assert output.shape == (2, 3, *shape)
            assert output.dtype == torch.float32


# Colours.


def test_disabled_augmentation_leaves_the_image_unchanged() -> None:
    for output in trained(coordinates(16, 16), 5, colorjitter=None, random_grayscale=0, random_horizontal_flip=False):
        np.testing.assert_array_equal(output, coordinates(16, 16))


def test_first_jitter_strength_is_brightness() -> None:
    outputs = trained(flat(100, 60, 20), 60, colorjitter=(0.4, 0, 0, 0))
    factors = [output[0, 0, 0] / 100 for output in outputs]
    assert min(factors) >= 0.6
    assert max(factors) <= 1.4
    assert max(factors) - min(factors) > 0.6
    for factor, output in zip(factors, outputs, strict=True):
        np.testing.assert_allclose(
            output, np.broadcast_to([100 * factor, 60 * factor, 20 * factor], (16, 16, 3)), atol=2
        )


def test_second_jitter_strength_is_contrast() -> None:
    image = flat(80, 80, 80)
    image[:8] = 160  # mean 120
    outputs = trained(image, 60, colorjitter=(0, 0.5, 0, 0))
    spreads = [(int(output[0, 0, 0]) - int(output[15, 0, 0])) / 80 for output in outputs]
    assert min(spreads) >= 0.5 - 0.02
    assert max(spreads) <= 1.5 + 0.02
    assert max(spreads) - min(spreads) > 0.7
    for output in outputs:
        assert output.mean() == pytest.approx(120, abs=1.5)


def test_third_jitter_strength_is_saturation() -> None:
    outputs = trained(flat(160, 120, 80), 60, colorjitter=(0, 0, 0.5, 0))
    spreads = [(int(output[0, 0, 0]) - int(output[0, 0, 2])) / 80 for output in outputs]
    assert min(spreads) >= 0.5 - 0.03
    assert max(spreads) <= 1.5 + 0.03
    assert max(spreads) - min(spreads) > 0.7
    assert different(trained(flat(90, 90, 90), 20, colorjitter=(0, 0, 0.5, 0))) == 1  # grey has no saturation


def test_fourth_jitter_strength_is_hue() -> None:
    turns = []
    for output in trained(flat(255, 0, 0), 60, colorjitter=(0, 0, 0, 0.25)):
        hue, saturation, value = colorsys.rgb_to_hsv(*(output[0, 0] / 255))
        assert saturation > 0.97
        assert value > 0.99
        turns.append(hue if hue < 0.5 else hue - 1)  # red is 0, of one turn
    assert min(turns) < -0.15
    assert max(turns) > 0.15
    assert max(map(abs, turns)) < 0.27


def test_greyscale_sets_all_channels_to_the_luminance() -> None:
    for output in trained(flat(200, 100, 50), 5, random_grayscale=1):
        np.testing.assert_array_equal(output[:, :, 0], output[:, :, 1])
        np.testing.assert_array_equal(output[:, :, 0], output[:, :, 2])
        assert output[0, 0, 0] == pytest.approx(0.299 * 200 + 0.587 * 100 + 0.114 * 50, abs=1)


def test_grey_images_are_normalised_channel_by_channel() -> None:
    means, stds = (0.4, 0.5, 0.6), (0.1, 0.2, 0.25)
    augmentation = for_training(options_of(random_grayscale=1), means, stds)
    output = made_of(augmentation, coordinates(16, 16), np.zeros((1, NUM_RANDOM)), False)[0].double()
    grey = output * torch.tensor(stds)[:, None, None] + torch.tensor(means)[:, None, None]
    torch.testing.assert_close(grey[0], grey[1], atol=1e-6, rtol=0)
    torch.testing.assert_close(grey[0], grey[2], atol=1e-6, rtol=0)
    assert not torch.allclose(output[0], output[1])


def test_greyscale_has_the_given_probability() -> None:
    outputs = trained(flat(200, 100, 50), 500, random_grayscale=0.2)
    grey = sum(len(set(output[0, 0].tolist())) == 1 for output in outputs)
    assert abs(grey - 100) < 5 * (500 * 0.2 * 0.8) ** 0.5
    assert different(outputs) == 2


def test_flip_mirrors_about_half_of_the_images() -> None:
    image = coordinates(16, 16)
    outputs = trained(image, 400, random_horizontal_flip=True)
    mirrored = sum(np.array_equal(output, image[:, ::-1]) for output in outputs)
    kept = sum(np.array_equal(output, image) for output in outputs)
    assert mirrored + kept == 400
    assert abs(mirrored - 200) < 5 * 400**0.5 / 2


def test_options_of_the_paper_work_together() -> None:
    options = {"scale": (0.2, 1.0), "colorjitter": (0.4, 0.4, 0.4, 0.4), "random_grayscale": 0.2}
    outputs = trained(coordinates(32, 32), 20, resize=(32, 32), size=(32, 32), **options)
    assert different(outputs) == 20
    assert {output.shape for output in outputs} == {(32, 32, 3)}


# Compared with torchvision.

STRONG = {"scale": (0.2, 1.0), "ratio": (0.5, 2.0), "colorjitter": (0.8, 0.8, 0.8, 0.4), "random_grayscale": 0.3}


def by_torchvision(augmentation: Augmentation, image: np.ndarray, random_numbers: np.ndarray) -> torch.Tensor:
    """The same augmentation by torchvision's functions on a float tensor, with our random parameters."""
    out = torch.from_numpy(image).permute(2, 0, 1).float() / 255
    assert augmentation.jitter
    box = augmentation.boxes(*image.shape[:2], random_numbers[None])[0].tolist()
    out = F.resized_crop(out, *box, size=list(augmentation.size), antialias=True)
    values, order = jitter_of(augmentation.jitter, random_numbers[None])
    steps = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
    for kind in order[0].tolist():
        out = steps[kind](out, values[0, kind].item())
    if random_numbers[30] < augmentation.grey:
        out = F.rgb_to_grayscale(out, 3)
    if augmentation.flip and random_numbers[31] < 0.5:
        out = F.hflip(out)
    return F.normalize(out, augmentation.means, augmentation.stds)


@pytest.mark.parametrize(("height", "width", "size"), [(32, 32, 32), (20, 45, (24, 18)), (64, 50, 16), (8, 8, 8)])
@pytest.mark.parametrize("smooth", [True, False])
def test_same_parameters_give_the_images_of_torchvision(height: int, width: int, size: Any, smooth: bool) -> None:
    """Far below 2/255: both compute in float32, in different orders."""
    rng = np.random.default_rng(height)
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    if smooth:
        image = coordinates(height, width)
    means, stds = (0.4, 0.5, 0.6), (0.5, 0.25, 1.0)
    options = options_of(resize=64, size=size, random_horizontal_flip=True, **STRONG)
    augmentation, random_numbers = for_training(options, means, stds), rng.random((200, NUM_RANDOM))
    for ours, numbers in zip(made_of(augmentation, image, random_numbers, False), random_numbers, strict=True):
        torch.testing.assert_close(ours, by_torchvision(augmentation, image, numbers), atol=1e-4, rtol=0)
    uncoloured = replace(augmentation, jitter=None)  # jitter would enlarge the rounding error of a worker
    batch, worker = (made_of(uncoloured, image, random_numbers, by_worker) for by_worker in (False, True))
    rounded_twice = 1.01 / 255 / torch.tensor(stds)[:, None, None]  # Pillow resizes to 8 bits across, then down
    assert ((batch - worker).abs() <= rounded_twice).all()


def is_equal(ours: np.ndarray, theirs: np.ndarray) -> bool:
    """Whether two samples are likely from one distribution (one false alarm in ten thousand)."""
    return bool(ks_2samp(ours, theirs, method="asymp").pvalue > 1e-4)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (40, 25), (30, 48), (10, 60), (60, 10)])
def test_crops_are_distributed_as_those_of_torchvision(height: int, width: int) -> None:
    augmentation = for_training(options_of(scale=(0.2, 1.0)), *PLAIN)
    ours = augmentation.boxes(height, width, np.random.default_rng(0).random((10_000, NUM_RANDOM)))
    torch.manual_seed(0)
    image = torch.zeros(3, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(10_000)])
    for column in range(4):
        assert is_equal(ours[:, column], theirs[:, column])
    assert is_equal(ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3])
    assert is_equal(ours[:, 3] / ours[:, 2], theirs[:, 3] / theirs[:, 2])
    fallback = RandomResizedCrop.get_params(image, [50.0, 50.0], [3 / 4, 4 / 3])  # an area that never fits
    assert augmentation._fallback(height, width) == fallback
    shares = [(boxes == np.array(fallback)).all(axis=1).mean() for boxes in (ours, theirs)]
    assert abs(shares[0] - shares[1]) < 0.03


def test_jitter_is_distributed_as_that_of_torchvision() -> None:
    ours, order = jitter_of((0.4, 0.3, 1.5, 0.1), np.random.default_rng(1).random((10_000, NUM_RANDOM)))
    torch.manual_seed(1)
    ranges = ([0.6, 1.4], [0.7, 1.3], [0.0, 2.5], [-0.1, 0.1])
    drawn = [ColorJitter.get_params(*ranges) for _ in range(10_000)]  # type: ignore[arg-type]
    for kind in range(4):
        assert is_equal(ours[:, kind], np.array([factors[kind + 1] for factors in drawn]))
    counts = np.unique(order, axis=0, return_counts=True)[1]
    assert len(counts) == 24 and chisquare(counts).pvalue > 1e-4


# Values.


@pytest.mark.parametrize("make", [for_training, for_testing])
@pytest.mark.parametrize("by_worker", [False, True])
def test_values_are_normalised_by_the_means_and_deviations(make: Any, by_worker: bool) -> None:
    means, stds = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
    output = made_of(make(options_of(), means, stds), flat(255, 0, 102), np.zeros((1, NUM_RANDOM)), by_worker)[0]
    assert output.shape == (3, 16, 16)
    for channel, value in enumerate((1.0, 0.0, 0.4)):
        expected = (value - means[channel]) / stds[channel]
        np.testing.assert_allclose(output[channel].numpy(), expected, rtol=1e-5)


# The test transform.


def test_test_transform_is_the_centre_crop() -> None:
    options = options_of(
        size=8, scale=(0.2, 0.5), colorjitter=(0.4, 0.4, 0.4, 0.4), random_grayscale=1, random_horizontal_flip=True
    )
    for random_numbers in (np.zeros((3, NUM_RANDOM)), np.full((3, NUM_RANDOM), 0.999)):
        for by_worker in (False, True):
            for output in made_of(for_testing(options, *PLAIN), coordinates(16, 16), random_numbers, by_worker):
                assert window(pixels(output)) == (4, 4)


def striped() -> np.ndarray:
    """Twice as wide as high: a quarter white, half black, a quarter white."""
    image = np.full((16, 32, 3), 255, dtype=np.uint8)
    image[:, 8:24] = 0
    return image


def test_one_number_resizes_the_shorter_edge() -> None:
    output = pixels(for_the_test(striped(), resize=8, size=8))
    assert output[:, 1:7].max() == 0  # the black half; the white parts are cropped off


def test_two_numbers_resize_to_height_and_width() -> None:
    output = pixels(for_the_test(striped(), resize=(8, 8), size=8))
    assert output[:, 0].min() == 255
    assert output[:, 7].min() == 255
    assert output[:, 3:5].max() == 0


def test_training_and_test_images_are_resized_equally() -> None:
    output = trained(striped(), 1, resize=(8, 8), size=8)[0]
    np.testing.assert_array_equal(output, pixels(for_the_test(striped(), resize=(8, 8), size=8)))


@pytest.mark.parametrize("make", [for_training, for_testing])
@pytest.mark.parametrize("scale", [None, (0.2, 1)])
@pytest.mark.parametrize("size", [16, (8, 12)])
def test_empty_batch_stays_empty(make: Any, scale: Any, size: Any) -> None:
    """A rank can have no image of a small last batch."""
    augmentation = make(options_of(scale=scale, size=size, colorjitter=(0.4,) * 4, random_grayscale=0.2), *PLAIN)
    none = torch.empty(0, 32, 32, 3, dtype=torch.uint8)
    assert augmentation(none, np.empty((0, NUM_RANDOM))).shape == (0, 3, *augmentation.size)
    cropped = torch.empty(0, *augmentation.size, 3, dtype=torch.uint8)
    assert augmentation.augment_on_device(cropped, np.empty((0, NUM_RANDOM))).shape == (0, 3, *augmentation.size)


def test_input_image_is_unchanged() -> None:
    image = coordinates(16, 16)
    trained(image, 3, colorjitter=(0.4, 0.4, 0.4, 0.4), random_horizontal_flip=True)
    np.testing.assert_array_equal(image, coordinates(16, 16))
