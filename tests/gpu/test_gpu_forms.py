# SPDX-License-Identifier: BSD-3-Clause
"""Every form through the public functions on the GPU: values and gradients, bad input, who runs what."""

from __future__ import annotations

import pytest
import torch
from cases import FORMS, assert_close_to_truth, make_case
from on_device import BACKENDS, BF16, DEPTHWISE, IEEE, ON_GPU, PRECISIONS, ours
from operands import call, operands
from test_ops_apply import WHOLE as APPLY
from test_ops_pointwise import WHOLE as POINTWISE

import dcd_kernels as dcd

LAYOUTS = ("contiguous", "channels_last", "sliced")
OPS = {
    "pointwise": ("pointwise", "fusion alone", "attention alone", "blocks"),
    "depthwise": ("depthwise", "depthwise attention alone"),
    "joint": ("joint",),
    "centre": ("centre", "centre attention alone", "centre blocks", "grouped"),
    "linear": ("linear", "linear rows", "linear blocks"),
    "apply": ("apply", "apply blocks", "apply attention alone", "apply on a latent"),
}
OP_OF = {form: op for op, forms in OPS.items() for form in forms}


def test_every_form_is_here():
    assert set(OP_OF) == set(FORMS)
    assert set(BACKENDS) == set(OPS)


def check(form, precision, layout, device, **options):
    case = make_case(form, dtype=precision.dtype, device=device, layout=layout, **options)
    if precision.wide:
        wide = {key: case.tensors[key].float() for key in ("lam", "phi", "bias") if key in case.names}
        case = case.with_tensors(wide)
    with precision():
        case = case.with_tensors({key: case.tensors[key].detach().requires_grad_() for key in case.names})
        with ours(OP_OF[form]):
            output = case.run(dcd)
        plain = case.run(dcd.reference)
        assert_close_to_truth(output, plain, case.truth(), eps=precision.eps)
        exact = case.converted(torch.float64).requiring_grad()
        truth = exact.run(dcd.reference)
        grad = torch.randn(truth.shape, dtype=torch.float64).to(device).to(precision.dtype)
        wanted = [
            key for key in case.names if not (form.startswith("apply attention") and key == "input")
        ]  # without a residual the input is read nowhere
        got, same, right = (
            torch.autograd.grad(y, [tensors.tensors[key] for key in wanted], grad.to(y.dtype))
            for y, tensors in ((output, case), (plain, case), (truth, exact))
        )
    for key, mine, theirs, true in zip(wanted, got, same, right, strict=True):
        assert_close_to_truth(mine, theirs, true, f"d {key}", precision.eps)


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", FORMS)
def test_values_and_gradients(form, layout, precision, device):
    check(form, precision, layout, device, bias="shared", residual=True)


@pytest.mark.parametrize("precision", (IEEE, BF16), ids=str)
@pytest.mark.parametrize(
    "options",
    (
        {"in_channels": 3, "out_channels": 5, "latent": 1},
        {"size": (1, 1), "latent": 11},
        {"batch": 1, "in_channels": 45, "out_channels": 70, "size": (7, 7)},
        {"stride": 2, "size": (9, 8)},
        {"activation": "hardswish", "bias": "sample", "lam": False},
    ),
    ids=str,
)
@pytest.mark.parametrize("form", ("pointwise", "depthwise", "joint", "centre", "linear rows", "apply"))
def test_awkward_sizes(form, options, precision, device):
    options = dict(options)
    if form == "linear rows":
        options.pop("stride", None)
        options["size"] = (1, 1)
    check(form, precision, "contiguous", device, **options)


@pytest.mark.parametrize("form", FORMS)
def test_an_empty_batch(form, device):
    case = make_case(form, batch=0, dtype=torch.float32, device=device, bias="shared")
    with ours(OP_OF[form]):
        output = case.run(dcd)
    assert output.shape == case.run(dcd.reference).shape
    assert output.device.type == device.type and output.numel() == 0


@pytest.mark.parametrize("form", FORMS)
def test_auto_takes_these_kernels(form, device):
    """Without being asked, and `explain` says so."""
    case = make_case(form, dtype=torch.bfloat16 if ON_GPU else torch.float32, device=device)
    (call,) = dcd.explain(getattr(dcd, case.function), **case.tensors, **case.options).calls
    assert call.chosen == BACKENDS[OP_OF[form]], str(call)


@pytest.mark.parametrize("form", ("pointwise", "depthwise", "centre", "joint", "linear", "apply"))
def test_tensors_on_different_devices_raise(form, device):
    case = make_case(form, dtype=torch.float32, device=device, bias="shared", residual=True)
    elsewhere = torch.device("cpu" if ON_GPU else "meta")
    first, *others = case.names
    for name in others:
        wanted = rf"{name} must be on {device.type}.* got {elsewhere.type}"
        with pytest.raises(ValueError, match=wanted):
            case.with_tensors({name: case.tensors[name].to(elsewhere)}).run(dcd)
    with pytest.raises(ValueError, match=rf"must be on {elsewhere.type}.* got {device.type}"):
        case.with_tensors({first: case.tensors[first].to(elsewhere)}).run(dcd)


@pytest.mark.parametrize("case", (POINTWISE, APPLY, DEPTHWISE[2]), ids=lambda case: case.op)
def test_ops_called_directly_refuse_different_devices(case, cuda):
    """The public functions look before; whoever calls an op itself gets an error too, and no bad address."""
    for place in range(1, 8):
        tensors = operands(case, device=cuda)
        tensors[place] = tensors[place].cpu()
        with pytest.raises((RuntimeError, ValueError, TypeError)):
            call(case, tensors)
            torch.cuda.synchronize()


def test_float64_runs_somewhere(device):
    """No GPU kernel has it: the reference does, and is right to float64."""
    case = make_case("pointwise", device=device)
    torch.testing.assert_close(case.run(dcd).cpu(), case.truth(), rtol=1e-12, atol=1e-12)
