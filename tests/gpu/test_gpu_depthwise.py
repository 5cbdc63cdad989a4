# SPDX-License-Identifier: BSD-3-Clause
"""The depthwise op on the GPU: values, and the public call where the kernels do not have the form."""

from __future__ import annotations

import op_checks
import pytest
import test_ops_depthwise
import torch
from cases import assert_close_to_truth, make_case
from on_device import DEPTHWISE, IEEE, MAIN, ON_GPU, PRECISIONS, depthwise, ours, takes
from operands import LAYOUTS, call, in_float64, operands, plain

import dcd_kernels as dcd

CASES = [
    case
    for case in DEPTHWISE + test_ops_depthwise.CASES + test_ops_depthwise.EACH_ACTIVATION
    if takes(case) and case.in_channels < 1000
]
LAYERS = [
    depthwise(8, 96, 4, (56, 56), 3, "relu6", bias="shared", stride=2),
    depthwise(8, 144, 4, (28, 28), 3, "relu6", bias="shared"),
    depthwise(8, 960, 4, (7, 7), 3, "relu6", bias="shared"),
    depthwise(4, 120, 12, (28, 28), 5, "hardswish", residual=True),
    depthwise(2, 40, 24, (33, 31), 7),
    DEPTHWISE[-1],
]


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(case, layout, precision, device):
    with precision():
        op_checks.values(case, precision.dtype, layout, None, wide=precision.wide, device=device)


@pytest.mark.parametrize("precision", MAIN, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_of_misaligned_slices(case, precision, device):
    with precision():
        op_checks.values(case, precision.dtype, "sliced", None, wide=precision.wide, device=device)


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_values_of_whole_layers(case, layout, precision, device):
    with precision():
        tensors = operands(case, precision.dtype, layout, wide=precision.wide, device=device)
        truth = plain(case, in_float64(tensors))
        assert_close_to_truth(call(case, tensors), plain(case, tensors), truth)


def test_empty_batch(device):
    tensors = operands(test_ops_depthwise.WHOLE, device=device)
    for place in (0, 3, 5, 6, 7):
        tensors[place] = tensors[place][:0]
    tensors = [t.detach().requires_grad_() for t in tensors]
    output = call(test_ops_depthwise.WHOLE, tensors)
    assert output.shape == (0, 13, 5, 7)
    for gradient in torch.autograd.grad(output.sum(), tensors):
        assert not gradient.any(), "the gradients of nothing are zero"


OTHER_FORMS = {
    "dilation": {"dilation": 2, "padding": 2, "size": (7, 8)},
    "multiplier": {"out_channels": 12},
    "stride 3": {"stride": 3, "size": (7, 8)},
    "3x1": {"kernel": (3, 1), "padding": (1, 0)},
    "1-D": {"spatial": 1},
    "3-D": {"spatial": 3},
    "float64": {"dtype": torch.float64},
}


@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("form", OTHER_FORMS)
def test_what_has_no_kernel_is_still_right(form, layout, device):
    """'auto' goes on to the next backend, and the kernels asked for by name say why they cannot."""
    options = {"dtype": torch.float32, **OTHER_FORMS[form]}
    case = make_case("depthwise", device=device, layout=layout, **options)
    with IEEE():
        assert_close_to_truth(case.run(dcd), case.run(dcd.reference), case.truth())
    if ON_GPU:
        with ours("depthwise"), pytest.raises(RuntimeError, match="cuda"):
            case.run(dcd)
