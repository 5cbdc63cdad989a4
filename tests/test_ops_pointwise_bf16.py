# SPDX-License-Identifier: BSD-3-Clause
"""The pointwise op on bf16 maps, and on fp32 maps whose products are split, with every way to multiply bf16.

AMX runs here on tiles in memory that do what the instructions are documented to do, and if the machine has
it, on its own.
"""

from __future__ import annotations

from contextlib import contextmanager

import op_checks
import pytest
import test_ops_pointwise
import torch
from cases import assert_close_to_truth
from operands import (
    ISAS,
    LAYOUTS,
    Case,
    call,
    operands,
    plain,
    truth,
)

import dcd_kernels as dcd
from dcd_kernels import info
from dcd_kernels.explain import explain

OPS = torch.ops.dcd_kernels
BF16 = torch.bfloat16
WAYS = ("amx", "avx512_bf16", "widened", "amx_emulated")


def _supported(way: str) -> bool:
    try:
        OPS._set_cpu_products(way)
    except RuntimeError:
        return False
    OPS._set_cpu_products("")
    return True


PRODUCTS = [way for way in WAYS if _supported(way)]
TILES = [way for way in PRODUCTS if way.startswith("amx")]
needs_emulation = pytest.mark.skipif("amx_emulated" not in PRODUCTS, reason="no avx512_bf16")


@contextmanager
def products(name: str):
    """bf16 is multiplied in this way."""
    OPS._set_cpu_products(name)
    try:
        yield
    finally:
        OPS._set_cpu_products("")


@contextmanager
def matmul_precision(name: str):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


CASES = [
    *test_ops_pointwise.CASES,
    # whole pairs of channels without a residual; blocks in the other order of the product
    Case("pointwise", 2, 20, 20, 4, (7, 7), dynamic=False),
    Case("pointwise", 2, 12, 20, 3, (31, 20), "relu6", blocks=4, bias="shared"),
    # more than one block of channels or of pixels
    Case("pointwise", 1, 64, 450, 8, (14, 14), residual=True),
    Case("pointwise", 1, 700, 410, 8, (14, 14)),
]
TILED, DEEP, LARGE = CASES[11], CASES[13], CASES[-1]


@pytest.mark.parametrize("wide", (False, True), ids=("half", "wide"))
@pytest.mark.parametrize("way", PRODUCTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(case, layout, way, wide):
    with products(way):
        op_checks.values(case, BF16, layout, None, wide=wide)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_widened_values_at_every_instruction_set(layout, isa):
    with products("widened"):
        for case in CASES:
            op_checks.values(case, BF16, layout, isa, wide=True)


@pytest.mark.parametrize("way", PRODUCTS)
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_error_is_that_of_a_rounded_weight(layout, way):
    """W_n and T are rounded once, and the sums are fp32: far below what the tolerance leaves to bf16."""
    with products(way):
        for case in (TILED, DEEP, LARGE):
            tensors = operands(case, BF16, layout, wide=True)
            got, exact = call(case, tensors, None).double(), truth(case, tensors)
            if case.activation is not None:
                exact = plain(
                    Case(**{**case.__dict__, "activation": None}),
                    [None if t is None else t.double() for t in tensors],
                )
            error = (got - exact).norm() / exact.norm()
            assert error < 1.1 * 2**-9 if way == "widened" else error < 2**-8, case


@pytest.mark.full
@pytest.mark.parametrize("way", PRODUCTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pixels", (1, 2, 15, 16, 17, 31, 33, 47, 48, 49, 97, 193, 400))
@pytest.mark.parametrize(
    "channels", ((1, 1), (3, 8), (8, 9), (16, 15), (31, 16), (33, 65), (65, 33), (130, 7))
)
def test_values_at_every_tile_edge(channels, pixels, layout, way):
    with products(way):
        for latent in (1, 2, 7, 17, 33):
            case = Case("pointwise", 2, *channels, latent, (pixels,), "relu", bias="shared", residual=True)
            op_checks.values(case, BF16, layout, None)


@pytest.mark.parametrize("way", PRODUCTS)
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_same_bits_whatever_the_threads(layout, way):
    with products(way):
        for case in (TILED, DEEP):
            op_checks.same_bits(case, layout, None, 1, dtype=BF16)
            op_checks.same_bits(case, layout, None, 2, dtype=BF16)


@pytest.mark.parametrize("way", PRODUCTS)
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_rows_of_odd_length_apart(layout, way):
    """A channels-last slice whose pixels lie an odd number of channels apart, and whose rows are odd."""
    case = Case("pointwise", 2, 24, 33, 4, (7, 7))
    with products(way):
        tensors = operands(case, BF16, layout)
        expected = call(case, tensors)
        wider = torch.full((2, 31, 7, 7), float("nan"), dtype=BF16)
        if layout == "channels_last":
            wider = wider.contiguous(memory_format=torch.channels_last)
        wider[:, 5:29] = tensors[0]
        tensors[0] = wider[:, 5:29]
        assert torch.equal(call(case, tensors), expected)


@pytest.mark.parametrize("way", PRODUCTS)
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_not_a_number_stays_in_its_pixel(layout, way):
    with products(way):
        for case in (DEEP, TILED):
            tensors = operands(case, BF16, layout)
            tensors[0] = tensors[0].clone()
            tensors[0][-1, 2, 3, 4] = float("nan")
            got = call(case, tensors, None)
            spoiled = torch.zeros(got.shape, dtype=torch.bool)
            spoiled[-1, :, 3, 4] = True
            assert torch.equal(got.isnan(), spoiled)


@pytest.mark.parametrize("way", PRODUCTS)
def test_gradients_of_bf16(way):
    """The forward op may multiply bf16, its gradients are those of the float32 kernels."""
    case = Case("pointwise", 2, 24, 33, 4, (9, 6), "relu")
    with products(way):
        tensors = operands(case, BF16, requires_grad=True)
        call(case, tensors).float().square().sum().backward()
    for name, tensor in zip(case.names, tensors, strict=True):
        if tensor is not None:
            assert tensor.grad.isfinite().all() and tensor.grad.any(), name


# fp32 in three products


@pytest.mark.parametrize("way", TILES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_split_values(case, layout, way):
    with products(way), matmul_precision("high"):
        assert OPS.cpu_splits_float32()
        tensors = operands(case, torch.float32, layout)
        got, exact = call(case, tensors), truth(case, tensors)
    assert got.isfinite().all()
    assert (got.double() - exact).norm() <= 1e-5 * exact.norm()


@pytest.mark.parametrize("way", PRODUCTS)
def test_highest_precision_is_exact_fp32(way):
    case = DEEP
    with products(way), matmul_precision("highest"):
        assert not OPS.cpu_splits_float32()
        tensors = operands(case, torch.float32)
        assert_close_to_truth(call(case, tensors), plain(case, tensors), truth(case, tensors))


@pytest.mark.parametrize("way", PRODUCTS)
@pytest.mark.parametrize("precision", ("high", "medium"))
def test_only_tiles_split_float32(precision, way):
    with products(way), matmul_precision(precision):
        assert OPS.cpu_splits_float32() == way.startswith("amx")


@needs_emulation
def test_split_of_values_beyond_bf16():
    """The largest float32 rounds to infinity in bf16; what is infinite stays so or, times zero, is NaN."""
    case = Case("pointwise", 1, 2, 2, 1, (4,), lam=False, dynamic=False)
    largest, infinity = torch.finfo(torch.float32).max, float("inf")
    x = torch.tensor([[[largest, -largest, infinity, 1.0], [1.0, 1.0, 1.0, -infinity]]])
    tensors = [x, torch.tensor([[1.0, 2.0**-20], [2.0**-20, 1.0]]), *[None] * 6]
    with products("amx_emulated"), matmul_precision("high"):
        got = call(case, tensors)[0]
    assert (got[0, :2] / x[0, 0, :2] - 1).abs().max() < 2**-15
    assert not got[:, 2:].isfinite().any()


# what is said of it


def explained(case, dtype, layout="contiguous"):
    tensors = operands(case, dtype, layout, wide=True)
    weight = tensors[1][:, :, *[None] * len(case.size)]
    factors = dict(zip(("p", "phi", "q", "lam", "bias", "residual"), tensors[2:], strict=True))
    (found,) = explain(dcd.dcd_conv2d, tensors[0], weight, **factors).calls
    return found


@pytest.mark.parametrize(
    ("way", "words"),
    (
        ("amx_emulated", "products of bf16 by emulated AMX tiles"),
        ("avx512_bf16", "products of bf16 by vdpbf16ps"),
        ("widened", "products of bf16 in float32"),
    ),
)
def test_explain_names_the_products(way, words):
    if way not in PRODUCTS:
        pytest.skip("no avx512_bf16")
    with products(way):
        found = explained(TILED, BF16)
        assert words in found.kernel
        assert words in found.notes[-1]
        assert explained(TILED, torch.float32).kernel.endswith(f"({OPS.cpu_isa()})")
    if OPS.cpu_products_obstacle("amx") == "this CPU has no amx-tile":
        with products("widened"):
            assert "no amx: this CPU has no amx-tile" in explained(TILED, BF16).notes[-1]


@needs_emulation
def test_explain_names_split_float32():
    with products("amx_emulated"), matmul_precision("high"):
        found = explained(TILED, torch.float32)
        assert "float32 split into three products of bf16" in found.kernel
        assert "784 output pixels" in found.notes[-1]


@needs_emulation
def test_info_names_the_products():
    with products("amx_emulated"):
        facts = dict(info.facts())
        assert facts["bf16"].startswith("amx_emulated")
        assert facts["float32"].startswith("exact")
        with matmul_precision("medium"):
            assert "'medium'" in dict(info.facts())["float32"]


def test_plan_weighs_the_orders_by_the_speed_of_the_products():
    from dcd_kernels import _core

    sizes = {"in_channels": 256, "out_channels": 128, "latent_channels": 16, "pixels": 196}
    plans = {way: _core.pointwise_plan(**sizes, products=way) for way in WAYS}
    assert plans["widened"]["order"] == "synthesised" and plans["amx"]["order"] == "factored"
    assert (
        plans["widened"]["factored_madds"]
        == 2 * plans["avx512_bf16"]["factored_madds"]
        == 16 * plans["amx"]["factored_madds"]
        == 196 * 16 * (256 + 128)
    )
    assert _core.pointwise_plan(**sizes, products="amx")["rows"] == "channels"
    assert _core.pointwise_plan(**sizes, products="amx", channels_last=True)["rows"] == "pixels"
    with pytest.raises(ValueError, match="products must be"):
        _core.pointwise_plan(**sizes, products="tensor cores")
    assert tuple(_core.products()) == WAYS


def test_unknown_products_are_refused():
    with pytest.raises(RuntimeError, match="multiply bf16"):
        OPS._set_cpu_products("tensor cores")
    with pytest.raises(RuntimeError, match="multiply bf16"):
        OPS.cpu_products_obstacle("tensor cores")


def test_the_products_in_use_have_no_obstacle():
    assert OPS.cpu_products_obstacle(OPS.cpu_products()) == ""
    assert OPS.cpu_products_obstacle("amx_emulated") == "for tests only"
    before = OPS.cpu_isa()
    try:
        OPS.set_cpu_isa("baseline")
        assert OPS.cpu_products() == "widened"
    finally:
        OPS.set_cpu_isa(before)
