# SPDX-License-Identifier: BSD-3-Clause
"""The public functions under every backend: values against the oracle, gradients against float64.

What the compiled operators compute is tested with them; here it is what the lowering makes of each form.
"""

from __future__ import annotations

import pytest
import torch
from cases import FORMS, WIDE, assert_close_to_truth, assert_same, make_case

import dcd_kernels as dcd
from dcd_kernels import reference

GEOMETRIES = {
    "pointwise": [{"stride": 2}, {"padding": 1}, {"stride": (2, 1), "padding": (0, 2)}, {"padding": "same"}],
    "blocks": [{"stride": 2}],
    "attention alone": [{"stride": 2, "padding": 1}],
    "depthwise": [
        {"stride": 2},
        {"padding": "same", "kernel": (2, 4)},
        {"padding": "valid", "dilation": 2},
        {"kernel": (1, 5), "padding": (0, 2), "out_channels": 18},
    ],
    "joint": [
        {"stride": 2},
        {"padding": "same", "kernel": (2, 3), "dilation": 3},
        {"kernel": 1, "padding": 0},
    ],
    "centre": [{"stride": 2, "padding": 0}, {"padding": "same", "dilation": 2}, {"padding": (0, 3)}],
    "centre attention alone": [{"kernel": 2, "stride": 2}],
    "grouped": [{"stride": 2}, {"kernel": 1, "padding": 0}],
    "apply": [{"stride": 2, "offset": 1}, {"offset": (-3, 2)}, {"offset": 40}],
    "apply on a latent": [{"stride": 2}],
}


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("form", FORMS)
def test_value(form, layout, backend):
    case = make_case(form, layout=layout, bias="shared", residual=True)
    assert_same(case.run(dcd), case.truth())


@pytest.mark.parametrize("spatial", [1, 3])
@pytest.mark.parametrize("form", [form for form in FORMS if not form.startswith("linear")])
def test_one_and_three_dimensions(form, spatial, backend):
    case = make_case(form, spatial=spatial, bias="sample", activation="relu6")
    assert_same(case.run(dcd), case.truth())


@pytest.mark.parametrize(
    "form,options", [(form, options) for form, all_ in GEOMETRIES.items() for options in all_]
)
def test_geometry(form, options, backend):
    case = make_case(form, size=(9, 8), bias="sample", residual=True, activation="silu", **options)
    assert_same(case.run(dcd), case.truth())


@pytest.mark.parametrize("activation", ["relu", "relu6", "silu", "hardswish"])
@pytest.mark.parametrize("form", ["pointwise", "depthwise", "joint", "centre", "linear", "apply"])
def test_activation(form, activation, backend):
    case = make_case(form, bias="sample", residual=True, activation=activation)
    assert_same(case.run(dcd), case.truth())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
def test_lower_precision(form, dtype, backend):
    for wide in (None, torch.float32):
        case = make_case(form, bias="shared", size=FORMS[form].get("size", (9, 7))).converted(dtype, wide)
        assert_close_to_truth(
            case.run(dcd), case.run(reference), case.truth(), f"{form}, coefficients {wide}"
        )


@pytest.mark.parametrize("form", FORMS)
def test_gradients(form, backend):
    case = make_case(form, bias="sample", residual=True, activation="silu").requiring_grad()
    expected = case.run(reference)
    cotangent = torch.randn_like(expected)
    unused = form == "apply attention alone"
    wanted = torch.autograd.grad(expected, case.leaves(), cotangent, allow_unused=unused)
    got = torch.autograd.grad(case.run(dcd), case.leaves(), cotangent, allow_unused=unused)
    for name, mine, truth in zip(case.names, got, wanted, strict=True):
        if truth is None:
            assert name == "input" and (mine is None or not mine.any())
        else:
            assert_same(mine, truth, 1e-12, name)


@pytest.mark.parametrize("form,options", [(form, options[0]) for form, options in GEOMETRIES.items()])
def test_gradients_of_strided_calls(form, options, backend):
    case = make_case(form, **{"size": (7, 6), **options}).requiring_grad()
    output = case.run(reference)
    wanted = torch.autograd.grad(output.sum(), case.leaves())  # an expanded gradient, stride 0
    got = torch.autograd.grad(case.run(dcd).sum(), case.leaves())
    for name, mine, truth in zip(case.names, got, wanted, strict=True):
        assert_same(mine, truth, 1e-12, name)


@pytest.mark.parametrize("form", FORMS)
def test_only_what_is_asked_for(form, backend):
    case = make_case(form)
    for name in case.names:
        if form == "apply attention alone" and name == "input":
            continue
        leaf = case.tensors[name].detach().requires_grad_()
        output = case.with_tensors({name: leaf}).run(dcd)
        truth = torch.autograd.grad(case.with_tensors({name: leaf}).run(reference).sum(), leaf)[0]
        assert_same(torch.autograd.grad(output.sum(), leaf)[0], truth, 1e-12, name)
    assert not case.run(dcd).requires_grad


@pytest.mark.parametrize("form", FORMS)
def test_empty_batch(form, backend):
    case = make_case(form, batch=2, bias="shared")
    full = case.run(reference)
    sampled = ("static", "input", "phi", "lam", "residual")
    empty = {name: case.tensors[name][:0] for name in case.names if name in sampled}
    case = case.with_tensors(empty).requiring_grad()
    output = case.run(dcd)
    assert output.shape == (0, *full.shape[1:])
    output.sum().backward()
    for name in case.names:
        gradient = case.tensors[name].grad
        if not (form == "apply attention alone" and name == "input"):
            assert gradient.shape == case.tensors[name].shape and not gradient.any(), name


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("form", ["pointwise", "depthwise", "joint", "centre", "apply"])
def test_not_finite_reaches_its_own_sample_only(form, value, backend):
    case = make_case(form)
    case.tensors["input"][0, :, 2, 2] = value
    output = case.run(dcd)
    assert not output[0, :, 2, 2].isfinite().any()
    assert output[1].isfinite().all()
    assert output[0, :, 4, 0].isfinite().all()


@pytest.mark.parametrize("form", FORMS)
def test_channels_last_stays(form, backend):
    if form.startswith("linear"):
        pytest.skip("rows have no layout")
    case = make_case(form, layout="channels_last", lam=True)
    assert case.run(dcd).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("form", FORMS)
def test_autocast(form, backend):
    case = make_case(form, dtype=torch.float32, bias="shared")
    half = {name: t.bfloat16() for name, t in case.tensors.items() if t is not None and name not in WIDE}
    converted = case.with_tensors(half)
    with torch.autocast("cpu", torch.bfloat16):
        got = case.run(dcd)
    assert_close_to_truth(got, converted.run(reference), converted.truth(), form)


def test_autocast_backward_gives_float32_parameters(backend):
    case = make_case("pointwise", dtype=torch.float32).requiring_grad()
    with torch.autocast("cpu", torch.bfloat16):
        output = case.run(dcd)
    output.float().sum().backward()
    assert all(t.grad.dtype == torch.float32 and t.grad.isfinite().all() for t in case.leaves())


@pytest.mark.parametrize("form", ["pointwise", "depthwise", "joint", "grouped", "linear rows", "apply"])
def test_compiles_in_one_graph_for_any_batch(form, backend, fresh_compiler):
    compiled = torch.compile(
        lambda *tensors: case.of(dcd, *tensors), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for batch in (2, 5):
        case = make_case(form, batch=batch, activation="relu6")
        assert_same(compiled(*case.leaves()), case.truth())


class Module(torch.nn.Module):
    def __init__(self, case):
        super().__init__()
        self.case = case

    def forward(self, *tensors):
        return self.case.of(dcd, *tensors)


@pytest.mark.parametrize("form", ["pointwise", "depthwise", "joint", "centre"])
def test_exports_with_a_dynamic_batch(form, backend):
    case = make_case(form, batch=3)
    batch = torch.export.Dim("batch")
    shapes = tuple({0: batch} if name in ("input", "phi", "lam") else None for name in case.names)
    exported = torch.export.export(Module(case), tuple(case.leaves()), dynamic_shapes=(shapes,))
    other = make_case(form, batch=5)
    assert_same(exported.module()(*other.leaves()), other.truth())


def test_transforms(backend):
    case = make_case("pointwise")

    def loss(p):
        return case.with_tensors({"p": p}).run(dcd).square().sum()

    p = case.tensors["p"]
    assert_same(
        torch.func.grad(loss)(p), torch.autograd.grad(loss(leaf := p.clone().requires_grad_()), leaf)[0]
    )
    batched = torch.func.vmap(lambda p: case.with_tensors({"p": p}).run(dcd))(torch.stack([p, -p]))
    assert_same(batched[1], case.with_tensors({"p": -p}).truth())


def test_linear_without_rows(backend):
    case = make_case("linear rows")
    case.tensors["input"] = case.tensors["input"][:, :0]
    assert case.run(dcd).shape == (2, 0, 3, 4)


def test_poison_reaches_memory_from_torch():
    assert torch.empty(3, 5).isnan().all()
