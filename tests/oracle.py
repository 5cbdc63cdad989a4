# SPDX-License-Identifier: BSD-3-Clause
"""The equations in NumPy float64, written to be read and not to be fast.

Per-sample weights are built exactly as the paper prints them ("Revisiting Dynamic Convolution via Matrix
Decomposition", ICLR 2021, Eqs. 5 to 9), then each sample is convolved with its own. Nothing here is shared
with dcd_kernels, not even the geometry: an error in either shows as a difference.
"""

from __future__ import annotations

import itertools

import numpy as np


def sample_weight(weight, p, phi, q, r, lam, groups) -> np.ndarray:
    """W_n of one sample: phi and lam without their batch dimension. Shape of weight."""
    co, ci_group, *kernel = weight.shape
    ci = ci_group * groups
    w = np.zeros(weight.shape, dtype=weight.dtype)
    for o in range(co):  # Λ W0
        w[o] = weight[o] if lam is None else lam[o] * weight[o]
    if p is None:
        return w
    taps = list(np.ndindex(*kernel))  # τ, row-major

    if q is None:  # Eq. 8: the (Co, ∏k) matrix Λ W0 + P Φ Rᵀ
        dynamic = p @ phi @ r.T
        for t, tap in enumerate(taps):
            w[(slice(None), 0, *tap)] += dynamic[:, t]
        return w

    if r is not None:  # Eq. 9: W0 ×2 Λ + Φ ×1 Q ×2 P ×3 R
        for t, tap in enumerate(taps):
            for c in range(r.shape[1]):
                w[(slice(None), slice(None), *tap)] += r[t, c] * (p @ phi[c] @ q.T)
        return w

    dense = np.zeros((co, ci), dtype=weight.dtype)
    if phi.ndim == 2:  # Eqs. 5 and 6
        dense += p @ phi @ q.T
    else:  # Eq. 7: the direct sum of P_b Φ_b Q_bᵀ
        blocks = phi.shape[0]
        rows, columns = co // blocks, ci // blocks
        for b in range(blocks):
            row, column = slice(b * rows, (b + 1) * rows), slice(b * columns, (b + 1) * columns)
            dense[row, column] += p[row] @ phi[b] @ q[column].T
    centre = tuple(k // 2 for k in kernel)  # Fig. 4b
    for o in range(co):
        group = o // (co // groups)
        mine = slice(group * ci_group, (group + 1) * ci_group)
        w[(o, slice(None), *centre)] += dense[o, mine]
        outside = np.delete(dense[o], np.arange(ci)[mine])
        assert not outside.any(), "the residual reaches over groups"
    return w


def weights(weight, p=None, phi=None, q=None, *, r=None, lam=None, groups=1, batch=None) -> np.ndarray:
    """All W_n, (N, *weight.shape)."""
    n = next((len(t) for t in (phi, lam) if t is not None), batch)
    return np.stack(
        [
            sample_weight(
                weight,
                p,
                None if phi is None else phi[s],
                q,
                r,
                None if lam is None else lam[s],
                groups,
            )
            for s in range(n)
        ]
    )


def margins(padding, kernel, dilation) -> list[tuple[int, int]]:
    """Zeros before and behind each dimension, from padding as torch.nn.functional takes it."""
    if padding == "valid":
        return [(0, 0) for _ in kernel]
    if padding == "same":
        total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return [(t // 2, t - t // 2) for t in total]
    return [(pad, pad) for pad in each(padding, len(kernel))]


def each(value, spatial) -> tuple[int, ...]:
    return (value,) * spatial if isinstance(value, int) else tuple(value)


def convolve(x, w, stride, padding, dilation, groups) -> np.ndarray:
    """One sample: x (Ci, *size), w (Co, Ci / groups, *kernel) -> (Co, *output), tap by tap."""
    co, ci_group, *kernel = w.shape
    spatial = len(kernel)
    stride, dilation = each(stride, spatial), each(dilation, spatial)
    around = margins(padding, kernel, dilation)
    padded = np.pad(x, [(0, 0), *around])
    output = [
        (padded.shape[a + 1] - dilation[a] * (kernel[a] - 1) - 1) // stride[a] + 1 for a in range(spatial)
    ]
    y = np.zeros((co, *output), dtype=w.dtype)
    for tap in np.ndindex(*kernel):
        seen = padded[
            (
                slice(None),
                *(
                    slice(t * d, t * d + (size - 1) * s + 1, s)
                    for t, d, s, size in zip(tap, dilation, stride, output, strict=True)
                ),
            )
        ]
        for o in range(co):
            first = o // (co // groups) * ci_group
            y[o] += np.tensordot(w[(o, slice(None), *tap)], seen[first : first + ci_group], axes=1)
    return y


def activate(y, activation) -> np.ndarray:
    if activation is None:
        return y
    if activation == "relu":
        return np.maximum(y, 0)
    if activation == "relu6":
        return np.minimum(np.maximum(y, 0), 6)
    if activation == "silu":
        return y / (1 + np.exp(-y))
    if activation == "hardswish":
        return y * np.minimum(np.maximum(y + 3, 0), 6) / 6
    raise ValueError(activation)


def finish(y, bias, residual, activation) -> np.ndarray:
    """act(y + bias + residual), channels second."""
    if bias is not None:
        channels_last = np.moveaxis(y, 1, -1)  # (N, *size, Co)
        for s in range(len(y)):
            channels_last[s] += bias if bias.ndim == 1 else bias[s]
    if residual is not None:
        y = y + residual
    return activate(y, activation)


def conv(
    input,
    weight,
    p=None,
    phi=None,
    q=None,
    *,
    r=None,
    lam=None,
    bias=None,
    residual=None,
    stride=1,
    padding=0,
    dilation=1,
    groups=1,
    activation=None,
) -> np.ndarray:
    """dcd_conv1d, 2d and 3d."""
    w = weights(weight, p, phi, q, r=r, lam=lam, groups=groups, batch=len(input))
    y = np.stack([convolve(x, w[s], stride, padding, dilation, groups) for s, x in enumerate(input)])
    return finish(y, bias, residual, activation)


def linear(
    input, weight, p=None, phi=None, q=None, *, lam=None, bias=None, residual=None, activation=None
) -> np.ndarray:
    """dcd_linear: input (N, …, Ci)."""
    w = weights(weight, p, phi, q, lam=lam, batch=len(input))
    y = np.zeros((*input.shape[:-1], len(weight)), dtype=weight.dtype)
    for s in range(len(input)):
        for row in np.ndindex(*input.shape[1:-1]):
            y[(s, *row)] = w[s] @ input[(s, *row)]
    y = finish(np.moveaxis(y, -1, 1), bias, None, None)
    y = np.moveaxis(y, 1, -1)
    return finish(y, None, residual, activation)


def apply(
    static,
    input,
    p=None,
    phi=None,
    q=None,
    *,
    lam=None,
    bias=None,
    residual=None,
    stride=1,
    offset=0,
    activation=None,
) -> np.ndarray:
    """dcd_apply: output pixel o reads input[o * stride + offset], zero outside."""
    n, co, *size = static.shape
    spatial = len(size)
    stride, offset = each(stride, spatial), each(offset, spatial)
    y = np.zeros(static.shape, dtype=static.dtype)
    for s, o in itertools.product(range(n), range(co)):
        y[s, o] = static[s, o] if lam is None else lam[s, o] * static[s, o]
    if p is not None:
        for s in range(n):
            if q is None:
                matrix = p @ phi[s]
            else:
                empty = np.zeros((co, input.shape[1]), dtype=static.dtype)
                matrix = sample_weight(empty, p, phi[s], q, None, None, 1)
            for pixel in np.ndindex(*size):
                read = tuple(o * step + shift for o, step, shift in zip(pixel, stride, offset, strict=True))
                if all(0 <= i < length for i, length in zip(read, input.shape[2:], strict=True)):
                    y[(s, slice(None), *pixel)] += matrix @ input[(s, slice(None), *read)]
    return finish(y, bias, residual, activation)


def batch_norm_act(x, weight, bias, eps, activation) -> np.ndarray:
    """Normalised by mean and biased variance of each channel over samples and pixels."""
    y = np.empty_like(x)
    for c in range(x.shape[1]):
        values = x[:, c]
        deviation = np.sqrt(np.mean((values - np.mean(values)) ** 2) + eps)
        y[:, c] = (values - np.mean(values)) / deviation
        y[:, c] = y[:, c] * (1 if weight is None else weight[c]) + (0 if bias is None else bias[c])
    return activate(y, activation)
