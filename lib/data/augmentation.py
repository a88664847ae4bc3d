"""Images to tensors, a batch at a time, on the device the network is on.

What the reference's transforms do to a Pillow image (torchvision's random resized crop, colour jitter in a random
order, greyscale, flip, normalisation) is done here to a whole batch, each image with numbers of its own. Given
the same parameters it is what torchvision does to a float tensor: nothing is rounded to 8 bits in between, as
Pillow does, and hues are turned exactly.

Letters: B batch, H, W of the images as they come, h, w that the network sees, P = h * w pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from lib.config.options import Options, height_and_width

Colour = tuple[float, float, float]

NUM_RANDOM = 32
"""Uniform numbers in [0, 1) that an image takes: what becomes of it is a function of these alone."""
TRIES = 10
"""Crops that are tried before torchvision's fallback."""
SIDES, PLACE, FACTORS, ORDER = slice(0, 2 * TRIES), slice(20, 22), slice(22, 26), slice(26, 30)
GREY, FLIP = 30, 31
LUMA = (0.2989, 0.587, 0.114)
"""Weights of red, green and blue in grey, torchvision's."""
CONTRAST, SATURATION, HUE = 1, 2, 3  # and 0 is brightness: kinds of jitter, in torchvision's order


@dataclass(frozen=True)
class Augmentation:
    """What is done to the images of a split.

    Attributes:
        resize: one number: the shorter edge; two: height and width.
        size: (h, w).
        scale: area share of random resized crops; None: resize, then a crop of the size.
        ratio: width to height of random resized crops.
        jitter: strengths of brightness, contrast, saturation and hue; None: none.
        grey: probability of turning grey.
        flip: half of the images are mirrored.
        centred: the crop is in the middle, for testing; otherwise anywhere.
        means, stds: of the normalisation, for RGB in [0, 1].
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

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, random_numbers: np.ndarray) -> torch.Tensor:
        """Crops, resizes, changes the colours and normalises.

        Args:
            images: uint8 (B, H, W, 3), RGB.
            draws: (B, ``DRAWS``) numbers, uniform in [0, 1).

        Returns:
            float32 (B, 3, h, w), channels-last.
        """
        return self._colour(self._resample(images, random_numbers), random_numbers)

    def crop_on_worker(self, image: np.ndarray, random_numbers: np.ndarray) -> np.ndarray:
        """The crop of one image of any size, resized by Pillow: what a worker does to a photograph.

        Args:
            image: uint8 (H, W, 3).
            draws: (``DRAWS``,).

        Returns:
            uint8 (h, w, 3), for ``finish``.
        """
        picture, (height, width) = Image.fromarray(image), self.size
        if self.scale:
            top, left, rows, columns = self.boxes(image.shape[0], image.shape[1], random_numbers[None])[0].tolist()
            crop = picture.crop((left, top, left + columns, top + rows))
            return np.asarray(crop.resize((width, height), Image.Resampling.BILINEAR))
        rows, columns = resized_sides(image.shape[0], image.shape[1], self.resize)
        picture = picture.resize((columns, rows), Image.Resampling.BILINEAR)
        if self.centred:
            top, left = round((rows - height) / 2), round((columns - width) / 2)  # halves to even, as torchvision
        else:
            top, left = self._corners(rows, columns, random_numbers[None])[0].tolist()
        return np.asarray(picture.crop((left, top, left + width, top + height)))

    @torch.no_grad()
    def augment_on_device(self, images: torch.Tensor, random_numbers: np.ndarray) -> torch.Tensor:
        """What is left to do after ``cut``: uint8 (B, h, w, 3) -> float32 (B, 3, h, w), channels-last."""
        images = images.permute(0, 3, 1, 2).float().div_(255).contiguous()
        mirrored = to_device(np.nonzero(self._mirrored(random_numbers))[0], images)
        if len(mirrored):
            images[mirrored] = images[mirrored].flip(3)
        return self._colour(images, random_numbers)

    def boxes(self, height: int, width: int, random_numbers: np.ndarray) -> np.ndarray:
        """Random resized crops of images (height, width): (B, 4) of top, left, height and width.

        As torchvision's ``RandomResizedCrop``: the first of ten rectangles of random area and ratio that fits, or
        else the greatest in the middle whose ratio is allowed.
        """
        assert self.scale
        share, log_ratio = random_numbers[:, SIDES].reshape(-1, TRIES, 2).transpose(2, 0, 1)  # (B, 10) each
        area = height * width * _between(share, *self.scale)
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
        """Top and left (B, 2) of crops of the size from images (height, width)."""
        room = np.array([height - self.size[0], width - self.size[1]])
        if (room < 0).any():
            raise ValueError(f"images of {height}x{width} pixels have no crop of {self.size[0]}x{self.size[1]}")
        corners: np.ndarray = np.floor(random_numbers[:, PLACE] * (room + 1)).astype(np.int64)
        return corners

    def _resample(self, images: torch.Tensor, random_numbers: np.ndarray) -> torch.Tensor:
        """Crop and resize as two products with weights: uint8 (B, H, W, 3) -> float32 (B, 3, h, w) in [0, 1]."""
        batch, height, width, _ = images.shape
        windows, whole = self._windows(height, width, random_numbers)  # (B, 2, 4)
        mirrored = self._mirrored(random_numbers)
        if whole and not mirrored.any():
            return images.permute(0, 3, 1, 2).float().div_(255).contiguous()
        numbers = to_device(np.concatenate([windows.reshape(batch, 8), mirrored[:, None]], axis=1), images)
        down = _weights(numbers[:, :4], height, self.size[0]).div_(255)  # (B, h, H)
        across = _weights(numbers[:, 4:8], width, self.size[1])  # (B, w, W)
        if mirrored.any():
            across = torch.where(numbers[:, 8, None, None] > 0, across.flip(1), across)
        rows = torch.bmm(down, images.float().reshape(batch, height, width * 3))  # (B, h, W * 3)
        rows = rows.view(batch, self.size[0], width, 3).permute(0, 3, 1, 2)  # (B, 3, h, W)
        rows = rows.reshape(batch, 3 * self.size[0], width)  # no -1: a process may have no images of a batch
        return torch.bmm(rows, across.transpose(1, 2)).view(batch, 3, *self.size)

    def _mirrored(self, random_numbers: np.ndarray) -> np.ndarray:
        """(B,) of bool."""
        return np.asarray(random_numbers[:, FLIP] < 0.5) if self.flip else np.zeros(len(random_numbers), bool)

    def _windows(self, height: int, width: int, random_numbers: np.ndarray) -> tuple[np.ndarray, bool]:
        """What becomes the output, vertically and horizontally: (B, 2, 4) of start, length, and the first and last
        pixel that may be used; and whether every image is used whole, as it is.
        """
        if self.scale:
            boxes = self.boxes(height, width, random_numbers).astype(float)
            starts, lengths = boxes[:, :2], boxes[:, 2:]
            whole = self.size == (height, width) and bool((lengths == (height, width)).all())
            return np.stack([starts, lengths, starts, starts + lengths], axis=2), whole
        sides = np.array([height, width])
        resized = np.array(resized_sides(height, width, self.resize))
        if self.centred:
            middle = np.rint((resized - self.size) / 2)  # torchvision rounds halves to even, as Python does
            corners = np.broadcast_to(middle, (len(random_numbers), 2))
        else:
            corners = self._corners(int(resized[0]), int(resized[1]), random_numbers)
        starts = corners * sides / resized
        lengths = np.broadcast_to(np.array(self.size) * sides / resized, starts.shape)
        ends = np.broadcast_to(sides.astype(float), starts.shape)
        whole = self.size == (height, width) and bool((resized == sides).all())
        return np.stack([starts, lengths, np.zeros_like(starts), ends], axis=2), whole

    def _colour(self, images: torch.Tensor, random_numbers: np.ndarray) -> torch.Tensor:
        """Colour jitter, greyscale and normalisation of float32 (B, 3, h, w) in [0, 1]; channels-last."""
        shape, images = images.shape, images.flatten(2)  # (B, 3, P)
        if self.jitter:
            images = jitter(images, self.jitter, random_numbers)
        if self.grey:
            chosen = to_device(np.nonzero(random_numbers[:, GREY] < self.grey)[0], images)
            images[chosen] = luma(images[chosen]).expand(-1, 3, -1)
        means, stds = to_device(np.array([self.means, self.stds]), images)[:, :, None]  # (3, 1) each
        images = images.sub_(means).div_(stds)
        return images.view(shape).contiguous(memory_format=torch.channels_last)


def _between(share: np.ndarray, low: float, high: float) -> np.ndarray:
    return low + share * (high - low)


def resized_sides(height: int, width: int, resize: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width after torchvision's ``Resize``."""
    if isinstance(resize, tuple):
        return resize
    short, long = min(height, width), max(height, width)
    longer = int(resize * long / short)
    return (resize, longer) if height <= width else (longer, resize)


def _weights(windows: torch.Tensor, pixels: int, out: int) -> torch.Tensor:
    """What each of ``pixels`` in a row counts in each of ``out``: bilinear, and antialiased where it gets smaller.

    Args:
        windows: (B, 4) of start and length in pixels, and the first pixel that may be used and the first that may not.

    Returns:
        (B, out, pixels), rows of sum 1.
    """
    start, length, low, high = (windows[:, i, None, None] for i in range(4))
    at_out = torch.arange(out, device=windows.device)[:, None] + 0.5
    at_in = torch.arange(pixels, device=windows.device) + 0.5
    scale = length / out  # (B, 1, 1)
    allowed = torch.minimum(at_in - low, high - at_in).add_(0.5).clamp_(0, 1)  # (B, 1, pixels), 1 or 0
    weights = (at_in - (start + at_out * scale)).abs_()  # (B, out, pixels), the distance of the centres
    weights.div_(-scale.clamp(min=1)).add_(1).clamp_(min=0).mul_(allowed)
    return weights.div_(weights.sum(dim=2, keepdim=True))


def luma(images: torch.Tensor) -> torch.Tensor:
    """Grey (B, 1, P) of RGB (B, 3, P)."""
    red, green, blue = images.unbind(1)
    return (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])[:, None]


def jitter_of(
    strengths: tuple[float, float, float, float], random_numbers: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """What the jitter does to each image.

    Returns:
        (B, 4) factors of brightness, contrast and saturation, uniform in [max(0, 1 - s), 1 + s], and the turn of the
        hue in [-s, s]; (B, 4) which of these is done first, second, third and last, every order alike.
    """
    low = np.array([max(0.0, 1 - s) for s in strengths[:HUE]] + [-strengths[HUE]])
    high = np.array([1 + s for s in strengths[:HUE]] + [strengths[HUE]])
    return low + random_numbers[:, FACTORS] * (high - low), random_numbers[:, ORDER].argsort(axis=1)


def jitter(
    images: torch.Tensor, strengths: tuple[float, float, float, float], random_numbers: np.ndarray
) -> torch.Tensor:
    """Brightness, contrast, saturation and hue, for each image in an order of its own, as torchvision's ColorJitter.

    Brightness, contrast and saturation are one formula: a colour becomes f * colour + (1 - f) * other, cut to
    [0, 1], where other is black, the mean grey of the image, or the colour's own grey. So a step is the same few
    operations for all images, but for those whose hue it is the turn of.

    Args:
        images: RGB (B, 3, P) in [0, 1]; changed in place.
        strengths: s of brightness, contrast, saturation and hue.
        draws: (B, ``DRAWS``).
    """
    values, order = jitter_of(strengths, random_numbers)
    factor = np.where(order == HUE, 1, np.take_along_axis(values, order, axis=1))
    mixed = np.stack([factor, (1 - factor) * (order == CONTRAST), (1 - factor) * (order == SATURATION)])  # (3, B, 4)
    numbers = to_device(
        np.concatenate([mixed.transpose(1, 2, 0).reshape(len(random_numbers), 12), values[:, HUE:]], axis=1), images
    )
    when = (order == HUE).argmax(axis=1)  # (B,), the step of the hue
    places = to_device(when.argsort(kind="stable"), images)
    ends = np.searchsorted(np.sort(when), np.arange(5))
    for step in range(4):
        factors, mean_share, own_share = numbers[:, 3 * step : 3 * step + 3, None, None].unbind(1)  # (B, 1, 1)
        grey = luma(images)  # (B, 1, P)
        mean = grey.mean(dim=2, keepdim=True)
        images.mul_(factors).add_(grey.mul_(own_share).add_(mean.mul_(mean_share))).clamp_(0, 1)
        turned = places[ends[step] : ends[step + 1]]
        if strengths[HUE] and len(turned):
            images[turned] = turn_hue(images[turned], numbers[turned, 12:])
    return images


def to_device(numbers: np.ndarray, like: torch.Tensor) -> torch.Tensor:
    """On the device of ``like``, floating-point numbers as float32; the host does not wait."""
    tensor = torch.from_numpy(numbers)
    return (tensor.float() if tensor.is_floating_point() else tensor).to(like.device, non_blocking=True)


def turn_hue(images: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """Turns the hue of RGB (B, 3, P) in [0, 1] in HSV, by ``turns`` (B, 1) of the circle.

    With the hue h in sixths a channel is v - c * clamp(min(k, 4 - k), 0, 1), k = (n + h) mod 6 and n = 5, 3, 1 for
    red, green, blue (value v, chroma c): https://en.wikipedia.org/wiki/HSL_and_HSV, "HSV to RGB alternative".
    """
    red, green, blue = images.unbind(1)
    value = images.amax(dim=1)  # (B, P)
    chroma = value - images.amin(dim=1)
    not_red, not_green = (value - red).sign_(), (value - green).sign_()  # 0 or 1: branches of ``where``, but faster
    hue = torch.lerp((blue - red).add_(chroma, alpha=2), (red - green).add_(chroma, alpha=4), not_green)
    hue = torch.lerp(green - blue, hue, not_red).div_(chroma.clamp(min=1e-12))  # without chroma it does not matter
    hue.div_(6).add_(turns)
    share = hue[:, None] + hue.new_tensor([[5 / 6 + 1], [3 / 6 + 1], [1 / 6 + 1]])  # (B, 3, P), k / 6, all positive
    share.frac_().sub_(1 / 3).abs_().mul_(-6).add_(2).clamp_(0, 1)
    return torch.addcmul(value[:, None], chroma[:, None], share, value=-1)


def for_training(options: Options, means: Colour, stds: Colour) -> Augmentation:
    """What the options say of the training images."""
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
    """Resize, then the centre crop."""
    return Augmentation(options.resize, height_and_width(options.size), means, stds, centred=True)
