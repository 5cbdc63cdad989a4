# SPDX-License-Identifier: BSD-3-Clause
"""The op of the CUDA library in the place of the CPU's: test_depthwise_op.py runs this in another process."""

from __future__ import annotations

import os

import op_checks
import pytest
import test_grad
import torch
from operands import HALF, LAYOUTS, Case, call, operands, plain
from test_depthwise_kernels import CASES

from dcd_kernels.backends import cuda

torch.ops.load_library(os.environ["DCD_REHEARSAL"])

SOME = [CASES[i] for i in (0, 4, 6, 10, 12, 17, 22, 27)]
WHOLE = next(case for case in CASES if case.bias == "sample" and case.residual)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(case, layout):
    op_checks.values(case, torch.float32, layout, None)


@pytest.mark.parametrize("wide", (False, True))
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", SOME, ids=str)
def test_values_in_half_precision(case, layout, dtype, wide):
    op_checks.values(case, dtype, layout, None, wide=wide)
    test_grad.check_values(case, dtype, layout, None, wide=wide)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", SOME, ids=str)
def test_gradients(case, layout):
    test_grad.check_values(case, torch.float32, layout, None)


@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_dispatcher(dtype, layout):
    op_checks.opcheck(WHOLE, dtype, layout, wide=dtype != torch.float32)
    for needs in (0b111111, 0b000001, 0b101010, 0b010100, 0):
        op_checks.opcheck_backward(WHOLE, dtype, layout, needs, wide=dtype != torch.float32)


def test_expanded_gradient():
    tensors = operands(WHOLE, requires_grad=True)
    output = call(WHOLE, tensors)
    expanded = torch.autograd.grad(output.sum(), tensors, retain_graph=True)
    dense = torch.autograd.grad(output, tensors, torch.ones_like(output))
    for got, expected in zip(expanded, dense, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
def test_residual_and_gradient_of_the_other_layout(layout):
    tensors = operands(WHOLE, layout=layout, requires_grad=True)
    other = "channels_last" if layout == "contiguous" else "contiguous"
    swapped = operands(WHOLE, layout=other, requires_grad=True)
    mixed = [*tensors[:-1], swapped[-1]]
    first, second = call(WHOLE, tensors), call(WHOLE, mixed)
    assert torch.equal(first, second) and first.stride() == second.stride()
    grad = torch.randn(first.shape)
    mine = torch.autograd.grad(first, tensors, grad)
    turned = torch.autograd.grad(second, mixed, grad.movedim(1, -1).contiguous().movedim(-1, 1))
    # those of bias and residual are torch's own sums
    for one, two in zip(mine[:6], turned[:6], strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_special_values(layout):
    op_checks.propagation_through_residual(WHOLE, layout, None)
    for case in SOME[1:4]:
        case = Case(**{**case.__dict__, "activation": None})
        op_checks.infinity_is_not_lost(case, layout, None)
        op_checks.nan_stays_in_its_pixels(case, layout, None, 0)


def test_empty():
    tensors = operands(WHOLE)
    for place in (0, 3, 5, 6, 7):
        tensors[place] = tensors[place][:0]
    tensors = [t.detach().requires_grad_() for t in tensors]
    output = call(WHOLE, tensors)
    assert output.shape == (0, WHOLE.out_channels, *WHOLE.out_size)
    for gradient, tensor in zip(torch.autograd.grad(output.sum(), tensors), tensors, strict=True):
        assert gradient.shape == tensor.shape and not gradient.any()


def _odd(size=(5, 5), kernel=(3, 3), *, outputs=2, latent=1, stride=(1, 1), dilation=(1, 1)) -> Case:
    rank = len(size)
    padding = tuple(d * (k // 2) for k, d in zip(kernel, dilation, strict=False))
    return Case("depthwise", 1, 2, outputs, latent, size, kernel=kernel, padding=padding,
                stride=stride[:rank], dilation=dilation[:rank])  # fmt: skip


REFUSED = {
    "float64": (WHOLE, "float32, float16 and bfloat16, got Double"),
    "one dimension": (_odd((5,), (3,)), "two spatial dimensions"),
    "kernel": (_odd(kernel=(3, 5)), "kernel sizes 3 x 3, 5 x 5 and 7 x 7"),
    "multiplier": (_odd(outputs=4), "as many output as input channels, got 4 and 2"),
    "stride": (_odd(stride=(1, 2)), r"stride 1 or 2, got \(1, 2\)"),
    "dilation": (_odd(dilation=(2, 2)), r"dilation 1, got \(2, 2\)"),
    "latent": (_odd(kernel=(7, 7), latent=49), "at most 48 latent components, got 49"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    case, message = REFUSED[name]
    dtype = torch.float64 if name == "float64" else torch.float32
    tensors = operands(case, dtype)
    with pytest.raises(RuntimeError, match=message):
        call(case, tensors)
    grad = torch.ones(case.batch, case.out_channels, *case.out_size, dtype=dtype)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.dcd_kernels.depthwise_backward(grad, *tensors[:6], *case.geometry, 1)
    plain(case, tensors)  # the reference takes it


def test_limits_of_op_and_backend_agree():
    assert f"at most {cuda.WIDEST_LATENT} latent" in REFUSED["latent"][1]


def test_wrong_dtypes_and_shapes():
    tensors = operands(WHOLE)
    wrong = [*tensors[:5], tensors[5].half(), *tensors[6:]]
    with pytest.raises(RuntimeError, match="lam must have the dtype of input"):
        call(WHOLE, wrong)
    wrong = [*tensors[:5], tensors[5][:, 1:], *tensors[6:]]
    with pytest.raises(RuntimeError, match="lam must have shape"):
        call(WHOLE, wrong)


def test_a_sample_of_too_many_elements():
    torch.utils.deterministic.fill_uninitialized_memory = False  # nobody touches it
    far = torch.empty(2**31 + 64, dtype=torch.float16).as_strided((1, 2, 8, 8), (2**31, 2**31, 8, 1))
    weight = torch.ones(2, 1, 3, 3, dtype=torch.float16)
    args = (None, None, None, None, None, None, [1, 1], [1, 1], [1, 1], 0)
    with pytest.raises(RuntimeError, match=r"input must span less than 2\^31 elements within a sample"):
        torch.ops.dcd_kernels.depthwise(far, weight, *args)
