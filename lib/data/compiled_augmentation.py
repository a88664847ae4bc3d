"""The training transform as one function of tensors, for ``torch.compile``.

``Augmentation`` applies each adjustment only to the images that need it. Their number varies, but compiled code has
fixed shapes. Here each adjustment runs on all images, with weights that leave the others unchanged. That is more
arithmetic in far fewer kernels.

Letters: B batch size, H x W input size, h x w output size, P = h w pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import torch

from lib.data.augmentation import GREY, HUE, SECTORS, Augmentation, luma, mix, mixing_weights, shift_hue, to_device
from lib.data.loader import mark_batch_size_dynamic

UNCHANGED = np.array([1.0, 0.0, 0.0])
"""Weights of colour, mean grey and grey that leave an image unchanged."""


@dataclass(frozen=True)
class CompiledAugmentation(Augmentation):
    """``Augmentation``, compiled once for all batch sizes. Results differ by rounding."""

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, random_numbers: np.ndarray) -> torch.Tensor:
        """As ``Augmentation``: uint8 (B, H, W, 3) -> float32 (B, 3, h, w)."""
        windows, is_identity = self._windows(images.shape[1], images.shape[2], random_numbers)  # (B, 2, 4)
        if is_identity and not self.scale:
            return self.augment_on_device(images, random_numbers)
        return self._run(images, windows.reshape(-1, 8), random_numbers)

    @torch.no_grad()
    def augment_on_device(self, images: torch.Tensor, random_numbers: np.ndarray) -> torch.Tensor:
        """As ``Augmentation``: uint8 (B, h, w, 3) -> float32 (B, 3, h, w)."""
        return self._run(images, np.zeros((len(random_numbers), 0)), random_numbers)

    def _run(self, images: torch.Tensor, windows: np.ndarray, random_numbers: np.ndarray) -> torch.Tensor:
        flipped, grey = self._flipped(random_numbers), random_numbers[:, GREY] < self.grey
        columns = [windows, flipped[:, None], grey[:, None], *self._jitter_columns(random_numbers)]
        numbers = to_device(np.concatenate(columns, axis=1), images)
        return _compiled()(self, mark_batch_size_dynamic(images), mark_batch_size_dynamic(numbers))

    def _jitter_columns(self, random_numbers: np.ndarray) -> list[np.ndarray]:
        """(B, 1) of the hue shift and (B, 18) of the weights of six mixes; none without colour jitter."""
        if not self.jitter:
            return []
        mixed, hue, before_hue = mixing_weights(self.jitter, random_numbers)
        is_before = (np.arange(3) < before_hue[:, None])[:, :, None]  # (B, 3, 1)
        both = [np.where(is_before, mixed, UNCHANGED), np.where(is_before, UNCHANGED, mixed)]
        return [hue, np.concatenate(both, axis=1).reshape(-1, 18)]


@cache
def _compiled() -> Callable[[CompiledAugmentation, torch.Tensor, torch.Tensor], torch.Tensor]:
    return torch.compile(_augment, fullgraph=True)


def _augment(transform: CompiledAugmentation, images: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """The work on the device.

    Args:
        transform: its options are constants in the compiled code.
        images: uint8 (B, H, W, 3).
        numbers: (B, C), concatenated by ``CompiledAugmentation._run``.

    Returns:
        float32 (B, 3, h, w), normalised.
    """
    constant = partial(torch.tensor, device=images.device)  # becomes part of the compiled code
    jitters = 1 + 9 * 2 if transform.jitter else 0
    if numbers.shape[1] > 2 + jitters:  # with windows
        images, numbers = transform._sample(images, numbers[:, :9], flips=transform.flip), numbers[:, 8:]
    else:
        images = images.permute(0, 3, 1, 2).float() / 255
        images = torch.where(numbers[:, 0, None, None, None] > 0, images.flip(3), images)
    shape, images = images.shape, images.flatten(2)  # (B, 3, P)
    if transform.jitter:
        hue, weights = numbers[:, 2:3], numbers[:, 3:].unflatten(1, (6, 3))
        for number in range(3):
            images = mix(images, weights[:, number])
        if transform.jitter[HUE]:
            images = shift_hue(images, hue, constant(SECTORS))
        for number in range(3, 6):
            images = mix(images, weights[:, number])
    images = torch.where(numbers[:, 1, None, None] > 0, luma(images), images)
    images = (images - constant(transform.means)[:, None]) / constant(transform.stds)[:, None]
    return images.view(shape).contiguous(memory_format=transform.layout)
