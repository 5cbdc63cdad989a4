# SPDX-License-Identifier: BSD-3-Clause
"""bfloat16 in the interpreter against torch: casts, arithmetic, reductions, dots; and what is refused."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

import trial
import triton
import triton.language as tl
from cases import assert_close_to_truth

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered")
BF16 = torch.bfloat16
SIZE = 64


@triton.jit
def binary(a, b, out, OPERATION: tl.constexpr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    x = tl.load(a + at)
    y = tl.load(b + at)
    if OPERATION == "add":
        z = x + y
    elif OPERATION == "sub":
        z = x - y
    elif OPERATION == "mul":
        z = x * y
    elif OPERATION == "maximum":
        z = tl.maximum(x, y)
    elif OPERATION == "minimum":
        z = tl.minimum(x, y)
    elif OPERATION == "neg":
        z = -x
    elif OPERATION == "abs":
        z = tl.abs(x)
    elif OPERATION == "where":
        z = tl.where(x < y, x, y)
    elif OPERATION == "ge":
        z = (x >= y).to(tl.bfloat16)
    elif OPERATION == "scaled":
        z = x * 3
    elif OPERATION == "added":
        z = x + 0.1
    tl.store(out + at, z)


@triton.jit
def cast(a, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out + at, tl.load(a + at).to(out.dtype.element_ty))


@triton.jit
def stored(a, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out + at, tl.load(a + at))


@triton.jit
def rounded_to_zero(a, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out + at, tl.load(a + at).to(tl.bfloat16, fp_downcast_rounding="rtz"))


@triton.jit
def reduce(a, out, OPERATION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    x = tl.load(a + rows[:, None] * COLUMNS + columns[None, :])
    if OPERATION == "sum":
        y = tl.sum(x, 1)
    elif OPERATION == "max":
        y = tl.max(x, 1)
    else:
        y = tl.min(x, 1)
    tl.store(out + rows, y)


@triton.jit
def scan(a, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out + at, tl.cumsum(tl.load(a + at), 0))


@triton.jit
def dot(a, b, out, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m = tl.arange(0, M)[:, None]
    n = tl.arange(0, N)[None, :]
    x = tl.load(a + m * K + tl.arange(0, K)[None, :])
    y = tl.load(b + tl.arange(0, K)[:, None] * N + n)
    tl.store(out + m * N + n, tl.dot(x, y, tl.full((M, N), 0.5, tl.float32)))


@triton.jit
def atomic(a, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.atomic_add(out + at, tl.load(a + at))


SPECIAL = torch.tensor(
    (
        *(0.0, -0.0, 1.0, -1.0, 0.1, 65504.0, 3.3e38, 3.4028235e38, 1e-40, -1e-40),
        *(float("inf"), -float("inf"), float("nan")),
        *(1 + 2**-9, 1 + 2**-8, -(1 + 2**-8), 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20),
    )
)


def values(dtype=BF16, count=SIZE) -> torch.Tensor:
    drawn = torch.randn(count) * torch.logspace(-3, 3, count)
    drawn[: len(SPECIAL)] = SPECIAL
    return drawn.to(dtype)


def same(got: torch.Tensor, expected: torch.Tensor) -> bool:
    """Bit for bit, but for the sign and payload of NaN."""
    equal = (got == expected) & (torch.signbit(got) == torch.signbit(expected))
    return bool((equal | (got.isnan() & expected.isnan())).all())


EXPECTED = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "maximum": lambda x, y: torch.fmax(x, y),
    "minimum": lambda x, y: torch.fmin(x, y),
    "neg": lambda x, y: -x,
    "abs": lambda x, y: x.abs(),
    "where": lambda x, y: torch.where(x < y, x, y),
    "ge": lambda x, y: (x >= y).to(BF16),
    "scaled": lambda x, y: x * 3,
    # the constant is bfloat16 first
    "added": lambda x, y: x + torch.tensor(0.1, dtype=BF16),
}


@pytest.mark.parametrize("operation", EXPECTED)
def test_elementwise(operation):
    x, y = values(), values().flip(0)
    out = torch.full((SIZE,), float("nan"), dtype=BF16)
    binary[(1,)](x, y, out, operation, SIZE)
    assert same(out, EXPECTED[operation](x, y))


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.float64), ids=str)
def test_casts_round_to_nearest_even(dtype):
    x = values(dtype)
    out = torch.empty(SIZE, dtype=BF16)
    for kernel in (cast, stored):
        kernel[(1,)](x, out.fill_(float("nan")), SIZE)
        assert same(out, x.float().to(BF16))
    assert not same(out, truncated(x.float())) or dtype == torch.float16


def test_every_tie_goes_to_the_even_neighbour():
    bits = torch.arange(0, 2**15, 2**9, dtype=torch.int32)
    below = (bits << 16).view(torch.float32)
    ties = ((bits << 16) + 0x8000).view(torch.float32)
    odd = (((bits + 1) << 16) + 0x8000).view(torch.float32)
    for x in (below, ties, odd, torch.nextafter(ties, below), torch.nextafter(odd, -odd)):
        out = torch.empty(64, dtype=BF16)
        cast[(1,)](x, out, 64)
        assert same(out, x.to(BF16))


def truncated(x: torch.Tensor) -> torch.Tensor:
    return (x.view(torch.int32) >> 16).to(torch.int16).view(BF16)


def test_casts_that_ask_for_truncation_get_it():
    x = values(torch.float32)
    out = torch.empty(SIZE, dtype=BF16)
    rounded_to_zero[(1,)](x, out, SIZE)
    assert same(out, truncated(x))


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.float64, torch.int32), ids=str)
def test_casts_back(dtype):
    x = values() if dtype.is_floating_point else values().nan_to_num(0, 100, -100).clamp(-1e6, 1e6)
    out = torch.zeros(SIZE, dtype=dtype)
    cast[(1,)](x, out, SIZE)
    assert same(out.double(), x.to(dtype).double())


def test_integers_become_bfloat16():
    x = torch.arange(250, 250 + SIZE, dtype=torch.int32)
    out = torch.empty(SIZE, dtype=BF16)
    cast[(1,)](x, out, SIZE)
    assert same(out, x.to(BF16))


@pytest.mark.parametrize("operation", ("sum", "max", "min"))
def test_reductions(operation):
    x = torch.randn(8, 32).to(BF16)
    out = torch.empty(8, dtype=BF16)
    reduce[(1,)](x, out, operation, 8, 32)
    expected = {"sum": x.float().sum(1).to(BF16), "max": x.amax(1), "min": x.amin(1)}[operation]
    # sums of float32 in another order may round to the neighbour
    torch.testing.assert_close(out, expected, rtol=2**-8 if operation == "sum" else 0, atol=0)


def test_scans():
    x = torch.randint(-3, 4, (32,)).to(BF16)
    out = torch.empty(32, dtype=BF16)
    scan[(1,)](x, out, 32)
    assert same(out, x.cumsum(0))


def test_dot():
    x, y = torch.randn(16, 32).to(BF16), torch.randn(32, 16).to(BF16)
    out = torch.full((16, 16), float("nan"))
    dot[(1,)](x, y, out, 16, 16, 32)
    torch.testing.assert_close(out.double(), x.double() @ y.double() + 0.5, rtol=1e-5, atol=1e-5)


def test_what_is_not_corrected_is_refused():
    with pytest.raises(Exception, match="atomic_rmw on bfloat16 is not corrected"):
        atomic[(1,)](values(), torch.zeros(SIZE, dtype=BF16), SIZE)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
@pytest.mark.parametrize("operation", ("add", "mul", "maximum", "where", "neg"))
def test_other_types_are_left_alone(operation, dtype):
    x, y = values(dtype), values(dtype).flip(0)
    out = torch.full((SIZE,), float("nan"), dtype=dtype)
    binary[(1,)](x, y, out, operation, SIZE)
    assert same(out, EXPECTED[operation](x, y))


@pytest.mark.parametrize("scale_first", (False, True))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, BF16), ids=str)
def test_a_whole_kernel(dtype, scale_first):
    """A product over odd sizes: every mask, a loop, a cast at the end."""
    x, w = torch.randn(49, 40).to(dtype), torch.randn(33, 40).to(dtype)
    scale = torch.randn(40)
    got = trial.run(x, w, scale, SCALE_FIRST=scale_first, BLOCK_M=32, BLOCK_N=16, BLOCK_K=16)
    if scale_first:
        truth = (x.float() * scale).to(dtype).double() @ w.double().T
    else:
        truth = x.double() @ w.double().T * scale[:33].double()
    plain = truth.to(dtype)
    assert_close_to_truth(got, plain, truth)
