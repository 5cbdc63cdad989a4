# SPDX-License-Identifier: BSD-3-Clause
"""From tensors to kernel arguments, and the one place where kernels are started."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from ...ops.fakes import is_channels_last

_WIDEST = 16
_REACH = 2**31  # of the kernels' offsets within a sample


class Image(NamedTuple):
    """A tensor (N, C, *spatial) seen as (N, C, pixels): channels have stride 1 if ``last``, else pixels.

    ``step`` is the other of the two strides, ``sample`` that between samples.
    """

    tensor: Tensor
    last: bool
    sample: int
    step: int


def launch(
    kernel, grid: tuple[int, ...], arguments: dict[str, object], num_warps: int, num_stages: int
) -> None:
    """Starts a kernel in the current stream of the current device; an empty grid starts nothing."""
    if math.prod(grid):
        kernel[grid](**arguments, num_warps=num_warps, num_stages=num_stages)


def pixels_of(tensor: Tensor) -> int:
    """Product of the sizes behind the second."""
    return math.prod(tensor.shape[2:])


def image(tensor: Tensor, last: bool | None = None) -> Image:
    """``tensor`` where it lies if its pixels are evenly spaced and one stride is 1, else a copy that is so.

    ``last`` asks for channels_last (or contiguous) where a copy is needed; default: what the tensor is.
    """
    strides = _evenly(tensor)
    if strides is None:
        if last is None:
            last = is_channels_last(tensor)
        tensor = tensor.movedim(1, -1).contiguous().movedim(-1, 1) if last else tensor.contiguous()
        strides = _evenly(tensor)
    sample, channel, pixel = strides
    if pixel == 1:
        return Image(tensor, False, sample, channel)
    return Image(tensor, True, sample, pixel)


def _evenly(tensor: Tensor) -> tuple[int, int, int] | None:
    """Strides of sample, channel and pixel with 1 among the last two, or None."""
    pixel = expected = 1
    first = True
    for size, stride in zip(reversed(tensor.shape[2:]), reversed(tensor.stride()[2:]), strict=True):
        if size == 1:
            continue
        if first:
            pixel, first = stride, False
        elif stride != expected:
            return None
        expected = stride * size
    sample, channel = tensor.stride()[:2]
    # strides of dimensions of size 1 are never used, so they may be what suits
    if pixels_of(tensor) == 1:
        pixel = tensor.shape[1] if channel == 1 else 1
    if tensor.shape[1] == 1:
        channel = pixels_of(tensor) if pixel == 1 else 1
    if tensor.shape[0] == 1:
        sample = tensor.shape[1] * pixels_of(tensor)
    if (pixel != 1 and channel != 1) or 0 in (sample, channel, pixel):
        return None
    if (tensor.shape[1] - 1) * channel + (pixels_of(tensor) - 1) * pixel >= _REACH:
        return None
    return sample, channel, pixel


def unit(*values: int) -> int:
    """The largest power of two, 16 at most, that divides all of them."""
    return math.gcd(_WIDEST, *values)


def image_arguments(**images: Image | None) -> tuple[dict[str, object], dict[str, object]]:
    """For each image its strides in units of their own, and the constants that go with them."""
    strides: dict[str, object] = {}
    constants: dict[str, object] = {}
    for name, it in images.items():
        own = 1 if it is None else unit(it.sample, it.step)
        strides[f"{name}_sample"] = 0 if it is None else it.sample // own
        strides[f"{name}_step"] = 0 if it is None else it.step // own
        constants[f"{name.upper()}_UNIT"] = own
        constants[f"{name.upper()}_LAST"] = it is not None and it.last
    return strides, constants


def padded(size: int) -> int:
    """The width of a tile for ``size`` elements: a power of two, 16 at least, which the matrix units need."""
    return max(16, 1 << max(0, size - 1).bit_length())


def tensor_of(it: Image | None) -> Tensor | None:
    return None if it is None else it.tensor
