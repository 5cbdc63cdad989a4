# SPDX-License-Identifier: BSD-3-Clause
"""The compiled depthwise op: cases, and what test_ops.py does not ask of every op."""

import itertools

import op_checks
import pytest
import torch
from operands import (
    ISAS,
    LAYOUTS,
    Case,
    call,
    instruction_set,
    operands,
)


def _case(
    batch,
    channels,
    latent,
    size,
    kernel,
    activation=None,
    *,
    multiplier=1,
    stride=1,
    padding=None,
    dilation=1,
    **options,
):
    rank = len(size)
    if isinstance(kernel, int):
        kernel = (kernel,) * rank
    spread = (dilation,) * rank
    pad = (
        tuple(d * (k // 2) for d, k in zip(spread, kernel, strict=True))
        if padding is None
        else (padding,) * rank
    )
    return Case("depthwise", batch, channels, multiplier * channels, latent, size, activation, kernel=kernel,
                stride=(stride,) * rank, padding=pad, dilation=spread, **options)  # fmt: skip


CASES = [
    # awkward sizes: latent 1, 3, 11; one and three channels; outputs of 1, 5, 49 pixels
    _case(1, 1, 1, (1,), 3),
    _case(2, 3, 1, (5,), 3, "relu", bias="shared"),
    _case(3, 3, 4, (7, 7), 3, "silu", bias="sample", residual=True),
    _case(1, 33, 3, (1, 1), 3, "relu6", bias="shared", residual=True),
    _case(2, 20, 11, (5, 9), 5, "hardswish"),
    _case(2, 7, 13, (3, 5, 4), 3, "relu", residual=True),
    # the terms one by one
    _case(2, 20, 4, (7, 7), 3, lam=False),
    _case(2, 20, 4, (7, 7), 3, dynamic=False),
    _case(2, 20, 4, (7, 7), 3, lam=False, dynamic=False, bias="sample"),
    # geometry: stride, dilation, no and too much padding, even and uneven kernels, channel multiplier
    _case(2, 17, 4, (9, 12), 3, "relu6", stride=2, bias="shared"),
    _case(2, 17, 4, (9, 12), 3, dilation=2, residual=True),
    _case(2, 17, 4, (8, 8), 3, padding=0),
    _case(1, 9, 4, (6, 6), 3, padding=4),
    _case(1, 9, 2, (6, 6), 2, padding=1, stride=3),
    _case(2, 9, 3, (11, 6), (5, 1), "relu", bias="shared"),
    _case(2, 9, 4, (7, 7), 3, "silu", multiplier=3, bias="sample", residual=True),
    _case(2, 8, 3, (12,), 7, stride=2, dilation=2),
    _case(1, 5, 8, (4, 6, 5), 3, stride=2, multiplier=2),
    # sizes that reach full tiles
    _case(2, 32, 4, (28, 28), 3, "relu6", bias="shared"),
    _case(1, 48, 4, (33, 31), 3, stride=2),
    _case(1, 40, 12, (14, 14), 5, "hardswish", bias="sample", residual=True),
]
WHOLE = _case(2, 13, 5, (5, 7), 3, bias="sample", residual=True)
UNPADDED = _case(2, 13, 5, (5, 7), 3, padding=0)
DOUBLE = _case(2, 9, 4, (7, 7), 3, stride=2, multiplier=2, bias="shared")
TILED = _case(2, 32, 4, (28, 28), 3, bias="sample", residual=True)
EACH_ACTIVATION = [
    _case(2, 18, 4, (9, 6), 3, name, bias="shared") for name in (None, "relu", "relu6", "silu", "hardswish")
]
IN_HALF = CASES[1:6] + CASES[9:11] + CASES[15:16]


@pytest.mark.full
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kernel", (1, 2, 3, 5, 7))
@pytest.mark.parametrize("size", ((1, 1), (1, 17), (7, 8), (16, 15), (3, 33), (20, 49)))
def test_values_of_every_geometry(size, kernel, layout, isa):
    for stride, padding, dilation in itertools.product((1, 2, 3), (0, 1, 3), (1, 2)):
        case = _case(
            2, 11, 3, size, kernel, "relu", stride=stride, padding=padding, dilation=dilation, bias="shared"
        )
        if min(case.out_size) > 0:
            op_checks.values(case, torch.float32, layout, isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_nan_and_infinity(layout, isa):
    op_checks.propagation_through_residual(TILED, layout, isa)
    for case in (WHOLE, TILED, DOUBLE):
        op_checks.infinity_is_not_lost(case, layout, isa)
        for place in (0, 2, 3, 5):
            op_checks.nan_stays_in_its_pixels(case, layout, isa, place)
    # One NaN tap: whether 0 * NaN of the padding counts differs between torch's own kernels.
    for place in (1, 4):
        op_checks.nan_stays_in_its_pixels(UNPADDED, layout, isa, place)


def test_empty_batch():
    tensors = operands(WHOLE)
    for place in (0, 3, 5, 6, 7):
        tensors[place] = tensors[place][:0]
    assert call(WHOLE, tensors).shape == (0, 13, 5, 7)


@pytest.mark.parametrize(
    ("place", "shape", "named"),
    (
        (0, (2, 13), "input"),
        (1, (12, 1, 3, 3), "weight"),
        (1, (13, 3, 3), "weight"),
        (2, (12, 5), "p"),
        (3, (2, 5, 4), "phi"),
        (3, (1, 5, 5), "phi"),
        (4, (8, 5), "r"),
        (5, (1, 13), "lam"),
        (6, (3, 13), "bias"),
        (7, (2, 13, 7, 5), "residual"),
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
    with pytest.raises(RuntimeError, match=r"\b(p|phi|r)\b"):
        call(WHOLE, tensors)


@pytest.mark.parametrize(
    ("stride", "padding", "dilation", "named"),
    (
        ((0, 1), (1, 1), (1, 1), "stride"),
        ((1,), (1, 1), (1, 1), "stride"),
        ((1, 1), (-1, 1), (1, 1), "padding"),
        ((1, 1), (1,), (1, 1), "padding"),
        ((1, 1), (1, 1), (1, 0), "dilation"),
        ((1, 1), (1, 1), (1, 1, 1), "dilation"),
    ),
)
def test_wrong_geometry_names_the_argument(stride, padding, dilation, named):
    tensors = operands(WHOLE)
    with pytest.raises(RuntimeError, match=named):
        torch.ops.dcd_kernels.depthwise(*tensors, stride, padding, dilation, 0)


FAR = [
    # taps that lie in the padding for every output, for some, and for none; a window would take up to 2^60
    (((4, 4), 3), {"padding": 10**9, "dilation": 10**9}),
    (((4, 5), 3), {"padding": 10**5, "dilation": 10**5, "residual": True, "bias": "sample"}),
    (((4, 5), 3), {"padding": 2 * 10**9, "dilation": 10**9, "stride": 10**9, "bias": "shared"}),
    (((3, 4), 3), {"padding": 2 * 10**9, "dilation": 10**9 - 1, "stride": 10**9, "multiplier": 2}),
    (((2, 3, 4), 3), {"padding": 10**5, "dilation": 10**5, "multiplier": 2}),
    (((2**18 + 9,), 3), {"padding": 0, "dilation": 2**17 + 1}),
    # strides far larger than the input
    (((50,), 3), {"padding": 1, "stride": 10**6}),
    (((5, 4, 3), 3), {"padding": 1, "stride": 2**21}),
    (((5, 4, 3), 2), {"padding": 2**21, "stride": 2**21 - 1}),
]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("sizes", "geometry"), FAR, ids=str)
def test_geometry_far_beyond_the_input(sizes, geometry, layout, isa):
    """Against the convolution by its definition, for every tap and position that lie inside the input."""
    case = _case(2, 5, 2, *sizes, "silu" if geometry.get("residual") else None, **geometry)
    tensors = operands(case, layout=layout, requires_grad=True)
    exact = [None if t is None else t.detach().double().requires_grad_() for t in tensors]
    expected = _by_definition(case, *exact)
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0))
    expected.backward(grad.double())
    with instruction_set(isa):
        got = call(case, tensors)
        got.backward(grad)
    torch.testing.assert_close(got, expected.float(), rtol=1e-4, atol=1e-4)
    for mine, true in zip(tensors, exact, strict=True):
        if true is not None:
            scale = true.grad.abs().max().clamp(min=1.0).item()
            torch.testing.assert_close(mine.grad, true.grad.float(), rtol=1e-4, atol=1e-5 * scale)


def _by_definition(case, input, weight, p, phi, r, lam, bias, residual):
    weights = lam[:, :, None] * weight.flatten(1) + torch.einsum("oa,nac,tc->not", p, phi, r)
    rows = input.repeat_interleave(weight.shape[0] // input.shape[1], 1)
    every = (torch.arange(weights.shape[0])[:, None], torch.arange(weights.shape[1])[None, :])
    output = input.new_zeros(*weights.shape[:2], *case.out_size)
    for t, tap in enumerate(itertools.product(*(range(k) for k in case.kernel))):
        at, whence = [], []
        for size, out, stride, padding, dilation, k in zip(
            case.size, case.out_size, case.stride, case.padding, case.dilation, tap, strict=True
        ):
            place = torch.arange(out) * stride - padding + k * dilation
            inside = (place >= 0) & (place < size)
            at.append(torch.arange(out)[inside])
            whence.append(place[inside])
        lead = [i.reshape(*i.shape, *(1,) * len(tap)) for i in every]
        grid, source = torch.meshgrid(*at, indexing="ij"), torch.meshgrid(*whence, indexing="ij")
        term = weights[:, :, t].reshape(*weights.shape[:2], *(1,) * len(tap)) * rows[:, :, *source]
        output = output.index_put((*lead, *grid), term, accumulate=True)
    if bias is not None:
        output = output + bias.reshape(-1, weights.shape[1], *(1,) * len(case.kernel))
    if residual is not None:
        output = output + residual
    return torch.nn.functional.silu(output) if case.activation == "silu" else output


@pytest.mark.parametrize(
    ("stride", "padding", "dilation", "named"),
    (
        ((1,), (0,), (2**62,), rf"dilation must .* got \({2**62},\)"),
        ((1,), (2**61,), (2**61,), rf"padding must .* got \({2**61},\)"),
        ((2**31,), (1,), (1,), rf"stride must .* got \({2**31},\)"),
        ((1,), (0,), (2**31 - 1,), r"kernel must .* got kernel size 5 with dilation 2147483647 .* padding 0"),
        ((1, 1), (1, 1), (1, 1), r"stride must have one entry for each of 1 .* got \(1, 1\)"),
    ),
)
def test_geometry_that_no_kernel_can_count(stride, padding, dilation, named):
    tensors = torch.randn(2, 2, 3), torch.randn(2, 1, 5)
    with pytest.raises(RuntimeError, match=named):
        torch.ops.dcd_kernels.depthwise(*tensors, *[None] * 6, stride, padding, dilation, 0)
    with pytest.raises(RuntimeError, match=named):
        torch.ops.dcd_kernels.depthwise_backward(
            tensors[0], *tensors, *[None] * 4, stride, padding, dilation, 0b11
        )


def test_output_that_cannot_be_counted():
    with pytest.raises(RuntimeError, match=r"padding must .* got \(2000000000, 2000000000, 2000000000\)"):
        torch.ops.dcd_kernels.depthwise(
            torch.randn(1, 1, 3, 3, 3), torch.randn(1, 1, 1, 1, 1), *[None] * 6, [1] * 3, [2 * 10**9] * 3,
            [1] * 3, 0,
        )  # fmt: skip
