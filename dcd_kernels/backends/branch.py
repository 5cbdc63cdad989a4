# SPDX-License-Identifier: BSD-3-Clause
"""Whether the dynamic branch runs as two CUDA kernels (`dcd_kernels.ops.branch`) or as torch's operators."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .. import extension
from . import selection

MINIMUM_CAPABILITY = (8, 0)
# what the kernel's shared memory has room for: csrc/branch.h
MOST_INPUTS, MOST_HIDDEN = 8192, 1024
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_BACKENDS = ("auto", "cuda")  # whose request they are


@functools.cache
def _known_capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@torch.compiler.assume_constant_result
def _capability(index: int) -> tuple[int, int]:
    return _known_capability(index)


def can_run(input: Tensor, squeeze_weight: Tensor, *weights: Tensor) -> tuple[bool, str]:
    """Whether the CUDA kernels take a branch with this input, first FC and other FCs, and why not."""
    if not extension.CUDA_LOADED:
        return False, extension.CUDA_REASON
    if not input.is_cuda:
        return False, f"input is on {input.device}, these kernels run on CUDA devices"
    if selection.current() not in _BACKENDS:
        return False, f"backend '{selection.current()}' was asked for"
    if torch.version.hip is not None:
        return False, "these kernels are for NVIDIA's devices"
    if _capability(input.device.index) < MINIMUM_CAPABILITY:
        have, need = (".".join(map(str, c)) for c in (_capability(input.device.index), MINIMUM_CAPABILITY))
        return False, f"compute capability {have}, these kernels need {need}"
    return supports(input, squeeze_weight, *weights)


def supports(input: Tensor, squeeze_weight: Tensor, *weights: Tensor) -> tuple[bool, str]:
    """The part of `can_run` that does not depend on the machine."""
    for name, tensor in (("input", input), ("the branch's weight", squeeze_weight)):
        if tensor.dtype not in _DTYPES:
            return False, f"{name} is {tensor.dtype}, not one of float32, bfloat16, float16"
    if any(weight.dtype != squeeze_weight.dtype for weight in weights):
        return False, "the branch's weights have different dtypes"
    if input.device != squeeze_weight.device:
        return False, f"input is on {input.device}, the branch on {squeeze_weight.device}"
    if input.dim() < 3:
        return False, "input has no pixels to pool"
    if input.shape[2:].numel() == 0:
        return False, "input has spatial dimensions of size 0"
    hidden, inputs = squeeze_weight.shape
    if inputs > MOST_INPUTS or hidden > MOST_HIDDEN:
        return (
            False,
            f"{inputs} pooled channels and {hidden} hidden units, these kernels hold "
            f"{MOST_INPUTS} and {MOST_HIDDEN}",
        )
    return True, "a GPU tensor of a supported dtype"
