# SPDX-License-Identifier: BSD-3-Clause
"""The CUDA depthwise kernels' own code on the CPU: accesses, values, gradients, determinism."""

from __future__ import annotations

import depthwise_kernels as kernels
import pytest
import torch
from cases import assert_close_to_truth
from operands import LAYOUTS, Case, gradients, in_float64, operands, plain, truth

pytestmark = pytest.mark.skipif(bool(kernels.unavailable()), reason=kernels.unavailable())


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    return kernels.build(tmp_path_factory.mktemp("depthwise"))


def _case(batch, channels, latent, size, kernel, activation=None, *, stride=1, padding=None, **options):
    padding = kernel // 2 if padding is None else padding
    pads = padding if isinstance(padding, tuple) else (padding, padding)
    return Case("depthwise", batch, channels, channels, latent, size, activation, kernel=(kernel, kernel),
                stride=(stride, stride), padding=pads, dilation=(1, 1), **options)  # fmt: skip


CASES = [
    # few: one pixel, one channel, one latent component
    _case(1, 1, 1, (1, 1), 3),
    _case(2, 3, 4, (1, 5), 3, "relu", bias="shared"),
    _case(1, 33, 3, (1, 1), 7, "relu6", bias="shared", residual=True),
    _case(2, 2, 4, (9, 2), 3, stride=2),
    # the usual planes: 7, 14, 28; whole vectors (W = 16, 24), half ones (W = 20, 18), none (odd)
    _case(2, 40, 4, (7, 7), 3, "relu6", bias="sample", residual=True),
    _case(1, 34, 4, (14, 14), 3, "silu", bias="shared"),
    _case(2, 5, 4, (12, 16), 3, "hardswish", residual=True),
    _case(1, 3, 4, (10, 20), 3, "relu", residual=True),
    _case(1, 8, 4, (6, 18), 3, bias="sample"),
    _case(2, 16, 4, (28, 24), 3, stride=2),
    _case(1, 7, 4, (15, 13), 3, stride=2, residual=True),
    _case(1, 32, 4, (13, 16), 3, stride=2),
    # several tiles both ways
    _case(1, 2, 4, (9, 150), 3, "relu"),
    _case(1, 2, 4, (70, 61), 3),
    _case(1, 33, 2, (40, 33), 3, stride=2),
    # larger kernels
    _case(2, 20, 12, (9, 11), 5, "hardswish"),
    _case(1, 6, 12, (12, 16), 5, stride=2, residual=True),
    _case(2, 18, 24, (8, 7), 7, bias="sample"),
    _case(1, 9, 24, (17, 16), 7, stride=2),
    # padding: none, more than the kernel, uneven
    _case(1, 4, 4, (8, 8), 3, padding=0),
    _case(1, 4, 4, (7, 9), 3, padding=0, stride=2),
    _case(1, 5, 4, (4, 6), 3, padding=4),
    _case(1, 5, 4, (4, 7), 3, padding=5, stride=2),
    _case(1, 6, 6, (6, 9), 5, padding=(0, 3)),
    _case(2, 6, 6, (7, 8), 5, padding=(1, 2), stride=2),
    # the terms one by one, and a latent size above the number of taps
    _case(2, 20, 4, (7, 7), 3, lam=False),
    _case(2, 20, 4, (7, 7), 3, dynamic=False),
    _case(2, 20, 11, (6, 8), 3),
    _case(1, 33, 48, (5, 5), 7),
]
HALF = (torch.float16, torch.bfloat16)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward(host, case, layout):
    tensors = operands(case, torch.float32, layout)
    got, _ = kernels.convolve(host, case, tensors)
    assert_close_to_truth(got, plain(case, tensors), truth(case, tensors))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_backward(host, case, layout):
    _backward(host, case, torch.float32, layout)


@pytest.mark.parametrize("wide", (False, True))
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES[::3], ids=str)
def test_half_precision(host, case, layout, dtype, wide):
    tensors = operands(case, dtype, layout, wide=wide)
    got, _ = kernels.convolve(host, case, tensors)
    assert_close_to_truth(got, plain(case, tensors), truth(case, tensors))
    _backward(host, case, dtype, layout, wide=wide)


def _backward(host, case, dtype, layout, wide=False):
    linear = Case(**{**case.__dict__, "activation": None, "bias": None, "residual": False})
    tensors = operands(linear, dtype, layout, wide=wide, requires_grad=True)
    grad = torch.randn(linear.batch, linear.out_channels, *linear.out_size).to(dtype)
    if layout == "channels_last":
        grad = grad.movedim(1, -1).contiguous().movedim(-1, 1)
    found = kernels.backward(host, linear, [None if t is None else t.detach() for t in tensors], grad)
    exact = in_float64(tensors)
    wanted = gradients(plain(linear, exact), exact, grad.double())
    usual = gradients(plain(linear, tensors), tensors, grad)
    names = ("input", "weight", "p", "phi", "r", "lam")
    for name, got, same, right in zip(names, found, usual[:6], wanted[:6], strict=True):
        if right is not None:
            assert_close_to_truth(got, same, right, what=f"gradient of {name}:")


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
def test_the_order_of_threads_is_immaterial(host, layout):
    for case in (CASES[4], CASES[11], CASES[13], CASES[17]):
        tensors = operands(case, torch.float32, layout)
        grad = torch.randn(case.batch, case.out_channels, *case.out_size)
        runs = []
        for backwards in (False, True):
            output, _ = kernels.convolve(host, case, tensors, backwards=backwards)
            runs.append([output, *kernels.backward(host, case, tensors, grad, backwards=backwards)])
        for first, second in zip(*runs, strict=True):
            assert torch.equal(first, second)


def test_rounding_of_the_tests_themselves(host):
    values = torch.randn(2000) * torch.logspace(-9, 5, 2000)
    ties = torch.tensor([1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-8, 1 + 3 * 2**-8, 65519.0, 65520.0, 2**-25, 0.0])
    for value in torch.cat([values, ties, -ties]).tolist():
        for dtype, code in ((torch.float16, 1), (torch.bfloat16, 2)):
            assert host.host_rounded(value, code) == torch.tensor(value).to(dtype).item(), (value, dtype)


WIDE = {
    # (channels, size, layout) -> elements of float16 that are copied at once
    (32, (8, 7), "channels_last"): 8,
    (24, (5, 5), "channels_last"): 8,
    (12, (5, 5), "channels_last"): 4,
    (9, (5, 5), "channels_last"): 1,
    (5, (6, 56), "contiguous"): 8,
    (5, (6, 28), "contiguous"): 4,
    (5, (6, 14), "contiguous"): 2,
    (5, (7, 7), "contiguous"): 1,
    (8, (8, 8), "sliced"): 1,
}


@pytest.mark.parametrize("kind", WIDE, ids=str)
def test_copies_are_as_wide_as_the_layout_allows(host, kind):
    channels, size, layout = kind
    case = _case(2, channels, 4, size, 3)
    _, plan = kernels.convolve(host, case, operands(case, torch.float16, layout))
    assert plan[0] == WIDE[kind]
    bytes_of_input = 2 * case.batch * channels * size[0] * size[1]
    if WIDE[kind] == 8:
        assert host.host_wide_reads() >= bytes_of_input // 16
    else:
        assert host.host_wide_reads() == 0


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
def test_sums_are_split_over_samples_and_tiles(host, layout):
    """Few samples of large images, many samples of small ones: always blocks for a whole device."""
    for batch, size in ((1, (90, 90)), (40, (5, 5))):
        case = _case(batch, 3, 2, size, 3)
        _backward(host, case, torch.float32, layout)
