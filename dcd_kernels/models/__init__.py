# SPDX-License-Identifier: BSD-3-Clause
"""Networks of the paper, with DCD layers where the paper has them, and what a network costs."""

from dcd_kernels.models import released
from dcd_kernels.models.counting import Complexity, LayerCount, complexity
from dcd_kernels.models.mobilenet_v2 import MobileNetV2, mobilenet_v2
from dcd_kernels.models.resnet import ResNet, resnet10, resnet18, resnet34, resnet50

__all__ = [
    "Complexity",
    "LayerCount",
    "MobileNetV2",
    "ResNet",
    "complexity",
    "mobilenet_v2",
    "released",
    "resnet10",
    "resnet18",
    "resnet34",
    "resnet50",
]
