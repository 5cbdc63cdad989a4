# SPDX-License-Identifier: BSD-3-Clause
"""Where a convolution reads its input: stride, padding and dilation per dimension, output size, sampling.

One page for everything that is the same in one, two and three dimensions and that does not depend on the
form of the decomposition. The centre tap of an odd kernel reads ``x[o * stride + dilation * (k // 2) -
padding]``, zero outside the input (paper, Section 4, Figure 4b); :func:`sample` is that rule for any offset.
"""

from __future__ import annotations

import operator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Geometry(NamedTuple):
    """A checked convolution geometry; every tuple has one entry per spatial dimension.

    ``low`` and ``high`` are the zeros before and behind each dimension: the padding, but for 'same', where
    they differ by one when ``dilation * (k - 1)`` is odd.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    low: tuple[int, ...]
    high: tuple[int, ...]
    dilation: tuple[int, ...]
    output: tuple[int, ...]

    @property
    def centre(self) -> tuple[int, ...]:
        """Offset of the centre tap: output o reads input o * stride + centre."""
        return tuple(
            d * (k // 2) - pad for d, k, pad in zip(self.dilation, self.kernel, self.low, strict=True)
        )


def show(value) -> str:
    """An argument as it stands in an error message: a size, a shape, or a shape with names in it ('L').

    int() makes a number of a size that torch.compile traces as a symbol.
    """
    if isinstance(value, (tuple, list)):
        entries = [entry if isinstance(entry, str) else show(entry) for entry in value]
        return "(" + ", ".join(entries) + ("," if len(entries) == 1 else "") + ")"
    return f"{int(value)}" if isinstance(value, (int, torch.SymInt)) else repr(value)


def per_dimension(caller: str, argument: str, value, spatial: int, least: int | None) -> tuple[int, ...]:
    """One integer, or one per spatial dimension, as a tuple of ``spatial`` integers.

    Raises:
        TypeError: an entry is not an integer.
        ValueError: wrong number of entries, or an entry below ``least`` (``None``: any sign).
    """
    entries = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    if len(entries) not in (1, spatial):
        raise ValueError(f"{caller}: {argument} must be one integer or {spatial} of them, got {show(value)}")
    numbers = []
    for entry in entries:
        if not isinstance(entry, (int, torch.SymInt)):
            if not hasattr(entry, "__index__"):
                raise TypeError(
                    f"{caller}: {argument} must be an integer or a tuple of integers, got {show(value)}"
                )
            entry = operator.index(entry)
        if least is not None and entry < least:
            wanted = "positive" if least == 1 else f"at least {least}"
            raise ValueError(f"{caller}: {argument} must be {wanted}, got {show(value)}")
        numbers.append(entry)
    return tuple(numbers) if len(numbers) == spatial else tuple(numbers) * spatial


def resolve(caller: str, size, kernel, stride, padding, dilation) -> Geometry:
    """Geometry of a convolution over an input of spatial ``size``.

    Raises:
        TypeError: stride, padding or dilation is not made of integers (padding may be 'same' or 'valid').
        ValueError: wrong count or sign, an unknown padding mode, 'same' with a stride, a kernel larger than
        the
            padded input (torch's own convolutions refuse the same sizes).
    """
    spatial = len(kernel)
    stride = per_dimension(caller, "stride", stride, spatial, 1)
    dilation = per_dimension(caller, "dilation", dilation, spatial, 1)
    if isinstance(padding, str):
        if padding == "valid":
            low = high = (0,) * spatial
        elif padding == "same":
            if any(s != 1 for s in stride):
                raise ValueError(f"{caller}: padding='same' needs stride 1, got stride {show(stride)}")
            total = tuple(d * (k - 1) for d, k in zip(dilation, kernel, strict=True))
            low = tuple(t // 2 for t in total)
            high = tuple(t - before for t, before in zip(total, low, strict=True))
        else:
            raise ValueError(f"{caller}: padding must be integers, 'same' or 'valid', got {show(padding)}")
    else:
        low = high = per_dimension(caller, "padding", padding, spatial, 0)
    output = []
    for axis in range(spatial):
        padded = size[axis] + low[axis] + high[axis]
        reach = dilation[axis] * (kernel[axis] - 1) + 1
        if padded < reach:
            raise ValueError(
                f"{caller}: the kernel reaches over {show(reach)} positions (kernel size "
                f"{show(kernel[axis])}, dilation {show(dilation[axis])}) but the padded input has only "
                f"{show(padded)} in spatial dimension {axis} (input {show(size)}, padding {show(padding)})"
            )
        output.append((padded - reach) // stride[axis] + 1)
    return Geometry(tuple(kernel), stride, low, high, dilation, tuple(output))


def sample(input: Tensor, stride: tuple[int, ...], offset: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
    """``out[..., o] = input[..., o * stride + offset]`` for o < size in every dimension, zero outside.

    A view wherever nothing has to be read from outside (a kernel may still pack a strided one); otherwise
    the inside is padded once. Differentiable any number of times.
    """
    inside: list[slice] = [slice(None), slice(None)]
    margins: list[int] = []
    whole = True
    for axis, (step, shift, wanted) in enumerate(zip(stride, offset, size, strict=True)):
        length = input.shape[axis + 2]
        if step == 1 and shift == 0 and wanted == length:
            inside.append(slice(None))
            margins[:0] = (0, 0)
            continue
        whole = False
        first = max(0, -(shift // step))
        behind = min(wanted, (length - 1 - shift) // step + 1)
        if behind <= first:  # every position lies outside the input
            inside.append(slice(0, 0))
            margins[:0] = (0, wanted)
            continue
        start = first * step + shift
        inside.append(slice(start, start + (behind - first - 1) * step + 1, step))
        margins[:0] = (first, wanted - behind)
    if whole:
        return input
    view = input[tuple(inside)]
    return F.pad(view, margins) if any(margins) else view


def pad_uneven(input: Tensor, where: Geometry) -> Tensor:
    """``input`` with the zeros that 'same' puts only behind it; ``where.low`` then pads the rest evenly."""
    if where.low == where.high:
        return input
    extra: list[int] = []
    for before, behind in zip(where.low, where.high, strict=True):
        extra[:0] = (0, behind - before)
    return F.pad(input, extra)


def every(input: Tensor, stride: tuple[int, ...], offset: tuple[int, ...]) -> Tensor:
    """View of the pixels ``offset + stride·i`` that lie inside ``input``."""
    for axis, (step, start) in enumerate(zip(stride, offset, strict=True), start=2):
        if step != 1 or start != 0:
            input = input[(slice(None),) * axis + (slice(start, None, step),)]
    return input
