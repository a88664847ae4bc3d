"""Images to tensors: random for training, fixed for testing. Layer 2.

torchvision's transforms on Pillow images, as in the reference, so that the distribution of the training
images is the published one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision import transforms

from lib.options import Options

Transform = Callable[[np.ndarray], torch.Tensor]
"""uint8 (H, W, 3) -> normalised float32 (3, h, w)."""

Colour = tuple[float, float, float]


def training_transform(options: Options, means: Colour, stds: Colour) -> Transform:
    """Random crop, flip, colour jitter and greyscale as the options say; draws from PyTorch's generator."""
    steps: list[Any] = []
    if options.scale is None:
        steps += [transforms.Resize(options.resize), transforms.RandomCrop(options.size)]
    else:
        steps.append(transforms.RandomResizedCrop(options.size, scale=options.scale, ratio=options.ratio))
    if options.colorjitter is not None:
        steps.append(transforms.ColorJitter(*options.colorjitter))
    if options.random_grayscale:
        steps.append(transforms.RandomGrayscale(options.random_grayscale))
    if options.random_horizontal_flip:
        steps.append(transforms.RandomHorizontalFlip())
    return _to_tensor(steps, means, stds)


def test_transform(options: Options, means: Colour, stds: Colour) -> Transform:
    """Resize, then the centre crop."""
    return _to_tensor([transforms.Resize(options.resize), transforms.CenterCrop(options.size)], means, stds)


def _to_tensor(steps: list[Any], means: Colour, stds: Colour) -> Transform:
    ends = [transforms.ToTensor(), transforms.Normalize(means, stds)]
    transform: Transform = transforms.Compose([transforms.Lambda(Image.fromarray), *steps, *ends])
    return transform
