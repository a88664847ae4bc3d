"""ResNets for small images: a 3x3 stem without pooling, then four stages of blocks.

He et al., "Deep Residual Learning for Image Recognition", 2016, with the usual stem for 32x32 pixels. Parameter
names are the reference's, so that checkpoints can be exchanged in both directions: conv1, bn1,
layer1..layer4 with blocks of conv1, bn1, conv2, bn2, (conv3, bn3,) shortcut.0, shortcut.1, then linear.

Narrow variants, such as ``resnet10-w16``, are for CPUs and quick trials. They have 16 channels in the stem instead
of 64, and 16, 32, 64, 128 in the stages instead of 64, 128, 256, 512. Parameter names are the same.

Notation: B batch size, H x W pixels, D embedding size.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from models.head import Normalize


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """The identity, or a 1x1 projection where the shape changes."""
    if stride == 1 and inputs == outputs:
        return nn.Sequential()
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a residual connection."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = _shortcut(inputs, width, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, inputs, H, W) -> (B, width, H / stride, W / stride)."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions with a residual connection; the output is four times as wide."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = self.expansion * width
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.shortcut = _shortcut(inputs, outputs, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, inputs, H, W) -> (B, 4 width, H / stride, W / stride)."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return F.relu(out + self.shortcut(x))


Block = type[BasicBlock] | type[Bottleneck]


class SmallResNet(nn.Module):
    """A ResNet that maps small images to unit-length embeddings.

    The reference pools 4x4 windows, which requires 32x32 pixels. Global pooling gives the same result for that size,
    and supports any other one.

    Args:
        block: ``BasicBlock`` or ``Bottleneck``.
        depths: blocks in each of the four stages.
        low_dim: D, the size of the embedding.
        width: channels of the stem and of the first stage; each later stage has twice as many.
    """

    def __init__(self, block: Block, depths: tuple[int, ...], *, low_dim: int, width: int = 64) -> None:
        super().__init__()
        self._inputs = width
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = self._stage(block, width, depths[0], stride=1)
        self.layer2 = self._stage(block, 2 * width, depths[1], stride=2)
        self.layer3 = self._stage(block, 4 * width, depths[2], stride=2)
        self.layer4 = self._stage(block, 8 * width, depths[3], stride=2)
        self.linear = nn.Linear(8 * width * block.expansion, low_dim)
        self.l2norm = Normalize()

    def _stage(self, block: Block, width: int, depth: int, *, stride: int) -> nn.Sequential:
        blocks = []
        for number in range(depth):
            blocks.append(block(self._inputs, width, stride if number == 0 else 1))
            self._inputs = width * block.expansion
        return nn.Sequential(*blocks)

    def stages(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """The output of each stage by name.

        Args:
            x: images (B, 3, H, W).

        Returns:
            ``conv1`` (the stem) to ``conv5`` (layer4): maps (B, channels, h, w); ``fc``: embeddings (B, D).
        """
        maps = {"conv1": F.relu(self.bn1(self.conv1(x)))}  # (B, 64, H, W), 64 or a narrow variant's width
        maps["conv2"] = self.layer1(maps["conv1"])  # (B, 64 e, H, W), e the block's expansion
        maps["conv3"] = self.layer2(maps["conv2"])  # (B, 128 e, H/2, W/2)
        maps["conv4"] = self.layer3(maps["conv3"])  # (B, 256 e, H/4, W/4)
        maps["conv5"] = self.layer4(maps["conv4"])  # (B, 512 e, H/8, W/8)
        pooled = F.adaptive_avg_pool2d(maps["conv5"], 1).flatten(1)  # (B, 512 e)
        maps["fc"] = self.l2norm(self.linear(pooled))  # (B, D)
        return maps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) -> unit-length embeddings (B, D)."""
        return self.stages(x)["fc"]


resnet10 = partial(SmallResNet, BasicBlock, (1, 1, 1, 1))
resnet18 = partial(SmallResNet, BasicBlock, (2, 2, 2, 2))
resnet34 = partial(SmallResNet, BasicBlock, (3, 4, 6, 3))
resnet50 = partial(SmallResNet, Bottleneck, (3, 4, 6, 3))
resnet101 = partial(SmallResNet, Bottleneck, (3, 4, 23, 3))
resnet152 = partial(SmallResNet, Bottleneck, (3, 8, 36, 3))
