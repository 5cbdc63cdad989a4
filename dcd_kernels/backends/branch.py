# SPDX-License-Identifier: BSD-3-Clause
"""Whether the dynamic branch runs as two CUDA kernels (`dcd_kernels.ops.branch`) or as torch's operators."""

from __future__ import annotations

import torch
from torch import Tensor

from . import cuda, selection

# what the kernel's shared memory has room for: csrc/branch.h
MOST_INPUTS, MOST_HIDDEN = 8192, 1024
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_BACKENDS = ("auto", cuda.NAME)  # under which they are taken


def can_run(input: Tensor, squeeze_weight: Tensor, *weights: Tensor) -> tuple[bool, str]:
    """Whether the CUDA kernels take a branch with this input, first FC and other FCs, and why not."""
    reason = cuda.obstacle(input)
    if reason:
        return False, reason
    if selection.current() not in _BACKENDS:
        return False, f"backend '{selection.current()}' was asked for"
    return supports(input, squeeze_weight, *weights)


def supports(input: Tensor, squeeze_weight: Tensor, *weights: Tensor) -> tuple[bool, str]:
    """The part of `can_run` that does not depend on the machine."""
    if input.dtype not in _DTYPES:
        return False, f"input is {input.dtype}, not one of float32, bfloat16, float16"
    dtype = squeeze_weight.dtype
    if dtype not in _DTYPES:
        return False, f"the branch's weight is {dtype}, not one of float32, bfloat16, float16"
    if any(weight.dtype != dtype for weight in weights):
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
