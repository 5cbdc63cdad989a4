# SPDX-License-Identifier: BSD-3-Clause
"""The reference against the NumPy oracle: every form, geometry, layout and dtype, and its derivatives."""

from __future__ import annotations

import cases
import oracle
import pytest
import torch
from cases import FORMS, assert_same, make_case
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from dcd_kernels import reference

CONVOLUTIONS = [form for form in FORMS if not form.startswith(("linear", "apply"))]
ONE_TAP = ["pointwise", "fusion alone", "attention alone", "blocks"]
MANY_TAPS = [form for form in CONVOLUTIONS if form not in ONE_TAP]
ACTIVATIONS = (None, "relu", "relu6", "silu", "hardswish")


def check(case, relative: float = 1e-12) -> None:
    assert_same(case.run(reference), case.truth(), relative, case.form)


@pytest.mark.parametrize("form", FORMS)
def test_form(form):
    check(make_case(form))


@pytest.mark.parametrize("spatial", [1, 3])
@pytest.mark.parametrize("form", [form for form in FORMS if not form.startswith("linear")])
def test_one_and_three_dimensions(form, spatial):
    check(make_case(form, spatial=spatial))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", ["shared", "sample"])
@pytest.mark.parametrize("form", ["pointwise", "depthwise", "joint", "centre", "linear rows", "apply"])
def test_epilogue(form, bias, activation):
    check(make_case(form, bias=bias, residual=True, activation=activation))


@pytest.mark.parametrize("form", MANY_TAPS)
@pytest.mark.parametrize(
    "geometry",
    [
        {"stride": 2},
        {"stride": (2, 1), "padding": (0, 2)},
        {"padding": "same"},
        {"padding": "valid"},
        {"padding": "same", "dilation": 2},
        {"dilation": (1, 2), "padding": (3, 1), "stride": (2, 3)},
        {"kernel": (1, 3), "padding": 0},
        {"kernel": (3, 1), "padding": (2, 1), "stride": 2},
        {"kernel": 5, "padding": 2, "residual": True},
    ],
    ids=str,
)
def test_geometry(form, geometry):
    check(make_case(form, size=(7, 6), **geometry))


@pytest.mark.parametrize(
    "form", ["depthwise", "depthwise attention alone", "joint", "centre attention alone"]
)
@pytest.mark.parametrize("dilation", [1, 3])
@pytest.mark.parametrize("padding", ["same", "valid", 1])
def test_even_kernels_without_a_centre_tap(form, padding, dilation):
    check(make_case(form, kernel=(2, 4), size=(9, 11), padding=padding, dilation=dilation, residual=True))


@pytest.mark.parametrize("form", ONE_TAP)
@pytest.mark.parametrize(
    "geometry", [{"stride": 2}, {"padding": 1}, {"stride": 3, "padding": (2, 0)}], ids=str
)
def test_pointwise_geometry(form, geometry):
    check(make_case(form, size=(7, 5), **geometry))


@pytest.mark.parametrize("form", ["apply", "apply blocks", "apply on a latent"])
@pytest.mark.parametrize(
    "sampling",
    [
        {"stride": 2},
        {"offset": 1},
        {"offset": (-1, -9), "stride": (1, 2)},
        {"offset": (30, 0)},
        {"offset": -2, "stride": 3},
    ],
    ids=str,
)
def test_apply_reads_zero_outside(form, sampling):
    check(make_case(form, size=(6, 7), **sampling))


@pytest.mark.parametrize(
    "shape",
    [
        {"latent": 1},
        {"latent": 11},
        {"latent": 45},
        {"in_channels": 3, "out_channels": 5, "latent": 2},
        {"in_channels": 1, "out_channels": 1, "latent": 1},
        {"batch": 1},
        {"batch": 1, "size": (1, 1)},
        {"batch": 3, "size": (1, 9)},
    ],
    ids=str,
)
@pytest.mark.parametrize("form", ["pointwise", "depthwise", "joint", "centre", "apply", "linear"])
def test_odd_shapes(form, shape):
    shape = {**shape, "size": ()} if form == "linear" else shape
    check(make_case(form, **shape))


@pytest.mark.parametrize("multiplier", [1, 2, 3])
def test_depthwise_multiplier(multiplier):
    check(make_case("depthwise", in_channels=4, out_channels=4 * multiplier, bias="sample"))


@pytest.mark.parametrize("blocks", [1, 2, 3, 6])
@pytest.mark.parametrize("form", ["blocks", "linear blocks", "apply blocks", "centre blocks"])
def test_numbers_of_blocks(form, blocks):
    check(make_case(form, blocks=blocks, in_channels=6, out_channels=12))


@pytest.mark.parametrize("groups,blocks", [(2, 2), (2, 4), (4, 4), (2, 8)])
def test_groups_with_blocks(groups, blocks):
    check(make_case("grouped", groups=groups, blocks=blocks, in_channels=16, out_channels=8))
    check(
        make_case(
            "grouped", groups=groups, blocks=blocks, in_channels=8, out_channels=16, kernel=1, padding=0
        )
    )


@pytest.mark.parametrize("layout", ["channels_last", "sliced"])
@pytest.mark.parametrize("form", FORMS)
def test_layouts(form, layout):
    check(make_case(form, layout=layout, residual=True, bias="shared"))


@pytest.mark.parametrize("form", FORMS)
def test_complex(form):
    check(make_case(form, dtype=torch.complex128, bias="sample", residual=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wide", [None, torch.float32])
@pytest.mark.parametrize("form", FORMS)
def test_lower_precision(form, wide, dtype):
    case = make_case(form, bias="shared").converted(dtype, wide)
    got, truth = case.run(reference), case.truth()
    assert got.dtype == dtype
    # The handful of intermediate results that are rounded may each be wrong by half an eps of their own size,
    # which exceeds the sum's: in-products of at most six channels bring that to a small factor.
    error = torch.linalg.vector_norm(got.double() - truth)
    assert error <= 6 * torch.finfo(dtype).eps * torch.linalg.vector_norm(truth)


@pytest.mark.parametrize("form", CONVOLUTIONS)
def test_weight_is_the_oracle_s(form):
    case = make_case(form)
    factors = {name: case.tensors.get(name) for name in ("weight", "p", "phi", "q", "r", "lam")}
    groups = case.options["groups"]
    got = reference.dcd_weight(**factors, groups=groups)
    arrays = {name: None if t is None else cases.as_array(t) for name, t in factors.items()}
    assert_same(got, torch.from_numpy(oracle.weights(**arrays, groups=groups)))


@pytest.mark.parametrize("form", ["linear", "linear blocks"])
def test_weight_of_linear(form):
    case = make_case(form)
    factors = {name: case.tensors[name] for name in ("weight", "p", "phi", "q", "lam")}
    got = torch.einsum("n...i,noi->n...o", case.tensors["input"], reference.dcd_weight(**factors))
    assert_same(got, case.truth())


def test_infinite_phi_stays_in_its_block():
    case = make_case("blocks", in_channels=4, out_channels=4)
    case.tensors["phi"][0, 0, 0, 0] = float("inf")
    factors = {name: case.tensors[name] for name in ("weight", "p", "phi", "q", "lam")}
    weight = reference.dcd_weight(**factors)
    assert not weight[0, :2, :2].isfinite().all()
    assert weight[0, 2:].isfinite().all() and weight[0, :2, 2:].isfinite().all()


# Derivatives


def tiny(form: str, **options):
    shape = {"batch": 2, "in_channels": 2, "out_channels": 2, "latent": 2, "size": (3, 2)}
    if form == "grouped":
        shape.update(in_channels=4, out_channels=4)
    if form.startswith("linear"):
        shape["size"] = FORMS[form]["size"] and (2,)
    return make_case(form, **{**shape, **options}).requiring_grad()


@pytest.mark.parametrize("form", FORMS)
def test_gradient(form):
    case = tiny(form, bias="sample", residual=True, activation="silu")
    assert torch.autograd.gradcheck(lambda *tensors: case.of(reference, *tensors), case.leaves())


@pytest.mark.parametrize("form", FORMS)
def test_second_derivative(form):
    case = tiny(
        form, activation="silu", in_channels=4 if form == "grouped" else 2, size=FORMS[form].get("size", 2)
    )
    assert torch.autograd.gradgradcheck(lambda *tensors: case.of(reference, *tensors), case.leaves())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_are_twice_differentiable(activation):
    case = tiny("pointwise", activation=activation)
    function = lambda *tensors: case.of(reference, *tensors)  # noqa: E731
    assert torch.autograd.gradcheck(function, case.leaves())
    assert torch.autograd.gradgradcheck(function, case.leaves())


@pytest.mark.parametrize("form", ["pointwise", "blocks", "depthwise", "joint", "centre"])
def test_weight_gradient(form):
    case = tiny(form)
    names = [name for name in case.names if name != "input"]
    groups = case.options["groups"]

    def weights(*tensors):
        given = {"p": None, "phi": None, "q": None, **dict(zip(names, tensors, strict=True))}
        return reference.dcd_weight(**given, groups=groups)

    assert torch.autograd.gradcheck(weights, [case.tensors[name] for name in names])


class LargestAllocation(TorchDispatchMode):
    """Sizes of all tensors that operators return."""

    def __init__(self):
        super().__init__()
        self.sizes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.sizes.add(tensor.numel())
        return result


@pytest.mark.parametrize(
    "form", ["pointwise", "fusion alone", "attention alone", "blocks", "joint", "centre", "linear", "apply"]
)
def test_no_weight_per_sample(form):
    # Nothing else has N·Co·Ci = 5·22·26 elements here, or that times the number of taps.
    shape = {"batch": 5, "in_channels": 26, "out_channels": 22, "latent": 3}
    case = make_case(form, **shape, **({} if form == "linear" else {"size": (7, 7)})).requiring_grad()
    with LargestAllocation() as seen:
        output = case.run(reference)
        output.square().sum().backward()
    assert len(seen.sizes) > 3
    assert not seen.sizes & {5 * 22 * 26, 5 * 22 * 26 * 9}
    with LargestAllocation() as seen:  # the test can fail
        if "weight" in case.tensors:
            names = [
                name for name in ("weight", "p", "phi", "q", "r", "lam") if case.tensors.get(name) is not None
            ]
            reference.dcd_weight(**{"p": None, "phi": None, "q": None, **{n: case.tensors[n] for n in names}})
            assert seen.sizes & {5 * 22 * 26, 5 * 22 * 26 * 9}


# What flows through


@pytest.mark.parametrize("form", FORMS)
def test_empty_batch(form):
    case = make_case(form, batch=2)
    full = case.run(reference)
    sampled = ("static", "input", "phi", "lam", "residual")
    case = case.with_tensors({name: case.tensors[name][:0] for name in case.names if name in sampled})
    case = case.requiring_grad()
    output = case.run(reference)
    assert output.shape == (0, *full.shape[1:])
    gradients = torch.autograd.grad(output.sum(), case.leaves(), allow_unused=form == "apply attention alone")
    for name, gradient in zip(case.names, gradients, strict=True):
        if gradient is None:  # without factors apply reads its static output only
            assert name == "input"
        else:
            assert gradient.shape == case.tensors[name].shape and not gradient.any(), name


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("form", ["pointwise", "depthwise", "joint", "centre", "apply"])
def test_not_finite_reaches_its_own_sample_only(form, value):
    case = make_case(form)
    case.tensors["input"][0, :, 2, 2] = value
    output = case.run(reference)
    assert not output[0, :, 2, 2].isfinite().any()
    assert output[1].isfinite().all()
    assert output[0, :, 4, 0].isfinite().all()


def test_linear_without_rows():
    case = make_case("linear rows")
    case.tensors["input"] = case.tensors["input"][:, :0]
    assert case.run(reference).shape == (2, 0, 3, 4)


# Autocast and transforms (compilation: test_functional.py)


@pytest.mark.parametrize("form", FORMS)
def test_autocast_converts_all_but_the_coefficients(form):
    case = make_case(form, dtype=torch.float32, bias="shared", residual=True)
    half = {
        name: t.bfloat16() for name, t in case.tensors.items() if t is not None and name not in cases.WIDE
    }
    expected = case.with_tensors(half).run(reference)
    with torch.autocast("cpu", torch.bfloat16):
        got = case.run(reference)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, expected)


def test_autocast_leaves_float64_alone():
    case = make_case("pointwise")
    with torch.autocast("cpu", torch.bfloat16):
        check(case)


def test_vmap_over_parameters():
    case = make_case("pointwise")
    p = torch.stack([case.tensors["p"], -case.tensors["p"]])
    got = torch.func.vmap(lambda p: case.with_tensors({"p": p}).run(reference))(p)
    assert_same(got[0], case.truth())
    assert_same(got[1], case.with_tensors({"p": -case.tensors["p"]}).truth())


# Properties


@st.composite
def convolutions(draw):
    form = draw(st.sampled_from(CONVOLUTIONS))
    spatial = draw(st.integers(1, 3))
    per_axis = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(spatial))  # noqa: E731
    blocks = draw(st.integers(1, 3)) if "blocks" in FORMS[form] else 1
    options = {
        "spatial": spatial,
        "batch": draw(st.integers(1, 3)),
        "in_channels": draw(st.integers(1, 4)) * blocks,
        "out_channels": draw(st.integers(1, 4)) * blocks,
        "latent": draw(st.integers(1, 5)),
        "latent_kernel": draw(st.integers(1, 3)),
        "blocks": blocks,
        "stride": per_axis(1, 3),
        "padding": draw(st.one_of(st.just("valid"), st.just(per_axis(0, 3)))),
        "dilation": per_axis(1, 2),
        "bias": draw(st.sampled_from([None, "shared", "sample"])),
        "residual": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**20)),
    }
    if "kernel" in FORMS[form]:
        centre = form.startswith(("centre", "grouped"))
        options["kernel"] = tuple(
            2 * draw(st.integers(0, 1)) + 1 if centre else draw(st.integers(1, 3)) for _ in range(spatial)
        )
    if form == "grouped":
        inner = draw(st.integers(1, 2))
        options.update(groups=2, blocks=2 * inner, in_channels=4 * inner, out_channels=2 * inner)
    kernel = options.get("kernel", (1,) * spatial)
    reach = [d * (k - 1) + 1 for d, k in zip(options["dilation"], kernel, strict=True)]
    options["size"] = tuple(length + draw(st.integers(0, 4)) for length in reach)
    return make_case(form, **options)


@settings(max_examples=80, deadline=None)
@given(convolutions())
def test_any_convolution(case):
    check(case, 1e-11)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_apply(data):
    draw = data.draw
    spatial = draw(st.integers(1, 3))
    options = {
        "spatial": spatial,
        "size": tuple(draw(st.integers(1, 6)) for _ in range(spatial)),
        "stride": tuple(draw(st.integers(1, 3)) for _ in range(spatial)),
        "offset": tuple(draw(st.integers(-7, 7)) for _ in range(spatial)),
    }
    check(make_case(draw(st.sampled_from(["apply", "apply on a latent"])), **options))
