# SPDX-License-Identifier: BSD-3-Clause
"""The pointwise op on the GPU: values against the oracle, and on whole layers against float64."""

from __future__ import annotations

import op_checks
import pytest
import test_ops_pointwise
import torch
from cases import assert_close_to_truth
from on_device import BF16, IEEE, MAIN, PRECISIONS
from operands import LAYOUTS, Case, call, in_float64, operands, plain

CASES = test_ops_pointwise.CASES + test_ops_pointwise.EACH_ACTIVATION
# Whole layers: aligned and not, both orders of the product, more latent channels than one tile has.
LAYERS = [
    Case("pointwise", 4, 16, 96, 4, (56, 56), "relu6", bias="shared"),
    Case("pointwise", 4, 24, 144, 4, (28, 28), "relu6", bias="shared", residual=True),
    Case("pointwise", 8, 160, 960, 8, (7, 7), "relu6", bias="shared"),
    Case("pointwise", 8, 960, 320, 16, (7, 7), bias="sample", residual=True),
    Case("pointwise", 2, 512, 128, 16, (28, 28)),
    Case("pointwise", 3, 300, 201, 45, (13, 11), "silu"),
    Case("pointwise", 2, 256, 1024, 8, (14, 14), lam=False),
    Case("pointwise", 130, 64, 64, 8, (3, 3)),
]


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(case, layout, precision, device):
    with precision():
        op_checks.values(
            case, precision.dtype, layout, None, wide=precision.wide, device=device, eps=precision.eps
        )


@pytest.mark.parametrize("precision", MAIN, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_of_misaligned_slices(case, precision, device):
    with precision():
        op_checks.values(case, precision.dtype, "sliced", None, wide=precision.wide, device=device)


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_values_of_whole_layers(case, layout, precision, device, tuned):
    with precision():
        tensors = operands(case, precision.dtype, layout, wide=precision.wide, device=device)
        truth = plain(case, in_float64(tensors))
        assert_close_to_truth(call(case, tensors), plain(case, tensors), truth, eps=precision.eps)


@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_mixed_layouts_of_input_and_residual(layout, device):
    case = test_ops_pointwise.CASES[13]
    tensors = operands(case, layout=layout, device=device)
    expected = call(case, tensors)
    for other in LAYOUTS:
        tensors[-1] = operands(case, layout=other, device=device)[-1]
        torch.testing.assert_close(call(case, tensors), expected)


def test_expanded_operands(device):
    case = test_ops_pointwise.WHOLE
    tensors = operands(case, device=device)
    tensors[5] = tensors[5][:1].expand(2, -1)
    tensors[3] = tensors[3][:1].expand(2, -1, -1)
    tensors[0] = tensors[0][:, :, :, :1].expand(-1, -1, -1, 7)
    dense = [t.contiguous() for t in tensors]
    torch.testing.assert_close(call(case, tensors), call(case, dense))


@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_nan_and_infinity(layout, device):
    """What is not finite reaches the outputs that depend on it, and no others."""
    case = test_ops_pointwise.TILED
    for place, value in ((0, float("nan")), (0, float("inf")), (3, float("nan")), (5, float("nan"))):
        tensors = operands(case, layout=layout, device=device)
        tensors[place] = tensors[place].clone()
        tensors[place][(-1,) * tensors[place].dim()] = value
        got, expected = call(case, tensors), plain(case, tensors)
        assert torch.equal(got.isfinite(), expected.isfinite()), (place, value)
        assert not expected.isfinite().all()


@pytest.mark.parametrize("precision", (IEEE, BF16), ids=str)
@pytest.mark.parametrize("shape", ((0, 13, 3, 7), (2, 13, 0, 7)))
def test_empty(shape, precision, device):
    case = test_ops_pointwise.WHOLE
    tensors = operands(case, precision.dtype, device=device)
    tensors[0] = tensors[0].new_empty(shape)
    for place in (3, 5, 6):
        tensors[place] = tensors[place][: shape[0]]
    tensors[7] = tensors[7].new_empty(shape[0], 21, *shape[2:])
    tensors = [t.detach().requires_grad_() for t in tensors]
    output = call(case, tensors)
    assert output.shape == (shape[0], 21, *shape[2:])
    for tensor, gradient in zip(tensors, torch.autograd.grad(output.sum(), tensors), strict=True):
        assert gradient.shape == tensor.shape
        assert not gradient.any(), "the gradients of nothing are zero"
