# SPDX-License-Identifier: BSD-3-Clause
"""Random calls of every compiled CPU operator, drawn by hypothesis: values and all gradients.

A failure prints the smallest call that fails; the values in it come from the session's seed, so that
repeating it takes ``DCD_KERNELS_TEST_SEED`` beside what hypothesis prints.
"""

from __future__ import annotations

import contextlib
import math

import cases
import pytest
import torch
from cases import Case, in_layout, make_case
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dcd_kernels as dcd
from dcd_kernels import extension

pytestmark = pytest.mark.skipif(not extension.LOADED, reason=extension.REASON)

if extension.LOADED:
    from operands import ISAS, instruction_set
else:  # only named in what is skipped
    ISAS, instruction_set = ["baseline"], contextlib.nullcontext

IMAGES = ("input", "static", "residual")
EXPANDED = ("lam", "phi")  # the same coefficients for every sample: a batch stride of zero
ACTIVATIONS = (None, "relu", "relu6", "silu", "hardswish")
KINKS = {"relu": (0,), "relu6": (0, 6), "hardswish": (-3, 3)}
NEAR_KINK = 1e-3

# No suppression but for the fixture that poisons outputs: it sets two flags and holds nothing of an example.
QUICK = settings(
    max_examples=100,
    deadline=None,
    print_blob=True,
    derandomize=False,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
LONG = settings(QUICK, max_examples=1500)


def numbers(least: int, most: int) -> st.SearchStrategy[int]:
    return st.integers(least, most)


@st.composite
def spatial_sizes(draw) -> tuple[int, ...]:
    spatial = draw(st.sampled_from((2, 1, 3)))
    return tuple(draw(numbers(1, 5 if spatial == 3 else 15)) for _ in range(spatial))


@st.composite
def channels(draw, most: int = 40) -> dict:
    """in_channels, out_channels and blocks, the last dividing the others."""
    blocks = draw(st.sampled_from((1, 1, 2, 3, 4)))
    each = numbers(1, most // blocks)
    return {
        "blocks": blocks,
        "in_channels": blocks * draw(each),
        "out_channels": blocks * draw(each),
    }


@st.composite
def windows(draw, kernels: st.SearchStrategy[int], most_dilation: int) -> dict:
    """size, kernel, stride, padding and dilation of a convolution that has an output."""
    size = draw(spatial_sizes())

    def each(strategy) -> tuple[int, ...]:
        return tuple(draw(strategy) for _ in size)

    kernel, dilation = each(kernels), each(numbers(1, most_dilation))
    padding = draw(st.sampled_from(("numbers", "numbers", "same", "valid")))
    stride = (1,) * len(size) if padding == "same" else each(numbers(1, 3))
    padding = each(numbers(0, 3)) if padding == "numbers" else padding
    around = (0,) * len(size) if isinstance(padding, str) else padding
    if padding != "same":
        reach = (d * (k - 1) + 1 - 2 * pad for d, k, pad in zip(dilation, kernel, around, strict=True))
        size = tuple(max(length, least) for length, least in zip(size, reach, strict=True))
    return {
        "spatial": len(size),
        "size": size,
        "kernel": kernel,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
    }


@st.composite
def pointwise(draw) -> tuple[str, dict]:
    size = draw(spatial_sizes())
    moved = draw(st.booleans())
    where = {"stride": draw(numbers(1, 3)), "padding": draw(numbers(0, 2))} if moved else {}
    return "pointwise", {"spatial": len(size), "size": size, **where, **draw(channels())}


@st.composite
def linear(draw) -> tuple[str, dict]:
    size = tuple(draw(st.lists(numbers(0, 9), max_size=3)))
    return "linear", {"size": size, "spatial": len(size), **draw(channels())}


@st.composite
def depthwise(draw) -> tuple[str, dict]:
    ci = draw(numbers(1, 40))
    multiple = draw(numbers(1, max(1, min(3, 40 // ci))))
    window = draw(windows(numbers(1, 5), 3))
    return "depthwise", {"in_channels": ci, "out_channels": multiple * ci, **window}


@st.composite
def joint(draw) -> tuple[str, dict]:
    sides = {"in_channels": draw(numbers(1, 40)), "out_channels": draw(numbers(1, 40))}
    return "joint", {"latent_kernel": draw(numbers(1, 5)), **sides, **draw(windows(numbers(1, 3), 2))}


@st.composite
def centre(draw) -> tuple[str, dict]:
    """A static k×k convolution, grouped too, with a residual at its centre tap."""
    sides = draw(channels())
    groups = draw(st.sampled_from([g for g in range(1, 5) if sides["blocks"] % g == 0]))
    if groups == sides["in_channels"]:
        groups = 1  # depthwise, which is another form
    return "centre", {"groups": groups, **sides, **draw(windows(st.sampled_from((1, 3)), 2))}


@st.composite
def apply(draw) -> tuple[str, dict]:
    size = draw(spatial_sizes())
    form = draw(st.sampled_from(("apply", "apply on a latent")))
    sides = draw(channels())
    if form == "apply on a latent":
        sides["blocks"] = 1
    where = {"stride": draw(numbers(1, 3)), "offset": draw(numbers(-3, 3))} if draw(st.booleans()) else {}
    return form, {"spatial": len(size), "size": size, **where, **sides}


@st.composite
def calls(draw, forms) -> Case:
    """A call of one form with random operands: which ones, in which layouts, of which dtype."""
    form, options = draw(forms)
    dynamic = draw(st.sampled_from((True, True, True, False)))
    case = make_case(
        form,
        **options,
        batch=draw(st.sampled_from((2, 1, 3, 0))),
        latent=draw(numbers(1, 11)),
        dynamic=dynamic or form == "joint",  # without its factors this one is a static convolution
        lam=draw(st.booleans()),
        bias=draw(st.sampled_from((None, "shared", "sample"))),
        residual=draw(st.booleans()),
        activation=draw(st.sampled_from(ACTIVATIONS)),
        dtype=draw(st.sampled_from((torch.float32, torch.float64))),
        seed=draw(numbers(0, 2**16)),
    )
    laid: dict[str, torch.Tensor] = {}
    for name in case.names:
        image = name in IMAGES
        layouts = ["contiguous", "sliced"] + ["channels_last"] * image + ["expanded"] * (name in EXPANDED)
        layout = draw(st.sampled_from(layouts), label=f"layout of {name}")
        tensor = case.tensors[name]
        if layout == "expanded":
            laid[name] = tensor[:1].expand(tensor.shape)
        else:
            laid[name] = in_layout(tensor, layout, image)
    return case.with_tensors(laid)


def results(case: Case, module, seed: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """The output, and with the output's gradient ``seed`` the gradients of all tensors, by name."""
    leaves = {name: case.tensors[name].detach().requires_grad_() for name in case.names}
    output = case.with_tensors(leaves).run(module)
    found = {"output": output.detach()}
    if seed is not None:
        gradients = torch.autograd.grad(output, list(leaves.values()), seed, allow_unused=True)
        found |= {f"gradient of {n}": g for n, g in zip(leaves, gradients, strict=True) if g is not None}
    return found


def cotangent(case: Case) -> torch.Tensor:
    """A float64 gradient of the output: random, and zero where rounding decides the activation's branch."""
    linear = Case(case.form, case.function, case.tensors, {**case.options, "activation": None})
    before = linear.converted(torch.float64).run(dcd.reference)
    generator = torch.Generator().manual_seed(cases.SEED)
    seed = torch.randn(before.shape, generator=generator, dtype=torch.float64)
    for kink in KINKS.get(case.options["activation"], ()):
        seed[(before - kink).abs() < NEAR_KINK] = 0
    return seed


def magnitudes(case: Case, seed: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same sums over absolute values: without an activation each result is a sum of products."""
    values = {name: case.tensors[name].detach().double().abs() for name in case.names}
    positive = Case(case.form, case.function, values, {**case.options, "activation": None})
    filled = positive.with_tensors({name: None for name in case.tensors if name not in values})
    return results(filled, dcd.reference, seed.abs())


def check(case: Case, isa: str) -> None:
    """Every result within the project's tolerance, or within rounding of the sum of absolute terms.

    The second bound is for what the first cannot judge: float64, whose truth is rounded as much, and the one
    number or the few in which terms cancel, so that plain PyTorch may be right to the last bit by luck.
    """
    dtype = case.tensors[case.names[0]].dtype
    eps = torch.finfo(dtype).eps
    # A cotangent that float32 holds exactly, the same in all three computations.
    seed = cotangent(case).to(dtype)
    truth = results(case.converted(torch.float64), dcd.reference, seed.double())
    plain = results(case, dcd.reference, seed)
    size = magnitudes(case, seed.double())
    with dcd.use_backend("cpu"), instruction_set(isa):
        found = results(case, dcd, seed)
    assert found.keys() == truth.keys()
    for what, right in truth.items():
        try:
            cases.assert_close_to_truth(found[what], plain[what], right, what)
        except AssertionError:
            assert found[what].shape == right.shape and found[what].dtype == dtype, what
            error = torch.linalg.vector_norm(found[what].double() - right).item()
            allowed = 32 * eps * torch.linalg.vector_norm(size[what]).item()
            if not math.isfinite(error) or error > allowed:
                raise


FORMS = {
    "pointwise": pointwise(),
    "linear": linear(),
    "depthwise": depthwise(),
    "joint": joint(),
    "centre": centre(),
    "apply": apply(),
}


@pytest.mark.parametrize("form", FORMS)
@QUICK
@given(data=st.data())
def test_any_call(form, data):
    check(data.draw(calls(FORMS[form]), label="call"), data.draw(st.sampled_from(ISAS), label="isa"))


@pytest.mark.full
@pytest.mark.parametrize("form", FORMS)
@LONG
@given(data=st.data())
def test_many_calls(form, data):
    check(data.draw(calls(FORMS[form]), label="call"), data.draw(st.sampled_from(ISAS), label="isa"))
