# SPDX-License-Identifier: BSD-3-Clause
"""Gradients of λ⊙static, for `apply`: one pass over both images."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...ops.fakes import empty_map
from .launch import image, image_arguments, launch, pixels_of, unit
from .tile import load_columns, offsets
from .tuning import Config

CONFIGS = (Config(64, 64, 0, 4, 2),)


@triton.jit
def scale_gradients(
    grad,  # (N, C, pixels)
    static,  # (N, C, pixels)
    lam,  # (N, C)
    d_static,  # (N, C, pixels): stores λ⊙G, or None
    d_lam,  # (N, C) float32: stores Σ_p G⊙static, or None
    pixel_units,
    channel_units,
    grad_sample,
    grad_step,
    static_sample,
    static_step,
    out_sample,
    out_step,
    PIXEL_UNIT: tl.constexpr,
    CHANNEL_UNIT: tl.constexpr,
    GRAD_UNIT: tl.constexpr,
    GRAD_LAST: tl.constexpr,
    STATIC_UNIT: tl.constexpr,
    STATIC_LAST: tl.constexpr,
    OUT_UNIT: tl.constexpr,
    OUT_LAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A program for all pixels of some channels of a sample."""
    pixels = pixel_units * PIXEL_UNIT
    channels = channel_units * CHANNEL_UNIT
    tiles = tl.cdiv(channels, BLOCK_N)
    n = (tl.program_id(0) // tiles).to(tl.int64)
    cols = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    in_cols = cols < channels
    total = tl.zeros((BLOCK_N,), tl.float32)
    if d_static is not None:
        scale = load_columns(lam + n * channels, cols, in_cols)
    for start in range(0, pixels, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        inside = (rows < pixels)[:, None] & in_cols[None, :]
        g_at = n * grad_sample * GRAD_UNIT + offsets(rows, cols, grad_step, GRAD_UNIT, GRAD_LAST)
        g = tl.load(grad + g_at, mask=inside, other=0.0).to(tl.float32)
        if d_lam is not None:
            y_at = n * static_sample * STATIC_UNIT + offsets(
                rows, cols, static_step, STATIC_UNIT, STATIC_LAST
            )
            total += tl.sum(g * tl.load(static + y_at, mask=inside, other=0.0).to(tl.float32), 0)
        if d_static is not None:
            out_at = n * out_sample * OUT_UNIT + offsets(rows, cols, out_step, OUT_UNIT, OUT_LAST)
            tl.store(d_static + out_at, (g * scale).to(d_static.dtype.element_ty), mask=inside)
    if d_lam is not None:
        tl.store(d_lam + n * channels + cols, total, mask=in_cols)


def run(
    grad: Tensor, static: Tensor, lam: Tensor, needs_static: int, needs_lam: int
) -> tuple[Tensor | None, Tensor | None]:
    """(λ⊙G in the layout of static, Σ_p G⊙static (N, C) float32), each if needed."""
    batch, channels = static.shape[:2]
    pixels = pixels_of(static)
    d_static = empty_map(static, channels, static.shape[2:]) if needs_static else None
    d_lam = static.new_empty((batch, channels), dtype=torch.float32) if needs_lam else None
    g, y = image(grad), image(static)
    out = None if d_static is None else image(d_static)
    strides, constants = image_arguments(grad=g, static=y, out=out)
    pixel_unit, channel_unit = unit(pixels), unit(channels)
    block_m, block_n, _, num_warps, num_stages = CONFIGS[0]
    arguments = {
        "grad": g.tensor,
        "static": y.tensor if needs_lam else None,
        "lam": lam.contiguous() if needs_static else None,
        "d_static": d_static,
        "d_lam": d_lam,
        "pixel_units": pixels // pixel_unit,
        "channel_units": channels // channel_unit,
        **strides,
        "PIXEL_UNIT": pixel_unit,
        "CHANNEL_UNIT": channel_unit,
        **constants,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
    }
    launch(scale_gradients, (batch * -(-channels // block_n),), arguments, num_warps, num_stages)
    return d_static, d_lam
