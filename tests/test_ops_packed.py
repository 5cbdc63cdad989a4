# SPDX-License-Identifier: BSD-3-Clause
"""Packed weights: they hold what was packed, and the calls that take them.

That they give what `pointwise` gives is in test_ops_pointwise.py.
"""

import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import op_checks
import pytest
import torch
from cases import assert_close_to_truth
from operands import ISAS, LAYOUTS, Case, call, instruction_set, operands, plain, threads, truth
from test_ops_pointwise import BIG, TILED, WHOLE

import dcd_kernels as dcd


@pytest.mark.parametrize("count", (1, 2, 3))
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_threads(layout, count):
    """Work shared out by samples, by channels of a synthesised layer, by pixels of a factored one."""
    cases = (
        Case("pointwise", 1, 16, 96, 4, (31, 33), "relu", bias="sample", residual=True, packed=True),
        Case("pointwise", 1, 160, 130, 8, (7, 7), "silu", bias="shared", residual=True, packed=True),
        Case("pointwise", 1, 8, 8, 2, (1,), packed=True),
        Case("pointwise", 1, 300, 24, 2, (3,), residual=True, packed=True),
        Case("pointwise", 5, 33, 40, 3, (9, 9), packed=True),
        Case("pointwise", 6, 33, 40, 3, (3, 3), packed=True),
    )
    with threads(count):
        for case in cases:
            op_checks.values(case, torch.float32, layout, None)
            op_checks.same_bits(case, layout, None, count)
        op_checks.values(replace(BIG, packed=True), torch.float32, layout, None)


@pytest.mark.parametrize("shape", ((0, 13, 3, 7), (2, 13, 0, 7)))
def test_empty(shape):
    _x, weight, p, phi, q, lam, bias, _ = operands(WHOLE)
    n = shape[0]
    tensors = (torch.empty(shape), weight, p, phi[:n], q, lam[:n], bias[:n], None)
    assert call(replace(WHOLE, packed=True), tensors).shape == (n, 21, *shape[2:])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("latent", (0, 3, 17))
def test_opcheck(layout, latent):
    case = Case("pointwise", 2, 19, 20, max(latent, 1), (7, 7), "relu6", dynamic=latent > 0, bias="shared")
    x, weight, p, phi, q, lam, bias, residual = operands(case, layout=layout)
    op = torch.ops.dcd_kernels
    packed = op.pack_pointwise(weight, p, q)
    torch.library.opcheck(op.pack_pointwise.default, (weight, p, q))
    for wanted in (False, True):
        given = [None if t is None else t.detach().requires_grad_(wanted) for t in (x, phi, lam, bias)]
        arguments = (given[0], packed, 20, latent, *given[1:], residual, 2)
        torch.library.opcheck(op.pointwise_packed.default, arguments)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16), ids=str)
@pytest.mark.parametrize("sizes", ((1, 1, 1), (5, 16, 16), (16, 17, 3), (7, 40, 0)))
def test_packs_hold_what_was_packed(sizes, dtype):
    in_channels, out_channels, latent = sizes
    weight = torch.randn(out_channels, in_channels, 1, 1).to(dtype)
    p = torch.randn(out_channels, latent).to(dtype) if latent else None
    q = torch.randn(in_channels, latent).to(dtype) if latent else None
    packed = dcd.pack_weight(weight, p, q)
    for one in (packed, pickle.loads(pickle.dumps(packed))):
        assert (one.in_channels, one.out_channels, one.latent_channels, one.dtype) == (*sizes, dtype)
        for got, expected in zip(one.unpack(), (weight.flatten(1), p, q), strict=True):
            assert got is expected is None or (got.dtype == dtype and torch.equal(got, expected))


def test_a_pack_is_a_copy():
    x, weight, p, phi, q, _lam, _bias, _residual = operands(WHOLE)
    packed = dcd.pack_weight(weight, p, q)
    before = dcd.dcd_conv2d(x, packed, phi=phi)
    for tensor in (weight, p, q):
        tensor.zero_()
    assert torch.equal(dcd.dcd_conv2d(x, packed, phi=phi), before)


@pytest.mark.parametrize("rank", (1, 2, 3))
@pytest.mark.parametrize(
    "geometry", ({}, {"stride": 2}, {"padding": 1}, {"stride": 3, "padding": 2}), ids=str
)
def test_public_functions(rank, geometry, backend):
    case = Case("pointwise", 2, 13, 21, 5, (5,) * rank, "relu6", bias="sample")
    x, weight, p, phi, q, lam, bias, _ = tensors = operands(case)
    convolution = getattr(dcd, f"dcd_conv{rank}d")
    reference = getattr(dcd.reference, f"dcd_conv{rank}d")
    kernel = weight.reshape(21, 13, *[1] * rank)
    packed = dcd.pack_weight(kernel, p, q)
    options = {"lam": lam, "bias": bias, "activation": "relu6", **geometry}
    got = convolution(x, packed, phi=phi, **options)
    expected = reference(x, kernel, p, phi, q, **options)
    wide = {name: t.double() if isinstance(t, torch.Tensor) else t for name, t in options.items()}
    exact = reference(*(t.double() for t in (x, kernel, p, phi, q)), **wide)
    assert_close_to_truth(got, expected, exact)
    if not geometry:
        assert_close_to_truth(got, plain(case, tensors), truth(case, tensors))


@pytest.mark.parametrize("shape", ((3, 13), (3, 4, 13), (3, 2, 5, 13)))
def test_linear(shape, backend):
    x, weight, p, q = torch.randn(shape), torch.randn(21, 13), torch.randn(21, 4), torch.randn(13, 4)
    phi, lam, bias, skip = (
        torch.randn(3, 4, 4),
        torch.rand(3, 21),
        torch.randn(21),
        torch.randn(*shape[:-1], 21),
    )
    options = {"lam": lam, "bias": bias, "residual": skip, "activation": "silu"}
    got = dcd.dcd_linear(x, dcd.pack_weight(weight, p, q), phi=phi, **options)
    expected = dcd.reference.dcd_linear(x, weight, p, phi, q, **options)
    wide = {name: t.double() if isinstance(t, torch.Tensor) else t for name, t in options.items()}
    exact = dcd.reference.dcd_linear(*(t.double() for t in (x, weight, p, phi, q)), **wide)
    assert_close_to_truth(got, expected, exact)


def test_gradients_reach_all_but_the_weights():
    tensors = operands(WHOLE, requires_grad=True)
    x, weight, p, phi, q, lam, bias, residual = tensors
    packed = dcd.pack_weight(weight, p, q)
    wanted = (x, phi, lam, bias, residual)
    options = {"lam": lam, "bias": bias, "residual": residual, "activation": "silu"}
    through = dcd.dcd_conv2d(x, packed, phi=phi, **options)
    direct = dcd.dcd_conv2d(x, weight[:, :, None, None], p, phi, q, **options)
    for got, expected in zip(
        torch.autograd.grad(through.sum(), wanted), torch.autograd.grad(direct.sum(), wanted), strict=True
    ):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("grad", (False, True))
def test_compiles_whole(fresh_compiler, grad):
    x, weight, p, phi, q, lam, _bias, _residual = operands(WHOLE, requires_grad=grad)
    packed = dcd.pack_weight(weight, p, q)

    def run(x, packed, phi):
        return dcd.dcd_conv2d(x, packed, phi=phi, lam=lam, stride=2, activation="relu")

    expected = run(x, packed, phi)
    got = torch.compile(run, fullgraph=True)(x, packed, phi)
    torch.testing.assert_close(got, expected)
    if grad:
        torch.testing.assert_close(
            torch.autograd.grad(got.sum(), x)[0], torch.autograd.grad(expected.sum(), x)[0]
        )


def test_autocast_is_that_of_the_plain_call():
    x, weight, p, phi, q, lam, _bias, residual = operands(WHOLE)
    packed = dcd.pack_weight(weight, p, q)
    with torch.autocast("cpu", torch.bfloat16):
        got = dcd.dcd_conv2d(x, packed, phi=phi, lam=lam, residual=residual)
        expected = dcd.dcd_conv2d(x, weight[:, :, None, None], p, phi, q, lam=lam, residual=residual)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, expected)


def test_one_pack_in_many_threads():
    case = Case("pointwise", 2, 160, 64, 8, (14, 14))
    x, weight, p, phi, q, lam, _bias, _residual = operands(case)
    packed = dcd.pack_weight(weight, p, q)
    expected = dcd.dcd_conv2d(x, packed, phi=phi, lam=lam)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: dcd.dcd_conv2d(x, packed, phi=phi, lam=lam), range(40)))
    assert all(torch.equal(result, expected) for result in results)


def test_one_pack_for_every_instruction_set():
    x, weight, p, phi, q, lam, _bias, _residual = tensors = operands(TILED)
    packed = dcd.pack_weight(weight, p, q)
    for isa in ISAS:
        with instruction_set(isa):
            got = dcd.dcd_conv2d(x, packed, phi=phi, lam=lam)
        assert_close_to_truth(got, plain(TILED, tensors), truth(TILED, tensors))


_W, _P, _Q = torch.randn(6, 4), torch.randn(6, 2), torch.randn(4, 2)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((None,), TypeError, "weight must be a torch.Tensor"),
        ((_W.to(torch.int64),), TypeError, "weight must be one of float32"),
        ((_W[0],), ValueError, "weight must be"),
        ((_W[:, :, None].expand(-1, -1, 3),), ValueError, "weight must be"),
        ((_W[:0],), ValueError, "weight must be"),
        ((_W.to("meta"),), ValueError, "weight must be on the CPU"),
        ((_W, _P), ValueError, "q is missing"),
        ((_W, None, _Q), ValueError, "p is missing"),
        ((_W, _P[:5], _Q), ValueError, "p must have shape"),
        ((_W, _P, _Q[:, :1]), ValueError, "q must have shape"),
        ((_W, _P[:, :0], _Q[:, :0]), ValueError, "p must have shape"),
        ((_W, _P.double(), _Q), TypeError, "p must be torch.float32"),
    ],
)
def test_bad_packs(arguments, error, message):
    with pytest.raises(error, match=f"pack_weight: {message}"):
        dcd.pack_weight(*arguments)


@pytest.mark.parametrize(
    "changed, error, message",
    [
        ({"p": _P}, ValueError, "p must be left out"),
        ({"q": _Q}, ValueError, "q must be left out"),
        ({"phi": None}, ValueError, "phi must be given"),
        ({"phi": torch.zeros(3, 2, 2)}, ValueError, "phi must have shape"),
        ({"phi": torch.zeros(2, 1, 2, 2)}, ValueError, "phi must have shape"),
        ({"input": torch.zeros(2, 5, 3, 3)}, ValueError, "input must have the 4 channels"),
        ({"input": torch.zeros(4, 3, 3)}, ValueError, "input must be batched"),
        ({"input": torch.zeros(2, 4, 3, 0)}, ValueError, "only the batch of input may be empty"),
        (
            {"input": torch.zeros(2, 4, 3, 3).double()},
            TypeError,
            "input must be .* beside a PackedWeight of",
        ),
        ({"lam": torch.zeros(2, 5)}, ValueError, "lam must have shape"),
        ({"bias": torch.zeros(5)}, ValueError, "bias must have shape"),
        ({"residual": torch.zeros(2, 6, 3, 4)}, ValueError, "residual must have shape"),
        ({"activation": "gelu"}, ValueError, "activation must be one of"),
        ({"groups": 2}, ValueError, "r must be None and groups 1 .*got no r and groups=2"),
        ({"stride": 0}, ValueError, "stride"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_calls(changed, error, message):
    call = {
        "input": torch.zeros(2, 4, 3, 3),
        "weight": dcd.pack_weight(_W, _P, _Q),
        "phi": torch.zeros(2, 2, 2),
    }
    with pytest.raises(error, match=f"dcd_conv2d: {message}"):
        dcd.dcd_conv2d(**{**call, **changed})


def test_a_surplus_phi():
    with pytest.raises(ValueError, match="phi must be left out"):
        dcd.dcd_conv2d(torch.zeros(2, 4, 3, 3), dcd.pack_weight(_W), phi=torch.zeros(2, 2, 2))


def test_the_op_refuses_what_it_cannot_compute():
    op = torch.ops.dcd_kernels.pointwise_packed
    x, data = torch.zeros(2, 4, 9), dcd.pack_weight(_W, _P, _Q).data
    phi = torch.zeros(2, 2, 2)
    for arguments, message in (
        ((x, data[1:], 6, 2, phi), "packed"),
        ((x, data, 17, 2, phi), "packed"),
        ((x, data, 6, 2, None), "phi"),
        ((x, data, 6, 2, phi[:1]), "phi"),
        ((x.double(), data, 6, 2, phi), "packed"),
    ):
        with pytest.raises(RuntimeError, match=message):
            op(*arguments, None, None, None, 0)
