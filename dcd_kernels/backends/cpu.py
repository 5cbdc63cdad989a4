# SPDX-License-Identifier: BSD-3-Clause
"""The compiled CPU kernels: every form, in float32 and float64; half precision through float32, but for the
products of pointwise layers in bfloat16, which the best instruction of the CPU makes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import extension
from ..geometry import Geometry

NAME = "cpu"
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
NOTES = {
    torch.float64: "the portable baseline kernel",
    torch.bfloat16: "pointwise and linear layers multiply bfloat16 and add up in float32; other forms and "
    "gradients are computed in float32 and rounded back",
    torch.float16: "computed in float32 and rounded back",
}
_MIXED = ("pointwise", "linear")  # forms whose products may be bfloat16
_PRODUCTS = {
    "amx": "products of bf16 by AMX tiles",
    "amx_emulated": "products of bf16 by emulated AMX tiles",
    "avx512_bf16": "products of bf16 by vdpbf16ps",
    "widened": "products of bf16 in float32",
}
_SPLIT = "float32 split into three products of bf16 by AMX tiles"
_KERNELS = {
    "pointwise": "fused pointwise kernel",
    "linear": "fused pointwise kernel",
    "depthwise": "fused depthwise kernel",
    "centre": "torch's convolution for the static part, then the fused apply kernel",
    "joint": "fused kernels for Qᵀx and for the sum, torch's convolutions with W0 and R",
    "apply": "fused apply kernel",
    "moments": "moments kernel, one pass over the input",
}


def can_run(
    op: str,
    input: Tensor,
    weight: Tensor,
    p: Tensor | None = None,
    phi: Tensor | None = None,
    q: Tensor | None = None,
    lam: Tensor | None = None,
    where: Geometry | None = None,
) -> tuple[bool, str]:
    """Whether the compiled kernels take a checked call, and why not.

    ``op`` is one of :data:`selection.OPS`; ``weight`` is apply's static output, ``q`` is depthwise's r,
    ``where`` a convolution's geometry. All operands share one device by then, and all but lam, phi and bias
    one dtype.
    """
    if not extension.LOADED:
        return False, extension.REASON
    if not input.is_cpu:
        return False, f"input is on {input.device}, these kernels run on the CPU"
    if input.dtype not in _DTYPES:
        return False, f"{input.dtype} is not one of float32, float64, bfloat16, float16"
    return True, "CPU tensors of a supported dtype"


def kernel(op: str, dtype: torch.dtype) -> str:
    """What runs a call, in words."""
    isa = "baseline" if dtype == torch.float64 else torch.ops.dcd_kernels.cpu_isa()
    return f"{_KERNELS[op]} ({isa}{', ' + how if (how := _how(op, dtype)) else ''})"


def _how(op: str, dtype: torch.dtype) -> str:
    """How a form multiplies, where that is not in its dtype."""
    if op not in _MIXED:
        return ""
    if dtype == torch.bfloat16:
        return _PRODUCTS[torch.ops.dcd_kernels.cpu_products()]
    if dtype == torch.float32 and torch.ops.dcd_kernels.cpu_splits_float32():
        return _SPLIT
    return ""


def better_products() -> list[str]:
    """Why the ways to multiply bf16 that are better than the one in use are not taken."""
    used = torch.ops.dcd_kernels.cpu_products()
    names = list(_PRODUCTS)
    better = [name for name in names[: names.index(used)] if name != "amx_emulated"]
    return [f"no {name}: {torch.ops.dcd_kernels.cpu_products_obstacle(name)}" for name in better]


def plan(
    op: str,
    size: tuple[int, ...] | None,
    input: Tensor,
    weight: Tensor,
    p: Tensor | None,
    phi: Tensor | None,
    *_,
) -> str | None:
    """Which order of the product this call takes, or ``None`` where there is no choice or nothing to ask.

    With packed weights also the pieces: layout, panels, tile, what passes at a time, tasks of the threads.
    ``size`` is the output's spatial size where it is not the input's.
    """
    if op not in ("pointwise", "linear") or p is None:
        return None
    try:
        from .. import _core  # not needed to compute anything, so not imported before somebody asks
    except ImportError:
        return None
    if size is None:
        size = tuple(input.shape[1:-1] if op == "linear" else input.shape[2:])
    pixels = math.prod(size)
    out_channels, in_channels = weight.shape[:2]
    blocks = phi.shape[1] if phi.dim() == 4 else 1
    sizes = (in_channels, out_channels, p.shape[1])
    options = {"blocks": blocks}
    why = ""
    if how := _how(op, input.dtype):
        options |= {"products": torch.ops.dcd_kernels.cpu_products(), "split": input.dtype == torch.float32}
        why = "; ".join(["", how, *better_products()])
    many = 1 << 20
    cost = _core.pointwise_plan(*sizes, many, **options)
    limit = many * cost["synthesised_madds"] // cost["factored_madds"]
    counted = f"{pixels} output pixel{'' if pixels == 1 else 's'}"
    if _core.pointwise_plan(*sizes, pixels, **options)["order"] == "synthesised":
        text = f"W_n is synthesised in cache: {counted}, more than {limit}{why}"
    else:
        text = f"W_n is applied in factors: {counted}, not more than {limit}{why}"
    innermost = not input.is_contiguous() and input.stride(1) == 1
    how = _core.pointwise_plan(
        *sizes,
        max(pixels, 1),
        **options,
        batch=max(input.shape[0], 1),
        channels_last=input.dim() > 2 if op == "linear" else innermost,
        threads=torch.get_num_threads(),
    )
    if "tile" not in how:
        return text
    rows, lanes = how["tile"]
    what = ("pixels", "channels") if how["layout"] == "channels_last" else ("channels", "pixels")
    samples, channels, pieces = how["tasks"]
    tasks = f"; tasks: {samples} by samples, {channels} by channels, {pieces} by pixels"
    return (
        f"{text}; packed weights: {how['layout']}, {how['panels']} panels of 16 channels, tiles of {rows} "
        f"{what[0]} by {lanes} {what[1]}, {how['pixels_at_a_time']} pixels at a time"
        f"{tasks if samples * channels * pieces > 1 else ''}"
    )
