"""ResNets for ImageNet-sized images: torchvision's, with a unit-length embedding instead of class scores.

He et al., "Deep Residual Learning for Image Recognition", 2016, as implemented in torchvision: a 7x7 stem with
stride 2, max pooling, then four stages of blocks; a bottleneck has its stride on the 3x3 convolution. Parameter
names are torchvision's, so that its weights can be loaded: conv1, bn1, layer1..layer4 with blocks of conv1, bn1,
conv2, bn2, (conv3, bn3,) downsample.0, downsample.1, then fc, the embedding layer, whose shape differs.

Notation: B batch size, H x W pixels (224 x 224 in the paper; at least 1 x 1), D embedding size.
"""

from __future__ import annotations

from functools import partial

import torch
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from models.head import Normalize

Block = type[BasicBlock] | type[Bottleneck]


class ImageNetResNet(ResNet):  # type: ignore[misc]  # torchvision ships no types
    """torchvision's ResNet with unit-length embeddings.

    Args:
        block: ``BasicBlock`` or ``Bottleneck``.
        depths: blocks in each of the four stages.
        low_dim: D, the size of the embedding.
    """

    def __init__(self, block: Block, depths: tuple[int, ...], *, low_dim: int) -> None:
        super().__init__(block, list(depths), num_classes=low_dim)
        self.l2norm = Normalize()

    def stages(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """The output of each stage by name; sizes are rounded up.

        Args:
            x: images (B, 3, H, W).

        Returns:
            ``conv1`` (the stem: conv1, bn1 and ReLU, before max pooling) to ``conv5`` (layer4): maps
            (B, channels, h, w), none negative; ``fc``: embeddings (B, D).
        """
        maps = {"conv1": self.relu(self.bn1(self.conv1(x)))}  # (B, 64, H/2, W/2)
        maps["conv2"] = self.layer1(self.maxpool(maps["conv1"]))  # (B, 64 e, H/4, W/4), e the block's expansion
        maps["conv3"] = self.layer2(maps["conv2"])  # (B, 128 e, H/8, W/8)
        maps["conv4"] = self.layer3(maps["conv3"])  # (B, 256 e, H/16, W/16)
        maps["conv5"] = self.layer4(maps["conv4"])  # (B, 512 e, H/32, W/32)
        pooled = self.avgpool(maps["conv5"]).flatten(1)  # (B, 512 e)
        maps["fc"] = self.l2norm(self.fc(pooled))  # (B, D)
        return maps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) -> unit-length embeddings (B, D)."""
        return self.stages(x)["fc"]


resnet18 = partial(ImageNetResNet, BasicBlock, (2, 2, 2, 2))
resnet34 = partial(ImageNetResNet, BasicBlock, (3, 4, 6, 3))
resnet50 = partial(ImageNetResNet, Bottleneck, (3, 4, 6, 3))
resnet101 = partial(ImageNetResNet, Bottleneck, (3, 4, 23, 3))
resnet152 = partial(ImageNetResNet, Bottleneck, (3, 8, 36, 3))
