# SPDX-License-Identifier: BSD-3-Clause
"""Gradients that are sums over pixels: of W0, λ, P, Q and Φ.

All of them are products A_n B_nᵀ over a sample's pixels: S_n = G xᵀ gives dW0 = Σ λ⊙S and dλ = rowsum(S⊙W0);
with h = ΦQᵀx and s = ΦᵀPᵀG, which product.py stores, dP = Σ G hᵀ and dQ = Σ x sᵀ; dΦ_n = (PᵀG)(Qᵀx)ᵀ.
S_n never leaves the chip. A program owns one tile and a run of samples; the runs' sums are float32 and are
added in a fixed order by `add_runs`, so that the same inputs and tile always give the same bits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import precision
from .launch import Image, image_arguments, launch, padded, pixels_of, unit
from .tile import offsets
from .tuning import MULTIPROCESSORS, Config, bucket, choose, fitting

CONFIGS = (
    Config(64, 64, 64, 4, 3),
    Config(64, 128, 64, 8, 3),
    Config(128, 64, 64, 8, 3),
    Config(64, 32, 64, 4, 3),
    Config(32, 64, 64, 4, 3),
    Config(64, 16, 64, 4, 3),
    Config(16, 64, 64, 4, 3),
    Config(16, 16, 64, 4, 3),
)
# 64 rows and columns at least, however few the channels: products of other sizes run on other matrix
# instructions, and a loop with both kinds waits for each. Eight warps, for the four accumulators, which leave
# no room for a larger tile on sm_80.
FUSED_CONFIGS = (Config(64, 64, 64, 8, 3),)
_FUSED_SINGLE_CONFIGS = (Config(64, 64, 16, 8, 3),)  # for float32, whose operands take twice the registers
_SINGLE_CONFIGS = (FUSED_CONFIGS[0], *(c for c in CONFIGS if c.block_m * c.block_n <= 2048))  # for float32
WIDEST_FUSED = 16  # latent channels up to which dP and dQ ride along with dW0 for less than reading again
_RUNS, _BLOCK = 16, 128  # of add_runs
_PROGRAMS = 2 * MULTIPROCESSORS  # what a split of a sum over samples aims at


@triton.jit
def pixel_sums(
    a,  # (N, A, pixels)
    b,  # (N, B, pixels)
    lam,  # (N, A): scales each sample's sum; or None
    weight,  # (A, B): W0, for dλ
    h,  # (N, pixels, L), where FUSED
    s,  # (N, pixels, L), where FUSED
    runs,  # (runs, A·B [+ A·L + B·L]) float32: stores Σ λ_n ⊙ A_n B_nᵀ [, Σ A_n h_nᵀ, Σ B_n s_nᵀ] of a run
    rows,  # (B tiles, N, A) float32: stores rowsum(A_n B_nᵀ ⊙ weight) over a tile's columns
    batch,
    samples,  # of a run
    run_size,
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
    FUSED: tl.constexpr,
    L: tl.constexpr,
    L_PADDED: tl.constexpr,
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
    run = tl.program_id(0) // b_tiles // a_tiles
    i = a_tile * BLOCK_A + tl.arange(0, BLOCK_A)
    j = b_tile * BLOCK_B + tl.arange(0, BLOCK_B)
    in_i = i < a_channels
    in_j = j < b_channels
    in_ij = in_i[:, None] & in_j[None, :]
    latents = tl.arange(0, L_PADDED)
    in_latents = latents < L

    per_sample: tl.constexpr = lam is not None or rows is not None
    acc = tl.zeros((BLOCK_A, BLOCK_B), tl.float32)
    if per_sample:
        own = tl.zeros((BLOCK_A, BLOCK_B), tl.float32)
    if FUSED:
        acc_h = tl.zeros((BLOCK_A, L_PADDED), tl.float32)
        acc_s = tl.zeros((BLOCK_B, L_PADDED), tl.float32)
    first = run * samples
    last = tl.minimum(first + samples, batch)
    tiles = tl.cdiv(pixels, BLOCK_P)
    # one loop over samples and tiles, so that the next sample's loads start under this one's products
    for step in range(first * tiles, last * tiles):
        n = (step // tiles).to(tl.int64)
        tile = step % tiles
        p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
        in_p = p < pixels
        a_at = n * a_sample * A_UNIT + tl.trans(offsets(p, i, a_step, A_UNIT, A_LAST))
        b_at = n * b_sample * B_UNIT + offsets(p, j, b_step, B_UNIT, B_LAST)
        left = tl.load(a + a_at, mask=in_i[:, None] & in_p[None, :], other=0.0)
        right = tl.load(b + b_at, mask=in_p[:, None] & in_j[None, :], other=0.0)
        if per_sample:
            # before the first product of the step: registers that change between two of them stall the second
            if tile == 0:
                own = tl.zeros((BLOCK_A, BLOCK_B), tl.float32)
        if FUSED:
            l_at = (n * pixels + p)[:, None] * L + latents[None, :]
            in_l = in_p[:, None] & in_latents[None, :]
            h_tile = tl.load(h + l_at, mask=in_l, other=0.0)
            s_tile = tl.load(s + l_at, mask=in_l, other=0.0)
            acc_h = tl.dot(left, h_tile, acc_h, input_precision=PRECISION)
            acc_s = tl.dot(tl.trans(right), s_tile, acc_s, input_precision=PRECISION)
        if per_sample:
            own = tl.dot(left, right, own, input_precision=PRECISION)
            if tile == tiles - 1:
                if lam is not None:
                    scale = tl.load(lam + n * a_channels + i, mask=in_i, other=0.0).to(tl.float32)
                    acc += own * scale[:, None]
                else:
                    acc += own
                if rows is not None:
                    w_at = i[:, None] * b_channels + j[None, :]
                    w = tl.load(weight + w_at, mask=in_ij, other=0.0).to(tl.float32)
                    row = tl.sum(own * w, 1)
                    tl.store(rows + (b_tile * batch + n) * a_channels + i, row, mask=in_i)
        else:
            acc = tl.dot(left, right, acc, input_precision=PRECISION)

    if runs is not None:
        into = runs + run.to(tl.int64) * run_size
        tl.store(into + i[:, None] * b_channels + j[None, :], acc, mask=in_ij)
        if FUSED:
            # all programs of a row of tiles have the same sums with h, all of a column those with s
            into += a_channels * b_channels
            if b_tile == 0:
                h_at = i[:, None] * L + latents[None, :]
                tl.store(into + h_at, acc_h, mask=in_i[:, None] & in_latents[None, :])
            into += a_channels * L
            if a_tile == 0:
                s_at = j[:, None] * L + latents[None, :]
                tl.store(into + s_at, acc_s, mask=in_j[:, None] & in_latents[None, :])


@triton.jit
def add_runs(
    runs,  # (count, size) float32
    rows,  # (row_count, row_size) float32, or None
    first,  # (first_size,): stores the sums of the first columns
    second,  # (second_size,): of the next columns, or None
    third,  # (size - first_size - second_size,): of the rest, or None
    row_sums,  # (row_size,): stores the sums of rows, or None
    count,
    size,
    first_size,
    second_size,
    row_count,
    row_size,
    RUNS: tl.constexpr,  # added up at a time
    BLOCK: tl.constexpr,
):
    """Adds up what the programs of `pixel_sums` left, in their order, and rounds once."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if runs is not None:
        total = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, count, RUNS):
            run = start + tl.arange(0, RUNS)[:, None]
            run_at = run.to(tl.int64) * size + at[None, :]
            total += tl.sum(tl.load(runs + run_at, mask=(run < count) & (at < size)[None, :], other=0.0), 0)
        tl.store(first + at, total.to(first.dtype.element_ty), mask=at < first_size)
        if second is not None:
            end = first_size + second_size
            inside = (at >= first_size) & (at < end)
            tl.store(second + at - first_size, total.to(second.dtype.element_ty), mask=inside)
            tl.store(third + at - end, total.to(third.dtype.element_ty), mask=(at >= end) & (at < size))
    if rows is not None:
        row_total = tl.zeros((BLOCK,), tl.float32)
        for row in range(row_count):
            row_total += tl.load(
                rows + tl.full((), row_size, tl.int64) * row + at, mask=at < row_size, other=0.0
            )
        tl.store(row_sums + at, row_total.to(row_sums.dtype.element_ty), mask=at < row_size)


class Sums(NamedTuple):
    """What `sum_pixels` found; None for what was not asked for."""

    ab: Tensor | None  # (A, B) Σ_n λ_n ⊙ A_n B_nᵀ
    ah: Tensor | None  # (A, L) Σ_n A_n h_nᵀ
    bs: Tensor | None  # (B, L) Σ_n B_n s_nᵀ
    rows: Tensor | None  # (N, A) rowsum(A_n B_nᵀ ⊙ weight)


def sum_pixels(
    a: Image,
    b: Image,
    dtype: torch.dtype,
    *,
    lam: Tensor | None = None,
    weight: Tensor | None = None,
    h: Tensor | None = None,
    s: Tensor | None = None,
    wants_sums: bool = True,
    rows_dtype: torch.dtype | None = None,
) -> Sums:
    """Sums over all samples' pixels, in ``dtype``, and the rows' in ``rows_dtype`` where that is given."""
    batch, a_channels = a.tensor.shape[:2]
    b_channels = b.tensor.shape[1]
    made = a.tensor.new_empty
    ab = ah = bs = rows = None
    if wants_sums:
        ab = made((a_channels, b_channels), dtype=dtype)
    if h is not None:
        ah, bs = (made((channels, h.shape[2]), dtype=dtype) for channels in (a_channels, b_channels))
    if rows_dtype is not None:
        rows = made((batch, a_channels), dtype=rows_dtype)

    def start(config: Config) -> None:
        tiles = -(-a_channels // config.block_m) * -(-b_channels // config.block_n)
        samples = -(-batch // min(batch, -(-_PROGRAMS // tiles)))
        runs = row_runs = None
        if wants_sums:
            size = sum(t.numel() for t in (ab, ah, bs) if t is not None)
            runs = made((-(-batch // samples), size), dtype=torch.float32)
        if rows is not None:
            row_runs = made((-(-b_channels // config.block_n), rows.numel()), dtype=torch.float32)
        scaled = lam if wants_sums else None
        _pixel_sums(a, b, config, samples, runs, row_runs, scaled, weight, h, s)
        _add_runs(runs, row_runs, ab, ah, bs, rows)

    choice = (lam is not None, wants_sums, rows is not None)
    start(_choose(a, b, start, 0 if h is None else h.shape[2], *choice))
    return Sums(ab, ah, bs, rows)


def sample_sums(a: Image, b: Image) -> Tensor:
    """(N, A, B) float32: A_n B_nᵀ of every sample; for dΦ, where A and B are latent channels."""
    batch, a_channels = a.tensor.shape[:2]
    b_channels = b.tensor.shape[1]
    out = a.tensor.new_empty((batch, a_channels, b_channels), dtype=torch.float32)

    def start(config: Config) -> None:
        _pixel_sums(a, b, config, 1, out.flatten(1), None, None, None, None, None)

    start(_choose(a, b, start, 0, False, True, False))
    return out


def _choose(a: Image, b: Image, start, latent: int, *choice: bool) -> Config:
    (batch, a_channels), b_channels = a.tensor.shape[:2], b.tensor.shape[1]
    pixels = pixels_of(a.tensor)
    key = (
        *(
            str(a.tensor.dtype)[6:],
            a_channels,
            b_channels,
            latent,
            bucket(batch),
            bucket(pixels),
            unit(pixels),
        ),
        *(int(a.last), int(b.last), *map(int, choice)),
    )
    single = a.tensor.dtype == torch.float32
    if latent:
        configs, least = _FUSED_SINGLE_CONFIGS if single else FUSED_CONFIGS, 64
    else:
        configs, least = _SINGLE_CONFIGS if single else CONFIGS, 16
    sides = (max(channels, least) for channels in (a_channels, b_channels))
    return choose("pixel_sums", key, fitting(configs, *sides, configs[0].block_k), start)


def _pixel_sums(
    a: Image,
    b: Image,
    config: Config,
    samples: int,
    runs: Tensor | None,
    rows: Tensor | None,
    lam: Tensor | None,
    weight: Tensor | None,
    h: Tensor | None,
    s: Tensor | None,
) -> None:
    batch, a_channels = a.tensor.shape[:2]
    b_channels, pixels = b.tensor.shape[1], pixels_of(a.tensor)
    strides, constants = image_arguments(a=a, b=b)
    pixel_unit, a_unit, b_unit = unit(pixels), unit(a_channels), unit(b_channels)
    block_a, block_b, block_p, num_warps, num_stages = config
    # a tile in float32 takes twice the shared memory
    block_p = min(block_p, padded(pixels), 32 if a.tensor.dtype == torch.float32 else block_p)
    latent = 1 if h is None else h.shape[2]
    arguments = {
        "a": a.tensor,
        "b": b.tensor,
        "lam": None if lam is None else lam.contiguous(),
        "weight": None if rows is None else weight.contiguous(),
        "h": h,
        "s": s,
        "runs": runs,
        "rows": rows,
        "batch": batch,
        "samples": samples,
        "run_size": 0 if runs is None else runs.shape[1],
        "pixel_units": pixels // pixel_unit,
        "a_units": a_channels // a_unit,
        "b_units": b_channels // b_unit,
        **strides,
        "PIXEL_UNIT": pixel_unit,
        "A_CHANNEL_UNIT": a_unit,
        "B_CHANNEL_UNIT": b_unit,
        **constants,
        "FUSED": h is not None,
        "L": latent,
        "L_PADDED": padded(latent),
        "PRECISION": precision.of_products(a.tensor),
        "BLOCK_A": block_a,
        "BLOCK_B": block_b,
        "BLOCK_P": block_p,
    }
    tiles = -(-a_channels // block_a) * -(-b_channels // block_b)
    launch(pixel_sums, (tiles * -(-batch // samples),), arguments, num_warps, num_stages)


def _add_runs(
    runs: Tensor | None,
    rows: Tensor | None,
    first: Tensor | None,
    second: Tensor | None,
    third: Tensor | None,
    row_sums: Tensor | None,
) -> None:
    arguments = {
        "runs": runs,
        "rows": rows,
        "first": first,
        "second": second,
        "third": third,
        "row_sums": row_sums,
        "count": 0 if runs is None else runs.shape[0],
        "size": 0 if runs is None else runs.shape[1],
        "first_size": 0 if first is None else first.numel(),
        "second_size": 0 if second is None else second.numel(),
        "row_count": 0 if rows is None else rows.shape[0],
        "row_size": 0 if rows is None else rows.shape[1],
        "RUNS": _RUNS,
        "BLOCK": _BLOCK,
    }
    widest = max(partial.shape[1] for partial in (runs, rows) if partial is not None)
    launch(add_runs, (-(-widest // _BLOCK),), arguments, 4, 1)
