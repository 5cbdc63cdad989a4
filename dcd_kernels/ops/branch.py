# SPDX-License-Identifier: BSD-3-Clause
"""The ops channel_sums and branch, the dynamic branch in two launches: fakes, gradients, entry points.

Their gradients are compositions of torch's own operations, which can be differentiated again. There is no
autocast rule: both take every dtype and compute in float32 (float64 where the sums are), and so does the
gradient, whatever region it is called in.
"""

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor

from . import autograd
from .calls import call

#: The codes of csrc/branch.h are the places in these.
GATES = (None, "relu", "relu6", "silu", "hardswish", "se")
LAM_ACTIVATIONS = (None, "hardsigmoid2", "sigmoid2", "hardsigmoid", "sigmoid")

_TILE_PIXELS, _MAX_TILES = 512, 16  # csrc/branch.h: kPoolTilePixels, kPoolMaxTiles

_sums_op = torch.ops.dcd_kernels.channel_sums.default
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
    if ctx.bins > 1:
        return _quadrants_backward(ctx, grad), None
    shape = ctx.input_shape
    tiles = grad.shape[1]
    grad = grad.to(ctx.input_dtype)
    # Whoever adds up the tiles sends back one gradient for all of them, expanded: then so is the image's.
    if tiles == 1 or grad.stride(1) == 0:
        spread = grad[:, 0].reshape(*shape[:2], *[1] * (len(shape) - 2))
        return spread.expand(shape), None
    pixels = _pixels(shape)
    size = (((pixels + tiles - 1) // tiles) + 7) // 8 * 8
    return grad.mT.repeat_interleave(size, 2)[:, :, :pixels].reshape(shape), None


def _quadrants_backward(ctx, grad: Tensor) -> Tensor:
    batch, channels, height, width = ctx.input_shape
    rows = _half_up(height)
    tiles = grad.shape[1]
    grad = grad.reshape(batch, tiles, channels, 2, 2)
    if tiles == 1 or grad.stride(1) == 0:
        grad = grad[:, :1].expand(batch, rows, channels, 2, 2)
    else:
        grad = grad.repeat_interleave(_quadrant_tile_rows(height, width), 1)[:, :rows]
    # In the order in which the image lies, so that it is written once, in its own layout; both bin columns
    # are a dimension in front.
    grad = grad.permute(3, 4, 0, 1, 2)
    axis = 2
    if not ctx.channels_last:
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
        spread.append(part.to(ctx.input_dtype).expand(sizes))
    image = torch.cat(spread, axis)
    return image.permute(0, 3, 1, 2) if ctx.channels_last else image


def _branch_fake(sums, scale, squeeze, squeeze_bias, gate, gate_bias, expand, expand_bias, lam_channels, *_):
    batch, coefficients = sums.shape[0], expand.shape[0]
    return sums.new_empty((batch, lam_channels)), sums.new_empty((batch, coefficients - lam_channels))


def _without_autocast(device_type: str):
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def _between(grad: Tensor, x: Tensor, low: float, high: float) -> Tensor:
    """``grad`` where low < x < high, else 0, in one kernel."""
    return torch.ops.aten.hardtanh_backward(grad, x, low, high)


def _gated(before: Tensor, code: int) -> Tensor:
    """The hidden units."""
    name = GATES[code]
    if name == "relu":
        return before.relu()
    if name == "relu6":
        return F.relu6(before)
    if name == "silu":
        return F.silu(before)
    if name == "hardswish":
        return before * F.relu6(before + 3) / 6
    return before


def _behind_gate(grad: Tensor, before: Tensor, code: int) -> Tensor:
    """The gradient before the gate, given that of the hidden units."""
    name = GATES[code]
    if name == "relu":
        return torch.ops.aten.threshold_backward(grad, before, 0)
    if name == "relu6":
        return _between(grad, before, 0, 6)
    if name == "silu":
        if not torch.is_grad_enabled():
            return torch.ops.aten.silu_backward(grad, before)
        sigmoid = before.sigmoid()  # aten's kernel has no derivative of its own
        return grad * (sigmoid * (1 + before * (1 - sigmoid)))
    if name == "hardswish":
        shifted = before + 3
        return (grad * F.relu6(shifted) + _between(grad * before, shifted, 0, 6)) / 6
    return grad


def _behind_lam(grad: Tensor, lam: Tensor, code: int) -> Tensor:
    """The gradient of the logits, given that of λ."""
    name = LAM_ACTIVATIONS[code]
    if name == "hardsigmoid2":
        return _between(grad, lam, 0, 2) / 3
    if name == "hardsigmoid":
        return _between(grad, lam, 0, 1) / 6
    if name == "sigmoid2":
        return grad * (lam * (1 - lam / 2))
    if name == "sigmoid":
        return grad * (lam * (1 - lam))
    return grad


def _branch_setup(ctx, inputs, outputs):
    sums, scale, squeeze, squeeze_bias, gate, gate_bias, expand, expand_bias = inputs[:8]
    ctx.set_materialize_grads(False)
    ctx.scale = scale
    ctx.lam_channels, ctx.gate, ctx.lam_activation = inputs[8:]
    ctx.expand_bias_dtype = None if expand_bias is None else expand_bias.dtype
    ctx.save_for_backward(sums, squeeze, squeeze_bias, gate, gate_bias, expand, outputs[0])


def _logits_gradient(ctx, d_lam: Tensor | None, d_phi: Tensor | None, lam: Tensor) -> Tensor:
    others = ctx.saved_tensors[5].shape[0] - ctx.lam_channels
    d_lam = torch.zeros_like(lam) if d_lam is None else _behind_lam(d_lam, lam, ctx.lam_activation)
    if others == 0:
        return d_lam
    if d_phi is None:
        d_phi = lam.new_zeros((lam.shape[0], others))
    return torch.cat((d_lam, d_phi), 1) if ctx.lam_channels else d_phi


def _branch_backward(ctx, d_lam, d_phi):
    if d_lam is None and d_phi is None:
        return (None,) * 11
    sums, *parameters, lam = ctx.saved_tensors
    needs = dict(
        zip(("sums", "", "w1", "b1", "wg", "bg", "w2", "b2"), ctx.needs_input_grad[1:], strict=False)
    )
    dtypes = [None if t is None else t.dtype for t in parameters]
    with _without_autocast(sums.device.type):
        w1, b1, wg, bg, w2 = (None if t is None else t.to(sums.dtype) for t in parameters)
        pooled = (sums.sum(1) if sums.shape[1] > 1 else sums[:, 0]) * ctx.scale
        before = F.linear(pooled, w1, b1)
        d_logits = _logits_gradient(ctx, d_lam, d_phi, lam)
        d_hidden = d_logits @ w2
        d_gate = None
        if wg is not None:
            shifted = F.linear(before, wg, bg) + 3
            factor, third = F.relu6(shifted), before / 3
            hidden = third * factor
            d_gate = _between(d_hidden * third, shifted, 0, 6)
            d_before = torch.addmm(d_hidden * factor / 3, d_gate, wg)
        else:
            hidden = _gated(before, ctx.gate)
            d_before = _behind_gate(d_hidden, before, ctx.gate)
        found = {
            "w1": (lambda: d_before.mT @ pooled, dtypes[0]),
            "b1": (lambda: d_before.sum(0), dtypes[1]),
            "wg": (lambda: d_gate.mT @ before, dtypes[2]),
            "bg": (lambda: d_gate.sum(0), dtypes[3]),
            "w2": (lambda: d_logits.mT @ hidden, dtypes[4]),
            "b2": (lambda: d_logits.sum(0), ctx.expand_bias_dtype),
            "sums": (lambda: ((d_before @ w1) * ctx.scale).unsqueeze(1).expand(sums.shape), sums.dtype),
        }
        gradients = [
            found[name][0]().to(found[name][1]) if name and needed else None for name, needed in needs.items()
        ]
    return (*gradients, None, None, None)


def register(library: torch.library.Library) -> None:
    """Registers the fake implementations and the gradients."""
    global _sums_function, _branch_function
    torch.library.register_fake("dcd_kernels::channel_sums", _sums_fake, lib=library)
    torch.library.register_fake("dcd_kernels::branch", _branch_fake, lib=library)
    _sums_function = autograd.register_op(library, _sums_op, (_sums_setup, _sums_backward))
    _branch_function = autograd.register_op(library, _branch_op, (_branch_setup, _branch_backward))


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
    lam_channels: int,
    gate: int,
    lam_activation: int,
) -> tuple[Tensor, Tensor]:
    """λ and Φ from channel sums, the branch of Section 3.4 and Figure 2 behind its pooling::

        x = scale · Σ_t sums_t        h = gate(squeeze x)        (logits of λ, Φ) = expand h

    sums (N, T, I) in float32 or, on the CPU, float64; scale is 1 over the number of pixels of a bin;
    squeeze_weight (S, I), gate_weight (S, S) for the gate 'se' and for no other, expand_weight
    (lam_channels + ∏Φ, S), each with a bias or None; these all of one dtype, float32, float16 or bfloat16.
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
        lam_channels,
        gate,
        lam_activation,
    )
