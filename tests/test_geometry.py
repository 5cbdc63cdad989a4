# SPDX-License-Identifier: BSD-3-Clause
"""Geometry against torch's own convolutions, and sampling against a loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dcd_kernels import geometry

CONVOLUTIONS = {1: torch.conv1d, 2: torch.conv2d, 3: torch.conv3d}


@st.composite
def convolutions(draw):
    spatial = draw(st.integers(1, 3))
    per_axis = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(spatial))  # noqa: E731
    padding = draw(st.one_of(st.sampled_from(["same", "valid"]), st.integers(0, 3), st.just(per_axis(0, 3))))
    stride = 1 if padding == "same" else draw(st.one_of(st.integers(1, 4), st.just(per_axis(1, 4))))
    return per_axis(1, 9), per_axis(1, 4), stride, padding, per_axis(1, 3)


@settings(max_examples=150, deadline=None)
@given(convolutions())
def test_output_size_and_refusals_are_torch_s(call):
    size, kernel, stride, padding, dilation = call
    x, weight = torch.zeros(1, 1, *size), torch.zeros(1, 1, *kernel)
    try:
        expected = CONVOLUTIONS[len(size)](x, weight, None, stride, padding, dilation)
    except RuntimeError as error:
        assert "Kernel size can't be greater" in str(error)
        with pytest.raises(ValueError, match="the padded input has only"):
            geometry.resolve("test", size, kernel, stride, padding, dilation)
    else:
        where = geometry.resolve("test", size, kernel, stride, padding, dilation)
        assert where.output == tuple(expected.shape[2:])
        padded = geometry.pad_uneven(x, where)
        same = CONVOLUTIONS[len(size)](padded, weight, None, where.stride, where.low, where.dilation)
        assert same.shape == expected.shape


@settings(max_examples=60, deadline=None)
@given(convolutions(), st.randoms(use_true_random=False))
def test_centre_is_the_middle_tap(call, random):
    size, kernel, stride, padding, dilation = call
    kernel = tuple(k // 2 * 2 + 1 for k in kernel)
    assume(
        padding == "same" or all(n >= d * (k - 1) + 1 for n, k, d in zip(size, kernel, dilation, strict=True))
    )
    x = torch.randn(2, 1, *size, dtype=torch.float64)
    weight = torch.zeros(1, 1, *kernel, dtype=torch.float64)
    weight[(0, 0, *(k // 2 for k in kernel))] = 1
    expected = CONVOLUTIONS[len(size)](x, weight, None, stride, padding, dilation)
    where = geometry.resolve("test", size, kernel, stride, padding, dilation)
    assert torch.equal(geometry.sample(x, where.stride, where.centre, where.output), expected)


@st.composite
def samplings(draw):
    spatial = draw(st.integers(1, 3))
    per_axis = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(spatial))  # noqa: E731
    return per_axis(1, 6), per_axis(1, 4), per_axis(-9, 9), per_axis(1, 6)


@settings(max_examples=150, deadline=None)
@given(samplings())
def test_sample(call):
    length, stride, offset, size = call
    x = torch.arange(1.0, 1 + 2 * int(np.prod(length))).reshape(1, 2, *length)
    expected = torch.zeros(1, 2, *size)
    for pixel in np.ndindex(*size):
        read = [o * s + f for o, s, f in zip(pixel, stride, offset, strict=True)]
        if all(0 <= i < n for i, n in zip(read, length, strict=True)):
            expected[(0, slice(None), *pixel)] = x[(0, slice(None), *read)]
    assert torch.equal(geometry.sample(x, stride, offset, size), expected)


def test_sample_copies_only_to_pad():
    x = torch.zeros(2, 3, 7, 8)
    assert geometry.sample(x, (1, 1), (0, 0), (7, 8)) is x
    strided = geometry.sample(x, (2, 3), (1, 0), (3, 3))
    assert strided.data_ptr() == x[:, :, 1:].data_ptr()
    assert strided.stride() == (168, 56, 16, 3)
    last = x.to(memory_format=torch.channels_last)
    assert geometry.sample(last, (2, 2), (0, 0), (4, 4)).stride(1) == 1
    assert geometry.sample(last, (1, 1), (-1, -1), (7, 8)).stride(1) == 1


def test_sample_is_twice_differentiable():
    x = torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    function = lambda x: geometry.sample(x, (2, 1), (-1, 1), (3, 4)).square()  # noqa: E731
    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradgradcheck(function, x)


def test_show():
    assert geometry.show((1, "L", 3)) == "(1, L, 3)"
    assert geometry.show(torch.Size([4])) == "(4,)"
    assert geometry.show("full") == "'full'"
    assert geometry.show(()) == "()"
