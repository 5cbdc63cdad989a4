# SPDX-License-Identifier: BSD-3-Clause
"""Fake implementations: shapes, dtypes and strides of every op, for tracing without data.

They restate the allocation rules of csrc/ in a form that holds for symbolic sizes, so that one
exported program serves every batch size. Nothing is checked here: the public functions check their
arguments before an op is reached, also under torch.compile, and the kernels check theirs.
"""

import torch
from torch import Tensor


def is_channels_last(reference: Tensor) -> bool:
    return not reference.is_contiguous() and reference.stride(1) == 1 and reference.shape[1] > 1


def empty_map(reference: Tensor, channels, spatial) -> Tensor:
    """An uninitialised (N, channels, *spatial) in the memory layout of `reference`."""
    batch = reference.shape[0]
    shape = (batch, channels, *spatial)
    if not is_channels_last(reference):
        return reference.new_empty(shape)
    strides = [0] * len(shape)
    strides[1] = 1
    step = channels
    for axis in reversed(range(2, len(shape))):
        strides[axis] = step
        step = step * shape[axis]
    strides[0] = step
    return reference.new_empty_strided(shape, strides)


def _empty_gradients(grad: Tensor, factors, laid_out: int, needs: int) -> tuple[Tensor, ...]:
    """One tensor a factor: the gradient's metadata where `needs` asks for it, else an empty one.

    The first `laid_out` factors are images, whose gradients keep their layout; the others are
    parameters, whose gradients are contiguous.
    """
    computed = torch.float64 if grad.dtype is torch.float64 else torch.float32
    gradients = []
    for index, factor in enumerate(factors):
        if not needs >> index & 1:
            dtype = computed if factor is None else factor.dtype
            gradients.append(grad.new_empty((0,), dtype=dtype))
        elif index < laid_out:
            gradients.append(empty_map(factor, factor.shape[1], factor.shape[2:]))
        else:
            gradients.append(factor.new_empty(factor.shape))
    return tuple(gradients)


def _pointwise(input, weight, p, phi, q, lam, bias, residual, activation):
    return empty_map(input, weight.shape[0], input.shape[2:])


def _pointwise_pooled(input, weight, p, phi, q, lam, bias, residual, activation):
    sums = input.new_empty(
        (input.shape[0], weight.shape[0]), dtype=torch.promote_types(input.dtype, torch.float32)
    )
    return _pointwise(input, weight, p, phi, q, lam, bias, residual, activation), sums


def _pointwise_backward(grad, input, weight, p, phi, q, lam, needs):
    return _empty_gradients(grad, (input, weight, p, phi, q, lam), 1, needs)


def _apply(static, input, p, phi, q, lam, bias, residual, activation):
    return empty_map(static, static.shape[1], static.shape[2:])


def _apply_backward(grad, static, input, p, phi, q, lam, needs):
    return _empty_gradients(grad, (static, input, p, phi, q, lam), 2, needs)


def _depthwise(input, weight, p, phi, r, lam, bias, residual, stride, padding, dilation, activation):
    spatial = [
        (size + 2 * pad - spread * (kernel - 1) - 1) // step + 1
        for size, kernel, step, pad, spread in zip(
            input.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True
        )
    ]
    return empty_map(input, weight.shape[0], spatial)


def _depthwise_backward(grad, input, weight, p, phi, r, lam, stride, padding, dilation, needs):
    return _empty_gradients(grad, (input, weight, p, phi, r, lam), 1, needs)


def register(library: torch.library.Library) -> None:
    """Registers the fake implementation of every op on images."""
    for implementation in (
        _pointwise,
        _pointwise_pooled,
        _pointwise_backward,
        _apply,
        _apply_backward,
        _depthwise,
        _depthwise_backward,
    ):
        name = f"dcd_kernels::{implementation.__name__[1:]}"
        torch.library.register_fake(name, implementation, lib=library)
