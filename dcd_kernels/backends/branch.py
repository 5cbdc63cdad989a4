# SPDX-License-Identifier: BSD-3-Clause
"""Whether the dynamic branch runs as two compiled ops (`dcd_kernels.ops.branch`) or as torch's operators."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import extension
from . import cpu, cuda, selection

# what the CUDA kernel's shared memory has room for: csrc/branch.h
MOST_INPUTS, MOST_HIDDEN = 8192, 1024
_CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_CUDA_DTYPES = _CPU_DTYPES[:3]


def can_run(input: Tensor, squeeze_weight: Tensor, *weights: Tensor) -> tuple[bool, str]:
    """Whether the ops take a branch with this input, first FC and other FCs, and why not."""
    if input.is_cuda:
        name, reason = cuda.NAME, cuda.obstacle(input)
    else:
        name, reason = cpu.NAME, "" if extension.LOADED else extension.REASON
    if reason:
        return False, reason
    chosen = selection.current()
    if chosen != "auto" and chosen != name:
        return False, f"backend '{chosen}' was asked for"
    return supports(input, squeeze_weight, *weights)


def supports(input: Tensor, squeeze_weight: Tensor, *weights: Tensor) -> tuple[bool, str]:
    """The part of `can_run` that does not depend on the machine."""
    on_cpu = input.is_cpu
    if on_cpu:
        dtypes, names = _CPU_DTYPES, "float32, bfloat16, float16, float64"
    elif input.is_cuda:
        dtypes, names = _CUDA_DTYPES, "float32, bfloat16, float16"
    else:
        return False, f"input is on {input.device}, these kernels run on the CPU and on CUDA devices"
    dtype = squeeze_weight.dtype
    if input.dtype not in dtypes:
        return False, f"input is {input.dtype}, not one of {names}"
    if dtype not in dtypes:
        return False, f"the branch's weight is {dtype}, not one of {names}"
    for weight in weights:
        if weight.dtype != dtype:
            return False, "the branch's weights have different dtypes"
    if not squeeze_weight.is_cpu if on_cpu else squeeze_weight.device != input.device:
        return False, f"input is on {input.device}, the branch on {squeeze_weight.device}"
    if input.numel() == 0 and 0 in input.shape[2:]:
        return False, "input has spatial dimensions of size 0"
    if on_cpu:
        return True, "a CPU tensor of a supported dtype"
    hidden, inputs = squeeze_weight.shape
    if inputs > MOST_INPUTS or hidden > MOST_HIDDEN:
        return (
            False,
            f"{inputs} pooled channels and {hidden} hidden units, these kernels hold "
            f"{MOST_INPUTS} and {MOST_HIDDEN}",
        )
    return True, "a GPU tensor of a supported dtype"
