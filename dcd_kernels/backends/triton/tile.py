# SPDX-License-Identifier: BSD-3-Clause
"""What the kernels share: where an image's elements lie, and the end of every output tile.

An image (N, C, pixels) has one axis of stride 1, the pixels (contiguous) or the channels (channels_last).
Its other strides come divided by a power of two, UNIT: Triton reads 16 bytes at once only where it can
prove that rows start on multiples of 16 bytes, and ``step * UNIT`` proves what ``step`` does not; sizes are
passed likewise. Rows of a tile are pixels and columns are channels in either layout, so that one kernel
serves both and the pixels, of which there are many, fill the matrix units' long axis.
"""

import triton
import triton.language as tl


@triton.jit
def offsets(rows, columns, step, UNIT: tl.constexpr, LAST: tl.constexpr):
    """Offsets (rows, columns) within a sample of pixels `rows` and channels `columns`."""
    if LAST:
        return rows[:, None] * (step * UNIT) + columns[None, :]
    else:
        return rows[:, None] + columns[None, :] * (step * UNIT)


@triton.jit
def activate(y, ACTIVATION: tl.constexpr):
    """Codes of arguments.ACTIVATIONS. Comparisons are written so that NaN stays NaN."""
    if ACTIVATION == 1:
        y = tl.where(y < 0, 0.0, y)
    elif ACTIVATION == 2:
        y = tl.where(y < 0, 0.0, tl.where(y > 6, 6.0, y))
    elif ACTIVATION == 3:
        y = y / (1 + tl.exp(-y))
    elif ACTIVATION == 4:
        gate = y + 3
        y = y * tl.where(gate < 0, 0.0, tl.where(gate > 6, 6.0, gate)) / 6
    return y


@triton.jit
def load_columns(pointer, columns, inside):
    """A per-channel vector as one row, in float32."""
    return tl.load(pointer + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
