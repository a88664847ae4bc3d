"""Batched augmentation on the device of the network.

The transforms are those of the reference: torchvision's random resized crop, colour jitter in random order, greyscale,
horizontal flip and normalisation. They run on whole batches, with random parameters for each image. For the same
parameters the result equals torchvision's on float tensors; unlike Pillow's, it is not rounded to 8 bits between steps,
and the hue is not quantised.

Letters: B batch size, H x W input size, h x w output size, P = h w pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image

from lib.config.options import Options, height_and_width

Colour = tuple[float, float, float]

NUM_RANDOM = 32
"""Random numbers per image, uniform in [0, 1). The augmentation of an image is a function of these alone."""
TRIES = 10
"""Random crops that are tried before the central fallback crop, as in torchvision."""
SIDES, PLACE, FACTORS, ORDER = slice(0, 2 * TRIES), slice(20, 22), slice(22, 26), slice(26, 30)
GREY, FLIP = 30, 31
"""Which random numbers are used for each step."""
LUMA = (0.2989, 0.587, 0.114)
"""Weights of red, green and blue in greyscale, as in torchvision."""
SECTORS = (5 / 6 + 1, 3 / 6 + 1, 1 / 6 + 1)
"""n / 6 + 1 of red, green and blue in ``shift_hue``."""
CONTRAST, SATURATION, HUE = 1, 2, 3  # adjustments in torchvision's order; 0 is brightness


@dataclass(frozen=True)
class Augmentation:
    """The transform of a split.

    Attributes:
        resize: length of the shorter edge, or (height, width), before the crop; unused with ``scale``.
        size: (h, w) of the output.
        means, stds: normalisation per channel, for RGB in [0, 1].
        scale: range of the area fraction of random resized crops; None: resize, then crop to ``size``.
        ratio: range of the aspect ratio (width / height) of random resized crops.
        jitter: strengths of brightness, contrast, saturation and hue; None: no colour jitter.
        grey: probability of conversion to greyscale.
        flip: whether images are flipped horizontally with probability 0.5.
        centred: whether the crop is central, for testing, or random.
        layout: memory format of the output.
    """

    resize: int | tuple[int, int]
    size: tuple[int, int]
    means: Colour
    stds: Colour
    scale: tuple[float, float] | None = None
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    jitter: tuple[float, float, float, float] | None = None
    grey: float = 0.0
    flip: bool = False
    centred: bool = False
    layout: torch.memory_format = torch.channels_last

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, random_numbers: np.ndarray) -> torch.Tensor:
        """Crops, resizes, applies colour jitter and normalises.

        Args:
            images: uint8 (B, H, W, 3), RGB.
            random_numbers: (B, ``NUM_RANDOM``), uniform in [0, 1).

        Returns:
            float32 (B, 3, h, w), normalised.
        """
        return self._adjust_colours(self._resample(images, random_numbers), random_numbers)

    def to_size(self, size: tuple[int, int]) -> Augmentation:
        """The same transform to another size (h, w)."""
        return self if size == self.size else replace(self, size=size)

    def crop_on_worker(self, image: np.ndarray, random_numbers: np.ndarray) -> np.ndarray:
        """Crops and resizes one image of any size with Pillow, in a loader worker.

        Args:
            image: uint8 (H, W, 3).
            random_numbers: (``NUM_RANDOM``,), uniform in [0, 1).

        Returns:
            uint8 (h, w, 3), the input of ``augment_on_device``.
        """
        picture, (height, width) = Image.fromarray(image), self.size
        if self.scale:
            top, left, rows, columns = self.boxes(image.shape[0], image.shape[1], random_numbers[None])[0].tolist()
            crop = picture.crop((left, top, left + columns, top + rows))
            return np.asarray(crop.resize((width, height), Image.Resampling.BILINEAR))
        rows, columns = resized_sides(image.shape[0], image.shape[1], self.resize)
        picture = picture.resize((columns, rows), Image.Resampling.BILINEAR)
        if self.centred:
            top, left = (
                round((rows - height) / 2),
                round((columns - width) / 2),
            )  # rounds halves to even, as torchvision
        else:
            top, left = self._corners(rows, columns, random_numbers[None])[0].tolist()
        return np.asarray(picture.crop((left, top, left + width, top + height)))

    @torch.no_grad()
    def augment_on_device(self, images: torch.Tensor, random_numbers: np.ndarray) -> torch.Tensor:
        """The steps after ``crop_on_worker``: uint8 (B, h, w, 3) -> float32 (B, 3, h, w)."""
        images = images.permute(0, 3, 1, 2).float().div_(255).contiguous()
        flipped = to_device(np.nonzero(self._flipped(random_numbers))[0], images)
        if len(flipped):
            images[flipped] = images[flipped].flip(3)
        return self._adjust_colours(images, random_numbers)

    def boxes(self, height: int, width: int, random_numbers: np.ndarray) -> np.ndarray:
        """Random resized crops of images (height, width): (B, 4) of top, left, height and width.

        As torchvision's ``RandomResizedCrop``: the first of ten boxes of random area and aspect ratio that fits,
        otherwise the largest central box with an allowed aspect ratio.
        """
        assert self.scale
        area_fraction, log_ratio = random_numbers[:, SIDES].reshape(-1, TRIES, 2).transpose(2, 0, 1)  # (B, 10) each
        area = height * width * _between(area_fraction, *self.scale)
        ratio = np.exp(_between(log_ratio, *np.log(self.ratio)))
        widths, heights = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
        fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
        first, rows = fits.argmax(axis=1), np.arange(len(random_numbers))
        sides = np.stack([heights[rows, first], widths[rows, first]], axis=1)  # (B, 2)
        corners = np.floor(random_numbers[:, PLACE] * (np.array([height, width]) - sides + 1))
        boxes = np.concatenate([corners, sides], axis=1)
        boxes[~fits[rows, first]] = self._fallback(height, width)
        return boxes.astype(np.int64)

    def _fallback(self, height: int, width: int) -> tuple[int, int, int, int]:
        narrow, wide = min(self.ratio), max(self.ratio)
        rows, columns = height, width
        if width / height < narrow:
            rows = round(width / narrow)
        elif width / height > wide:
            columns = round(height * wide)
        return (height - rows) // 2, (width - columns) // 2, rows, columns

    def _corners(self, height: int, width: int, random_numbers: np.ndarray) -> np.ndarray:
        """Random top and left (B, 2) of crops of ``size`` from images (height, width).

        Raises:
            ValueError: the images are smaller than the crop.
        """
        room = np.array([height - self.size[0], width - self.size[1]])
        if (room < 0).any():
            raise ValueError(
                f"images of {height}x{width} pixels are smaller than the crop of {self.size[0]}x{self.size[1]}"
            )
        corners: np.ndarray = np.floor(random_numbers[:, PLACE] * (room + 1)).astype(np.int64)
        return corners

    def _resample(self, images: torch.Tensor, random_numbers: np.ndarray) -> torch.Tensor:
        """Crops, resizes and flips by two matrix products: uint8 (B, H, W, 3) -> float32 (B, 3, h, w) in [0, 1]."""
        batch, height, width, _ = images.shape
        windows, is_identity = self._windows(height, width, random_numbers)  # (B, 2, 4)
        flipped = self._flipped(random_numbers)
        if is_identity and not flipped.any():
            return images.permute(0, 3, 1, 2).float().div_(255).contiguous()
        numbers = to_device(np.concatenate([windows.reshape(batch, 8), flipped[:, None]], axis=1), images)
        return self._sample(images, numbers, flips=bool(flipped.any()))

    def _sample(self, images: torch.Tensor, numbers: torch.Tensor, *, flips: bool) -> torch.Tensor:
        """The two products of ``_resample``: ``numbers`` (B, 9) are the windows and, where ``flips``, the flips."""
        batch, height, width, _ = images.shape
        if height == width and self.size[0] == self.size[1]:  # half of the operations
            both = _weights(numbers[:, :8].reshape(2 * batch, 4), height, self.size[0])
            down, across = both.view(batch, 2, self.size[0], height).unbind(1)
        else:
            down = _weights(numbers[:, :4], height, self.size[0])  # (B, h, H)
            across = _weights(numbers[:, 4:8], width, self.size[1])  # (B, w, W)
        down = down / 255  # not in place: for a view of varying size torch.compile would fix the size
        if flips:
            across = torch.where(numbers[:, 8, None, None] > 0, across.flip(1), across)
        rows = torch.bmm(down, images.float().reshape(batch, height, width * 3))  # (B, h, W * 3)
        rows = rows.view(batch, self.size[0], width, 3).permute(0, 3, 1, 2)  # (B, 3, h, W)
        rows = rows.reshape(batch, 3 * self.size[0], width)  # no -1: the local batch may be empty
        return torch.bmm(rows, across.transpose(1, 2)).view(batch, 3, *self.size)

    def _flipped(self, random_numbers: np.ndarray) -> np.ndarray:
        """Mask (B,) of the images to flip."""
        return np.asarray(random_numbers[:, FLIP] < 0.5) if self.flip else np.zeros(len(random_numbers), bool)

    def _windows(self, height: int, width: int, random_numbers: np.ndarray) -> tuple[np.ndarray, bool]:
        """The source window of each image per axis, in input pixels.

        Returns:
            (B, 2, 4): for height and width the start and length of the window, and the bounds (first, end) of the
            pixels that may be sampled; whether crop and resize are the identity for all images.
        """
        if self.scale:
            boxes = self.boxes(height, width, random_numbers).astype(float)
            starts, lengths = boxes[:, :2], boxes[:, 2:]
            is_identity = self.size == (height, width) and bool((lengths == (height, width)).all())
            return np.stack([starts, lengths, starts, starts + lengths], axis=2), is_identity
        sides = np.array([height, width])
        resized = np.array(resized_sides(height, width, self.resize))
        if self.centred:
            middle = np.rint((resized - self.size) / 2)  # rounds halves to even, as torchvision
            corners = np.broadcast_to(middle, (len(random_numbers), 2))
        else:
            corners = self._corners(int(resized[0]), int(resized[1]), random_numbers)
        starts = corners * sides / resized
        lengths = np.broadcast_to(np.array(self.size) * sides / resized, starts.shape)
        ends = np.broadcast_to(sides.astype(float), starts.shape)
        is_identity = self.size == (height, width) and bool((resized == sides).all())
        return np.stack([starts, lengths, np.zeros_like(starts), ends], axis=2), is_identity

    def _adjust_colours(self, images: torch.Tensor, random_numbers: np.ndarray) -> torch.Tensor:
        """Colour jitter, greyscale and normalisation of float32 (B, 3, h, w) in [0, 1]."""
        shape, images = images.shape, images.flatten(2)  # (B, 3, P)
        if self.jitter:
            images = jitter(images, self.jitter, random_numbers)
        if self.grey:
            chosen = to_device(np.nonzero(random_numbers[:, GREY] < self.grey)[0], images)
            images[chosen] = luma(images[chosen]).expand(-1, 3, -1)
        means, stds = to_device(np.array([self.means, self.stds]), images)[:, :, None]  # (3, 1) each
        images = images.sub_(means).div_(stds)
        return images.view(shape).contiguous(memory_format=self.layout)


def _between(fraction: np.ndarray, low: float, high: float) -> np.ndarray:
    return low + fraction * (high - low)


def resized_sides(height: int, width: int, resize: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width after torchvision's ``Resize``."""
    if isinstance(resize, tuple):
        return resize
    short, long = min(height, width), max(height, width)
    longer = int(resize * long / short)
    return (resize, longer) if height <= width else (longer, resize)


def _weights(windows: torch.Tensor, pixels: int, out: int) -> torch.Tensor:
    """Interpolation weights along one axis: bilinear, with antialiasing when downscaling.

    Args:
        windows: (B, 4) of start and length in input pixels, and the bounds (first, end) of the pixels to sample.
        pixels: input size of the axis.
        out: output size of the axis.

    Returns:
        (B, out, pixels); each row sums to 1.
    """
    start, length, low, high = (windows[:, i, None, None] for i in range(4))
    at_out = torch.arange(out, device=windows.device)[:, None] + 0.5
    at_in = torch.arange(pixels, device=windows.device) + 0.5
    scale = length / out  # (B, 1, 1)
    allowed = torch.minimum(at_in - low, high - at_in).add_(0.5).clamp_(0, 1)  # (B, 1, pixels), 1 or 0
    weights = (at_in - (start + at_out * scale)).abs_()  # (B, out, pixels), distance between pixel centres
    weights.div_(-scale.clamp(min=1)).add_(1).clamp_(min=0).mul_(allowed)
    return weights.div_(weights.sum(dim=2, keepdim=True))


def luma(images: torch.Tensor) -> torch.Tensor:
    """Greyscale (B, 1, P) of RGB (B, 3, P)."""
    red, green, blue = images.unbind(1)
    return (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])[:, None]


def jitter_of(
    strengths: tuple[float, float, float, float], random_numbers: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Random parameters of the colour jitter.

    Args:
        strengths: s of brightness, contrast, saturation and hue.
        random_numbers: (B, ``NUM_RANDOM``), uniform in [0, 1).

    Returns:
        (B, 4) factors of brightness, contrast and saturation, uniform in [max(0, 1 - s), 1 + s], and the hue shift,
        uniform in [-s, s]; (B, 4) the order of the four adjustments, a uniform permutation.
    """
    low = np.array([max(0.0, 1 - s) for s in strengths[:HUE]] + [-strengths[HUE]])
    high = np.array([1 + s for s in strengths[:HUE]] + [strengths[HUE]])
    return low + random_numbers[:, FACTORS] * (high - low), random_numbers[:, ORDER].argsort(axis=1)


def mixing_weights(
    strengths: tuple[float, float, float, float], random_numbers: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The colour jitter as weights of ``mix``.

    Brightness, contrast and saturation follow one formula: clamp(f * colour + (1 - f) * other, 0, 1), where other is
    black, the mean grey of the image, or the grey of the pixel.

    Args:
        strengths: s of brightness, contrast, saturation and hue.
        random_numbers: (B, ``NUM_RANDOM``), uniform in [0, 1).

    Returns:
        (B, 3, 3) for each of these three adjustments, in the order of application, the weights of colour, mean grey
        and grey; (B, 1) the hue shift; (B,) the number q of the three that come before it.
    """
    values, order = jitter_of(strengths, random_numbers)
    kind = order[order != HUE].reshape(len(order), 3)  # (B, 3), in the order of application
    factor = np.take_along_axis(values, kind, axis=1)
    mixed = np.stack([factor, (1 - factor) * (kind == CONTRAST), (1 - factor) * (kind == SATURATION)], axis=2)
    return mixed, values[:, HUE:], (order == HUE).argmax(axis=1)


def jitter(
    images: torch.Tensor, strengths: tuple[float, float, float, float], random_numbers: np.ndarray
) -> torch.Tensor:
    """Adjusts brightness, contrast, saturation and hue in a random order per image, as torchvision's ``ColorJitter``.

    The images are sorted by the number q of adjustments that come before the hue shift. So each adjustment runs on
    consecutive images, and the hue shift on all of them at once: few operations, which a GPU at small images needs.

    Args:
        images: RGB (B, 3, P) in [0, 1].
        strengths: s of brightness, contrast, saturation and hue.
        random_numbers: (B, ``NUM_RANDOM``), uniform in [0, 1).

    Returns:
        (B, 3, P); ``images`` is not changed.
    """
    mixed, hue, before_hue = mixing_weights(strengths, random_numbers)
    by_q = before_hue.argsort(kind="stable")
    first_with = np.searchsorted(before_hue[by_q], np.arange(4))  # the first image with q or more
    numbers = to_device(np.concatenate([mixed.reshape(-1, 9), hue], axis=1)[by_q], images)
    images = images[to_device(by_q, images)]
    for number in range(3):
        mix(images[first_with[number + 1] :], numbers[first_with[number + 1] :, 3 * number : 3 * number + 3])
    if strengths[HUE]:
        images = shift_hue(images, numbers[:, 9:], to_device(np.array(SECTORS), images))
    for number in range(3):
        mix(images[: first_with[number + 1]], numbers[: first_with[number + 1], 3 * number : 3 * number + 3])
    return images[to_device(by_q.argsort(), images)]


def mix(images: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Images (b, 3, P) weighted with their mean grey and grey: weights (b, 3) of the three; in place."""
    if not len(images):
        return images
    own, of_mean, of_grey = weights[:, :, None, None].unbind(1)  # (b, 1, 1)
    grey = luma(images)  # (b, 1, P)
    mean = grey.mean(dim=2, keepdim=True)
    return images.mul_(own).add_(grey.mul_(of_grey).add_(mean.mul_(of_mean))).clamp_(0, 1)


def to_device(numbers: np.ndarray, like: torch.Tensor) -> torch.Tensor:
    """Copies an array to the device of ``like`` without blocking; floating-point numbers become float32."""
    tensor = torch.from_numpy(numbers)
    return (tensor.float() if tensor.is_floating_point() else tensor).to(like.device, non_blocking=True)


def shift_hue(images: torch.Tensor, shifts: torch.Tensor, sectors: torch.Tensor) -> torch.Tensor:
    """Shifts the hue of RGB (B, 3, P) in [0, 1] in HSV space by ``shifts`` (B, 1), in fractions of the hue circle.

    With the hue h in sixths of the circle, a channel is v - c * clamp(min(k, 4 - k), 0, 1), k = (n + h) mod 6 and
    n = 5, 3, 1 for red, green, blue (value v, chroma c):
    https://en.wikipedia.org/wiki/HSL_and_HSV, "HSV to RGB alternative". ``sectors`` (3,) is ``SECTORS`` on the device.
    """
    red, green, blue = images.unbind(1)
    value = images.amax(dim=1)  # (B, P)
    chroma = value - images.amin(dim=1)
    not_red, not_green = (value - red).sign_(), (value - green).sign_()  # 0 or 1: as torch.where, but faster
    hue = torch.lerp((blue - red).add_(chroma, alpha=2), (red - green).add_(chroma, alpha=4), not_green)
    hue = torch.lerp(green - blue, hue, not_red).div_(chroma.clamp(min=1e-12))  # arbitrary if the chroma is 0
    hue.div_(6).add_(shifts)
    sector = hue[:, None] + sectors[:, None]  # (B, 3, P), k / 6, all positive
    sector.frac_().sub_(1 / 3).abs_().mul_(-6).add_(2).clamp_(0, 1)
    return torch.addcmul(value[:, None], chroma[:, None], sector, value=-1)


def for_training(options: Options, means: Colour, stds: Colour) -> Augmentation:
    """The training transform of the options."""
    return Augmentation(
        resize=options.resize,
        size=height_and_width(options.size),
        means=means,
        stds=stds,
        scale=options.scale,
        ratio=options.ratio or (3 / 4, 4 / 3),
        jitter=options.colorjitter,
        grey=options.random_grayscale,
        flip=options.random_horizontal_flip,
    )


def for_testing(options: Options, means: Colour, stds: Colour) -> Augmentation:
    """The test transform of the options: resize, then central crop."""
    return Augmentation(options.resize, height_and_width(options.size), means, stds, centred=True)
