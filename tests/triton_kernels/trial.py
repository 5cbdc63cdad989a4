# SPDX-License-Identifier: BSD-3-Clause
"""A small kernel with nothing wrong, and switches that spoil it: what the harnesses are tested on."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def product_kernel(
    x_ptr,
    w_ptr,
    scale_ptr,
    y_ptr,
    pixels,
    in_channels,
    out_channels,
    x_stride,
    PRECISION: tl.constexpr,
    SCALE_FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y = (x wᵀ) scale, pixels as rows. SCALE_FIRST scales x, which wgmma then has to read from registers."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, in_channels, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = (m[:, None] < pixels) & (k[None, :] < in_channels)
        x = tl.load(x_ptr + m.to(tl.int64)[:, None] * x_stride + k[None, :], mask=inside, other=0.0)
        inside = (n[None, :] < out_channels) & (k[:, None] < in_channels)
        w = tl.load(w_ptr + n[None, :] * in_channels + k[:, None], mask=inside, other=0.0)
        if SCALE_FIRST:
            factor = tl.load(scale_ptr + k, mask=k < in_channels, other=0.0).to(tl.float32)
            x = (x.to(tl.float32) * factor[None, :]).to(x.dtype)
        total = tl.dot(x, w, total, input_precision=PRECISION)
    if not SCALE_FIRST:
        factor = tl.load(scale_ptr + n, mask=n < out_channels, other=0.0).to(tl.float32)
        total = total * factor[None, :]
    y = y_ptr + m.to(tl.int64)[:, None] * out_channels + n[None, :]
    inside = (m[:, None] < pixels) & (n[None, :] < out_channels)
    tl.store(y, total.to(y_ptr.dtype.element_ty), mask=inside)


def arguments(
    pixels: int = 4096,
    in_channels: int = 256,
    out_channels: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "meta",
    **constants,
) -> dict:
    """What the kernel is launched with, but for the grid."""
    return {
        "x_ptr": torch.empty(pixels, in_channels, dtype=dtype, device=device),
        "w_ptr": torch.empty(out_channels, in_channels, dtype=dtype, device=device),
        "scale_ptr": torch.empty(max(in_channels, out_channels), dtype=torch.float32, device=device),
        "y_ptr": torch.empty(pixels, out_channels, dtype=dtype, device=device),
        "pixels": pixels,
        "in_channels": in_channels,
        "out_channels": out_channels,
        "x_stride": in_channels,
        "PRECISION": "ieee",
        "SCALE_FIRST": False,
        "BLOCK_M": 64,
        "BLOCK_N": 64,
        "BLOCK_K": 64,
    } | constants


def run(x: torch.Tensor, w: torch.Tensor, scale: torch.Tensor, **constants) -> torch.Tensor:
    """(x wᵀ) scale through the kernel: x (pixels, in_channels), w (out_channels, in_channels)."""
    (pixels, in_channels), out_channels = x.shape, w.shape[0]
    y = torch.full((pixels, out_channels), float("nan"), dtype=x.dtype, device=x.device)
    given = arguments(pixels, in_channels, out_channels, device="meta") | constants
    given |= {"x_ptr": x, "w_ptr": w, "scale_ptr": scale, "y_ptr": y, "x_stride": x.stride(0)}
    grid = (triton.cdiv(pixels, given["BLOCK_M"]), triton.cdiv(out_channels, given["BLOCK_N"]))
    product_kernel[grid](**given)
    return y
