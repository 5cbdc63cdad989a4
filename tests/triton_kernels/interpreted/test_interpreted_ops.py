# SPDX-License-Identifier: BSD-3-Clause
"""pointwise and apply on the Triton kernels, interpreted, held to what every backend is held to."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

import op_checks
import operands as given
import test_grad
import test_ops_apply
import test_ops_pointwise
import torch
from cases import assert_close_to_truth, in_layout
from operands import HALF, LAYOUTS, Case, call, label, operands, plain

from dcd_kernels.arguments import ACTIVATIONS

pytestmark = [
    pytest.mark.usefixtures("triton_on_cpu"),
    pytest.mark.filterwarnings("ignore:invalid value encountered"),  # NumPy on NaN and infinity
]

# One pixel, 49, 63, odd sizes; 3, 24, 40 and more than a tile of channels; every padding of the latent.
POINTWISE = [
    Case("pointwise", 1, 3, 1, 1, (1,)),
    Case("pointwise", 2, 3, 7, 3, (5,), "relu", bias="shared"),
    Case("pointwise", 3, 24, 20, 11, (7, 7), "silu", bias="sample", residual=True),
    Case("pointwise", 1, 24, 33, 3, (1, 1), "relu6", bias="shared", residual=True),
    Case("pointwise", 7, 40, 24, 4, (1, 1), "relu", bias="sample"),
    Case("pointwise", 2, 40, 33, 16, (9, 7), "hardswish"),
    Case("pointwise", 3, 40, 20, 1, (2, 5, 3), "relu", residual=True),
    Case("pointwise", 2, 40, 70, 33, (7, 7), "relu6", bias="shared", residual=True),
    Case("pointwise", 2, 24, 48, 4, (9, 7), lam=False),
    Case("pointwise", 2, 24, 48, 4, (9, 7), dynamic=False),
    Case("pointwise", 2, 24, 48, 4, (9, 7), lam=False, dynamic=False, bias="sample"),
    Case("pointwise", 2, 12, 20, 3, (3, 5), "relu6", blocks=4, bias="shared"),
    Case("pointwise", 3, 14, 14, 1, (49,), "silu", blocks=7, residual=True),
    Case("pointwise", 2, 16, 96, 4, (17, 13), "relu6", bias="sample", residual=True),
    Case("pointwise", 1, 136, 150, 8, (7, 9), "silu", bias="shared"),
]
APPLY = [
    Case("apply", 1, 3, 1, 1, (1,)),
    Case("apply", 2, 3, 7, 3, (5,), "relu", bias="shared"),
    Case("apply", 3, 24, 20, 11, (7, 7), "silu", bias="sample", residual=True),
    Case("apply", 7, 24, 33, 3, (1, 1), "relu6", bias="shared", residual=True),
    Case("apply", 2, 40, 33, 16, (9, 7), "hardswish"),
    Case("apply", 2, 24, 48, 4, (9, 7), lam=False),
    Case("apply", 2, 24, 48, 4, (9, 7), dynamic=False, bias="sample"),
    Case("apply", 2, 24, 48, 4, (9, 7), "relu", lam=False, dynamic=False, bias="sample", residual=True),
    Case("apply", 2, 12, 20, 3, (3, 5), "relu6", blocks=4, bias="shared"),
    Case("apply", 3, 14, 14, 1, (49,), "silu", blocks=7, residual=True),
    Case("apply", 2, 12, 33, 3, (5, 3), "relu", given_latent=True, bias="shared"),
    Case("apply", 1, 44, 20, 11, (7, 7), lam=False, given_latent=True, residual=True),
    Case("apply", 2, 40, 70, 33, (7, 7), given_latent=True),
    Case("apply", 1, 136, 150, 8, (7, 9), "relu", bias="sample", residual=True),
]
CASES = POINTWISE + APPLY
WHOLE = {case.op: case for case in (POINTWISE[2], APPLY[2])}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=label)
def test_values(case, layout, launches):
    op_checks.values(case, torch.float32, layout, None)


# Beside half-precision images lam, phi and bias are float32 under autocast, and half in a converted network.
MIXED = [
    pytest.param(layout, wide, id=f"{layout}-{'wide' if wide else 'half'}", marks=marks)
    for layout, wide, marks in (
        ("contiguous", True, ()),
        ("channels_last", False, ()),
        ("sliced", True, pytest.mark.full),
        ("contiguous", False, pytest.mark.full),
        ("channels_last", True, pytest.mark.full),
    )
]


@pytest.mark.parametrize(("layout", "wide"), MIXED)
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("case", CASES, ids=label)
def test_values_half(case, dtype, layout, wide, launches):
    op_checks.values(case, dtype, layout, None, wide=wide)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("case", WHOLE.values(), ids=label)
def test_values_of_each_activation(case, activation, launches):
    op_checks.values(replace(case, activation=activation), torch.float32, "channels_last", None)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=label)
def test_gradients(case, layout, launches):
    test_grad.check_values(case, torch.float32, layout, None)


@pytest.mark.parametrize(("layout", "wide"), MIXED)
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("case", CASES, ids=label)
def test_gradients_half(case, dtype, layout, wide, launches):
    test_grad.check_values(case, dtype, layout, None, wide=wide)


@pytest.mark.parametrize("layout", (LAYOUTS[0], pytest.param(LAYOUTS[1], marks=pytest.mark.full)))
@pytest.mark.parametrize("case", WHOLE.values(), ids=label)
def test_any_strides_of_the_gradient(case, layout, launches):
    test_grad.test_any_strides_of_the_gradient(case, layout, "relu")


def test_subsets_of_the_returns(launches):
    """Each alone, and each left out; all 64 under the `full` marker."""
    for case in (test_grad.TINY[0], test_grad.TINY[4]):
        op = getattr(torch.ops.dcd_kernels, case.op + "_backward")
        factors = operands(case)[:6]
        grad = torch.randn(case.batch, case.out_channels, *case.size)
        full = op(grad, *factors, 0b111111)
        for needs in (0, *(1 << i for i in range(6)), *(0b111111 ^ 1 << i for i in range(6))):
            for index, (mine, right) in enumerate(zip(op(grad, *factors, needs), full, strict=True)):
                if needs >> index & 1:
                    torch.testing.assert_close(mine, right)
                else:
                    assert mine.shape == (0,)


@pytest.mark.full
@pytest.mark.parametrize(
    "case", [case for case in test_grad.TINY if case.lam and case.op in WHOLE], ids=label
)
def test_each_subset_of_the_returns(case, launches):
    test_grad.test_each_subset_of_the_returns(case)


@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("case", CASES[::4], ids=label)
def test_same_inputs_same_bits(case, layout, launches):
    op_checks.same_bits(case, layout, None, 1)


@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("case", [case for case in CASES if case.residual][::2], ids=label)
def test_nan_and_infinity_in_the_residual(case, layout, launches):
    op_checks.propagation_through_residual(case, layout, None)


@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("case", (*WHOLE.values(), POINTWISE[4], POINTWISE[13], APPLY[11]), ids=label)
def test_nan_and_infinity(case, layout, launches):
    op_checks.infinity_is_not_lost(case, layout, None)
    for place, factor in enumerate(case.names[:6]):
        if case.shapes()[factor] is not None:
            op_checks.nan_stays_in_its_pixels(case, layout, None, place)


@pytest.mark.parametrize("case", WHOLE.values(), ids=label)
def test_mixed_layouts_of_the_images(case, launches):
    images = [i for i, factor in enumerate(case.names) if factor in ("input", "static", "residual")]
    for own in LAYOUTS[:2]:
        tensors = operands(case, layout=own)
        expected = call(case, tensors)
        for place in images[1:]:
            for other in LAYOUTS:
                mixed = [in_layout(t, other) if i == place else t for i, t in enumerate(tensors)]
                got = call(case, mixed)
                # another tile may suit other layouts, and add up in another order
                assert_close_to_truth(got, plain(case, mixed), given.truth(case, mixed))
                assert got.stride() == expected.stride()


def test_strided_samples_of_larger_images(launches):
    """What layers of stride 2 pass: views with gaps, in each layout."""
    for case in WHOLE.values():
        for layout in LAYOUTS[:2]:
            tensors = operands(case, layout=layout)
            expected = call(case, tensors)
            place = case.names.index("input")
            larger = torch.full((3, 24, 14, 14), float("nan"))
            if layout == "channels_last":
                larger = larger.contiguous(memory_format=torch.channels_last)
            larger[:, :, ::2, ::2] = tensors[place]
            tensors[place] = larger[:, :, ::2, ::2]
            torch.testing.assert_close(call(case, tensors), expected)


@pytest.mark.full
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pixels", (1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 196))
@pytest.mark.parametrize("channels", ((1, 1), (8, 9), (33, 65), (64, 16), (130, 7)))
@pytest.mark.parametrize("op", WHOLE)
def test_values_at_every_tile_edge(op, channels, pixels, layout, launches):
    for latent in (1, 4, 16, 17):
        case = Case(op, 2, *channels, latent, (pixels,), "relu", bias="sample", residual=True)
        op_checks.values(case, torch.float32, layout, None)
        test_grad.check_values(case, torch.float32, layout, None)


# What every backend refuses, and accepts without a pixel or a sample
test_wrong_shapes_of_pointwise = test_ops_pointwise.test_wrong_shapes_name_the_argument
test_incomplete_residual_of_pointwise = test_ops_pointwise.test_incomplete_residual
test_blocks_that_do_not_divide = test_ops_pointwise.test_blocks_that_do_not_divide
test_no_input_channels = test_ops_pointwise.test_no_input_channels
test_unknown_activation = test_ops_pointwise.test_unknown_activation
test_mixed_dtypes = test_ops_pointwise.test_mixed_dtypes
test_empty_pointwise = test_ops_pointwise.test_empty
test_expanded_operands = test_ops_pointwise.test_expanded_operands
test_wrong_shapes_of_apply = test_ops_apply.test_wrong_shapes_name_the_argument
test_incomplete_residual_of_apply = test_ops_apply.test_incomplete_residual
test_rectangular_phi_must_fit_the_latent = test_ops_apply.test_rectangular_phi_must_fit_the_latent
test_input_is_ignored_without_the_residual = test_ops_apply.test_input_is_ignored_without_the_residual
test_strided_sample_of_a_larger_input = test_ops_apply.test_strided_sample_of_a_larger_input
test_empty_apply = test_ops_apply.test_empty


@pytest.mark.parametrize("size", ((0, 3, 7), (2, 0, 7)), ids=str)
@pytest.mark.parametrize("op", WHOLE)
def test_gradients_without_a_sample_or_a_pixel(op, size):
    case = Case(op, size[0], 13, 21, 5, size[1:], "relu", bias="sample", residual=True)
    tensors = test_grad.with_grad(case, operands(case))
    output = call(case, tensors)
    for tensor, gradient in zip(tensors, torch.autograd.grad(output.sum(), tensors), strict=True):
        assert gradient.shape == tensor.shape
        assert not gradient.any()


def test_a_dtype_without_kernels():
    case = Case("pointwise", 1, 3, 5, 1, (4,))
    tensors = [None if t is None else t.double() for t in operands(case)]
    with pytest.raises(RuntimeError, match=r"must be float32, bfloat16 or float16, got torch\.float64"):
        call(case, tensors)


@pytest.mark.parametrize("place,name", [(2, "p"), (3, "phi"), (4, "q"), (5, "lam")])
def test_the_gradient_of_an_absent_factor(place, name):
    case = Case("pointwise", 1, 3, 5, 1, (4,), lam=False, dynamic=False)
    factors = operands(case)[:6]
    with pytest.raises(RuntimeError, match=rf"gradient of {name}, which is not given"):
        torch.ops.dcd_kernels.pointwise_backward(torch.ones(1, 5, 4), *factors, 1 << place)


def test_pixels_too_far_apart_for_32_bits_are_copied():
    from dcd_kernels.backends.triton import launch

    far = torch.empty_strided((2, 8, 9), (1, 1, 2**28), device="meta")
    assert launch._evenly(far) is None
    near = torch.empty_strided((2, 8, 9), (2**40, 1, 2**27), device="meta")
    assert launch._evenly(near) == (2**40, 1, 2**27)
