# SPDX-License-Identifier: BSD-3-Clause
"""The compiled pointwise op, on packed weights too: cases, and what test_ops.py does not ask of every op.

test_ops_packed.py has what is of packed weights alone.
"""

from dataclasses import replace

import op_checks
import pytest
import torch
from operands import (
    ISAS,
    LAYOUTS,
    Case,
    call,
    operands,
)

CASES = [
    # awkward sizes: latent channels 1, 3, 11; three input channels; 1, 5, 49 pixels; odd output channels
    Case("pointwise", 1, 3, 1, 1, (1,)),
    Case("pointwise", 2, 3, 7, 3, (5,), "relu", bias="shared"),
    Case("pointwise", 3, 3, 20, 11, (7, 7), "silu", bias="sample", residual=True),
    Case("pointwise", 1, 24, 33, 3, (1, 1), "relu6", bias="shared", residual=True),
    Case("pointwise", 2, 17, 33, 11, (5, 1), "hardswish"),
    Case("pointwise", 3, 40, 20, 1, (2, 5, 3), "relu", residual=True),
    # the terms one by one
    Case("pointwise", 2, 19, 20, 4, (7, 7), lam=False),
    Case("pointwise", 2, 19, 20, 4, (7, 7), dynamic=False),
    Case("pointwise", 2, 19, 20, 4, (7, 7), lam=False, dynamic=False, bias="sample"),
    # blocks
    Case("pointwise", 2, 12, 20, 3, (3, 5), "relu6", blocks=4, bias="shared"),
    Case("pointwise", 3, 14, 14, 1, (49,), "silu", blocks=7, residual=True),
    # sizes that reach full tiles, more than one block of channels, and each order of the products
    Case("pointwise", 2, 96, 24, 4, (28, 28), "relu6", bias="shared"),
    Case("pointwise", 1, 16, 96, 4, (31, 33), "relu", bias="sample", residual=True),
    Case("pointwise", 3, 160, 130, 8, (7, 7), "silu", bias="shared", residual=True),
    Case("pointwise", 1, 300, 64, 16, (14, 14), blocks=2),
]
BIG = Case("pointwise", 8, 576, 160, 16, (14, 14), "relu6", bias="shared", residual=True)
TILED = Case("pointwise", 2, 96, 24, 4, (28, 28))
WHOLE = Case("pointwise", 2, 13, 21, 5, (3, 7), bias="sample", residual=True)
EACH_ACTIVATION = [
    Case("pointwise", 2, 18, 35, 5, (9, 6), name, bias="shared")
    for name in (None, "relu", "relu6", "silu", "hardswish")
]
# the same on packed weights, which are dense
PACKED = [
    *(replace(case, packed=True) for case in CASES if case.blocks == 1),
    # more than one piece of k, rows a page apart, three panels and a part of one, samples that share a tile
    Case("pointwise", 5, 700, 55, 17, (7, 7), "relu6", bias="sample", residual=True, packed=True),
    Case("pointwise", 3, 1024, 40, 4, (5, 3), bias="shared", packed=True),
    Case("pointwise", 2, 16, 144, 4, (40, 20), "relu", residual=True, packed=True),
    Case("pointwise", 1, 400, 300, 8, (20, 10), lam=False, packed=True),
]
EACH_ACTIVATION_PACKED = [replace(case, packed=True) for case in EACH_ACTIVATION]
IN_HALF = CASES[1:5] + CASES[9:12] + PACKED[1:4]
DENORMAL = [TILED, CASES[11], CASES[13]]
DENORMAL += [replace(case, packed=True) for case in (WHOLE, *DENORMAL)]
either = pytest.mark.parametrize("packed", (False, True), ids=("plain", "packed"))


@pytest.mark.full
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pixels", (1, 2, 7, 8, 13, 15, 16, 17, 29, 47, 48, 49, 50, 96, 97, 196, 400))
@pytest.mark.parametrize(
    "channels", ((1, 1), (3, 8), (8, 9), (16, 15), (31, 16), (33, 65), (130, 7), (340, 40))
)
@either
def test_values_at_every_tile_edge(packed, channels, pixels, layout, isa):
    for latent in (1, 2, 4, 7, 8, 17):
        case = Case("pointwise", 2, *channels, latent, (pixels,), "relu", bias="shared", residual=True)
        op_checks.values(replace(case, packed=packed), torch.float32, layout, isa)


@pytest.mark.full
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_of_a_large_layer(layout, isa):
    op_checks.values(BIG, torch.float32, layout, isa)


def test_expanded_operands():
    tensors = operands(WHOLE)
    tensors[5] = tensors[5][:1].expand(2, -1)
    tensors[3] = tensors[3][:1].expand(2, -1, -1)
    tensors[0] = tensors[0][:, :, :, :1].expand(-1, -1, -1, 7)
    dense = [t.contiguous() for t in tensors]
    assert torch.equal(call(WHOLE, tensors), call(WHOLE, dense))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layout", LAYOUTS[:2])
@either
def test_nan_and_infinity(packed, layout, isa):
    op_checks.propagation_through_residual(replace(CASES[13], packed=packed), layout, isa)
    for case in (replace(WHOLE, packed=packed), replace(TILED, packed=packed)):
        op_checks.infinity_is_not_lost(case, layout, isa)
        for place in range(6):
            op_checks.nan_stays_in_its_pixels(case, layout, isa, place)


@pytest.mark.parametrize("shape", ((0, 13, 3, 7), (2, 13, 0, 7)))
def test_empty(shape):
    tensors = operands(WHOLE)
    tensors[0] = torch.empty(shape)
    for place in (3, 5, 6):
        tensors[place] = tensors[place][: shape[0]]
    tensors[7] = torch.empty(shape[0], 21, *shape[2:])
    assert call(WHOLE, tensors).shape == (shape[0], 21, *shape[2:])


@pytest.mark.parametrize(
    ("place", "shape", "named"),
    (
        (0, (2, 13), "input"),
        (1, (21, 12), "weight"),
        (2, (20, 5), "p"),
        (3, (2, 5, 4), "phi"),
        (3, (1, 5, 5), "phi"),
        (4, (12, 5), "q"),
        (5, (1, 21), "lam"),
        (6, (3, 21), "bias"),
        (7, (2, 21, 7, 3), "residual"),
    ),
)
def test_wrong_shapes_name_the_argument(place, shape, named):
    tensors = operands(WHOLE)
    tensors[place] = torch.zeros(shape)
    with pytest.raises(RuntimeError, match=rf"\b{named}\b"):
        call(WHOLE, tensors)


@pytest.mark.parametrize("missing", (2, 3, 4))
def test_incomplete_residual(missing):
    tensors = operands(WHOLE)
    tensors[missing] = None
    with pytest.raises(RuntimeError, match=r"\b(p|phi|q)\b"):
        call(WHOLE, tensors)


def test_blocks_that_do_not_divide():
    tensors = operands(WHOLE)
    tensors[3] = torch.zeros(2, 2, 5, 5)
    with pytest.raises(RuntimeError, match="block"):
        call(WHOLE, tensors)


def test_unknown_instruction_set():
    before = torch.ops.dcd_kernels.cpu_isa()
    with pytest.raises(RuntimeError, match="isa"):
        torch.ops.dcd_kernels.set_cpu_isa("sse9")
    assert torch.ops.dcd_kernels.cpu_isa() == before


@pytest.mark.parametrize("code", (-1, 5))
def test_unknown_activation(code):
    with pytest.raises(RuntimeError, match="activation"):
        torch.ops.dcd_kernels.pointwise(*operands(WHOLE), code)


def test_no_input_channels():
    tensors = operands(WHOLE)
    tensors[0], tensors[1], tensors[4] = tensors[0][:, :0], tensors[1][:, :0], tensors[4][:0]
    with pytest.raises(RuntimeError, match="at least one channel"):
        call(WHOLE, tensors)


@pytest.mark.parametrize("place", (1, 2, 4, 7))
def test_mixed_dtypes(place):
    tensors = operands(WHOLE)
    tensors[place] = tensors[place].double()
    with pytest.raises(RuntimeError, match=WHOLE.names[place]):
        call(WHOLE, tensors)
