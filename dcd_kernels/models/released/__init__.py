# SPDX-License-Identifier: BSD-3-Clause
"""The paper's networks in the form of the released code, whose checkpoints they load; in plain PyTorch."""

from dcd_kernels.models.released.checkpoint import load_checkpoint
from dcd_kernels.models.released.layers import (
    BasicConv,
    BottleneckConv,
    Classifier,
    PointwiseConv,
    ReleasedLayer,
)
from dcd_kernels.models.released.mobilenet_v2 import ReleasedMobileNetV2, mobilenet_v2
from dcd_kernels.models.released.resnet import ReleasedResNet, resnet10, resnet18, resnet34, resnet50

__all__ = [
    "BasicConv",
    "BottleneckConv",
    "Classifier",
    "PointwiseConv",
    "ReleasedLayer",
    "ReleasedMobileNetV2",
    "ReleasedResNet",
    "load_checkpoint",
    "mobilenet_v2",
    "resnet10",
    "resnet18",
    "resnet34",
    "resnet50",
]
