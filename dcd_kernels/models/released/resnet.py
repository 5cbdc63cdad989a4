# SPDX-License-Identifier: BSD-3-Clause
"""ResNet (He et al., 2016) as in the released code of the DCD paper."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dcd_kernels.models.common import check_network
from dcd_kernels.models.released.common import initialise, make_classifier
from dcd_kernels.models.released.layers import BasicConv, BottleneckConv
from dcd_kernels.models.resnet import STAGE_CHANNELS, BasicBlock, Bottleneck, Convolutions


class _BasicConvolutions(Convolutions):
    def dynamic(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> nn.Module:
        assert kernel_size == 3  # all of a basic block are
        return BasicConv(in_channels, out_channels, stride, **self.factory)


class _BottleneckConvolutions(Convolutions):
    def dynamic(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> nn.Module:
        return BottleneckConv(in_channels, out_channels, kernel_size, stride, **self.factory)


class ReleasedResNet(nn.Module):
    """ResNet in the released form; options as of :func:`resnet18`."""

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: Sequence[int],
        num_classes: int = 1000,
        *,
        dynamic: bool = True,
        dropout: float | None = None,
        in_channels: int = 3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_network("resnet", num_classes, in_channels)
        factory = {"device": device, "dtype": dtype}
        made = _BasicConvolutions if block is BasicBlock else _BottleneckConvolutions
        make = (made if dynamic else Convolutions)(factory)
        width = STAGE_CHANNELS[0]
        self.conv1 = nn.Conv2d(in_channels, width, 7, 2, 3, bias=False, **factory)
        self.bn1 = make.norm(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        stages = []
        for depth, channels in zip(depths, STAGE_CHANNELS, strict=True):
            members = []
            for index in range(depth):
                stride = 2 if stages and index == 0 else 1
                members.append(block(width, channels, stride, make))
                width = channels * block.expansion
            stages.append(nn.Sequential(*members))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.classifier = make_classifier(width, num_classes, dynamic, dropout, factory)
        blocks = [block for stage in stages for block in stage]
        initialise(self, last=[block.last for block in blocks], scale=len(blocks) ** -0.5)

    def forward(self, input: Tensor) -> Tensor:
        output = self.maxpool(self.relu(self.bn1(self.conv1(input))))
        output = self.layer4(self.layer3(self.layer2(self.layer1(output))))
        return self.classifier(output.mean((2, 3)))


def resnet10(num_classes: int = 1000, **options) -> ReleasedResNet:
    """ResNet-10, one basic block a stage, in the released form; options as of :func:`resnet18`.

    The released code has no such network: these are its layers in the network of the paper's Table 4b.
    """
    return ReleasedResNet(BasicBlock, (1, 1, 1, 1), num_classes, **options)


def resnet18(num_classes: int = 1000, **options) -> ReleasedResNet:
    """ResNet-18 as in the released code, whose checkpoints load by their keys; random weights.

    Dynamic are the 3×3 convolutions of the blocks and the classifier; static the stem and the shortcuts. In
    plain PyTorch, in a dozen passes a layer; ``dcd_kernels.models.resnet18`` is the paper's form on the fused
    kernels.

    Args:
        num_classes: outputs of the classifier.
        dynamic: False gives the static twin, plain convolutions and a plain linear layer in the same places.
        dropout: before the classifier, by default none, and 0.1 in ResNet-50. None leaves the module out, so
            that the classifier's keys start with ``classifier.0`` and not with ``classifier.1``; a checkpoint
            decides it.
        in_channels: of the image.
        device, dtype: of the parameters.

    Shapes:
        (N, in_channels, H, W) → (N, num_classes); the released code takes 224 × 224 alone.

    Raises:
        ValueError: ``num_classes`` or ``in_channels`` below 1.

    Source: paper, Sections 5.1 and 5.3; names and sizes of the released code.
    """
    return ReleasedResNet(BasicBlock, (2, 2, 2, 2), num_classes, **options)


def resnet34(num_classes: int = 1000, **options) -> ReleasedResNet:
    """ResNet-34 in the released form; options as of :func:`resnet18`."""
    return ReleasedResNet(BasicBlock, (3, 4, 6, 3), num_classes, **options)


def resnet50(num_classes: int = 1000, *, dropout: float | None = 0.1, **options) -> ReleasedResNet:
    """ResNet-50 in the released form; options as of :func:`resnet18`.

    Dynamic are all three convolutions of a bottleneck, whose stride is in the 3×3 one.
    """
    return ReleasedResNet(Bottleneck, (3, 4, 6, 3), num_classes, dropout=dropout, **options)
