# SPDX-License-Identifier: BSD-3-Clause
"""Fused kernels for dynamic convolution decomposition (DCD, ICLR 2021).

Per sample, ``W(x) = Λ(x) W0 + P Φ(x) Qᵀ`` is applied as a pointwise, depthwise or k×k convolution, forward
and backward, without a weight per sample ever being allocated.
"""

from importlib import metadata

from . import extension, models, nn, reference
from .backends.selection import use_backend
from .explain import explain
from .functional import dcd_apply, dcd_conv1d, dcd_conv2d, dcd_conv3d, dcd_linear, latent_moments
from .inference import optimize_for_inference
from .interop import accelerate, report, restore
from .nn import convert
from .packing import PackedWeight, pack_weight

try:
    __version__ = metadata.version("dcd-kernels")
except metadata.PackageNotFoundError:  # a checkout on the path that was never installed
    __version__ = "0+uninstalled"

__all__ = [
    "PackedWeight",
    "accelerate",
    "convert",
    "dcd_apply",
    "dcd_conv1d",
    "dcd_conv2d",
    "dcd_conv3d",
    "dcd_linear",
    "explain",
    "extension",
    "latent_moments",
    "models",
    "nn",
    "optimize_for_inference",
    "pack_weight",
    "reference",
    "report",
    "restore",
    "use_backend",
]
