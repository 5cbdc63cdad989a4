# SPDX-License-Identifier: BSD-3-Clause
"""Networks of the paper, with DCD layers where the paper has them."""

from dcd_kernels.models.mobilenet_v2 import MobileNetV2, mobilenet_v2

__all__ = ["MobileNetV2", "mobilenet_v2"]
