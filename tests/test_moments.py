# SPDX-License-Identifier: BSD-3-Clause
"""latent_moments: values against NumPy float64, gradients, the op's contract, bad input."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import as_array, assert_close_to_truth, in_layout

import dcd_kernels as dcd
from dcd_kernels import extension, reference

compiled = pytest.mark.skipif(not extension.LOADED, reason=extension.REASON)
SHAPES = [((2, 6, 5, 4), 3), ((1, 3, 1), 1), ((3, 24, 7, 7), 11), ((2, 5, 2, 3, 4), 5)]


def operands(shape, latent, dtype=torch.float32, offset=0.0):
    generator = torch.Generator().manual_seed(sum(shape) + latent)
    input = torch.randn(shape, generator=generator, dtype=torch.float64) + offset
    q = torch.randn(shape[1], latent, generator=generator, dtype=torch.float64) / shape[1] ** 0.5
    return input.to(dtype), q.to(dtype)


def truth(input, q):
    latent = np.einsum("nc...,cl->nl...", as_array(input), as_array(q))
    latent = latent.reshape(*latent.shape[:2], -1)
    mean = latent.mean(2)
    centred = latent - mean[:, :, None]
    return torch.from_numpy(mean), torch.from_numpy(centred @ centred.transpose(0, 2, 1) / latent.shape[2])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape,latent", SHAPES, ids=str)
def test_values(shape, latent, dtype, layout):
    input, q = operands(shape, latent, dtype)
    input = in_layout(input, layout, image=True)
    found = dcd.latent_moments(input, q)
    wide = torch.promote_types(dtype, torch.float32)
    # the plain composition rounds z to the input's dtype
    z = torch.einsum("nc...,cl->nl...", input, q).flatten(2)
    plain = (
        z.to(wide).mean(2),
        torch.stack([(s - s.mean(1, True)) @ (s - s.mean(1, True)).T for s in z.to(wide)]),
    )
    for got, composed, true in zip(found, plain, truth(input, q), strict=True):
        assert got.dtype == wide
        assert_close_to_truth(got, composed / (1 if got.dim() == 2 else z.shape[2]), true)


def test_a_mean_of_a_thousand_deviations_leaves_the_covariance_its_digits():
    input, q = operands((2, 8, 16, 16), 4, offset=1000.0)
    covariance = dcd.latent_moments(input, q)[1].double()
    expected = truth(input, q)[1]
    assert (covariance - expected).norm() < 1e-3 * expected.norm()


def test_stride_and_offset_choose_pixels():
    input, q = operands((2, 6, 7, 5), 3, torch.float64)
    for found, expected in zip(
        dcd.latent_moments(input, q, stride=(2, 3), offset=(1, 0)),
        truth(input[:, :, 1::2, ::3], q),
        strict=True,
    ):
        assert torch.allclose(found, expected, rtol=1e-12)


def test_empty_batch():
    mean, covariance = dcd.latent_moments(torch.empty(0, 4, 3, 3), torch.ones(4, 2))
    assert mean.shape == (0, 2) and covariance.shape == (0, 2, 2)


@compiled
def test_gradients():
    input, q = (t.requires_grad_() for t in operands((2, 3, 3, 2), 2, torch.float64))
    assert torch.autograd.gradcheck(torch.ops.dcd_kernels.latent_moments, (input, q))
    assert torch.autograd.gradgradcheck(torch.ops.dcd_kernels.latent_moments, (input, q))


@compiled
@pytest.mark.parametrize("output", [0, 1])
def test_gradients_of_one_result_alone_are_the_references(output):
    input, q = (t.requires_grad_() for t in operands((2, 6, 5, 4), 3))
    expected = [t.detach().double().requires_grad_() for t in (input, q)]
    found = torch.ops.dcd_kernels.latent_moments(input, q)[output]
    weights = torch.randn_like(found)
    ours = torch.autograd.grad(found, (input, q), weights)
    plain = torch.autograd.grad(reference.moments(input, q)[output], (input, q), weights)
    true = torch.autograd.grad(reference.moments(*expected)[output], expected, weights.double())
    for got, composed, exact in zip(ours, plain, true, strict=True):
        assert_close_to_truth(got, composed, exact)


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    tensors = [t.requires_grad_() for t in operands((2, 6, 5, 4), 3, dtype)]
    torch.library.opcheck(torch.ops.dcd_kernels.latent_moments.default, tuple(tensors))


@compiled
def test_compiles_into_one_graph(fresh_compiler):
    input, q = operands((2, 6, 5, 4), 3)
    compiled_moments = torch.compile(dcd.latent_moments, fullgraph=True)
    for found, expected in zip(compiled_moments(input, q), dcd.latent_moments(input, q), strict=True):
        assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize(
    "change,error,words",
    [
        ({"input": None}, TypeError, "input must be a torch.Tensor"),
        ({"q": 3}, TypeError, "q must be a torch.Tensor, got int"),
        ({"input": torch.ones(2, 4)}, ValueError, r"input must be .* got \(2, 4\)"),
        ({"q": torch.ones(3, 2)}, ValueError, r"q must .*\(4, L\).* got \(3, 2\)"),
        ({"q": torch.ones(4, 0)}, ValueError, "q must"),
        ({"q": torch.ones(4, 2).double()}, TypeError, "q must be torch.float32"),
        ({"q": torch.ones(4, 2, device="meta")}, ValueError, "q must be on cpu"),
        ({"input": torch.ones(2, 4, 0, 3)}, ValueError, "only the batch of input may be empty"),
        ({"input": torch.ones(2, 4, 3, 3, dtype=torch.int64)}, TypeError, "input must be floating point"),
        ({"stride": 0}, ValueError, "stride must be positive, got 0"),
        ({"stride": (1, 2, 3)}, ValueError, "stride must be one integer or 2"),
        ({"offset": -1}, ValueError, "offset must be at least 0, got -1"),
        ({"offset": 3}, ValueError, "offset must be inside"),
    ],
)
def test_bad_input(change, error, words):
    arguments = {"input": torch.ones(2, 4, 3, 3), "q": torch.ones(4, 2)} | change
    for function in (dcd.latent_moments, reference.latent_moments):
        with pytest.raises(error, match=words):
            function(**arguments)
