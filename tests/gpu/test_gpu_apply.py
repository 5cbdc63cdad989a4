# SPDX-License-Identifier: BSD-3-Clause
"""The apply op on the GPU: values against the oracle, behind torch's own convolutions too."""

from __future__ import annotations

import op_checks
import pytest
import test_ops_apply
import torch
from cases import assert_close_to_truth, in_layout
from on_device import MAIN, PRECISIONS
from operands import LAYOUTS, Case, call, in_float64, operands, plain

CASES = test_ops_apply.CASES + test_ops_apply.EACH_ACTIVATION
LAYERS = [
    Case("apply", 4, 64, 64, 8, (56, 56), "relu", bias="shared"),
    Case("apply", 8, 512, 512, 16, (7, 7), "relu6", bias="sample", residual=True),
    Case("apply", 4, 256, 256, 16, (14, 14), given_latent=True),
    Case("apply", 4, 96, 144, 45, (13, 11), "silu", lam=False),
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


def test_mixed_layouts_of_the_images(device):
    """static and input come from different layers, often in different layouts."""
    case = test_ops_apply.TILED
    for own in LAYOUTS[:2]:
        tensors = operands(case, layout=own, device=device)
        expected = call(case, tensors)
        for place, layout in ((1, "contiguous"), (1, "channels_last"), (1, "sliced"), (7, "channels_last")):
            others = list(tensors)
            others[place] = in_layout(tensors[place], layout)
            got = call(case, others)
            torch.testing.assert_close(got, expected)
            assert got.stride() == expected.stride()


def test_strided_sample_of_a_larger_input(device):
    """What functional.py passes for stride 2: a view with gaps."""
    case = test_ops_apply.WHOLE
    tensors = operands(case, device=device)
    larger = torch.full((2, 13, 6, 14), float("nan"), device=device)
    larger[:, :, ::2, ::2] = tensors[1]
    expected = call(case, tensors)
    tensors[1] = larger[:, :, ::2, ::2]
    torch.testing.assert_close(call(case, tensors), expected)


def test_input_is_not_read_without_the_residual(device):
    case = test_ops_apply.FINISH
    tensors = operands(case, device=device)
    expected = call(case, tensors)
    tensors[1] = torch.full_like(tensors[0], float("nan"))
    assert torch.equal(call(case, tensors), expected)
