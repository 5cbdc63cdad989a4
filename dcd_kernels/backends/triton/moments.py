# SPDX-License-Identifier: BSD-3-Clause
"""Mean and centred covariance of z = Qᵀx over a sample's pixels, one pass over x, z never in memory.

Raw second moments in float32 lose every digit once the mean is some thousand standard deviations; each tile
is centred on its own mean, and the tiles are merged afterwards (Chan, Golub and LeVeque).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import precision
from .launch import image, image_arguments, launch, padded, pixels_of, unit
from .tile import offsets
from .tuning import Config

CONFIGS = (Config(128, 0, 32, 4, 3),)


@triton.jit
def tile_moments(
    x,  # (N, K, pixels)
    left,  # (K, L)
    means,  # (N, tiles, L) float32
    scatters,  # (N, tiles, L, L) float32: stores Σ (z - mean)(z - mean)ᵀ over the tile
    pixel_units,
    in_units,
    x_sample,
    x_step,
    PIXEL_UNIT: tl.constexpr,
    IN_CHANNEL_UNIT: tl.constexpr,
    X_UNIT: tl.constexpr,
    X_LAST: tl.constexpr,
    L: tl.constexpr,
    L_PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
    LATENT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    pixels = pixel_units * PIXEL_UNIT
    in_channels = in_units * IN_CHANNEL_UNIT
    tiles = tl.cdiv(pixels, BLOCK_M)
    slot = tl.program_id(0).to(tl.int64)
    n = slot // tiles
    start_row = (tl.program_id(0) % tiles) * BLOCK_M
    rows = start_row + tl.arange(0, BLOCK_M)
    in_rows = rows < pixels
    latents = tl.arange(0, L_PADDED)
    in_latents = latents < L
    z = tl.zeros((BLOCK_M, L_PADDED), tl.float32)
    for start in range(0, in_channels, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        in_k = k < in_channels
        x_at = n * x_sample * X_UNIT + offsets(rows, k, x_step, X_UNIT, X_LAST)
        x_tile = tl.load(x + x_at, mask=in_rows[:, None] & in_k[None, :], other=0.0)
        l_mask = in_k[:, None] & in_latents[None, :]
        l_tile = tl.load(left + k[:, None] * L + latents[None, :], mask=l_mask, other=0.0)
        z = tl.dot(x_tile, l_tile, z, input_precision=PRECISION)
    count = tl.minimum(pixels - start_row, BLOCK_M).to(tl.float32)
    mean = tl.sum(z, 0) / count  # rows outside are zero
    centred = tl.where(in_rows[:, None], z - mean[None, :], 0.0)
    scatter = tl.dot(tl.trans(centred), centred, input_precision=LATENT_PRECISION)
    tl.store(means + slot * L + latents, mean, mask=in_latents)
    at = latents[:, None] * L + latents[None, :]
    tl.store(scatters + slot * (L * L) + at, scatter, mask=in_latents[:, None] & in_latents[None, :])


def run(input: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (N, L) and covariance (N, L, L) of Qᵀx over pixels, float32, merged from those of the tiles."""
    batch, in_channels = input.shape[:2]
    pixels, latent = pixels_of(input), q.shape[1]
    x = image(input)
    strides, constants = image_arguments(x=x)
    pixel_unit, in_unit = unit(pixels), unit(in_channels)
    block_m, _, block_k, num_warps, num_stages = CONFIGS[0]
    block_m, block_k = min(block_m, padded(pixels)), min(block_k, padded(in_channels))
    tiles = -(-pixels // block_m)
    means = input.new_empty((batch, tiles, latent), dtype=torch.float32)
    scatters = input.new_empty((batch, tiles, latent, latent), dtype=torch.float32)
    arguments = {
        "x": x.tensor,
        "left": q.contiguous(),
        "means": means,
        "scatters": scatters,
        "pixel_units": pixels // pixel_unit,
        "in_units": in_channels // in_unit,
        **strides,
        "PIXEL_UNIT": pixel_unit,
        "IN_CHANNEL_UNIT": in_unit,
        **constants,
        "L": latent,
        "L_PADDED": padded(latent),
        # a mean of a thousand deviations leaves no digits to tf32
        "PRECISION": "ieee",
        "LATENT_PRECISION": precision.of_latents(input),
        "BLOCK_M": block_m,
        "BLOCK_K": block_k,
    }
    launch(tile_moments, (batch * tiles,), arguments, num_warps, num_stages)
    counts = means.new_full((tiles,), block_m)
    counts[-1] = pixels - block_m * (tiles - 1)
    share = (counts / pixels)[:, None]
    mean = (means * share).sum(1)
    apart = means - mean.unsqueeze(1)
    between = torch.einsum("nta,ntb->nab", apart * share, apart)
    return mean, scatters.sum(1) / pixels + between
