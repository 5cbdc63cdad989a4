# SPDX-License-Identifier: BSD-3-Clause
"""Layers: dynamic convolutions and linear layers, the branch that computes λ and Φ, and ``convert``."""

from dcd_kernels.nn.branch import DynamicBranch
from dcd_kernels.nn.conv import DCDConv1d, DCDConv2d, DCDConv3d
from dcd_kernels.nn.convert import convert
from dcd_kernels.nn.linear import DCDLinear

__all__ = ["DCDConv1d", "DCDConv2d", "DCDConv3d", "DCDLinear", "DynamicBranch", "convert"]
