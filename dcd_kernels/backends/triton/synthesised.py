# SPDX-License-Identifier: BSD-3-Clause
"""y = act(W_n x + bias + residual) with a tile of W_n = λ⊙W0 + P Φ Qᵀ made on chip once a program.

For layers with few input channels on large maps: all of K fits into one tile, so that one W_n tile serves
every pixel tile of the program, and nothing dynamic is left to do per pixel. W_n is rounded to the image's
dtype before the product, as materialised weights are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import precision
from .launch import Image, image_arguments, launch, padded, pixels_of, tensor_of, unit
from .tile import activate, load_columns, offsets
from .tuning import Config, bucket, choose, fitting

CONFIGS = (
    Config(128, 64, 16, 4, 3),
    Config(128, 64, 32, 4, 3),
    Config(128, 64, 64, 4, 3),
    Config(128, 64, 128, 8, 2),
    Config(128, 128, 16, 8, 3),
    Config(128, 128, 32, 8, 3),
    Config(128, 128, 64, 8, 3),
    Config(128, 32, 16, 4, 3),
    Config(128, 32, 32, 4, 3),
    Config(128, 32, 64, 4, 3),
    Config(128, 32, 128, 4, 2),
    Config(64, 64, 128, 4, 2),
)
_CHUNK = 4  # pixel tiles that share a weight


def pays(in_channels: int, pixels: int, dtype: torch.dtype) -> bool:
    """Few enough input channels for one tile, and a map large enough for a program's pixel tiles."""
    deepest = max(c.block_k for c in CONFIGS)
    if dtype == torch.float32:  # whose tiles are twice as large in shared memory
        deepest //= 2
    return in_channels <= deepest and pixels >= CONFIGS[0].block_m * _CHUNK


@triton.jit
def synthesised(
    x,  # (N, K, pixels)
    weight,  # (OUT, K)
    left,  # (K, L)
    phi,  # (N, L, L)
    right,  # (OUT, L)
    lam,  # (N, OUT)
    bias,  # (OUT,), or (N, OUT) where BIAS_OF_SAMPLE
    residual,  # (N, OUT, pixels)
    out,  # (N, OUT, pixels)
    sums,  # (N, chunks, OUT) float32: stores each chunk's channel sums of the output
    pixel_units,
    in_units,
    out_units,
    x_sample,
    x_step,
    residual_sample,
    residual_step,
    out_sample,
    out_step,
    PIXEL_UNIT: tl.constexpr,
    IN_CHANNEL_UNIT: tl.constexpr,
    OUT_CHANNEL_UNIT: tl.constexpr,
    X_UNIT: tl.constexpr,
    X_LAST: tl.constexpr,
    RESIDUAL_UNIT: tl.constexpr,
    RESIDUAL_LAST: tl.constexpr,
    OUT_UNIT: tl.constexpr,
    OUT_LAST: tl.constexpr,
    BIAS_OF_SAMPLE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    L: tl.constexpr,
    L_PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
    LATENT_PRECISION: tl.constexpr,
    CHUNK: tl.constexpr,  # pixel tiles a program goes through with its W_n
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,  # at least K
):
    pixels = pixel_units * PIXEL_UNIT
    in_channels = in_units * IN_CHANNEL_UNIT
    out_channels = out_units * OUT_CHANNEL_UNIT
    out_tiles = tl.cdiv(out_channels, BLOCK_N)
    chunks = tl.cdiv(pixels, BLOCK_M * CHUNK)
    column = tl.program_id(0) % out_tiles
    chunk = tl.program_id(0) // out_tiles % chunks
    n = (tl.program_id(0) // out_tiles // chunks).to(tl.int64)
    cols = column * BLOCK_N + tl.arange(0, BLOCK_N)
    in_cols = cols < out_channels
    k = tl.arange(0, BLOCK_K)
    in_k = k < in_channels
    latents = tl.arange(0, L_PADDED)
    in_latents = latents < L

    w_mask = in_k[:, None] & in_cols[None, :]
    w_tile = tl.load(weight + cols[None, :] * in_channels + k[:, None], mask=w_mask, other=0.0)
    w = w_tile.to(tl.float32)
    if lam is not None:
        w = w * load_columns(lam + n * out_channels, cols, in_cols)
    l_mask = in_k[:, None] & in_latents[None, :]
    l_tile = tl.load(left + k[:, None] * L + latents[None, :], mask=l_mask, other=0.0)
    phi_at = latents[None, :] * L + latents[:, None]
    phi_tile = tl.load(phi + n * (L * L) + phi_at, mask=in_latents[:, None] & in_latents[None, :], other=0.0)
    turned = tl.dot(l_tile.to(tl.float32), phi_tile.to(tl.float32), input_precision=LATENT_PRECISION)
    r_mask = in_latents[:, None] & in_cols[None, :]
    r_tile = tl.load(right + cols[None, :] * L + latents[:, None], mask=r_mask, other=0.0)
    w += tl.dot(turned, r_tile.to(tl.float32), input_precision=LATENT_PRECISION)
    w_n = w.to(w_tile.dtype)

    shift = tl.zeros((1, BLOCK_N), tl.float32)
    if bias is not None:
        if BIAS_OF_SAMPLE:
            shift = load_columns(bias + n * out_channels, cols, in_cols)
        else:
            shift = load_columns(bias, cols, in_cols)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for step in range(CHUNK):
        rows = (chunk * CHUNK + step) * BLOCK_M + tl.arange(0, BLOCK_M)
        in_rows = rows < pixels
        x_at = n * x_sample * X_UNIT + offsets(rows, k, x_step, X_UNIT, X_LAST)
        x_tile = tl.load(x + x_at, mask=in_rows[:, None] & in_k[None, :], other=0.0)
        acc = tl.dot(x_tile, w_n, input_precision=PRECISION) + shift
        inside = in_rows[:, None] & in_cols[None, :]
        if residual is not None:
            residual_at = n * residual_sample * RESIDUAL_UNIT + offsets(
                rows, cols, residual_step, RESIDUAL_UNIT, RESIDUAL_LAST
            )
            acc += tl.load(residual + residual_at, mask=inside, other=0.0).to(tl.float32)
        acc = activate(acc, ACTIVATION)
        out_at = n * out_sample * OUT_UNIT + offsets(rows, cols, out_step, OUT_UNIT, OUT_LAST)
        tl.store(out + out_at, acc.to(out.dtype.element_ty), mask=inside)
        if sums is not None:
            total += tl.sum(tl.where(inside, acc, 0.0), 0)
    if sums is not None:
        tl.store(sums + (n * chunks + chunk) * out_channels + cols, total, mask=in_cols)


def run(
    x: Image,
    weight: Tensor,
    left: Tensor,
    phi: Tensor,
    right: Tensor,
    lam: Tensor | None,
    y: Image,
    *,
    bias: Tensor | None,
    residual: Image | None,
    activation: int,
    pooled: bool,
) -> Tensor | None:
    """Launches the kernel; what is None is absent. Returns the channel sums (N, chunks, OUT) if pooled."""
    input = x.tensor
    batch, in_channels = input.shape[:2]
    pixels, out_channels, latent = pixels_of(input), weight.shape[0], phi.shape[1]
    strides, constants = image_arguments(x=x, residual=residual, out=y)
    pixel_unit, in_unit, out_unit = unit(pixels), unit(in_channels), unit(out_channels)
    weight = weight.contiguous()
    lam = None if lam is None else lam.contiguous()
    bias = None if bias is None else bias.contiguous()
    sums: list[Tensor | None] = [None]

    def start(config: Config) -> None:
        block_m, block_n, block_k, num_warps, num_stages = config
        chunks = -(-pixels // (block_m * _CHUNK))
        if pooled:
            sums[0] = input.new_empty((batch, chunks, out_channels), dtype=torch.float32)
        arguments = {
            "x": input,
            "weight": weight,
            "left": left,
            "phi": phi,
            "right": right,
            "lam": lam,
            "bias": bias,
            "residual": tensor_of(residual),
            "out": y.tensor,
            "sums": sums[0],
            "pixel_units": pixels // pixel_unit,
            "in_units": in_channels // in_unit,
            "out_units": out_channels // out_unit,
            **strides,
            "PIXEL_UNIT": pixel_unit,
            "IN_CHANNEL_UNIT": in_unit,
            "OUT_CHANNEL_UNIT": out_unit,
            **constants,
            "BIAS_OF_SAMPLE": bias is not None and bias.dim() == 2,
            "ACTIVATION": activation,
            "L": latent,
            "L_PADDED": padded(latent),
            "PRECISION": precision.of_products(input),
            "LATENT_PRECISION": precision.of_latents(input),
            "CHUNK": _CHUNK,
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
            "BLOCK_K": block_k,
        }
        grid = (batch * chunks * -(-out_channels // block_n),)
        launch(synthesised, grid, arguments, num_warps, num_stages)

    key = (
        *(str(input.dtype)[6:], in_channels, out_channels, latent, int(lam is not None)),
        *(int(x.last), bucket(batch * pixels), pixel_unit, int(pooled)),
    )
    deep = tuple(c for c in CONFIGS if c.block_k == padded(in_channels))
    if input.dtype == torch.float32:  # as in product.py
        deep = tuple(c for c in deep if c.block_m * c.block_n <= 1024 * c.num_warps)
    candidates = fitting(deep, pixels, max(out_channels, 32), in_channels)
    start(choose("synthesised", key, candidates, start))
    return sums[0]
