# SPDX-License-Identifier: BSD-3-Clause
"""The ops channel_sums and branch, the dynamic branch in two calls: fakes, gradients, entry points.

The gradients of the sums are here, those of branch in branch_gradients.py; all can be differentiated again.
There is no autocast rule: both take every dtype and compute in float32 (float64 where the sums are), and so
does the gradient, whatever region it is called in.
"""

import torch
from torch import Tensor

from . import autograd, branch_gradients
from .branch_gradients import GATES, LAM_ACTIVATIONS  # noqa: F401
from .calls import call

_TILE_PIXELS, _MAX_TILES = 512, 16  # csrc/branch.h: kPoolTilePixels, kPoolMaxTiles

_sums_op = torch.ops.dcd_kernels.channel_sums.default
_spread_op = torch.ops.dcd_kernels.quadrants_backward.default
_branch_op = torch.ops.dcd_kernels.branch.default


def _tiles(pixels):
    """How many partial sums there are, which depends on the number of pixels alone."""
    return torch.sym_max(1, torch.sym_min(_MAX_TILES, (pixels + _TILE_PIXELS - 1) // _TILE_PIXELS))


def _pixels(shape):
    pixels = 1
    for size in shape[2:]:
        pixels = pixels * size
    return pixels


def _half_up(size):
    return (size + 1) // 2


def _quadrant_tile_rows(height, width):
    """Rows of each bin in a tile: csrc/branch.h, quadrant_tile_rows."""
    across = torch.sym_max(1, _half_up(width))
    few_tiles = (_half_up(height) + _MAX_TILES - 1) // _MAX_TILES
    return torch.sym_max((_TILE_PIXELS // 4 + across - 1) // across, few_tiles)


def _quadrant_tiles(height, width):
    rows = _quadrant_tile_rows(height, width)
    return torch.sym_max(1, (_half_up(height) + rows - 1) // rows)


def _sums_fake(input: Tensor, bins: int) -> Tensor:
    batch, channels = input.shape[:2]
    dtype = torch.promote_types(input.dtype, torch.float32)
    tiles = _tiles(_pixels(input.shape)) if bins == 1 else _quadrant_tiles(*input.shape[2:])
    return input.new_empty((batch, tiles, channels * bins * bins), dtype=dtype)


def _sums_setup(ctx, inputs, output):
    input, ctx.bins = inputs
    ctx.input_shape, ctx.input_dtype = input.shape, input.dtype
    if ctx.bins > 1:  # with one the gradient is an expanded view, which has no layout
        ctx.channels_last = not input.is_contiguous() and input.stride(1) == 1 and input.shape[1] > 1


def _sums_backward(ctx, grad):
    shape = ctx.input_shape
    tiles = grad.shape[1]
    if ctx.bins > 1:
        args = grad[:, :1] if grad.stride(1) == 0 else grad, *shape[2:], ctx.channels_last
        if grad.is_cpu and not torch.is_grad_enabled() and not autograd.is_traced():
            return _spread_op(*args).to(ctx.input_dtype), None
        return _spread_quadrants(*args, ctx.input_dtype), None
    grad = grad.to(ctx.input_dtype)
    # Whoever adds up the tiles sends back one gradient for all of them, expanded: then so is the image's.
    if tiles == 1 or grad.stride(1) == 0:
        spread = grad[:, 0].reshape(*shape[:2], *[1] * (len(shape) - 2))
        return spread.expand(shape), None
    pixels = _pixels(shape)
    size = (((pixels + tiles - 1) // tiles) + 7) // 8 * 8
    return grad.mT.repeat_interleave(size, 2)[:, :, :pixels].reshape(shape), None


def _spread_quadrants(grad: Tensor, height, width, channels_last: bool, dtype=None) -> Tensor:
    """The image's gradient, in ``dtype``, from that of its quadrants' sums.

    grad (N, T, 4C), T = 1 for one gradient of all tiles.
    """
    batch, tiles, channels = grad.shape[0], grad.shape[1], grad.shape[2] // 4
    rows = _half_up(height)
    grad = grad.reshape(batch, tiles, channels, 2, 2)
    if tiles == 1:
        grad = grad.expand(batch, rows, channels, 2, 2)
    else:
        grad = grad.repeat_interleave(_quadrant_tile_rows(height, width), 1)[:, :rows]
    # In the order in which the image lies, so that it is written once, in its own layout; both bin columns
    # are a dimension in front.
    grad = grad.permute(3, 4, 0, 1, 2)
    axis = 2
    if not channels_last:
        grad, axis = grad.transpose(3, 4), 3
    top, bottom = grad.unbind(0)
    half = height // 2
    if height % 2:  # the bins share the middle row
        shared = top.narrow(axis, half, 1) + bottom.narrow(axis, 0, 1)
        parts = [top.narrow(axis, 0, half), shared, bottom.narrow(axis, 1, half)]
    else:
        parts = [top, bottom]
    left, right = torch.cat(parts, axis).unsqueeze(axis + 1).unbind(0)
    half = width // 2
    parts = [(left, half), (left + right, 1), (right, half)] if width % 2 else [(left, half), (right, half)]
    sizes = [-1] * 4
    spread = []
    for part, size in parts:
        sizes[axis] = size
        spread.append(part.to(dtype or grad.dtype).expand(sizes))
    image = torch.cat(spread, axis)
    return image.permute(0, 3, 1, 2) if channels_last else image


def _spread_fake(grad: Tensor, height, width, channels_last: bool) -> Tensor:
    shape = (grad.shape[0], grad.shape[2] // 4, height, width)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=layout)


def _branch_fake(
    sums, scale, squeeze, squeeze_bias, gate, gate_bias, expand, expand_bias, phi, phi_bias, lam_channels, *_
):
    batch, others = sums.shape[0], expand.shape[0] - lam_channels
    if phi is not None:
        others = phi.shape[0]
    return sums.new_empty((batch, lam_channels)), sums.new_empty((batch, others))


def register(library: torch.library.Library) -> None:
    """Registers the fake implementations and the gradients."""
    global _sums_function, _branch_function
    torch.library.register_fake("dcd_kernels::channel_sums", _sums_fake, lib=library)
    torch.library.register_fake("dcd_kernels::quadrants_backward", _spread_fake, lib=library)
    torch.library.register_fake("dcd_kernels::branch", _branch_fake, lib=library)
    autograd.register_composition(library, _spread_op, _spread_quadrants)
    _sums_function = autograd.register_op(library, _sums_op, (_sums_setup, _sums_backward))
    formula = branch_gradients.setup_context, branch_gradients.backward
    _branch_function = autograd.register_op(library, _branch_op, formula)
    branch_gradients.register(library)


def channel_sums(input: Tensor, bins: int = 1) -> Tensor:
    """Sums over each sample's pixels, in parts: the pooling that `branch` finishes.

    input (N, C, *spatial) with at least one spatial dimension, in any layout (contiguous and channels-last
    images are read in place), float32, float16, bfloat16, and on the CPU float64.

    Returns (N, T, C) in float32 (float64 for float64): the sum over T is that over the pixels, and T is their
    number over 512, rounded up, at least 1 and at most 16.

    With bins = 2 and input (N, C, H, W): the sums over the four bins of adaptive pooling to 2×2, (N, T, 4C)
    in the order of ``adaptive_avg_pool2d(input, 2).flatten(1)``. Bin i of H is [⌊iH/2⌋, ⌈(i+1)H/2⌉): the two
    share the middle of an odd size and are both ⌈H/2⌉ long, so all four bins have ⌈H/2⌉·⌈W/2⌉ pixels.

    Raises RuntimeError for other ranks, dtypes and bins.
    """
    return call(_sums_op, _sums_function, input, bins)


def branch(
    sums: Tensor,
    scale: float,
    squeeze_weight: Tensor,
    squeeze_bias: Tensor | None,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    expand_weight: Tensor,
    expand_bias: Tensor | None,
    phi_weight: Tensor | None,
    phi_bias: Tensor | None,
    lam_channels: int,
    gate: int,
    lam_activation: int,
) -> tuple[Tensor, Tensor]:
    """λ and Φ from channel sums, the branch of Section 3.4 and Figure 2 behind its pooling::

        x = scale · Σ_t sums_t        h = gate(squeeze x)        (logits of λ, Φ) = expand h

    sums (N, T, I) in float32 or, on the CPU, float64; scale is 1 over the number of pixels of a bin;
    squeeze_weight (S, I), gate_weight (S, S) for the gate 'se' and for no other, expand_weight
    (lam_channels + ∏Φ, S), each with a bias or None; these all of one dtype, float32, float16 or bfloat16.
    Where λ and Φ come from FCs of their own, expand_weight is λ's, (lam_channels, S), and phi_weight
    (∏Φ, S) the other one's, with the bias phi_bias or None.
    gate and lam_activation are places in `GATES` and `LAM_ACTIVATIONS`, whose formulas are those of
    `dcd_kernels.nn.DynamicBranch`.

    Returns lam (N, lam_channels) and Φ (N, ∏Φ), flat, in the dtype of the sums, in which everything is
    computed. Raises RuntimeError for what does not fit together; on CUDA also for I > 8192 and S > 1024.
    """
    return call(
        _branch_op,
        _branch_function,
        sums,
        scale,
        squeeze_weight,
        squeeze_bias,
        gate_weight,
        gate_bias,
        expand_weight,
        expand_bias,
        phi_weight,
        phi_bias,
        lam_channels,
        gate,
        lam_activation,
    )
