# SPDX-License-Identifier: BSD-3-Clause
"""y = act(λ⊙(W0 x) + P Φ Qᵀ x + bias + residual), factored (Eqs. 5 to 7), and its transpose for dX.

Each program makes one tile of pixels × output channels. Qᵀx and ΦQᵀx are formed on chip beside W0 x, from the
same tile of x, so that x is read once and neither product goes through memory.

The transpose, dX = W0ᵀ(λ⊙G) + Q Φᵀ Pᵀ G, is the same kernel with P and Q exchanged and λ on the reduction
axis of the static product only.
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

# STATIC: where the static term comes from
ABSENT, COMPUTED, GIVEN = 0, 1, 2
# LAM: which axis λ scales
NO_LAM, LAM_ON_OUTPUT, LAM_ON_INPUT = 0, 1, 2

# The first that fits a layer is what runs untuned, so it suits every device.
CONFIGS = (
    Config(128, 64, 64, 4, 3),
    Config(128, 128, 64, 8, 3),
    Config(128, 64, 64, 8, 3),
    Config(64, 64, 64, 4, 3),
    Config(128, 64, 32, 4, 3),
    Config(128, 32, 64, 4, 3),
    Config(128, 32, 32, 4, 3),
    Config(128, 16, 64, 4, 3),
    Config(128, 64, 16, 4, 3),
    Config(128, 32, 16, 4, 3),
    Config(128, 16, 16, 4, 3),
    Config(64, 32, 32, 4, 3),
    Config(32, 32, 64, 4, 3),
    Config(32, 32, 16, 4, 3),
    Config(16, 64, 64, 4, 3),
    Config(16, 16, 64, 4, 3),
    Config(16, 16, 16, 4, 3),
)
_SMALLEST = 32  # pixels from which λ on the reduction axis gets tiles of one sample each, see the kernel
# Four warps hold 1024 sums each at most beside a wide latent, or in float32, whose operands are as wide.
_ROOMY_CONFIGS = tuple(c for c in CONFIGS if c.block_m * c.block_n <= 1024 * c.num_warps)
# Where rows begin anywhere, every element has an address of its own in registers as well.
_SCATTERED_CONFIGS = (
    Config(64, 64, 64, 8, 3),
    Config(64, 32, 64, 8, 3),
    Config(64, 32, 64, 4, 3),
    Config(64, 16, 64, 4, 3),
    *(c for c in CONFIGS if c.block_m <= 64 and c.block_m * c.block_n <= 2048),
)
_SAMPLES = 16  # that a tile may run through, one after the other
_WASTE = 1.1  # tiles may overhang the maps by this much before they run on from sample to sample


@triton.jit
def product(
    x,  # (N, K, pixels)
    weight,  # (OUT, K), or (K, OUT) where TRANSPOSED
    left,  # (K, L_IN): what the latent is projected with; None: x is the latent itself
    phi,  # (N, L_OUT, L_IN), or (N, L_IN, L_OUT) where TRANSPOSED
    right,  # (OUT, L_OUT): what takes the latent to the output channels
    lam,  # (N, OUT), or (N, K) for LAM_ON_INPUT
    bias,  # (OUT,), or (N, OUT) where BIAS_OF_SAMPLE
    residual,  # (N, OUT, pixels)
    static,  # (N, OUT, pixels): the static term where it is GIVEN
    out,  # (N, OUT, pixels)
    latent,  # (N, pixels, L_IN): stores the projection, for the coefficients' gradients
    mixed,  # (N, pixels, L_OUT): stores Φ times it
    sums,  # (N, tiles, OUT) float32: stores each tile's channel sums of the output
    batch,
    pixel_units,
    in_units,
    out_units,
    x_sample,
    x_step,
    residual_sample,
    residual_step,
    static_sample,
    static_step,
    out_sample,
    out_step,
    PIXEL_UNIT: tl.constexpr,
    IN_CHANNEL_UNIT: tl.constexpr,
    OUT_CHANNEL_UNIT: tl.constexpr,
    X_UNIT: tl.constexpr,
    X_LAST: tl.constexpr,
    RESIDUAL_UNIT: tl.constexpr,
    RESIDUAL_LAST: tl.constexpr,
    STATIC_UNIT: tl.constexpr,
    STATIC_LAST: tl.constexpr,
    OUT_UNIT: tl.constexpr,
    OUT_LAST: tl.constexpr,
    STATIC: tl.constexpr,
    LAM: tl.constexpr,
    BIAS_OF_SAMPLE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    L_IN: tl.constexpr,
    L_OUT: tl.constexpr,
    L_IN_PADDED: tl.constexpr,
    L_OUT_PADDED: tl.constexpr,
    PRECISION: tl.constexpr,  # of float32 products with an image
    LATENT_PRECISION: tl.constexpr,  # of Φ, which stays float32 beside half-precision images
    FLAT: tl.constexpr,  # tiles run on from sample to sample
    EVEN_IN: tl.constexpr,
    EVEN_OUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    pixels = pixel_units * PIXEL_UNIT
    in_channels = in_units * IN_CHANNEL_UNIT
    out_channels = out_units * OUT_CHANNEL_UNIT
    out_tiles = tl.cdiv(out_channels, BLOCK_N)
    # neighbours share a tile of x, which the second one finds in the L2 cache
    column = tl.program_id(0) % out_tiles
    tile = tl.program_id(0) // out_tiles
    cols = column * BLOCK_N + tl.arange(0, BLOCK_N)
    in_cols = cols < out_channels

    if FLAT:
        row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        in_rows = row < batch * pixels
        first = (tile * BLOCK_M) // pixels
        last = tl.minimum(tile * BLOCK_M + BLOCK_M - 1, batch * pixels - 1) // pixels
        # rows behind the end belong to the last sample, so that every address is one of the image's
        sample = tl.minimum(row // pixels, batch - 1)
        rows = row % pixels
        base = sample.to(tl.int64)[:, None]
    else:
        tiles = tl.cdiv(pixels, BLOCK_M)
        first = tile // tiles
        last = first
        rows = (tile % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
        in_rows = rows < pixels
        base = first.to(tl.int64)

    low_rank: tl.constexpr = right is not None
    projects: tl.constexpr = left is not None
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if projects:
        z = tl.zeros((BLOCK_M, L_IN_PADDED), tl.float32)
    latents = tl.arange(0, L_IN_PADDED)

    if STATIC == 1 or projects:
        x_base = x + base * x_sample * X_UNIT
        for start in range(0, in_channels, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            in_k = (k < in_channels) | EVEN_IN
            x_tile = tl.load(
                x_base + offsets(rows, k, x_step, X_UNIT, X_LAST),
                mask=in_rows[:, None] & in_k[None, :],
                other=0.0,
            )
            if STATIC == 1:
                if TRANSPOSED:
                    w_at = k[:, None] * out_channels + cols[None, :]
                else:
                    w_at = cols[None, :] * in_channels + k[:, None]
                w_tile = tl.load(weight + w_at, mask=in_k[:, None] & (in_cols | EVEN_OUT)[None, :], other=0.0)
                scaled = x_tile
                if LAM == 2:
                    if FLAT:
                        lam_at = base * in_channels + k[None, :]
                        scale = tl.load(lam + lam_at, mask=in_k[None, :], other=0.0).to(tl.float32)
                        scaled = (x_tile.to(tl.float32) * scale).to(x_tile.dtype)
                    else:
                        # x stays as it was copied to shared memory, where both products read it
                        scale = tl.load(lam + base * in_channels + k, mask=in_k, other=0.0).to(tl.float32)
                        w_tile = (w_tile.to(tl.float32) * scale[:, None]).to(w_tile.dtype)
                acc = tl.dot(scaled, w_tile, acc, input_precision=PRECISION)
            if projects:
                l_at = k[:, None] * L_IN + latents[None, :]
                l_tile = tl.load(left + l_at, mask=in_k[:, None] & (latents < L_IN)[None, :], other=0.0)
                z = tl.dot(x_tile, l_tile, z, input_precision=PRECISION)

    mixes: tl.constexpr = low_rank or mixed is not None
    if mixes and not projects:
        z_at = base * x_sample * X_UNIT + offsets(rows, latents, x_step, X_UNIT, X_LAST)
        z = tl.load(x + z_at, mask=in_rows[:, None] & (latents < L_IN)[None, :], other=0.0).to(tl.float32)

    if STATIC == 2:
        static_at = base * static_sample * STATIC_UNIT + offsets(
            rows, cols, static_step, STATIC_UNIT, STATIC_LAST
        )
        acc = tl.load(static + static_at, mask=in_rows[:, None] & in_cols[None, :], other=0.0).to(tl.float32)

    if projects and latent is not None:
        if column == 0:
            z_row = base * pixels + rows[:, None]
            tl.store(
                latent + z_row * L_IN + latents[None, :],
                z.to(latent.dtype.element_ty),
                mask=in_rows[:, None] & (latents < L_IN)[None, :],
            )

    # What differs from sample to sample: Φ, λ, a bias. One sample a tile unless FLAT.
    if mixes:
        outs = tl.arange(0, L_OUT_PADDED)
        if TRANSPOSED:
            phi_at = latents[:, None] * L_OUT + outs[None, :]
        else:
            phi_at = outs[None, :] * L_IN + latents[:, None]
        in_phi = (latents < L_IN)[:, None] & (outs < L_OUT)[None, :]
        mix = tl.zeros((BLOCK_M, L_OUT_PADDED), tl.float32)
    phi_size = tl.full((), L_IN * L_OUT, tl.int64)
    zero = tl.full((), 0, tl.int64)  # n counts in 32 bits, N·OUT may not fit them
    if mixes or LAM == 1 or BIAS_OF_SAMPLE:
        for n in range(first, last + 1):
            if FLAT:
                own = (sample == n)[:, None]
            if mixes:
                phi_tile = tl.load(phi + n * phi_size + phi_at, mask=in_phi, other=0.0)
                turned = tl.dot(z, phi_tile.to(tl.float32), input_precision=LATENT_PRECISION)
                if FLAT:
                    mix = tl.where(own, turned, mix)
                else:
                    mix = turned
            if LAM == 1 or BIAS_OF_SAMPLE:
                changed = acc
                if LAM == 1:
                    changed = changed * load_columns(lam + (n + zero) * out_channels, cols, in_cols)
                if BIAS_OF_SAMPLE:
                    changed = changed + load_columns(bias + (n + zero) * out_channels, cols, in_cols)
                if FLAT:
                    acc = tl.where(own, changed, acc)
                else:
                    acc = changed

    if mixed is not None:
        if column == 0:
            m_row = base * pixels + rows[:, None]
            tl.store(
                mixed + m_row * L_OUT + outs[None, :],
                mix.to(mixed.dtype.element_ty),
                mask=in_rows[:, None] & (outs < L_OUT)[None, :],
            )
    if low_rank:
        r_at = cols[None, :] * L_OUT + outs[:, None]
        r_tile = tl.load(right + r_at, mask=in_cols[None, :] & (outs < L_OUT)[:, None], other=0.0)
        acc = tl.dot(mix.to(r_tile.dtype), r_tile, acc, input_precision=PRECISION)

    if bias is not None and not BIAS_OF_SAMPLE:
        acc += load_columns(bias, cols, in_cols)
    inside = in_rows[:, None] & in_cols[None, :]
    if residual is not None:
        residual_at = base * residual_sample * RESIDUAL_UNIT + offsets(
            rows, cols, residual_step, RESIDUAL_UNIT, RESIDUAL_LAST
        )
        acc += tl.load(residual + residual_at, mask=inside, other=0.0).to(tl.float32)
    acc = activate(acc, ACTIVATION)
    if out is not None:
        out_at = base * out_sample * OUT_UNIT + offsets(rows, cols, out_step, OUT_UNIT, OUT_LAST)
        tl.store(out + out_at, acc.to(out.dtype.element_ty), mask=inside)
    if sums is not None:
        total = tl.sum(tl.where(inside, acc, 0.0), 0)
        tl.store(sums + tile.to(tl.int64) * out_channels + cols, total, mask=in_cols)


def run(
    x: Image,
    weight: Tensor | None,
    left: Tensor | None,
    phi: Tensor | None,
    right: Tensor | None,
    y: Image | None,
    *,
    lam: Tensor | None = None,
    scales: int = NO_LAM,
    bias: Tensor | None = None,
    residual: Image | None = None,
    activation: int = 0,
    static: int = ABSENT,
    given: Image | None = None,
    transpose: bool = False,
    latent: Tensor | None = None,
    mixed: Tensor | None = None,
    pooled: bool = False,
) -> Tensor | None:
    """Launches the kernel; what is None is absent. Returns the channel sums (N, tiles, OUT) if pooled.

    ``y`` None: only latent and mixed are made. ``given`` is the image of the static term where it is GIVEN.
    """
    input = x.tensor
    batch, in_channels = input.shape[:2]
    pixels = pixels_of(input)
    out_channels = 16 if y is None else y.tensor.shape[1]
    l_out, l_in = (1, 1) if phi is None else phi.shape[1:]
    if transpose:
        l_out, l_in = l_in, l_out
    bias_of_sample = bias is not None and bias.dim() == 2
    strides, constants = image_arguments(x=x, residual=residual, static=given, out=y)
    pixel_unit, in_unit, out_unit = unit(pixels), unit(in_channels), unit(out_channels)
    half = input.dtype != torch.float32
    if weight is not None:
        weight = weight.contiguous()
    lam = None if lam is None else lam.contiguous()
    bias = None if bias is None else bias.contiguous()
    sums: list[Tensor | None] = [None]

    def start(config: Config) -> None:
        block_m, block_n, block_k, num_warps, num_stages = config
        # a tile in float32 takes twice the shared memory
        block_k = block_k if half else min(block_k, 32)
        wasteful = -(-pixels // block_m) * block_m > _WASTE * pixels
        flat = wasteful and not pooled and (scales != LAM_ON_INPUT or pixels < _SMALLEST)
        rows = -(-batch * pixels // block_m) if flat else batch * -(-pixels // block_m)
        if pooled:
            sums[0] = input.new_empty((batch, rows // batch, out_channels), dtype=torch.float32)
        arguments = {
            "x": input,
            "weight": weight,
            "left": left,
            "phi": phi,
            "right": right,
            "lam": lam,
            "bias": bias,
            "residual": tensor_of(residual),
            "static": tensor_of(given),
            "out": tensor_of(y),
            "latent": latent,
            "mixed": mixed,
            "sums": sums[0],
            "batch": batch,
            "pixel_units": pixels // pixel_unit,
            "in_units": in_channels // in_unit,
            "out_units": out_channels // out_unit,
            **strides,
            "PIXEL_UNIT": pixel_unit,
            "IN_CHANNEL_UNIT": in_unit,
            "OUT_CHANNEL_UNIT": out_unit,
            **constants,
            "STATIC": static,
            "LAM": scales,
            "BIAS_OF_SAMPLE": bias_of_sample,
            "TRANSPOSED": transpose,
            "ACTIVATION": activation,
            "L_IN": l_in,
            "L_OUT": l_out,
            "L_IN_PADDED": padded(l_in),
            "L_OUT_PADDED": padded(l_out),
            "PRECISION": precision.of_products(input),
            "LATENT_PRECISION": precision.of_latents(input),
            "FLAT": flat,
            "EVEN_IN": in_channels % block_k == 0,
            "EVEN_OUT": out_channels % block_n == 0,
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
            "BLOCK_K": block_k,
        }
        launch(product, (rows * -(-out_channels // block_n),), arguments, num_warps, num_stages)

    alone = pooled or (scales == LAM_ON_INPUT and pixels >= _SMALLEST)
    widest = pixels if alone else min(batch, _SAMPLES) * pixels
    if pixel_unit * input.element_size() < 8 and not (x.last and (y is None or y.last)):
        configs = _SCATTERED_CONFIGS[max(l_in, l_out) > 16 :]  # the first has no room for a wide latent
    else:
        # sums over pixels beside the tile, or a latent term alone, take more registers than sm_80 has
        tight = pooled or static == ABSENT
        configs = CONFIGS if half and not tight and max(l_in, l_out) <= 16 else _ROOMY_CONFIGS
    candidates = fitting(configs, widest, out_channels, in_channels, out_channels, batch * pixels)
    key = (
        *(str(input.dtype)[6:], in_channels, out_channels, l_in, l_out, static, scales, int(transpose)),
        *(int(x.last), bucket(batch * pixels), pixel_unit, int(pooled), int(y is None)),
        *(int(y is not None and y.last), bucket(widest), int(configs is CONFIGS)),
    )
    start(choose("product", key, candidates, start))
    return sums[0]
