# SPDX-License-Identifier: BSD-3-Clause
"""The CUDA C++ kernels: the depthwise convolution, which forms the weights of each sample on chip."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .. import extension
from ..geometry import Geometry

NAME = "cuda"
NOTES: dict[torch.dtype, str] = {}
MINIMUM_CAPABILITY = (8, 0)
KERNEL_SIZES = (3, 5, 7)
# csrc/cuda: shared memory has room for so many, coordinates and offsets within a sample fit 31 bits
WIDEST_LATENT = 48
_SIDE_LIMIT, _SAMPLE_LIMIT = 2**29, 2**31
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def _known_capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@torch.compiler.assume_constant_result
def capability(index: int) -> tuple[int, int]:
    """Compute capability of a device."""
    return _known_capability(index)


def obstacle(input: Tensor) -> str:
    """Why no kernel of this library can be started on the device of ``input``; empty if they can."""
    if not extension.CUDA_LOADED:
        return extension.CUDA_REASON
    if not input.is_cuda:
        return f"input is on {input.device}, these kernels run on CUDA devices"
    if capability(input.device.index) < MINIMUM_CAPABILITY:
        have, need = (".".join(map(str, c)) for c in (capability(input.device.index), MINIMUM_CAPABILITY))
        return f"compute capability {have}, these kernels need {need}"
    return ""


def can_run(op: str, input: Tensor, *operands: Tensor | Geometry | None) -> tuple[bool, str]:
    """Whether the CUDA kernels take a checked call, and why not; arguments as for the CPU backend."""
    if op != "depthwise":
        return False, "only the depthwise convolution has a CUDA kernel"
    reason = obstacle(input)
    if reason:
        return False, reason
    return supports(op, input, *operands)


def supports(
    op: str,
    input: Tensor,
    weight: Tensor,
    p: Tensor | None = None,
    phi: Tensor | None = None,
    q: Tensor | None = None,
    lam: Tensor | None = None,
    where: Geometry | None = None,
) -> tuple[bool, str]:
    """The part of `can_run` that does not depend on the machine."""
    if op != "depthwise":
        return False, "only the depthwise convolution has a CUDA kernel"
    if input.dtype not in _DTYPES:
        return False, f"{input.dtype} is not one of float32, bfloat16, float16"
    if input.dim() != 4:
        return False, f"{input.dim() - 2} spatial dimensions, these kernels have 2"
    kernel = tuple(weight.shape[2:])
    if kernel[0] != kernel[1] or kernel[0] not in KERNEL_SIZES:
        return False, f"kernel size {kernel}, these kernels have 3 × 3, 5 × 5 and 7 × 7"
    if weight.shape[0] != input.shape[1]:
        return False, f"{weight.shape[0] // input.shape[1]} outputs a channel, these kernels have one"
    if phi is not None and phi.shape[1] > WIDEST_LATENT:
        return False, f"{phi.shape[1]} latent components, these kernels hold {WIDEST_LATENT}"
    if where is not None:
        if where.stride not in ((1, 1), (2, 2)):
            return False, f"stride {where.stride}, these kernels have 1 and 2"
        if where.dilation != (1, 1):
            return False, f"dilation {where.dilation}, these kernels have 1"
        if max(*input.shape[2:], *where.output, *where.low) >= _SIDE_LIMIT:
            return False, "2**29 or more rows or columns"
        if input.shape[1] * where.output[0] * where.output[1] >= _SAMPLE_LIMIT:
            return False, "2**31 or more elements in a sample"
    reach = sum((size - 1) * step for size, step in zip(input.shape[1:], input.stride()[1:], strict=True))
    if reach >= _SAMPLE_LIMIT:
        return False, "2**31 or more elements in a sample"
    return True, "CUDA tensors of a supported dtype and geometry"


def kernel(op: str, dtype: torch.dtype) -> str:
    """What runs a call, in words."""
    return "fused depthwise kernel"
