# SPDX-License-Identifier: BSD-3-Clause
"""The op channel_sums, of images and their quadrants: values, gradients, tracing, bad input. On the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from dcd_kernels import extension

if not extension.LOADED:
    pytest.skip(extension.REASON, allow_module_level=True)

from dcd_kernels.ops import branch as ops


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 5, 7), (1, 3, 23, 23), (2, 4, 3, 4, 50), (3, 4, 1, 1), (1, 2, 96, 96)])
def test_sums(shape, dtype):
    x = torch.randn(shape).to(dtype)
    layouts = [x, x.transpose(1, -1).contiguous().transpose(1, -1), torch.stack((x, x), -1)[..., 1]]
    wanted = x.double().flatten(2).sum(2)
    for image in layouts:
        sums = ops.channel_sums(image)
        pixels = x[0, 0].numel()
        assert sums.shape == (shape[0], min(max(1, -(-pixels // 512)), 16), shape[1])
        assert sums.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(sums.double().sum(1), wanted, rtol=0, atol=1e-6 * pixels)


def test_sums_of_nothing():
    assert (ops.channel_sums(torch.zeros(2, 3, 0, 4)) == 0).all()
    assert ops.channel_sums(torch.zeros(0, 3, 4)).shape == (0, 1, 3)
    assert ops.channel_sums(torch.zeros(2, 0, 700)).shape == (2, 2, 0)


def test_sums_do_not_overflow_in_half():
    assert (ops.channel_sums(torch.full((1, 1, 400, 400), 2.0, dtype=torch.float16)).sum() == 320_000).all()


@pytest.mark.parametrize("shape", [(1, 2, 9), (1, 2, 33, 32)])
def test_gradient_of_sums(shape):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ops.channel_sums, x)
    assert torch.autograd.gradgradcheck(lambda x: ops.channel_sums(x).square(), x)
    gradient = torch.func.grad(lambda x: ops.channel_sums(x).square().sum())(x)
    (wanted,) = torch.autograd.grad(ops.channel_sums(x).square().sum(), x)
    torch.testing.assert_close(gradient, wanted)


def test_the_gradient_of_a_mean_is_not_written_out():
    x = torch.randn(2, 3, 40, 40, requires_grad=True)
    seen = []
    y = x.view_as(x)
    y.register_hook(lambda grad: seen.append(grad.stride()))
    ops.channel_sums(y).sum(1).square().sum().backward()
    assert seen[0][2:] == (0, 0)
    torch.testing.assert_close(x.grad, (2 * x.detach().sum((2, 3), keepdim=True)).expand_as(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_opcheck_of_sums(dtype):
    op = torch.ops.dcd_kernels.channel_sums.default
    for shape in ((2, 3, 5, 4), (1, 2, 30, 30)):
        image = torch.randn(shape).to(dtype)
        for layout in (torch.contiguous_format, torch.channels_last):
            torch.library.opcheck(op, (image.to(memory_format=layout).requires_grad_(), 1))


def test_fake_tensors():
    with FakeTensorMode():
        for pixels, tiles in ((0, 1), (1, 1), (512, 1), (513, 2), (8192, 16), (100_000, 16)):
            assert ops.channel_sums(torch.empty(2, 3, pixels)).shape == (2, tiles, 3)


def test_bad_images():
    with pytest.raises(RuntimeError, match="input must have at least 3 dimensions"):
        ops.channel_sums(torch.zeros(2, 3))
    with pytest.raises(RuntimeError, match="input must be float32, float64, float16 or bfloat16"):
        ops.channel_sums(torch.zeros(2, 3, 4, dtype=torch.int64))
    for shape in ((2, 3, 4), (2, 3, 4, 4, 4)):
        with pytest.raises(RuntimeError, match="input must have 4 dimensions"):
            ops.channel_sums(torch.zeros(shape), 2)
    for bins in (0, 3):
        with pytest.raises(RuntimeError, match=f"bins must be 1 or 2, got {bins}"):
            ops.channel_sums(torch.zeros(2, 3, 4, 4), bins)


# --- of quadrants

MAPS = [(1, 1), (1, 5), (7, 7), (8, 6), (7, 14), (2, 300), (33, 31), (112, 112), (301, 3)]


def quadrants(x: np.ndarray) -> np.ndarray:
    """Means over the four bins, (N, 4C), straight from their definition."""

    def bins(size):
        return [slice(i * size // 2, -(-(i + 1) * size // 2)) for i in range(2)]

    n, c, h, w = x.shape
    means = [x[:, :, rows, columns].mean((2, 3)) for rows in bins(h) for columns in bins(w)]
    return np.stack(means, 2).reshape(n, 4 * c)


def bin_pixels(h, w):
    return -(-h // 2) * -(-w // 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", MAPS, ids=str)
def test_quadrants(size, dtype):
    x = (torch.randn(2, 3, *size) + 0.5).to(dtype)
    window = torch.zeros(2, 4, size[0] + 2, size[1] + 1, dtype=dtype)[:, 1:, 1:-1, :-1]
    window.copy_(x)
    channels = torch.zeros(3, 5, *size, dtype=dtype).to(memory_format=torch.channels_last)[1:, 1:4]
    channels.copy_(x)
    for image in (x, x.to(memory_format=torch.channels_last), window, channels):
        sums = ops.channel_sums(image, 2)
        assert sums.is_contiguous() and sums.shape[::2] == (2, 12) and 1 <= sums.shape[1] <= 16
        assert sums.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        means = sums.double().sum(1) / bin_pixels(*size)
        torch.testing.assert_close(means, torch.from_numpy(quadrants(x.double().numpy())), rtol=0, atol=1e-6)
        pooled = F.adaptive_avg_pool2d(x.double(), 2).flatten(1)
        torch.testing.assert_close(means, pooled, rtol=0, atol=1e-6)


def test_quadrants_of_nothing():
    assert (ops.channel_sums(torch.zeros(2, 3, 0, 4), 2) == 0).all()
    assert (ops.channel_sums(torch.zeros(2, 3, 4, 0), 2) == 0).all()
    assert ops.channel_sums(torch.zeros(0, 3, 4, 4), 2).shape == (0, 1, 12)
    assert ops.channel_sums(torch.zeros(2, 0, 30, 30), 2).shape == (2, 2, 0)


def test_quadrants_do_not_mix():
    """Infinity in one corner, NaN in the opposite one, and in what the bins share."""
    x = torch.zeros(1, 1, 7, 7)
    x[0, 0, 0, 0], x[0, 0, 6, 6] = float("inf"), float("nan")
    sums = ops.channel_sums(x, 2)[0, 0]
    assert sums[0].isinf() and sums[3].isnan() and (sums[1:3] == 0).all()
    x = torch.zeros(1, 1, 7, 7)
    x[0, 0, 3, 3] = 1
    assert (ops.channel_sums(x, 2) == 1).all()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(1, 1), (3, 2), (4, 5), (61, 2)], ids=str)
def test_gradient_of_quadrants(size, layout):
    """Of every partial sum, and where their sum alone is used."""
    x = torch.randn(1, 2, *size, dtype=torch.float64).to(memory_format=layout).requires_grad_()
    for function in (lambda x: ops.channel_sums(x, 2), lambda x: ops.channel_sums(x, 2).sum(1)):
        assert torch.autograd.gradcheck(function, x)
        assert torch.autograd.gradgradcheck(lambda x, f=function: f(x).square(), x)
    gradient = torch.func.grad(lambda x: ops.channel_sums(x, 2).square().sum())(x)
    (wanted,) = torch.autograd.grad(ops.channel_sums(x, 2).square().sum(), x)
    torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize("rows_of_a_tile", [True, False])
def test_gradient_of_many_tiles(rows_of_a_tile):
    """(75, 60) is eight tiles of five rows of each bin, the last one of three."""
    x = torch.randn(2, 3, 75, 60, dtype=torch.float64, requires_grad=True)
    sums = ops.channel_sums(x, 2)
    assert sums.shape[1] == 8
    if rows_of_a_tile:
        v = torch.randn_like(sums)
        (got,) = torch.autograd.grad((sums * v).sum(), x)
        wanted = torch.zeros_like(got)
        for t, row in enumerate(range(0, 38, 5)):
            for b in range(4):
                top, left, bottom = b // 2 * 37, b % 2 * 30, min(row + 5, 38)
                part = wanted[:, :, top + row : top + bottom, left : left + 30]
                part += v[:, t, b::4, None, None]
    else:
        (got,) = torch.autograd.grad(sums.sum(1).sin().sum(), x)
        pooled = F.adaptive_avg_pool2d(x, 2) * bin_pixels(75, 60)
        (wanted,) = torch.autograd.grad(pooled.sin().sum(), x)
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gradient_of_quadrants_lies_as_the_image(dtype):
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 3, 7, 9).to(dtype).to(memory_format=layout).requires_grad_()
        seen = []
        y = x.view_as(x)
        y.register_hook(seen.append)
        ops.channel_sums(y, 2).sum(1).square().sum().backward()
        assert seen[0].is_contiguous(memory_format=layout) and seen[0].dtype == dtype
        wide = x.detach().double().requires_grad_()
        (F.adaptive_avg_pool2d(wide, 2) * 20).square().sum().backward()
        torch.testing.assert_close(x.grad.double(), wide.grad, rtol=torch.finfo(dtype).eps, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_opcheck_of_quadrants(dtype):
    op = torch.ops.dcd_kernels.channel_sums.default
    for shape in ((2, 3, 5, 4), (1, 2, 30, 31)):
        image = torch.randn(shape).to(dtype)
        for layout in (torch.contiguous_format, torch.channels_last):
            torch.library.opcheck(op, (image.to(memory_format=layout).requires_grad_(), 2))


def test_fake_quadrants():
    """As many tiles as the compiled code makes."""
    for size in [*MAPS, (0, 4), (4, 0), (14, 14), (28, 28), (56, 56), (1, 700), (700, 1), (500, 400)]:
        real = ops.channel_sums(torch.zeros(1, 1, *size), 2)
        with FakeTensorMode():
            assert ops.channel_sums(torch.empty(1, 1, *size), 2).shape == real.shape
