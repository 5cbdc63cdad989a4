# SPDX-License-Identifier: BSD-3-Clause
"""latent_map: the norms themselves on pixels in NumPy, gradients, accuracy, the op's contract, bad input."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from cases import as_array, assert_close_to_truth, assert_same, in_layout
from latent_calls import NAMES, Call, gradients, op, plain
from operands import ISAS, instruction_set, threads

from dcd_kernels.latent_map import BATCH, GROUPS, NO_NORM, RUNNING, Norm

OP = torch.ops.dcd_kernels.latent_map.default
BACKWARD = torch.ops.dcd_kernels.latent_map_backward.default
CODES = (NO_NORM, RUNNING, BATCH, GROUPS)
PAIRS = list(itertools.product(CODES, CODES))
SIZES = [(1, 1), (5, 1), (1, 3), (5, 3), (1, 45), (5, 45)]  # N, L
pairs = pytest.mark.parametrize("pair", PAIRS, ids=str)
sizes = pytest.mark.parametrize("size", SIZES, ids=str)


def normalised(norm: Norm, z: np.ndarray):
    """norm(z) for z (N, P, L), and the statistics that it took of the batch."""
    batch, pixels, latent = z.shape
    statistics = []
    if norm.statistics == NO_NORM:
        return z, statistics
    if norm.statistics == RUNNING:
        mean, variance = as_array(norm.running_mean), as_array(norm.running_var)
    elif norm.statistics == BATCH:
        mean, variance = z.mean((0, 1)), z.var((0, 1))
        statistics = [mean, variance]
    else:
        grouped = z.reshape(batch, pixels, norm.groups, -1)
        axes = (1, 3)
        members = latent // norm.groups
        mean = grouped.mean(axes).repeat(members, axis=1)[:, None]
        variance = grouped.var(axes).repeat(members, axis=1)[:, None]
    z = (z - mean) / np.sqrt(variance + norm.eps)
    if norm.weight is not None:
        z = z * as_array(norm.weight) + as_array(norm.bias)
    return z, statistics


# --- values


@sizes
@pairs
def test_norms_of_pixels(pair, size):
    """Φ' and shift do to every pixel what the norms do, one after the other."""
    for residual, bias, affine in itertools.product((False, True), repeat=3):
        call = Call(size, pair, residual, bias, affine)
        z = as_array(call.pixels) + (as_array(call.latent_bias) if bias else 0)
        inner, first = normalised(call.norm1, z)
        wanted, second = normalised(call.norm2, np.einsum("nij,npj->npi", as_array(call.phi), inner))
        if residual:
            wanted = wanted + inner
        mapped, shift, statistics = op(*call.arguments)
        got = torch.einsum("nij,npj->npi", mapped, call.pixels) + shift.unsqueeze(1)
        assert_same(got, torch.from_numpy(wanted), 1e-10)
        taken = np.array(first + second).reshape(-1, size[1])
        assert_same(statistics, torch.from_numpy(taken), 1e-11)
        assert not statistics.requires_grad


@sizes
@pairs
def test_composition(pair, size):
    """The composition is the same function, and has the same gradients."""
    for residual, bias, affine in itertools.product((False, True), repeat=3):
        call = Call(size, pair, residual, bias, affine)
        for got, wanted in zip(op(*call.arguments), plain(*call.arguments), strict=True):
            assert_same(got, wanted, 1e-11)
        found, expected = gradients(op, call), gradients(plain, call)
        for name, wanted in expected.items():
            assert_same(found[name], wanted, 1e-9, name)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("far", [1.0, 1000.0])
@pytest.mark.parametrize("size", [(5, 3), (1, 8), (5, 45)], ids=str)
@pairs
def test_float32(pair, size, far, isa):
    """Errors are bounded by those of the composition, also for means a thousand deviations from zero."""
    call = Call(size, pair, dtype=torch.float32, far=far)
    results = []
    with instruction_set(isa):
        for function in (op, plain):
            results.append((function(*call.arguments), gradients(function, call)))
    call.convert(torch.float64)
    results.append((plain(*call.arguments), gradients(plain, call)))
    for name, got, plain32, true in zip(
        ("mapped", "shift", "statistics"), *(r[0] for r in results), strict=True
    ):
        assert_close_to_truth(got, plain32, true, name)
    scale = max(gradient.abs().max().item() for gradient in results[2][1].values())
    for name, true in results[2][1].items():
        got, plain32 = results[0][1][name], results[1][1][name]
        if true.norm() > 1e-9 * scale:
            assert_close_to_truth(got, plain32, true, name)
        else:  # a norm hides it: what is left of the sum is noise, in the composition too
            assert got.norm() < 1e-7 * scale, name


@pytest.mark.parametrize("parameters", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_parameters_of_other_types(parameters):
    """They are converted, and their gradients come back in their type."""
    call = Call((5, 3), (RUNNING, BATCH), dtype=torch.float32)
    images = call.phi, call.mean, call.covariance
    call.convert(parameters).phi, call.mean, call.covariance = images
    got = op(*call.arguments)
    found = torch.autograd.grad(got[:2], call.there(), [torch.ones_like(y) for y in got[:2]])
    assert [g.dtype for g in found] == [torch.float32] * 3 + [parameters] * 5
    same = Call((5, 3), (RUNNING, BATCH))
    for name in ("norm1", "norm2", "latent_bias"):
        setattr(same, name, getattr(call, name))
    same.convert(torch.float32).phi, same.mean, same.covariance = images
    wanted = op(*same.arguments)
    expected = torch.autograd.grad(wanted[:2], same.there(), [torch.ones_like(y) for y in wanted[:2]])
    for a, b in zip([*got, *found], [*wanted, *expected], strict=True):
        assert torch.equal(a, b.to(a.dtype))


def test_layouts():
    """Views of larger tensors, transposed matrices, expanded gradients."""
    call = Call((5, 8), (BATCH, BATCH))
    wanted, expected = op(*call.arguments), gradients(op, call)
    whole = call.leaves
    call.phi = call.phi.detach().mT.contiguous().mT.requires_grad_()
    call.mean, call.covariance = (
        in_layout(t.detach(), "sliced").requires_grad_() for t in (call.mean, call.covariance)
    )
    call.norm1, call.norm2 = (
        norm._replace(
            weight=torch.stack((norm.weight, norm.bias), 1).detach()[:, 0].requires_grad_(),
            bias=torch.stack((norm.weight, norm.bias), 1).detach()[:, 1].requires_grad_(),
        )
        for norm in (call.norm1, call.norm2)
    )
    assert not any(t.is_contiguous() for t in (call.phi, call.mean, call.covariance, call.norm2.bias))
    for a, b in zip(op(*call.arguments), wanted, strict=True):
        assert a.is_contiguous() and torch.equal(a, b)
    for name, gradient in gradients(op, call).items():
        assert torch.equal(gradient, expected[name]), name
    ones = [torch.ones_like(y) for y in wanted[:2]]
    found = torch.autograd.grad([y.sum() for y in op(*call.arguments)[:2]], call.there())
    for a, b in zip(found, torch.autograd.grad(wanted[:2], whole.values(), ones), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    "pair", [(BATCH, BATCH), (GROUPS, BATCH), (RUNNING, GROUPS), (RUNNING, RUNNING)], ids=str
)
def test_bits_do_not_depend_on_threads(pair, isa):
    size = (16, 45) if max(pair) >= BATCH else (200, 45)  # enough to be split
    call = Call(size, pair, dtype=torch.float32)
    runs = []
    for count in (1, 2, 3, 7):
        with instruction_set(isa), threads(count):
            runs.append([*op(*call.arguments), *gradients(op, call).values()])
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


def test_nan_stays_in_its_sample():
    call = Call((5, 3), (RUNNING, GROUPS))
    with torch.no_grad():
        call.phi[2, 0, 1] = float("nan")
    mapped, shift, _ = op(*call.arguments)
    wanted = plain(*call.arguments)
    assert torch.equal(mapped.isnan(), wanted[0].isnan()) and torch.equal(shift.isnan(), wanted[1].isnan())
    assert mapped.isnan().any()


@pairs
def test_empty_batch(pair):
    call = Call((0, 3), pair)
    mapped, shift, statistics = op(*call.arguments)
    assert mapped.shape == (0, 3, 3) and shift.shape == (0, 3)
    assert statistics.shape == (2 * pair.count(BATCH), 3)
    for name, gradient in gradients(op, call).items():
        assert gradient.shape == call.leaves[name].shape and not gradient.any()


# --- gradients


@pairs
def test_gradcheck(pair):
    call = Call((2, 3), pair)

    def function(*given):
        return op(*call.with_leaves(*given))[:2]

    assert torch.autograd.gradcheck(function, call.there())
    assert torch.autograd.gradgradcheck(function, call.there())


@pytest.mark.parametrize("part", [0, 1])
def test_gradient_of_one_output(part):
    """The other one's gradient is absent, not zero."""
    call = Call((2, 3), (GROUPS, BATCH))

    def function(*given):
        return op(*call.with_leaves(*given))[part]

    assert torch.autograd.gradcheck(function, call.there())
    assert torch.autograd.gradgradcheck(function, call.there())


def test_third_order():
    call = Call((2, 3), (BATCH, BATCH))

    def derivative(function):
        value = sum(y.sin().sum() for y in function(*call.arguments)[:2])
        for _ in range(3):
            value = torch.autograd.grad(value, call.phi, create_graph=True)[0].square().sum()
        return value

    torch.testing.assert_close(derivative(op), derivative(plain))


@pytest.mark.parametrize("needs", [0, 1, 0b110, 0b10101000, 0b11111111])
def test_only_what_is_asked_for(needs):
    call = Call((5, 3), (BATCH, BATCH))
    found = BACKWARD(
        *call.grads, *(t.detach() if isinstance(t, torch.Tensor) else t for t in call.flat), needs
    )
    wanted = gradients(op, call)
    for bit, (name, gradient) in enumerate(zip(NAMES, found, strict=True)):
        if needs >> bit & 1:
            assert torch.equal(gradient, wanted[name])
        else:
            assert gradient.shape == (0,)


def test_moments_that_no_norm_takes():
    call = Call((2, 3), (BATCH, BATCH))
    call.norm1 = call.norm2 = Norm()
    found = gradients(op, call)
    assert not found["mean"].any() and not found["covariance"].any()
    assert_same(found["latent_bias"], gradients(plain, call)["latent_bias"])


def test_torch_func():
    call = Call((2, 3), (BATCH, GROUPS))

    def loss(*given):
        return sum(y.sin().sum() for y in op(*call.with_leaves(*given))[:2])

    leaves = call.there()
    got = torch.func.grad(loss, argnums=(0, 1, 3))(*leaves)
    wanted = torch.autograd.grad(loss(*leaves), [leaves[i] for i in (0, 1, 3)])
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)
    twice = torch.func.grad(lambda phi: torch.func.grad(loss)(phi, *leaves[1:]).square().sum())(leaves[0])
    first = torch.autograd.grad(loss(*leaves), leaves[0], create_graph=True)[0]
    torch.testing.assert_close(twice, torch.autograd.grad(first.square().sum(), leaves[0])[0])


def test_autocast_changes_nothing():
    call = Call((5, 3), (BATCH, BATCH), dtype=torch.float32)

    def step():
        return op(*call.arguments), torch.autograd.grad(
            [y.square().sum() for y in op(*call.arguments)[:2]], call.there(), create_graph=True
        )

    def second(first):
        return torch.autograd.grad([g.sum() for g in first], call.there())

    outputs, first = step()
    with torch.autocast("cpu", torch.bfloat16):
        got = step()
    for a, b in zip([*got[0], *got[1], *second(got[1])], [*outputs, *first, *second(first)], strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)


# --- tracing


def half_parameters():
    """bfloat16 beside a float32 phi."""
    call, halves = (Call((5, 3), (RUNNING, BATCH), dtype=t) for t in (torch.float32, torch.bfloat16))
    call.norm1, call.norm2, call.latent_bias = halves.norm1, halves.norm2, halves.latent_bias
    return call


@pytest.mark.parametrize(
    "call",
    [Call((5, 3), (BATCH, GROUPS)), Call((5, 3), (NO_NORM, NO_NORM), bias=False), half_parameters()],
    ids=("statistics", "no norm", "half parameters"),
)
def test_opcheck(call):
    torch.library.opcheck(OP, call.flat)


@pytest.mark.parametrize("needs", [0b11111111, 0b10011001])
def test_opcheck_backward(needs):
    call = half_parameters()
    torch.library.opcheck(BACKWARD, (None, call.grads[1].requires_grad_(), *call.flat, needs))


# --- bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"phi": torch.zeros(5, 3)}, "phi must have 3 dimensions"),
        ({"phi": torch.zeros(5, 3, 4)}, r"phi must have shape \(5, 3, 3\), got \(5, 3, 4\)"),
        ({"phi": torch.zeros(5, 0, 0)}, "phi must have at least one latent channel"),
        ({"phi": torch.zeros(5, 3, 3).half()}, "phi must be float32 or float64, got Half"),
        ({"mean": None}, "mean and covariance go together"),
        ({"mean": None, "covariance": None}, "mean and covariance must be given where"),
        ({"mean": torch.zeros(4, 3)}, r"mean must have shape \(5, 3\), got \(4, 3\)"),
        ({"mean": torch.zeros(5, 3).double()}, "mean must have the dtype of phi, Float, got Double"),
        ({"covariance": torch.zeros(5, 3)}, r"covariance must have shape \(5, 3, 3\)"),
        ({"norm1": 4}, "norm1 must be a code from 0 to 3, got 4"),
        ({"norm2": -1}, "norm2 must be a code from 0 to 3, got -1"),
        ({"norm1": NO_NORM}, "weight1 and bias1 must not be given without a norm"),
        ({"norm2": GROUPS, "groups2": 2}, "groups2 must divide the latent channels, 3, got 2"),
        ({"norm2": GROUPS, "groups2": 0}, "groups2 must divide"),
        (
            {"norm2": RUNNING},
            "running_mean2 and running_var2 must be given with norm2 code 1 and with no other",
        ),
        ({"running_var1": torch.ones(3)}, "running_mean1 and running_var1 must be given with norm1 code 1"),
        ({"weight1": torch.zeros(4)}, r"weight1 must have shape \(3,\), got \(4,\)"),
        ({"weight2": torch.zeros(3, 1)}, r"weight2 must have shape \(3,\), got \(3, 1\)"),
        (
            {"bias1": torch.zeros(3, dtype=torch.int32)},
            "bias1 must be float32, float64, float16 or bfloat16, got Int",
        ),
        ({"latent_bias": torch.zeros(1)}, r"latent_bias must have shape \(3,\), got \(1,\)"),
        (
            {"norm1": RUNNING, "running_mean1": torch.zeros(3), "running_var1": torch.zeros(2)},
            r"running_var1 must have shape \(3,\), got \(2,\)",
        ),
    ],
    ids=str,
)
def test_bad_input(change, message):
    names = ("phi", "mean", "covariance")
    names += tuple(f"{n}{i}" for i in (1, 2) for n in ("norm", *Norm._fields[1:]))
    given = dict(
        zip(
            (*names, "latent_bias", "residual"),
            Call((5, 3), (BATCH, BATCH)).convert(torch.float32).flat,
            strict=True,
        )
    )
    assert len(given) == 19
    OP(**given)
    with pytest.raises(RuntimeError, match=message):
        OP(**(given | change))
    with torch.no_grad(), pytest.raises(RuntimeError, match=message):
        BACKWARD(None, None, **(given | change), needs=1)


@pytest.mark.parametrize(
    ("grads", "message"),
    [
        ((torch.zeros(5, 3), None), r"grad_mapped must have shape \(5, 3, 3\)"),
        ((None, torch.zeros(5, 4)), r"grad_shift must have shape \(5, 3\), got \(5, 4\)"),
        ((None, torch.zeros(5, 3).double()), "grad_shift must have the dtype of phi, Float, got Double"),
    ],
)
def test_bad_gradients(grads, message):
    with torch.no_grad(), pytest.raises(RuntimeError, match=message):
        BACKWARD(*grads, *Call((5, 3), (BATCH, BATCH)).convert(torch.float32).flat, 1)
