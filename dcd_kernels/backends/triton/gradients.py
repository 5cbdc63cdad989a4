# SPDX-License-Identifier: BSD-3-Clause
"""Gradients that are sums over pixels: of W0, λ, P, Q and Φ.

All of them are products A_n B_nᵀ over a sample's pixels: S_n = G xᵀ gives dW0 = Σ λ⊙S and dλ = rowsum(S⊙W0);
with h = ΦQᵀx and s = ΦᵀPᵀG, which product.py stores, dP = Σ G hᵀ and dQ = Σ x sᵀ; dΦ_n = (PᵀG)(Qᵀx)ᵀ.
S_n never leaves the chip. A program owns one tile and a run of samples; the runs' sums are float32 and are
added in a fixed order afterwards, so that the same inputs always give the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...ops.fakes import empty_map
from . import precision
from .launch import Image, image, image_arguments, launch, padded, pixels_of, unit
from .tile import load_columns, offsets
from .tuning import Config, bucket, choose, fitting

CONFIGS = (
    Config(64, 64, 64, 4, 3),
    Config(64, 32, 64, 4, 3),
    Config(32, 64, 64, 4, 3),
    Config(64, 16, 64, 4, 3),
    Config(16, 64, 64, 4, 3),
    Config(16, 16, 64, 4, 3),
)
_SCALE_TILE = (64, 64)
_PROGRAMS = 264  # two for each multiprocessor of an H200: what a split of a sum over samples aims at


@triton.jit
def pixel_sums(
    a,  # (N, A, pixels)
    b,  # (N, B, pixels)
    lam,  # (N, A): scales each sample's sum; or None
    weight,  # (A, B): W0, for dλ
    ab,  # (splits, A, B) float32: stores Σ_n λ_n ⊙ A_n B_nᵀ over a run's samples
    ab_lam,  # (B tiles, N, A) float32: stores rowsum(A_n B_nᵀ ⊙ weight) over a tile's columns
    batch,
    samples,  # of a run
    pixel_units,
    a_units,
    b_units,
    a_sample,
    a_step,
    b_sample,
    b_step,
    PIXEL_UNIT: tl.constexpr,
    A_CHANNEL_UNIT: tl.constexpr,
    B_CHANNEL_UNIT: tl.constexpr,
    A_UNIT: tl.constexpr,
    A_LAST: tl.constexpr,
    B_UNIT: tl.constexpr,
    B_LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    pixels = pixel_units * PIXEL_UNIT
    a_channels = a_units * A_CHANNEL_UNIT
    b_channels = b_units * B_CHANNEL_UNIT
    b_tiles = tl.cdiv(b_channels, BLOCK_B)
    b_tile = tl.program_id(0) % b_tiles
    a_tiles = tl.cdiv(a_channels, BLOCK_A)
    a_tile = tl.program_id(0) // b_tiles % a_tiles
    split = tl.program_id(0) // b_tiles // a_tiles
    i = a_tile * BLOCK_A + tl.arange(0, BLOCK_A)
    j = b_tile * BLOCK_B + tl.arange(0, BLOCK_B)
    in_i = i < a_channels
    in_j = j < b_channels
    in_ij = in_i[:, None] & in_j[None, :]

    per_sample: tl.constexpr = lam is not None or ab_lam is not None
    acc = tl.zeros((BLOCK_A, BLOCK_B), tl.float32)
    if per_sample:
        own = tl.zeros((BLOCK_A, BLOCK_B), tl.float32)
    first = split * samples
    last = tl.minimum(first + samples, batch)
    tiles = tl.cdiv(pixels, BLOCK_P)
    # one loop over samples and tiles, so that the next sample's loads start under this one's products
    for step in range(first * tiles, last * tiles):
        n = (step // tiles).to(tl.int64)
        tile = step % tiles
        p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
        in_p = p < pixels
        a_at = n * (a_sample * A_UNIT) + tl.trans(offsets(p, i, a_step, A_UNIT, A_LAST))
        b_at = n * (b_sample * B_UNIT) + offsets(p, j, b_step, B_UNIT, B_LAST)
        left = tl.load(a + a_at, mask=in_i[:, None] & in_p[None, :], other=0.0)
        right = tl.load(b + b_at, mask=in_p[:, None] & in_j[None, :], other=0.0)
        if per_sample:
            own = tl.dot(left, right, own, input_precision=PRECISION)
        else:
            acc = tl.dot(left, right, acc, input_precision=PRECISION)
        if per_sample:
            if tile == tiles - 1:
                if lam is not None:
                    scale = tl.load(lam + n * a_channels + i, mask=in_i, other=0.0).to(tl.float32)
                    acc += own * scale[:, None]
                else:
                    acc += own
                if ab_lam is not None:
                    w_at = i[:, None] * b_channels + j[None, :]
                    w = tl.load(weight + w_at, mask=in_ij, other=0.0).to(tl.float32)
                    row = tl.sum(own * w, 1)
                    tl.store(ab_lam + (b_tile * batch + n) * a_channels + i, row, mask=in_i)
                own = tl.zeros((BLOCK_A, BLOCK_B), tl.float32)

    if ab is not None:
        ab_at = split.to(tl.int64) * a_channels * b_channels + i[:, None] * b_channels + j[None, :]
        tl.store(ab + ab_at, acc, mask=in_ij)


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
    """Gradients of λ⊙static, for `apply`: one pass over both images."""
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
        g_at = n * (grad_sample * GRAD_UNIT) + offsets(rows, cols, grad_step, GRAD_UNIT, GRAD_LAST)
        g = tl.load(grad + g_at, mask=inside, other=0.0).to(tl.float32)
        if d_lam is not None:
            y_at = n * (static_sample * STATIC_UNIT) + offsets(
                rows, cols, static_step, STATIC_UNIT, STATIC_LAST
            )
            total += tl.sum(g * tl.load(static + y_at, mask=inside, other=0.0).to(tl.float32), 0)
        if d_static is not None:
            out_at = n * (out_sample * OUT_UNIT) + offsets(rows, cols, out_step, OUT_UNIT, OUT_LAST)
            tl.store(d_static + out_at, (g * scale).to(d_static.dtype.element_ty), mask=inside)
    if d_lam is not None:
        tl.store(d_lam + n * channels + cols, total, mask=in_cols)


def sum_pixels(
    a: Image,
    b: Image,
    *,
    lam: Tensor | None = None,
    weight: Tensor | None = None,
    wanted: tuple[bool, bool] = (True, False),
    each_sample: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """Σ_n λ_n ⊙ A_n B_nᵀ and rowsum(A_n B_nᵀ ⊙ weight) in float32; the first not summed if each_sample."""
    batch, a_channels = a.tensor.shape[:2]
    b_channels, pixels = b.tensor.shape[1], pixels_of(a.tensor)
    strides, constants = image_arguments(a=a, b=b)
    pixel_unit, a_unit, b_unit = unit(pixels), unit(a_channels), unit(b_channels)
    lam = None if lam is None else lam.contiguous()
    results: list[Tensor | None] = [None, None]

    def start(config: Config) -> None:
        block_a, block_b, block_p, num_warps, num_stages = config
        block_p = min(block_p, padded(pixels))
        if a.tensor.dtype == torch.float32:
            block_p = min(block_p, 32)
        b_tiles = -(-b_channels // block_b)
        tiles = -(-a_channels // block_a) * b_tiles
        splits = batch if each_sample else max(1, min(batch, _PROGRAMS // tiles))
        samples = -(-batch // splits)
        splits = -(-batch // samples)
        made = a.tensor.new_empty
        if wanted[0]:
            results[0] = made((splits, a_channels, b_channels), dtype=torch.float32)
        if wanted[1]:
            results[1] = made((b_tiles, batch, a_channels), dtype=torch.float32)
        arguments = {
            "a": a.tensor,
            "b": b.tensor,
            "lam": lam if wanted[0] else None,
            "weight": weight.contiguous() if wanted[1] else None,
            "ab": results[0],
            "ab_lam": results[1],
            "batch": batch,
            "samples": samples,
            "pixel_units": pixels // pixel_unit,
            "a_units": a_channels // a_unit,
            "b_units": b_channels // b_unit,
            **strides,
            "PIXEL_UNIT": pixel_unit,
            "A_CHANNEL_UNIT": a_unit,
            "B_CHANNEL_UNIT": b_unit,
            **constants,
            "PRECISION": precision.of_products(a.tensor),
            "BLOCK_A": block_a,
            "BLOCK_B": block_b,
            "BLOCK_P": block_p,
        }
        launch(pixel_sums, (tiles * splits,), arguments, num_warps, num_stages)

    key = (
        *(str(a.tensor.dtype)[6:], a_channels, b_channels, bucket(batch), bucket(pixels), pixel_unit),
        *(int(a.last), int(b.last), *map(int, wanted), int(lam is not None), int(each_sample)),
    )
    start(choose("pixel_sums", key, fitting(CONFIGS, a_channels, b_channels, CONFIGS[0].block_k), start))
    summed, scaled = results
    if summed is not None and not each_sample:
        summed = summed.sum(0)
    return summed, None if scaled is None else scaled.sum(0)


def static_gradients(
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
    block_m, block_n = _SCALE_TILE
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
    launch(scale_gradients, (batch * -(-channels // block_n),), arguments, 4, 2)
    return d_static, d_lam
