"""What each transform option does to an image, seen from the pixels that come out."""

from __future__ import annotations

import colorsys
from typing import Any

import numpy as np
import pytest
import torch

from lib.augment import test_transform as fixed_transform
from lib.augment import training_transform
from lib.options import Options

PLAIN = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
"""Means and deviations that change nothing, so that the output times 255 is pixels."""


def options_of(**options: Any) -> Options:
    return Options(**{"resize": 16, "size": 16, **options})


def coordinates(height: int, width: int) -> np.ndarray:
    """Red tells the row, green the column, blue both."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows * 2, columns * 2, 255 - rows - columns], axis=2).astype(np.uint8)


def flat(*colour: int) -> np.ndarray:
    return np.full((16, 16, 3), colour, dtype=np.uint8)


def pixels(output: torch.Tensor) -> np.ndarray:
    """(3, h, w) in [0, 1] -> (h, w, 3) in 0..255."""
    return (output.permute(1, 2, 0).double().numpy() * 255).round().astype(int)


def trained(image: np.ndarray, times: int = 30, **options: Any) -> list[np.ndarray]:
    """The pixels that a training transform makes of an image, for ``times`` seeds."""
    transform = training_transform(options_of(**options), *PLAIN)
    outputs = []
    for seed in range(times):
        torch.manual_seed(seed)
        outputs.append(pixels(transform(image)))
    return outputs


def different(outputs: list[np.ndarray]) -> int:
    return len({output.tobytes() for output in outputs})


def window(output: np.ndarray) -> tuple[int, int]:
    """Top left corner of the cut-out of ``coordinates`` that this is; fails if it is none."""
    top, left = int(output[0, 0, 0]) // 2, int(output[0, 0, 1]) // 2
    height, width, _ = output.shape
    np.testing.assert_array_equal(output, coordinates(80, 80)[top : top + height, left : left + width])
    return top, left


# Crops.


def test_without_scale_the_crop_is_a_window_of_the_resized_image() -> None:
    corners = {window(output) for output in trained(coordinates(16, 16), 200, size=12)}
    assert {top for top, _ in corners} == {0, 1, 2, 3, 4}
    assert {left for _, left in corners} == {0, 1, 2, 3, 4}


def test_a_crop_of_the_whole_image_changes_nothing() -> None:
    for output in trained(coordinates(16, 16), 3):
        np.testing.assert_array_equal(output, coordinates(16, 16))


def test_scale_is_the_share_of_the_area() -> None:
    outputs = trained(coordinates(80, 80), 60, size=40, resize=80, scale=(0.25, 0.25), ratio=(1, 1))
    corners = {window(output) for output in outputs}  # half the edge: cut out, and not resized
    assert len(corners) > 40
    assert min(min(corner) for corner in corners) < 10
    assert max(max(corner) for corner in corners) > 30


def test_a_scale_of_one_is_the_whole_image() -> None:
    for output in trained(coordinates(16, 16), 3, scale=(1, 1), ratio=(1, 1)):
        np.testing.assert_array_equal(output, coordinates(16, 16))


def test_ratio_is_width_to_height() -> None:
    outputs = trained(coordinates(80, 80), 20, resize=80, size=(20, 80), scale=(0.25, 0.25), ratio=(4, 4))
    corners = {window(output) for output in outputs}
    assert {left for _, left in corners} == {0}
    assert len(corners) > 5


def test_scales_are_drawn_from_all_of_the_range() -> None:
    """How much of the rows a crop spans, from red; the blur of the resizing costs a pixel or so."""
    outputs = trained(coordinates(80, 80), 150, resize=80, size=16, scale=(0.2, 1), ratio=(1, 1))
    spans = [(np.ptp(output[:, :, 0]) / 2 + 80 / 16) / 80 for output in outputs]
    assert min(spans) < 0.2**0.5 + 0.06
    assert min(spans) > 0.2**0.5 - 0.06
    assert max(spans) > 0.94


@pytest.mark.parametrize(
    ("size", "shape"), [(8, (8, 8)), ((8, 8), (8, 8)), ((6, 12), (6, 12)), ("(12, 6)", (12, 6)), ([6, 8], (6, 8))]
)
@pytest.mark.parametrize("scale", [None, (0.5, 1.0)])
def test_a_size_is_a_square_or_height_and_width(size: Any, shape: tuple[int, int], scale: Any) -> None:
    options = options_of(size=size, scale=scale)
    for transform in (training_transform(options, *PLAIN), fixed_transform(options, *PLAIN)):
        output = transform(coordinates(20, 24))
        assert output.shape == (3, *shape)
        assert output.dtype == torch.float32


# Colours.


def test_without_options_colours_and_sides_stay() -> None:
    for output in trained(coordinates(16, 16), 5, colorjitter=None, random_grayscale=0, random_horizontal_flip=False):
        np.testing.assert_array_equal(output, coordinates(16, 16))


def test_the_first_jitter_is_brightness() -> None:
    outputs = trained(flat(100, 60, 20), 60, colorjitter=(0.4, 0, 0, 0))
    factors = [output[0, 0, 0] / 100 for output in outputs]
    assert min(factors) >= 0.6
    assert max(factors) <= 1.4
    assert max(factors) - min(factors) > 0.6
    for factor, output in zip(factors, outputs, strict=True):
        np.testing.assert_allclose(
            output, np.broadcast_to([100 * factor, 60 * factor, 20 * factor], (16, 16, 3)), atol=2
        )


def test_the_second_jitter_is_contrast() -> None:
    image = flat(80, 80, 80)
    image[:8] = 160  # mean 120
    outputs = trained(image, 60, colorjitter=(0, 0.5, 0, 0))
    spreads = [(int(output[0, 0, 0]) - int(output[15, 0, 0])) / 80 for output in outputs]
    assert min(spreads) >= 0.5 - 0.02
    assert max(spreads) <= 1.5 + 0.02
    assert max(spreads) - min(spreads) > 0.7
    for output in outputs:
        assert output.mean() == pytest.approx(120, abs=1.5)


def test_the_third_jitter_is_saturation() -> None:
    outputs = trained(flat(160, 120, 80), 60, colorjitter=(0, 0, 0.5, 0))
    spreads = [(int(output[0, 0, 0]) - int(output[0, 0, 2])) / 80 for output in outputs]
    assert min(spreads) >= 0.5 - 0.03
    assert max(spreads) <= 1.5 + 0.03
    assert max(spreads) - min(spreads) > 0.7
    assert different(trained(flat(90, 90, 90), 20, colorjitter=(0, 0, 0.5, 0))) == 1  # grey has none


def test_the_fourth_jitter_is_hue() -> None:
    turns = []
    for output in trained(flat(255, 0, 0), 60, colorjitter=(0, 0, 0, 0.25)):
        hue, saturation, value = colorsys.rgb_to_hsv(*(output[0, 0] / 255))
        assert saturation > 0.97
        assert value > 0.99
        turns.append(hue if hue < 0.5 else hue - 1)  # red is 0, of one turn
    assert min(turns) < -0.15
    assert max(turns) > 0.15
    assert max(map(abs, turns)) < 0.27


def test_greyscale_for_certain_gives_equal_channels_of_the_lightness() -> None:
    for output in trained(flat(200, 100, 50), 5, random_grayscale=1):
        np.testing.assert_array_equal(output[:, :, 0], output[:, :, 1])
        np.testing.assert_array_equal(output[:, :, 0], output[:, :, 2])
        assert output[0, 0, 0] == pytest.approx(0.299 * 200 + 0.587 * 100 + 0.114 * 50, abs=1)


def test_grey_images_are_normalised_channel_by_channel() -> None:
    means, stds = (0.4, 0.5, 0.6), (0.1, 0.2, 0.25)
    output = training_transform(options_of(random_grayscale=1), means, stds)(coordinates(16, 16)).double()
    grey = output * torch.tensor(stds)[:, None, None] + torch.tensor(means)[:, None, None]
    torch.testing.assert_close(grey[0], grey[1], atol=1e-6, rtol=0)
    torch.testing.assert_close(grey[0], grey[2], atol=1e-6, rtol=0)
    assert not torch.allclose(output[0], output[1])


def test_greyscale_now_and_then_is_as_frequent_as_it_says() -> None:
    outputs = trained(flat(200, 100, 50), 500, random_grayscale=0.2)
    grey = sum(len(set(output[0, 0].tolist())) == 1 for output in outputs)
    assert abs(grey - 100) < 5 * (500 * 0.2 * 0.8) ** 0.5
    assert different(outputs) == 2


def test_a_flip_mirrors_about_half_of_the_images() -> None:
    image = coordinates(16, 16)
    outputs = trained(image, 400, random_horizontal_flip=True)
    mirrored = sum(np.array_equal(output, image[:, ::-1]) for output in outputs)
    kept = sum(np.array_equal(output, image) for output in outputs)
    assert mirrored + kept == 400
    assert abs(mirrored - 200) < 5 * 400**0.5 / 2


def test_the_papers_options_work_together() -> None:
    options = {"scale": (0.2, 1.0), "colorjitter": (0.4, 0.4, 0.4, 0.4), "random_grayscale": 0.2}
    outputs = trained(coordinates(32, 32), 20, resize=(32, 32), size=(32, 32), **options)
    assert different(outputs) == 20
    assert {output.shape for output in outputs} == {(32, 32, 3)}


# Values.


@pytest.mark.parametrize("make", [training_transform, fixed_transform])
def test_values_are_normalised_by_the_means_and_deviations(make: Any) -> None:
    means, stds = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
    output = make(options_of(), means, stds)(flat(255, 0, 102))
    assert output.shape == (3, 16, 16)
    for channel, value in enumerate((1.0, 0.0, 0.4)):
        expected = (value - means[channel]) / stds[channel]
        np.testing.assert_allclose(output[channel].numpy(), expected, rtol=1e-5)


def test_the_same_seed_draws_the_same_training_image() -> None:
    options = {"scale": (0.2, 1.0), "colorjitter": (0.4, 0.4, 0.4, 0.4), "random_horizontal_flip": True}
    first, second = (trained(coordinates(32, 32), 5, **options) for _ in range(2))
    np.testing.assert_array_equal(first, second)


# The test transform.


def test_the_test_transform_is_always_the_same_and_draws_nothing() -> None:
    options = options_of(
        size=8, scale=(0.2, 0.5), colorjitter=(0.4, 0.4, 0.4, 0.4), random_grayscale=1, random_horizontal_flip=True
    )
    transform = fixed_transform(options, *PLAIN)
    before = torch.get_rng_state()
    first = transform(coordinates(16, 16))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(transform(coordinates(16, 16)), first)
    assert window(pixels(first)) == (4, 4)


def striped() -> np.ndarray:
    """Twice as wide as high: a quarter white, half black, a quarter white."""
    image = np.full((16, 32, 3), 255, dtype=np.uint8)
    image[:, 8:24] = 0
    return image


def test_one_number_resizes_the_shorter_edge_and_keeps_the_shape() -> None:
    output = pixels(fixed_transform(options_of(resize=8, size=8), *PLAIN)(striped()))
    assert output[:, 1:7].max() == 0  # the black half, and no more than a blur of the white


def test_two_numbers_resize_to_height_and_width() -> None:
    output = pixels(fixed_transform(options_of(resize=(8, 8), size=8), *PLAIN)(striped()))
    assert output[:, 0].min() == 255
    assert output[:, 7].min() == 255
    assert output[:, 3:5].max() == 0


def test_the_training_image_is_resized_as_the_test_image_is() -> None:
    output = trained(striped(), 1, resize=(8, 8), size=8)[0]
    np.testing.assert_array_equal(output, pixels(fixed_transform(options_of(resize=(8, 8), size=8), *PLAIN)(striped())))


def test_the_image_itself_stays_as_it_was() -> None:
    image = coordinates(16, 16)
    trained(image, 3, colorjitter=(0.4, 0.4, 0.4, 0.4), random_horizontal_flip=True)
    np.testing.assert_array_equal(image, coordinates(16, 16))
