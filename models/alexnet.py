"""AlexNet for images of 224 pixels and of 32 pixels.

Krizhevsky et al., "ImageNet Classification with Deep Convolutional Neural Networks", 2012. The paper (Huang
et al. 2019) does not specify the variant. The choices here:

- **Filters**: 64, 192, 384, 256, 256, without groups, as in Krizhevsky, "One weird trick for parallelizing
  convolutional neural networks", 2014, and in torchvision: the 2012 version split its layers only to fit two
  GPUs. The numbers are the same for both image sizes, so that their results are comparable.
- **Batch normalisation** after each convolution and hidden layer, instead of local response normalisation.
  Without it, the initial embeddings of different images are almost parallel: their mean cosine over 32 smooth
  synthetic images is 0.997, and with it 0.33 (32 pixels) and 0.25 (224). Training without it was not tried.
- **No dropout**, as batch normalisation already regularises.
- **32 pixels**: the first convolution is 5x5 with stride 1. With 11x11 and stride 4, the map would be 7x7, too
  small for three poolings. Pooling reduces 32 to 15, 7 and 3, so the hidden layers see 3x3 positions, not 6x6.

The rest is torchvision's: kernels 5, 3, 3, 3 after the first, 3x3 max pooling of stride 2 after convolutions 1,
2 and 5, two hidden layers of 4096.

Letters: B batch, H x W pixels, D embedding.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from models.head import Normalize


def _convolution(inputs: int, outputs: int, kernel: int, *, stride: int = 1, padding: int) -> list[nn.Module]:
    """Convolution, batch normalisation and ReLU. No bias: the normalisation would cancel it."""
    convolution = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=padding, bias=False)
    return [convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]


def _hidden(inputs: int, outputs: int) -> list[nn.Module]:
    """Linear layer, batch normalisation and ReLU. No bias: the normalisation would cancel it."""
    return [nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs), nn.ReLU(inplace=True)]


class AlexNet(nn.Module):
    """An AlexNet that maps images to unit-length embeddings.

    ``features`` holds the convolutions, ``classifier`` the hidden layers and the linear layer to the embedding.
    In training mode a batch needs at least two images, for batch normalisation of the hidden layers.

    Args:
        kernel: kernel size of the first convolution.
        stride: its stride.
        grid: edge of the map before the hidden layers; other sizes are average-pooled to it.
        low_dim: D, the size of the embedding.
    """

    def __init__(self, *, kernel: int, stride: int, grid: int, low_dim: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *_convolution(3, 64, kernel, stride=stride, padding=2),
            nn.MaxPool2d(3, stride=2),
            *_convolution(64, 192, 5, padding=2),
            nn.MaxPool2d(3, stride=2),
            *_convolution(192, 384, 3, padding=1),
            *_convolution(384, 256, 3, padding=1),
            *_convolution(256, 256, 3, padding=1),
            nn.MaxPool2d(3, stride=2),
        )
        self.avgpool = nn.AdaptiveAvgPool2d(grid)
        self.classifier = nn.Sequential(
            *_hidden(256 * grid * grid, 4096), *_hidden(4096, 4096), nn.Linear(4096, low_dim)
        )
        self.l2norm = Normalize()

    def stages(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """The output of each stage by name.

        The maps are taken after the ReLU of each convolution and before pooling, as in the linear probes of Zhang
        et al., "Split-Brain Autoencoders", 2017.

        Args:
            x: images (B, 3, H, W) of at least the size given at ``alexnet`` and ``alexnet_small``.

        Returns:
            ``conv1`` to ``conv5``: maps (B, channels, h, w) of 64, 192, 384, 256 and 256 channels, none
            negative; h = w = 55, 27, 13, 13, 13 for 224 pixels and 32, 15, 7, 7, 7 for 32; ``fc``:
            embeddings (B, D).
        """
        maps: dict[str, torch.Tensor] = {}
        for layer in self.features:
            x = layer(x)
            if isinstance(layer, nn.ReLU):  # one per convolution
                maps[f"conv{len(maps) + 1}"] = x
        pooled = self.avgpool(x).flatten(1)  # (B, 256 grid^2)
        maps["fc"] = self.l2norm(self.classifier(pooled))  # (B, D)
        return maps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) -> unit-length embeddings (B, D)."""
        return self.stages(x)["fc"]


alexnet = partial(AlexNet, kernel=11, stride=4, grid=6)  # for 224 x 224 pixels; at least 63 x 63
alexnet_small = partial(AlexNet, kernel=5, stride=1, grid=3)  # for 32 x 32 pixels; at least 15 x 15
