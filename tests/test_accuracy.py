# SPDX-License-Identifier: BSD-3-Clause
"""Gradients of maps as large as a network's first layers: sums of thousands of terms can lose digits."""

import pytest
import torch
from cases import assert_close_to_truth

import dcd_kernels as dcd
from dcd_kernels import extension

pytestmark = pytest.mark.skipif(not extension.LOADED, reason=extension.REASON)

# (N, Ci, Co, H, L): few channels and many pixels; values around zero and all of one sign.
_SHAPES = [(2, 16, 96, 112, 4), (1, 3, 32, 160, 4)]


def _gradients(function, tensors, grad, dtype, channels_last):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    leaves = [t.to(dtype, memory_format=layout) if t.dim() == 4 else t.to(dtype) for t in tensors]
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    return torch.autograd.grad(function(*leaves), leaves, grad.to(dtype).contiguous(memory_format=layout))


def _pointwise(x, weight, p, phi, q, lam):
    return dcd.dcd_conv2d(x, weight, p, phi, q, lam=lam)


def _apply(x, static, p, phi, q, lam):
    return dcd.dcd_apply(static, x, p, phi, q, lam=lam)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("values", [torch.randn, torch.rand], ids=["around zero", "one sign"])
@pytest.mark.parametrize("shape", _SHAPES, ids=str)
@pytest.mark.parametrize("operator", [_pointwise, _apply])
def test_gradients_of_large_maps(operator, shape, values, channels_last):
    torch.manual_seed(0)
    n, ci, co, size, latent = shape
    second = values(co, ci, 1, 1) if operator is _pointwise else values(n, co, size, size)
    tensors = [
        values(n, ci, size, size),
        second,
        values(co, latent),
        values(n, latent, latent),
        values(ci, latent),
        torch.rand(n, co),
    ]
    grad = values(n, co, size, size)
    fused = _gradients(operator, tensors, grad, torch.float32, channels_last)
    with dcd.use_backend("reference"):
        plain = _gradients(operator, tensors, grad, torch.float32, channels_last)
        truth = _gradients(operator, tensors, grad, torch.float64, channels_last)
    for name, *gradients in zip(("x", "second", "p", "phi", "q", "lam"), fused, plain, truth, strict=True):
        assert_close_to_truth(*gradients, name)
