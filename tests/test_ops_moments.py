# SPDX-License-Identifier: BSD-3-Clause
"""The compiled latent_moments and its gradient: values, tiles, layouts, instruction sets, special values."""

from __future__ import annotations

import pytest
import torch
from cases import assert_close_to_truth, in_layout
from operands import (
    HALF,
    ISAS,
    LAYOUTS,
    instruction_set,
    is_channels_last,
    threads,
)

from dcd_kernels import reference
from dcd_kernels.ops import moments

OPS = torch.ops.dcd_kernels
# (N, Ci, *size), L: few and many channels for the latents, one pixel, a pixel or four behind whole vectors,
# more latents than channels; then several tiles of a sample in one piece, and in pieces for the threads
SMALL = [
    ((1, 3, 1), 1),
    ((4, 20, 1, 1), 7),
    ((2, 3, 9, 9), 1),
    ((2, 3, 6), 5),
    ((3, 24, 7, 7), 11),
    ((2, 5, 2, 3, 4), 5),
    ((2, 100, 5, 10), 2),
    ((2, 70, 14, 14), 20),
    ((1, 130, 7, 7), 33),
]
TILED = [((17, 4, 50, 47), 4), ((1, 5, 67, 61), 20), ((3, 90, 40, 41), 9), ((1, 6, 64, 66), 3)]
LARGE_MEANS = [((2, 8, 16, 16), 4), *TILED]
KERNELS = [*((isa, torch.float32) for isa in ISAS), (ISAS[0], torch.float64)]
NEEDS = (0b01, 0b10, 0b11)


def operands(shape, latent, dtype=torch.float32, layout="contiguous", offset=0.0):
    generator = torch.Generator().manual_seed(sum(shape) + latent)
    input = torch.randn(shape, generator=generator, dtype=torch.float64) + offset
    q = torch.randn(shape[1], latent, generator=generator, dtype=torch.float64) / shape[1] ** 0.5
    return in_layout(input.to(dtype), layout), in_layout(q.to(dtype), layout, image=False)


def incoming(shape, latent, dtype=torch.float32):
    """Gradients of both results; the covariance's is not symmetric."""
    generator = torch.Generator().manual_seed(latent)
    wide = torch.promote_types(dtype, torch.float32)
    return [
        torch.randn(shape[0], *rest, generator=generator, dtype=torch.float64).to(wide)
        for rest in ((latent,), (latent, latent))
    ]


def by_autograd(tensors, grads, dtype, needs=0b11):
    """What torch's autograd finds for the plain composition in `dtype`."""
    leaves = [t.detach().to(dtype).requires_grad_(bool(needs >> i & 1)) for i, t in enumerate(tensors)]
    results = reference.moments(*leaves)
    given = [
        (result, grad.to(dtype)) for result, grad in zip(results, grads, strict=True) if grad is not None
    ]
    outputs, weights = zip(*given, strict=True)
    return torch.autograd.grad(outputs, [leaf for leaf in leaves if leaf.requires_grad], weights)


def relative(found, true) -> float:
    return ((found.double() - true).norm() / true.norm()).item()


@pytest.mark.parametrize("isa,dtype", KERNELS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape,latent", SMALL + TILED, ids=str)
def test_values(shape, latent, dtype, layout, isa):
    input, q = operands(shape, latent, dtype, layout)
    with instruction_set(isa):
        found = OPS.latent_moments(input, q)
    plain, true = reference.moments(input, q), reference.moments(input.double(), q.double())
    # beside a mean that is nearly nothing stands what it is the mean of
    spread = true[1].diagonal(dim1=1, dim2=2).sqrt()
    results = [
        (torch.cat((mean, spread.to(mean.dtype)), 1), covariance) for mean, covariance in (found, plain)
    ]
    for got, composed, exact in zip(*results, (torch.cat((true[0], spread), 1), true[1]), strict=True):
        if dtype == torch.float64:
            assert torch.allclose(got, exact, rtol=1e-10, atol=1e-13)
        else:
            assert_close_to_truth(got, composed, exact)
    assert torch.equal(found[1], found[1].mT)


@pytest.mark.parametrize("isa,dtype", KERNELS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape,latent", SMALL + TILED, ids=str)
def test_gradients(shape, latent, dtype, layout, isa):
    tensors, grads = operands(shape, latent, dtype, layout), incoming(shape, latent, dtype)
    with instruction_set(isa):
        mean = OPS.latent_moments(*tensors)[0]
        found = OPS.latent_moments_backward(*tensors, mean, *grads, 0b11)
    true = by_autograd(tensors, grads, torch.float64)
    for got, composed, exact in zip(found, by_autograd(tensors, grads, dtype), true, strict=True):
        if dtype == torch.float64:
            assert torch.allclose(got, exact, rtol=1e-10, atol=1e-12)
        else:
            assert_close_to_truth(got, composed, exact)
    assert is_channels_last(found[0]) == (is_channels_last(tensors[0]) and not found[0].is_contiguous())
    assert found[1].is_contiguous()


@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("given", [(True, False), (False, True)], ids=("mean", "covariance"))
@pytest.mark.parametrize("needs", NEEDS)
@pytest.mark.parametrize("shape,latent", [SMALL[4], SMALL[6], TILED[1]], ids=str)
def test_a_part_of_the_gradients(shape, latent, needs, given, layout):
    tensors = operands(shape, latent, layout=layout)
    mean = OPS.latent_moments(*tensors)[0]
    grads = [g if there else None for g, there in zip(incoming(shape, latent), given, strict=True)]
    found = OPS.latent_moments_backward(*tensors, mean, *grads, needs)
    true, plain = (iter(by_autograd(tensors, grads, t, needs)) for t in (torch.float64, torch.float32))
    for i, got in enumerate(found):
        if needs >> i & 1:
            assert_close_to_truth(got, next(plain), next(true))
        else:
            assert got.shape == (0,)


def test_no_gradients_are_zero():
    tensors = operands((2, 6, 5, 4), 3, layout="channels_last")
    d_input, d_q = OPS.latent_moments_backward(*tensors, torch.ones(2, 3), None, None, 0b11)
    assert not d_input.any() and not d_q.any()
    assert d_input.shape == tensors[0].shape and d_q.shape == tensors[1].shape


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision(dtype, layout):
    shape, latent = (3, 24, 7, 7), 11
    tensors, grads = operands(shape, latent, dtype, layout), incoming(shape, latent, dtype)
    mean, covariance = OPS.latent_moments(*tensors)
    wide = [t.float() for t in tensors]
    for got, exact in zip((mean, covariance), reference.moments(*(t.double() for t in tensors)), strict=True):
        assert got.dtype == torch.float32
        assert relative(got, exact) < 1e-6
    found = OPS.latent_moments_backward(*tensors, mean, *grads, 0b11)
    expected = OPS.latent_moments_backward(*wide, mean, *grads, 0b11)
    for got, unrounded in zip(found, expected, strict=True):
        assert torch.equal(got, unrounded.to(dtype))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("shape,latent", LARGE_MEANS, ids=str)
def test_a_mean_of_a_thousand_deviations(shape, latent, layout, isa):
    """Raw second moments would leave no digit of the covariance, a rounded mean one and a half of d_q."""
    tensors, grads = operands(shape, latent, layout=layout, offset=1000.0), incoming(shape, latent)
    with instruction_set(isa):
        mean, covariance = OPS.latent_moments(*tensors)
        d_input, d_q = OPS.latent_moments_backward(*tensors, mean, None, grads[1], 0b11)
    exact = reference.moments(*(t.double() for t in tensors))
    assert relative(mean, exact[0]) < 1e-6
    assert relative(covariance, exact[1]) < 3e-4
    true = by_autograd(tensors, (None, grads[1]), torch.float64)
    assert relative(d_input, true[0]) < 1e-3
    assert relative(d_q, true[1]) < 1e-3


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_a_first_pixel_like_no_other(layout, isa):
    """Sums around a value that is far from all others would lose what distinguishes these."""
    tensors = operands((17, 4, 50, 47), 4, layout=layout)
    tensors[0][:, :, 0, 0] = 1e4
    with instruction_set(isa):
        found = OPS.latent_moments(*tensors)
    for got, exact in zip(found, reference.moments(*(t.double() for t in tensors)), strict=True):
        assert relative(got, exact) < 1e-6


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("shape,latent", [SMALL[4], *TILED], ids=str)
def test_as_many_threads_as_you_like_same_bits(shape, latent, layout, isa):
    tensors, grads = operands(shape, latent, layout=layout), incoming(shape, latent)
    runs = []
    with instruction_set(isa):
        for count in (1, 1, 2, 3):
            with threads(count):
                results = OPS.latent_moments(*tensors)
                runs.append((*results, *OPS.latent_moments_backward(*tensors, results[0], *grads, 0b11)))
    for run in runs[1:]:
        assert all(torch.equal(first, again) for first, again in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("shape,latent", [SMALL[4], TILED[0]], ids=str)
def test_nan_stays_in_its_sample(shape, latent, layout, isa):
    tensors, grads = operands(shape, latent, layout=layout), incoming(shape, latent)
    tensors[0][(1, *(-1 for _ in shape[1:]))] = float("nan")
    with instruction_set(isa):
        mean, covariance = OPS.latent_moments(*tensors)
        d_input, d_q = OPS.latent_moments_backward(*tensors, mean, *grads, 0b11)
    for result in (mean, covariance, d_input):
        assert result[1].isnan().all()
        assert not result[0].isnan().any() and not result[2:].isnan().any()
    assert d_q.isnan().all()


@pytest.mark.parametrize("isa", ISAS)
def test_infinity_is_not_lost(isa):
    tensors = operands((2, 6, 9, 9), 3)
    tensors[0][0, 0, 0, 0] = float("inf")
    with instruction_set(isa):
        mean, covariance = OPS.latent_moments(*tensors)
    for result in (mean, covariance):
        assert not result[0].isfinite().any() and result[1].isfinite().all()


def test_denormals_are_flushed_only_inside():
    input, q = operands((2, 6, 9, 9), 3)
    mean, covariance = OPS.latent_moments(input * 1e-40, q)
    assert mean.abs().max() < 1e-37 and covariance.abs().max() < 1e-37
    assert (torch.full((64,), 1e-40) * 1.0).ne(0).all(), "the kernel left denormals flushed"


def test_pixels_taken_from_a_larger_image():
    tensors, grads = operands((2, 13, 3, 7), 5), incoming((2, 13, 3, 7), 5)
    larger = torch.full((2, 13, 6, 14), float("nan"))
    larger[:, :, ::2, ::2] = tensors[0]
    apart = larger[:, :, ::2, ::2]
    results = OPS.latent_moments(*tensors)
    for got, expected in zip(OPS.latent_moments(apart, tensors[1]), results, strict=True):
        assert torch.equal(got, expected)
    expanded = [grads[0][:, :1].expand(2, 5), grads[1][:, :1, :1].expand(2, 5, 5)]
    found = OPS.latent_moments_backward(apart, tensors[1], results[0], *expanded, 0b11)
    dense = [grad.contiguous() for grad in expanded]
    for got, expected in zip(
        found, OPS.latent_moments_backward(*tensors, results[0], *dense, 0b11), strict=True
    ):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 4, 0, 3)])
def test_empty(shape):
    tensors = torch.empty(shape), torch.ones(4, 2)
    mean, covariance = OPS.latent_moments(*tensors)
    assert mean.shape == (shape[0], 2) and covariance.shape == (shape[0], 2, 2)
    assert mean.isnan().all() and covariance.isnan().all()
    d_input, d_q = OPS.latent_moments_backward(*tensors, mean, mean, covariance, 0b11)
    assert d_input.shape == shape and torch.equal(d_q, torch.zeros(4, 2))


@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("shape,latent", [((2, 3, 3, 2), 2), ((1, 3, 1), 2), ((3, 40, 2), 1)], ids=str)
def test_gradcheck(shape, latent, layout):
    tensors = [t.requires_grad_() for t in operands(shape, latent, torch.float64, layout)]
    assert torch.autograd.gradcheck(OPS.latent_moments, tensors)
    assert torch.autograd.gradgradcheck(OPS.latent_moments, tensors)


def test_the_gradient_is_the_kernels_unless_it_is_recorded():
    tensors = [t.requires_grad_() for t in operands((2, 6, 5, 4), 3)]
    called = []

    class Ops(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(func)
            return func(*args, **(kwargs or {}))

    for recorded in (False, True):
        loss = sum(result.sum() for result in OPS.latent_moments(*tensors))
        called.clear()
        with Ops():
            gradients = torch.autograd.grad(loss, tensors, create_graph=recorded)
        assert (OPS.latent_moments_backward.default in called) == (not recorded)
        assert all(gradient.requires_grad == recorded for gradient in gradients)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_composition_that_gpus_take_gives_the_same(dtype, layout):
    shape, latent = SMALL[4]
    tensors, grads = operands(shape, latent, dtype, layout), incoming(shape, latent, dtype)
    mean = OPS.latent_moments(*tensors)[0]
    for needs in NEEDS:
        found = moments._composed(*tensors, mean, *grads, needs)
        expected = OPS.latent_moments_backward(*tensors, mean, *grads, needs)
        for got, kernel in zip(found, expected, strict=True):
            assert got.dtype == kernel.dtype and got.stride() == kernel.stride()
            torch.testing.assert_close(got, kernel)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape,latent", [SMALL[4], SMALL[5]], ids=str)
def test_opcheck(shape, latent, layout, dtype):
    tensors = operands(shape, latent, dtype, layout)
    mean = OPS.latent_moments(*tensors)[0]
    grads = incoming(shape, latent, dtype)
    torch.library.opcheck(OPS.latent_moments.default, [t.requires_grad_() for t in tensors])
    tensors = [t.detach() for t in tensors]
    for needs in (0, *NEEDS):
        for given in (grads, (None, grads[1]), (grads[0], None)):
            torch.library.opcheck(OPS.latent_moments_backward.default, (*tensors, mean, *given, needs))


@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_training_compiles_into_one_graph(fresh_compiler, layout):
    tensors = [t.requires_grad_() for t in operands((2, 6, 5, 4), 3, layout=layout)]

    def loss(input, q):
        mean, covariance = OPS.latent_moments(input, q)
        return mean.square().sum() + covariance.sin().sum()

    eager = torch.autograd.grad(loss(*tensors), tensors)
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*tensors), tensors)
    for got, expected in zip(compiled, eager, strict=True):
        assert torch.allclose(got, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("place", "value", "named"),
    [
        (0, torch.ones(2, 4), "input"),
        (0, torch.ones(2, 3, 3, 3), "q"),
        (0, torch.ones(2, 4, 3, 3, dtype=torch.int64), "input"),
        (0, torch.ones(2, 0, 3, 3), "q"),
        (1, torch.ones(4), "q"),
        (1, torch.ones(4, 0), "latent channel"),
        (1, torch.ones(4, 2).double(), "q"),
        (2, torch.ones(2, 3), "mean"),
        (2, torch.ones(1, 2), "mean"),
        (2, torch.ones(2, 2).double(), "mean"),
        (3, torch.ones(2, 2, 1), "grad_mean"),
        (4, torch.ones(2, 2), "grad_covariance"),
        (4, torch.ones(2, 2, 2).half(), "grad_covariance"),
    ],
)
def test_wrong_operands_are_named(place, value, named):
    tensors = [torch.ones(2, 4, 3, 3), torch.ones(4, 2)]
    rest = [torch.ones(2, 2), torch.ones(2, 2), torch.ones(2, 2, 2)]
    arguments = [*tensors, *rest]
    arguments[place] = value
    with pytest.raises(RuntimeError, match=rf"\b{named}\b"):
        OPS.latent_moments_backward(*arguments, 0b11)
    if place < 2:
        with pytest.raises(RuntimeError, match=rf"\b{named}\b"):
            OPS.latent_moments(*arguments[:2])
