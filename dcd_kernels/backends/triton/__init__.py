# SPDX-License-Identifier: BSD-3-Clause
"""Triton kernels for GPUs: pointwise, linear and apply, and the dynamic part of k×k convolutions.

Importing this package imports neither Triton nor a kernel; :func:`register` does, once, when there is a GPU.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from ... import extension
from ...geometry import Geometry
from ..cuda import MINIMUM_CAPABILITY, capability

NAME = "triton"
NOTES: dict[torch.dtype, str] = {}
WIDEST_LATENT = 128  # beyond it the latent's tile no longer fits beside the output's in registers
_LIMIT = 2**31
_ROW_LIMIT = 2**31 - 256  # the last tile may reach behind the last pixel
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_KERNELS = {
    "pointwise": "fused pointwise kernel",
    "linear": "fused pointwise kernel",
    "centre": "torch's convolution for the static part, then the fused apply kernel",
    "joint": "fused kernels for Qᵀx and for the sum, torch's convolutions with W0 and R",
    "apply": "fused apply kernel",
    "moments": "one pass over the input",
}


def _missing() -> str:
    """Why no kernel can be launched by this process; empty if one can."""
    if not extension.LOADED:
        return extension.REASON
    return "" if importlib.util.find_spec("triton") else "Triton is not installed"


_MISSING = _missing()


def can_run(op: str, input: Tensor, *operands: Tensor | Geometry | None) -> tuple[bool, str]:
    """Whether the Triton kernels take a checked call, and why not; arguments as for the CPU backend."""
    if _MISSING:
        return False, _MISSING
    if not input.is_cuda:
        return False, f"input is on {input.device}, these kernels run on GPUs"
    if not torch.version.hip and capability(input.device.index) < MINIMUM_CAPABILITY:
        have, need = (".".join(map(str, c)) for c in (capability(input.device.index), MINIMUM_CAPABILITY))
        return False, f"compute capability {have}, these kernels need {need}"
    return supports(op, input, *operands)


def supports(
    op: str,
    input: Tensor,
    weight: Tensor,
    p: Tensor | None = None,
    phi: Tensor | None = None,
    *_,
) -> tuple[bool, str]:
    """The part of `can_run` that does not depend on the machine."""
    if op not in _KERNELS:
        return False, "the depthwise convolution has no Triton kernel"
    if input.dtype not in _DTYPES:
        return False, f"{input.dtype} is not one of float32, bfloat16, float16"
    latent = weight.shape[1] if op == "moments" else 0 if phi is None else latent_channels(phi)
    if latent > WIDEST_LATENT:
        return False, f"{latent} latent channels in all, these kernels hold {WIDEST_LATENT}"
    rows, elements = _extent(op, input, weight)
    if rows >= _ROW_LIMIT or elements >= _LIMIT:
        return False, "2**31 - 256 or more pixels in the batch, or elements in a sample"
    return True, "GPU tensors of a supported dtype"


def latent_channels(phi: Tensor) -> int:
    """The widest latent that a call with this phi goes through, all blocks or kernel latents together."""
    return max(phi.shape[1:]) if phi.dim() == 3 else phi.shape[1] * phi.shape[3]


def _extent(op: str, input: Tensor, weight: Tensor) -> tuple[int, int]:
    """(pixels of the batch, elements of a sample) of the larger image of a call."""
    if op == "moments":
        pixels, widest = input.shape[2:].numel(), input.shape[1]
    elif op == "linear":
        pixels = input.shape[1:-1].numel()
        widest = max(input.shape[-1], weight.shape[0])
    else:
        pixels = max(input.shape[2:].numel(), weight.shape[2:].numel() if op == "apply" else 0)
        widest = max(input.shape[1], weight.shape[1] if op == "apply" else weight.shape[0])
    return input.shape[0] * pixels, widest * pixels


def kernel(op: str, dtype: torch.dtype) -> str:
    """What runs a call, in words."""
    return _KERNELS[op]


def plan(
    op: str,
    size: tuple[int, ...] | None,
    input: Tensor,
    weight: Tensor,
    p: Tensor | None,
    phi: Tensor | None,
    *_,
) -> str | None:
    """Which order of the product this call takes, or ``None`` where there is no choice."""
    if op not in ("pointwise", "linear") or p is None:
        return None
    from . import synthesised

    pixels = (input.shape[1:-1] if op == "linear" else torch.Size(size or input.shape[2:])).numel()
    in_channels = weight.shape[1]
    if synthesised.pays(in_channels, pixels, input.dtype):
        return (
            f"W_n is synthesised on chip: {in_channels} input channels fit one tile, {pixels} pixels share it"
        )
    return "W_n is applied in factors"


def register(library: torch.library.Library) -> None:
    """Makes the entry points the CUDA implementations of the ops, where Triton is there."""
    if _MISSING or not (torch.version.cuda or torch.version.hip):
        return
    from . import entry

    for name in (
        "pointwise",
        "pointwise_backward",
        "pointwise_pooled",
        "apply",
        "apply_backward",
        "latent_moments",
    ):
        library.impl(name, _on_its_device(getattr(entry, name)), "CUDA")


def _on_its_device(entry: Callable) -> Callable:
    """``entry`` with the device of its first tensor as the current one, where kernels start and are timed."""

    @functools.wraps(entry)
    def call(first: Tensor, *rest):
        if first.device.index == torch.cuda.current_device():
            return entry(first, *rest)
        with torch.cuda.device(first.device):
            return entry(first, *rest)

    return call
