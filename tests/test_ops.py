# SPDX-License-Identifier: BSD-3-Clause
"""What every compiled op on images passes: values, layouts, instruction sets, repetition, denormals, opcheck.

test_ops_pointwise.py, test_ops_apply.py and test_ops_depthwise.py have the cases and what is the op's own.
"""

import op_checks
import pytest
import test_ops_apply as apply
import test_ops_depthwise as depthwise
import test_ops_pointwise as pointwise
import torch
from operands import HALF, ISAS, LAYOUTS, Case, call, label, operands

WHOLE = (pointwise.WHOLE, apply.WHOLE, depthwise.WHOLE)


def of(*cases: Case) -> pytest.MarkDecorator:
    """The test takes these cases, of several ops."""
    return pytest.mark.parametrize("case", cases, ids=label)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layout", LAYOUTS)
@of(
    *pointwise.CASES,
    *pointwise.EACH_ACTIVATION,
    *pointwise.PACKED,
    *pointwise.EACH_ACTIVATION_PACKED,
    *apply.CASES,
    *apply.EACH_ACTIVATION,
    *depthwise.CASES,
    *depthwise.EACH_ACTIVATION,
)
def test_values(case, layout, isa):
    op_checks.values(case, torch.float32, layout, isa)


@pytest.mark.parametrize("layout", LAYOUTS)
@of(*pointwise.CASES, *pointwise.PACKED, *apply.CASES, *depthwise.CASES)
def test_values_float64(case, layout):
    op_checks.values(case, torch.float64, layout, ISAS[0])


@pytest.mark.parametrize("wide", (False, True), ids=("half", "wide"))
@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@of(*pointwise.IN_HALF, *apply.IN_HALF, *depthwise.IN_HALF)
def test_values_half(case, dtype, layout, wide):
    op_checks.values(case, dtype, layout, ISAS[-1], wide=wide)


@pytest.mark.parametrize("isa", ISAS)
@of(pointwise.CASES[13], depthwise.TILED)
def test_mixed_layouts_of_input_and_residual(case, isa):
    for own, other in (("contiguous", "channels_last"), ("channels_last", "sliced")):
        tensors = operands(case, layout=own)
        expected = call(case, tensors)
        tensors[-1] = operands(case, layout=other)[-1]
        assert torch.equal(call(case, tensors), expected)


@pytest.mark.parametrize("count", (1, 2))
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layout", LAYOUTS[:2])
@of(
    pointwise.CASES[11],
    pointwise.CASES[13],
    apply.TILED,
    apply.LATENT,
    apply.FINISH,
    depthwise.TILED,
    depthwise.DOUBLE,
)
def test_same_inputs_same_bits(case, layout, isa, count):
    op_checks.same_bits(case, layout, isa, count)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layout", LAYOUTS[:2])
@of(
    *WHOLE,
    *pointwise.DENORMAL,
    apply.TILED,
    apply.LATENT,
    apply.FINISH,
    depthwise.TILED,
    depthwise.DOUBLE,
)
def test_denormals(case, layout, isa):
    op_checks.denormals(case, layout, isa)


@pytest.mark.parametrize("layout", LAYOUTS)
@of(
    *(pointwise.CASES[place] for place in (2, 7, 9)),
    apply.WHOLE,
    apply.LATENT,
    apply.FINISH,
    apply.CASES[9],
    depthwise.WHOLE,
    depthwise.DOUBLE,
    *(depthwise.CASES[place] for place in (7, 16, 17)),
)
def test_opcheck(case, layout):
    op_checks.opcheck(case, torch.float32, layout)


@pytest.mark.parametrize("wide", (False, True))
@of(*WHOLE)
def test_opcheck_half(case, wide):
    op_checks.opcheck(case, torch.bfloat16, "channels_last", wide=wide)
    op_checks.opcheck_backward(case, torch.bfloat16, "channels_last", 0b111111, wide=wide)


@pytest.mark.parametrize("needs", (0b111111, 0b000001, 0b000010, 0b101010, 0b101001, 0))
@of(
    *WHOLE,
    *(pointwise.CASES[place] for place in (7, 9)),
    apply.LATENT,
    apply.CASES[9],
    depthwise.DOUBLE,
    depthwise.CASES[7],
)
def test_opcheck_backward(case, needs):
    for layout in LAYOUTS[:2]:
        op_checks.opcheck_backward(case, torch.float32, layout, needs)
