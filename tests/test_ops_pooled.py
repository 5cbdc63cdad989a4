# SPDX-License-Identifier: BSD-3-Clause
"""pointwise_pooled: the output of `pointwise` and its channel sums, with the gradients of both."""

from __future__ import annotations

import pytest
import torch
from operands import Case, in_float64, operands

from dcd_kernels import ops
from dcd_kernels.arguments import ACTIVATIONS

CASES = [
    Case("pointwise", 2, 6, 4, 3, (5, 4), "relu6", bias="sample", residual=True),
    Case("pointwise", 2, 6, 4, 3, (5, 4), "silu", bias="shared"),
    Case("pointwise", 1, 3, 5, 1, (1,), None, dynamic=False),
    Case("pointwise", 3, 8, 4, 2, (7,), "hardswish", blocks=2),
]


def call(case, tensors):
    return ops.pointwise_pooled(*tensors, ACTIVATIONS[case.activation])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(case, dtype):
    tensors = operands(case, dtype)
    output, sums = call(case, tensors)
    assert torch.equal(output, ops.pointwise(*tensors, ACTIVATIONS[case.activation]))
    assert sums.dtype == torch.promote_types(dtype, torch.float32) and sums.shape == output.shape[:2]
    expected = output.double().flatten(2).sum(2)
    slack = output.double().flatten(2).norm(dim=2).max()
    # the sums may be of the values before they were rounded to the output's dtype
    eps = torch.finfo(dtype).eps
    assert (sums.double() - expected).abs().max() <= 4 * eps * slack * output[0, 0].numel() ** 0.5


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients(case):
    tensors = in_float64(operands(case, requires_grad=True))
    wanted = [t for t in tensors if t is not None]

    def function(*wanted):
        given = iter(wanted)
        return call(case, [None if t is None else next(given) for t in tensors])

    assert torch.autograd.gradcheck(function, wanted)


def test_second_gradients():
    case = CASES[2]
    tensors = in_float64(operands(case, requires_grad=True))
    wanted = [t for t in tensors if t is not None]
    assert torch.autograd.gradgradcheck(
        lambda input, weight, lam: call(case, [input, weight, *[None] * 3, lam, None, None]), wanted
    )


def test_a_result_nobody_reads_costs_no_gradient():
    case = CASES[0]
    tensors = operands(case, torch.float64, requires_grad=True)
    output, sums = call(case, tensors)
    both = torch.autograd.grad((output.sum(), sums.sum()), tensors[0], retain_graph=True)[0]
    alone = [torch.autograd.grad(result.sum(), tensors[0], retain_graph=True)[0] for result in (output, sums)]
    assert torch.allclose(alone[0], alone[1]) and torch.allclose(both, 2 * alone[0])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_opcheck(case):
    op = torch.ops.dcd_kernels.pointwise_pooled.default
    torch.library.opcheck(op, (*operands(case, requires_grad=True), ACTIVATIONS[case.activation]))


def test_compiles_into_one_graph(fresh_compiler):
    case = CASES[0]
    tensors = operands(case, requires_grad=True)

    def function(*tensors):
        output, sums = call(case, tensors)
        return output, sums * 2

    compiled = torch.compile(function, fullgraph=True)(*tensors)
    for found, expected in zip(compiled, function(*tensors), strict=True):
        assert torch.allclose(found, expected, atol=1e-5)


def test_autocast_leaves_the_sums_in_float32():
    tensors = operands(CASES[0])
    with torch.autocast("cpu", torch.bfloat16):
        output, sums = call(CASES[0], tensors)
    assert output.dtype == torch.bfloat16 and sums.dtype == torch.float32
