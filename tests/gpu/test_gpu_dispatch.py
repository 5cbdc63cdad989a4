# SPDX-License-Identifier: BSD-3-Clause
"""The ops on the GPU in torch's dispatcher: opcheck, torch.compile, autocast."""

from __future__ import annotations

from dataclasses import replace

import op_checks
import pytest
import test_ops_apply
import test_ops_pointwise
import torch
from on_device import DEPTHWISE, ON_GPU, takes
from operands import LAYOUTS, call, label, operands

from dcd_kernels.arguments import ACTIVATIONS

STENCIL = DEPTHWISE[2]
WHOLE = [
    replace(test_ops_pointwise.WHOLE, activation="silu"),
    replace(test_ops_apply.WHOLE, activation="relu6"),
    replace(test_ops_apply.LATENT, activation="hardswish"),
    STENCIL,
]
assert all(takes(case) for case in WHOLE)


@pytest.fixture(autouse=True)
def compiler():
    """torch.compile from nothing; what it allocates itself may stay as it comes."""
    torch._dynamo.reset()
    torch.utils.deterministic.fill_uninitialized_memory = False
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", WHOLE, ids=label)
def test_opcheck(case, layout, device):
    op_checks.opcheck(case, torch.float32, layout, device=device)


@pytest.mark.parametrize("wide", (False, True), ids=("half", "wide"))
@pytest.mark.parametrize("case", WHOLE, ids=label)
def test_opcheck_half(case, wide, device):
    # without an activation: opcheck compares element by element, also sums in which everything cancels
    case = replace(case, activation=None)
    op_checks.opcheck(case, torch.bfloat16, "channels_last", wide=wide, device=device)


@pytest.mark.parametrize("needs", (0b111111, 0b000001, 0b101010, 0))
@pytest.mark.parametrize("case", WHOLE, ids=label)
def test_opcheck_backward(case, needs, device):
    for layout in LAYOUTS[:2]:
        op_checks.opcheck_backward(case, torch.float32, layout, needs, device=device)
        op_checks.opcheck_backward(case, torch.bfloat16, layout, needs, wide=True, device=device)


@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_opcheck_of_sums(layout, device):
    """The second outputs: pooled means and latent moments."""
    case = WHOLE[0]
    tensors = operands(case, torch.float32, layout, requires_grad=True, device=device)
    given = (*tensors, ACTIVATIONS[case.activation])
    torch.library.opcheck(torch.ops.dcd_kernels.pointwise_pooled.default, given)
    torch.library.opcheck(torch.ops.dcd_kernels.latent_moments.default, (tensors[0], tensors[4]))


def assert_alike(mine, right) -> None:
    assert (mine.shape, mine.dtype, mine.device) == (right.shape, right.dtype, right.device)
    eps = torch.finfo(right.dtype).eps
    error = (mine.double() - right.double()).norm().item()
    assert error <= 8 * eps * right.double().norm().item() + 1e-12, error


@pytest.mark.parametrize(
    ("backend", "dtype"), (("aot_eager", torch.float32), ("inductor", torch.bfloat16)), ids=str
)
@pytest.mark.parametrize("case", WHOLE, ids=label)
def test_compile(case, backend, dtype, device):
    """fullgraph, forward and backward, for a second batch size too."""

    def function(*tensors):
        return call(case, [None if t is None else t * 1 for t in tensors]).sin()

    compiled = torch.compile(function, fullgraph=True, backend=backend)
    for batch, layout in ((case.batch, "contiguous"), (case.batch + 3, "channels_last")):
        resized = replace(case, batch=batch)
        tensors = operands(resized, dtype, layout, requires_grad=True, device=device)
        wanted = [t for t in tensors if t is not None]
        mine, right = compiled(*tensors), function(*tensors)
        assert_alike(mine, right)
        grad = torch.randn_like(right)
        for got, expected in zip(
            torch.autograd.grad(mine, wanted, grad), torch.autograd.grad(right, wanted, grad), strict=True
        ):
            assert_alike(got, expected)
        with torch.no_grad():
            assert_alike(compiled(*tensors), right)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("case", WHOLE, ids=label)
def test_autocast(case, dtype, device):
    """The images and matrices go to the autocast dtype, lam, phi and bias stay in float32."""
    tensors = operands(case, requires_grad=True, device=device)
    cast = [
        t if t is None or key in ("lam", "phi", "bias") else t.detach().to(dtype).requires_grad_()
        for key, t in zip(case.names, tensors, strict=True)
    ]
    right = call(case, cast)
    direct = getattr(torch.ops.dcd_kernels, case.op)
    with torch.autocast(device.type, dtype=dtype):
        outputs = [call(case, tensors), direct(*tensors, *case.geometry, ACTIVATIONS[case.activation])]
    wanted = [t for t in tensors if t is not None]
    expected = torch.autograd.grad(right.sum(), [t for t in cast if t is not None])
    for output in outputs:
        assert output.dtype == dtype
        assert torch.equal(output, right)
        for got, half, tensor in zip(
            torch.autograd.grad(output.sum(), wanted), expected, wanted, strict=True
        ):
            assert got.dtype == tensor.dtype
            assert_alike(got, half.to(got.dtype))


@pytest.mark.parametrize("case", WHOLE, ids=label)
def test_autocast_under_compile(case, device):
    def function(*tensors):
        with torch.autocast(device.type, dtype=torch.bfloat16):
            return call(case, tensors)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    tensors = operands(case, requires_grad=True, device=device)
    mine, right = compiled(*tensors), function(*tensors)
    assert mine.dtype == torch.bfloat16
    assert_alike(mine, right)


@pytest.mark.parametrize("case", WHOLE, ids=label)
def test_fake_tensors_have_the_strides_of_real_ones(case, device):
    from torch._subclasses.fake_tensor import FakeTensorMode

    for layout in LAYOUTS:
        tensors = operands(case, layout=layout, device=device)
        real = call(case, tensors)
        with FakeTensorMode() as mode:
            fake = call(case, [None if t is None else mode.from_tensor(t) for t in tensors])
        assert (fake.shape, fake.dtype, fake.device) == (real.shape, real.dtype, real.device)
        for size, mine, right in zip(real.shape, fake.stride(), real.stride(), strict=True):
            assert size == 1 or mine == right


@pytest.mark.skipif(not ON_GPU, reason="the CPU's rules are tested elsewhere")
@pytest.mark.parametrize("op", ("pointwise", "apply", "depthwise"))
def test_cuda_kernels_are_registered(op):
    for suffix in ("", "_backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"dcd_kernels::{op}{suffix}", "CUDA")
